"""Whatever a model is made of is answered as plain autograd answers it, or refused in few words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

import unbatch as ub
from cases.made_of import CASES, REFUSED, ROUNDED, C, D, N, Net, labels, linear, mlp, reals
from unbatch.capture.opened import closed, opened
from unbatch.capture.trees import dense

pytestmark = pytest.mark.filterwarnings(
    "ignore::unbatch.VanishingCurvatureWarning",
    "ignore::unbatch.UnregisteredParameterWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)

LONGEST = 600  # of a refusal, in characters

QUESTIONS: dict[str, Callable[[ub.Problem], Any]] = {
    "structure": lambda problem: problem.structure,
    "gradient": lambda problem: problem.gradient(),
    "rows": lambda problem: problem.gradients(),
    "norms": lambda problem: problem.compute(ub.SquaredNorms()),
    "product": lambda problem: problem.ggn() @ _ones(problem.ggn()),
    "diagonal": lambda problem: problem.ggn().diag(),
    "matrix": lambda problem: problem.ggn().to_dense(),
    "verification": lambda problem: bool(problem.verify()),
}


def _ones(G) -> Tensor:
    return torch.ones(G.shape[1], dtype=G.dtype)


def answers(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the case, and the answers to all questions; a refusal in place of one."""
    case = CASES[name]()
    model, loss, X, y, options = case
    found: dict[str, Any] = {}
    try:
        problem = _problem(model, loss, X, y, options)
    except ub.UnbatchError as refusal:
        _check_refusal(refusal)
        return case, dict.fromkeys(QUESTIONS, refusal)
    for question, ask in QUESTIONS.items():
        try:
            found[question] = ask(problem)
        except ub.UnbatchError as refusal:
            _check_refusal(refusal)
            found[question] = refusal
    return case, found


def _problem(model, loss, X, y, options) -> ub.Problem:
    if loss is None:
        return ub.Problem(model, batch=X, **options)
    return ub.Problem(model, loss, (X, y), **options)


def _check_refusal(refusal: Exception) -> None:
    assert "\n" not in str(refusal)
    assert len(str(refusal)) <= LONGEST, str(refusal)


def predictions_and_slopes(case) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of the model, and the gradient of the loss by each."""
    model, loss, X, y, _ = case
    torch.manual_seed(0)
    output = model(*X) if isinstance(X, tuple) else model(X)
    if loss is None:
        outputs = [output.logits]
        return outputs, list(torch.autograd.grad(output.loss, outputs, retain_graph=True))
    output = opened(output)
    cut = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(), output)
    value = loss(closed(cut)) if y is None else loss(closed(cut), y)
    slopes = torch.autograd.grad(value, tree_leaves_of(cut), materialize_grads=True)
    return tree_leaves_of(output), list(slopes)


def tree_leaves_of(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def rows_by_a_loop(case) -> dict[str, Tensor]:
    """Pull the cotangent of each sample's predictions back by itself."""
    parameters = {n: p for n, p in case[0].named_parameters() if p.requires_grad}
    outputs, slopes = predictions_and_slopes(case)
    rows = []
    for n in range(len(outputs[0])):
        alone = [torch.zeros_like(slope) for slope in slopes]
        for part, slope in zip(alone, slopes, strict=True):
            part[n] = slope[n]
        wanted = list(parameters.values())
        row = torch.autograd.grad(outputs, wanted, alone, retain_graph=True, materialize_grads=True)
        rows.append([dense(r) for r in row])
    stacked = [torch.stack(of_parameter) for of_parameter in zip(*rows, strict=True)]
    return dict(zip(parameters, stacked, strict=True))


