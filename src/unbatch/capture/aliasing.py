"""Which values of a recording share memory, and how a write through one shows in another.

A *window* says which entries of a memory a value shows. Geometry only: what is done with the
entries (owners, symbolic expressions, tangents) is the business of those who ask.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbatch.capture.graph import Graph
from unbatch.capture.steps import Value


class Window(NamedTuple):
    """The entries of a memory that a value shows, counted in entries of its type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(value: Value) -> Window:
        """Return the window of a recorded value."""
        return Window(tuple(value.shape), tuple(value.stride), value.offset)

    @staticmethod
    def of_tensor(t: Tensor) -> Window:
        """Return the window of a tensor."""
        return Window(tuple(t.shape), t.stride(), int(t.storage_offset()))

    def __call__(self, memory: Tensor) -> Tensor:
        """Return what the window shows of a memory, as a view.

        ``memory``: a tensor with one axis, which begins where the memory does.
        """
        return memory.as_strided(self.shape, self.stride, self.offset)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """The number of entries that a memory has at least."""
        # ``as_strided`` wants a memory to look at, even where it shows nothing of it.
        if not self.size:
            return 1
        last = self.offset
        for size, stride in zip(self.shape, self.stride, strict=True):
            last += (size - 1) * stride
        return last + 1

    @property
    def positions(self) -> np.ndarray:
        """The place in the memory of each entry, in the shape of the value."""
        places = np.full(self.shape, self.offset, dtype=np.int64)
        for dim, (size, stride) in enumerate(zip(self.shape, self.stride, strict=True)):
            along = [1] * len(self.shape)
            along[dim] = size
            places += (np.arange(size) * stride).reshape(along)
        return places

    def is_part_of(self, whole: Window) -> bool:
        """Tell whether all entries are in ``whole``, which has no gaps."""
        # The strides of a fresh tensor, without making one.
        gapless = whole.stride == torch.empty(whole.shape, device="meta").stride()
        return gapless and whole.offset <= self.offset and self.end <= whole.offset + whole.size


def places(written: Window, seen: Sequence[Window]) -> list[np.ndarray]:
    """Return for each entry of the windows ``seen`` its place in ``written``; -1 if outside.

    Places count the entries of ``written`` in order, as if it were flattened.
    """
    # Windows may overlap in any pattern of strides; a table over the memory needs no cases.
    size = max(window.end for window in [written, *seen])
    slots = np.full(size, -1, dtype=np.int64)
    slots[written.positions.reshape(-1)] = np.arange(written.size)
    return [np.asarray(slots[window.positions]) for window in seen]


def overwritten(was: Tensor, seen: Window, new: Tensor, written: Window) -> Tensor:
    """Return what a window that showed ``was`` shows after ``new`` was written through another."""
    # The part of the memory that neither shows stays empty, and is not looked at.
    memory = was.new_empty(max(seen.end, written.end))
    seen(memory).copy_(was)
    written(memory).copy_(new)
    return seen(memory).clone()


def known_at(graph: Graph, i: int, step: int) -> Tensor | None:
    """Return the numbers of a value at a step, as far as they are known.

    They are others than ``graph.known`` says where a view of the same memory was written to.
    """
    value, numbers = graph.values[i], graph.known(i)
    for at, new in graph.writes_to(i):
        if numbers is None or at >= step:
            break
        if at > value.step and new != i:
            numbers = _after_write(graph, numbers, value, new)
    return numbers


def _after_write(graph: Graph, numbers: Tensor, value: Value, new: int) -> Tensor | None:
    """Return the numbers of a value after another was written; None where they are not known."""
    written, update = graph.values[new], graph.known(new)
    if not value.is_strided or not written.is_strided or value.dtype != written.dtype:
        return None
    windows = Window.of(value), Window.of(written)
    (hit,) = places(windows[1], windows[:1])
    if not (hit >= 0).any():
        return numbers
    if update is None or numbers.is_meta:
        return None
    return overwritten(numbers, windows[0], update, windows[1])


def by_memory(graph: Graph) -> dict[int, list[int]]:
    """Return the values that show each memory, in the order in which they are made."""
    values: dict[int, list[int]] = {}
    for i, value in enumerate(graph.values):
        values.setdefault(value.storage, []).append(i)
    return values


def seen_through_older_windows(graph: Graph, outputs: Collection[int]) -> frozenset[int]:
    """Return the memories that are written to, and later read through a window made before.

    ``outputs``: values that are read at the end of the model. Where there are none, a new version
    of a value can stand for the whole memory, and nobody has to look at aliases.
    """
    last_read = dict[int, int]()
    for step in graph.forward_steps:
        for ref in step.refs():
            last_read[ref.index] = step.index
    # Outputs are read after the last step.
    for i in outputs:
        last_read[i] = len(graph.steps)
    values_of = by_memory(graph)
    shared = set[int]()
    for step in graph.forward_steps:
        for old, new in step.written_results:
            storage = graph.values[new.index].storage
            for i in values_of[storage]:
                # Views made after the write are made of the new version, and see it anyway.
                older = i not in (old.index, new.index) and graph.values[i].step < step.index
                if older and last_read.get(i, -1) > step.index:
                    shared.add(storage)
    return frozenset(shared)
