"""One sample that is not finite harms no other, where samples are independent."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import unbatch as ub
from unbatch.gradients import eager_rows, self_check
from unbatch.linalg.precision import largest
from unbatch.verification.fidelity import _difference

N, D, BAD = 6, 4, 2
OTHERS = torch.arange(N) != BAD

pytestmark = pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")


class Twice(torch.autograd.Function):
    """Has another derivative than its recording, so that the model is run itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Eager(nn.Sequential):
    def forward(self, x):
        return Twice.apply(super().forward(x))


class Sorted(nn.Module):
    """Its plan pulls columns back."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(D, D)

    def forward(self, x):
        order = x[:, 1].argsort()
        return self.a(x[order]).tanh()[order.argsort()]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, D)

    def forward(self, x):
        h = x[..., None] * torch.linspace(0.5, 1.5, D).to(x)
        return self.b(self.a(h, h, h, need_weights=False)[0].mean(1))


NETS = {
    "linear": lambda: nn.Linear(D, D),
    "tanh": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)),
    "layer norm": lambda: nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)),
    "batch norm in eval mode": lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D)).eval(),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6, D)
    ),
    "attention": Attention,
    "the model itself": lambda: Eager(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)),
}


def squared(p, y):
    return (p - y).square().sum()


def cross_entropy(p, y):
    return nn.functional.cross_entropy(p, y.argmax(1))


def poisson(p, y):
    return nn.functional.poisson_nll_loss(p, y.abs(), reduction="sum")


LOSSES = {"squared": squared, "cross-entropy": cross_entropy, "poisson": poisson}


def inputs_nan(X, y):
    X[BAD, 0] = torch.nan


def inputs_infinite(X, y):
    X[BAD, 0] = torch.inf


def inputs_overflow(X, y):
    X[BAD] = 1e308


def targets_nan(X, y):
    y[BAD, 0] = torch.nan


SPOILT = (inputs_nan, inputs_infinite, inputs_overflow, targets_nan)


def problems(net, loss, spoil):
    torch.manual_seed(0)
    model = NETS[net]().double()
    X, y = torch.randn(N, D).double(), torch.randn(N, D).double()
    right = ub.Problem(model, LOSSES[loss], (X, y))
    X, y = X.clone(), y.clone()
    spoil(X, y)
    return right, ub.Problem(model, LOSSES[loss], (X, y))


def near(found, expected, what):
    error = (found - expected).abs()
    assert bool((error <= 1e-10 * (1 + expected.abs())).all()), what


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETS)
def test_the_others_are_as_they_were(net, loss, spoil):
    right, spoilt = problems(net, loss, spoil)
    for by in ("component", "copy"):
        rows, expected = spoilt.gradients(by=by), right.gradients(by=by)
        assert rows.kind == expected.kind
        near(rows.flat()[OTHERS], expected.flat()[OTHERS], by)
    asked = (ub.SquaredNorms(), ub.Dots())
    norms, dots = spoilt.compute(*asked)
    expected_norms, expected_dots = right.compute(*asked)
    near(norms.total[OTHERS], expected_norms.total[OTHERS], "squared norms")
    near(dots[OTHERS][:, OTHERS], expected_dots[OTHERS][:, OTHERS], "dots")
    G, expected = spoilt.ggn(), right.ggn()
    diagonals = expected.diag(per_component=True)
    near(G.diag(per_component=True)[OTHERS], diagonals[OTHERS], "diagonals")
    assert not (G.diag() == 0).all()
    if not G.diag().isfinite().all():
        with pytest.raises(ub.StructureError, match="finite"):
            G.eigvalsh()


def test_rows_that_go_by_columns():
    net, X = Sorted().double(), torch.randn(N, D).double()
    y = torch.randn(N, D).double()
    right = ub.Problem(net, squared, (X, y)).gradients().flat()
    X = X.clone()
    X[BAD, 0] = torch.inf
    near(ub.Problem(net, squared, (X, y)).gradients().flat()[OTHERS], right[OTHERS], "rows")


def test_with_batch_norm_all_rows_are_lost():
    net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D)).double()
    X, y = torch.randn(N, D).double(), torch.randn(N, D).double()
    X[BAD] = torch.nan
    problem = ub.Problem(net, squared, (X, y))
    for by in ("component", "copy", "frozen"):
        assert problem.gradients(by=by)["0.weight"].isnan().all()


def test_a_plan_that_could_not_be_tested_is_tested_on_the_next_batch():
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()
    X, y = torch.randn(N, D).double(), torch.randn(N, D).double()
    weights = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.fill_(torch.nan)
    problem = ub.Problem(net, squared, (X, y))
    assert problem.gradients()["0.weight"].isnan().all()
    with pytest.raises(ub.StructureError, match="not finite"):
        problem.ggn() @ torch.ones(problem.ggn().shape[0]).double()
    with torch.no_grad():
        net[0].weight.copy_(weights)
    fresh = ub.Problem(net, squared, (X, y))
    near(problem.gradients().flat(), fresh.gradients().flat(), "rows")


def test_a_loss_that_joins_samples_is_refused():
    def loss(p, y):
        return (p - y).square().sum().sqrt()

    net, X = nn.Linear(D, D).double(), torch.randn(N, D).double()
    X[BAD] = torch.inf
    with pytest.raises(ub.StructureError, match="not finite"):
        ub.Problem(net, loss, (X, torch.zeros(N, D).double())).ggn().diag()


def test_signal_is_not_zero_where_it_is_unknown():
    _, spoilt = problems("tanh", "squared", inputs_nan)
    assert spoilt.compute(ub.SignalToNoise())["0.weight"].isnan().all()


def test_sizes_see_what_is_not_a_number_wherever_it_stands():
    known, unknown = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert math.isnan(largest([known, unknown]))
    assert math.isnan(largest([unknown, known]))
    assert largest([-known, torch.zeros(0)]) == 1.0


def test_a_replay_that_is_finite_where_the_model_is_not_differs():
    experiment = SimpleNamespace(by_type=1e-9, tolerance=1e-9)
    infinite = torch.tensor([1.0, torch.inf])
    assert _difference(torch.tensor([1.0, torch.nan]), torch.ones(2), experiment)
    assert not _difference(infinite, infinite.clone(), experiment)


# ---------------------------------------------------------------- planted bugs


def test_rows_that_hold_the_other_samples_are_caught(monkeypatch):
    monkeypatch.setattr(eager_rows, "is_finite", lambda row: True)
    with pytest.raises(AssertionError, match="component"):
        test_the_others_are_as_they_were("the model itself", "squared", inputs_nan)


def test_a_self_check_that_takes_nan_for_agreement_is_caught(monkeypatch):
    """A wrong plan that is only ever seen on a batch that is not finite."""
    monkeypatch.setattr(self_check, "squares", lambda rows: 2 * rows.flatten(1).square().sum(1))
    _, spoilt = problems("tanh", "squared", inputs_nan)
    assert "pulled back through the whole model" in spoilt.plan(ub.Gradients()).reason
    monkeypatch.setattr(self_check._Trial, "is_finite", True)
    monkeypatch.setattr(self_check, "_close", lambda a, b, bound, scale: True)
    _, spoilt = problems("tanh", "squared", inputs_nan)
    assert "One backward pass" in spoilt.plan(ub.Gradients()).reason