def near(found: Tensor, expected: Tensor, what: str, exact: float) -> None:
    """Raise where two tensors differ by more than rounding."""
    found, expected = dense(found), dense(expected)
    assert found.shape == expected.shape, what
    if not expected.numel():
        return
    error = float((found - expected).abs().max())
    size = float(expected.abs().max())
    assert error <= exact * max(size, 1.0), f"{what}: off by {error}"


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_plain_autograd(name: str) -> None:
    case, found = answers(name)
    exact = ROUNDED.get(name, 1e-9)
    refused = {q for q, answer in found.items() if isinstance(answer, ub.UnbatchError)}
    assert refused == REFUSED.get(name, set())
    if "rows" not in refused:
        expected = rows_by_a_loop(case)
        for parameter, rows in expected.items():
            near(found["rows"][parameter], rows, parameter, exact)
            squares = rows.abs().square().flatten(1).sum(1)
            near(found["norms"][parameter], squares, f"norms of {parameter}", exact)
    if "gradient" not in refused and "rows" not in refused:
        for parameter, gradient in found["gradient"].items():
            rows = found["rows"]
            rest = rows.rest[parameter] if rows.rest else 0
            near(rows[parameter].sum(0) + rest, gradient, f"sum of {parameter}", exact)
    if "matrix" not in refused:
        matrix = found["matrix"]
        near(found["product"], matrix.sum(1), "product", exact)
        near(found["diagonal"], matrix.diagonal(), "diagonal", exact)
    if "verification" not in refused:
        assert found["verification"]


@pytest.mark.parametrize("name", [n for n in CASES if "jagged" in n or "sparse" in n])
def test_rows_by_copy_are_given_or_refused(name: str) -> None:
    model, loss, X, y, options = CASES[name]()
    try:
        problem = _problem(model, loss, X, y, options)
        rows = problem.gradients(by="copy")
    except ub.UnbatchError as refusal:
        _check_refusal(refusal)
        return
    for parameter, gradient in problem.gradient().items():
        near(rows[parameter].sum(0), gradient, parameter, 1e-9)


def _checkpointed(net, x):
    return net.out(checkpoint(net.inner, x, use_reentrant=True))


def _written_and_checkpointed(net, x):
    return _checkpointed(net, x.mul_(0.5))


def _leaf() -> Tensor:
    return reals(N, D).requires_grad_()


# Into what is made of a leaf a program may write.
CHECKPOINTS = {
    "of a leaf": (_checkpointed, _leaf),
    "of what is made of a leaf": (_written_and_checkpointed, lambda: _leaf() * 2),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_reentrant_checkpoint_has_derivatives_where_its_input_requires_a_gradient(kind) -> None:
    run, inputs = CHECKPOINTS[kind]
    net, X, y = Net(run, inner=mlp(D, D), out=linear(D, C)), inputs(), labels()
    before = X.detach().clone()
    F.cross_entropy(net(X if X.is_leaf else X.clone()), y).backward()
    X.grad = None
    problem = ub.Problem(net, F.cross_entropy, (X, y))
    gradient, rows = problem.gradient(), problem.gradients()
    for name, p in net.named_parameters():
        assert p.grad.abs().max() > 0
        near(gradient[name], p.grad, name, 1e-12)
        near(rows[name].sum(0), p.grad, name, 1e-12)
    assert problem.verify()
    assert torch.equal(X, before)
    assert X.requires_grad
    assert X.grad is None


def test_whether_an_input_requires_a_gradient_is_read_at_each_question() -> None:
    net, X, y = Net(_slope_of, inner=mlp(D, 1)), reals(N, D), reals(N, D)
    problem = ub.Problem(net, F.mse_loss, (X, y))
    with pytest.raises(ub.CaptureError, match="taken in the model"):
        problem.gradient()
    X.requires_grad_()
    rows = problem.gradients()
    assert rows.kind == "per-sample"
    with pytest.raises(ub.CaptureError, match="taken in the model"):
        problem.with_batch(X.detach(), y).gradients()
    again = problem.with_batch(X.detach().requires_grad_(), y).gradients()
    near(again.flat(), rows.flat(), "rows of the same batch", 1e-12)


def _slope_of(net, x):
    (slope,) = torch.autograd.grad(net.inner(x).sum(), x, create_graph=True)
    return slope
