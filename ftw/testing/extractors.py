"""The contract of gradient extractors, on a small model with layers of several kinds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from ftw.errors import CompletenessError, CoverageError
from ftw.gradients.base import Contributions, GradientExtractor
from ftw.gradients.pieces import as_rows
from ftw.gradients.recorder import Recorder
from ftw.optim_state.base import Diagonal, Scalar, ScaleOperator
from ftw.testing.ugly import generator_of

WORDS, WIDTH, RANK, CLASSES = 11, 12, 3, 7
FAULTY = 3
"""The candidate that is duplicated, and spoilt by NaN where that is asked for."""

Batches = list[tuple[Tensor, Tensor]]
"""Micro-batches of (rows, T) token numbers and labels, -100 where none is."""


def check_extractor(extractor: GradientExtractor, *, exact: bool = True, seed: int = 0) -> None:
    """Assert the law of `GradientExtractor` in float64: whatever is kept, all that is read of it is what follows from
    the candidates' gradients, which a backward of each candidate alone gives.

    The window has two micro-batches of different lengths, a duplicate and a candidate without labels; a second one
    holds a candidate of NaN. An extractor whose `check` refuses the model as a whole is checked on its adapters alone
    (parameters with "lora" in their name).

    Args:
        exact: False for an extractor that documents an approximation of b and K as blocks tell them: K must then be
            symmetric positive semidefinite and `Contributions.error` an estimate. All else is exact all the same.

    Raises:
        AssertionError: a law is broken; the message says which.
    """
    with torch.random.fork_rng(devices=[]):
        model = _Model().double()
    generator = generator_of(seed)
    for p in model.parameters():
        p.data.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    batches = _batches(seed)
    recorder = _recorder(model, extractor)
    try:
        for attempt in ("an audited block", "a lean block"):
            _check(f"{type(extractor).__name__}, {attempt}", recorder, model, batches, exact, seed)
        _check_quarantine(f"{type(extractor).__name__}, with NaN", recorder, model, batches)
    finally:
        recorder.close()


class _Model(nn.Module):
    """Embedding, adapters of low rank, a norm, a layer called twice, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.lora_A = nn.Linear(WIDTH, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:  # (rows, T) -> (rows, T, CLASSES)
        hidden = self.embedding(ids)
        hidden = self.norm(hidden + self.lora_B(self.lora_A(hidden)))
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(hidden))))
        return self.head(hidden + hidden.cumsum(1))


def _batches(seed: int) -> Batches:
    generator = generator_of(seed + 1)
    found = []
    for rows, length in ((4, 5), (3, 8)):
        ids = torch.randint(WORDS, (rows, length), generator=generator)
        labels = torch.randint(CLASSES, (rows, length), generator=generator)
        labels[:, :2] = -100
        found.append((ids, labels))
    (ids, labels), (_, others) = found
    ids[FAULTY], labels[FAULTY] = ids[0], labels[0]
    others[1] = -100  # a candidate without labels
    return found


def _loss(model: nn.Module, ids: Tensor, labels: Tensor, spoilt: int | None = None) -> Tensor:
    """Sum over labels; a spoilt row's loss is NaN."""
    each = F.cross_entropy(model(ids).transpose(1, 2), labels, ignore_index=-100, reduction="none").sum(1)
    if spoilt is not None:
        each = torch.cat([each[:spoilt], each[spoilt : spoilt + 1] * torch.nan, each[spoilt + 1 :]])
    return each.sum()


def _recorder(model: nn.Module, extractor: GradientExtractor) -> Recorder:
    try:
        return Recorder(model, extractor=extractor)
    except CoverageError:
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name)
        return Recorder(model, extractor=extractor)


