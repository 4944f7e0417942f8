"""`record(candidates=...)`: whose each row or token is, against one backward a candidate in float64."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ftw
from ftw.errors import CandidateLayoutError, ConfigurationError, FtwError, RecordingError
from ftw.gradients import Auto, Contributions, Factorized, Full, GradientExtractor, Recorder
from ftw.gradients.rules import rules_for
from tests.models import MLP, batch_of, label_tokens, lora_llama, tiny_llama, token_mean


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> Iterator[None]:
    """What was imported before need not be walked by each `gc.collect()`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


EXTRACTORS: list[type[GradientExtractor]] = [Auto, Full, Factorized]


def assert_equal(found: Contributions, expected: Contributions) -> None:
    """The same candidates of the same parameters, and the same combined gradient."""
    assert found.count == expected.count
    assert set(found.parameters) == set(expected.parameters)
    weights = torch.linspace(0.0, 2.0, found.count, dtype=torch.float64)
    combined, other = found.combine(weights), expected.combine(weights)
    largest = max(float(g.abs().max()) for g in other.values())
    for p in expected.parameters:
        torch.testing.assert_close(found.per_candidate(p), expected.per_candidate(p), rtol=1e-10, atol=1e-12 * largest)
        torch.testing.assert_close(combined[p], other[p], rtol=1e-10, atol=1e-12 * largest)


def record(
    model: nn.Module, losses: Callable[[], Tensor], extractor: type[GradientExtractor] = Auto, candidates: Any = None
) -> Contributions:
    """Contributions of a lean block that follows the audited one."""
    recorder = Recorder(model, extractor=extractor())
    for _ in range(2):
        recorder.clear()
        with recorder.record(candidates=candidates):
            losses().backward()
    found = recorder.contributions()
    recorder.close()
    return found


# -- packed rows -------------------------------------------------------------------------------------------------------


class Packed:
    """The samples of a padded batch, several in a row, with what keeps them apart."""

    def __init__(self, batch: dict[str, Tensor], rows: list[list[int]], length: int) -> None:
        lengths = batch["attention_mask"].sum(1).tolist()
        shape = len(rows), length
        self.ids = torch.zeros(shape, dtype=torch.long)
        self.positions = torch.zeros(shape, dtype=torch.long)
        self.used = torch.zeros(shape, dtype=torch.long)
        self.owner = torch.full(shape, -1)
        self.labels = torch.full(shape, -100)
        self.order = [sample for row in rows for sample in row]
        for r, row in enumerate(rows):
            at = 0
            for sample in row:
                span = slice(at, at + lengths[sample])
                self.ids[r, span] = batch["input_ids"][sample, : lengths[sample]]
                self.positions[r, span] = torch.arange(lengths[sample])
                self.used[r, span] = 1
                self.owner[r, span] = self.order.index(sample)
                # labels already shifted: a sample's first token is no other sample's target
                self.labels[r, at : at + lengths[sample] - 1] = batch["labels"][sample, 1 : lengths[sample]]
                at += lengths[sample]
            if at < length:  # padding: a segment of its own, whose positions begin anew
                self.positions[r, at:] = torch.arange(length - at)
        same = self.owner[:, :, None] == self.owner[:, None, :]
        allowed = same & torch.ones(length, length, dtype=torch.bool).tril()
        self.mask = torch.where(allowed, 0.0, -1e30).double()[:, None]

    def loss(self, model: nn.Module) -> Tensor:
        logits = model(input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions).logits
        return F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=-100)


PACKINGS = {
    "one row": ([[0, 1, 2, 3, 4]], 42),
    "rows of unequal number": ([[0, 2], [1, 4, 3]], 24),
    "rows with padding": ([[3, 1], [2], [4, 0]], 21),
}


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("make", [tiny_llama, lora_llama])
def test_packed_samples_have_the_contributions_of_the_padded_batch(
    make: Callable[[], nn.Module], packing: str, extractor: type[GradientExtractor]
) -> None:
    model, batch = make(), batch_of(5)
    packed = Packed(batch, *PACKINGS[packing])
    reordered = {key: value[packed.order] for key, value in batch.items()}
    expected = record(model, lambda: token_mean(model, reordered), extractor)
    candidates = ftw.packed_candidates(packed.positions, attention_mask=packed.used)
    assert torch.equal(candidates, packed.owner)
    assert_equal(record(model, lambda: packed.loss(model), extractor, candidates), expected)


