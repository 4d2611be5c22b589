"""What a recording is made of: values, steps, and references between them.

Data about one op or one tensor at a time. How they make up a computation stands in ``graph.py``,
where the grammar is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops


@dataclass(frozen=True)
class Ref:
    """The ``index``-th value of a graph."""

    index: int


@dataclass(frozen=True)
class Value:
    """One version of a tensor.

    ``storage`` numbers the memory in which it lies; ``stride`` and ``offset`` say where there, in
    entries. ``kind`` is "step" for what a step makes, and else "inputs", "targets", "parameters",
    "buffers" or "constants". ``concrete`` holds the numbers seen while recording, for integers and
    booleans, constants and noise: other data changes only the rest.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    stride: tuple[int, ...]
    offset: int
    kind: str = "step"
    name: str = ""
    step: int = -1
    requires_grad: bool = False
    concrete: Tensor | None = None

    @property
    def is_strided(self) -> bool:
        """Whether it is a window on one memory: neither sparse nor nested."""
        return len(self.stride) == len(self.shape)

    @property
    def entries(self) -> int:
        """How many numbers it holds; zero where a length is not one of them, as in jagged ones."""
        if not all(isinstance(length, int) for length in self.shape):
            return 0
        return math.prod(self.shape)


@dataclass
class Step:
    """One op of the computation. ``args`` and ``kwargs`` hold ``Ref``s in place of tensors.

    ``writes`` pairs each value that the op writes to with the version of it that it leaves.
    ``grad``: whether gradients were enabled; ``module`` and ``where``: the module that was running,
    and file and line of the user's program; ``noise``: whether it drew random numbers;
    ``function``: the function of PyTorch that was called, of which the op is a part. ``ops``: how
    many ops PyTorch may run for it.
    """

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Ref | None, ...]
    writes: tuple[tuple[Ref, Ref], ...]
    grad: bool
    module: str
    where: str
    noise: bool = False
    function: str = ""
    ops: int = 1

    @property
    def name(self) -> str:
        """The name of the op, without its overload and without ``aten::``."""
        return ops.full_name(self.op)

    @property
    def written_results(self) -> tuple[tuple[Ref, Ref], ...]:
        """The writes that derivatives go through: none if the op only keeps running statistics."""
        if not ops.writes_results(self.op):
            return ()
        return self.writes

    def refs(self) -> list[Ref]:
        """Return what the step reads, in the order of its arguments."""
        return list(self._refs)

    def made(self) -> list[Ref]:
        """Return what the step makes: results, then new versions of what it writes to.

        An op in place returns what it has written, so a value may come twice.
        """
        results = [ref for ref in self.outs if ref is not None]
        results.extend(new for _, new in self.writes)
        return results

    @property
    def place(self) -> str:
        """Where it stands: its module, its op and, if known, file and line."""
        parts = [self.module or "the model", self.name, self.where]
        return ", ".join(part for part in parts if part)

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of the op's arguments, in order."""
        return ops.argument_names(self.op)

    @cached_property
    def named(self) -> dict[str, Any]:
        """The arguments of the call by name, without those left to their defaults."""
        return dict(zip(self.parameters, self.args, strict=False)) | self.kwargs

    # Looked up at every replay of the step, so kept: what they follow from never changes.

    @cached_property
    def plain(self) -> bool:
        """Whether every tensor is a positional argument, none of them in a list or by name."""
        nested = [a for a in self.args if isinstance(a, list | tuple | dict)]
        return not refs_in((nested, self.kwargs))

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of the op's arguments, by name."""
        return ops.defaults(self.op)

    @cached_property
    def _refs(self) -> tuple[Ref, ...]:
        return tuple(refs_in((self.args, self.kwargs)))


@dataclass
class ExecutedOp:
    """An op as it ran: its arguments by name, and those of its outputs that are needed later."""

    step: Step
    arguments: dict[str, Any]
    outputs: tuple[Any, ...]

    @property
    def op(self) -> Any:
        """The op itself."""
        return self.step.op

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def run_with(self, changes: Mapping[str, Any]) -> Any:
        """Return the result of the op with some other arguments."""
        return self.op(**{**self.arguments, **changes})


# --- references in arguments ----------------------------------------------------------------------


def filled(tree: Any, get: Callable[[Any], Any], kind: type = Ref) -> Any:
    """Return arguments with ``get(leaf)`` in place of every leaf of a ``kind``, by default refs."""
    # By hand: every replay comes here, and ``tree_map`` is slow for one or two levels.
    if isinstance(tree, kind):
        return get(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([filled(branch, get, kind) for branch in tree])
    if isinstance(tree, dict):
        return {name: filled(branch, get, kind) for name, branch in tree.items()}
    return tree


def refs_in(tree: Any) -> list[Ref]:
    """Return the references in arguments, in order, repeated as often as they occur."""
    refs: list[Ref] = []
    filled(tree, refs.append)
    return refs


def indices(refs: Iterable[Ref]) -> list[int]:
    """Return the numbers of the values that are referred to."""
    return [ref.index for ref in refs]


def is_ref(x: Any) -> bool:
    """Tell whether something is a reference; for the ``is_leaf`` of PyTorch's trees."""
    return isinstance(x, Ref)
