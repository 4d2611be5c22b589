"""Samples whose rows an index gives them, against a loop of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_map

import unbatch as ub
from cases.ragged import BATCH, CASES, EDGES, C, D, N, Net, R, by_edges, by_node, reals
from unbatch.capture import ragged_rows
from unbatch.capture.trees import dense
from unbatch.problem import spot_check

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


def test_an_index_that_is_written_to_is_refused() -> None:
    index = BATCH.clone()

    class Readout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, C).double()

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return x.new_zeros(N, C).index_add(0, index, self.linear(x))

    X = reals(R, D), index
    problem = ub.Problem(
        Readout(), F.mse_loss, (X, reals(N, C)), in_dims=((ub.rows_of(index.clone()), None), 0)
    )
    problem.gradients()
    index[0] = int(index[-1])
    with pytest.raises(ub.InputError, match="other samples"):
        problem.gradients()


def test_predictions_may_be_packed() -> None:
    case = CASES["words of sentences that are packed, in a GRU"]()

    def packed(net: Net, x: PackedSequence) -> PackedSequence:
        words = net.layer(x)[0]
        return words._replace(data=net.b(words.data))

    def loss(p: PackedSequence, y: Tensor) -> Tensor:
        return case.loss(p.data, y)

    expected = case.problem.gradients()
    case.model.run = packed
    rows = replace(case, loss=loss).problem.gradients()
    for parameter in expected:
        near(rows[parameter], expected[parameter], parameter)


@pytest.mark.parametrize("name", [name for name in CASES if "its own loss" not in name])
def test_a_recording_is_moved_to_other_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]()
    problem = case.problem
    # Without the model itself, which is run now and then beside its recording.
    monkeypatch.setattr(spot_check, "SHARE", 0)
    assert problem.gradients()
    other = replace(case, X=other_numbers(case.X), y=other_numbers(case.y))
    rows = problem.with_batch(other.X, other.y).gradients()
    for parameter, row in rows_by_a_loop(other).items():
        near(rows[parameter], row, parameter)


def other_numbers(tree):
    """Other real numbers; whole ones stay, as they may say whose a row is."""
    return tree_map(lambda t: t.flip(-1) * 0.7 if t.is_floating_point() else t, tree)


def test_several_axes_of_samples_are_moved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spot_check, "SHARE", 0)
    net = Net(by_node)
    X, y = reals(2, 3, D), torch.randint(C, (2, 3))

    def loss(p: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(p.flatten(0, 1), y.flatten())

    problem = ub.Problem(net, loss, (X, y), sample_dims=(0, 1))
    assert problem.gradients()
    rows = problem.with_batch(X * 0.7, y).gradients()
    afresh = ub.Problem(net, loss, (X * 0.7, y), sample_dims=(0, 1)).gradients()
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


OTHER_BATCH = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3, 3])


def other_sentences() -> ub.Problem:
    name = "words of sentences that are packed, in a GRU"
    X = pack_sequence([reals(length, D) for length in (2, 2, 3, 3)], enforce_sorted=False)
    return CASES[name]().problem.with_batch(X, torch.zeros(R).long())


def other_graphs() -> ub.Problem:
    case = CASES["graphs read out by a sum"]()
    return case.problem.with_batch((*case.X[:2], OTHER_BATCH), case.y)


def other_pointers() -> ub.Problem:
    def run(net: Net, x: Tensor, ptr: Tensor) -> Tensor:
        return by_node(net, x)

    ptr = torch.tensor([0, 3, 4, 8, 10])
    rows, X, y = ub.rows_of(ptr=ptr), reals(R, D), reals(R, C)
    loss = torch.nn.functional.mse_loss
    problem = ub.Problem(Net(run), loss, ((X, ptr), y), in_dims=((rows, None), rows))
    return problem.with_batch((X, torch.tensor([0, 2, 4, 8, 10])), y)


def as_many_edges_as_nodes() -> ub.Problem:
    ends = EDGES[0][:R]
    rows, of_ends = ub.rows_of(BATCH), ub.rows_of(BATCH[ends])
    net = Net(lambda net, x: by_node(net, x)[ends])
    loss = torch.nn.functional.cross_entropy
    problem = ub.Problem(net, loss, (reals(R, D), torch.zeros(R).long()), in_dims=(rows, of_ends))
    problem.gradients()
    return problem


def nodes_in_another_order() -> ub.Problem:
    order = torch.arange(R).flip(0)
    net = Net(lambda net, x: by_node(net, x)[order])
    dims = (ub.rows_of(BATCH), None)
    loss = torch.nn.functional.cross_entropy
    problem = ub.Problem(net, loss, (reals(R, D), torch.zeros(R).long()), in_dims=dims)
    problem.gradients()
    return problem


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
    "a batch of other sentences": (other_sentences, "make a problem for each"),
    "a batch of other graphs": (other_graphs, "make a problem for each"),
    "a batch of other pointers": (other_pointers, "make a problem for each"),
    "as many edges as nodes": (as_many_edges_as_nodes, "out_dims"),
    "nodes in another order": (nodes_in_another_order, "out_dims"),
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
