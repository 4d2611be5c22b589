"""BackPACK's attributes, as BackPACK has them: held against the real package on nets that both
support.

Under batch norm in train mode, where it has rows by copy or none, against the definitions.
"""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unbatch as ub
from unbatch.integrations import backpack as adapter
from unbatch.reference import definitions as reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Encountered BatchNorm module in training mode:UserWarning"),
]

N, C = 6, 4


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, C)), torch.randn(N, 5)


def convolutional():
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, C)]
    return nn.Sequential(*layers), torch.randn(N, 2, 6, 6)


def normed():
    """With two batch norms, in train mode."""
    layers = [
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers, nn.Linear(4, C)), torch.randn(N, 5)


def labels():
    return torch.randint(C, (N,))


def numbers():
    return torch.randn(N, C, dtype=torch.float64)


LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), labels),
    "cross-entropy, summed": (nn.CrossEntropyLoss(reduction="sum"), labels),
    "squares": (nn.MSELoss(), numbers),
    "squares, summed": (nn.MSELoss(reduction="sum"), numbers),
}
EXACT = {
    "BatchGrad": "grad_batch",
    "BatchL2Grad": "batch_l2",
    "SumGradSquared": "sum_grad_squared",
    "Variance": "variance",
    "DiagGGNExact": "diag_ggn_exact",
    "BatchDiagGGNExact": "diag_ggn_exact_batch",
    "SqrtGGNExact": "sqrt_ggn_exact",
}


def setting(make, loss="cross-entropy"):
    model, X = make()
    criterion, targets = LOSSES[loss]
    return model.double(), criterion, (X.double(), targets())


def theirs(extension, model, criterion, data, **options):
    """What BackPACK leaves at the parameters of a copy: hooks stay with the copy."""
    tool, extensions = (
        pytest.importorskip("backpack"),
        importlib.import_module("backpack.extensions"),
    )
    model, criterion = tool.extend(copy.deepcopy(model)), tool.extend(copy.deepcopy(criterion))
    chosen = getattr(extensions, extension)(**options)
    with tool.backpack(chosen):
        criterion(model(data[0]), data[1]).backward()
    return {n: getattr(p, chosen.savefield) for n, p in model.named_parameters()}


def ours(extension, model, criterion, data, by="component", **options):
    """Read off the parameters, as after BackPACK's backward pass."""
    chosen = getattr(adapter, extension)(**options)
    adapter.attach(ub.Problem(model, criterion, data), chosen, by=by)
    return {n: getattr(p, chosen.savefield) for n, p in model.named_parameters()}


def assert_same(found, wanted, tolerance=1e-10):
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name].shape == wanted[name].shape, name
        assert found[name].dtype == wanted[name].dtype, name
        assert (found[name] - wanted[name]).norm() <= tolerance * wanted[name].norm(), name


# --- the same -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("make", [mlp, convolutional], ids=lambda make: make.__name__)
@pytest.mark.parametrize("extension", EXACT)
def test_values_shapes_and_scales_are_theirs(extension, make, loss):
    case = setting(make, loss)
    assert_same(ours(extension, *case), theirs(extension, *case))


@pytest.mark.parametrize("extension", ["BatchGrad", "SqrtGGNExact"])
def test_of_some_samples(extension):
    case = setting(mlp)
    assert_same(
        ours(extension, *case, subsampling=[4, 1]), theirs(extension, *case, subsampling=[4, 1])
    )


def test_products_with_blocks():
    case = setting(mlp)
    V = {n: torch.randn(3, *p.shape, dtype=torch.float64) for n, p in case[0].named_parameters()}
    found, wanted = ours("GGNMP", *case), theirs("GGNMP", *case)
    assert_same({n: f(V[n]) for n, f in found.items()}, {n: f(V[n]) for n, f in wanted.items()})


@pytest.mark.parametrize("extension", ["DiagGGNMC", "BatchDiagGGNMC"])
def test_draws_have_their_mean(extension):
    case = setting(mlp)
    exact = {"DiagGGNMC": "DiagGGNExact", "BatchDiagGGNMC": "BatchDiagGGNExact"}[extension]
    torch.manual_seed(0)
    wanted = theirs(exact, *case)
    assert_same(theirs(extension, *case, mc_samples=3000), wanted, 0.1)
    assert_same(ours(extension, *case, mc_samples=3000), wanted, 0.1)


def test_drawn_columns_are_those_of_the_drawn_diagonal():
    """``[M, N, *p]``, and their squares sum to what the same seed has on the diagonal."""
    case = setting(mlp)
    columns, wanted = (
        ours("SqrtGGNMC", *case, mc_samples=3, seed=5),
        theirs("SqrtGGNMC", *case, mc_samples=3),
    )
    assert {n: t.shape for n, t in columns.items()} == {n: t.shape for n, t in wanted.items()}
    diagonal = ours("DiagGGNMC", *case, mc_samples=3, seed=5)
    assert_same({n: t.square().sum((0, 1)) for n, t in columns.items()}, diagonal)