def _record(
    what: str, recorder: Recorder, model: nn.Module, batches: Batches, spoilt: int | None = None
) -> Contributions:
    recorder.clear()
    try:
        for number, (ids, labels) in enumerate(batches):
            with recorder.record():
                _loss(model, ids, labels, spoilt if number == 0 else None).backward()
    except CompletenessError as error:
        raise AssertionError(f"{what}: the recorder's audit refuses what is kept: {error}") from error
    return recorder.contributions()


def _oracle(model: nn.Module, batches: Batches) -> dict[Parameter, Tensor]:  # (n, *shape) each
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [
        torch.autograd.grad(_loss(model, ids[i : i + 1], labels[i : i + 1]), trained)
        for ids, labels in batches
        for i in range(len(ids))
    ]
    return {p: torch.stack(each) for p, each in zip(trained, zip(*rows, strict=True), strict=True)}


def _check(what: str, recorder: Recorder, model: nn.Module, batches: Batches, exact: bool, seed: int) -> None:
    dense = _oracle(model, batches)
    contributions = _record(what, recorder, model, batches)
    n = len(next(iter(dense.values())))
    assert contributions.count == n, f"{what}: {contributions.count} candidates of {n}"
    assert set(contributions.parameters) == set(dense), f"{what}: some parameters are missing, or too many"
    made = [p for p in dense if p.grad is not None and bool(p.grad.count_nonzero())]
    assert not made, f"{what}: autograd formed a gradient of {len(made)} parameters"
    alive = torch.stack([value.flatten(1).any(1) for value in dense.values()]).any(0)
    assert torch.equal(contributions.reached(), alive), f"{what}: reached() is {contributions.reached().tolist()}"

    generator = generator_of(seed + 2)

    def drawn(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = drawn((n,)) * (torch.arange(n) % 3 != 1)
    _check_sums(what, contributions, dense, weights)
    direction = {p: drawn(p.shape) for p in dense}
    _equal(f"{what}: alignment()", contributions.alignment(direction), _aligned(dense, direction))
    members = torch.tensor([n - 1, 0, 2])
    part = contributions.only(members)
    for p, value in dense.items():
        _equal(f"{what}: only() of shape {tuple(p.shape)}", part.per_candidate(p), value[members])

    contributions.block_bytes = 1024  # several blocks for each parameter
    for kind in ("diagonal", "scalar"):
        scales: dict[Parameter, ScaleOperator] = {
            p: Diagonal(drawn(p.shape).square() + 0.1) if kind == "diagonal" else Scalar(0.3) for p in dense
        }
        pull = {p: drawn(p.shape) for p in dense}
        _check_blocks(f"{what}, {kind} M", contributions, dense, scales, direction, pull, exact)
    _check_sums(f"{what}, once its blocks were read", contributions, dense, weights)
    if not exact:
        error = contributions.error
        assert error is not None, f"{what}: an approximation has to estimate its error"
        assert error >= 0, f"{what}: error is {error}"


def _check_sums(what: str, contributions: Contributions, dense: Mapping[Parameter, Tensor], weights: Tensor) -> None:
    ones = contributions.combine()
    combined = contributions.combine(weights)
    for p, value in dense.items():
        shape = tuple(p.shape)
        _equal(f"{what}: per_candidate() of shape {shape}", contributions.per_candidate(p), value)
        _equal(f"{what}: combine() of shape {shape}", ones[p], value.sum(0))
        _equal(f"{what}: combine(weights) of shape {shape}", combined[p], torch.tensordot(weights, value, dims=1))
        _equal(f"{what}: total() of shape {shape}", contributions.total(p).view(p.shape), value.sum(0))


def _check_blocks(
    what: str,
    contributions: Contributions,
    dense: Mapping[Parameter, Tensor],
    scales: Mapping[Parameter, ScaleOperator],
    direction: Mapping[Parameter, Tensor],
    pull: Mapping[Parameter, Tensor],
    exact: bool,
) -> None:
    """The sums over blocks that b, K and the rest are read from."""
    n = contributions.count
    structure = "scalar" if all(isinstance(scale, Scalar) for scale in scales.values()) else "any"
    for p, value in dense.items():
        scale = scales[p]
        gram, b, coupling = torch.zeros(n, n).double(), torch.zeros(n).double(), torch.zeros(n).double()
        seen = []
        for block in contributions.blocks(p, structure=structure):
            rows = block.rows
            seen.append(torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows)
            whole = as_rows(value.sum(0))[rows]
            total = block.total()
            _equal(f"{what}: total() of a block", torch.zeros_like(whole) if total is None else total, whole)
            root = scale.cut(rows).sqrt()
            found = block.products(root, as_rows(direction[p])[rows], as_rows(pull[p])[rows])
            if found is not None:
                gram += found.gram
                b += found.alignment
                coupling += found.coupling
        every = torch.cat([torch.zeros(0, dtype=torch.long), *seen]).sort().values
        height = as_rows(p).shape[0]
        assert torch.equal(every, torch.arange(height)), f"{what}: blocks hold rows {every.tolist()} of {height}"
        K = value.flatten(1) @ scale.apply(value).flatten(1).T
        if not exact:
            least = float(torch.linalg.eigvalsh((gram + gram.T) / 2)[0])
            assert least >= -1e-9 * float(gram.diagonal().sum()), f"{what}: K has the eigenvalue {least:.1e}"
            _equal(f"{what}: K and its transpose", gram, gram.T)
            continue
        _equal(f"{what}: K of shape {tuple(p.shape)}", gram, K)
        _equal(f"{what}: b of shape {tuple(p.shape)}", b, value.flatten(1) @ scale.apply(direction[p]).flatten())
        along = value.flatten(1) @ scale.sqrt().apply(pull[p]).flatten()
        _equal(f"{what}: the offset's coupling of shape {tuple(p.shape)}", coupling, along)
    if exact:
        index = torch.tensor([n - 1, 1, 0])
        K = sum((v.flatten(1) @ scales[p].apply(v).flatten(1).T for p, v in dense.items()), torch.zeros(n, n).double())
        _equal(f"{what}: gram()", contributions.gram(scales), K)
        _equal(f"{what}: gram(index)", contributions.gram(scales, index), K[index][:, index])


def _check_quarantine(what: str, recorder: Recorder, model: nn.Module, batches: Batches) -> None:
    """A candidate of NaN is found, counts as zero, and never reaches a gradient."""
    dense = _oracle(model, batches)
    contributions = _record(what, recorder, model, batches, spoilt=FAULTY)
    found = contributions.nonfinite_candidates()
    assert found == (FAULTY,), f"{what}: nonfinite_candidates() is {found}, not ({FAULTY},)"
    for value in dense.values():
        value[FAULTY] = 0.0
    weights = torch.ones(contributions.count, dtype=torch.float64)
    weights[FAULTY] = 0.0
    for p, value in contributions.combine(weights).items():
        _equal(f"{what}: combine() with weight 0 for it", value, dense[p].sum(0))
    rest = contributions.without((FAULTY,))
    _check_sums(f"{what}, in quarantine", rest, dense, torch.full_like(weights, 0.5))
    direction = {p: torch.ones_like(p) for p in dense}
    _equal(f"{what}: alignment() in quarantine", rest.alignment(direction), _aligned(dense, direction))


def _aligned(dense: Mapping[Parameter, Tensor], direction: Mapping[Parameter, Tensor]) -> Tensor:  # (n,)
    each = [value.flatten(1) @ direction[p].detach().flatten() for p, value in dense.items()]
    return torch.stack(each).sum(0)


def _equal(what: str, found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    assert found.dtype == expected.dtype, f"{what} is {found.dtype}, not {expected.dtype}"
    gap, size = float((found - expected).norm()), float(expected.norm())
    assert gap <= 1e-10 * max(size, 1e-3), f"{what} is off by {gap:.1e} of {size:.1e}"
