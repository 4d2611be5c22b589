"""Which arguments of a call depend on samples, and how: the trials that a call gives rise to.

An argument is owned along an axis, a statistic of the batch, or mixed; all others are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from cases.ops.claims import Trial

LONGEST = 12  # the most samples that a batch has
OWNED, STATISTIC, MIXED_UP = "owned", "statistic", "mixed"


@dataclass(frozen=True)
class Call:
    """A function of tensors, with several draws of these.

    ``names``: what its arguments are called.
    """

    function: Callable[..., Any]
    draws: Sequence[Sequence[Tensor]]
    names: Sequence[str]

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.draws[0]


def axes(t: Tensor) -> list[int]:
    """Return the axes along which samples may lie."""
    return [d for d, size in enumerate(t.shape) if 2 <= size <= LONGEST]


def owned_alone(call: Call) -> Iterator[Trial]:
    """Each argument in turn, along each of its axes."""
    for i, t in enumerate(call.tensors):
        for d in axes(t):
            yield owned(call, {i: d})


def owned(call: Call, dims: dict[int, int]) -> Trial:
    """Some arguments owned along axes of one size."""
    all_dims = [dims.get(i) for i in range(len(call.tensors))]
    named = [f"{call.names[i]}@{d}" for i, d in dims.items()]
    i, d = next(iter(dims.items()))
    samples = call.tensors[i].shape[d]
    return Trial(" ".join(named), call.function, call.draws, all_dims, samples)


def owned_in_pairs(call: Call, most: int = 8) -> Iterator[Trial]:
    """Two arguments at once, along axes of one size; first those that broadcasting aligns."""
    found = []
    for (i, a), (j, b) in combinations(enumerate(call.tensors), 2):
        for d in axes(a):
            for e in axes(b):
                if a.shape[d] == b.shape[e]:
                    aligned = (a.ndim - d) == (b.ndim - e) or d == e
                    found.append((not aligned, len(found), {i: d, j: e}))
    for _, _, dims in sorted(found, key=lambda entry: entry[:2])[:most]:
        yield owned(call, dims)


def owned_together(call: Call) -> Iterator[Trial]:
    """All arguments that have an axis of one size, along the first or the last such axis."""
    if len(call.tensors) < 3:
        return
    sizes = sorted({t.shape[d] for t in call.tensors for d in axes(t)})
    for size in sizes[:2]:
        for end in (0, -1):
            dims = {}
            for i, t in enumerate(call.tensors):
                fitting = [d for d in axes(t) if t.shape[d] == size]
                if fitting:
                    dims[i] = fitting[end]
            if len(dims) > 2:
                yield owned(call, dims)


# --- arguments that are made inside of the program ------------------------------------------------


def statistic(x: Tensor) -> Tensor:
    """Return a function of all samples along the first axis that stays in the domain of an op."""
    if x.dtype == torch.bool:
        return x.any(0)
    if x.is_floating_point() or x.is_complex():
        return x.mean(0)
    return x.amax(0)


def mixed_up(x: Tensor) -> Tensor:
    """Return the same numbers as before, of which the analysis has lost track."""
    # An index that depends on all numbers, and is always the same.
    flat = x.reshape(-1)
    none = (flat != flat).long().cumsum(0) * 0
    return flat[none + torch.arange(len(flat))].reshape(x.shape)


def through(call: Call, i: int, make: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The function of the call with one argument made from what it is given."""

    def function(*tensors: Tensor) -> Any:
        arguments = list(tensors)
        arguments[i] = make(arguments[i])
        return call.function(*arguments)

    return function


def statistics(call: Call, samples: int = 3) -> Iterator[Trial]:
    """Each argument in turn as a statistic of the batch, alone and beside owned ones."""
    for i, t in enumerate(call.tensors):
        function = through(call, i, statistic)
        yield _beside(call, i, function, samples, {})
        for j, other in enumerate(call.tensors):
            if j != i:
                for d in axes(other)[:2]:
                    yield _beside(call, i, function, other.shape[d], {j: d})
        del t


def _beside(
    call: Call, i: int, function: Callable[..., Any], samples: int, dims: dict[int, int]
) -> Trial:
    draws = []
    for k in range(2):
        tensors = list(call.draws[k % len(call.draws)])
        slices = []
        for n in range(samples):
            slices.append(call.draws[(n + k) % len(call.draws)][i])
        tensors[i] = torch.stack(slices)
        draws.append(tensors)
    all_dims = [0 if j == i else dims.get(j) for j in range(len(call.tensors))]
    named = [f"{call.names[j]}@{d}" for j, d in dims.items()]
    what = " ".join([f"{call.names[i]}@statistic", *named])
    return Trial(what, function, draws, all_dims, samples)


def mixtures(call: Call) -> Iterator[Trial]:
    """Each argument in turn as a value in which samples are mixed, alone and beside owned ones."""
    for i, t in enumerate(call.tensors):
        if not axes(t):
            continue
        d = axes(t)[0]
        function = through(call, i, mixed_up)
        dims: dict[int, int] = {i: d}
        yield _mixture(call, function, i, dims)
        for j, other in enumerate(call.tensors):
            fitting = [e for e in axes(other) if other.shape[e] == t.shape[d]]
            if j != i and fitting:
                yield _mixture(call, function, i, {i: d, j: fitting[0]})


def _mixture(call: Call, function: Callable[..., Any], i: int, dims: dict[int, int]) -> Trial:
    trial = owned(call, dims)
    what = trial.what.replace(f"{call.names[i]}@", f"{call.names[i]}@mixed", 1)
    return Trial(what, function, trial.draws, trial.dims, trial.samples)
