"""Samples whose rows an index gives them, against a loop of plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import unbatch as ub
from cases.ragged import BATCH, CASES, EDGES, C, D, N, Net, R, by_edges, by_node, reals
from unbatch.capture import ragged_rows
from unbatch.capture.trees import dense

pytestmark = pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")

EXACT = 1e-12


def rows_by_a_loop(case) -> dict[str, Tensor]:
    """Pull the cotangents of each sample's rows back by themselves."""
    net, predictions = case.model, case.predictions()
    (slope,) = torch.autograd.grad(case.value(predictions), predictions, retain_graph=True)
    owners = torch.arange(len(predictions)) if case.owners is None else case.owners
    rows = []
    for n in range(case.samples):
        alone = torch.zeros_like(slope)
        alone[owners == n] = slope[owners == n]
        rows.append(
            torch.autograd.grad(
                predictions, list(net.parameters()), alone, retain_graph=True, allow_unused=True
            )
        )
    named = {}
    for i, (name, p) in enumerate(net.named_parameters()):
        of_samples = [torch.zeros_like(p) if row[i] is None else dense(row[i]) for row in rows]
        named[name] = torch.stack(of_samples)
    return named


def matrix(case) -> Tensor:
    """``JᵀHJ`` by one backward pass for each entry of the predictions."""
    parameters, predictions = list(case.model.parameters()), case.predictions()
    columns = []
    for entry in predictions.flatten():
        grads = torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        columns.append(torch.cat([dense(grad).flatten() for grad in grads]))
    J = torch.stack(columns)

    def loss(z: Tensor) -> Tensor:
        return case.value(z.view_as(predictions))

    H = torch.autograd.functional.hessian(loss, predictions.detach().flatten())
    return J.T @ H @ J


def near(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert torch.allclose(found, expected, rtol=0, atol=EXACT), what


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_a_loop(name: str) -> None:
    case = CASES[name]()
    problem, expected = case.problem, rows_by_a_loop(case)
    assert problem.samples == case.samples
    rows, norms = problem.gradients(), problem.compute(ub.SquaredNorms())
    for parameter, row in expected.items():
        near(rows[parameter], row, parameter)
        near(norms[parameter], row.square().flatten(1).sum(1), f"norms of {parameter}")


@pytest.mark.parametrize("name", CASES)
def test_the_structure_is_the_truth(name: str) -> None:
    case = CASES[name]()
    problem = case.problem
    structure = problem.structure
    expected = "holds" if case.independent else "fails"
    if case.is_open:
        expected = "unknown"
    assert structure.independent_forward.status == expected
    assert structure.reduction.status == "holds"
    if case.independent:
        # They are of different sizes, and one function all the same: nothing speaks against it.
        assert structure.simd_forward.status != "fails"
    assert structure.simd_loss.status != "fails"
    assert problem.verify()


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_is_the_definition(name: str) -> None:
    case = CASES[name]()
    G, expected = case.problem.ggn(), matrix(case)
    near(G.diag(), expected.diagonal(), "diagonal")
    near(G.diag(per_component=True).sum(0), expected.diagonal(), "diagonals")
    near(G.to_dense(), expected, "matrix")
    near(G @ torch.ones(len(expected)).double(), expected.sum(1), "product")


def test_predictions_are_the_rows_of_each_sample_and_zeros_behind_them() -> None:
    case = CASES["nodes in no order"]()
    predictions, expected = case.problem.predictions(), case.predictions()
    for n in range(N):
        of_sample = expected[case.owners == n]
        near(predictions[n, : len(of_sample)], of_sample, "rows")
        assert not predictions[n, len(of_sample) :].any()


def test_another_batch_of_the_same_rows() -> None:
    case = CASES["nodes"]()
    X, y = reals(R, D), torch.randint(C, (R,))
    rows = case.problem.with_batch(X, y).gradients()
    afresh = ub.Problem(case.model, case.loss, (X, y), in_dims=case.in_dims).gradients()
    for parameter in afresh:
        near(rows[parameter], afresh[parameter], parameter)


def test_other_edges_are_another_computation() -> None:
    case = CASES["messages"]()
    problem = case.problem
    assert problem.structure.independent_forward
    X, edges = reals(R, D), EDGES.clone()
    edges[1, 0] = 4  # to a node of another graph
    other = problem.with_batch((X, edges), case.y)
    assert other.structure.independent_forward.status == "fails"
    assert other.gradients().kind == "per-component"


REFUSED: dict[str, tuple[Callable, str]] = {
    "numbers that are not whole": (lambda: ub.rows_of(BATCH.double()), "whole numbers"),
    "numbers below zero": (lambda: ub.rows_of(BATCH - 1), "from 0 on"),
    "fewer samples than there are": (lambda: ub.rows_of(BATCH, samples=2), "samples="),
    "nothing": (lambda: ub.rows_of(), "NoneType"),
    "an index and pointers": (lambda: ub.rows_of(BATCH, ptr=BATCH), "ptr="),
    "pointers that begin late": (lambda: ub.rows_of(ptr=torch.tensor([1, 2])), "ptr="),
    "a list": (lambda: ub.rows_of([0, 1]), "list"),
    "targets without such rows": (
        lambda: _problem(reals(R, D), torch.zeros(N, C), ub.rows_of(BATCH)),
        "entries of their own",
    ),
    "a batch of other rows": (
        lambda: CASES["nodes"]().problem.with_batch(reals(R + 1, D), torch.zeros(R + 1).long()),
        "make a problem for each",
    ),
    "several sample axes": (
        lambda: ub.Problem(
            Net(by_node),
            torch.nn.functional.mse_loss,
            (reals(R, D), reals(R, C)),
            in_dims=ub.rows_of(BATCH),
            sample_dims=(0, 1),
        ),
        "sample_dims",
    ),
    "edges by their numbers": (
        lambda: ub.Problem(
            Net(by_edges),
            torch.nn.functional.mse_loss,
            ((reals(R, D), EDGES), reals(R, C)),
            in_dims=((ub.rows_of(BATCH), ub.rows_of(BATCH[EDGES[0]], dim=1)), ub.rows_of(BATCH)),
        ),
        "put None",
    ),
}


def _problem(X: Tensor, y: Tensor, in_dims) -> ub.Problem:
    return ub.Problem(Net(by_node), torch.nn.functional.mse_loss, (X, y), in_dims=in_dims)


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name: str) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ub.InputError, match=words):
        make()


def test_rows_given_to_the_next_sample_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ragged_rows._places
    monkeypatch.setattr(
        ragged_rows, "_places", lambda owners, samples: right((owners + 1) % samples, samples)
    )
    with pytest.raises(AssertionError):
        test_rows_are_those_of_a_loop("nodes")
