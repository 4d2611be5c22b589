"""From quantities to answers: which rows are formed when, in what chunks, and what they are called.

The rows come from a *source*: the planned sweep over the recorded computation, or, where that cannot stand for the
model, the model itself with one column for every sample. Quantities are fed with its parts and never see networks.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from unbatch.capture import Program
from unbatch.graph import Graph
from unbatch.labels import SHARED, Marks
from unbatch.layout import Layout
from unbatch.purity import untouched
from unbatch.quantities import About, Basic, Collector, Derived, Quantity
from unbatch.sites import Flow, flow, spread
from unbatch.structure import used_predictions
from unbatch.sweep import Group, Part, Sweep
from unbatch.walk import Walk, prediction_dim, walk

CHUNK = 32 * 2**20  # bytes of rows that are formed at a time where none are kept: what a cache holds is reused fastest


def _mixed(walk_: Walk) -> set[int]:
    return {i for i, m in walk_.marks.items() if m.mixed or (m.owner < SHARED).any()}


@dataclass
class Setting:
    """The problem as the engine sees it: what was recorded, what was found, and the data."""

    program: Program
    graph: Graph
    walk: Walk
    given: Mapping[int, Marks]
    samples: int
    leading: bool
    inputs: Any
    targets: Any
    output: Any
    faithful: bool
    split: bool
    flows: dict[Any, Flow] = field(default_factory=dict)

    def flow(self, names: Sequence[str], by: str) -> Flow:
        """The plan of a sweep, kept for the next question."""
        key = (tuple(names), by)
        if key not in self.flows:
            seen = self.walk
            if by == "copy" and _mixed(seen):
                seen = walk(self.graph, self.samples, self.given, self.graph.forward_steps, by_place=True)
            plan = flow(self.graph, seen, self.samples, self.leading, names, by)
            if plan.spanning:
                plan = flow(self.graph, self._spread(plan, seen), self.samples, self.leading, names, by)
            self.flows[key] = plan
        return self.flows[key]

    def _spread(self, plan: Flow, seen: Walk) -> Walk:
        """The walk with shared values that have an entry for every sample counted to the samples, where that fits.

        What such a value holds for sample n is used by sample n only if no new place of mixing comes up.
        """
        chosen: dict[int, int] = {}
        best = seen
        for value, axes in spread(self.graph, seen, plan):
            for axis in axes:
                belong, steps = chosen | {value: axis}, self.graph.forward_steps
                trial = walk(self.graph, self.samples, self.given, steps, belong=belong, by_place=seen.by_place)
                if _mixed(trial) <= _mixed(seen):
                    chosen[value] = axis
                    best = trial
                    break
        return best

    @cached_property
    def axes(self) -> dict[int, int]:
        """Prediction -> the axis along which its samples lie."""
        found = {r.index: prediction_dim(self.walk[r], self.samples, self.leading) for r in used_predictions(self.graph)}
        return {i: d for i, d in found.items() if d is not None}

    @property
    def own_loss(self) -> bool:
        return self.program.loss is None


# --- sources --------------------------------------------------------------------------------------


class Source(ABC):
    """Where the rows of the parameters come from."""

    @abstractmethod
    def parts(self, plan: Chunks, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        """Parts of all parameters that have any; together they cover every sample of each once."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n`` by parameter."""

    @abstractmethod
    def rest(self) -> dict[str, Tensor]:
        """The gradient by ways that do not pass through predictions of samples."""


