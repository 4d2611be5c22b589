"""Backward passes that PyTorch did not write: right, under another name, or refused by name."""

import pytest
import torch
from torch.testing import assert_close

import unbatch as ub
from cases.own_backward import CASES, PER_SAMPLE, REFUSED


def truth(net, loss, x, y):
    """Return the Jacobian, the rows and ``JᵀHJ`` by one backward pass for every prediction."""
    parameters = list(net.parameters())
    predictions = net(x)
    (slope,) = torch.autograd.grad(loss(predictions, y), predictions, retain_graph=True)
    rows = []
    for n in range(len(x)):
        alone = torch.zeros_like(slope)
        alone[n] = slope[n]
        rows.append(pulled(predictions, parameters, alone))
    units = torch.eye(predictions.numel(), dtype=predictions.dtype)
    jacobian = torch.stack([pulled(predictions, parameters, u.view_as(slope)) for u in units])
    hessian = torch.autograd.functional.hessian(
        lambda p: loss(p.view_as(slope), y), predictions.detach().flatten()
    )
    return torch.stack(rows), jacobian.T @ hessian @ jacobian


def pulled(predictions, parameters, cotangent):
    grads = torch.autograd.grad(predictions, parameters, cotangent, retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


ANSWERED = [name for name, case in CASES.items() if case.outcome != REFUSED]


@pytest.mark.parametrize("name", ANSWERED)
def test_rows_are_those_of_plain_autograd_and_are_called_what_they_are(name):
    case = CASES[name]
    net, loss, x, y = case.build()
    rows = ub.Problem(net, loss, (x, y)).gradients()
    expected, _ = truth(net, loss, x, y)
    assert_close(rows.flat(), expected)
    assert rows.kind == case.outcome


@pytest.mark.parametrize("name", ANSWERED)
def test_all_ways_to_the_matrix_agree(name):
    net, loss, x, y = CASES[name].build()
    G = ub.Problem(net, loss, (x, y)).ggn()
    _, expected = truth(net, loss, x, y)
    v = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    assert_close(G @ v, expected @ v)
    assert_close(G.diag(), expected.diag())
    assert_close(G.to_dense(), expected)
    assert_close(G.trace(), expected.trace())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.outcome == REFUSED])
def test_what_is_not_linear_is_refused_with_its_place(name):
    net, loss, x, y = CASES[name].build()
    problem = ub.Problem(net, loss, (x, y))
    questions = [
        problem.gradients,
        lambda: problem.compute(ub.SquaredNorms()),
        lambda: problem.ggn() @ torch.ones(problem.ggn().shape[0]).double(),
        lambda: problem.ggn().diag(),
    ]
    for question in questions:
        with pytest.raises(ub.StructureError, match="not linear") as refusal:
            question()
        assert ".py:" in str(refusal.value), "it names the line"
    gradient = problem.gradient()
    loss(net(x), y).backward()
    for parameter_name, p in net.named_parameters():
        assert_close(gradient[parameter_name], p.grad)


@pytest.mark.parametrize(
    "name", [name for name, c in CASES.items() if c.outcome not in (REFUSED, PER_SAMPLE)]
)
def test_joined_samples_are_said_in_the_report(name):
    net, loss, x, y = CASES[name].build()
    problem = ub.Problem(net, loss, (x, y))
    assert "lets other samples into a sample's gradient" in str(problem.structure)
    assert problem.structure.follows("per-sample gradients").outcome == "renamed"
    with pytest.warns(ub.MixedSamplesWarning, match="backward pass"):
        problem.compute(ub.Variance())


def test_a_clip_is_said_in_the_report():
    net, loss, x, y = CASES["a hook that clips"].build()
    assert "is not linear" in str(ub.Problem(net, loss, (x, y)).structure)


def test_hooks_that_only_look_cost_no_plan():
    net, loss, x, y = CASES["a hook that looks"].build()
    assert ub.Problem(net, loss, (x, y)).plan().pullbacks == 1


def test_samples_that_are_joined_are_not_private():
    from unbatch.integrations import opacus

    net, loss, x, y = CASES["words by frequency"].build()
    (error,) = opacus.validate(ub.Problem(net, loss, (x, y)))
    assert "lets other samples into" in str(error)
