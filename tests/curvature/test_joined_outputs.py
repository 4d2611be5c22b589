"""The matrix of the whole loss where outputs have no axis of samples, against its definition.

All questions have to agree: products, the dense matrix, diagonal, trace, spectrum, solves. What is
of single samples is a part of the whole, or is refused.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import unbatch as ub
from cases.comparison import near
from cases.joined_outputs import CASES, JoinedCase, dense_ggn
from unbatch.analysis.outputs import Outputs
from unbatch.curvature import loss_hessian

pytestmark = pytest.mark.filterwarnings("ignore::unbatch.VanishingCurvatureWarning")

EVERY = pytest.mark.parametrize("mode", ["train", "eval"])
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def made(case: JoinedCase, mode: str) -> tuple[ub.Problem, Tensor]:
    """Return a problem, and its Gauss-Newton matrix by definition."""
    torch.manual_seed(0)
    model, inputs = case.build()
    model = model.double().train(mode == "train")
    expected = dense_ggn(case, model, inputs)
    return problem_of(case, model, inputs if len(inputs) > 1 else inputs[0]), expected


def problem_of(case: JoinedCase, model: nn.Module, X: Any) -> ub.Problem:
    if case.cut:
        return ub.Problem(model, batch=X, **case.options)
    return ub.Problem(model, lambda o, *_: case.loss(o), (X, None), **case.options)


def damping_of(G: Tensor) -> float:
    values = torch.linalg.eigvalsh(G)
    return float(0.1 * values.abs().max() + 1.5 * max(-values.min(), 0) + 1e-6)


def check_products(problem: ub.Problem, expected: Tensor) -> None:
    G = problem.ggn()
    near(G.to_dense(), expected, "dense")
    v = torch.randn(len(expected), 2).double()
    near(G @ v, expected @ v, "G @ V")
    near(v[:, 0] @ G, v[:, 0] @ expected, "v @ G")
    named = G @ G.space.named(v[:, 0])
    near(torch.cat([t.flatten() for t in named.values()]), expected @ v[:, 0], "G @ dict")
    V = torch.cat([t.reshape(len(t), -1) for t in G.factor().values()], 1).T
    near((V * G.root.sigma) @ V.T, expected, "V Σ Vᵀ")


@EVERY
@EACH
def test_products_and_factors(case, mode):
    check_products(*made(case, mode))


@EVERY
@EACH
def test_diagonal_and_trace(case, mode):
    problem, expected = made(case, mode)
    G = problem.ggn()
    near(G.diag(), expected.diagonal(), "diagonal")
    near(G.trace(), expected.trace(), "trace")
    near(problem.compute(ub.DiagGGN()).flat(), expected.diagonal(), "computed")
    if case.rows:
        norms, diagonal = problem.compute(ub.SquaredNorms(), ub.DiagGGN())
        near(diagonal.flat(), expected.diagonal(), "computed beside rows")
        assert norms.total.shape == (problem.samples,)
    plan = problem.plan(ub.DiagGGN())
    assert plan.pullbacks >= min(G.root.rank, 1)
    assert str(plan)


@EVERY
@EACH
def test_spectrum_and_solves(case, mode):
    problem, expected = made(case, mode)
    G = problem.ggn()
    values = torch.linalg.eigvalsh(expected)
    found = G.eigvalsh()
    largest = values[values.abs().argsort(descending=True)][: len(found)].sort().values
    near(found, largest, "eigenvalues")
    pairs = G.eigh(1)
    near(expected @ pairs.vectors, pairs.vectors * pairs.values, "eigenvector")
    damping = damping_of(expected)
    damped = expected + damping * torch.eye(len(expected)).double()
    b = torch.ones(len(expected)).double()
    right = torch.linalg.solve(damped, b)
    near(G.solve(b, damping, method="woodbury"), right, "solved by the Gram matrix")
    near(G.solve(b, damping, method="cg", rtol=1e-13), right, "solved by products")
    near(G.logdet(damping), torch.linalg.slogdet(damped)[1], "log-determinant")


@EVERY
@EACH
def test_blocks_of_parameters(case, mode):
    problem, expected = made(case, mode)
    G = problem.ggn()
    blocks = problem.ggn(blocks="parameter")
    only = torch.zeros_like(expected)
    for where in G.space.slices.values():
        only[where, where] = expected[where, where]
    near(blocks.to_dense(), only, "blocks")
    near(blocks.diag(), expected.diagonal(), "their diagonal")
    near(blocks.trace(), expected.trace(), "their trace")
    some = problem.ggn(parameters="first.*")
    size = some.shape[0]
    where = [i for n in some.space.shapes for i in range(*G.space.slices[n].indices(len(expected)))]
    assert len(where) == size
    near(some.to_dense(), expected[where][:, where], "of some parameters")
    near(some.diag(), expected.diagonal()[where], "diagonal of some parameters")


@EVERY
@EACH
def test_what_is_of_samples_is_a_part_or_refused(case, mode):
    problem, expected = made(case, mode)
    gradient = problem.gradient()
    if not case.rows:
        with pytest.raises(ub.StructureError, match="sample axis"):
            problem.gradients()
    else:
        rows = problem.gradients()
        assert ("no sample axis" in rows.note) == bool(problem.structure.joined)
        for name, g in gradient.items():
            total = rows[name].sum(0) + rows.rest.get(name, 0)
            near(total, g, f"rows and rest of {name}", 1e-14)
    for ask in of_components(problem):
        if case.parts:
            near(ask(), expected.diagonal(), "the parts together")
        else:
            with pytest.raises(ub.StructureError, match="sample"):
                ask()


def of_components(problem: ub.Problem) -> Iterator:
    """Yield questions whose answers, if there are any, sum to the diagonal."""
    yield lambda: problem.ggn().diag(per_component=True).sum(0)
    quantity = ub.DiagGGN(per_component=True)
    yield lambda: torch.cat([t.sum(0).flatten() for t in problem.compute(quantity).values()])
    every = list(range(problem.samples))
    yield lambda: problem.ggn(samples=every).diag()


@EACH
def test_the_report_names_outputs_without_a_sample_axis(case):
    problem, _ = made(case, "train")
    structure = problem.structure
    assert bool(structure.joined) == ("without a sample axis" in str(structure))
    if not case.rows or not case.parts:
        assert structure.joined
    assert structure.follows("GGN diagonal").outcome == "exact"
    rows = structure.follows("squared gradient norms")
    if not case.rows:
        assert rows.outcome in ("none", "unknown")
    elif structure.joined:
        assert rows.name.endswith("of the part through the predictions") or not rows.name
        assert structure.follows("per-sample GGN diagonals").outcome != "exact"
    for words in structure.joined:
        _, _, shape = words.partition("of shape ")
        assert shape in [str(list(s)) for s in structure.predictions]


@EACH
def test_other_numbers_and_narrow_types(case):
    problem, _ = made(case, "train")
    problem.ggn().trace()
    with torch.no_grad():
        for p in problem.program.parameters.values():
            p.mul_(1.25)
    model, X = problem.program.model, problem.inputs
    expected = dense_ggn(case, model, X if isinstance(X, tuple) else (X,)).diagonal()
    near(problem.ggn().diag(), expected, "after a step")
    single = problem_of(case, model.float(), tree_map(Tensor.float, X))
    size = float(expected.abs().max())
    assert float((single.ggn().diag() - expected).abs().max()) <= 1e-3 * size


def test_the_rest_has_what_the_loss_keeps_of_the_model():
    """An inner value that is made of predictions carries their part of the gradient."""

    class Keeping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            self.mean = z.mean()
            return z

    net = Keeping(3, 2).double()
    problem = ub.Problem(
        net, lambda z: z.square().mean() + net.mean**2, (torch.randn(4, 3).double(), None)
    )
    rows = problem.gradients()
    for name, g in problem.gradient().items():
        near(rows[name].sum(0) + rows.rest[name], g, name)


def test_sparse_forms_serve_outputs_of_any_size(monkeypatch):
    monkeypatch.setattr(loss_hessian, "LARGEST_JOINT", 2)
    for name in ("inside and on the edge", "three views, classes", "a penalty, squared"):
        problem, expected = made(next(c for c in CASES if c.name == name), "eval")
        if name == "a penalty, squared":
            with pytest.raises(ub.StructureError, match="too large"):
                problem.ggn().diag()
            near(problem.ggn().to_dense(), expected, "by products")
        else:
            near(problem.ggn().diag(), expected.diagonal(), name)


def test_a_planted_bug_is_caught(monkeypatch):
    """What has no axis of samples is held constant, as it was once."""
    found = Outputs.of

    def of_samples(*args):
        outputs = found(*args)
        return Outputs(outputs.axes, (), tuple(outputs.axes))

    monkeypatch.setattr(Outputs, "of", of_samples)
    caught = []
    for case in CASES:
        problem, expected = made(case, "train")
        try:
            check_products(problem, expected)
        except (AssertionError, ub.UnbatchError, StopIteration):
            caught.append(case.name)
    without = [case.name for case in CASES if not case.parts]
    assert caught == without
