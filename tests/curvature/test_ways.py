"""Every way to answer a question about the Gauss-Newton matrix gives the same answer.

And the cheapest is taken. Against the matrix by double backward, in float64, over the table of
models and losses.
"""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from cases.comparison import near
from cases.gradients import CASES
from unbatch.autodiff.jvp import LinearisedGraph
from unbatch.capture.missing_derivatives import refused_if_missing
from unbatch.curvature.answers import Answers
from unbatch.curvature.ways import Way
from unbatch.reference import definitions as reference

pytestmark = pytest.mark.filterwarnings(
    "ignore::unbatch.VanishingCurvatureWarning"
)  # losses are linear here and there

EVERY = pytest.mark.parametrize("mode", ["train", "eval"])
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

METHODS = {"gram": "woodbury", "dense": "dense"}


@EVERY
@EACH
def test_all_ways_agree(case, mode, recorded):
    args, problem = recorded(case, mode)
    expected = reference.ggn(*args)
    size = float(expected.abs().max())
    if size < 1e-14:
        pytest.skip("it is zero")
    check_every_way(problem.ggn(), expected)


def check_every_way(G, expected):
    """Hold what every way gives against the matrix."""
    for method in ("columns", "forward"):
        near(G.diag(method=method), expected.diagonal(), f"diagonal, {method}")
        near(G.trace(method=method), expected.trace(), f"trace, {method}")
    near(G.gram(method="forward"), G.gram(method="columns"), "Gram matrix")
    values = torch.linalg.eigvalsh(expected)
    damping = float(0.1 * values.abs().max() + 1.5 * max(-values.min(), 0))
    damped = expected + damping * torch.eye(len(expected), dtype=expected.dtype)
    b = torch.ones(len(expected), dtype=expected.dtype)
    for method, of_solve in METHODS.items():
        found = G.eigvalsh(method=method)
        largest = values[values.abs().argsort(descending=True)][: len(found)].sort().values
        near(found, largest, f"eigenvalues, {method}")
        determinant = torch.linalg.slogdet(damped)[1]
        near(G.logdet(damping, method=method), determinant, f"determinant, {method}")
        near(G.solve(b, damping, method=of_solve), torch.linalg.solve(damped, b), of_solve)
        check_pairs(expected, G.eigh(method=method), f"all pairs, {method}")
    for method in ("gram", "dense", "lanczos"):
        k = min(2, int((values > 1e-9 * values.abs().max()).sum()))
        if not k:
            continue
        pairs, spent = G.eigh(k, method=method, rtol=1e-11, info=True)
        assert spent.method == method
        near(pairs.values, values[-k:], f"values, {method}")
        check_pairs(expected, pairs, f"pairs, {method}")
        if values[-1] + damping > 0:
            check_step(G, expected, damping, pairs, method)


def check_pairs(expected, pairs, what):
    values, vectors = pairs
    size = float(expected.abs().max())
    # Of small eigenvalues the vectors are as wrong as rounding is large beside them.
    well = values.abs() > 1e-6 * values.abs().max()
    values, vectors = values[well], vectors[:, well]
    near(expected @ vectors, vectors * values, what, 1e-8 * size)
    near(vectors.T @ vectors, torch.eye(len(values), dtype=values.dtype), what)


def check_step(G, expected, damping, pairs, method):
    """Along eigenvectors that are told apart, the step is that of the formula."""
    k = len(pairs.values)
    everything = torch.linalg.eigvalsh(expected)
    if k < len(everything) and everything[-k] - everything[-k - 1] < 1e-3 * everything[-1]:
        return
    G_space = G.space
    gradient = G_space.flat(G.linearised.pull(G.point.curvature.loss.slope, G_space.shapes))
    values, vectors = pairs
    step = -vectors @ ((vectors.T @ gradient) / (values + damping))
    found = G_space.flat(G.newton_step(damping, k, method=method))
    near(found, step, f"step, {method}", 1e-6)


# ---------------------------------------------------------------- which way is taken


def many_columns(samples: int = 2000) -> ub.Problem:
    torch.manual_seed(0)
    X, y = torch.randn(samples, 10).double(), torch.randint(3, (samples,))
    return ub.Problem(nn.Linear(10, 3).double(), F.cross_entropy, (X, y))