@pytest.mark.parametrize("packing", ["one row", "rows of unequal number"])
def test_rows_without_padding_need_no_mask_of_their_own(packing: str) -> None:
    rows, _ = PACKINGS[packing]
    model, batch = tiny_llama(), batch_of(5)
    lengths = batch["attention_mask"].sum(1)
    length = max(int(lengths[row].sum()) for row in rows)
    rows = [row for row in rows if int(lengths[row].sum()) == length]
    packed = Packed(batch, rows, length)
    candidates = ftw.packed_candidates(packed.positions)
    assert torch.equal(candidates, packed.owner)
    reordered = {key: value[packed.order] for key, value in batch.items()}
    expected = record(model, lambda: token_mean(model, reordered))
    assert_equal(record(model, lambda: packed.loss(model), candidates=candidates), expected)


def test_borders_in_one_long_row_are_a_map_too() -> None:
    model, batch = tiny_llama(), batch_of(5)
    packed = Packed(batch, *PACKINGS["one row"])
    lengths = batch["attention_mask"].sum(1)
    assert int(lengths.sum()) == packed.ids.shape[1]
    borders = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    candidates = ftw.packed_candidates(cu_seq_lens=borders)
    assert torch.equal(candidates, packed.owner)
    expected = record(model, lambda: token_mean(model, batch))
    assert_equal(record(model, lambda: packed.loss(model), candidates=candidates), expected)


def test_packing_with_leaking_attention_is_refused() -> None:
    """Samples of a row that see each other are no candidates: the audit of identity must say so."""
    model = tiny_llama()
    packed = Packed(batch_of(5), *PACKINGS["one row"])
    length = packed.ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    packed.mask = torch.where(causal, 0.0, -1e30).double()[None, None]
    recorder = Recorder(model)
    with pytest.raises(CandidateLayoutError, match="layer"), recorder.record(candidates=packed.owner):
        packed.loss(model).backward()
    assert recorder.count == 0


def test_a_step_on_packed_rows_is_the_step_on_padded_ones() -> None:
    batch = batch_of(5)
    packed = Packed(batch, *PACKINGS["rows with padding"])
    reordered = {key: value[packed.order] for key, value in batch.items()}
    results = []
    for candidates in (None, packed.owner):
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        selector = ftw.Selector(model, optimizer, target=[batch_of(4)], loss_fn=token_mean, budget=3, warmup=1)
        for _ in range(3):
            with selector.record(mass=label_tokens(reordered), candidates=candidates):
                loss = token_mean(model, reordered) if candidates is None else packed.loss(model)
                loss.backward()
            selection = selector.apply()
            assert len(selection.indices) > 1
            optimizer.step()
            optimizer.zero_grad()
        results.append((selection.weights, [p.detach() for p in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-8)
    for p, q in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("extractor", [Auto, Factorized])
def test_a_block_of_samples_of_unequal_length_may_have_none_chosen(extractor: type[GradientExtractor]) -> None:
    model, x = TokenMLP(), torch.randn(2, 4, 6, dtype=torch.float64)
    owner = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 2]])  # 3, 2 and 3 tokens
    recorder = Recorder(model, extractor=extractor())
    for _ in range(2):
        with recorder.record(candidates=owner):
            model(x).square().sum().backward()
    found = recorder.contributions()
    expected = token_expected(model, x, owner, 3, lambda out: out.square().sum())
    for weights in ([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], [0.0] * 6):
        combined = found.combine(torch.tensor(weights, dtype=torch.float64))
        for p, value in expected.items():
            own = torch.tensordot(torch.tensor(weights[3:], dtype=torch.float64), value, dims=1)
            torch.testing.assert_close(combined[p], own, rtol=1e-10, atol=1e-14)


def test_packed_rows_under_gradient_checkpointing() -> None:
    packed = Packed(batch_of(5), *PACKINGS["rows with padding"])
    model = tiny_llama()
    expected = record(model, lambda: packed.loss(model), candidates=packed.owner)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
        assert_equal(record(model, lambda: packed.loss(model), candidates=packed.owner), expected)


