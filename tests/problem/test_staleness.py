"""A matrix is stale once something has changed that its numbers depend on, and only then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.capture import uses
from unbatch.problem import staleness

N, D, C = 16, 4, 3

Change = Callable[[], Any]


class Between(nn.Module):
    """Two linear layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(D, 8), between, nn.Linear(8, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Centred(nn.Module):
    """Keeps a moving mean; ``reads`` whether it is subtracted, before or after it has moved."""

    def __init__(self, reads: str = "") -> None:
        super().__init__()
        self.reads = reads
        self.register_buffer("mean", torch.zeros(8).double())
        self.register_buffer("shadow", self.mean.view(2, 4))
        self.register_buffer("rate", torch.tensor(0.9).double())

    def forward(self, x: Tensor) -> Tensor:
        before = self.mean.clone() if self.reads == "before" else 0.0
        with torch.no_grad():
            self.mean.mul_(self.rate).add_(0.1 * x.mean(0))
        if self.reads == "after":
            return x - self.mean
        if self.reads == "through a view":
            return x - self.shadow.flatten()
        return x - before


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D).double(), torch.randint(C, (N,))


def matrix(net: nn.Module, loss: Any = F.cross_entropy) -> ub.GGN:
    G = ub.Problem(net.double(), loss, batch()).ggn()
    assert G.trace() > 0
    return G


def step(net: nn.Module, loss: Any = F.cross_entropy) -> None:
    """A plain training step, but for the update of the parameters."""
    X, y = batch()
    loss(net(X), y).backward()


def all_of(G: ub.GGN) -> list[Tensor]:
    v = torch.linspace(-1, 1, G.shape[1]).double()
    return [G.diag(), G @ v, G.to_dense(), G.solve(v, damping=0.1)]


def is_stale(G: ub.GGN) -> bool:
    try:
        G.diag()
    except ub.StaleError:
        return True
    return False


# --- what is only updated -------------------------------------------------------------------------

UPDATED: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: Between(nn.BatchNorm1d(8)),
    "batch norm without scale": lambda: Between(nn.BatchNorm1d(8, affine=False)),
    "batch norm of images": lambda: Between(
        nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.BatchNorm2d(2), nn.Flatten())
    ),
    "instance norm": lambda: Between(
        nn.Sequential(
            nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
        )
    ),
    "two batch norms": lambda: Between(nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8))),
    "a moving mean": lambda: Between(Centred()),
    "a moving mean in a function": lambda: Between(lambda h: norm(h)),
}

norm = nn.BatchNorm1d(8, affine=False).double()  # no module of the model's


@pytest.mark.parametrize("name", UPDATED)
def test_a_training_step_leaves_a_matrix_valid_that_does_not_read_what_it_updates(name):
    torch.manual_seed(0)
    net = UPDATED[name]()
    G = matrix(net)
    before = all_of(G)
    step(net)
    for now, then in zip(all_of(G), before, strict=True):
        torch.testing.assert_close(now, then)


