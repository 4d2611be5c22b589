"""What stands around a model in training and leaves what it computes as it is: compiler, checkpoints, data parallelism.

They say how a computation is run, and a question runs it plainly. Nothing here knows about recordings or samples.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

COMPILER = (
    "torch._dynamo.eval_frame"  # not loaded before somebody compiles something, and not by us
)


WITHOUT_REENTRANCE = "_checkpoint_without_reentrant_generator"


def inside(model: Callable[..., Any]) -> Callable[..., Any]:
    """The module that a compiled or data-parallel one passes its calls on to, where it does nothing else."""
    while isinstance(model, nn.Module) and (inner := _passes_on_to(model)) is not None:
        model = inner
    return model


def _passes_on_to(model: nn.Module) -> nn.Module | None:
    compiler = sys.modules.get(COMPILER)
    if any(
        (
            model._forward_hooks,
            model._forward_pre_hooks,
            model._backward_hooks,
            model._backward_pre_hooks,
        )
    ):
        return None
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        return model._orig_mod
    if type(model) is DistributedDataParallel and model.mixed_precision is None:
        return model.module
    return None


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, what is compiled runs as it was written, and checkpointed parts are kept, not computed again."""
    _PLAIN.enter()
    try:
        yield
    finally:
        _PLAIN.leave()


class _Plain:
    """PyTorch's own switches, which all threads share: the first to enter turns them, the last to leave turns back."""

    def __init__(self) -> None:
        self.lock, self.entered, self.turned = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        with self.lock:
            if not self.entered:
                self.turned.enter_context(
                    mock.patch.object(checkpoint, "CheckpointFunction", _Kept)
                )
                self.turned.enter_context(mock.patch.object(checkpoint, WITHOUT_REENTRANCE, _kept))
                if COMPILER in sys.modules:
                    self.turned.enter_context(torch.compiler.set_stance("force_eager"))
            self.entered += 1

    def leave(self) -> None:
        with self.lock:
            self.entered -= 1
            if not self.entered:
                self.turned.close()


_PLAIN = _Plain()


class _Kept:
    """In place of the reentrant variant, whose outputs carry gradients only if one of the arguments does."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        alive = any(isinstance(a, Tensor) and a.requires_grad for a in args)
        with nullcontext() if alive else torch.no_grad():
            return function(*args)


def _kept(*_: Any) -> Iterator[None]:
    """In place of what the other variant does before and after."""
    yield
