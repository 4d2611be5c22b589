"""Clipping per sample as Opacus does it, and what its validator lets through though clipping bounds
nothing there.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unbatch as ub
from unbatch.integrations.opacus import UnsuitableLossError, validate, write_clipped_gradient
from unbatch.reference import definitions as reference

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")

N, C = 8, 3
MAX_NORM = 1.1


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C)), torch.randn(N, 5)


def convolutional():
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, C)]
    return nn.Sequential(*layers), torch.randn(N, 2, 5, 5)


def embedded():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, C)), torch.randint(
        7, (N, 3)
    )


def setting(make):
    torch.manual_seed(0)
    model, X = make()
    X = X.double() if X.is_floating_point() else X
    return model.double(), X, torch.randint(C, (N,))


def opacus_gradient(
    model, X, y, reduction, noise=0.0, generator=None, expected=N, max_norm=MAX_NORM
):
    """What ``DPOptimizer`` writes to ``.grad`` before its step."""
    opacus = pytest.importorskip("opacus")
    from opacus.optimizers import DPOptimizer

    model = copy.deepcopy(model)
    wrapped = opacus.GradSampleModule(model, loss_reduction=reduction)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), 0.1),
        noise_multiplier=noise,
        max_grad_norm=max_norm,
        expected_batch_size=expected,
        loss_reduction=reduction,
        generator=generator,
    )
    F.cross_entropy(wrapped(X), y, reduction=reduction).backward()
    optimizer.pre_step()
    return {n: p.grad for n, p in model.named_parameters()}


def our_gradient(model, X, y, reduction, max_norm=MAX_NORM, **options):
    model = copy.deepcopy(model)
    problem = ub.Problem(model, nn.CrossEntropyLoss(reduction=reduction), (X, y))
    found = write_clipped_gradient(
        problem, max_grad_norm=max_norm, loss_reduction=reduction, **options
    )
    return {n: p.grad for n, p in model.named_parameters()}, found


def assert_same(found, wanted, tolerance):
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape
        assert (found[name] - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


# --- the same gradient ----------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("make", "max_norm"), [(mlp, MAX_NORM), (convolutional, 4.1), (embedded, 2.7)]
)
def test_the_clipped_gradient_is_theirs(make, max_norm, reduction):
    """But for the 1e-6 that Opacus adds to every norm."""
    case = setting(make)
    found, clipped = our_gradient(*case, reduction, max_norm)
    assert 0 < clipped.clipped < N, "all or none clipped: nothing would be tested"
    assert_same(found, opacus_gradient(*case, reduction, max_norm=max_norm), 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_clipped_gradient_is_the_definition(reduction):
    model, X, y = setting(mlp)
    found, clipped = our_gradient(model, X, y, reduction)
    rows = reference.component(model, nn.CrossEntropyLoss(reduction="sum"), X, y)
    wanted = reference.clipped_sum(rows, MAX_NORM)
    assert_same(found, {n: t / (N if reduction == "mean" else 1) for n, t in wanted.items()}, 1e-10)
    norms = reference.squared_norms(rows)[1].sqrt()
    torch.testing.assert_close(clipped.norms, norms)
    assert clipped.clipped == int((norms > MAX_NORM).sum())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_noise_is_theirs(reduction):
    """From generators of the same seed, scaled by the batch size that is expected."""
    case, seeded = setting(mlp), lambda: torch.Generator().manual_seed(3)
    wanted = opacus_gradient(*case, reduction, noise=1.3, generator=seeded(), expected=5)
    options = {"noise_multiplier": 1.3, "expected_batch_size": 5}
    found, clipped = our_gradient(*case, reduction, generator=seeded(), **options)
    assert_same(found, wanted, 1e-5)
    assert clipped.noise == pytest.approx(1.3 * MAX_NORM / (5 if reduction == "mean" else 1))
    assert_differ(our_gradient(*case, reduction, **options)[0], found)


def test_the_noise_leaves_the_random_state_alone_and_heeds_no_seed():
    case = setting(mlp)
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        draws.append(our_gradient(*case, "mean", noise_multiplier=1.0)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert_differ(*draws)


def assert_differ(found, other):
    assert all(not torch.allclose(found[n], other[n]) for n in other)


def test_a_training_step():
    """Clipping in a loop: the gradient is replaced, and the problem follows the parameters."""
    model, X, y = setting(mlp)
    problem, optimizer = (
        ub.Problem(model, F.cross_entropy, (X, y)),
        torch.optim.SGD(model.parameters(), 0.5),
    )
    losses = []
    for _ in range(5):
        write_clipped_gradient(problem.with_batch(X, y), max_grad_norm=MAX_NORM)
        optimizer.step()
        losses.append(F.cross_entropy(model(X), y).item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"noise_multiplier": -1.0}, r"noise_multiplier .* got -1\.0"),
        ({"expected_batch_size": 0}, r"expected_batch_size .* got 0"),
        ({"loss_reduction": "none"}, r"loss_reduction .* got 'none'"),
        ({"max_grad_norm": 0}, r"max_grad_norm .* got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, said):
    problem = ub.Problem(setting(mlp)[0], F.cross_entropy, setting(mlp)[1:])
    with pytest.raises(ub.InputError, match=said):
        write_clipped_gradient(problem, **{"max_grad_norm": 1.0} | wrong)


# --- the validator --------------------------------------------------------------------------------


class Net(nn.Module):
    """A hidden layer, and something done to it."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(5, 4), middle, nn.Linear(4, C)

    def forward(self, x):
        return self.last(torch.relu(self.middle(self.first(x))))


class FunctionalNorm(nn.Module):
    def forward(self, x):
        return F.batch_norm(x, None, None, training=True)


