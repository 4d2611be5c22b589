"""What a recording depends on besides its arguments, and whether that is still what it was.

The *state* of a program decides what is computed: all that it can reach (``reachable.py``) and the
settings of the process (``switches.py``). Its *numbers* are the contents of parameters, buffers and
other tensors that it uses: other ones leave a recording valid, but not what was computed with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from unbatch.capture.code_names import is_installed_class
from unbatch.capture.graph import Graph
from unbatch.capture.holders import PLAIN
from unbatch.capture.isolation import storage_of
from unbatch.capture.own_writes import Idle
from unbatch.capture.program import Program
from unbatch.capture.reachable import Reachable
from unbatch.capture.switches import settings
from unbatch.capture.trees import is_strided, parts_of, version_of

# Of a tensor with at most so many entries all are looked at; of a larger one, about some.
SMALL = 4096
SOME = 256

# In how many rows at a time, and in rows of how many entries, all of a tensor are added up.
ROWS, COLUMNS = 64, 4096

# How many items of a container in the data are compared one by one.
FEW = 8

# Whole numbers by the bytes of an entry.
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Guard:
    """Where to look; ``state`` and ``numbers`` are to be compared with what they were.

    ``marks``: how each place was. ``idle``: what the program writes itself and does not depend on.
    ``constants``: tensors that the recording took for constants. ``unread``: tensors whose numbers
    no result depends on, by ``id``.
    """

    program: Program
    reached: Reachable
    marks: list[Any] = field(default_factory=list)
    idle: Idle = field(default_factory=Idle)
    constants: list[Tensor] = field(default_factory=list)
    unread: dict[int, Tensor] = field(default_factory=dict)
    # Views of some entries, and the tensors that they were made for.
    _views: tuple[Any, list[Tensor]] = (None, [])

    @staticmethod
    def of(program: Program) -> Guard:
        """Return the guard of a program, from what its model and its loss can reach."""
        reached = program.reachable
        # What is written from here on, the recorded run writes.
        reached.written.clear()
        reached.draws = False
        return Guard(program, reached, [holder.mark() for holder in reached.holders])

    def watch(self, graph: Graph, own_backward: bool = False) -> None:
        """Watch the contents of tensors that a recording has read, constants among them.

        ``own_backward``: there is code of backward passes, which may read any that is reached.
        """
        constants = {v.storage for v in graph.values if v.kind == "constants"}
        memories = set()
        for value in graph.values:
            # Not the constant alone: the program may have made a view of it.
            if value.storage in constants and value.concrete is not None:
                memories.add(storage_of(value.concrete))
        self.constants = []
        known = set(map(id, self._tensors()))
        for tensor in self.reached.tensors:
            # What a sparse one is made of, is no value of a graph.
            is_read = storage_of(tensor) in memories or not is_strided(tensor)
            if is_read or (own_backward and id(tensor) not in known):
                self.constants.append(tensor)
        unread = _unread_memories(graph)
        self.unread = {}
        for tensor in self._tensors_of_library() if own_backward else self._all_tensors():
            if storage_of(tensor) in unread:
                self.unread[id(tensor)] = tensor

    # -- what there is --

    def state(self) -> tuple[Any, ...]:
        """Return what stays equal as long as the same is computed."""
        kinds = list(map(_kind_of, self._tensors()))
        # A constant in another memory is another constant: recordings refer to the old one.
        addresses = [(t.data_ptr(), t.stride()) for t in _in_parts(self.constants)]
        return self.changes(), kinds, addresses, settings()

    def changes(self) -> list[tuple[int, Hashable]]:
        """Return the places that are not as they were: the holder and the name."""
        differing: list[tuple[int, Hashable]] = []
        for i, (holder, mark) in enumerate(zip(self.reached.holders, self.marks, strict=True)):
            if holder.same(mark):
                continue
            differing += [(i, name) for name in holder.changed(mark)]
        if not differing:
            return differing
        return self.idle.without(differing)

    def numbers(self, data: Sequence[Tensor] = ()) -> tuple[Any, ...]:
        """Return what stays equal as long as nothing writes to what was read.

        Parameters, buffers and constants; of tensors in ``data`` some entries are among it.
        """
        unread = self.unread
        tensors = [t for t in self._all_tensors() if id(t) not in unread]
        tensors = _in_parts(tensors)
        versions, addresses = [], []
        for t in tensors:
            versions.append(version_of(t))
            addresses.append(t.data_ptr())
        return versions, addresses, self._some_entries(tensors, addresses, data)

    def contents(self, data: Sequence[Tensor] = ()) -> bytes:
        """Return what stays equal as long as every entry does that ``numbers`` does not look at.

        It costs more: all of the memory is read.
        """
        sums = []
        for t in _in_parts([*self._tensors(), *self.constants, *data]):
            if t.numel() > SMALL and t.device.type != "meta":
                sums.append(_weighted_sums(t).cpu())
        if not sums:
            return b""
        return _bits(torch.cat(sums))

    def _all_tensors(self) -> list[Tensor]:
        return [*self._tensors(), *self.constants]

    def _tensors_of_library(self) -> list[Tensor]:
        """Return the buffers of installed modules, which code of the user does not read."""
        tensors: list[Tensor] = []
        for module in self.reached.modules:
            if is_installed_class(type(module)):
                tensors.extend(b for b in module._buffers.values() if b is not None)
        return tensors

    def _tensors(self) -> list[Tensor]:
        """Return parameters and buffers."""
        tensors = list(self.program.parameters.values())
        for module in self.reached.modules:
            tensors.extend(b for b in module._buffers.values() if b is not None)
        return tensors

    def _some_entries(
        self, tensors: list[Tensor], addresses: list[int], data: Sequence[Tensor]
    ) -> list[Any]:
        """Return some entries of each tensor, all of a small one.

        They show changes that leave no trace in the version (``.data.mul_(2)``, or an array of
        numpy that is filled again).
        """
        places = list(zip(map(id, tensors), addresses, strict=True))
        # Views are made once, and show later contents until a tensor gets another memory.
        if self._views[0] != places:
            self._views = places, _views_of(tensors)
        # One read for all of a kind: each read of a GPU waits for what runs there.
        by_kind: dict[Any, list[Tensor]] = {}
        for view in (*self._views[1], *_views_of(data)):
            by_kind.setdefault((view.dtype, view.device), []).append(view)
        return [_bits(torch.cat([v.reshape(-1) for v in views])) for views in by_kind.values()]


def _unread_memories(graph: Graph) -> set[int]:
    """Return the memories that a recording starts from and that no result depends on.

    Running statistics that a batch norm in training only updates, say.
    """
    read: set[int] = set()
    unread: set[int] = set()
    for value in graph.values:
        if value.concrete is None or value.kind not in ("parameters", "buffers", "constants"):
            continue
        memories = unread
        if value.storage in graph.memories_read:
            memories = read
        memories.add(storage_of(value.concrete))
    return unread - read


class TensorMark:
    """A tensor at a moment: equal to another mark of the same tensor with no write in between.

    The tensor may be gone, and its number and memory be another's by then: that is another tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.mark = weakref.ref(tensor), (version_of(tensor), storage_of(tensor))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorMark) or self.mark != other.mark:
            return False
        return self.tensor() is other.tensor() is not None

    __hash__ = None  # type: ignore[assignment]


