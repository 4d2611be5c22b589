"""Which values of a recording show the same memory, and how what is written through one is seen through another.

A *window* says which entries of a memory a value shows. Geometry only: what is done with the entries (owners, symbolic
terms, tangents) is for those who ask.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbatch.capture.graph import Graph, Value


class Window(NamedTuple):
    """The entries of a memory that a value shows, counted in entries of its type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(value: Value) -> Window:
        return Window(tuple(value.shape), tuple(value.stride), value.offset)

    @staticmethod
    def of_tensor(t: Tensor) -> Window:
        return Window(tuple(t.shape), t.stride(), int(t.storage_offset()))

    def __call__(self, memory: Tensor) -> Tensor:
        """Return what the window shows of a memory, as a view."""
        return memory.as_strided(self.shape, self.stride, self.offset)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """How many entries a memory has at least."""
        if not self.size:
            return 1
        return (
            self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        )

    @property
    def positions(self) -> np.ndarray:
        """Where in the memory each entry lies, in the shape of the value."""
        out = np.full(self.shape, self.offset, dtype=np.int64)
        for d, (size, stride) in enumerate(zip(self.shape, self.stride, strict=True)):
            view = [size if e == d else 1 for e in range(len(self.shape))]
            out += (np.arange(size) * stride).reshape(view)
        return out

    def is_part_of(self, whole: Window) -> bool:
        """Tell whether all that it shows is in ``whole``, which has no gaps."""
        gapless = whole.stride == torch.empty(whole.shape, device="meta").stride()
        return gapless and whole.offset <= self.offset and self.end <= whole.offset + whole.size


def places(written: Window, seen: Sequence[Window]) -> list[np.ndarray]:
    """Return for each entry of the windows ``seen`` its place in ``written``, flattened; -1 where it is outside."""
    slots = np.full(max(w.end for w in [written, *seen]), -1, dtype=np.int64)
    slots[written.positions.reshape(-1)] = np.arange(written.size)
    return [np.asarray(slots[w.positions]) for w in seen]


def overwritten(was: Tensor, seen: Window, new: Tensor, written: Window) -> Tensor:
    """Return what a window shows, which showed ``was``, after ``new`` was written through another one."""
    memory = was.new_empty(max(seen.end, written.end))
    seen(memory).copy_(was)
    written(memory).copy_(new)
    return seen(memory).clone()


def by_memory(graph: Graph) -> dict[int, list[int]]:
    """Return the values that show each memory, in the order in which they are made."""
    values: dict[int, list[int]] = {}
    for i, value in enumerate(graph.values):
        values.setdefault(value.storage, []).append(i)
    return values


def seen_through_older_windows(graph: Graph, outputs: Collection[int]) -> frozenset[int]:
    """Return the memories that are written to, and later read through a window that was there before.

    ``outputs``: values that are read at the end of the model.
    """
    last_read: dict[int, int] = {}
    for step in graph.forward_steps:
        last_read |= dict.fromkeys((r.index for r in step.refs()), step.index)
    shared = set[int]()
    windows = by_memory(graph)
    for step in graph.forward_steps:
        for old, new in step.written_results:
            storage = graph.values[new.index].storage
            for i in windows[storage]:
                older = i not in (old.index, new.index) and graph.values[i].step < step.index
                if older and (last_read.get(i, -1) > step.index or i in outputs):
                    shared.add(storage)
    return frozenset(shared)
