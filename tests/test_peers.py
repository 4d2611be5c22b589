"""Second opinions: rows of BackPACK, Opacus and torch.func where they are right, and what they do where they are not.

`make bench-gradients` installs the first two; without them their tests are skipped. What is said here about the tools
alone is checked against plain autograd and needs nothing of this package.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unbatch as ub

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gradients as bench

# Full backward hooks on a first layer, which both tools use, and BackPACK's own word on batch norm in train mode.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Encountered BatchNorm module in training mode:UserWarning"),
]
engine = pytest.mark.skipif(not hasattr(ub.Problem, "gradients"), reason="Problem.gradients is not there yet")

N = 6
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def mlp():
    return nn.Sequential(nn.Linear(7, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 10)), torch.randn(N, 7)


def convolutional():
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2, stride=2, bias=False)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(12, 10)), torch.randn(N, 2, 8, 8)


def transformer():
    model = nn.Sequential(bench.Encoder(8, 2, 16), bench.Encoder(8, 2, 16), bench.MeanOverPositions(), nn.Linear(8, 10))
    return model, torch.randn(N, 5, 8)


def batch_normed():
    """Two batch norms: with one alone rows by copy and by component differ below it only."""
    hidden = [nn.Linear(7, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(5, 10)), torch.randn(N, 7)


class FunctionallyNormed(nn.Module):
    """The net of `batch_normed` without scale and shift, and without a module that is called BatchNorm."""

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
    assert bench.distance(found, wanted) <= TOLERANCE[dtype]


# --- where they are right -----------------------------------------------------------------------------


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
    @pytest.mark.parametrize(("quantity", "ours"), [("norms", "Norms"), ("squares", "SumOfSquares")])
    def test_their_quantities_are_ours(self, package, make, dtype, quantity, ours):
        pytest.importorskip(package)
        case = setting(make, dtype)
        theirs = answer(TOOLS[package], *case, quantity=quantity)
        found = ub.Problem(case[0], F.cross_entropy, case[1:]).compute(getattr(ub, ours)())
        found = found.total if quantity == "norms" else found
        assert bench.distance(found, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", INDEPENDENT, ids=lambda make: make.__name__)
def test_backpacks_variance_is_ours(make, dtype):
    pytest.importorskip("backpack")
    model, X, y = setting(make, dtype)
    found = ub.Problem(model, F.cross_entropy, (X, y)).compute(ub.Variance())
    assert bench.distance(found, answer("BackPACK", model, X, y, "variance")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vmap_agrees_with_autograd_on_a_transformer(dtype):
    case = setting(transformer, dtype)
    assert_same(answer("vmap(grad)", *case), bench.autograd_rows(*case), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vmap_agrees_with_us_on_a_transformer(dtype):
    case = setting(transformer, dtype)
    assert_same(by("component", *case), answer("vmap(grad)", *case), dtype)


# --- where samples mix --------------------------------------------------------------------------------


def test_backpacks_rows_under_batch_norm_are_copy_rows():
    """It warns that they "may not be meaningful", not that they are not those of the loss terms: about 95 % off."""
    pytest.importorskip("backpack")
    case = setting(batch_normed, torch.float64)
    rows = answer("BackPACK", *case)
    assert_same(rows, bench.copied_rows(*case), torch.float64)
    assert bench.distance(rows, bench.autograd_rows(*case)) > 0.1


def test_backpacks_rows_under_batch_norm_are_ours_by_copy_and_not_by_component():
    pytest.importorskip("backpack")
    case = setting(batch_normed, torch.float64)
    rows = answer("BackPACK", *case)
    assert_same(by("copy", *case), rows, torch.float64)
    assert bench.distance(rows, by("component", *case)) > 0.1


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
    """In strict mode and without a word: rows by copy, where differential privacy needs those by component."""
    pytest.importorskip("opacus")
    model, X, y = FunctionallyNormed().double(), torch.randn(N, 7).double(), torch.randint(10, (N,))
    rows = answer("Opacus", model, X, y)
    assert_same(rows, bench.copied_rows(model, X, y), torch.float64)
    assert bench.distance(rows, bench.autograd_rows(model, X, y)) > 0.1


def test_opacus_rows_through_functional_batch_norm_are_ours_by_copy():
    pytest.importorskip("opacus")
    model, X, y = FunctionallyNormed().double(), torch.randn(N, 7).double(), torch.randint(10, (N,))
    rows = answer("Opacus", model, X, y)
    assert_same(by("copy", model, X, y), rows, torch.float64)


def test_vmap_raises_under_batch_norm():
    """Because of the running statistics. Without them it does not know what to normalise over, and raises again."""
    model, X, y = setting(batch_normed, torch.float64)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        answer("vmap(grad)", model, X, y)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        answer("vmap(grad)", FunctionallyNormed().double(), X, y)


def test_vmap_normalises_each_image_alone_without_running_statistics():
    """With more than one pixel there is something to normalise over, and the rows are those of another net."""
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.Flatten()]
    model, X, y = setting(lambda: (nn.Sequential(*layers, nn.Linear(48, 10)), torch.randn(N, 2, 6, 6)), torch.float64)
    rows = answer("vmap(grad)", model, X, y)
    layers[1] = nn.InstanceNorm2d(3, affine=True)
    other = nn.Sequential(*layers, model[-1])
    other[1].load_state_dict(model[1].state_dict())
    assert_same(rows, bench.autograd_rows(other.double(), X, y), torch.float64)
    total = dict(zip(rows, bench.plain(model, X, y)(), strict=True))
    assert bench.distance({name: r.sum(0) for name, r in rows.items()}, total) > 0.1
