"""Programs that know their parameters and buffers by more than their numbers, or write to them.

Each has a step with a derivative of its own, so that the model itself is run for its rows; with a
smooth one in its place, its recording may do. A maker returns a model in float64; what a run leaves
in it, its backward pass may need.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.weak import WeakTensorKeyDictionary

SAMPLES, FEATURES = 5, 4

Run = Callable[[Any, Tensor], Tensor]


class Step(torch.autograd.Function):
    """Rounds, with a slope of one half; a recording would have no slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0.5


class Smooth:
    """In place of the step: something that a recording has the derivative of."""

    apply = staticmethod(torch.tanh)


class Net(nn.Module):
    """A linear layer and whatever ``run`` makes of it."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def made(run: Run, prepare: Callable[[Net], Any] = lambda net: None) -> Callable[[], nn.Module]:
    """Return a maker of a net that is prepared after it was made."""

    def make() -> nn.Module:
        net = Net(run).double()
        prepare(net)
        return net

    return make


def scaled(
    factor: Callable[[Any], Any], prepare: Any = lambda net: None
) -> Callable[[], nn.Module]:
    """Return a maker of a net whose outputs are scaled by what it reads of its parameters."""
    return made(lambda net, x: Step.apply(net.linear(x)) * factor(net), prepare)


# --- what a program knows its parameters by -------------------------------------------------------


def weak_gains(net: Net) -> None:
    net.gains = WeakTensorKeyDictionary({net.linear.weight: 2.0})


def known_ids(net: Net) -> None:
    net.known = {id(p) for p in net.parameters()}


def addresses(net: Net) -> None:
    net.gains = {p.data_ptr(): 2.0 for p in net.parameters()}


def with_optimizer(net: Net) -> None:
    net.optimizer = torch.optim.SGD(
        [{"params": [net.linear.weight], "lr": 3.0}, {"params": [net.linear.bias], "lr": 1.0}]
    )


def rate_of_weight(net: Any) -> float:
    for group in net.optimizer.param_groups:
        if any(p is net.linear.weight for p in group["params"]):
            return float(group["lr"])
    return 1.0


def with_momentum(net: Net) -> None:
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    net(torch.ones(2, FEATURES).double()).sum().backward()
    net.optimizer.step()
    net.zero_grad()


def momentum_of_weight(net: Any) -> Any:
    state = net.optimizer.state.get(net.linear.weight, {})
    return 1.0 + state["momentum_buffer"].mean() if state else 1.0


def with_gradient(net: Net) -> None:
    net.linear.weight.grad = torch.full_like(net.linear.weight, 2.0)


def gradient_of_weight(net: Any) -> Any:
    grad = net.linear.weight.grad
    return 1.0 if grad is None else grad.mean()


class Scaled(nn.Parameter):
    """A parameter with a factor of its own."""

    factor = 1.0


def of_own_class(net: Net) -> None:
    net.linear.weight = Scaled(net.linear.weight.detach())
    net.linear.weight.factor = 2.0


def held_outside() -> nn.Module:
    net = Net(lambda net, x: Step.apply(F.linear(x, *held) * (held[0] is net.linear.weight)))
    net = net.double()
    held = [net.linear.weight, net.linear.bias]
    return net


class Halved(nn.Module):
    """A parametrisation that halves the parameters that it knows."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = {id(known)}

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2 if id(weight) in self.known else weight


def parametrized(net: Net) -> None:
    parametrize.register_parametrization(net.linear, "weight", Halved(net.linear.weight))


def normalised(net: Net) -> None:
    parametrizations.weight_norm(net.linear)
    known_ids(net)


def all_are_known(net: Any) -> float:
    return 2.0 if all(id(p) in net.known for p in net.parameters()) else 1.0


def gain_of_buffer(net: Any) -> float:
    return float(getattr(net.scale, "gain", 1.0))


def tagged_buffer(net: Net) -> None:
    net.register_buffer("scale", torch.ones(FEATURES).double())
    net.scale.gain = 2.0


# --- hooks ----------------------------------------------------------------------------------------


def hooked(net: Net) -> None:
    net.linear.weight.register_hook(lambda g: 3 * g)


def hooked_later(net: Net) -> None:
    net.calls = []
    net.linear.weight.register_post_accumulate_grad_hook(lambda p: net.calls.append(1))


def hooks_itself(net: Any, x: Tensor) -> Tensor:
    handle = net.linear.weight.register_hook(lambda g: 3 * g)
    net.handles = [handle]
    return Step.apply(net.linear(x))


# --- writes ---------------------------------------------------------------------------------------


def clips(net: Any, x: Tensor) -> Tensor:
    net.linear.weight.data.clamp_(-0.1, 0.1)
    return Step.apply(net.linear(x))


