"""The contract of constraint sets, and a set of each kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ftw.solvers.constraints import ConstraintSet


def constraint_sets(n: int) -> dict[str, ConstraintSet]:
    """Sets for n candidates, each kind loose, tight and with a mass; all feasible if n >= 1."""
    from ftw.solvers import Box, CappedCone, CappedSimplex, Free, Linear, NoHarm, NonNegative, Quota, Simplex

    mass = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
    mass = mass / mass.mean()
    places = torch.arange(n, dtype=torch.float64)
    sources = ["web" if i % 2 else "code" for i in range(n)]
    return {
        "free": Free(),
        "non_negative": NonNegative(),
        "box": Box(0.0, 1.0),
        "box_signed": Box(torch.linspace(-1, 0.1, n, dtype=torch.float64), 2.0),
        "box_half_open": Box(0.25, math.inf),
        "simplex": Simplex(total=float(n)),
        "simplex_mass": Simplex(total=float(n), mass=mass),
        "capped_simplex": CappedSimplex(total=float(n), cap=2.0),
        "capped_simplex_tight": CappedSimplex(total=1.0, cap=1 / max(n, 1)),
        "capped_simplex_mass": CappedSimplex(total=float(n), cap=1.7, mass=mass),
        "capped_cone": CappedCone(4.0),
        "capped_cone_third": CappedCone(max(1.0, n / 3)),
        "capped_cone_equal": CappedCone(1.0),
        "plane": Linear(Free(), torch.ones(1, n), float(n), float(n)),
        "band": Linear(Box(-1.0, 2.0), torch.stack((mass, places.cos())), -0.2 * n, 0.1 * n),
        "quota": Quota(CappedSimplex(total=float(n), cap=2.0), sources, {"web": 0.4}),
        "quota_mass": Quota(Simplex(float(n), mass), sources, {"web": 0.6}, {"code": 0.25}),
        "quota_cone": Quota(CappedCone(4.0), sources, {"web": 0.5}, {"code": 0.1}),
        "no_harm": NoHarm(CappedCone(4.0), torch.stack((places.cos(), (2 * places).sin()), 1)),
    }


def check_constraint_set(constraints: ConstraintSet, n: int, seed: int = 0) -> None:
    """Asserts the law of `ConstraintSet` for n candidates; an empty set must only say that it is empty."""
    generator = torch.Generator().manual_seed(seed)
    what = f"{constraints!r} for n = {n}"
    points = [torch.zeros(n, dtype=torch.float64)]
    for scale in (1e-16, 1e-3, 1.0, 1e3, 1e16):
        points.append(scale * torch.randn(n, generator=generator, dtype=torch.float64))
        points.append(scale * torch.ones(n, dtype=torch.float64))
        points.append(-scale * torch.rand(n, generator=generator, dtype=torch.float64))
    if not constraints.feasible(n):
        assert not constraints.contains(points[0]), f"{what}: infeasible, but contains(0)"
        return
    projections = []
    for point in points:
        before = point.clone()
        projected = constraints.project(point)
        assert torch.equal(point, before), f"{what}: project changes its argument"
        assert projected.shape == (n,), f"{what}: projection of shape {tuple(projected.shape)}"
        assert projected.dtype == torch.float64, f"{what}: projection of dtype {projected.dtype}"
        assert bool(torch.isfinite(projected).all()), f"{what}: project({point}) = {projected}"
        assert constraints.contains(projected, 1e-11), f"{what}: project({point}) = {projected} is outside"
        again = constraints.project(projected)
        assert close(again, projected, 1e-11), f"{what}: projecting twice moves {projected} to {again}"
        projections.append(projected)
    for i, member in enumerate(projections):
        for other in (100 * member, (member + projections[i - 1]) / 2):
            # What the polyhedron holds, the projection has to leave where it is.
            if constraints.contains(other, 1e-13):
                moved = constraints.project(other)
                assert close(moved, other, 1e-11), f"{what}: contains {other}, but projects it to {moved}"
    for point, projected in zip(points, projections, strict=True):
        for member in projections:
            slope = float((point - projected) @ (member - projected))
            size = float((point.norm() + projected.norm()) * (member.norm() + projected.norm()))
            assert slope <= 1e-11 * size, (
                f"{what}: {projected} is not the nearest point to {point}; {member} lies towards it ({slope:.1e})"
            )


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two vectors are equal up to a relative tolerance."""
    return float((left - right).norm()) <= tolerance * float(left.norm() + right.norm())
