"""Programs whose backward pass is not PyTorch's own, with what has to come of them.

Functions with a derivative of their own (without a graph, straight through, not linear, over all
samples), and hooks. Truths are plain autograd's, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# What has to come of a program: rows of single samples, rows that other samples have a part in, or
# a refusal that says why.
PER_SAMPLE, PER_COMPONENT, REFUSED = "per-sample", "per-component", "linear"

SAMPLES, FEATURES, CLASSES = 5, 4, 3


# --- functions ------------------------------------------------------------------------------------


class _Own(torch.autograd.Function):
    """A tanh that keeps its input; what its derivative is, a class below says."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.tanh()


def slope_of(ctx: Any) -> Tensor:
    return 1 - ctx.saved_tensors[0].tanh() ** 2


class WithoutGrad(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return g * slope_of(ctx)


class Once(_Own):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * slope_of(ctx)


class ByNumpy(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(g.detach().numpy() * slope_of(ctx).detach().numpy())


class OfItsData(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.data * slope_of(ctx)


class Halved(_Own):
    """Half of the derivative has a graph."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * slope_of(ctx) / 2 + (g * slope_of(ctx) / 2).detach()


class Rounded(torch.autograd.Function):
    """Whole numbers, with the derivative of the identity."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return (4 * h).round() / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clone()


class Reversed(torch.autograd.Function):
    """The identity, with the derivative of its negative: what domain-adversarial nets have."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.3 * g


class Signs(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.sign() * slope_of(ctx)


class ClippedNorm(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return slope_of(ctx) * g / g.norm().clamp(min=0.01)


class NormalisedBySample(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return slope_of(ctx) * g / (1e-12 + g.norm(dim=1, keepdim=True))


class Centred(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return slope_of(ctx) * (g - g.mean(0))


class BySpread(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return slope_of(ctx) * g / ctx.saved_tensors[0].std(0)


class ByLargest(_Own):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        h = ctx.saved_tensors[0]
        return slope_of(ctx) * g * h.abs().sum(1).max()


class Shuffled(_Own):
    """The gradient of one sample goes to the next one."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return slope_of(ctx) * g.roll(1, 0)


# --- nets -----------------------------------------------------------------------------------------


class Between(nn.Module):
    """Two linear layers with something between them, and perhaps a hook there."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, hook: Any = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)
        self.between, self.hook = between, hook

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self.a(x))
        if self.hook is not None and h.requires_grad:
            h.register_hook(self.hook)
        return self.b(h)


class Beside(Between):
    """What the function makes is a small part of the whole."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.tanh()) + 1e-3 * self.b(self.between(h))


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 3, **options)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).flatten(1))


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(7, 6, **options)
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words(x).tanh())


def with_full_hook(change: Callable[[Tensor], Tensor]) -> nn.Module:
    net = Between()
    net.b.register_full_backward_hook(lambda m, gi, go: tuple(map(change, gi)))
    return net


def with_pre_hook(change: Callable[[Tensor], Tensor]) -> nn.Module:
    net = Between()
    net.b.register_full_backward_pre_hook(lambda m, go: tuple(map(change, go)))
    return net


def with_hook_of_parameter(change: Callable[[Tensor], Any]) -> nn.Module:
    net = Between()
    net.a.weight.register_hook(change)
    return net


def clipped(g: Tensor) -> Tensor:
    return g.clamp(-0.01, 0.01)


