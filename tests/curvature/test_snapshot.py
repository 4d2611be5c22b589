"""A snapshot is the matrix as it was, whatever happens afterwards."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.autodiff.context import Context

N, D, C = 8, 4, 3

Made = tuple[nn.Module, Any, tuple[Any, Any]]


def data(samples: int = N) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, D).double(), torch.randint(C, (samples,))


def net(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), *between, nn.Linear(6, C)).double()


class Weighted(nn.Module):
    """A loss with numbers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(C).double())

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y, self.weight)


class OwnLoss(nn.Module):
    """A model that computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(nn.Tanh())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x), y)


class Writing(nn.Linear):
    """A model that writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(2)).tanh()


def functional() -> Made:
    mask = torch.rand(6).double()
    model = net(nn.Tanh())

    def masked(parameters: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x * mask[:D],))

    masked.model = model  # type: ignore[attr-defined]
    return masked, F.cross_entropy, data()  # type: ignore[return-value]


MADE: dict[str, Callable[[], Made]] = {
    "a net": lambda: (net(nn.Tanh()), F.cross_entropy, data()),
    "batch norm": lambda: (net(nn.BatchNorm1d(6)), F.cross_entropy, data()),
    "batch norm in eval mode": lambda: (net(nn.BatchNorm1d(6)).eval(), F.cross_entropy, data()),
    "dropout": lambda: (net(nn.Dropout(0.3)), F.cross_entropy, data()),
    "one sample": lambda: (net(nn.Tanh()), F.cross_entropy, data(1)),
    "a loss with weights": lambda: (net(nn.Tanh()), Weighted(), data()),
    "a loss with noise": lambda: (
        net(nn.Tanh()),
        lambda o, y: F.cross_entropy(F.dropout(o, 0.3), y),
        data(),
    ),
    "a loss inside": lambda: (OwnLoss(), None, (data(), None)),
    "a model that writes": lambda: (Writing(D, C).double(), F.cross_entropy, data()),
    "a function with a constant": functional,
}

ASKED: dict[str, Callable[[Any], Any]] = {
    "diag": lambda G: G.diag(),
    "product": lambda G: G @ torch.linspace(-1, 1, G.shape[1]).double(),
    "dense": lambda G: G.to_dense(),
    "trace": lambda G: G.trace(),
    "eigvalsh": lambda G: G.eigvalsh(),
    "solve": lambda G: G.solve(torch.ones(G.shape[1]).double(), damping=0.1),
}


def problem_of(made: Made) -> ub.Problem:
    model, loss, (X, y) = made
    if loss is None:
        return ub.Problem(model, batch=X)
    if isinstance(model, nn.Module):
        return ub.Problem(model, loss, (X, y))
    parameters = dict(model.model.named_parameters())
    return ub.Problem(model, loss, (X, y), parameters=parameters)


def change(made: Made) -> None:
    """Change all that there is."""
    model, loss, batch = made
    with torch.no_grad():
        for leaf in torch.utils._pytree.tree_leaves(batch):
            if leaf is not None:
                leaf.copy_(leaf.flip(0) * 0 + 1)
        for module in (getattr(model, "model", model), loss):
            if not isinstance(module, nn.Module):
                continue
            for t in (*module.parameters(), *module.buffers()):
                t.copy_(t * 3 + 1)
            module.train(not module.training)
        for cell in getattr(model, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Tensor):
                cell.cell_contents.add_(1.0)


def check(name: str, asked_before: bool, **options: Any) -> None:
    """Raise where a snapshot answers otherwise than its matrix did."""
    torch.manual_seed(0)
    made = MADE[name]()
    G = problem_of(made).ggn(**options)
    expected = {}
    if asked_before:
        expected = {what: ask(G) for what, ask in ASKED.items()}
    S = G.snapshot()
    for what, ask in ASKED.items():
        expected.setdefault(what, ask(G))
    change(made)
    for what, ask in ASKED.items():
        torch.testing.assert_close(ask(S), expected[what])
    with pytest.raises(ub.StaleError, match="snapshot"):
        G.diag()
    assert "napshot" in repr(S)
    assert "napshot" not in repr(G)
    torch.testing.assert_close(S.snapshot().diag(), expected["diag"])


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("name", MADE)
def test_a_snapshot_is_the_matrix_as_it_was(name, asked_before):
    check(name, asked_before)


@pytest.mark.parametrize("options", [{"by": "frozen"}, {"blocks": "module"}, {"mc_samples": 2}])
@pytest.mark.parametrize("name", ["a net", "batch norm"])
def test_a_snapshot_is_one_of_the_same_matrix(name, options):
    check(name, True, **options)


def test_curvature_of_every_tenth_step():
    """What one would do with it: damped steps with old curvature."""
    torch.manual_seed(0)
    model = net(nn.BatchNorm1d(6))
    X, y = data(32)
    problem = ub.Problem(model, F.cross_entropy, (X, y))
    before = F.cross_entropy(model(X), y).item()
    for i in range(20):
        if i % 10 == 0:
            S = problem.ggn().snapshot()
        step = S.solve({name: -g for name, g in problem.gradient().items()}, damping=0.1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(0.3 * step[name])
    assert F.cross_entropy(model(X), y).item() < before


# --- refused --------------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """The identity, with a derivative that is not its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


def test_a_model_that_has_to_be_run_has_no_snapshot():
    G = ub.Problem(net(Doubling()), F.cross_entropy, data()).ggn()
    with pytest.raises(ub.StructureError, match="snapshot"):
        G.snapshot()


def test_a_loss_that_has_to_be_run_has_no_snapshot():
    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(Doubled.apply(o), y)

    G = ub.Problem(net(nn.Tanh()), loss, data()).ggn()
    with pytest.raises(ub.StructureError, match="snapshot"):
        G.snapshot()


# --- planted --------------------------------------------------------------------------------------

FORGOTTEN = {
    "inputs": ("a net", lambda old, new: {"inputs": old.inputs}),
    "targets": ("a loss with weights", lambda old, new: {"targets": old.targets}),
    "parameters": ("a net", lambda old, new: {"program": old.program}),
    "buffers": ("batch norm in eval mode", lambda old, new: {"graph": old.graph}),
    "constants": ("a function with a constant", lambda old, new: {"graph": old.graph}),
    "the loss": ("a loss with weights", lambda old, new: {"alone": False}),
}


@pytest.mark.parametrize("what", FORGOTTEN)
def test_what_is_not_copied_is_caught(what, monkeypatch):
    name, parts = FORGOTTEN[what]
    on_copies = Context.on_copies

    def forgetful(self: Context) -> Context:
        new = on_copies(self)
        return replace(new, schedules={}, trust={}, **parts(self, new))

    monkeypatch.setattr(Context, "on_copies", forgetful)
    with pytest.raises((AssertionError, ub.UnbatchError)):
        check(name, True)