READ: dict[str, Callable[[], nn.Module]] = {
    "batch norm in eval mode": lambda: Between(nn.BatchNorm1d(8).eval()),
    "a mean that was": lambda: Between(Centred("before")),
    "a mean that has moved": lambda: Between(Centred("after")),
    "a mean through a view": lambda: Between(Centred("through a view")),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read_makes_it_stale(name):
    torch.manual_seed(0)
    net = READ[name]()
    G = matrix(net)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(1.0)
    assert is_stale(G)


@pytest.mark.parametrize("name", ["a mean that has moved", "a mean through a view"])
def test_the_rate_of_a_mean_that_is_read_makes_it_stale(name):
    net = READ[name]()
    net.between.mean.add_(1.0)
    G = matrix(net)
    net.between.rate.mul_(2)
    assert is_stale(G)


def test_running_statistics_that_the_loss_reads():
    torch.manual_seed(0)
    net = Between(nn.BatchNorm1d(8))
    G = matrix(net, lambda o, y: F.cross_entropy(o - net.between.running_mean.mean(), y))
    step(net)
    assert is_stale(G)


def test_a_mode_of_a_batch_norm_makes_it_stale():
    net = Between(nn.BatchNorm1d(8))
    G = matrix(net)
    net.eval()
    assert is_stale(G)


# --- what scripts keep ----------------------------------------------------------------------------


def kept(net: nn.Module) -> dict[str, Any]:
    """A dict of the script's, into which a hook puts activations."""
    features: dict[str, Any] = {"log": []}

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        features["h"] = output

    net.a.register_forward_hook(keep)
    return features


LOGGED: dict[str, Callable[[nn.Module, dict[str, Any]], Any]] = {
    "another run": lambda net, features: net(batch()[0]),
    "a run without gradients": lambda net, features: torch.no_grad()(net)(batch()[0]),
    "a run on fewer samples": lambda net, features: net(batch()[0][:3]),
    "a line in a log": lambda net, features: features["log"].append(0.3),
    "an entry": lambda net, features: features.update(epoch=3),
    "all of it removed": lambda net, features: features.clear(),
}


@pytest.mark.parametrize("is_read", [False, True])
@pytest.mark.parametrize("name", LOGGED)
def test_what_a_script_keeps_beside_what_is_read_is_no_matter(name, is_read):
    torch.manual_seed(0)
    net = Between(torch.tanh)
    features = kept(net)

    def loss(o: Tensor, y: Tensor) -> Tensor:
        if is_read:
            return F.cross_entropy(o, y) + features["h"].square().mean()
        return F.cross_entropy(o, y)

    net.double()
    G = matrix(net, loss)
    before = G.diag()
    for _ in range(2):
        LOGGED[name](net, features)
        torch.testing.assert_close(G.diag(), before)


# --- what matters is seen -------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """The identity, with a factor in its derivative that lies in a dict."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * FACTORS["g"]


FACTORS = {"g": 1.0, "f": 1.0}


def hooked(o: Tensor, y: Tensor) -> Tensor:
    """A loss with a hook on its predictions."""
    return F.cross_entropy(with_hook(o), y)


def with_hook(h: Tensor) -> Tensor:
    """A tensor with a hook that scales its gradient."""
    if h.requires_grad:
        h.register_hook(lambda g: g * FACTORS["g"])
    return h


MATTERS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a factor": (lambda: Between(lambda h: h * FACTORS["f"]), F.cross_entropy, "f"),
    "a factor in the loss": (
        lambda: Between(torch.tanh),
        lambda o, y: FACTORS["f"] * F.cross_entropy(o, y),
        "f",
    ),
    "a factor of a derivative": (lambda: Between(Scaled.apply), F.cross_entropy, "g"),
    "a factor in a hook": (lambda: Between(with_hook), F.cross_entropy, "g"),
    "a factor in a hook of the loss": (lambda: Between(torch.tanh), hooked, "g"),
}


def changed(name: str) -> bool:
    """Return whether a change that matters is seen."""
    torch.manual_seed(0)
    make, loss, entry = MATTERS[name]
    G = matrix(make(), loss)
    FACTORS[entry] = 3.0
    try:
        return is_stale(G)
    finally:
        FACTORS[entry] = 1.0


@pytest.mark.parametrize("name", MATTERS)
def test_a_change_that_matters_is_seen(name):
    assert changed(name)


# --- planted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_reads_that_are_overlooked_are_caught(name, monkeypatch):
    monkeypatch.setattr(uses, "_read_for", lambda *args: [])
    with pytest.raises(AssertionError):
        test_what_is_read_makes_it_stale(name)


def test_writes_that_show_in_a_view_and_are_overlooked_are_caught(monkeypatch):
    monkeypatch.setattr(uses, "_writes_to", lambda *args: False)
    test_the_rate_of_a_mean_that_is_read_makes_it_stale("a mean that has moved")
    with pytest.raises(AssertionError):
        test_the_rate_of_a_mean_that_is_read_makes_it_stale("a mean through a view")


LOOKS = {
    "a factor": "_is_same",
    "a factor in the loss": "_is_same",
    "a factor in a hook of the loss": "_gradients_agree",
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_that_is_left_out_is_caught(name, monkeypatch):
    if LOOKS[name] == "_is_same":
        for look in ("derivatives_agree", "_gradients_agree"):
            monkeypatch.setattr(staleness, look, lambda *args: True)
    monkeypatch.setattr(staleness, LOOKS[name], lambda *args: True)
    assert not changed(name)
