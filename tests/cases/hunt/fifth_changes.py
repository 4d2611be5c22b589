"""Changes of a program between two questions, by a fifth hunt: of its backward passes above all.

As in `cases/changes.py`: a function that makes `(model, loss)`, and one that changes the model.
`UNRELATED` are acts of a script after which all is as it was, so that no answer is stale.
"""

import copy
import functools
import io
import logging
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR
from torch.optim.swa_utils import AveragedModel

from cases.changes import Change, D, Net, layers, net, put, squares

Hook = Callable[[Tensor], Any]


# --- hooks that look at first, and then change a gradient -----------------------------------------


def scaling(net: Any) -> Hook:
    return lambda g: None if net.factor is None else g * net.factor


def masking(net: Any) -> Hook:
    return lambda g: None if net.mask.all() else g * net.mask


def masking_by_array(net: Any) -> Hook:
    return lambda g: None if net.array.all() else g * torch.from_numpy(net.array)


def by_rows(net: Any) -> Hook:
    def hook(g: Tensor) -> Any:
        if not net.rows:
            return None
        return g.index_fill(0, torch.tensor(sorted(net.rows)), 0.0)

    return hook


def by_weights(net: Any) -> Hook:
    return lambda g: 0.5 * g if net.linear.weight.detach().norm() > 20 else None


def by_partial(net: Any) -> Hook:
    return functools.partial(lambda table, g: g * table["scale"] if table else None, net.table)


class Masked:
    """A hook with a mask of its own."""

    def __init__(self) -> None:
        self.mask: Any = None

    def __call__(self, g: Tensor) -> Any:
        return None if self.mask is None else g * self.mask

    def called(self, g: Tensor) -> Any:
        return self(g)


def plain(net: Any, x: Tensor) -> Tensor:
    return net.last(net.linear(x).tanh())


def in_forward(net: Any, x: Tensor) -> Tensor:
    h = net.linear(x).tanh()
    if h.requires_grad:
        h.register_hook(net.hook)
    return net.last(h)


def made(run: Callable[..., Tensor] = plain) -> Any:
    """Return a net with all that the hooks read."""
    model = Net(run, last=nn.Linear(D, D))
    model.factor, model.rows, model.table = None, set(), {}
    model.mask, model.array = torch.ones(D), np.ones(D, dtype=np.float32)
    return model


def on_parameter(make_hook: Callable[[Any], Hook]) -> Callable[[], Any]:
    def make() -> Any:
        model = made()
        model.linear.weight.register_hook(make_hook(model))
        return model, squares

    return make


def on_value(make_hook: Callable[[Any], Hook]) -> Callable[[], Any]:
    def make() -> Any:
        model = made(in_forward)
        model.hook = make_hook(model)
        return model, squares

    return make


def on_module(make_hook: Callable[[Any], Hook]) -> Callable[[], Any]:
    def make() -> Any:
        model = made()
        hook = make_hook(model)
        model.last.register_full_backward_hook(lambda m, gi, go: changed(hook, gi))
        return model, squares

    return make


def changed(hook: Hook, gradients: Any) -> Any:
    result = hook(gradients[0])
    return None if result is None else (result,)


def on_parameter_by_object(name: str) -> Callable[[], Any]:
    def make() -> Any:
        model = made()
        model.__dict__["kept"] = Masked()
        model.linear.weight.register_hook(getattr(model.kept, name))
        return model, squares

    return make


def hooked_later(model: Any) -> None:
    model.linear.weight.register_hook(scaling(model))
    model.factor = 3.0


def first_of(name: str, value: float = 0.0) -> Callable[[Any], Any]:
    return lambda model: getattr(model, name).__setitem__(0, value)


# --- derivatives of one's own ---------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """Twice its input; its slope is that, times what the net says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Any) -> Tensor:
        ctx.net = net
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g * ctx.net.mask, None


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.slope / (1 + ctx.saved_tensors[0] ** 2), None


def doubled(net: Any, x: Tensor) -> Tensor:
    return net.last(Doubled.apply(net.linear(x), net).tanh())


def with_buffer() -> Any:
    model = made(doubled)
    del model.mask
    model.register_buffer("mask", torch.ones(D))
    return model, squares


def spiking(net: Any, x: Tensor) -> Tensor:
    return net.last(Spike.apply(net.linear(x), net.slope))


# --- schedules ------------------------------------------------------------------------------------