def net(samples: int = 8, norm: bool = True, width: int = 40) -> ub.Problem:
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.BatchNorm1d(width) if norm else nn.Tanh(), nn.Tanh()]
    layers += [nn.Linear(width, width), nn.BatchNorm1d(width) if norm else nn.Tanh()]
    layers += [nn.Tanh(), nn.Linear(width, 3)]
    model = nn.Sequential(*layers).double()
    X, y = torch.randn(samples, 6).double(), torch.randint(3, (samples,))
    return ub.Problem(model, F.cross_entropy, (X, y))


def test_few_parameters_and_many_columns_go_by_the_matrix_itself():
    problem = many_columns()
    expected = problem.ggn().to_dense()
    G = problem.ggn()
    values, spent = G.eigvalsh(info=True)
    assert (spent.pullbacks, spent.pushes) == (33, 33)
    near(values, torch.linalg.eigvalsh(expected), "eigenvalues")
    b = torch.ones(33).double()
    x, report = G.solve(b, 0.1, info=True)
    assert report.method == "dense"
    assert report.converged
    damped = expected + 0.1 * torch.eye(33).double()
    near(x, torch.linalg.solve(damped, b), "solution")
    determinant = torch.logdet(damped)
    near(G.logdet(0.1), determinant, "determinant")


def test_many_columns_below_batch_norms_go_by_products():
    check_products(net(samples=200))


def check_products(problem):
    G = problem.ggn()
    pairs, spent = G.eigh(1, info=True)
    assert spent.method == "lanczos"
    assert spent.pulls < 60
    near(pairs.values, G.eigvalsh(method="gram")[-1:], "eigenvalue", 1e-9)
    residual = G @ pairs.vectors[:, 0] - pairs.values * pairs.vectors[:, 0]
    assert residual.norm() <= spent.residual + 1e-12


def test_a_matrix_that_is_there_is_used_again():
    G = net(samples=200).ggn()
    G.eigh(method="gram")
    assert G.eigh(1, info=True)[1].method == "gram"
    assert "which is there" in str(G.plan("eigvalsh"))


def test_memory_is_kept():
    problem = net(samples=200)
    small = problem.ggn(memory=2**21)  # of which a Gram matrix of 600 columns takes more
    assert small.plan("eigh", 2).taken.method == "lanczos"
    with pytest.raises(ub.BudgetError, match=r"600 columns 5\.5 MiB.*memory=.*G\.eigh\(k\)"):
        small.eigvalsh()
    with pytest.raises(ub.BudgetError, match="MiB"):
        small.eigh(2, method="gram")
    assert len(problem.ggn(memory=2**26).eigvalsh()) == 600


def test_time_is_kept(monkeypatch):
    monkeypatch.setattr("unbatch.curvature.ways.LONG", 0.0)
    problem = net(samples=200)
    text = r"`G\.eigvalsh\(\)` by .* takes .* passes .*`seconds=` of .*density"
    with pytest.raises(ub.BudgetError, match=text):
        problem.ggn(seconds=1e-9).eigvalsh()
    assert len(problem.ggn(seconds=float("inf")).eigvalsh()) == 600


@pytest.mark.parametrize("question", ["diag", "trace", "gram", "eigvalsh", "eigh", "logdet"])
def test_what_fits_no_budget_is_refused_with_the_remedy(question, monkeypatch):
    monkeypatch.setattr("unbatch.curvature.ways.LONG", 0.0)
    G = net(samples=200).ggn(seconds=1e-9)
    ask = {"logdet": lambda: G.logdet(0.1)}.get(question, lambda: getattr(G, question)())
    with pytest.raises(ub.BudgetError, match=r"measured for one.*`seconds=` of `problem\.ggn`"):
        ask()
    assert torch.isfinite(G @ torch.ones(G.shape[0]).double()).all()


def test_columns_that_take_too_long_are_foreseen(monkeypatch):
    monkeypatch.setattr("unbatch.curvature.pace.PATIENCE", 0.0)
    question = net(samples=20).ggn(seconds=1e-9)
    with pytest.raises(ub.BudgetError, match="columns for each sample"):
        question.diag(method="columns")


