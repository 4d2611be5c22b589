"""What samples choose by masks of their own is one function of each, however many they choose."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import unbatch as ub
from cases.own_masks import ONE_FUNCTION, OPEN, OTHERS, C, D, data
from unbatch.analysis import inference
from unbatch.analysis.domain.choices import ANONYMOUS, ORDERED, Choices


def problem_of(loss) -> ub.Problem:
    torch.manual_seed(0)
    return ub.Problem(nn.Linear(D, C).double(), loss, data())


@pytest.mark.parametrize("name", ONE_FUNCTION)
def test_one_function_of_what_each_chooses(name: str) -> None:
    problem = problem_of(ONE_FUNCTION[name])
    assert problem.structure.reduction.status == "holds"
    assert problem.structure.simd_loss.status == "holds"
    assert problem.verify()


@pytest.mark.parametrize("name", ONE_FUNCTION)
def test_rows_are_the_parts_of_the_gradient(name: str) -> None:
    loss, (X, y) = ONE_FUNCTION[name], data()
    problem = problem_of(loss)
    rows, model = problem.gradients(), problem.program.model
    predictions = model(X)
    (slope,) = torch.autograd.grad(loss(predictions, y), predictions, retain_graph=True)
    assert rows.kind == "per-sample"
    for n in range(len(X)):
        alone = torch.zeros_like(slope)
        alone[n] = slope[n]
        expected = torch.autograd.grad(
            predictions, list(model.parameters()), alone, retain_graph=True
        )
        for (parameter, _), row in zip(model.named_parameters(), expected, strict=True):
            assert torch.allclose(rows[parameter][n], row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPEN)
def test_what_is_open_is_not_denied(name: str) -> None:
    structure = problem_of(OPEN[name]).structure
    assert "fails" not in (structure.reduction.status, structure.simd_loss.status)


@pytest.mark.parametrize("name", OTHERS)
def test_what_goes_by_the_place_in_the_batch_is_no_one_function(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ub.ContradictedProofWarning)
        assert problem_of(OTHERS[name]).structure.simd_loss.status != "holds"


def _proved(name: str) -> bool:
    """Tell whether the analysis alone takes the loss for one function of each sample."""
    problem = problem_of(OTHERS[name])
    recording = problem._recorded().recording
    structure, _ = inference.infer_structure(recording.graph, 5, [0], [0] * 4)
    return bool(structure.simd_loss)


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        ("ORDERED", "labels of one sample in another order"),
        ("ANONYMOUS", "the last row of the longest twice"),
    ],
)
def test_one_interpretation_alone_is_caught(missing, name, monkeypatch) -> None:
    assert not _proved(name)
    monkeypatch.setattr(inference, missing, ANONYMOUS if missing == "ORDERED" else ORDERED)
    assert _proved(name)


def test_terms_that_are_left_out_are_caught(monkeypatch) -> None:
    assert not _proved("all but the last row")
    monkeypatch.setattr(Choices, "_are_all", lambda choices, owner: True)
    assert _proved("all but the last row")
