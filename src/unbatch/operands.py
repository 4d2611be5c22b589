"""The way from parameters to the operands that samples meet: which they are made from, and whether by views alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from unbatch import ops
from unbatch.graph import Graph, Step
from unbatch.ops import Moves
from unbatch.parts import View
from unbatch.sites import Flow
from unbatch.substitutes import replayed


@dataclass
class Operands:
    """Operands of one plan, by their number in the graph."""

    graph: Graph
    flow: Flow
    shapes: Mapping[str, tuple[int, ...]]
    views: dict[int, View | None] = field(default_factory=dict)

    def made_from(self, i: int) -> list[str]:
        """The parameters an operand is made from."""
        seen: set[int] = set()
        queue, out = [i], []
        while queue:
            v = queue.pop()
            if v in seen:
                continue
            seen.add(v)
            if v in self.flow.parameters:
                out.append(self.flow.parameters[v])
            elif v in self.flow.direct:
                queue += [r.index for r in self.graph.makers[v].refs()]
        return out

    def view(self, i: int) -> View | None:
        """How an operand is seen in its only parameter, if it is a view of it."""
        if i not in self.views:
            self.views[i] = self._view(i)
        return self.views[i]

    def _view(self, i: int) -> View | None:
        path, names = self._path(i), self.made_from(i)
        if path is None or len(names) != 1:
            return None
        try:  # a view of the parameter as it lies in memory need not be one of rows that lie in order
            replayed(path, torch.empty(self.shapes[names[0]], device="meta"))
        except RuntimeError:
            return None
        plain = {(): False, ("t",): True}
        return View(partial(replayed, path), plain.get(tuple(step.name for step in path)))

    def _path(self, i: int) -> list[Step] | None:
        """The steps by which a value is a view of a parameter."""
        path: list[Step] = []
        while i not in self.flow.parameters:
            step = self.graph.makers.get(i)
            if step is None or not _rearranges(step):
                return None
            path.insert(0, step)
            i = step.refs()[0].index
        return path

    def together(self, operands: Collection[int]) -> list[tuple[list[int], list[str]]]:
        """Operands and parameters that have to be contracted together, because they share one another."""
        merged: list[tuple[set[int], set[str]]] = []
        for i in operands:
            values, names = {i}, set(self.made_from(i))
            for other in [m for m in merged if m[1] & names]:
                values, names = values | other[0], names | other[1]
                merged.remove(other)
            merged.append((values, names))
        order = list(self.shapes)
        return [(sorted(values), sorted(names, key=order.index)) for values, names in merged]


def _rearranges(step: Step) -> bool:
    """The result shows every entry of its operand once, in the memory where that lies, and derivatives go through."""
    whole = ops.moves(step.op) in (Moves.SAME, Moves.RESHAPED, Moves.PERMUTED)
    return whole and ops.is_view(step.op) and not ops.traits(step.op).cuts