def test_several_at_once_and_nothing_else():
    model, criterion, data = setting(mlp)
    problem = ub.Problem(model, criterion, data)
    found = adapter.attach(problem, *(getattr(adapter, e)() for e in EXACT), adapter.GGNMP())
    assert list(found) == [*EXACT.values(), "ggnmp"]
    for extension, field in EXACT.items():
        assert_same(found[field], theirs(extension, model, criterion, data))
        assert all(getattr(p, field) is found[field][n] for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


# --- where they differ ----------------------------------------------------------------------------


def test_rows_under_batch_norm_are_by_component_and_theirs_by_copy():
    case = setting(normed)
    model, criterion, data = case
    found, copies = ours("BatchGrad", *case), theirs("BatchGrad", *case)
    assert_floored(found, reference.component(model, criterion, *data))
    assert_floored(ours("BatchGrad", *case, by="copy"), copies)
    apart = sum(float((found[n] - copies[n]).square().sum()) for n in found)
    assert apart > 0.1 * sum(float(t.square().sum()) for t in found.values())


def assert_floored(found, wanted):
    """Biases right below a batch norm have rows that are zero but for rounding."""
    assert list(found) == list(wanted)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


def test_curvature_under_batch_norm_is_there():
    case = setting(normed)
    with pytest.raises(NotImplementedError):
        theirs("DiagGGNExact", *case)
    model, criterion, data = case
    truth = reference.ggn_diagonals(model, criterion, *data)
    torch.testing.assert_close(
        joined(ours("BatchDiagGGNExact", *case), 1), truth, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        joined(ours("DiagGGNExact", *case), 0), truth.sum(0), rtol=1e-9, atol=1e-12
    )
    V = joined(ours("SqrtGGNExact", *case), 2).flatten(0, 1)
    assert V.shape[0] == N * C
    torch.testing.assert_close(
        V.T @ V, reference.ggn(model, criterion, *data), rtol=1e-9, atol=1e-12
    )


def joined(named, axes):
    return torch.cat([t.flatten(axes) for t in named.values()], axes)


def test_moments_under_batch_norm_come_with_a_warning():
    model, criterion, data = setting(normed)
    with pytest.warns(ub.MixedSamplesWarning, match="Variance"):
        found = ours("Variance", model, criterion, data)
    assert_floored(found, reference.variance(reference.component(model, criterion, *data)))


def test_a_scaled_loss_scales_the_curvature():
    """With BackPACK the factor is lost, after a warning: its Hessian of the loss is that of the
    module.
    """
    model, criterion, data = setting(mlp)
    plain = ours("DiagGGNExact", model, criterion, data)
    half = ours("DiagGGNExact", model, lambda f, y: 0.5 * criterion(f, y), data)
    assert_same(half, {n: 0.5 * t for n, t in plain.items()})
    tool, extensions = (
        pytest.importorskip("backpack"),
        importlib.import_module("backpack.extensions"),
    )
    extended, loss = tool.extend(copy.deepcopy(model)), tool.extend(copy.deepcopy(criterion))
    with (
        tool.backpack(extensions.DiagGGNExact()),
        pytest.warns(UserWarning, match="seems to have been modified"),
    ):
        (0.5 * loss(extended(data[0]), data[1])).backward()
    assert_same({n: p.diag_ggn_exact for n, p in extended.named_parameters()}, plain)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KFAC", "KFLR", "KFRA"])
def test_kronecker_factors_are_refused_with_the_reason(name):
    problem = ub.Problem(*setting(normed))
    with pytest.raises(
        ub.StructureError, match=rf"{name} does not exist .* With the statistics frozen"
    ):
        adapter.attach(problem, getattr(adapter, name)())
    with pytest.raises(NotImplementedError, match=f"{name} exists for this loss, but"):
        adapter.attach(ub.Problem(*setting(mlp)), getattr(adapter, name)())


@pytest.mark.parametrize("name", ["DiagHessian", "BatchDiagHessian", "HMP", "PCHMP"])
def test_what_is_not_computed_yet_says_so(name):
    with pytest.raises(NotImplementedError, match=f"{name} exists for this loss, but"):
        adapter.attach(ub.Problem(*setting(mlp)), getattr(adapter, name)())


def test_parts_of_what_has_none_are_refused():
    model, _, data = setting(mlp)
    problem = ub.Problem(model, lambda f, y: F.cross_entropy(f, y).sqrt(), data)
    with pytest.raises(ub.StructureError, match="sum over the samples"):
        adapter.attach(problem, adapter.BatchDiagGGNExact())


def test_all_names_are_backpacks():
    pytest.importorskip("backpack")
    extensions = importlib.import_module("backpack.extensions")
    named = [
        n
        for n, e in vars(adapter).items()
        if isinstance(e, type) and issubclass(e, adapter.Extension)
    ]
    public = [n for n in named if not n.startswith("_") and n != "Extension"]
    assert set(public) == set(extensions.__all__) - {"HBP"}
    for name in public:
        assert getattr(adapter, name)().savefield == getattr(extensions, name)().savefield


@pytest.mark.parametrize("wrong", [(), (nn.Linear(1, 1),), (ub.Variance(),)])
def test_what_is_no_extension_is_refused(wrong):
    with pytest.raises(ub.InputError, match="attach takes extensions"):
        adapter.attach(ub.Problem(*setting(mlp)), *wrong)


# --- planted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", EXACT)
def test_a_planted_scale_is_caught(extension):
    """As for a summed loss, where the mean was meant."""
    model, criterion, data = setting(mlp)
    summed = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(AssertionError):
        assert_same(ours(extension, model, summed, data), theirs(extension, model, criterion, data))
