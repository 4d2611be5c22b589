"""Spectra of operators against dense eigendecompositions, and estimates against what they say of themselves."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch import spectra

D = 40


class Matrix:
    """An operator that counts its products."""

    def __init__(self, dense):
        self.dense, self.products = dense, 0
        self.shape, self.dtype, self.device = dense.shape, dense.dtype, dense.device

    def __matmul__(self, v):
        self.products += 1 if v.ndim == 1 else v.shape[1]
        return self.dense @ v


def turned(values):
    generator = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return Q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ Q.T


def gauss_newton():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )
    X, y = torch.randn(8, 4).double(), torch.randint(3, (8,))
    return ub.Problem(model.double(), F.cross_entropy, (X, y)).ggn()


MAKERS = {
    "falling": lambda: Matrix(turned(0.7 ** torch.arange(D))),
    "slowly falling": lambda: Matrix(turned(1.0 / torch.arange(1, D + 1))),
    "of low rank": lambda: Matrix(turned([3.0, 2.0, *[0.0] * (D - 2)])),
    "indefinite": lambda: Matrix(turned(torch.linspace(-2, 1, D))),
    "repeated": lambda: Matrix(turned([5.0, 5.0, 5.0, 4.0, *torch.linspace(0, 3, D - 4)])),
    "projector": lambda: Matrix(turned([*[1.0] * 10, *[0.0] * (D - 10)])),
    "zero": lambda: Matrix(torch.zeros(D, D, dtype=torch.float64)),
    "one number": lambda: Matrix(torch.tensor([[2.0]], dtype=torch.float64)),
    "Gauss-Newton": gauss_newton,
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def dense(A):
    return A.dense if isinstance(A, Matrix) else A.to_dense()


@EVERY
@pytest.mark.parametrize("which", ["largest", "magnitude"])
def test_top_eigenpairs(make, which):
    A = make()
    values = torch.linalg.eigvalsh(dense(A))
    order = (values if which == "largest" else values.abs()).argsort(descending=True)
    wanted = values[order[:5]].sort().values
    found = spectra.eigh(A, 5, which=which, info=True)
    assert found.converged
    assert torch.allclose(found.values, wanted, atol=1e-7 * max(found.scale, 1))
    V = found.vectors
    assert torch.allclose(V.T @ V, torch.eye(V.shape[1]).double(), atol=1e-10)
    assert torch.allclose(dense(A) @ V, V * found.values, atol=1e-7 * max(found.scale, 1))


def test_products_are_counted():
    A = MAKERS["slowly falling"]()
    for ask in (
        lambda: spectra.eigh(A, 3, info=True),
        *[lambda m=m: spectra.trace(A, 12, method=m) for m in ("xtrace", "hutch++", "hutchinson")],
        lambda: spectra.diagonal(A, 7),
        lambda: spectra.density(A, probes=2, steps=5),
    ):
        A.products = 0
        assert ask().products == A.products


def test_what_has_not_converged_is_told():
    A = MAKERS["slowly falling"]()
    found = spectra.eigh(A, 3, rtol=1e-14, max_products=10, info=True)
    assert not found.converged
    true = torch.linalg.vector_norm(A.dense @ found.vectors - found.vectors * found.values, dim=0)
    assert torch.allclose(found.residuals, true)
    with pytest.raises(ub.ConvergenceError, match="residual"):
        spectra.eigh(A, 3, rtol=1e-14, max_products=10)


def test_without_orthogonalisation_copies_come_up(monkeypatch):
    """The planted bug: the basis loses its orthogonality, and what comes out is not believed."""
    monkeypatch.setattr(spectra, "orthogonal", lambda block, against: block / block.norm(dim=0).clamp_min(1e-300))
    with pytest.raises(AssertionError):
        test_top_eigenpairs(MAKERS["slowly falling"], "largest")


@EVERY
@pytest.mark.parametrize("method", ["xtrace", "hutch++", "hutchinson"])
def test_traces(make, method):
    A = make()
    exact = float(dense(A).trace())
    runs = [spectra.trace(A, 18, method=method, seed=seed) for seed in range(60)]
    values = torch.stack([r.value for r in runs])
    rounding = 1e-9 * float(dense(A).abs().max()) * A.shape[0]
    assert abs(float(values.mean()) - exact) <= 5 * float(values.std()) / 60**0.5 + rounding
    honest = sum(abs(float(r.value) - exact) <= 3 * float(r.standard_error) + rounding for r in runs)
    assert honest >= (48 if method == "xtrace" else 54)  # its parts are not independent
    assert torch.equal(spectra.trace(A, 18, method=method, seed=7).value, runs[7].value)


def test_projecting_pays_where_the_spectrum_falls():
    A = MAKERS["falling"]()
    off = {
        m: torch.stack([spectra.trace(A, 18, method=m, seed=s).value - A.dense.trace() for s in range(20)]).abs().mean()
        for m in ("xtrace", "hutch++", "hutchinson")
    }
    assert off["xtrace"] < off["hutch++"] < off["hutchinson"] / 2


@EVERY
def test_diagonals(make):
    A = make()
    exact = dense(A).diagonal()
    found = spectra.diagonal(A, 300)
    rounding = 1e-12 * float(exact.abs().max())
    inside = (found.value - exact).abs() <= 3 * found.standard_error + rounding
    assert inside.double().mean() > 0.95


@EVERY
def test_densities(make):
    A = make()
    values = torch.linalg.eigvalsh(dense(A))
    found = spectra.density(A, probes=30, steps=25)
    assert torch.allclose(found.weights.sum(1), torch.ones(30).double())
    for function in (lambda t: t.square(), lambda t: (t.abs() + 0.1).log()):
        estimate, exact = found.trace_of(function), float(function(values).sum())
        assert abs(float(estimate.value) - exact) <= 4 * float(estimate.standard_error) + 0.02 * abs(exact) + 1e-9
    spread = float(values.max() - values.min()) + 1.0
    grid = torch.linspace(float(values.min()) - spread, float(values.max()) + spread, 2000).double()
    smooth = found.at(grid, 0.1 * spread)
    assert abs(float(torch.trapezoid(smooth.value, grid)) - 1) < 1e-3
    assert (smooth.standard_error >= 0).all()


def test_random_states_are_left_alone():
    A, before = MAKERS["falling"](), torch.get_rng_state()
    spectra.eigh(A, 2), spectra.trace(A, 8), spectra.diagonal(A, 4), spectra.density(A, probes=2, steps=3)
    assert torch.equal(before, torch.get_rng_state())


def test_in_float32():
    A = Matrix(turned(0.7 ** torch.arange(D)).float())
    values, _ = spectra.eigh(A, 3)
    assert torch.allclose(values, torch.tensor([0.49, 0.7, 1.0]), atol=1e-4)
    assert spectra.trace(A, 10).value.dtype == torch.float64


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda A: spectra.eigh(A, 0), "k is"),
        (lambda A: spectra.eigh(A, 2, which="smallest"), "smallest"),
        (lambda A: spectra.trace(A, 1), "products is"),
        (lambda A: spectra.trace(A, 9, method="exact"), "exact"),
        (lambda A: spectra.diagonal(A, 1), "products is"),
        (lambda A: spectra.density(A, probes=1), "probes is"),
        (lambda A: spectra.density(A, steps=0), "steps is"),
    ],
)
def test_refusals(ask, message):
    with pytest.raises(ub.InputError, match=message):
        ask(MAKERS["falling"]())
