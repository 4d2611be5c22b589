"""The tangents of the values of a graph while they are pushed through it.

A recorded program may write to a tensor that other values are views of. Their tangents then are
views of one memory, too, laid out as that of the values (``Window``). How a tangent passes through
an op is in ``jvp_rules.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unbatch.autodiff.dependence import values_read
from unbatch.capture.aliasing import Window
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step


@dataclass
class TangentStore:
    """Tangents by value, while they go through the steps.

    Values that share a memory which is written to share the memory of their tangents as well: what
    is written to one is seen in the others.
    """

    graph: Graph
    windows: Mapping[int, Window]  # of values in such memories
    sizes: Mapping[int, int]  # of the memories, in entries
    values: dict[int, Tensor] = field(default_factory=dict)
    memories: dict[int, Tensor] = field(default_factory=dict)

    def get(self, value: int) -> Tensor | None:
        """Return the tangent of a value; None where it does not move."""
        if value not in self.windows:
            return self.values.get(value)
        memory = self.memories.get(self.graph.values[value].storage)
        # Copied, as the memory may be written to before the op that reads this has run.
        return None if memory is None else self.windows[value](memory).clone()

    def of_arguments(self, step: Step) -> dict[int, Tensor]:
        """Return the tangents of the values that a step reads, without those that do not move."""
        tangents: dict[int, Tensor] = {}
        for value in values_read(step):
            tangent = self.get(value)
            if tangent is not None:
                tangents[value] = tangent
        return tangents

    def put(self, new: Ref | None, old: Ref | None, tangent: Tensor | None) -> None:
        """Enter the tangent of ``new``; None where it does not move.

        ``old``: what was in its place before, if it was written there; else the same value.
        """
        if new is None or old is None:
            return
        window = self.windows.get(new.index, self.windows.get(old.index))
        if window is None:
            if tangent is not None:
                self.values[new.index] = tangent
            return
        storage = self.graph.values[new.index].storage
        memory = self.memories.get(storage)
        if memory is not None:
            window(memory).copy_(torch.zeros(()) if tangent is None else tangent)
        elif tangent is not None:
            memory = self.memories[storage] = tangent.new_zeros(self.sizes[storage])
            window(memory).copy_(tangent)
