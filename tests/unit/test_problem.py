"""SelectionProblem, Solution and Status: what is accepted, converted, formed on demand and refused."""

import math

import numpy as np
import pytest
import torch

from ftw.errors import ConfigurationError
from ftw.problem import SelectionProblem, Status, as_gram, as_vector


def problem(n: int = 3, **changes):
    arguments = {"gram": torch.eye(n), "alignment": torch.arange(n, dtype=torch.float32), "budget": 2}
    return SelectionProblem(**(arguments | changes))


def test_inputs_become_float64_on_the_cpu_and_mass_sums_to_n():
    it = problem(mass=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16))
    assert it.size == 3
    assert it.gram.dtype == it.alignment.dtype == it.mass.dtype == torch.float64
    assert it.mass.tolist() == [0.5, 1.0, 1.5]
    assert problem().mass.tolist() == [1.0, 1.0, 1.0]


def test_inputs_are_detached_from_the_graph():
    b = torch.ones(3, requires_grad=True)
    assert not problem(alignment=b * 2).alignment.requires_grad


def test_an_empty_pool_is_a_problem():
    it = SelectionProblem(gram=torch.zeros(0, 0), alignment=torch.zeros(0), budget=0)
    assert it.size == 0
    assert it.full_gram.shape == (0, 0)
    assert it.mass.shape == (0,)


@pytest.mark.parametrize("budget", [-1, 4, 1.0, True, None, "2"])
def test_budget_out_of_range_or_of_another_type_is_refused(budget):
    with pytest.raises(ConfigurationError, match="integers from 0 to the pool's size 3"):
        problem(budget=budget)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_position(bad):
    b = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(ConfigurationError, match=r"alignment is not finite at \[1\]"):
        problem(alignment=b)
    with pytest.raises(ConfigurationError, match="gram is not finite"):
        problem(gram=torch.diag(b))
    with pytest.raises(ConfigurationError, match=r"mass is not finite at \[1\]"):
        problem(mass=b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": torch.zeros(3, 1)}, r"alignment has shape \(3, 1\)"),
        ({"gram": torch.eye(4)}, r"gram has shape \(4, 4\); \(3, 3\) is needed"),
        ({"gram": torch.tensor([[1.0, 0.5, 0], [0, 1, 0], [0, 0, 1]])}, "not symmetric"),
        ({"mass": torch.ones(2)}, "mass has 2 entries"),
        ({"mass": torch.tensor([1.0, 0.0, 1.0])}, "3 positive numbers are needed"),
        ({"extras": {"loss": [1.0]}}, r"extras\['loss'\] has 1 entries for 3 candidates"),
        ({"extras": {"loss": 1.0}}, r"extras\['loss'\] is 1.0, which is no column"),
        ({"extras": {"loss": torch.tensor(1.0)}}, "which is no column"),
        ({"extras": {"loss": np.array(1.0)}}, "which is no column"),
        ({"extras": {"source": {"a", "b", "c"}}}, "no order"),
        ({"extras": {"source": {"a": 1, "b": 2, "c": 3}}}, "no order"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        problem(**changes)


def test_asymmetry_of_rounding_size_is_averaged_away():
    gram = torch.tensor([[1.0, 0.5 + 1e-9], [0.5, 1.0]], dtype=torch.float64)
    cleaned = as_gram(gram, 2)
    assert torch.equal(cleaned, cleaned.T)
    assert cleaned[0, 1] == pytest.approx(0.5 + 5e-10, abs=1e-13)


def test_a_source_is_asked_for_blocks_and_only_once_for_the_whole():
    K = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    asked = []

    def source(index):
        asked.append(None if index is None else index.tolist())
        return K if index is None else K[index][:, index]

    it = problem(gram=source)
    assert asked == []
    index = torch.tensor([2, 0])
    assert it.gram_block(index).tolist() == [[5.0, 0.0], [0.0, 2.0]]
    assert it.full_gram.tolist() == K.tolist()
    assert it.gram_block(index).tolist() == [[5.0, 0.0], [0.0, 2.0]]
    assert it.full_gram is it.full_gram
    assert asked == [[2, 0], None]


def test_a_source_of_the_wrong_shape_is_found_out():
    it = problem(gram=lambda index: torch.eye(3))
    with pytest.raises(ConfigurationError, match="gram has shape"):
        it.gram_block(torch.tensor([0]))


def test_without_a_gram_asking_for_it_says_what_to_pass():
    it = problem(gram=None)
    for ask in (lambda: it.full_gram, lambda: it.gram_block(torch.tensor([0]))):
        with pytest.raises(ConfigurationError, match="pass gram=K"):
            ask()


def test_a_problem_cannot_be_changed():
    with pytest.raises(AttributeError):
        problem().budget = 1


@pytest.mark.parametrize("status", list(Status))
def test_a_status_compares_to_its_name_and_is_a_sentence(status):
    assert status == status.value
    assert str(status) == status.value
    assert status.sentence.endswith(".")


def test_vectors_are_taken_from_lists_too():
    assert as_vector("alignment", [1, 2]).tolist() == [1.0, 2.0]


def test_arrays_are_as_good_as_tensors() -> None:
    problem = SelectionProblem(gram=np.eye(3), alignment=np.ones(3), budget=2)
    assert torch.equal(problem.full_gram, torch.eye(3, dtype=torch.float64))
