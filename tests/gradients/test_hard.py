"""Problems at the edges of what numbers can be, against the definitions in float64."""

import pytest
import torch
from torch import nn

import unbatch as ub
from cases.hard import CASES
from unbatch.curvature import loss_hessian
from unbatch.gradients.request import Request
from unbatch.reference import definitions as reference

pytestmark = pytest.mark.filterwarnings("ignore::unbatch.VanishingCurvatureWarning")

EXACT = 1e-8


def near(found, expected, what):
    """Raise where two tensors differ, each row in its own scale."""
    assert found.shape == expected.shape, what
    if not expected.numel():
        return
    rows = expected.reshape(len(expected), -1) if expected.ndim else expected.reshape(1, 1)
    error = (found.reshape(rows.shape) - rows).abs().amax(1)
    # Where terms cancel in one row, others say how large they were.
    allowed = EXACT * (rows.abs().amax(1) + 1e-7 * rows.abs().max()) + 1e-300
    assert bool((error <= allowed).all()), (
        f"{what}: off by {error.tolist()} of {rows.abs().amax(1)}"
    )


@pytest.mark.parametrize("name", CASES)
def test_rows_are_the_definition(name):
    model, loss, X, y = CASES[name]()
    problem = ub.Problem(model, loss, (X, y))
    expected = reference.component(model, loss, X, y)
    for by in ("component", "copy"):
        rows = problem.gradients(by=by)
        for parameter, row in expected.items():
            near(rows[parameter], row, f"{by} of {parameter}")
    norms, dots, squares = problem.compute(ub.SquaredNorms(), ub.Dots(), ub.SumOfSquares())
    of_parameters, total = reference.squared_norms(expected)
    near(norms.total, total, "squared norms")
    near(dots, reference.dots(expected), "dots")
    of_entries = reference.sum_of_squares(expected)
    for parameter in expected:
        near(norms[parameter], of_parameters[parameter], f"norms of {parameter}")
        near(squares[parameter], of_entries[parameter], f"squares of {parameter}")


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_is_the_definition(name):
    model, loss, X, y = CASES[name]()
    G = ub.Problem(model, loss, (X, y)).ggn()
    expected = reference.ggn(model, loss, X, y)
    near(G.diag(), expected.diagonal(), "diagonal")
    near(G.trace(), expected.trace(), "trace")
    v = torch.randn(len(expected), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    near((G @ v)[None], (expected @ v)[None], "product")
    if bool(G.root.separate):
        diagonals = reference.ggn_diagonals(model, loss, X, y)
        near(G.diag(per_component=True), diagonals, "diagonals")


# ---------------------------------------------------------------- planted bugs


def by_the_slope(search, _):
    """The rule of old: what is small beside the gradient counts as nothing."""
    v, product = search.probes[0]
    if loss_hessian._largest(product) > 1e-12 * loss_hessian._largest(search.loss.slope):
        return None
    grid = search._grid(-1)
    empty = grid.split(v).new_zeros(*grid.split(v).shape, 0)
    return loss_hessian.Factor(grid, empty, empty.sum(2), "zero")


@pytest.mark.parametrize("name", ["targets times 1e15", "absolute errors beside squared ones"])
def test_a_curvature_held_against_the_slope_is_caught(name, monkeypatch):
    monkeypatch.setattr(loss_hessian._Search, "_zero", by_the_slope)
    with pytest.raises(AssertionError, match="diagonal"):
        test_the_matrix_is_the_definition(name)


@pytest.mark.parametrize("name", ["rows sorted, and put back", "rows sorted, and copied back"])
def test_rows_counted_by_their_place_are_caught(name, monkeypatch):
    monkeypatch.setattr(Request, "planned_by", property(lambda request: request.by))
    with pytest.raises(AssertionError, match="copy of"):
        test_rows_are_the_definition(name)


def test_a_form_tested_in_the_scale_of_another_sample_is_caught(monkeypatch):
    def at_once(search, named):
        return torch.tensor([loss_hessian._largest({i: named[i] for i in search.dims})])

    monkeypatch.setattr(loss_hessian._Search, "_sizes", at_once)
    with pytest.raises(AssertionError, match="diagonals"):
        test_the_matrix_is_the_definition("one steep sample of another form")


def test_what_rounding_leaves_over_is_no_curvature():
    """A root of a square is an absolute value: its second derivative cancels, but for rounding."""
    X, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def loss(p, y):
        return (p - y).square().sqrt().sum()

    assert ub.Problem(nn.Linear(5, 3).double(), loss, (X, y)).ggn().trace() < 1e-12


# ---------------------------------------------------------------- complex parameters


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4, dtype=torch.complex128))
        self.b = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.first = nn.Linear(5, 5)

    def forward(self, x):
        z = self.first(x).to(self.w.dtype) @ self.w.conj() + self.b
        return torch.view_as_real(z).flatten(1)


@pytest.mark.parametrize("with_rows", [False, True])
def test_quantities_of_complex_parameters_count_real_and_imaginary_parts(with_rows):
    torch.manual_seed(0)
    model, X, y = Complex().double(), torch.randn(4, 5).double(), torch.randn(4, 8).double()
    loss = nn.functional.mse_loss
    problem, expected = ub.Problem(model, loss, (X, y)), reference.component(model, loss, X, y)
    asked = [ub.SquaredNorms(), ub.Dots(), ub.SumOfSquares(), ub.SecondMoment(), ub.Variance()]
    if with_rows:
        asked.append(ub.Gradients())
    norms, dots, squares, moments, variances, *_ = problem.compute(*asked)
    near(norms.total, reference.squared_norms(expected)[1], "squared norms")
    assert not dots.is_complex()
    near(dots, reference.dots(expected), "dots")
    for name in expected:
        near(squares[name], reference.sum_of_squares(expected)[name], "squares")
        near(moments[name], reference.second_moment(expected)[name], "second moments")
        near(variances[name], reference.variance(expected)[name], "variance")
    with pytest.raises(ub.InputError, match="complex"):
        problem.ggn()
