"""Second opinions: rows and curvature of other tools where they are right, and what they do where
they are not.

Rows of BackPACK, Opacus and torch.func; the Gauss-Newton matrix of BackPACK, ViViT and curvlinops.
`make bench-gradients` and `make bench-ggn` install them; without them their tests are skipped. What
is said here about the tools alone is checked against plain autograd and needs nothing of this
package.
"""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unbatch as ub

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ggn_cost as curvature
import gradients_cost as bench
from lib import interleaved, workloads

# Full backward hooks on a first layer, which both tools use, and BackPACK's own word on batch norm
# in train mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Encountered BatchNorm module in training mode:UserWarning"),
]
engine = pytest.mark.skipif(
    not hasattr(ub.Problem, "gradients"), reason="Problem.gradients is not there yet"
)

N = 6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def mlp():
    return nn.Sequential(
        nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10)
    ), torch.randn(N, 7)


def convolutional():
    layers = [
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
    ]
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(12, 10)), torch.randn(
        N, 2, 8, 8
    )


def transformer():
    model = nn.Sequential(
        *(workloads.Encoder(8, 2, 16) for _ in range(2)),
        workloads.MeanOverPositions(),
        nn.Linear(8, 10),
    )
    return model, torch.randn(N, 5, 8)


def batch_normed():
    """Two batch norms: with one alone rows by copy and by component differ below it only."""
    hidden = [
        nn.Linear(7, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Linear(6, 5),
        nn.BatchNorm1d(5),
        nn.ReLU(),
    ]
    return nn.Sequential(*hidden, nn.Linear(5, 10)), torch.randn(N, 7)


class FunctionallyNormed(nn.Module):
    """The net of `batch_normed` without scale and shift, and without a module that is called
    BatchNorm.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(7, 6), nn.Linear(6, 5), nn.Linear(5, 10)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = F.relu(F.batch_norm(layer(x), None, None, training=True))
        return self.third(x)


INDEPENDENT = [mlp, convolutional]
DTYPES = list(TOLERANCE)
TOOLS = {"backpack": "BackPACK", "opacus": "Opacus"}


def setting(make, dtype):
    """Model, inputs and labels, fit to be unpacked into a contestant or into `by`."""
    model, X = make()
    return model.to(dtype), X.to(dtype), torch.randint(10, (N,))


def answer(contestant, model, X, y, quantity="rows"):
    """What a tool says about a copy of the model: hooks stay with the copy."""
    return bench.CONTESTANTS[contestant](copy.deepcopy(model), X, y)[quantity]()


def by(decomposition, model, X, y):
    return ub.Problem(model, F.cross_entropy, (X, y)).gradients(by=decomposition)


def assert_same(found, wanted, dtype):
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape, name
    assert interleaved.distance(found, wanted) <= TOLERANCE[dtype]


# --- where they are right -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", INDEPENDENT, ids=lambda make: make.__name__)
@pytest.mark.parametrize("package", ["backpack", "opacus"])
class TestIndependent:
    """Without mixing there is one kind of rows, and everybody has it."""

    def test_their_rows_are_those_of_autograd(self, package, make, dtype):
        pytest.importorskip(package)
        case = setting(make, dtype)
        assert_same(answer(TOOLS[package], *case), bench.autograd_rows(*case), dtype)

    @engine
    def test_their_rows_are_ours(self, package, make, dtype):
        pytest.importorskip(package)
        case = setting(make, dtype)
        assert_same(by("component", *case), answer(TOOLS[package], *case), dtype)

    @engine
    @pytest.mark.parametrize(
        ("quantity", "ours"), [("norms", "SquaredNorms"), ("squares", "SumOfSquares")]
    )
    def test_their_quantities_are_ours(self, package, make, dtype, quantity, ours):
        pytest.importorskip(package)
        case = setting(make, dtype)
        theirs = answer(TOOLS[package], *case, quantity=quantity)
        found = ub.Problem(case[0], F.cross_entropy, case[1:]).compute(getattr(ub, ours)())
        found = found.total if quantity == "norms" else found
        assert interleaved.distance(found, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", INDEPENDENT, ids=lambda make: make.__name__)
def test_backpacks_variance_is_ours(make, dtype):
    pytest.importorskip("backpack")
    model, X, y = setting(make, dtype)
    found = ub.Problem(model, F.cross_entropy, (X, y)).compute(ub.Variance())
    assert (
        interleaved.distance(found, answer("BackPACK", model, X, y, "variance")) <= TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vmap_agrees_with_autograd_on_a_transformer(dtype):
    case = setting(transformer, dtype)
    assert_same(answer("vmap(grad)", *case), bench.autograd_rows(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vmap_agrees_with_us_on_a_transformer(dtype):
    case = setting(transformer, dtype)
    assert_same(by("component", *case), answer("vmap(grad)", *case), dtype)


# --- where samples mix ----------------------------------------------------------------------------


def test_backpacks_rows_under_batch_norm_are_copy_rows():
    """It warns that they "may not be meaningful", not that they are not those of the loss terms:
    about 95 % off.
    """
    pytest.importorskip("backpack")
    case = setting(batch_normed, torch.float64)
    rows = answer("BackPACK", *case)
    assert_same(rows, bench.copied_rows(*case), torch.float64)
    assert interleaved.distance(rows, bench.autograd_rows(*case)) > 0.1


def test_backpacks_rows_under_batch_norm_are_ours_by_copy_and_not_by_component():
    pytest.importorskip("backpack")
    case = setting(batch_normed, torch.float64)
    rows = answer("BackPACK", *case)
    assert_same(by("copy", *case), rows, torch.float64)
    assert interleaved.distance(rows, by("component", *case)) > 0.1


@pytest.mark.parametrize("quantity", ["norms", "squares", "variance"])
def test_backpack_refuses_moments_under_batch_norm(quantity):
    """The same tool that returns the rows refuses what is computed from them."""
    pytest.importorskip("backpack")
    with pytest.raises(NotImplementedError, match="BatchNorm module in training mode"):
        answer("BackPACK", *setting(batch_normed, torch.float64), quantity=quantity)


@pytest.mark.parametrize("evaluating", [False, True])
def test_opacus_refuses_batch_norm_by_its_buffers(evaluating):
    """In eval mode as well, where nothing mixes: it looks for buffers, not at what is computed."""
    pytest.importorskip("opacus")
    model, X, y = setting(batch_normed, torch.float64)
    with pytest.raises(NotImplementedError, match="trainable layer with buffers"):
        answer("Opacus", model.train(not evaluating), X, y)


def test_opacus_takes_functional_batch_norm_and_returns_copy_rows():
    """In strict mode and without a word: rows by copy, where differential privacy needs those by
    component.
    """
    pytest.importorskip("opacus")
    model, X, y = FunctionallyNormed().double(), torch.randn(N, 7).double(), torch.randint(10, (N,))
    rows = answer("Opacus", model, X, y)
    assert_same(rows, bench.copied_rows(model, X, y), torch.float64)
    assert interleaved.distance(rows, bench.autograd_rows(model, X, y)) > 0.1


def test_opacus_rows_through_functional_batch_norm_are_ours_by_copy():
    pytest.importorskip("opacus")
    model, X, y = FunctionallyNormed().double(), torch.randn(N, 7).double(), torch.randint(10, (N,))
    rows = answer("Opacus", model, X, y)
    assert_same(by("copy", model, X, y), rows, torch.float64)


def test_vmap_raises_under_batch_norm():
    """Because of the running statistics. Without them it does not know what to normalise over, and
    raises again.
    """
    model, X, y = setting(batch_normed, torch.float64)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        answer("vmap(grad)", model, X, y)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        answer("vmap(grad)", FunctionallyNormed().double(), X, y)


def test_vmap_normalises_each_image_alone_without_running_statistics():
    """With more than one pixel there is something to normalise over, and the rows are those of
    another net.
    """
    layers = [
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
    ]
    model, X, y = setting(
        lambda: (nn.Sequential(*layers, nn.Linear(48, 10)), torch.randn(N, 2, 6, 6)), torch.float64
    )
    rows = answer("vmap(grad)", model, X, y)
    layers[1] = nn.InstanceNorm2d(3, affine=True)
    other = nn.Sequential(*layers, model[-1])
    other[1].load_state_dict(model[1].state_dict())
    assert_same(rows, bench.autograd_rows(other.double(), X, y), torch.float64)
    total = dict(zip(rows, interleaved.plain(model, X, y)(), strict=True))
    assert interleaved.distance({name: r.sum(0) for name, r in rows.items()}, total) > 0.1


# --- the Gauss-Newton matrix ----------------------------------------------------------------------

EXACT = 1e-8
K = 4
nets = pytest.mark.parametrize("make", INDEPENDENT, ids=lambda make: make.__name__)


def columns(model, X, y):
    """``Vᵀ``, ``[N·C, D]``, by plain autograd, sample by sample."""
    return torch.stack([curvature.joined(column) for column in curvature.columns(model, X, y)])


def curved(make):
    """In double precision: the case, and the matrix as we have it of a copy, whose buffers nobody
    writes to.
    """
    model, X, y = setting(make, torch.float64)
    return (model, X, y), ub.Problem(copy.deepcopy(model), F.cross_entropy, (X, y)).ggn()


def asked(tool, model, X, y):
    """One of the tools about a copy of the model: hooks stay with the copy."""
    return {"backpack": curvature.backpacks, "vivit": curvature.vivits}[tool](
        copy.deepcopy(model), X, y
    )


def computation(name, **options):
    """One of ViViT's."""
    return getattr(importlib.import_module("vivit"), name)(**options)


def flat(named):
    return curvature.joined(named.values())


def flat_rows(named):
    """``[N, D]``."""
    return torch.cat([t.flatten(1) for t in named.values()], 1)


def assert_near(found, wanted, tolerance=EXACT):
    assert found.shape == wanted.shape
    assert interleaved.distance(found, wanted) <= tolerance


@nets
class TestBackpacksCurvature:
    """Its scale is that of the loss, as ours: 1/N for a mean cross-entropy,
    its root for columns.
    """

    def test_the_diagonal(self, make):
        pytest.importorskip("backpack")
        case, G = curved(make)
        theirs = flat(asked("backpack", *case)("DiagGGNExact", "diag_ggn_exact"))
        assert_near(theirs, columns(*case).square().sum(0))
        assert_near(G.diag(), theirs)

    def test_the_diagonal_of_every_sample(self, make):
        pytest.importorskip("backpack")
        case, G = curved(make)
        theirs = flat_rows(asked("backpack", *case)("BatchDiagGGNExact", "diag_ggn_exact_batch"))
        assert_near(theirs, columns(*case).unflatten(0, (N, -1)).square().sum(1))
        assert_near(G.diag(per_component=True), theirs)

    def test_columns_and_their_gram_matrix(self, make):
        pytest.importorskip("backpack")
        case, G = curved(make)
        found = asked("backpack", *case)("SqrtGGNExact", "sqrt_ggn_exact")
        V = flat_rows({name: t.transpose(0, 1).flatten(0, 1) for name, t in found.items()})
        assert_near(V, columns(*case))
        assert_near(G.gram(), V @ V.T)

    def test_the_diagonal_from_draws(self, make):
        """The same labels are not drawn, so both are held against the mean, at a distance of many
        draws.
        """
        pytest.importorskip("backpack")
        case, G = curved(make)
        draws, exact = 4000, columns(*case).square().sum(0)
        torch.manual_seed(0)
        theirs = flat(asked("backpack", *case)("DiagGGNMC", "diag_ggn_mc", mc_samples=draws))
        ours = (
            ub.Problem(case[0], F.cross_entropy, case[1:])
            .compute(ub.DiagGGN(mc_samples=draws))
            .flat()
        )
        assert_near(theirs, exact, 0.05)
        assert_near(ours, exact, 0.05)
        assert_near(G.diag(), exact)


@nets
class TestVivit:
    """Eigenvalues in the scale of the loss; what it has for every sample averages to the whole,
    where ours sums.
    """

    def test_eigenvalues(self, make):
        pytest.importorskip("vivit")
        case, G = curved(make)
        V = columns(*case)
        theirs = asked("vivit", *case)(computation("EigvalshComputation"), 0)
        assert_near(theirs, torch.linalg.eigvalsh(V @ V.T))
        assert_near(G.eigvalsh(), theirs)

    def test_eigenvectors(self, make):
        pytest.importorskip("vivit")
        case, G = curved(make)
        values, vectors = asked("vivit", *case)(
            computation("EighComputation", warn_small_eigvals=0), K
        )
        vectors = torch.cat([t.flatten(1) for t in vectors], 1).T
        V = columns(*case)
        assert_near(V.T @ (V @ vectors), vectors * values)
        found = G.eigh(K)
        assert_near(found.values, values)
        assert_near(found.vectors * (found.vectors * vectors).sum(0).sign(), vectors)

    def test_slopes_and_curvatures(self, make):
        """Eigenvectors have no sign, and slopes that of their eigenvector."""
        pytest.importorskip("vivit")
        case, G = curved(make)
        directional = computation("DirectionalDerivativesComputation", warn_small_eigvals=0)
        slopes, curvatures = asked("vivit", *case)(directional, K)
        found = G.directions(K)
        assert_near(curvatures.mean(0), found.values)
        assert_near(N * found.curvatures, curvatures)
        assert_near(N * found.slopes * (found.slopes * slopes).sum(0).sign(), slopes)
        gradient = curvature.joined(interleaved.plain(*case)())
        assert_near(slopes.mean(0).abs(), (gradient @ found.vectors).abs())

    def test_the_damped_newton_step(self, make):
        pytest.importorskip("vivit")
        case, G = curved(make)
        damped = computation("DirectionalDampedNewtonComputation", warn_small_eigvals=0)
        step = asked("vivit", *case)(
            damped, K, damping=lambda values, *_: torch.full_like(values, 0.3)
        )
        assert_near(flat(G.newton_step(0.3, K)), curvature.joined(step))


@nets
def test_curvlinops_products_are_ours(make):
    pytest.importorskip("curvlinops")
    case, G = curved(make)
    V, v = columns(*case), curvature.vector(case[0]).double()
    theirs = curvlinops_operator(*case) @ v
    assert_near(theirs, V.T @ (V @ v))
    assert_near(G @ v, theirs)


def curvlinops_operator(model, X, y):
    operator = importlib.import_module("curvlinops").GGNLinearOperator
    return operator(model, nn.CrossEntropyLoss(), list(model.parameters()), [(X, y)])


# --- the same where samples mix -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extension", "attribute"),
    [
        ("DiagGGNExact", "diag_ggn_exact"),
        ("DiagGGNMC", "diag_ggn_mc"),
        ("BatchDiagGGNExact", "diag_ggn_exact_batch"),
        ("SqrtGGNExact", "sqrt_ggn_exact"),
    ],
)
def test_backpack_refuses_curvature_under_batch_norm(extension, attribute):
    pytest.importorskip("backpack")
    ask = asked("backpack", *setting(batch_normed, torch.float64))
    with pytest.raises(NotImplementedError, match="BatchNorm module in training mode"):
        ask(extension, attribute)