def test_no_memory_is_a_refusal():
    for text in (
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 20000000000 bytes.",
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 18.6 GiB. GPU 0 has"),
        MemoryError("Unable to allocate 18.6 GiB for an array"),
    ):
        error = text if isinstance(text, Exception) else RuntimeError(text)
        with pytest.raises(ub.BudgetError, match=r"18\.6 GiB"), refused_if_missing():
            raise error


def test_an_allocation_that_fails_changes_nothing(monkeypatch):
    problem = net()
    before = {name: p.clone() for name, p in problem.program.parameters.items()}
    G = problem.ggn()

    def failing(self):
        return torch.empty(10**15)

    with monkeypatch.context() as patched:
        patched.setattr(type(G), "to_dense", failing)
        with pytest.raises(ub.BudgetError, match="did not hold"):
            G.eigvalsh(method="dense")
    assert all(torch.equal(p, before[name]) for name, p in problem.program.parameters.items())
    near(G.eigvalsh(method="gram"), problem.ggn().eigvalsh(method="gram"), "eigenvalues")


def test_a_search_that_starts_nearby_takes_less():
    problem = net(samples=200)
    G = problem.ggn()
    earlier, cold = G.eigh(1, method="lanczos", info=True)
    with torch.no_grad():
        for p in problem.program.parameters.values():
            p.add_(1e-5 * torch.randn_like(p))
    G = problem.ggn()
    pairs, warm = G.eigh(1, method="lanczos", start=earlier.vectors, info=True)
    assert warm.pulls < cold.pulls
    near(pairs.values, G.eigvalsh(method="gram")[-1:], "eigenvalue", 1e-9)
    with pytest.raises(ub.InputError, match=r"\[2203, K\]"):
        G.eigh(1, method="lanczos", start=torch.ones(3))


LOSSES = {"softmax": F.cross_entropy, "squares": lambda p, y: (p[:, 0] - y).square().mean()}


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_along_all_eigenvectors_is_a_solution(name):
    problem = net()
    problem = ub.Problem(problem.program.model, LOSSES[name], (problem.inputs, problem.targets))
    G = problem.ggn()
    by_gram = G.space.flat(G.newton_step(0.1, method="gram"))
    step, spent = G.newton_step(0.1, method="cg", info=True)
    assert spent.residual <= 1e-8
    near(G.space.flat(step), by_gram, "step", 1e-6)


def test_a_step_is_no_solution_where_the_gradient_leaves_the_range():
    """A loss that is linear in one prediction: the gradient has a part that G takes to zero."""
    torch.manual_seed(0)
    X, y = torch.randn(5, 4).double(), torch.randn(5).double()
    model = nn.Linear(4, 2).double()
    problem = ub.Problem(model, lambda p, y: ((p[:, 0] - y) ** 2 + p[:, 1]).mean(), (X, y))
    G = problem.ggn()
    methods = [way.method for way in G.plan("newton_step").ways]
    assert "cg" not in methods
    with pytest.raises(ub.InputError, match="'cg'"):
        G.newton_step(0.1, method="cg")
    some = problem.ggn(samples=[0, 1])
    assert "cg" not in [way.method for way in some.plan("newton_step").ways]
    solved = G.space.flat(G.newton_step(0.1))
    values, vectors = torch.linalg.eigh(G.to_dense())
    kept = values > 1e-9
    gradient = G.space.flat(problem.gradient())
    along = vectors[:, kept].T @ gradient
    near(solved, -vectors[:, kept] @ (along / (values[kept] + 0.1)), "step")


def test_a_few_pairs_of_a_formed_matrix_are_those_of_its_decomposition(monkeypatch):
    whole = net(samples=60).ggn().eigh(3, method="gram")
    monkeypatch.setattr("unbatch.curvature.spectrum.LEAST_ROWS", 0)
    G = net(samples=60).ggn()
    few = G.eigh(3, method="gram")
    assert not G._answers.gram.is_decomposed
    near(few.values, whole.values, "values")
    near((few.vectors * whole.vectors).sum(0).abs(), torch.ones(3).double(), "vectors")


# ---------------------------------------------------------------- what is said


class Passes:
    """Counts the passes that are made."""

    def __init__(self, monkeypatch) -> None:
        self.pulls = self.pushes = 0
        pull, push = LinearisedGraph.pull, LinearisedGraph.push

        def counted_pull(linearised, *args):
            self.pulls += 1
            return pull(linearised, *args)

        def counted_push(linearised, *args):
            self.pushes += 1
            return push(linearised, *args)

        monkeypatch.setattr(LinearisedGraph, "pull", counted_pull)
        monkeypatch.setattr(LinearisedGraph, "push", counted_push)


