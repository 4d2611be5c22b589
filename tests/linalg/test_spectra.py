"""Eigenpairs against dense ones, and estimates against their own standard errors, in float64."""

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.linalg import lanczos, spectra, traces
from unbatch.linalg.operators import Dense

D = 120
SEEDS = 100


def turned(values) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    values = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(
        torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    )[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


@cache
def gauss_newton() -> ub.GGN:
    torch.manual_seed(0)
    layers = [
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Linear(8, 6),
        nn.BatchNorm1d(6),
        nn.Linear(6, 3),
    ]
    batch = (torch.randn(12, 4).double(), torch.randint(3, (12,)))
    return ub.Problem(nn.Sequential(*layers).double(), F.cross_entropy, batch).ggn()


MAKERS = {
    "falling": lambda: turned(0.8 ** torch.arange(D)),
    "falling slowly": lambda: turned(1.0 / torch.arange(1, D + 1)),
    "low rank": lambda: turned([3.0, 2.0, *[0.0] * (D - 2)]),
    "indefinite": lambda: turned(torch.linspace(-2, 1, D)),
    "repeated": lambda: turned([5.0] * 4 + [4.0] * 3 + torch.linspace(0, 3.5, D - 7).tolist()),
    "repeated at the edge": lambda: turned(
        [5.0, 4.9, 4.8] + [4.7] * 6 + torch.linspace(-4, 4.5, D - 9).tolist()
    ),
    "repeated, then falling": lambda: turned([5.0] * 4 + (0.5 ** torch.arange(D - 4)).tolist()),
    "both signs": lambda: turned([2.0] * 2 + [-2.0] * 3 + torch.linspace(-1, 1, D - 5).tolist()),
    "projector": lambda: turned([1.0] * 30 + [0.0] * (D - 30)),
    "identity": lambda: torch.eye(D, dtype=torch.float64),
    "zero": lambda: torch.zeros(D, D, dtype=torch.float64),
    "one number": lambda: torch.tensor([[-2.0]], dtype=torch.float64),
    "Gauss-Newton": gauss_newton,
}
EVERY = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
METHODS = pytest.mark.parametrize("method", list(spectra.METHODS))


@cache
def dense(make) -> Tensor:
    A = make()
    return A if isinstance(A, Tensor) else A.to_dense()


class Counting(Dense):
    """A matrix that counts its products with single vectors."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix, symmetric=True)
        self.products = 0

    def _apply(self, v: Tensor) -> Tensor:
        self.products += v.shape[1]
        return super()._apply(v)


# ---------------------------------------------------------------- eigenpairs


def check_pairs(A: Tensor, k: int, which: str, found, search) -> None:
    """Raise where these are not the first k eigenpairs of A, or their residuals are not true."""
    values = torch.linalg.eigvalsh(A)
    order = (values if which == "largest" else values.abs()).argsort(descending=True)
    size, k = float(values.abs().max()), min(k, len(A))
    expected = values[order[:k]].sort().values
    if which == "magnitude":  # which sign is taken of a pair ±λ is open where not all of them fit
        found, expected = (
            found._replace(values=found.values.abs().sort().values),
            expected.abs().sort().values,
        )
        signed = torch.einsum("dk,de,ek->k", found.vectors, A, found.vectors)
    else:
        signed = found.values
    assert found.values.shape == (k,), f"{found.values.shape}"
    assert (found.values - expected).abs().max() <= 1e-7 * size, (
        f"{found.values} where {expected} are expected"
    )
    assert (found.vectors.T @ found.vectors - torch.eye(k)).abs().max() <= 1e-10, (
        "vectors are not orthonormal"
    )
    residuals = (A @ found.vectors - found.vectors * signed).norm(dim=0)
    assert residuals.max() <= search.rtol * size + 1e-13
    assert (residuals - search.residuals).abs().max() <= 1e-12 * max(size, 1)
    assert 0.9 * size <= search.norm <= size * (1 + 1e-12)


@EVERY
@pytest.mark.parametrize("which", spectra.WHICH)
@pytest.mark.parametrize("k", [1, 5])
def test_first_eigenpairs(make, which, k):
    for seed in range(3):
        found, search = spectra.eigh(make(), k, which=which, seed=seed, info=True)
        assert search.converged
        check_pairs(dense(make), k, which, found, search)


@pytest.mark.parametrize("k", [D - 1, D, 3 * D])
def test_as_many_eigenpairs_as_there_are(k):
    A = dense(MAKERS["repeated"])
    found, search = spectra.eigh(A, k, info=True)
    check_pairs(A, k, "largest", found, search)
    assert len(found.values) == min(k, D)
    assert (found.values.diff() >= 0).all()


def test_the_least_basis():
    A = dense(MAKERS["falling"])
    found, search = spectra.eigh(A, 3, basis=5, info=True)
    check_pairs(A, 3, "largest", found, search)
    assert search.basis == 5


def test_copies_are_not_found_without_a_second_search(monkeypatch):
    """The planted bug: a Krylov space has one vector of each eigenspace, and it is left at that."""
    A = dense(MAKERS["repeated"])
    monkeypatch.setattr(lanczos, "nothing_beyond", lambda *_: True)
    monkeypatch.setattr(lanczos, "FEWEST", 1)
    found, search = spectra.eigh(A, 3, info=True)
    with pytest.raises(AssertionError, match="are expected"):
        check_pairs(A, 3, "largest", found, search)


def test_what_has_not_converged_is_said():
    A = Counting(dense(MAKERS["falling slowly"]))
    with pytest.raises(ub.ConvergenceError, match=r"after 12 products 0 of 4 .* was not finished"):
        spectra.eigh(A, 4, rtol=1e-14, max_products=12)
    found, search = spectra.eigh(A, 4, rtol=1e-14, max_products=12, info=True)
    assert not search.converged
    true = (A.matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(search.residuals, true)
    assert search.products == 12


def test_converged_pairs_that_were_not_confirmed():
    """Products end between the two searches."""
    A = dense(MAKERS["falling"])
    _, search = spectra.eigh(A, 1, max_products=16, rtol=1e-3, info=True)
    assert (search.residuals <= search.rtol * search.norm).all()
    assert not search.complete
    with pytest.raises(ub.ConvergenceError, match="1 of 1"):
        search.check()


# ---------------------------------------------------------------- traces and diagonals


def check_unbiased(runs, exact: Tensor, rounding: float) -> None:
    """Raise where the mean is off by five of its standard errors."""
    values = torch.stack([r.values for r in runs])
    off, error = (values.mean(0) - exact).abs(), values.std(0) / len(runs) ** 0.5
    assert (off <= 5 * error + rounding).all(), (
        f"off by {off.max():.1e} where {error.max():.1e} is its standard error"
    )


def share_within(runs, exact: Tensor, rounding: float) -> float:
    """How often the truth lies within three of the stated standard errors."""
    near = [(r.values - exact).abs() <= 3 * r.standard_errors + rounding for r in runs]
    return float(torch.stack(near).double().mean())


@EVERY
@METHODS
def test_traces(make, method):
    A = dense(make)
    runs = [spectra.trace(A, 24, method=method, seed=seed) for seed in range(SEEDS)]
    rounding = 1e-12 * float(A.abs().max()) * len(A)
    check_unbiased(runs, A.trace(), rounding)
    assert share_within(runs, A.trace(), rounding) >= 0.9
    assert all(r.products <= 24 for r in runs)


def test_a_biased_trace_is_caught(monkeypatch):
    """The planted bug: XTrace leaves the wrong vector out of the sketch of a term."""
    A = dense(MAKERS["falling slowly"])
    monkeypatch.setattr(traces, "regular", lambda R, dtype: torch.eye(len(R), dtype=R.dtype))
    runs = [spectra.trace(A, 24, seed=seed) for seed in range(SEEDS)]
    with pytest.raises(AssertionError, match="off by"):
        check_unbiased(runs, A.trace(), 1e-12)


def test_sketches_pay_where_the_spectrum_falls():
    A = dense(MAKERS["falling"])

    def error(method):
        runs = [spectra.trace(A, 48, method=method, seed=seed) for seed in range(20)]
        return float(torch.stack([r.values - A.trace() for r in runs]).square().mean().sqrt())

    assert 3 * error("xtrace") < error("hutch++") < error("hutchinson") / 10


@METHODS
def test_enough_products_are_exact(method):
    A = Counting(dense(MAKERS["indefinite"]))
    for found, exact in [
        (spectra.trace(A, D, method=method), A.matrix.trace()),
        (spectra.diagonal(A, D + 7), A.matrix.diagonal()),
    ]:
        assert torch.allclose(found.values, exact)
        assert (found.method, found.products) == ("exact", D)
        assert not found.standard_errors.any()


def test_low_rank_is_traced_exactly():
    A = dense(MAKERS["low rank"])
    for method in ("xtrace", "hutch++"):
        found = spectra.trace(A, 12, method=method)
        assert float(found.values) == pytest.approx(5, abs=1e-12)
        assert float(found.standard_errors) < 1e-12


@EVERY
def test_diagonals(make):
    A = dense(make)
    runs = [spectra.diagonal(A, 30, seed=seed) for seed in range(SEEDS)]
    rounding = 1e-12 * float(A.abs().max())
    check_unbiased(runs, A.diagonal(), rounding)
    assert share_within(runs, A.diagonal(), rounding) >= 0.9


def test_standard_errors_of_diagonals():
    A = dense(MAKERS["falling slowly"])
    runs = [spectra.diagonal(A, 10, seed=seed) for seed in range(4 * SEEDS)]
    stated = torch.stack([r.standard_errors for r in runs]).square().mean()
    true = torch.stack([r.values - A.diagonal() for r in runs]).square().mean()
    assert float(stated) == pytest.approx(float(true), rel=0.05)


# ---------------------------------------------------------------- densities

FUNCTIONS = {
    "square": torch.square,
    "exponential": torch.exp,
    "log-determinant": lambda x: (x + 3).log(),
}


@EVERY
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_moments(make, function):
    A = dense(make) / max(float(dense(make).abs().max()), 1)
    exact = function(torch.linalg.eigvalsh(A)).sum()
    runs = [
        spectra.density(A, probes=10, steps=16, seed=seed).moment(function) for seed in range(24)
    ]
    rounding = 1e-9 * float(exact.abs() + 1)
    check_unbiased(runs, exact, rounding)
    assert share_within(runs, exact, rounding) >= 0.9


@EVERY
def test_densities(make):
    A = dense(make)
    found = spectra.density(A, probes=10, steps=40)
    low, high = (
        float(found.nodes.min()) - 8 * found.width,
        float(found.nodes.max()) + 8 * found.width,
    )
    grid = torch.linspace(low, high, 1001, dtype=torch.float64)
    curve = found.on(grid)
    assert float(torch.trapezoid(curve.values, grid)) == pytest.approx(1, abs=1e-6)
    apart = (grid[:, None] - torch.linalg.eigvalsh(A)) / found.width
    exact = torch.exp(-apart.square() / 2).mean(1) / (found.width * (2 * torch.pi) ** 0.5)
    off = torch.trapezoid((curve.values - exact).abs(), grid)
    stated = torch.trapezoid(curve.standard_errors, grid)
    assert off <= 2 * stated + 1e-6
    assert found.weights.sum(1).tolist() == pytest.approx([1] * 10)


def test_an_invariant_space_ends_a_rule():
    A = Counting(torch.diag(torch.tensor([3.0, 2.0, *[0.0] * (D - 2)], dtype=torch.float64)))
    found = spectra.density(A, probes=3, steps=20, width=0.1)
    assert found.products == A.products == 3 * 3
    assert found.nodes.shape == found.weights.shape == (3, 20)
    assert not found.weights[:, 3:].any()
    assert found.width == 0.1


def check_nodes(found, value: float) -> None:
    """Raise where a rule has an eigenvalue that is there once as more than one node."""
    copies = ((found.nodes - value).abs() < 1e-6).sum(1)
    assert (copies == 1).all(), f"{value} is among the nodes {copies.tolist()} times"


def test_ghosts_are_caught(monkeypatch):
    """The planted bug, a recurrence of three terms: a far eigenvalue comes back as a copy."""
    A, apart = turned([100.0, *torch.linspace(0, 1, D - 1)]), lanczos.split_off
    check_nodes(spectra.density(A, probes=3, steps=60), 100)

    def from_the_last_two(rows, v):
        h, rest = apart(rows[-2:], v)
        return F.pad(h, (len(rows) - len(h), 0)), rest

    monkeypatch.setattr(lanczos, "split_off", from_the_last_two)
    with pytest.raises(AssertionError, match="100 is among the nodes"):
        check_nodes(spectra.density(A, probes=3, steps=60), 100)


# ---------------------------------------------------------------- what holds for all of them

QUESTIONS = {
    "eigh": lambda A, seed: spectra.eigh(A, 3, seed=seed, info=True),
    **{m: lambda A, seed, m=m: spectra.trace(A, 13, method=m, seed=seed) for m in spectra.METHODS},
    "diagonal": lambda A, seed: spectra.diagonal(A, 7, seed=seed),
    "density": lambda A, seed: spectra.density(A, probes=3, steps=5, seed=seed),
}
EACH = pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)


def tensors(result) -> list[Tensor]:
    parts = result if isinstance(result, tuple) else [result]
    fields = [list(p) if isinstance(p, tuple) else list(vars(p).values()) for p in parts]
    return [x for field in fields for x in field if isinstance(x, Tensor)]


@EACH
def test_seeds_and_products(ask):
    A, before = Counting(dense(MAKERS["falling slowly"])), torch.get_rng_state()
    first = ask(A, 5)
    told = first[1] if isinstance(first, tuple) else first
    assert (told.products, told.seed) == (A.products, 5)
    torch.rand(3)
    assert all(map(torch.equal, tensors(first), tensors(ask(A, 5))))
    assert not all(map(torch.equal, tensors(first), tensors(ask(A, 6))))
    torch.set_rng_state(before)
    ask(A, 5)
    assert torch.equal(before, torch.get_rng_state())


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(ask, dtype):
    A = dense(MAKERS["falling"]).to(dtype)
    found, exact = ask(A, 0), ask(A.double(), 0)
    if isinstance(found, tuple):
        assert found[1].converged
        off = (found[0].values - exact[0].values).abs().max()
        assert off <= {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
        assert found[0].vectors.dtype == torch.float32
    else:
        assert all(torch.isfinite(t).all() for t in tensors(found))


WRONG = {
    "no pairs": (lambda A: spectra.eigh(A, 0), "k is a whole number of at least 1; got 0"),
    "half a pair": (lambda A: spectra.eigh(A, 1.5), "got 1.5"),
    "another end": (lambda A: spectra.eigh(A, 1, which="smallest"), "'smallest'"),
    "no tolerance": (
        lambda A: spectra.eigh(A, 1, rtol=0.0),
        "rtol is a finite number greater than zero; got 0.0",
    ),
    "small basis": (lambda A: spectra.eigh(A, 3, basis=4), "basis .* at least 5; got 4"),
    "few products": (
        lambda A: spectra.eigh(A, 3, max_products=5),
        "max_products .* at least 6; got 5",
    ),
    "seed": (lambda A: spectra.diagonal(A, 4, seed=-1), "seed .* at least 0; got -1"),
    "few samples": (lambda A: spectra.trace(A, 3), "samples .* at least 4; got 3"),
    "another method": (lambda A: spectra.trace(A, 9, method="exact"), "'exact'"),
    "one sample": (lambda A: spectra.diagonal(A, True), "samples .* at least 2; got True"),
    "one probe": (lambda A: spectra.density(A, probes=1, steps=4), "probes .* at least 2; got 1"),
    "no steps": (lambda A: spectra.density(A, probes=2, steps=0), "steps .* at least 1; got 0"),
    "width": (lambda A: spectra.density(A, probes=2, steps=2, width=-1.0), "width .* got -1.0"),
    "not square": (lambda A: spectra.trace(A[:3], 4), r"shape \(3, 120\)"),
    "no entries": (lambda A: spectra.diagonal(A[:0, :0], 4), r"shape \(0, 0\)"),
    "integers": (lambda A: spectra.eigh(A.long(), 1), "dtype torch.int64"),
    "not finite": (lambda A: spectra.eigh(A / 0, 1), "not finite"),
    "not symmetric": (lambda A: spectra.eigh(A.triu(), 1), "not symmetric"),
    "not symmetric, for a density": (
        lambda A: spectra.density(A.triu(), probes=2, steps=4),
        "not symmetric",
    ),
}


@pytest.mark.parametrize(("ask", "message"), WRONG.values(), ids=WRONG)
def test_wrong_calls(ask, message):
    with pytest.raises(ub.InputError, match=message):
        ask(dense(MAKERS["falling slowly"]))
