"""The contract of filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.problem import GramSource, SelectionProblem
from ftw.testing.ugly import generator_of, ugly_problems

if TYPE_CHECKING:
    from ftw.filters.base import Filter


def check_filter(filter: Filter, seed: int = 0) -> None:
    """Asserts the law of `Filter` on ugly problems, with every budget from 0 to n and unequal masses.

    K is given as a matrix, on demand and as a factor. The columns that the filter names in `columns` are drawn from a
    few positive numbers, so that they hold ties and serve as labels too; without one of them the filter must raise.
    """
    for ugly in ugly_problems(seed, sizes=(0, 1, 2, 7)):
        n, root = ugly.size, _root(ugly.gram)
        mass = torch.linspace(0.5, 1.5, n, dtype=torch.float64)
        extras = {name: _few_values(n, seed + i) for i, name in enumerate(filter.columns)}
        for budget in {0, 1, n // 2, n} & set(range(n + 1)):
            what = f"{type(filter).__name__} on {ugly.name}, budget {budget}"
            most = budget if filter.honours_budget else n

            def posed(
                gram: Tensor | GramSource | None,
                factor: Tensor | None = None,
                columns: Mapping[str, Any] = extras,
                alignment: Tensor = ugly.alignment,
                budget: int = budget,
                mass: Tensor = mass,
            ) -> SelectionProblem:
                given = {name: values.clone() for name, values in columns.items()}
                return SelectionProblem(
                    gram, alignment.clone(), budget, mass, generator_of(seed), factor=factor, extras=given
                )

            gram = ugly.gram.clone()
            problem = posed(gram)
            index = filter(problem)
            _assert_index(what, index, n, most)
            assert torch.equal(problem.alignment, ugly.alignment), f"{what}: changes the problem's alignment"
            assert torch.equal(gram, ugly.gram), f"{what}: changes the problem's gram"
            for name, values in extras.items():
                assert torch.equal(problem.extras[name], values), f"{what}: changes the column {name!r}"
            again = filter(posed(ugly.gram))
            assert torch.equal(index, again), f"{what}: {index.tolist()}, then {again.tolist()} from the same state"
            lazy = filter(posed(_source(ugly.gram)))
            assert torch.equal(index, lazy), f"{what}: another answer if the gram is formed on demand"
            if not filter.needs_gram:
                assert torch.equal(index, filter(posed(None))), f"{what}: needs_gram is False, but the gram matters"
            factor = root.clone()
            by_factor = filter(posed(None, factor))
            _assert_index(f"{what}, from a factor", by_factor, n, most)
            assert torch.equal(factor, root), f"{what}: changes the problem's factor"
            if ugly.name.startswith("well_posed"):  # elsewhere rounding may decide between equals
                assert torch.equal(index, by_factor), f"{what}: another answer if K is given as a factor"
            for name in extras:
                few = {other: values for other, values in extras.items() if other != name}
                _assert_column_missed(what, filter, posed(ugly.gram, columns=few), name)


def _root(gram: Tensor) -> Tensor:  # (n, n)
    """F with `F F' = K` up to rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root


def _few_values(n: int, seed: int) -> Tensor:  # (n,) float64
    return 0.5 * torch.randint(1, 5, (n,), generator=generator_of(seed)).double()


def _assert_column_missed(what: str, filter: Filter, problem: SelectionProblem, name: str) -> None:
    for run in (lambda: filter.require_columns(problem.extras), lambda: filter(problem)):
        said = None
        try:
            run()
        except ConfigurationError as error:
            said = str(error)
        assert said is not None, f"{what}: the column {name!r} is in `columns`, but runs without it"
        assert name in said, f"{what}: the error without the column {name!r} does not name it: {said}"


def _source(gram: Tensor):  # type: ignore[no-untyped-def]  # a GramSource
    return lambda index: gram if index is None else gram[index][:, index]


def _assert_index(what: str, index: Tensor, n: int, most: int) -> None:
    assert isinstance(index, Tensor), f"{what}: returns {type(index).__name__}, not a tensor"
    assert index.dtype == torch.long, f"{what}: dtype {index.dtype}, not int64"
    assert index.dim() == 1, f"{what}: shape {tuple(index.shape)}, not (m,)"
    assert index.device.type == "cpu", f"{what}: on {index.device}, not on the CPU"
    values = index.tolist()
    assert len(values) <= most, f"{what}: {len(values)} candidates, {most} allowed"
    assert len(set(values)) == len(values), f"{what}: repeats a candidate: {values}"
    assert all(0 <= i < n for i in values), f"{what}: {values} leaves the pool of {n}"
