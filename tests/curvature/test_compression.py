"""Columns by way of batch statistics: exactly the same matrix; and with fewer directions, as far
off as is said.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from cases.comparison import near
from cases.gradients import CASES
from cases.recordings import made
from cases.ways import by_columns, by_statistics
from unbatch.curvature import strategy as curvature
from unbatch.curvature.batch_statistics import Statistics
from unbatch.reference import definitions as reference

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::unbatch.VanishingCurvatureWarning"
    ),  # losses are linear here and there
    pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning"),
]

NORMED = [case for case in CASES if "norm" in case.name or "resid" in case.name]


@pytest.fixture
def always(monkeypatch):
    """Go by way of statistics, whatever it takes."""
    monkeypatch.setattr(curvature, "estimate_cost", by_statistics)


def net(samples=16):
    torch.manual_seed(0)
    first = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    second = [nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten()]
    top = [nn.Linear(80, 6), nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 4)]
    model = nn.Sequential(*first, *second, *top).double()
    X, y = torch.randn(samples, 2, 6, 6).double(), torch.randint(4, (samples,))
    return (model, F.cross_entropy, X, y), ub.Problem(model, F.cross_entropy, (X, y))


@pytest.mark.parametrize("case", NORMED, ids=lambda case: case.name)
def test_by_way_of_statistics_it_is_the_same_matrix(case, always):
    args, problem = made(case, "train")
    expected = reference.ggn(*args)
    floor = 1e-14 * float(reference.output_hessian(*args).abs().max())
    G = problem.ggn()
    near(G.diag(), expected.diagonal(), "diagonal", floor)
    near(G.trace(), expected.trace(), "trace", floor)
    values = torch.linalg.eigvalsh(expected)
    count = min(len(values), len(G.eigvalsh()))
    order = values.abs().argsort(descending=True)[:count]
    near(G.eigvalsh()[-count:], values[order].sort().values, "eigenvalues", floor)
    if problem.structure.reduction:
        near(G.diag(per_component=True), reference.ggn_diagonals(*args), "of components", floor)


def test_some_of_the_cases_do_go_that_way(always):
    ways = [made(case, "train")[1].ggn().diag(info=True)[1] for case in NORMED]
    assert sum(told.statistics > 0 for told in ways) >= 10


def test_products_with_the_derivative_of_the_statistics():
    _, problem = net()
    G = problem.ggn()
    statistics = Statistics.of(problem._session.analysis.context, G.point.parameters)
    assert statistics.size == 2 * (4 + 5 + 6)
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(statistics.size, generator=generator, dtype=torch.float64)
    v = torch.randn(G.shape[0], generator=generator, dtype=torch.float64)
    pulled = G.space.flat(statistics.pull(u))
    assert abs(float(pulled @ v - statistics.push(G.space.named(v)) @ u)) < 1e-10


def test_the_cheaper_way_is_taken(monkeypatch):
    """Many columns above few statistics; and the other way round."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [
        nn.Conv2d(4, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 64, 40),
    ]
    model, X, y = (
        nn.Sequential(*layers).double(),
        torch.randn(8, 3, 8, 8).double(),
        torch.randint(40, (8,)),
    )
    found, told = ub.Problem(model, F.cross_entropy, (X, y)).ggn().diag(info=True)
    assert (told.rank, told.pullbacks) == (16, 16)
    _, told = net(4)[1].ggn().diag(info=True)
    assert (told.statistics, told.pullbacks) == (0, 4 * 3)
    monkeypatch.setattr(curvature, "estimate_cost", by_columns)
    one_by_one, told = ub.Problem(model, F.cross_entropy, (X, y)).ggn().diag(info=True)
    assert told.pullbacks == 8 * 39
    near(found, one_by_one, "diagonal")


def test_a_plan_says_which_way_columns_go_and_why():
    plan = net()[1].plan(ub.DiagGGN())
    assert plan.pullbacks == 30 + 2 * 3
    assert "all 30 batch statistics" in plan.reason
    assert "48 columns" in plan.reason
    assert str(plan).startswith("Columns of the Gauss-Newton factor by component")
    alone = ub.Problem(nn.Linear(4, 3), F.cross_entropy, (torch.randn(5, 4), torch.zeros(5).long()))
    assert alone.plan(ub.DiagGGN()).pullbacks == 2


@pytest.mark.parametrize("rtol", [0.3, 0.1, 0.03])
def test_a_tolerance_is_met(rtol):
    args, problem = net()
    G, expected = problem.ggn(), reference.ggn(*args)
    found, told = G.diag(rtol=rtol, info=True)
    off = float((found - expected.diagonal()).norm() / expected.diagonal().norm())
    assert off <= 2 * told.estimate <= 2 * rtol
    assert told.rank < told.statistics == 30
    gram, told = G.gram(rtol=rtol, info=True)
    off = float((gram - G.gram()).norm() / G.gram().norm())
    assert off <= 2 * told.estimate <= 2 * rtol
    values, exact = G.eigvalsh(rtol=rtol), torch.linalg.eigvalsh(expected)
    assert (values[-5:] - exact[-5:]).abs().max() <= 2 * rtol * exact.norm()


def test_with_a_strict_tolerance_all_directions_are_followed():
    args, problem = net()
    found, told = problem.ggn().diag(rtol=1e-12, info=True)
    assert told.exact
    near(found, reference.ggn(*args).diagonal(), "diagonal")