def scheduled(make: Callable[[Any], Any], run: Callable[..., Tensor]) -> Callable[[], Any]:
    def make_net() -> Any:
        model = Net(run)
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        model.schedule = make(optimizer)
        return model, squares

    return make_net


def in_loss() -> Any:
    schedule = ExponentialLR(SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 0.5)
    model = Net(lambda net, x: net.linear(x))
    model.schedule = schedule
    return model, lambda output, y: squares(output, y) * schedule.get_last_lr()[0]


def stepped(model: Any) -> None:
    model.schedule.optimizer.step()
    model.schedule.step()


# --- ordinary ones --------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank part beside it, until that is merged."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.merged = nn.Linear(D, D), False
        self.a, self.b = nn.Parameter(torch.randn(2, D)), nn.Parameter(torch.randn(D, 2))

    def forward(self, x: Tensor) -> Tensor:
        output = self.base(x)
        if not self.merged:
            output = output + x @ self.a.t() @ self.b.t()
        return output


def merge(model: Any) -> None:
    with torch.no_grad():
        model.base.weight += model.b @ model.a
    model.merged = True


def tie(model: Any) -> None:
    model[2].weight = model[0].weight


def swap_layers(model: Any) -> None:
    model[0], model[2] = model[2], model[0]


def average_in(model: Any) -> None:
    for p in model.parameters():
        p.data = 0.5 * p.data


TWO = (lambda: nn.Linear(D, D), nn.Tanh, lambda: nn.Linear(D, D))

CHANGES: dict[str, Change] = {
    # hooks
    "a hook of a parameter starts to scale": (on_parameter(scaling), put("factor", 3.0)),
    "a hook of a value starts to scale": (on_value(scaling), put("factor", 3.0)),
    "a hook of a module starts to scale": (on_module(scaling), put("factor", 3.0)),
    "a hook of a parameter gets a mask": (on_parameter(masking), first_of("mask")),
    "a hook of a value gets a mask": (on_value(masking), first_of("mask")),
    "a hook of a module gets a mask": (on_module(masking), first_of("mask")),
    "a hook of a value gets an array": (on_value(masking_by_array), first_of("array")),
    "a hook of a parameter freezes a row": (on_parameter(by_rows), lambda m: m.rows.add(1)),
    "a hook of a value freezes a sample": (on_value(by_rows), lambda m: m.rows.add(1)),
    "a hook by partial": (on_parameter(by_partial), lambda m: m.table.update(scale=2.0)),
    "a hook that is an object": (
        on_parameter_by_object("__call__"),
        lambda m: setattr(m.kept, "mask", torch.eye(D)),
    ),
    "a hook that is a method": (
        on_parameter_by_object("called"),
        lambda m: setattr(m.kept, "mask", torch.eye(D)),
    ),
    "a hook of a parameter that decides by it": (
        on_parameter(by_weights),
        lambda m: m.linear.weight.data.mul_(50),
    ),
    "a hook of a value that decides by weights": (
        on_value(by_weights),
        lambda m: m.linear.weight.data.mul_(50),
    ),
    "a hook of a module that decides by weights": (
        on_module(by_weights),
        lambda m: m.linear.weight.data.mul_(50),
    ),
    "a hook that is added, and starts to scale": (lambda: (made(), squares), hooked_later),
    # derivatives of one's own
    "a slope by a tensor": (lambda: (made(doubled), squares), first_of("mask", 3.0)),
    "a slope by a buffer": (with_buffer, first_of("mask", 3.0)),
    "a surrogate's slope": (
        net(spiking, last=lambda: nn.Linear(D, D), slope=lambda: 1.0),
        put("slope", 2.0),
    ),
    # schedules
    "a schedule in the loss": (in_loss, stepped),
    "a schedule of a factor": (
        scheduled(
            lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
            lambda net, x: net.linear(x) * net.schedule.get_last_lr()[0],
        ),
        stepped,
    ),
    "the epoch of a schedule": (
        scheduled(
            lambda optimizer: CosineAnnealingLR(optimizer, 10),
            lambda net, x: net.linear(x) / (1 + net.schedule.last_epoch),
        ),
        stepped,
    ),
    # ordinary ones
    "an adapter merged": (lambda: (Adapted(), squares), merge),
    "weights tied": (layers(*TWO), tie),
    "layers swapped": (layers(*TWO), swap_layers),
    "a layer taken out": (layers(*TWO), lambda m: m.__delitem__(1)),
    "an average put in": (layers(*TWO), average_in),
    "a layer frozen": (layers(*TWO), lambda m: m[0].requires_grad_(False)),
    "a weight normed": (layers(*TWO), lambda m: parametrizations.weight_norm(m[0])),
    # what is not watched
    "a gradient that is there": (
        net(lambda net, x: net.linear(x) * (1 + (net.linear.weight.grad is not None))),
        lambda m: setattr(m.linear.weight, "grad", torch.zeros(D, D)),
    ),
}


