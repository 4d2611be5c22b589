"""Models that compute their own loss, with derivatives that their recording does not have."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.autodiff import eager as live
from unbatch.reference import definitions as reference

N, D, C = 5, 4, 3


class Rounded(torch.autograd.Function):
    """A straight-through estimator: replayed, it would have no gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return 1.5 * g


class Net(nn.Module):
    """With labels it returns a loss; without, predictions."""

    def __init__(self, attention=False, noise=0.0, norm=False, decay=0.0, written=False):
        super().__init__()
        self.first, self.last = nn.Linear(D, 6), nn.Linear(6, C)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.noise, self.attention, self.decay, self.written = (
            nn.Dropout(noise),
            attention,
            decay,
            written,
        )

    def forward(self, x, labels=None):
        h = Rounded.apply(3 * self.norm(self.first(x)))
        if self.attention:
            q = h.view(len(h), 1, 3, 2)
            h = F.scaled_dot_product_attention(q, q, q).flatten(1)
        logits = self.last(self.noise(h))
        if labels is None:
            return logits
        loss = F.cross_entropy(logits, labels)
        if self.decay:
            loss = loss + self.decay * self.last.weight.square().sum()
        if self.written:
            logits.mul_(2)
        return {"loss": loss, "logits": logits}


def problems(**options):
    """A net that brings its loss, and the arguments of the reference: the same net without."""
    torch.manual_seed(0)
    net, x, y = Net(**options).double(), torch.randn(N, D).double(), torch.randint(C, (N,))
    return ub.Problem(net, batch={"x": x, "labels": y}), (net, F.cross_entropy, x, y)


def near(found, expected, rounding=1e-10):
    assert (found - expected).abs().max() <= rounding * expected.abs().max().clamp_min(1e-12)


CASES = {
    "plain": {},
    "attention": {"attention": True},
    "dropout": {"noise": 0.4},
    "batch norm": {"norm": True},
    "predictions written to": {"written": True},
}


@pytest.mark.parametrize("name", CASES)
def test_rows_and_products_are_those_of_the_model(name):
    problem, args = problems(**CASES[name])
    torch.manual_seed(1)
    rows = problem.gradients()
    torch.manual_seed(1)
    expected = reference.component(*args)
    for key, row in expected.items():
        near(rows[key], row, 1e-9)
    torch.manual_seed(1)
    G = problem.ggn()
    torch.manual_seed(1)
    if CASES[name].get("attention"):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            dense = reference.ggn(*args)
    else:
        dense = reference.ggn(*args)
    near(G.to_dense(), dense, 1e-9)
    near(G.diag(), dense.diagonal(), 1e-9)


def test_parameters_beside_the_predictions_are_refused():
    problem, _ = problems(decay=0.1)
    with pytest.raises(ub.StructureError, match="parameters reach the loss beside them"):
        problem.gradients()


def test_a_cut_that_is_not_met_is_refused(monkeypatch):
    monkeypatch.setattr(live, "_same", lambda t, value: False)
    problem, _ = problems()
    with pytest.raises(ub.StructureError, match="no tensor in the model"):
        problem.gradients()


def test_a_value_in_the_wrong_place_is_caught(monkeypatch):
    """A tensor with the numbers of the predictions, through which the gradient does not pass."""

    def detour(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is F.linear and result.shape == (N, C):
            for i in self.numbers:
                self.tensors[i] = 2 * result - result.detach()
        return result

    monkeypatch.setattr(live.ValueFinder, "__torch_function__", detour)
    problem, _ = problems()
    with pytest.raises(ub.StructureError, match="does not pass through"):
        problem.gradients()


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_what_the_loss_is_cut_at(name):
    problem, (net, _, x, _) = problems(**CASES[name])
    torch.manual_seed(1)
    found = problem.predictions()
    torch.manual_seed(1)
    near(found, net(x).detach(), 1e-12)


class Shaken(torch.autograd.Function):
    """As in shake-shake nets: a factor that the backward pass draws anew."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * torch.rand(g.shape[1], dtype=g.dtype)


def test_numbers_drawn_in_the_backward_pass_are_the_same_in_every_one():
    torch.manual_seed(0)

    class Shaking(nn.Sequential):
        def forward(self, x):
            return self[1](Shaken.apply(self[0](x)))

    net, x, y = (
        Shaking(nn.Linear(D, 6), nn.Linear(6, C)).double(),
        torch.randn(N, D).double(),
        torch.randint(C, (N,)),
    )
    before = torch.get_rng_state()
    problem = ub.Problem(net, F.cross_entropy, (x, y))
    rows, gradient, G = problem.gradients(), problem.gradient(), problem.ggn()
    for name, g in gradient.items():
        near(rows[name].sum(0), g, 1e-9)
    dense = G.to_dense()
    near(dense, dense.T, 1e-9)
    near(G.diag(), dense.diagonal(), 1e-9)
    assert torch.equal(torch.get_rng_state(), before)
