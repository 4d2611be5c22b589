"""What stands around a model in training and leaves its function as it is.

Compilers, checkpoints and data parallelism say how a computation is run, and a question runs it
plainly. Nothing here knows about recordings or samples.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import checkpoint

# Not loaded before somebody compiles something, and not by this package.
COMPILER = "torch._dynamo.eval_frame"

# The function behind a checkpoint that is not reentrant: since PyTorch 2.14, and before.
WITHOUT_REENTRANCE = (
    "_checkpoint_without_reentrant_generator_impl",
    "_checkpoint_without_reentrant_generator",
)


def inside(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the module to which a compiled or data-parallel one only passes its calls on."""
    # They may be wrapped around each other.
    while isinstance(model, nn.Module):
        inner = _wrapped_by(model)
        if inner is None:
            break
        model = inner
    return model


def _wrapped_by(model: nn.Module) -> nn.Module | None:
    if _has_hooks(model):
        return None  # they may change what the wrapper returns
    compiler = sys.modules.get(COMPILER)
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        return model._orig_mod
    # Exactly this class: one derived from it may do more.
    if type(model) is DistributedDataParallel and model.mixed_precision is None:
        return model.module
    return None


def _has_hooks(model: nn.Module) -> bool:
    forward = model._forward_hooks, model._forward_pre_hooks
    backward = model._backward_hooks, model._backward_pre_hooks
    return any(forward) or any(backward)


@contextmanager
def plainly() -> Iterator[None]:
    """Run what is compiled as it was written, and keep what checkpoints would compute again."""
    _PLAIN.enter()
    try:
        yield
    finally:
        _PLAIN.leave()


class _Plain:
    """PyTorch's own switches, which all threads share.

    The first thread to enter turns them, and the last to leave turns them back.
    """

    def __init__(self) -> None:
        self.lock, self.entered, self.turned = threading.Lock(), 0, ExitStack()

    def enter(self) -> None:
        """Turn the switches if nobody else has."""
        with self.lock:
            if not self.entered:
                self._turn()
            self.entered += 1

    def _turn(self) -> None:
        # PyTorch offers no switch for checkpoints, so its functions are replaced.
        reentrant = mock.patch.object(checkpoint, "CheckpointFunction", _Kept)
        name = next(name for name in WITHOUT_REENTRANCE if hasattr(checkpoint, name))
        other = mock.patch.object(checkpoint, name, _kept)
        self.turned.enter_context(reentrant)
        self.turned.enter_context(other)
        # What was never loaded has compiled nothing.
        if COMPILER in sys.modules:
            self.turned.enter_context(torch.compiler.set_stance("force_eager"))

    def leave(self) -> None:
        """Turn the switches back if nobody else is inside."""
        with self.lock:
            self.entered -= 1
            if not self.entered:
                self.turned.close()


_PLAIN = _Plain()


class _Kept:
    """The reentrant variant of a checkpoint, without computing anything again.

    As there, outputs carry gradients only if one of the arguments does.
    """

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """Return what the function returns, as PyTorch's ``apply`` of the same arguments does."""
        for argument in args:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return function(*args)
        with torch.no_grad():
            return function(*args)


def _kept(*_: Any, **settings: Any) -> Iterator[None]:
    """Do nothing before and after, in place of what the other variant does there."""
    yield
