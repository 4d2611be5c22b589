"""Hooks on backward passes: whether a program has any, and whether they change what passes.

A recording has no hooks. Most only look at a gradient; one that returns another one, or writes to
it, makes a backward pass of the program's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unbatch.capture.trees import version_of

# Methods of tensors that take a hook which may change the gradient.
REGISTERS = ("register_hook",)


def place_of(hook: Any, registered: str = "") -> str:
    """Return a hook with file and line, in words.

    ``registered``: where it was registered, for one that has no lines of Python.
    """
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    if code is not None:
        return f"a hook ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
    name = getattr(hook, "__name__", type(hook).__name__)
    if registered:
        return f"the hook {name} ({os.path.basename(registered)})"
    return f"the hook {name}"


def hooks_of(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> list[str]:
    """Return the hooks that modules and parameters have on backward passes, with their places."""
    tables: list[Any] = []
    for top in modules:
        for module in top.modules():
            tables += [module._backward_hooks, module._backward_pre_hooks]
    tables += [p._backward_hooks for p in parameters]
    places = []
    for table in tables:
        places += [place_of(hook) for hook in (table or {}).values()]
    return places


class HookWatch(TorchFunctionMode):
    """Notes which of the hooks that are registered inside change a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.changing: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in REGISTERS and len(args) == 2:
            args = (args[0], self.watched(args[1]))
        return func(*args, **(kwargs or {}))

    def watched(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same hook, watched."""

        def run(gradient: Tensor) -> Any:
            before = version_of(gradient)
            result = hook(gradient)
            changed = result is not None and result is not gradient
            if changed or version_of(gradient) != before:
                self.changing.append(place_of(hook))
            return result

        return run

    @contextmanager
    def on(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Watch the hooks that some tensors have, too."""
        kept = []
        for t in tensors:
            hooks = t._backward_hooks
            if hooks:
                kept.append((hooks, dict(hooks)))
                for key, hook in list(hooks.items()):
                    hooks[key] = self.watched(hook)
        try:
            yield
        finally:
            for hooks, before in kept:
                hooks.update(before)