def clipped_wide(g: Tensor) -> Tensor:
    """Active for the gradients of a large loss only, and not for those of order one."""
    return g.clamp(-50, 50)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``large``: the loss has gradients of a thousand."""

    make: Callable[[], nn.Module]
    outcome: str
    words: bool = False
    large: bool = False

    def build(self) -> tuple[nn.Module, Callable[..., Tensor], Tensor, Tensor]:
        """Return net, loss, inputs and targets, in float64."""
        torch.manual_seed(0)
        net = self.make().double()
        x = torch.randn(SAMPLES, FEATURES, dtype=torch.float64)
        if self.words:
            x = torch.tensor([[0, 1], [1, 1], [2, 3], [3, 0], [1, 6]])
        y = torch.arange(SAMPLES) % CLASSES
        if self.large:
            return net, lambda p, t: 1e3 * nn.functional.cross_entropy(p, t), x, y
        return net, nn.functional.cross_entropy, x, y


def between(function: Any) -> Callable[[], nn.Module]:
    return lambda: Between(function.apply)


def hooked(hook: Any) -> Callable[[], nn.Module]:
    return lambda: Between(hook=hook)


CASES = {
    # without a graph
    "a derivative without gradients": Case(between(WithoutGrad), PER_SAMPLE),
    "a derivative that exists once": Case(between(Once), PER_SAMPLE),
    "a derivative by numpy": Case(between(ByNumpy), PER_SAMPLE),
    "a derivative of the bare data": Case(between(OfItsData), PER_SAMPLE),
    "half of a derivative without a graph": Case(between(Halved), PER_SAMPLE),
    "two of them in a row": Case(
        lambda: Between(lambda h: Once.apply(WithoutGrad.apply(h))), PER_SAMPLE
    ),
    "a small part without a graph": Case(lambda: Beside(Once.apply), PER_SAMPLE),
    # other derivatives, sample by sample
    "straight through": Case(between(Rounded), PER_SAMPLE),
    "a reversed gradient": Case(between(Reversed), PER_SAMPLE),
    # not linear
    "signs of gradients": Case(between(Signs), REFUSED),
    "a clipped norm": Case(between(ClippedNorm), REFUSED),
    "gradients of norm one, by sample": Case(between(NormalisedBySample), REFUSED),
    "a hook that normalises": Case(hooked(lambda g: g / g.norm()), REFUSED),
    "a hook that clips": Case(hooked(clipped), REFUSED),
    "a hook that clips large gradients": Case(hooked(clipped_wide), REFUSED, large=True),
    "a hook that takes the positive part": Case(hooked(torch.relu), REFUSED),
    "a hook of a module that clips": Case(lambda: with_full_hook(clipped), REFUSED),
    "an early hook of a module that clips": Case(lambda: with_pre_hook(clipped), REFUSED),
    "a hook of a parameter that clips": Case(lambda: with_hook_of_parameter(clipped), REFUSED),
    "a hook of a parameter that clips large gradients": Case(
        lambda: with_hook_of_parameter(clipped_wide), REFUSED, large=True
    ),
    # hooks that are linear, or only look
    "a hook that doubles": Case(hooked(lambda g: 2 * g), PER_SAMPLE),
    "a hook that looks": Case(hooked(lambda g: None), PER_SAMPLE),
    "a hook of a module that doubles": Case(lambda: with_full_hook(lambda g: 2 * g), PER_SAMPLE),
    "a hook of a parameter that doubles": Case(
        lambda: with_hook_of_parameter(lambda g: 2 * g), PER_SAMPLE
    ),
    "a hook of a parameter that looks": Case(
        lambda: with_hook_of_parameter(lambda g: None), PER_SAMPLE
    ),
    # over all samples
    "a centred gradient": Case(between(Centred), PER_COMPONENT),
    "a gradient by the spread of the batch": Case(between(BySpread), PER_COMPONENT),
    "a gradient by the largest sample": Case(between(ByLargest), PER_COMPONENT),
    "gradients of the next sample": Case(between(Shuffled), PER_COMPONENT),
    "a hook that centres": Case(hooked(lambda g: g - g.mean(0)), PER_COMPONENT),
    "words by frequency": Case(lambda: Words(scale_grad_by_freq=True), PER_COMPONENT, words=True),
    "bags of words by frequency": Case(
        lambda: Bags(scale_grad_by_freq=True), PER_COMPONENT, words=True
    ),
    "words": Case(Words, PER_SAMPLE, words=True),
    "the largest word of each bag": Case(lambda: Bags(mode="max"), PER_SAMPLE, words=True),
    "bags with padding": Case(lambda: Bags(padding_idx=1), PER_SAMPLE, words=True),
}
