"""Which layers are tapped, and the table that `selector.coverage()` shows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ftw.errors import ConfigurationError, CoverageError
from ftw.gradients import Recorder
from ftw.gradients.coverage import CoverageTable, Covered, describe, find_layers
from ftw.gradients.rules import FunctionalRule, rules_for
from tests.models import MLP, tiny_llama


class Mixed(nn.Module):
    """Layers with and without a rule, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.extra = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        x = self.attention(x, x, x)[0]
        result: Tensor = self.head(x)
        return result


def wanted(model: Mixed) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if not name.startswith("extra")]


def table_of(model: nn.Module, recorder: Recorder, policy: str = "error") -> CoverageTable:
    return describe(model, recorder.layers, recorder.uncovered, policy)


@pytest.mark.parametrize("policy", ["scale", "ignore"])
def test_the_table_has_every_trainable_parameter_once(policy: str) -> None:
    model = Mixed()
    table = table_of(model, Recorder(model, lambda: wanted(model), uncovered=policy), policy)
    rows = {row.parameter: row for row in table}
    assert list(rows) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert rows["table.weight"] == Covered(
        "table.weight", (7, 4), ("table", "head"), "recorded", "rows of a look-up table; factors of a matrix product"
    )
    assert (rows["convolution.weight"].how, rows["convolution.weight"].layers) == (policy, ("convolution",))
    assert "Conv1d" in rows["convolution.weight"].rule
    assert rows["attention.out_proj.weight"].layers == ("attention",)
    assert rows["extra.bias"].how == "not in the optimizer"


def test_functional_modules_are_named_with_what_they_hold() -> None:
    model = Mixed()
    recorder = Recorder(model, lambda: wanted(model), rules=rules_for(["convolution"]))
    row = next(row for row in table_of(model, recorder) if row.parameter == "convolution.bias")
    assert (row.how, row.layers) == ("recorded", ("convolution",))
    assert "torch.func" in row.rule


def test_the_table_prints_one_line_a_parameter() -> None:
    model = MLP()
    lines = str(table_of(model, Recorder(model))).splitlines()
    assert lines[0].split() == ["parameter", "shape", "how", "layers", "rule"]
    assert len(lines) == len(list(model.parameters())) + 2
    assert "5x6" in lines[1]
    assert lines[-1] == f"7 trainable parameters; numbers: recorded {sum(p.numel() for p in model.parameters())}"
    assert str(CoverageTable()).endswith("0 trainable parameters; numbers: 0")


def test_a_weight_used_by_many_layers_is_shortened() -> None:
    row = Covered("weight", (2,), ("a", "b", "c", "d"), "recorded", "rule")
    assert "a, b and 2 more" in str(CoverageTable([row]))


def test_the_error_names_the_way_out() -> None:
    with pytest.raises(CoverageError, match=r"convolution\.weight \(Conv1d\).*functional=\["):
        find_layers(Mixed(), None)


def test_a_functional_module_takes_its_children() -> None:
    model = tiny_llama()
    found = find_layers(model, None, rules=rules_for(["model.layers.0"])).layers
    whole = next(layer for layer in found if layer.name == "model.layers.0")
    assert isinstance(whole.rule, FunctionalRule)
    assert set(whole.parameters) == set(dict(model.model.layers[0].named_parameters()))  # type: ignore[union-attr,index]
    assert not any(layer.name.startswith("model.layers.0.") for layer in found)
    assert any(layer.name.startswith("model.layers.1.") for layer in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["convolutoin"], r"convolutoin.*near are \['convolution'"),
        ([nn.LSTM], r"torch\.nn\.modules\.rnn\.LSTM"),
        ([3], "3; allowed are names"),
        ("convolution", "list"),
        (nn.Conv1d, "list"),
    ],
)
def test_functional_is_checked(given: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_layers(Mixed(), None, rules=rules_for(given))  # type: ignore[arg-type]


def test_two_models_do_not_share_what_a_rule_found() -> None:
    rules = rules_for(["convolution"])
    first, second = Mixed(), Mixed()
    find_layers(first, None, rules=rules)
    found = find_layers(second, None, rules=rules).layers
    assert [layer.module for layer in found if layer.name == "convolution"] == [second.convolution]
    assert not any(rule.handles(first.convolution) for rule in rules)


def test_a_rule_of_the_users_own_stands_in_front() -> None:
    class Own(FunctionalRule):
        summary = "mine"

        def handles(self, module: nn.Module) -> bool:
            return isinstance(module, nn.Linear)

    model = MLP()
    layers = find_layers(model, None, rules=rules_for([Own()])).layers
    assert {layer.rule.summary for layer in layers if isinstance(layer.module, nn.Linear)} == {"mine"}
    x = torch.randn(3, 6, dtype=torch.float64)
    recorder = Recorder(model, rules=rules_for([Own()]))
    with recorder.record():
        model(x).square().sum().backward()
    assert recorder.count == 3
