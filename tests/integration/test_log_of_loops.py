"""The decision log of Lightning's Trainer and of a loop under `attach`: what names the samples is no model's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ftw_integrations.loop import attach, token_mean
from torch import Tensor

from ftw.errors import ConfigurationError
from ftw.watching import Entry, read_log
from ftw.watching.log import NAME
from tests.integration.test_loop import ARGUMENTS, data, loss_of, optimizer_of
from tests.models import MLP, batch_of, tiny_llama

ROWS, PARTS = 3, 2


def names(number: int) -> dict[str, Any]:
    """Of the samples of a micro-batch."""
    ids = torch.arange(ROWS * number, ROWS * (number + 1))
    return {"id": ids, "source": [f"s{int(i) % 3}" for i in ids], "text": [f"text {int(i)}" for i in ids]}


def assert_names(entry: Entry, ids: list[int]) -> None:
    assert entry.columns["id"] == ids
    assert entry.columns["source"] == [f"s{i % 3}" for i in ids]
    assert entry.columns["text"] == [f"text {i}" for i in ids]


def test_the_log_of_an_attached_loop(tmp_path: Path) -> None:
    model, now = MLP(), [0]
    optimizer = optimizer_of(model)
    with attach(model, optimizer, extras=lambda _: names(now[0]), log=tmp_path, watch=2, **ARGUMENTS):
        for now[0] in range(3 * PARTS):
            loss_of(model, data(ROWS, now[0])).backward()
            if now[0] % PARTS == PARTS - 1:
                optimizer.step()
                optimizer.zero_grad()
    entries = list(read_log(tmp_path / NAME))
    assert [(entry.step, entry.stepped, entry.fidelity is not None) for entry in entries] == [
        (1, True, False),
        (2, True, True),
        (3, True, False),
    ]
    for entry in entries:
        assert_names(entry, list(range(6 * entry.step - 6, 6 * entry.step)))


def test_forwards_that_share_a_block_are_named_in_their_order(tmp_path: Path) -> None:
    model, now = MLP(), [0]
    optimizer = optimizer_of(model)
    with attach(model, optimizer, extras=lambda _: names(now[0]), log=tmp_path, **ARGUMENTS):
        losses = []
        for now[0] in range(PARTS):
            losses.append(loss_of(model, data(ROWS, now[0])))
        torch.stack(losses).mean().backward()
        optimizer.step()
    (entry,) = read_log(tmp_path / NAME)
    assert_names(entry, list(range(6)))


@pytest.mark.parametrize("together", [True, False])
def test_names_that_change_within_a_window_are_refused(together: bool) -> None:
    model, columns = MLP(), {"id": [0, 1, 2]}
    optimizer = optimizer_of(model)
    with attach(model, optimizer, extras=lambda _: columns, **ARGUMENTS):
        loss = loss_of(model, data(ROWS, 0))
        if not together:
            loss.backward()
        columns["source"] = [0, 0, 1]
        message = r"extras are \['id', 'source'\] of this forward and \['id'\]" if together else "in an earlier block"
        with pytest.raises(ConfigurationError, match=message):
            loss_of(model, data(ROWS, 1)).backward()


def without_labels() -> dict[str, Tensor]:
    batch = batch_of(ROWS)
    batch["labels"][1] = -100
    return batch


def test_rows_without_labels_are_not_listed(tmp_path: Path) -> None:
    model = tiny_llama()
    optimizer = optimizer_of(model)
    common: dict[str, Any] = {"target": [batch_of(2)], "budget": 1, "log": tmp_path}
    with attach(model, optimizer, mass=token_mean, extras=lambda _: names(0), **common):
        model(**without_labels()).loss.backward()
        optimizer.step()
    (entry,) = read_log(tmp_path / NAME)
    assert_names(entry, [0, 2])


def test_lightnings_log(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="the integration is for its Trainer")
    from ftw_integrations.lightning import SelectionCallback

    from tests.lightning_runs import CHOOSING, TARGET, Module, fit, single

    class Named(Module):
        """Takes what is the model's."""

        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            own = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
            return super().training_step(own, batch_idx)

    batches = [
        {**(without_labels() if number == 1 else batch_of(ROWS, seed=number)), **names(number)} for number in range(8)
    ]
    callback = SelectionCallback(
        TARGET,
        mass=token_mean,
        extras=lambda batch: {name: batch[name] for name in ("id", "source", "text")},
        log=tmp_path,
        **CHOOSING,
    )
    fit(tmp_path, Named(single(tiny_llama)), batches, callback, max_steps=2)
    first, second = read_log(tmp_path / NAME)
    assert_names(first, [i for i in range(12) if i != 4])
    assert_names(second, list(range(12, 24)))