def identity(*trees: Any) -> tuple[Any, ...]:
    """Return what stays equal as long as data is the same tensors, and nothing writes to them."""
    marks: list[Any] = []
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            marks.append(TensorMark(leaf))
        elif isinstance(leaf, int | float | str):
            marks.append(leaf)
    return tuple(marks)


def signature(*trees: Any) -> tuple[Any, ...]:
    """Return what is equal for data of the same shapes, strides and types, and equal in all else.

    Strides decide which views there are, and programs may ask for them; and whether they require a
    gradient decides what has derivatives.
    """
    leaves, structure = tree_flatten(trees)
    kinds: list[Any] = [structure]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            kind = (leaf.shape, leaf.dtype, leaf.device, _strides_of(leaf), leaf.requires_grad)
            kinds.append(kind)
        else:
            kinds.append(_identity_of(leaf))
    return tuple(kinds)


# --- tensors --------------------------------------------------------------------------------------


def _kind_of(t: Tensor) -> tuple[Any, ...]:
    """Return what decides what is computed with a tensor, but its contents."""
    hooks = tuple(t._backward_hooks.values()) if t._backward_hooks else ()
    return id(t), t.requires_grad, t.dtype, t.device, t.shape, _strides_of(t), hooks


def _strides_of(t: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor, none of a sparse one."""
    return t.stride() if is_strided(t) else ()


def _views_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of some entries of the tensors that have any."""
    views = []
    for t in _in_parts(tensors):
        if t.numel() and t.device.type != "meta":
            views.append(_some(t))
    return views


def _in_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors with what they are made of in place of sparse ones."""
    parts: list[Tensor] = []
    for t in tensors:
        if is_strided(t):
            parts.append(t)
        else:
            parts.extend(parts_of(t))
    return parts


def _some(t: Tensor) -> Tensor:
    """Return a view of some entries, spread evenly if they lie in order."""
    t = t.detach()
    if t.is_complex():
        # Numbers that are marked as conjugated lie in memory as they were before.
        t = torch.view_as_real(t.conj() if t.is_conj() else t)
    if t.numel() <= SMALL:
        return t
    if t.is_contiguous():
        return t.view(-1)[:: max(1, t.numel() // SOME)]
    sizes = list(t.shape)
    longest = sizes.index(max(sizes))
    along = t.as_strided((sizes[longest],), (t.stride(longest),), t.storage_offset())
    return along[:SOME]


def _weighted_sums(t: Tensor) -> Tensor:
    """Return sums over parts of a tensor, of its bits as whole numbers with weights of their own.

    The weights are odd, so that no change of a single entry is lost where numbers overflow.
    """
    t = t.detach()
    if t.is_quantized:
        t = t.int_repr()
    if t.is_complex():
        t = torch.view_as_real(t.resolve_conj())
    words = t.resolve_neg().contiguous().view(-1).view(WORDS[t.element_size()])
    weights, sums = _weights().to(t.device), []
    for part in words.split(ROWS * COLUMNS):
        whole = part.numel() // COLUMNS * COLUMNS
        rows, last = part[:whole].view(-1, COLUMNS), part[whole:]
        sums.append((rows * weights).sum(1))
        sums.append((last * weights[: last.numel()]).sum(0, keepdim=True))
    return torch.cat(sums)


@cache
def _weights() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (COLUMNS,), generator=generator) * 2 + 1


def _bits(t: Tensor) -> bytes:
    """Return the entries so that equal ones compare equal, NaN included."""
    return bytes(t.cpu().view(torch.uint8).numpy())


# --- data -----------------------------------------------------------------------------------------


def _identity_of(value: Any) -> Any:
    """Return numbers and words as they are, and of anything else which object it is."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple) and len(value) <= FEW:
        return tuple(map(_identity_of, value))
    return id(value)