ASKED = {
    "dense eigenvalues": lambda G: G.eigvalsh(method="dense", info=True)[1],
    "forward trace": lambda G: G.trace(method="forward", info=True)[1],
    "forward diagonal": lambda G: G.diag(method="forward", info=True)[1],
    "pairs by products": lambda G: G.eigh(2, method="lanczos", info=True)[1],
    "a step by products": lambda G: G.newton_step(0.1, 2, method="lanczos", info=True)[1],
}


@pytest.mark.parametrize("asked", ASKED)
def test_passes_are_those_that_are_told(asked, monkeypatch):
    G = net(norm=False, width=5).ggn()
    G @ torch.ones(G.shape[0]).double()
    passes = Passes(monkeypatch)
    spent = ASKED[asked](G)
    pulls = getattr(spent, "pulls", None)
    if pulls is None:
        pulls = spent.pullbacks
    # A step needs the gradient, too.
    assert abs(passes.pulls - pulls) <= 1
    assert abs(passes.pushes - spent.pushes) <= 1


QUESTIONS = ["diag", "trace", "gram", "eigvalsh", "eigh", "directions", "newton_step", "logdet"]


@pytest.mark.parametrize("question", [*QUESTIONS, "solve"])
def test_a_plan_shows_all_ways(question):
    G = net().ggn()
    plan = G.plan(question, 2 if question in ("eigh", "directions") else None)
    text = str(plan)
    assert f"by {plan.taken.why}" in text
    for way in plan.ways:
        assert re.search(rf"{way.method} +(some )?[\d,]+ ", text)
        assert plan.seconds_of(way) > 0
    assert text.count("→") == 1


def test_the_plan_is_kept():
    G = net(samples=30).ggn()
    for k in (1, 3):
        assert G.eigh(k, info=True)[1].method == G.plan("eigh", k).taken.method


WRONG = {
    "another method": (lambda G: G.eigh(2, method="qr"), "'gram', 'dense', 'lanczos'"),
    "all pairs by products": (lambda G: G.eigh(method="lanczos"), "'gram', 'dense'"),
    "a diagonal by Gram": (lambda G: G.diag(method="gram"), "'columns', 'forward'"),
    "components forward": (lambda G: G.diag(True, method="forward"), "'columns'"),
    "a solution by LU": (lambda G: G.solve(torch.ones(G.shape[0]), 1.0, method="lu"), "'cg'"),
    "a plan of nothing": (lambda G: G.plan("inverse"), "'inverse'"),
    "half a pair": (lambda G: G.plan("eigh", 0.5), "k is a whole number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_calls(what):
    ask, text = WRONG[what]
    with pytest.raises(ub.InputError, match=text):
        ask(net().ggn())


@pytest.mark.parametrize("seconds", [0, -1.0, "1", True, float("nan")])
def test_no_budget(seconds):
    with pytest.raises(ub.InputError, match="seconds="):
        net().ggn(seconds=seconds)


# ---------------------------------------------------------------- planted


def test_signs_that_are_left_out_are_caught(monkeypatch):
    problem = ub.Problem(
        nn.Linear(4, 2).double(),
        lambda p, y: (p[:, 0] ** 2 - p[:, 1] ** 2 - y).mean(),
        (torch.randn(5, 4).double(), torch.zeros(5).double()),
    )
    G = problem.ggn()
    expected = G.to_dense()
    check_every_way(G, expected)
    squares = Answers._rows_of_factor

    def without_signs(self):
        return torch.stack([row.square().sum() for _, row in squares(self)])

    monkeypatch.setattr(Answers, "forward_squares", without_signs)
    with pytest.raises(AssertionError, match="diagonal, forward"):
        check_every_way(problem.ggn(), expected)


def test_a_wrong_count_is_caught(monkeypatch):
    """A way that says it takes nothing is taken, and its passes are not those that are told."""
    monkeypatch.setattr(Way, "passes", property(lambda way: 0.0 if way.method == "dense" else 9e9))
    with pytest.raises(AssertionError):
        check_products(net(samples=60, width=8))
