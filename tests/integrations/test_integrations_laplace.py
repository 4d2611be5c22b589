"""Laplace approximations by our backends: equal to those of laplace's own where these run, and to
the definition where they do not.
"""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unbatch as ub
from unbatch.integrations.laplace import UnbatchEF, UnbatchGGN
from unbatch.reference import definitions as reference

pytest.importorskip("curvlinops")
pytest.importorskip("backpack")
pytest.importorskip("laplace", exc_type=ImportError)

import laplace
from laplace import curvature

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

N, C = 10, 3
LIKELIHOODS = ["classification", "regression"]


def mlp():
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, C))


def normed():
    return nn.Sequential(
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Linear(4, 4),
        nn.BatchNorm1d(4),
        nn.Linear(4, C),
    )


def untracked():
    """Takes the statistics of the batch in eval mode as well; over positions, so that laplace can
    try one sample.
    """
    norm = nn.BatchNorm1d(2, track_running_stats=False)
    return nn.Sequential(
        nn.Linear(5, 4), nn.Unflatten(1, (2, 2)), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4, C)
    )


class Tied(nn.Module):
    """A bias that is used a second time, beside its layer."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) + self.first.bias)


def setting(make, likelihood, dtype=torch.float64):
    torch.manual_seed(0)
    model = make().to(dtype)
    model(torch.randn(32, 5, dtype=dtype))  # running statistics that are not those of a fresh model
    X = torch.randn(N, 5, dtype=dtype)
    return (
        model,
        X,
        torch.randint(C, (N,))
        if likelihood == "classification"
        else torch.randn(N, C, dtype=dtype),
    )


def fitted(backend, structure, likelihood, case, weights="all", size=4, **options):
    """Of a copy of the model; the last of three batches is smaller."""
    model, X, y = copy.deepcopy(case[0]), *case[1:]
    found = laplace.Laplace(model, likelihood, weights, structure, backend=backend, **options)
    found.fit(DataLoader(TensorDataset(X, y), batch_size=size))
    return found


def matrix(found):
    if isinstance(found, laplace.KronLaplace):
        return torch.cat([h.flatten() for factors in found.H_facs.kfacs for h in factors])
    return found.H


def definition(model, X, y, likelihood):
    """Laplace's matrix, of the loss summed over samples, with the half of a squared error."""
    loss = nn.CrossEntropyLoss(reduction="sum") if likelihood == "classification" else half_squares
    return reference.ggn(model, loss, X, y)


def half_squares(f, y):
    return 0.5 * (f - y).square().sum()


def assert_near(found, wanted, tolerance=1e-9):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert (found - wanted).norm() <= tolerance * wanted.norm()


# --- equal to laplace's own -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("other", ["BackPackGGN", "CurvlinopsGGN"])
def test_matrix_loss_and_variances_are_those_of_other_backends(other, structure, likelihood, dtype):
    """Curvlinops' full matrix is multiplied out in single precision, whatever the model has."""
    case = setting(mlp, likelihood, dtype)
    if (other, structure, dtype) == ("CurvlinopsGGN", "full", torch.float64):
        tolerance = 1e-6
    else:
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    ours, theirs = (
        fitted(b, structure, likelihood, case) for b in (UnbatchGGN, getattr(curvature, other))
    )
    assert_near(matrix(ours), matrix(theirs), tolerance)
    assert_near(ours.loss, theirs.loss, tolerance)
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood(), tolerance)
    for found, wanted in zip(predicted(ours, case[1]), predicted(theirs, case[1]), strict=True):
        assert_near(found, wanted, tolerance)


def predicted(found, X):
    """Mean and covariance of the predictions by linearisation, as ``found(X)`` uses them."""
    return found._glm_predictive_distribution(X[:3])


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("weights", ["last_layer", "subnetwork"])
def test_parts_of_the_weights(weights, structure):
    case, options = setting(mlp, "classification"), {}
    if weights == "subnetwork":
        options = {"subnetwork_indices": torch.tensor([0, 3, 17, 30])}
    ours, theirs = (
        fitted(b, structure, "classification", case, weights, **options)
        for b in (UnbatchGGN, curvature.BackPackGGN)
    )
    assert_near(matrix(ours), matrix(theirs))
    assert_near(predicted(ours, case[1])[1], predicted(theirs, case[1])[1])


def test_parameters_without_gradients_are_left_out():
    model, X, y = setting(mlp, "classification")
    model[0].requires_grad_(False)
    found = fitted(UnbatchGGN, "full", "classification", (model, X, y))
    assert_near(found.H, definition(model, X, y, "classification"))
    assert found.H.shape == (15, 15)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_empirical_fisher_matrix(structure):
    case = setting(mlp, "classification")
    ours = fitted(UnbatchEF, structure, "classification", case)
    rows = reference.flat(
        reference.component(case[0], nn.CrossEntropyLoss(reduction="sum"), *case[1:])
    )
    assert_near(matrix(ours), rows.T @ rows if structure == "full" else rows.square().sum(0))
    if structure == "diag":
        assert_near(
            matrix(ours), matrix(fitted(curvature.BackPackEF, structure, "classification", case))
        )


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("size", [4, N])
def test_low_rank(likelihood, size, monkeypatch):
    """With all eigenpairs it is the full approximation; with a few it has the largest of them.

    Laplace asks for asdfghjkl, whose Hessian it takes by default, also where another backend is
    given.
    """
    monkeypatch.setattr(
        importlib.import_module("laplace.baselaplace"), "find_spec", lambda name: True
    )
    case = setting(mlp, likelihood)
    full = fitted(UnbatchGGN, "full", likelihood, case)
    rank = torch.linalg.matrix_rank(full.H)
    low = fitted(
        UnbatchGGN, "lowrank", likelihood, case, size=size, backend_kwargs={"low_rank": int(rank)}
    )
    U, values = low.H
    assert_near(U * values @ U.T, full.H, 1e-6)
    assert_near(low.loss, full.loss)
    assert_near(predicted(low, case[1])[1], predicted(full, case[1])[1], 1e-6)
    few = fitted(UnbatchGGN, "lowrank", likelihood, case, size=size, backend_kwargs={"low_rank": 4})
    assert_near(few.H[1], torch.linalg.eigvalsh(full.H)[-4:], 1e-8)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_draws_have_their_mean(structure):
    case = setting(mlp, "classification")
    options = {"backend_kwargs": {"stochastic": True, "num_samples": 3000}}
    sampled = fitted(UnbatchGGN, structure, "classification", case, **options)
    assert_near(sampled.H, fitted(UnbatchGGN, structure, "classification", case).H, 0.1)


