"""Which sample reads each entry of a value in which samples are mixed.

Where a net mixes samples in no symmetric way (a convolution mixes pixels, attention tokens), the
entries of what comes after belong to no single sample. But the last layers may act on each place
alone: then only one sample's prediction reads an entry, and its cotangent serves that sample alone.
That is guessed here, from the predictions down, and proved by nobody here: the interpreter starts
afresh from the guess, and ``dependence.py`` calls a value separate only where the rules lead from
there to the predictions without mixing. A wrong guess costs time, and no row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbatch.analysis.domain.ownership import (
    SHARED,
    Array,
    Ownership,
    code,
    mix,
    shared,
    varies,
)
from unbatch.analysis.interpreter import Interpretation
from unbatch.autodiff.dependence import values_read
from unbatch.autodiff.planner import BackwardPlan
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step, filled
from unbatch.capture.trees import flat

# Ops that move entries of several operands, or to other places, without computing.
REARRANGES = ("cat", "stack", "flip", "roll", "pixel_shuffle", "pixel_unshuffle")


def read_by(
    graph: Graph, interpretation: Interpretation, plan: BackwardPlan
) -> dict[int, Ownership]:
    """Return what mixed values count as, by their number; none where no site gains by it.

    Those that depend on the parameters count to the samples that read them, as far as one can be
    guessed. All others are constants here, from wherever they come. Where rows are followed through
    an order of their own, or a module is declared independent, nothing is started afresh.
    """
    readers = _Readers(graph, interpretation, plan)
    readers.find()
    at_sites: set[int] = set()
    for site in plan.columns:
        at_sites.update(ref.index for ref in graph.steps[site.step].made())
    if at_sites.isdisjoint(readers.owners):
        return {}
    counted: dict[int, Ownership] = {}
    declared = _declared(graph, interpretation)
    for i, owners in interpretation.ownership.items():
        if not owners.coupled or i in interpretation.permuted or graph.values[i].step in declared:
            continue
        if i not in plan.theta:
            counted[i] = shared(owners.shape, ("constant here", i), owners.sources)
        elif i in readers.owners:
            counted[i] = _ownership(owners, i, readers.owners[i])
    return counted


def _declared(graph: Graph, interpretation: Interpretation) -> set[int]:
    """Return the steps of modules that were declared independent."""
    steps: set[int] = set()
    for call in graph.calls:
        if call.module in interpretation.assumed:
            steps.update(range(call.start, call.stop))
    return steps


def _ownership(value: Ownership, number: int, owner: Array) -> Ownership:
    """Return a value with these owners; the k-th entries of samples count as one function."""
    line = owner.reshape(-1)
    order = np.argsort(line, kind="stable")
    first = np.searchsorted(line[order], line[order])
    place = np.empty(len(line), dtype=np.uint64)
    place[order] = np.arange(len(line)) - first
    key = mix(place.reshape(owner.shape), code("read", number))
    return Ownership(value.shape, owner, key, sources=value.sources)


@dataclass
class _Readers:
    """Goes through the steps from the last to the first.

    ``owners``: by value, the sample that reads each entry, with one entry along the axes on which
    that does not change.
    """

    graph: Graph
    interpretation: Interpretation
    plan: BackwardPlan
    owners: dict[int, Array] = field(default_factory=dict)

    def find(self) -> None:
        """Fill in ``owners``."""
        samples = np.arange(self.plan.samples, dtype=np.int32)
        for i, dim in self.plan.predictions.items():
            if self._is_coupled(i):
                axes = [1] * len(self._shape(i))
                axes[dim] = -1
                self.owners[i] = samples.reshape(axes)
        for step in reversed(self.graph.forward_steps):
            outs = [ref.index for ref in step.made() if ref.index in self.owners]
            if outs:
                self._pass(step, outs)

    def _pass(self, step: Step, outs: Sequence[int]) -> None:
        """Guess who reads what a step reads, given who reads its results."""
        # Lengths of a jagged tensor are no numbers that could be counted through.
        if not all(self.graph.values[i].is_strided for i in [*values_read(step), *outs]):
            return
        reads = [i for i in dict.fromkeys(values_read(step)) if self._is_coupled(i)]
        # What two steps read differently is not separate anyway: the first guess stays.
        reads = [i for i in reads if i not in self.owners]
        if not reads:
            return
        rearranges = ops.moves(step.op) is not None or step.name in REARRANGES
        if rearranges and not step.writes:
            self.owners.update(self._through_movement(step, reads))
            return
        out = outs[0]
        for i in reads:
            owner = _aligned(self.owners[out], self._shape(out), self._shape(i))
            if owner is not None:
                self.owners[i] = owner

    def _is_coupled(self, value: int) -> bool:
        owners = self.interpretation.ownership.get(value)
        return owners is not None and owners.coupled

    def _shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def _through_movement(self, step: Step, reads: Sequence[int]) -> dict[int, Array]:
        """Return the readers of what a step moves: it is run on the numbers of the entries."""
        first: dict[int, int] = {}
        count = 0
        for i in dict.fromkeys(values_read(step)):
            first[i] = count
            count += math.prod(self._shape(i))

        def numbers(ref: Ref) -> Tensor:
            shape = self._shape(ref.index)
            start = first[ref.index]
            return torch.arange(start, start + math.prod(shape)).view(shape)

        try:
            results = flat(step.op(*filled(step.args, numbers), **filled(step.kwargs, numbers)))
        except (RuntimeError, TypeError, NotImplementedError):
            return {}
        reader = np.full(count, SHARED, dtype=np.int32)
        disputed = np.zeros(count, dtype=bool)
        for place, owner in self._of_results(step, results):
            free = reader[place] == SHARED
            reader[place[free]] = owner[free]
            disputed[place[reader[place] != owner]] = True
        found: dict[int, Array] = {}
        for i in reads:
            mine = slice(first[i], first[i] + math.prod(self._shape(i)))
            of_value = _filled(reader[mine].reshape(self._shape(i)))
            if not disputed[mine].any() and (of_value != SHARED).all():
                found[i] = _compressed(of_value)
        return found

    def _of_results(self, step: Step, results: Sequence[Any]) -> Iterator[tuple[Array, Array]]:
        """Iterate over results: the numbers of their entries, and who reads these."""
        for ref, result in zip(step.outs, results, strict=False):
            if ref is None or ref.index not in self.owners or not isinstance(result, Tensor):
                continue
            # Numbers that were cast or pooled on the way count nothing any more.
            if result.dtype != torch.int64:
                continue
            if tuple(result.shape) == self._shape(ref.index):
                owner = np.broadcast_to(self.owners[ref.index], result.shape)
                yield result.numpy().reshape(-1), owner.reshape(-1)


def _filled(owner: Array) -> Array:
    """Return owners in which entries that nobody reads count to the reader of those beside them.

    Nothing comes back from them, so that any sample will do.
    """
    for dim in range(owner.ndim):
        others = tuple(d for d in range(owner.ndim) if d != dim)
        known = (owner != SHARED).all(axis=others)
        if known.all() or not known.any():
            continue
        index = np.where(known, np.arange(len(known)), int(known.argmax()))
        owner = owner.take(np.maximum.accumulate(index), axis=dim)
    return owner


def _compressed(owner: Array) -> Array:
    """Return owners with one entry along axes on which they do not change."""
    for dim in range(owner.ndim):
        if not varies(owner, dim):
            owner = owner.take([0], axis=dim)
    return owner


def _aligned(owner: Array, shape: Sequence[int], other: Sequence[int]) -> Array | None:
    """Return the owners of a value of shape ``other`` that lies as one of shape ``shape`` does.

    Aligned as in broadcasting, or from the front, or otherwise with the axes of samples in order.
    """
    dims = [d for d in range(len(shape)) if owner.shape[d] > 1]
    sizes = [shape[d] for d in dims]
    for places in _placements(dims, len(shape), len(other)):
        if [other[d] for d in places] == sizes:
            stored = [1] * len(other)
            for d, size in zip(places, sizes, strict=True):
                stored[d] = size
            return owner.reshape(stored)
    return None


def _placements(dims: Sequence[int], ndim: int, other: int) -> Iterator[tuple[int, ...]]:
    """Iterate over the axes, of ``other`` in all, that may be those ``dims`` of ``ndim``."""
    for shift in (other - ndim, 0):
        places = tuple(d + shift for d in dims)
        if all(0 <= d < other for d in places):
            yield places
    yield from combinations(range(other), len(dims))
