"""How the models of the hunt are entered: by their truth, with a name and a function for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cases.models.table import FLAT, ModelCase, Net, linear

MODELS: list[ModelCase] = []


def table(
    truth: tuple[str, str, str],
    functions: dict[str, Callable[..., Any]],
    *shapes: tuple[int, ...] | Callable[[], Tensor],
    train: bool = True,
    accept_unknown: bool = False,
    out_dim: int = 0,
    **parts: Callable[[], Any],
) -> None:
    """Enter functions `forward(net, *inputs)`; `net.linear` is there unless given."""
    for name, function in functions.items():
        build = built(function, shapes or (FLAT,), train, parts)
        MODELS.append(
            ModelCase(name, build, *truth, accept_unknown=accept_unknown, out_dim=out_dim)
        )


def built(function: Any, shapes: Any, train: bool, parts: Any) -> Callable[[], Any]:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        inputs = tuple(s() if callable(s) else torch.randn(s) for s in shapes)
        width = inputs[0].shape[-1]
        return Net(function, {"linear": linear(width, width), **parts}).train(train), inputs

    return build