# --- acts that change nothing ---------------------------------------------------------------------


def trained_once(model: Any) -> None:
    model(torch.randn(3, D)).sum().backward()


def with_cached_weights(model: Any) -> None:
    with parametrize.cached():
        model(torch.randn(3, D))


class Trainer:
    """Owns the loss, and counts beside it."""

    def __init__(self) -> None:
        self.weight, self.steps, self.losses = 2.0, 0, list[float]()

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        return squares(output, y) * self.weight


def of_trainer() -> Any:
    trainer = Trainer()
    model = nn.Linear(D, D)
    model.__dict__["trainer"] = trainer
    return model, trainer.loss


def count_on(model: Any) -> None:
    model.trainer.steps += 1
    model.trainer.losses.append(1.0)


def hooked_and_back(model: Any) -> None:
    model[0].weight.register_hook(lambda g: 2 * g).remove()


def averaged(model: Any) -> None:
    AveragedModel(model).update_parameters(model)


def history_beside() -> Any:
    config = SimpleNamespace(scale=1.0, history=[])
    model = Net(lambda net, x: net.linear(x) * net.config.scale)
    model.config = config
    return model, squares


UNRELATED: dict[str, Change] = {
    "a step backward": (layers(*TWO), trained_once),
    "gradients set to zero": (layers(*TWO), lambda m: m.zero_grad()),
    "a copy": (layers(*TWO), copy.deepcopy),
    "a checkpoint": (layers(*TWO), lambda m: torch.save(m.state_dict(), io.BytesIO())),
    "a whole net saved": (layers(*TWO), lambda m: torch.save(m[0], io.BytesIO())),
    "an average beside": (layers(*TWO), averaged),
    "a hook for a moment": (layers(*TWO), hooked_and_back),
    "evaluation for a moment": (layers(*TWO), lambda m: m.eval().train()),
    "a log": (layers(*TWO), lambda m: logging.getLogger("fifth").debug("step")),
    "a seed": (layers(*TWO), lambda m: random.seed(3)),
    "an optimizer made": (layers(*TWO), lambda m: SGD(m.parameters(), lr=0.1)),
    "a schedule's trainer": (of_trainer, count_on),
    "a history beside settings": (history_beside, lambda m: m.config.history.append(1)),
    "cached weights": (
        layers(lambda: parametrizations.weight_norm(nn.Linear(D, D))),
        with_cached_weights,
    ),
    "a norm in training": (
        layers(lambda: nn.Linear(D, D), lambda: nn.BatchNorm1d(D)),
        lambda m: m(torch.randn(5, D)),
    ),
}


# --- programs that freeze themselves, or log gradients --------------------------------------------


def freezes_first(net: Any, x: Tensor) -> Tensor:
    net.last.requires_grad_(False)
    return plain(net, x)


def freezes_last(net: Any, x: Tensor) -> Tensor:
    output = plain(net, x)
    net.last.requires_grad_(False)
    return output


def logs_norms() -> Any:
    model = made()
    model.norms = []
    model.linear.weight.register_hook(lambda g: model.norms.append(float(g.norm())))
    return model


def sums_gradients() -> Any:
    model = made()
    model.total = torch.zeros(D, D)

    def hook(g: Tensor) -> None:
        model.total.add_(g)

    model.linear.weight.register_hook(hook)
    return model


def counts_steps() -> Any:
    model = made()
    model.steps = {"seen": 0}

    def hook(g: Tensor) -> None:
        model.steps["seen"] += 1

    model.last.bias.register_hook(hook)
    return model


def is_frozen(model: Any) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


MESSY: dict[str, Any] = {
    "a hook that logs norms": (logs_norms, lambda m: list(m.norms)),
    "a hook that sums gradients": (sums_gradients, lambda m: m.total.tolist()),
    "a hook that counts": (counts_steps, lambda m: dict(m.steps)),
    "a layer frozen before it is used": (lambda: made(freezes_first), is_frozen),
    "a layer frozen after it is used": (lambda: made(freezes_last), is_frozen),
}