# -- preference pairs --------------------------------------------------------------------------------------------------


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # -> (rows,)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    each = logits.log_softmax(-1).gather(2, labels.clamp_min(0)[..., None])[..., 0]
    result: Tensor = (each * (labels != -100)).sum(1)
    return result


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:  # (pairs,), (pairs,) -> ()
    """DPO's loss, with a reference model of constant log-probabilities."""
    return -F.logsigmoid(0.3 * (chosen - rejected) + 0.1).mean()


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("how", ["interleaved", "halves", "two forwards"])
def test_the_two_rows_of_a_preference_pair_are_one_candidate(how: str, extractor: type[GradientExtractor]) -> None:
    pairs = 4
    model, batch = tiny_llama(), batch_of(2 * pairs)
    # The contribution of a pair is the gradient of its own loss, over the number of pairs.
    params = list(model.parameters())
    dense = []
    for i in range(pairs):
        alone = {key: value[2 * i : 2 * i + 2] for key, value in batch.items()}
        values = log_probabilities(model, alone)
        dense.append(torch.autograd.grad(preference_loss(values[:1], values[1:]) / pairs, params))
    halves = {key: torch.cat([value[0::2], value[1::2]]) for key, value in batch.items()}
    parts = [{key: value[at::2] for key, value in batch.items()} for at in (0, 1)]
    number = torch.arange(pairs)

    def interleaved() -> Tensor:
        values = log_probabilities(model, batch)
        return preference_loss(values[0::2], values[1::2])

    def in_halves() -> Tensor:
        values = log_probabilities(model, halves)
        return preference_loss(values[:pairs], values[pairs:])

    def two_forwards() -> Tensor:
        return preference_loss(*(log_probabilities(model, part) for part in parts))

    run, candidates = {
        "interleaved": (interleaved, number.repeat_interleave(2)),
        "halves": (in_halves, torch.cat([number, number])),
        "two forwards": (two_forwards, [number, number]),
    }[how]
    found = record(model, run, extractor, candidates)
    assert found.count == pairs
    largest = max(float(g.abs().max()) for row in dense for g in row)
    for j, p in enumerate(params):
        expected = torch.stack([row[j] for row in dense])
        torch.testing.assert_close(found.per_candidate(p), expected, rtol=1e-10, atol=1e-12 * largest)