def shrinks(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.linear.weight.mul_(0.5)
    return Step.apply(net.linear(x.tanh()) ** 2)


def exchanges_memory(net: Any, x: Tensor) -> Tensor:
    net.linear.weight.data = net.linear.weight.data * 0.5
    return Step.apply((Step.apply(net.linear(x)) @ net.linear.weight) ** 2)


def writes_twice(net: Any, x: Tensor) -> Tensor:
    """Write through ``.data`` after the use, so that the backward pass sees the later numbers."""
    h = Step.apply(net.linear(x)) @ net.linear.weight
    net.linear.weight.data.mul_(0.5)
    return h


def moving(net: Net) -> None:
    net.register_buffer("mean", torch.ones(FEATURES).double())


def moves(net: Any, x: Tensor) -> Tensor:
    h = net.linear(x)
    with torch.no_grad():
        net.mean.mul_(0.9).add_(x.abs().mean(0))
    return Step.apply(h * net.mean)


def writes_result(net: Any, x: Tensor) -> Tensor:
    """Return a buffer that has the result, as a static graph has its outputs."""
    net.place = net.place.detach()
    net.place.copy_(Step.apply(net.linear(x)) * 2)
    return net.place


def placed(net: Net) -> None:
    net.register_buffer("place", torch.zeros(SAMPLES, FEATURES).double())


# --- what a backward pass reads in Python ---------------------------------------------------------


class ByNet(torch.autograd.Function):
    """Rounds, with a slope that the net has noted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, net: Any) -> Tensor:
        ctx.net = net
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.net.slopes[-1], None


def notes_slope(net: Any, x: Tensor) -> Tensor:
    h = net.linear(x)
    net.slopes = [0.5 + float(net.linear.weight.detach().abs().mean())]
    return ByNet.apply(h, net)


def uses_slope_up(net: Any, x: Tensor) -> Tensor:
    """Note a slope in a list of its own, from which the backward pass takes it."""
    net.kept = [3.0]
    h = net.linear(x)
    h.register_hook(lambda g: g * net.kept.pop())
    return Step.apply(h)


def slope_in_array(net: Any, x: Tensor) -> Tensor:
    net.array[0] += 1.0
    h = net.linear(x)
    h.register_hook(lambda g: g * float(net.array[0]))
    return Step.apply(h)


def with_array(net: Net) -> None:
    net.array = np.ones(1)


def by_module_hook(net: Net) -> None:
    """Keep what goes in, and scale what comes back by it, as trackers of statistics do."""

    def forward(module: Any, args: Any, output: Tensor) -> None:
        module.size = float(module.weight.detach().norm())

    def backward(module: Any, grad: Any) -> Any:
        return (grad[0] * module.size,)

    net.linear.register_forward_hook(forward)
    net.linear.register_full_backward_pre_hook(backward)


class ByBuffer(torch.autograd.Function):
    """Scales, and keeps the tensor that it scales by as an attribute."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return torch.round(x * 4)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * ctx.scale, None


def moves_slope(net: Any, x: Tensor) -> Tensor:
    net.mean.add_(1.0)
    return ByBuffer.apply(net.linear(x), net.mean)


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "a weak dict by parameter": scaled(
        lambda net: net.gains.get(net.linear.weight, 1.0), weak_gains
    ),
    "a set of ids": scaled(all_are_known, known_ids),
    "a dict by address": scaled(
        lambda net: net.gains.get(net.linear.weight.data_ptr(), 1.0), addresses
    ),
    "the rate of a group": scaled(rate_of_weight, with_optimizer),
    "the momentum of a parameter": scaled(momentum_of_weight, with_momentum),
    "the gradient of a parameter": scaled(gradient_of_weight, with_gradient),
    "a class of parameters": scaled(lambda net: net.linear.weight.factor, of_own_class),
    "a class of parameters, asked for": scaled(
        lambda net: 2.0 if isinstance(net.linear.weight, Scaled) else 1.0, of_own_class
    ),
    "the version of a parameter": scaled(lambda net: 1.0 + net.linear.weight._version),
    "whether it requires a gradient by itself": scaled(
        lambda net: 2.0 if net.linear.weight.grad_fn is None else 1.0
    ),
    "parameters held outside": held_outside,
    "a parametrisation that knows its parameter": scaled(lambda net: 1.0, parametrized),
    "a norm of weights": scaled(all_are_known, normalised),
    "an attribute of a buffer": scaled(gain_of_buffer, tagged_buffer),
    "a hook on a parameter": scaled(lambda net: 1.0, hooked),
    "a hook for gradients that are there": scaled(lambda net: 1.0, hooked_later),
    "a hook that a run adds": made(hooks_itself),
    "weights that are clipped": made(clips),
    "weights that shrink": made(shrinks),
    "weights in another memory": made(exchanges_memory),
    "weights written after their use": made(writes_twice),
    "a mean that moves": made(moves, moving),
    "a result in a buffer": made(writes_result, placed),
    "a slope that is a buffer": made(moves_slope, moving),
    "a slope that is noted": made(notes_slope),
    "a slope that is used up": made(uses_slope_up),
    "a slope in an array": made(slope_in_array, with_array),
    "a size that a hook notes": scaled(lambda net: 1.0, by_module_hook),
}