@dataclass
class Chunks:
    """How many samples at a time: ``needs`` are the methods of parts that are called, ``memory`` the budget."""

    needs: frozenset[str]
    memory: int
    keep: bool  # all rows are kept in the end
    pairs: bool

    def of(self, count: int, row: int, lean: frozenset[str] = frozenset()) -> list[slice]:
        """Slices of ``count`` samples whose rows take ``row`` bytes each."""
        if self.needs <= lean or self.keep:
            return [slice(0, count)]
        size = max(1, min(count, min(self.memory, CHUNK) // max(row, 1)))
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]


class Recorded(Source):
    """The planned sweep over the recorded computation."""

    def __init__(self, setting: Setting, parameters: Mapping[str, Tensor], by: str) -> None:
        self.setting, self.parameters = setting, parameters
        self.flow = setting.flow(list(parameters), by)
        feed = {r.index: x for r, x in zip(setting.graph.inputs, tree_leaves(setting.inputs), strict=True) if r}
        self.sweep = Sweep(setting.graph, self.flow, parameters, feed)
        predictions = self.sweep.forward()
        self.sweep.pull(_cotangents(setting, predictions, self.sweep.inner))

    def parts(self, plan: Chunks, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        sweep, n = self.sweep, self.setting.samples
        below = set(sweep.below)
        tied = []
        for group in sweep.groups():
            if below & set(group.names):
                tied.append(group)
                continue
            lean = group.meetings[group.operands[0]][0].lean if group.view else frozenset()
            for where in plan.of(n, self._bytes(group.names) * (1 if group.view else 2), lean):
                yield from sweep.parts(group, where, outs)
        if sweep.seeds and sweep.flow.columns:
            yield from self._columns(plan, tied, outs)
        else:
            for group in tied:
                for where in plan.of(n, 2 * self._bytes(group.names)):
                    yield from sweep.parts(group, where, outs)

    def _columns(self, plan: Chunks, tied: Sequence[Group], outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        sweep, n = self.sweep, self.setting.samples
        size = self.columns_at_once(plan)
        for first in range(0, n, size):
            where = slice(first, min(first + size, n))
            local = {name: rows for group in tied for name, rows in sweep.rows(group, where).items()}
            for name, part in sweep.columns(where.start, where.stop, outs):
                yield name, Part(where, part.rows() + local.pop(name)) if name in local else part
            yield from ((name, Part(where, rows)) for name, rows in local.items())

    def columns_at_once(self, plan: Chunks) -> int:
        """One where convolutions are pulled through (nothing is gained by more), else as many as memory allows."""
        column = self._bytes(self.sweep.below) + self.sweep.column_bytes
        if self.sweep.convolves:
            return 1
        return int(max(1, min(self.setting.samples, min(plan.memory, CHUNK) // max(column, 1))))

    def _bytes(self, names: Sequence[str]) -> int:
        return sum(self.parameters[n].numel() * max(self.parameters[n].element_size(), 4) for n in names)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self.sweep.weighted_sum(weights)

    def rest(self) -> dict[str, Tensor]:
        setting = self.setting
        graph = setting.graph
        if setting.split and all(r.index in self.flow.predictions for r in used_predictions(graph)):
            return {}
        named = {v.name: i for i, v in enumerate(graph.values) if v.kind == "parameters"}
        leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        keep = {i: t.detach() for i, t in self.sweep.predictions.items()}
        assert graph.loss is not None
        feed = {**_data(setting), **{named[n]: leaf for n, leaf in leaves.items()}}
        with torch.enable_grad():
            (value,) = graph.run(feed, [graph.loss.index], keep=keep, steps=graph.steps)
        if not value.requires_grad:
            return {}
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None and bool((g != 0).any())}


class Ran(Source):
    """The model itself, run once; every sample is a column of its own."""

    def __init__(self, setting: Setting, parameters: Mapping[str, Tensor]) -> None:
        self.setting, self.parameters = setting, parameters
        program = setting.program
        with untouched(program.modules, setting.graph.rng), torch.enable_grad():
            output = program.predict(setting.inputs)
        leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        at = {r.index: t for r, t in zip(setting.graph.predictions, leaves, strict=True)}
        self.predictions = {i: at[i] for i in setting.axes if at[i].requires_grad}
        self.output = output
        self.cotangents = _cotangents(setting, {i: t.detach() for i, t in self.predictions.items()}, {})

    def parts(self, plan: Chunks, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        for n in range(self.setting.samples):
            alone = {i: self._axis(i).only(g, n, n + 1)[0] for i, g in self.cotangents.items()}
            for name, g in self._pull(alone).items():
                yield name, Part(slice(n, n + 1), g[None])

    def _axis(self, i: int) -> Layout:
        return Layout(self.setting.axes[i], self.setting.samples)

    def _pull(self, cotangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
        wanted = list(self.parameters.values())
        outputs = [self.predictions[i] for i in cotangents]
        if not outputs:
            return {}
        gs = list(cotangents.values())
        grads = torch.autograd.grad(outputs, wanted, gs, retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.parameters.items(), grads, strict=True)}

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        def scaled(i: int, g: Tensor) -> Tensor:
            rows = self._axis(i).split(g)
            return self._axis(i).join(rows * weights.to(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)))

        zero = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
        return zero | self._pull({i: scaled(i, g) for i, g in self.cotangents.items()})

    def rest(self) -> dict[str, Tensor]:
        if self.setting.split:
            return {}
        leaves, spec = tree_flatten(self.output)
        at = iter([r.index for r in self.setting.graph.predictions])
        cut = [t.detach() if isinstance(t, Tensor) and next(at) in self.setting.axes else t for t in leaves]
        value = _loss(self.setting, tree_unflatten(cut, spec))
        if not value.requires_grad:
            return {}
        grads = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        return {n: g for n, g in zip(self.parameters, grads, strict=True) if g is not None and bool((g != 0).any())}


def _data(setting: Setting) -> dict[int, Tensor]:
    graph = setting.graph
    pairs = [(graph.inputs, setting.inputs), (graph.targets, setting.targets)]
    return {r.index: x for refs, tree in pairs for r, x in zip(refs, tree_leaves(tree), strict=True) if r is not None}


def _cotangents(setting: Setting, predictions: Mapping[int, Tensor], inner: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """``∂L/∂F`` for every prediction that has samples."""
    leaves = {i: t.detach().requires_grad_() for i, t in predictions.items() if t.is_floating_point() or t.is_complex()}
    graph = setting.graph
    with torch.enable_grad():
        if setting.own_loss or any(s.noise for s in graph.loss_steps):
            noise = {r.index: v for s in graph.loss_steps if s.noise for r in s.outs
                     if r is not None and (v := graph.values[r.index].concrete) is not None}  # fmt: skip
            assert graph.loss is not None
            outside = {i: setting.program.parameters[v.name].detach() for i, v in enumerate(graph.values)
                       if v.kind == "parameters"}  # fmt: skip
            feed = {**outside, **_data(setting), **inner, **predictions, **leaves}
            (value,) = graph.run(feed, [graph.loss.index], keep=noise, steps=graph.loss_steps)
        else:
            value = _loss(setting, _filled(setting, leaves))
    if not value.requires_grad or not leaves:
        return {}
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {i: g for i, g in zip(leaves, grads, strict=True) if g is not None}


def _filled(setting: Setting, leaves: Mapping[int, Tensor]) -> Any:
    """The output of the model with other tensors in it."""
    old, spec = tree_flatten(setting.output)
    refs = iter(setting.graph.predictions)
    new = [leaves.get(next(refs).index, t.detach()) if isinstance(t, Tensor) else t for t in old]
    return tree_unflatten(new, spec)


def _loss(setting: Setting, output: Any) -> Tensor:
    loss, targets = setting.program.loss, setting.targets
    assert loss is not None
    modules = [m for m in (loss,) if isinstance(m, torch.nn.Module)]
    harmless = not modules and not any(s.noise or s.writes for s in setting.graph.loss_steps)
    with nullcontext() if harmless else untouched(modules), torch.enable_grad():
        value = loss(output, targets) if targets is not None else loss(output)
    assert isinstance(value, Tensor)
    return value


# --- answering ------------------------------------------------------------------------------------


@dataclass
class Label:
    """What the rows are called."""

    by: str
    kind: str
    note: str
    weights: Tensor | None


def answer(
    source: Source, quantities: Sequence[Quantity], parameters: Mapping[str, Tensor], samples: int, label: Label,
    memory: int, out: Mapping[str, Tensor],
) -> list[Any]:  # fmt: skip
    """Feed all quantities from one source; the results in their order."""
    sums: dict[str, Mapping[str, Tensor]] = {}
    like = next(iter(parameters.values())).detach()

    def gradient() -> Mapping[str, Tensor]:
        if "one" not in sums:
            sums["one"] = source.weighted_sum(like.new_ones(samples, dtype=torch.float64).to(_real(like.dtype)))
        return sums["one"]

    about = About(
        samples, {n: tuple(p.shape) for n, p in parameters.items()}, label.by, label.kind, label.note, label.weights,
        like, gradient, source.weighted_sum, source.rest, out,
    )  # fmt: skip
    basic = _basics(quantities)
    collectors: dict[Basic, Collector] = {q: q.start(about) for q in basic}
    if basic:
        _feed(source, collectors, parameters, samples, memory, out)
    found: dict[Quantity, Any] = {q: c.finish() for q, c in collectors.items()}
    return [_value(q, found, about) for q in quantities]


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64) else torch.float64


def _basics(quantities: Sequence[Quantity]) -> list[Basic]:
    """The basic quantities behind all that is asked, each once; rows first, so that others find them formed."""
    out: list[Basic] = []
    for q in quantities:
        for b in _basics(q.bases()) if isinstance(q, Derived) else [q]:
            assert isinstance(b, Basic)
            if b not in out:
                out.append(b)
    return sorted(out, key=lambda b: b.needs != "rows")


def _value(quantity: Quantity, found: dict[Quantity, Any], about: About) -> Any:
    if quantity not in found:
        assert isinstance(quantity, Derived)
        found[quantity] = quantity.combine(about, *(_value(b, found, about) for b in quantity.bases()))
    return found[quantity]


def _feed(
    source: Source, collectors: Mapping[Basic, Collector], parameters: Mapping[str, Tensor], samples: int, memory: int,
    out: Mapping[str, Tensor],
) -> None:  # fmt: skip
    from unbatch.quantities import Gradients

    needs = frozenset(q.needs for q in collectors)
    chunks = Chunks(needs, memory, Gradients() in collectors, any(q.pairs for q in collectors))
    seen = set()
    for name, part in source.parts(chunks, out):
        seen.add(name)
        for collector in collectors.values():
            collector.take(name, part)
    for name in [n for n in parameters if n not in seen]:
        zero = parameters[name].detach().new_zeros(1, *parameters[name].shape).expand(samples, *parameters[name].shape)
        part = Part(slice(0, samples), zero.clone() if Gradients() in collectors else zero)
        for collector in collectors.values():
            collector.take(name, part)


def available_memory() -> int:
    """A quarter of the memory that is free, in bytes."""
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    return 2**30