# --- batch norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_all_weights_of_a_net_with_batch_norm_in_eval_mode(likelihood):
    """Laplace fits in eval mode, where samples are separate; the model stays in it."""
    case = setting(normed, likelihood)
    ours = fitted(UnbatchGGN, "full", likelihood, case)
    assert not ours.model.training
    truth = definition(copy.deepcopy(case[0]).eval(), *case[1:], likelihood)
    assert_near(ours.H, truth)
    assert_near(fitted(UnbatchGGN, "diag", likelihood, case).H, truth.diag())
    assert_near(predicted(ours, case[1])[1], variances(case, ours.model, truth))


def variances(case, model, truth):
    """Of the first predictions: ``J (G + I)⁻¹ Jᵀ`` with the prior precision of 1."""
    J = reference.jacobian(model, half_squares, case[1][:3], torch.zeros(3, C)).unflatten(0, (3, C))
    return J @ torch.linalg.inv(truth + torch.eye(len(truth)).to(truth)) @ J.mT


def test_batch_norm_that_tracks_nothing_mixes_in_eval_mode_too():
    """BackPACK breaks on it; what curvlinops has is right, as the whole batch is what it
    differentiates.
    """
    case = setting(untracked, "classification")
    truth = definition(copy.deepcopy(case[0]).eval(), *case[1:], "classification")
    assert_near(fitted(UnbatchGGN, "full", "classification", case, size=N).H, truth)
    assert_near(fitted(UnbatchGGN, "diag", "classification", case, size=N).H, truth.diag())
    assert_near(
        fitted(curvature.CurvlinopsGGN, "full", "classification", case, size=N).H, truth, 1e-6
    )
    with pytest.raises(AttributeError):
        fitted(curvature.BackPackGGN, "diag", "classification", case, size=N)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_in_train_mode_where_other_backends_fail(likelihood):
    model, X, y = setting(normed, likelihood)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        curvature.CurvlinopsGGN(copy.deepcopy(model), likelihood).full(X, y)
    with pytest.raises(NotImplementedError, match="BatchNorm module in training mode"):
        curvature.BackPackGGN(copy.deepcopy(model), likelihood).diag(X, y)
    buffers = copy.deepcopy(dict(model.named_buffers()))
    backend, truth = UnbatchGGN(model, likelihood), definition(model, X, y, likelihood)
    J, f = backend.jacobians(X)
    assert_near(J.flatten(0, 1), reference.jacobian(model, half_squares, X, torch.zeros(N, C)))
    assert_near(f, copy.deepcopy(model)(X).detach())
    assert_near(backend.full(X, y)[1], truth)
    assert_near(backend.diag(X, y)[1], truth.diag())
    assert model.training
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (untracked, "cross terms"),
        (
            lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, C)),
            r"1\.weight, 1\.bias are not",
        ),
        (
            lambda: nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, C)),
            r"0\.weight are not",
        ),
        (Tied, r"first\.weight, first\.bias are not"),
    ],
)
def test_kronecker_factors_are_refused_with_the_reason(make, said):
    with pytest.raises(ub.StructureError, match=said):
        fitted(UnbatchGGN, "kron", "classification", setting(make, "classification"))


def test_models_that_take_a_mapping():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, data):
            return self.inner(data["input_ids"])

    model, X, y = setting(mlp, "classification")
    named = Named().double()
    named.inner.load_state_dict(model.state_dict())
    case, data = (model.eval(), X, y), {"input_ids": X, "labels": y}
    backend = UnbatchGGN(named.eval(), "classification")
    truth = definition(*case, "classification")
    assert_near(backend.full(data, y)[1], truth)
    assert_near(backend.diag(data, y)[1], truth.diag())


def test_without_laplace_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace.curvature", None)
    monkeypatch.delitem(sys.modules, "unbatch.integrations.laplace")
    with pytest.raises(ImportError, match="pip install laplace-torch"):
        importlib.import_module("unbatch.integrations.laplace")


# --- planted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_a_planted_scale_is_caught(structure, monkeypatch):
    """A squared error without its half."""
    case = setting(mlp, "regression")
    truth = fitted(curvature.BackPackGGN, structure, "regression", case)

    class Planted(UnbatchGGN):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.lossfunc = lambda f, y: 2 * (f - y).square().sum()

        def _get_functional_hessian(self, f):
            return 2 * torch.eye(C, dtype=f.dtype).expand(len(f), C, C)

    with pytest.raises(AssertionError):
        assert_near(matrix(fitted(Planted, structure, "regression", case)), matrix(truth))


def test_frozen_statistics_would_be_caught():
    """Jacobians in eval mode, where those of the batch were asked for."""
    model, X, y = setting(normed, "classification")
    truth = definition(model, X, y, "classification")
    with pytest.raises(AssertionError):
        assert_near(UnbatchGGN(model.eval(), "classification").full(X, y)[1], truth)