class InlineNorm(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / x.std(0)


class OwnNorm(nn.BatchNorm1d):
    """A class of one's own; validators are looked up by the exact class."""


def frozen_norm():
    return nn.BatchNorm1d(4).requires_grad_(False)


def contrastive(f, y):
    f = F.normalize(f, dim=1)
    return F.cross_entropy(f @ f.T, torch.arange(len(f)))


def share(y):
    """Return which share of the batch each class has."""
    return F.one_hot(y, C).float().mean(0)


MISSED = {
    "functional batch norm": FunctionalNorm,
    "statistics taken by hand": InlineNorm,
    "batch norm without parameters": lambda: nn.BatchNorm1d(4, affine=False),
    "batch norm with frozen parameters": frozen_norm,
    "a subclass of batch norm": lambda: OwnNorm(4),
}
COUPLED = {
    "contrastive": (contrastive, "SIMD loss"),
    "root of a mean": (lambda f, y: F.cross_entropy(f, y).sqrt(), "reduction"),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])),
        "weights depend on targets",
    ),
    "classes in balance": (
        lambda f, y: F.cross_entropy(f, y, 1 / (1 + share(y)), reduction="sum"),
        "weights depend on targets",
    ),
    "about the mean target": (
        lambda f, y: (f - share(y)).square().sum(),
        "only given statistics of the targets",
    ),
    "logits adjusted by the batch": (
        lambda f, y: F.cross_entropy(f + (0.1 + share(y)).log(), y, reduction="sum"),
        "only given statistics of the targets",
    ),
}


def data():
    return torch.randn(N, 5), torch.randint(C, (N,))


def opacus_errors(model):
    pytest.importorskip("opacus")
    from opacus.validators import ModuleValidator

    return ModuleValidator.validate(model)


def influence(model, X, y):
    """How far the rows of other samples move when sample 0 is replaced, relative to their size:
    plain autograd.
    """
    other = X.clone()
    other[0] = torch.randn_like(X[0])
    rows, moved = (
        reference.flat(reference.component(model, F.cross_entropy, x, y))[1:] for x in (X, other)
    )
    return float((rows - moved).norm() / rows.norm())


@pytest.mark.parametrize("name", MISSED)
def test_what_opacus_lets_through_is_found(name):
    model, batch = Net(MISSED[name]()), data()
    assert opacus_errors(model) == []
    (error,) = validate(ub.Problem(model, F.cross_entropy, batch))
    assert isinstance(error, UnsuitableLossError)
    assert error.verdict.name == "independent_forward"
    assert error.verdict.status == "fails"
    assert error.culprits
    assert all(c.remedy in str(error) and c.where in str(error) for c in error.culprits)
    assert influence(model, *batch) > 1e-3, (
        "other samples are not moved: the finding would be wrong"
    )


def test_the_place_of_statistics_taken_by_hand_is_told():
    (error,) = validate(ub.Problem(Net(InlineNorm()), F.cross_entropy, data()))
    assert {c.op for c in error.culprits} == {"mean", "std"}
    assert all("test_integrations_opacus.py:" in c.where for c in error.culprits)


@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_samples_are_found(name):
    loss, said = COUPLED[name]
    model = Net(nn.Identity())
    assert opacus_errors(model) == []
    assert any(said in str(e) for e in validate(ub.Problem(model, loss, data())))


def test_parameters_beside_the_predictions_are_found():
    model = Net(nn.Identity())
    decayed = ub.Problem(
        model, lambda f, y: F.cross_entropy(f, y) + model.last.weight.square().sum(), data()
    )
    (error,) = validate(decayed)
    assert "Move a weight decay to the optimizer" in str(error)


@pytest.mark.parametrize("middle", [nn.Identity, lambda: nn.LayerNorm(4), lambda: nn.Dropout(0.3)])
def test_what_is_suitable_passes(middle):
    model, batch = Net(middle()), data()
    assert validate(ub.Problem(model, F.cross_entropy, batch), strict=True) == []
    assert opacus_errors(model) == []


def test_weights_of_their_own_sample_pass():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum")
    assert validate(ub.Problem(Net(nn.Identity()), loss, data())) == []


def test_batch_norm_with_fixed_statistics_passes_though_opacus_refuses_it():
    model, batch = Net(nn.BatchNorm1d(4)).eval(), data()
    assert opacus_errors(model)
    assert validate(ub.Problem(model, F.cross_entropy, batch)) == []
    assert influence(model, *batch) == 0


def test_clipping_is_refused_where_it_bounds_nothing():
    model = Net(InlineNorm())
    problem = ub.Problem(model, F.cross_entropy, data())
    with pytest.raises(UnsuitableLossError, match=r"(?s)does not bound what one sample.*std at"):
        write_clipped_gradient(problem, max_grad_norm=1.0)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(UnsuitableLossError):
        validate(problem, strict=True)


# --- planted --------------------------------------------------------------------------------------


def test_a_planted_scale_is_caught():
    """Clipping a mean as if it were a sum."""
    case = setting(mlp)
    model = copy.deepcopy(case[0])
    write_clipped_gradient(
        ub.Problem(model, F.cross_entropy, case[1:]), max_grad_norm=MAX_NORM, loss_reduction="sum"
    )
    with pytest.raises(AssertionError):
        assert_same(
            {n: p.grad for n, p in model.named_parameters()}, opacus_gradient(*case, "mean"), 1e-5
        )


def test_a_planted_leak_is_found():
    """One number of one other sample, a thousandth of its size."""

    class Leak(nn.Module):
        def forward(self, x):
            return x + 1e-3 * x[:1, :1]

    model, batch = Net(Leak()), data()
    assert opacus_errors(model) == []
    assert validate(ub.Problem(model, F.cross_entropy, batch))