def test_estimates_are_honest():
    """True errors below twice the estimate in 95 of 100 draws, and completed by the draws right on
    average.
    """
    args, problem = net()
    exact, G = reference.ggn(*args).diagonal(), problem.ggn()
    honest, completed = 0, []
    for seed in range(100):
        found, told = G.diag(rtol=0.15, seed=seed, info=True)
        honest += float((found - exact).norm() / exact.norm()) <= 2 * told.estimate
        completed.append(G.diag(rtol=0.15, seed=seed, unbiased=True))
    assert honest >= 95
    stack = torch.stack(completed)
    standard = stack.std(0) / 10
    assert ((stack.mean(0) - exact).abs() < 5 * standard + 1e-12).all()


def test_a_tolerance_costs_nothing_where_samples_do_not_mix():
    torch.manual_seed(0)
    model, X, y = nn.Linear(4, 3).double(), torch.randn(5, 4).double(), torch.randint(3, (5,))
    _, told = ub.Problem(model, F.cross_entropy, (X, y)).ggn().diag(rtol=0.1, info=True)
    assert told.exact
    assert told.pullbacks == 2 * 5


def test_a_matrix_by_few_parameters_at_a_time_is_the_same():
    _, problem = net()
    whole, pieces = problem.ggn().gram(), problem.ggn(memory=40_000).gram()
    near(pieces, whole, "Gram matrix")


def test_a_wrong_derivative_of_the_statistics_is_caught(monkeypatch):
    """Total coefficients in place of partial ones, say: the split is not believed, and columns are
    pulled back.
    """
    from unbatch.curvature.batch_statistics import BatchNormStatistics as Norm

    right = Norm.partial
    monkeypatch.setattr(Norm, "partial", lambda self, g: 1.1 * right(self, g))
    monkeypatch.setattr(curvature, "estimate_cost", by_statistics)
    args, problem = net()
    found, told = problem.ggn().diag(info=True)
    assert told.statistics == 0
    near(found, reference.ggn(*args).diagonal(), "diagonal")


@pytest.mark.parametrize(("dtype", "statistics"), [(torch.float32, 30), (torch.bfloat16, 0)])
def test_in_lower_precision(dtype, statistics):
    args, problem = net()
    exact = problem.ggn().diag()
    model, loss, X, y = args
    found, told = (
        ub.Problem(model.to(dtype), loss, (X.to(dtype), y)).ggn().diag(rtol=0.05, info=True)
    )
    assert told.statistics == statistics
    assert (found.double() - exact).norm() < (0.1 if statistics else 0.3) * exact.norm()


def test_several_questions_at_once():
    _, problem = net()
    diagonal, parts, _ = problem.compute(
        ub.DiagGGN(), ub.DiagGGN(per_component=True), ub.Gradients()
    )
    near(
        torch.cat([t.flatten(1) if t.ndim > 1 else t for t in parts.values()], 1).sum(0),
        diagonal.flat(),
        "sum",
    )


# -------------------------------------------------------------- random signs, and the frozen matrix


def test_the_matrix_with_frozen_statistics():
    args, problem = net(6)
    expected, G = reference.ggn(*args, frozen=True), problem.ggn(by="frozen")
    near(G.to_dense(), expected, "products")
    near(G.diag(), expected.diagonal(), "diagonal")
    near(
        problem.compute(ub.DiagGGN(), by="frozen").flat(), expected.diagonal(), "asked with others"
    )
    near(G.eigvalsh()[-4:], torch.linalg.eigvalsh(expected)[-4:], "eigenvalues")
    near(G.diag(rtol=0.1), expected.diagonal(), "nothing to be compressed")
    with pytest.raises(ub.InputError, match="by='copy'"):
        problem.ggn(by="copy")
    with pytest.raises(ub.InputError, match="by='copy'"):
        problem.compute(ub.DiagGGN(), by="copy")


@pytest.mark.parametrize("controlled", [False, True])
def test_random_signs_are_right_on_average(controlled):
    args, problem = net()
    exact, G = reference.ggn(*args).diagonal(), problem.ggn()
    control = problem.ggn(by="frozen") if controlled else None
    found = G.estimate_diag(600, control=control)
    inside = ((found.values - exact).abs() <= 2 * found.standard_errors + 1e-12).double().mean()
    assert inside > 0.9
    assert ((found.values - exact).abs() <= 6 * found.standard_errors + 1e-12).all()
    again = G.estimate_diag(600, control=control)
    assert torch.equal(again.values, found.values)
    if controlled:
        assert found.gain > 0.9
        assert found.pullbacks == 2 * (600 + 8) + 3
        assert set(found.coefficients) == set(G.space.shapes)


def test_a_control_variate_that_is_the_matrix_itself_takes_all_variance_away():
    args, problem = net(6)
    found = problem.ggn().estimate_diag(4, control=problem.ggn())
    near(found.values, reference.ggn(*args).diagonal(), "diagonal", 1e-12)
    assert found.gain > 1e6


def test_random_signs_need_definiteness_and_draws():
    args, problem = net(6)
    with pytest.raises(ub.InputError, match="at least 2"):
        problem.ggn().estimate_diag(1)
    concave = ub.Problem(args[0], lambda p, y: -F.mse_loss(p, p.detach() + 1), args[2:])
    with pytest.raises(ub.StructureError, match="positive semi-definite"):
        concave.ggn().estimate_diag(4)


def test_components_cannot_be_completed():
    problem = ub.Problem(
        torch.nn.Linear(3, 2), torch.nn.functional.mse_loss, (torch.randn(4, 3), torch.randn(4, 2))
    )
    with pytest.raises(ub.InputError, match="per_component=True and unbiased=True"):
        problem.ggn().diag(per_component=True, unbiased=True)