def test_vivits_spectrum_under_batch_norm_is_wrong_without_a_word(recwarn):
    """A column of each class is pulled back for all samples at once: what it has are columns by
    copy.

    Here the largest eigenvalue is a sixth of the true one, and the trace a third; all together are
    80 % off.
    """
    pytest.importorskip("vivit")
    case, G = curved(batch_normed)
    V = columns(*case)
    truth = torch.linalg.eigvalsh(V @ V.T)
    assert_near(G.eigvalsh(), truth)
    theirs = asked("vivit", *case)(computation("EigvalshComputation"), 0)
    assert not [w for w in recwarn if not str(w.message).startswith("Full backward hook is firing")]
    assert interleaved.distance(theirs, truth) > 0.5
    assert theirs.sum() < 0.5 * truth.sum()
    S = curvature.root(case[0](case[1]).detach())
    copies = torch.cat([flat_rows(bench.copied_rows(*case, column)) for column in S.unbind(-1)])
    assert_near(theirs, torch.linalg.eigvalsh(copies @ copies.T))


def test_curvlinops_raises_under_batch_norm():
    """Because of the running statistics; without them its products are right."""
    pytest.importorskip("curvlinops")
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        curvlinops_operator(*setting(batch_normed, torch.float64))
    case = FunctionallyNormed().double(), torch.randn(N, 7).double(), torch.randint(10, (N,))
    V, v = columns(*case), curvature.vector(case[0]).double()
    assert_near(curvlinops_operator(*case) @ v, V.T @ (V @ v))
