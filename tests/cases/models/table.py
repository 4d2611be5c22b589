"""Models whose forward structure is known: what the analyser has to say about each of them.

The truth is about functions, at fixed N, noise and parameters. Predictions carry samples on
`out_dim`, inputs on `in_dims` (one number for all inputs, or one per input, None for an input
shared by the batch). `accept_unknown` marks cases where an honest "unknown" is good enough: control
flow in Python, values that leave the tensor world, permutations that depend on data, structure that
only algebra reveals.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

N, D, T, C = 6, 6, 4, 3  # as many samples as features: nothing can be told by size alone

FLAT = (N, D)
SEQUENCE = (N, T, D)
CUBE = (N, N, D)  # N == T == D
IMAGE = (N, C, 6, 6)
ODD = (5, 8)
ODD_SEQUENCE = (5, 3, 8)
SHUFFLED = [2, 0, 3, 5, 1, 4]


@dataclass(frozen=True)
class ModelCase:
    name: str
    build: Callable[[], tuple[Callable, tuple]]
    independent: str
    simd: str
    given: str
    accept_unknown: bool = False
    in_dims: Any = 0
    out_dim: int = 0


SIMD = ("holds", "holds", "holds")
INDEXED = ("holds", "fails", "fails")
STATISTICS = ("fails", "fails", "holds")
GROUPS = STATISTICS  # holds given statistics of groups
MIXED = ("fails", "fails", "fails")

MODELS: list[ModelCase] = []


class Net(nn.Module):
    """Parts under their names, and a plain function `forward(net, *inputs)`."""

    def __init__(self, forward, parts):
        super().__init__()
        for name, make in parts.items():
            setattr(self, name, make())
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


def built(name, truth, **options):
    """A case from a function that returns `(model, inputs)`."""

    def register(build):
        MODELS.append(ModelCase(name, build, *truth, **options))
        return build

    return register


def layers(name, truth, shape, *makers, train=True):
    """A case from layers in a row."""
    built(name, truth)(
        lambda: (nn.Sequential(*(make() for make in makers)).train(train), (torch.randn(shape),))
    )


def forward(name, truth, *inputs, train=True, accept_unknown=False, in_dims=0, out_dim=0, **parts):
    """A case from a forward function; inputs are shapes or makers, `net.linear` is there unless
    given.
    """
    inputs = inputs or (FLAT,)

    def register(function):
        def build():
            made = tuple(i() if callable(i) else torch.randn(i) for i in inputs)
            width = made[0].shape[-1]
            net = Net(function, {"linear": lambda: nn.Linear(width, width), **parts})
            return net.train(train), made

        return built(name, truth, accept_unknown=accept_unknown, in_dims=in_dims, out_dim=out_dim)(
            build
        )

    return register


def linear(i=D, o=D, **options):
    return lambda: nn.Linear(i, o, **options)


def conv(i=C, o=4, **options):
    return lambda: nn.Conv2d(i, o, 3, **options)


def norm(width=D, **options):
    return lambda: nn.BatchNorm1d(width, **options)


def weight(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


def integers(high, *shape):
    return lambda: torch.randint(high, shape)


def standardise(h, dim=0):
    return (h - h.mean(dim, keepdim=True)) / h.std(dim, keepdim=True)