def test_candidates_are_counted_anew_in_each_block_and_pairs_join_the_pool() -> None:
    model, x = MLP(), torch.randn(6, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = ftw.Selector(
        model, optimizer, target=[x], loss_fn=lambda m, x: m(x).square().mean(), filter="all", budget=1.0
    )
    for candidates, mass in (([0, 0, 1, 1, 2, 2], [1, 2, 3]), ([0, 1, 0, 1, 0, 1], [4, 5]), (None, [1] * 6)):
        with selector.record(candidates=candidates, mass=mass):
            model(x).square().mean().backward()
    selection = selector.apply()
    assert len(selection.weights) == 3 + 2 + 6
    expected = torch.tensor([1, 2, 3, 4, 5, *[1] * 6], dtype=torch.float64)
    torch.testing.assert_close(selection.diagnostics["mass"], expected * 11 / expected.sum())


# -- other layouts -----------------------------------------------------------------------------------------------------


class TokenMLP(MLP):
    """(B, T, 6) -> (B, T, 2), token by token."""


class Flattened(MLP):
    """Rows and tokens in one dimension inside the model."""

    def forward(self, x: Tensor) -> Tensor:  # (B, T, 6)
        return super().forward(x.flatten(0, 1)).view(*x.shape[:2], 2)


class InnerTimeFirst(MLP):
    """Recurrent style: its layers see (T, B, 6)."""

    def forward(self, x: Tensor) -> Tensor:  # (T, B, 6)
        total = x.cumsum(0)  # mixes along time, not between candidates
        return super().forward(total)


def token_expected(model: nn.Module, x: Tensor, owner: Tensor, count: int, loss: Callable[[Tensor], Tensor]) -> Any:
    """Each candidate's gradient: the loss of all tokens with the output at every other token held fixed."""
    params = list(model.parameters())
    rows = []
    for i in range(count):
        out = model(x)
        mine = (owner == i).view(*owner.shape, *[1] * (out.dim() - owner.dim()))
        rows.append(torch.autograd.grad(loss(torch.where(mine, out, out.detach())), params))
    return {p: torch.stack([row[j] for row in rows]) for j, p in enumerate(params)}


def assert_dense(found: Contributions, expected: dict[Any, Tensor]) -> None:
    assert set(found.parameters) == set(expected)
    for p, value in expected.items():
        torch.testing.assert_close(found.per_candidate(p), value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("extractor", EXTRACTORS)
def test_a_time_first_model_with_a_map_of_tokens(extractor: type[GradientExtractor]) -> None:
    model, x = InnerTimeFirst(), torch.randn(5, 3, 6, dtype=torch.float64)  # (T, B, 6)
    owner = torch.arange(3).expand(5, 3)
    found = record(model, lambda: model(x).square().mean(), extractor, owner)
    params = list(model.parameters())
    alone = [torch.autograd.grad(model(x[:, i : i + 1]).square().mean() / 3, params) for i in range(3)]
    assert_dense(found, {p: torch.stack([row[j] for row in alone]) for j, p in enumerate(params)})


@pytest.mark.parametrize("extractor", EXTRACTORS)
@pytest.mark.parametrize("kind", [TokenMLP, Flattened])
def test_flattened_tokens_with_a_map_of_tokens(kind: type[MLP], extractor: type[GradientExtractor]) -> None:
    model, x = kind(), torch.randn(3, 4, 6, dtype=torch.float64)
    owner = torch.tensor([[0, 0, 1, 1], [2, 1, 0, 3], [3, 3, 3, 2]])
    found = record(model, lambda: model(x).square().mean(), extractor, owner)
    assert_dense(found, token_expected(model, x, owner, 4, lambda out: out.square().mean()))


def test_rows_flattened_before_a_model_with_a_map_of_rows() -> None:
    """The model itself is called with (B*T, 6): a map of rows says whose each is."""
    model, x = MLP(), torch.randn(3, 4, 6, dtype=torch.float64)
    owner = torch.arange(3).repeat_interleave(4)
    found = record(model, lambda: model(x.flatten(0, 1)).square().mean(), Auto, owner)
    expected = record(model, lambda: model(x).square().mean())
    assert_equal(found, expected)


def test_tokens_of_nobody_may_be_anywhere_if_no_gradient_reaches_them() -> None:
    model, x = TokenMLP(), torch.randn(3, 4, 6, dtype=torch.float64)
    owner = torch.tensor([[-1, 0, 1, -1], [2, -1, -1, 0], [-1, -1, -1, -1]])
    kept = (owner >= 0)[..., None]
    found = record(model, lambda: (model(x).square() * kept).sum(), Auto, owner)
    assert_dense(found, token_expected(model, x, owner, 3, lambda out: (out.square() * kept).sum()))


class Deep(nn.Module):
    """(B, 3, 6, 5) -> (B, 2), its first layer over more than the last dimension of each row."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first.double()
        self.last = nn.Linear(5, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.tanh(self.first(x)).mean((1, 2)))
        return result


@pytest.mark.parametrize("owner", [[0, -1, 1, 2], [-1, 0, 1, 0], [1, 0, -1, 1]])
@pytest.mark.parametrize(
    ("first", "functional"),
    [
        (lambda: nn.Conv2d(3, 8, 3, padding=1), [nn.Conv2d]),
        (lambda: nn.Conv2d(3, 2, (3, 1)), [nn.Conv2d]),
        (lambda: nn.LayerNorm((6, 5)), []),
    ],
    ids=["wider", "smaller", "norm"],
)
def test_rows_of_nobody_at_layers_whose_output_has_another_shape(
    first: Callable[[], nn.Module], functional: list[Any], owner: list[int]
) -> None:
    torch.manual_seed(0)
    model, x, rows = Deep(first()), torch.randn(4, 3, 6, 5, dtype=torch.float64), torch.tensor(owner)
    params, kept = list(model.parameters()), (rows >= 0).double()
    recorder = Recorder(model, rules=rules_for(functional))
    with recorder.record(candidates=rows):
        (model(x).square().sum(1) * kept).sum().backward()
    found = recorder.contributions()
    for i in range(found.count):
        expected = torch.autograd.grad(model(x[rows == i]).square().sum(), params)
        for p, grad in zip(params, expected, strict=True):
            torch.testing.assert_close(found.per_candidate(p)[i], grad, rtol=1e-10, atol=1e-14)
    recorder.clear()
    with pytest.raises(RecordingError, match="nobody"), recorder.record(candidates=rows):
        model(x).square().sum().backward()


# -- random maps -------------------------------------------------------------------------------------------------------


@st.composite
def maps(draw: st.DrawFn, *, tokens: bool) -> Tensor:
    """A map of up to 7 rows, or of up to 4 x 5 tokens, in which every number from 0 on occurs and -1 may."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 5))) if tokens else (draw(st.integers(1, 7)),)
    size = shape[0] * shape[-1] if tokens else shape[0]
    numbers = draw(st.lists(st.integers(-1, 4), min_size=size, max_size=size).filter(lambda each: max(each) >= 0))
    used = sorted({number for number in numbers if number >= 0})
    return torch.tensor([used.index(number) if number >= 0 else -1 for number in numbers]).view(shape)


@settings(max_examples=25, deadline=None)
@given(owner=maps(tokens=False), inner=st.integers(1, 3), kind=st.sampled_from(EXTRACTORS), seed=st.integers(0, 99))
def test_any_map_of_rows_sums_the_rows_of_each_candidate(
    owner: Tensor, inner: int, kind: type[GradientExtractor], seed: int
) -> None:
    model, x = MLP(), torch.randn(len(owner), inner, 6, dtype=torch.float64, generator=torch.manual_seed(seed))
    params, count = list(model.parameters()), int(owner.max()) + 1
    rows = [torch.autograd.grad(model(x[i : i + 1]).square().sum(), params) for i in range(len(x))]
    sums = {p: torch.zeros(count, *p.shape, dtype=torch.float64) for p in params}
    for i, number in enumerate(owner.tolist()):
        for j, p in enumerate(params):
            if number >= 0:
                sums[p][number] += rows[i][j]
    kept = (owner >= 0)[:, None, None]
    recorder = Recorder(model, extractor=kind())
    with recorder.record(candidates=owner):
        (model(x).square() * kept).sum().backward()
    assert_dense(recorder.contributions(), sums)


@settings(max_examples=25, deadline=None)
@given(owner=maps(tokens=True), kind=st.sampled_from(EXTRACTORS), flat=st.booleans(), seed=st.integers(0, 99))
def test_any_map_of_tokens_sums_the_tokens_of_each_candidate(
    owner: Tensor, kind: type[GradientExtractor], flat: bool, seed: int
) -> None:
    model = Flattened() if flat else TokenMLP()
    x = torch.randn(*owner.shape, 6, dtype=torch.float64, generator=torch.manual_seed(seed))
    kept = (owner >= 0)[..., None]
    expected = token_expected(model, x, owner, int(owner.max()) + 1, lambda out: (out.square() * kept).sum())
    recorder = Recorder(model, extractor=kind())
    with recorder.record(candidates=owner):
        (model(x).square() * kept).sum().backward()
    assert_dense(recorder.contributions(), expected)


class Sequence(nn.Module):
    """A table and a causal mean over the tokens of the same sample, given by its number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(9, 4, dtype=torch.float64)
        self.mix = nn.Linear(4, 3, dtype=torch.float64)
        self.head = nn.Linear(3, 2, bias=False, dtype=torch.float64)

    def forward(self, ids: Tensor, segment: Tensor) -> Tensor:  # (B, T), (B, T)
        same = (segment[:, :, None] == segment[:, None, :]).tril().double()
        hidden = (same / same.sum(-1, keepdim=True)) @ self.table(ids)
        result: Tensor = self.head(torch.tanh(self.mix(hidden)))
        return result


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3),
    kind=st.sampled_from(EXTRACTORS),
    seed=st.integers(0, 99),
)
def test_any_packing_of_a_sequence_model_equals_its_samples_one_by_one(
    lengths: list[list[int]], kind: type[GradientExtractor], seed: int
) -> None:
    model, total = Sequence(), max(sum(row) for row in lengths)
    ids = torch.randint(0, 9, (len(lengths), total), generator=torch.manual_seed(seed))
    positions, used = torch.zeros_like(ids), torch.zeros_like(ids)
    samples = []
    for r, row in enumerate(lengths):
        at = 0
        for length in [*row, total - sum(row)]:
            positions[r, at : at + length] = torch.arange(length)
            at += length
        used[r, : sum(row)] = 1
        samples += [part[None] for part in ids[r, : sum(row)].split(row)]
    owner = ftw.packed_candidates(positions, attention_mask=used)
    params = list(model.parameters())
    alone = [torch.autograd.grad(model(s, torch.zeros_like(s)).pow(2).sum(), params) for s in samples]
    recorder = Recorder(model, extractor=kind())
    with recorder.record(candidates=owner):
        (model(ids, owner).pow(2) * used[..., None]).sum().backward()
    assert_dense(recorder.contributions(), {p: torch.stack([row[j] for row in alone]) for j, p in enumerate(params)})


# -- bad maps ----------------------------------------------------------------------------------------------------------

ROWS, T = 4, 3


@pytest.mark.parametrize(
    ("candidates", "error", "message"),
    [
        (torch.tensor([0, 1, 2]), CandidateLayoutError, "one map"),
        (torch.tensor([0, 1, 2, 3, 4]), CandidateLayoutError, "one map"),
        (torch.zeros(ROWS, T + 1, dtype=torch.long), CandidateLayoutError, "tokens of 1 candidates"),
        (torch.tensor([0, 1, 3, 3]), ConfigurationError, r"without \[2\]"),
        (torch.tensor([1, 1, 2, 2]), ConfigurationError, r"without \[0\]"),
        (torch.tensor([0.0, 1.0, 2.0, 3.0]), ConfigurationError, "integers"),
        (torch.tensor([0, 1, -2, 2]), ConfigurationError, "-1"),
        (torch.tensor([-1, -1, -1, -1]), ConfigurationError, "0 candidates"),
        (torch.tensor([0, 1, -1, 2]), RecordingError, "belong to nobody"),
        (torch.tensor([[0, 0, 0], [1, 1, -1], [1, 1, 1], [2, 2, 2]]), RecordingError, "belong to nobody"),
        (torch.zeros(ROWS, T, 1, dtype=torch.long), ConfigurationError, "shape"),
        (torch.zeros((), dtype=torch.long), ConfigurationError, "shape"),
        ([], ConfigurationError, "0 candidates"),
        ([torch.arange(ROWS), torch.arange(ROWS)], CandidateLayoutError, "2 maps"),
        (torch.tensor([True, False, True, False]), ConfigurationError, "integers"),
    ],
    ids=[
        "too short", "too long", "other number of tokens", "a gap", "not from 0", "floats", "-2", "only nobody",
        "a row of nobody with gradient", "a token of nobody with gradient", "three dimensions", "no dimension", "empty",
        "more maps than forwards", "booleans",
    ],
)  # fmt: skip
def test_a_bad_map_is_refused_and_leaves_nothing_behind(candidates: Any, error: Any, message: str) -> None:
    model, x = TokenMLP(), torch.randn(ROWS, T, 6, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    selector = ftw.Selector(model, optimizer, target=[x], loss_fn=lambda m, x: m(x).square().mean(), budget=2)
    for lean in (False, True):  # in the audited block, and in a later one
        outputs: list[weakref.ref[Tensor]] = []
        with pytest.raises(error, match=message) as caught, selector.record(candidates=candidates):
            output = model(x)
            outputs.append(weakref.ref(output))
            output.square().mean().backward()
        assert issubclass(caught.type, FtwError)
        del caught
        output = None
        gc.collect()
        assert not any(ref() is not None for ref in outputs)
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(RecordingError, match="nothing was recorded"):
            selector.apply()
        if not lean:
            with selector.record():
                model(x).square().mean().backward()
            assert len(selector.apply().weights) == ROWS
            optimizer.zero_grad()
    with selector.record(candidates=torch.tensor([0, 0, 1, 1])):  # and a good map serves afterwards
        model(x).square().mean().backward()
    assert len(selector.apply().weights) == 2


def test_fewer_maps_than_forwards_are_refused() -> None:
    model, x = MLP(), torch.randn(4, 6, dtype=torch.float64)
    recorder = Recorder(model)
    for candidates in (torch.arange(4), [torch.arange(4)]):
        with (
            pytest.raises(CandidateLayoutError, match="forward 1 of the block"),
            recorder.record(candidates=candidates),
        ):
            (model(x) + model(x)).square().mean().backward()
        assert recorder.count == 0


@pytest.mark.parametrize("given_", [[0, 0, 1, 1], (0, 0, 1, 1), [torch.tensor([0, 0, 1, 1])], [[0, 0, 1, 1]]])
def test_plain_lists_are_maps_as_well(given_: Any) -> None:
    model, x = MLP(), torch.randn(4, 6, dtype=torch.float64)
    recorder = Recorder(model)
    with recorder.record(candidates=given_):
        model(x).square().mean().backward()
    assert recorder.count == 2


def test_packed_candidates_wants_exactly_one_description() -> None:
    for arguments in ({}, {"position_ids": torch.zeros(1, 3), "cu_seq_lens": torch.tensor([0, 3])}):
        with pytest.raises(ConfigurationError, match="either"):
            ftw.packed_candidates(**arguments)
