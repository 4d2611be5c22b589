"""Where rows come from: the planned sweep over the recorded computation, or the model itself, run sample by sample.

A source knows the problem, its data and its plan, and yields parts; it does not know what is asked about them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from unbatch.capture import Program
from unbatch.contractions import squares
from unbatch.derivatives import gradients
from unbatch.graph import Graph, widest
from unbatch.labels import SHARED, Marks
from unbatch.layout import Layout
from unbatch.operands import Operands
from unbatch.parts import Part
from unbatch.plan import SitePlan
from unbatch.purity import untouched
from unbatch.sites import Flow, flow, spread
from unbatch.structure import used_predictions
from unbatch.sweep import Group, Sweep, plainly
from unbatch.walk import Walk, prediction_dim, walk

BY_PLACE = "where samples meet in no symmetric way, slice n of the result counts as sample n's own"
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
    flows: dict[Any, tuple[Flow, Operands]] = field(default_factory=dict)
    trust: dict[Any, bool] = field(default_factory=dict)
    buffer: Tensor | None = None

    def flow(self, parameters: Mapping[str, Tensor], by: str) -> tuple[Flow, Operands]:
        """The plan of a sweep, kept for the next question."""
        names = list(parameters)
        key = (tuple(names), by)
        if key not in self.flows:
            seen = self.walk
            if by == "copy" and _mixed(seen):
                seen = walk(self.graph, self.samples, self.given, self.graph.forward_steps, by_place=True)
            plan = flow(self.graph, seen, self.samples, self.leading, names, by)
            if plan.spanning:
                plan = flow(self.graph, self._spread(plan, seen), self.samples, self.leading, names, by)
            plan.by_place = seen.by_place
            self.flows[key] = plan, Operands(self.graph, plan, {n: tuple(p.shape) for n, p in parameters.items()})
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
        found = {
            r.index: prediction_dim(self.walk[r], self.samples, self.leading) for r in used_predictions(self.graph)
        }
        return {i: d for i, d in found.items() if d is not None}

    def scratch(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Memory for rows that nobody keeps, the same at every question: fresh memory costs more than what fills it."""
        size = math.prod(shape) * like.element_size()
        if self.buffer is None or self.buffer.numel() < size or self.buffer.device != like.device:
            self.buffer = torch.empty(size, dtype=torch.uint8, device=like.device)
        return self.buffer[:size].view(like.dtype).view(*shape)

    def widened(self) -> Setting:
        """The same plans on the same numbers in float64."""
        graph, inputs = self.graph.widened(), tree_map(_widest, self.inputs)
        other = replace(self, graph=graph, inputs=inputs, flows=dict(self.flows), trust={}, buffer=None)
        other.__dict__["axes"] = self.axes
        return other

    @cached_property
    def rounding(self) -> float:
        """By the coarsest floating-point type on the way."""
        kinds = {self.graph.values[r.index].dtype for s in self.graph.forward_steps for r in s.outs if r is not None}
        return max((ROUNDING.get(k, 0.3) for k in kinds if k.is_floating_point or k.is_complex), default=1e-8)

    @property
    def own_loss(self) -> bool:
        return self.program.loss is None


# --- sources --------------------------------------------------------------------------------------


class Source(ABC):
    """Where rows come from. ``note``: what to keep in mind about them; ``reason``: of the plan, in words."""

    note = ""
    reason = "One sweep serves all samples."

    @abstractmethod
    def parts(self, plan: Chunks, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        """Parts of all parameters that have any; together they cover every sample of each once."""

    @abstractmethod
    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        """``Σ_n c_n row_n`` by parameter."""

    @abstractmethod
    def sites(self) -> list[SitePlan]:
        """What is contracted how, for the plan."""

    @abstractmethod
    def pullbacks(self, plan: Chunks) -> tuple[int, int]:
        """Backward passes in all, and how many columns share one call."""

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
    """The planned sweep over the recorded computation; with other ``cotangents`` than the loss has, to be tried out."""

    def __init__(
        self,
        setting: Setting,
        parameters: Mapping[str, Tensor],
        by: str,
        cotangents: dict[int, Tensor] | None = None,
    ) -> None:
        self.setting, self.parameters = setting, parameters
        self.flow, operands = setting.flow(parameters, by)
        self.sweep = Sweep(setting.graph, self.flow, operands, parameters, _data(setting))
        predictions = self.sweep.forward()
        if cotangents is None:
            cotangents = _cotangents(setting, predictions, self.sweep.inner)
        self.sweep.pull(cotangents)
        self.note = BY_PLACE if self.flow.by_place else ""
        if self.flow.columns:
            self.reason = "Below the last place where samples listen to each other, each is a column of its own."
        elif self.flow.projections:
            self.reason = "Samples meet in one place only, of which the closed form is known."

    def parts(self, plan: Chunks, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        sweep, n = self.sweep, self.setting.samples
        below = set(sweep.reached)
        tied = []
        for group in sweep.groups():
            if below & set(group.names):
                tied.append(group)
                continue
            lean = group.meetings[group.operands[0]][0].lean if group.view else frozenset()
            for where in plan.of(n, self._bytes(group.names) * (1 if group.view else 2), lean):
                out = self._room(plan, group.names[0], where, outs) if group.view and not plan.needs <= lean else None
                yield from sweep.parts(group, where, out)
        if sweep.seeds and sweep.flow.columns:
            yield from self._columns(plan, tied, outs)
        else:
            for group in tied:
                for where in plan.of(n, 2 * self._bytes(group.names)):
                    yield from sweep.parts(group, where, None)

    def _room(self, plan: Chunks, name: str, where: slice, outs: Mapping[str, Tensor]) -> Tensor | None:
        """Where the rows of a parameter are to be formed: where the caller wants them, or in scratch memory."""
        if name in outs:
            return outs[name][where]
        like = self.parameters[name].detach()
        kept = plan.keep or plan.pairs
        return None if kept else self.setting.scratch((where.stop - where.start, *like.shape), like)

    def of_samples(self, first: int, last: int) -> Iterator[tuple[str, Part]]:
        """The parts of a few samples."""
        where, below = slice(first, last), set(self.sweep.reached)
        local: dict[str, Tensor] = {}
        for group in self.sweep.groups():
            if below & set(group.names):
                local |= self.sweep.rows(group, where)
            else:
                yield from self.sweep.parts(group, where, None)
        yield from self._with_columns(where, local, {})

    def _with_columns(
        self, where: slice, local: dict[str, Tensor], outs: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Part]]:
        """The columns of some samples, together with what their parameters get above the last mixing."""
        if self.sweep.seeds and self.flow.columns:
            for name, part in self.sweep.columns(where.start, where.stop, outs):
                yield name, Part(where, part.rows() + local.pop(name)) if name in local else part
        yield from ((name, Part(where, rows)) for name, rows in local.items())

    def _columns(self, plan: Chunks, tied: Sequence[Group], outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        sweep, n = self.sweep, self.setting.samples
        size = self.columns_at_once(plan)
        for first in range(0, n, size):
            where = slice(first, min(first + size, n))
            local = {name: rows for group in tied for name, rows in sweep.rows(group, where).items()}
            yield from self._with_columns(where, local, {name: out[where] for name, out in outs.items()})

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

    def sites(self) -> list[SitePlan]:
        steps, sweep, out = self.setting.graph.steps, self.sweep, []
        kinds = {site: met.kind for site, met in sweep.meetings}
        for site in self.flow.sites:
            step, pooled = steps[site.step], site in sweep.pools
            kind = "linear" if pooled else kinds.get(site, "by autograd" if site.way == "columns" else "no cotangent")
            way = "pooled" if pooled else site.way
            out.append(SitePlan(tuple(sweep.operands.made_from(site.operand)), step.module, step.name, kind, way))
        return out

    def pullbacks(self, plan: Chunks) -> tuple[int, int]:
        columns = self.setting.samples if self.sweep.seeds and self.flow.columns else 0
        return 1 + columns, min(self.columns_at_once(plan), max(columns, 1))

    def rest(self) -> dict[str, Tensor]:
        """The loss alone, with the predictions held constant: parameters in it, and what else it reads of the model."""
        setting, graph = self.setting, self.setting.graph
        if setting.split and all(r.index in self.flow.predictions for r in used_predictions(graph)):
            return {}
        leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        live = {i: leaves[name] for i, name in self.flow.parameters.items()}
        fixed = {i: t.detach() for i, t in self.sweep.predictions.items()}
        pinned = {i: t for i, t in fixed.items() if not graph.written(i)}
        inner = list(self.sweep.inner)
        assert graph.loss is not None
        with torch.enable_grad():
            read = graph.run(_data(setting) | live, inner, keep=pinned, steps=graph.forward_steps) if inner else []
            feed = _data(setting) | live | dict(zip(inner, read, strict=True)) | fixed
            (value,) = graph.run(feed, [graph.loss.index], keep=_noise(graph), steps=graph.loss_steps)
        return _nonzero_gradients(value, leaves)


class Ran(Source):
    """The model itself (or its recording, ``replayed``), run once; every sample is a column of its own."""

    def __init__(
        self, setting: Setting, parameters: Mapping[str, Tensor], replayed: bool = False, why: str = ""
    ) -> None:
        self.setting, self.parameters, self.replayed = setting, parameters, replayed
        self.reason = f"Every sample is pulled back through the whole model: {why or 'there is only one'}."
        self.inner: dict[int, Tensor] = {}
        at = self._replay() if replayed else self._run()
        self.predictions = {i: at[i] for i in setting.axes if at[i].requires_grad}
        self.cotangents = _cotangents(setting, {i: t.detach() for i, t in self.predictions.items()}, self.inner)

    def _run(self) -> dict[int, Tensor]:
        setting, program = self.setting, self.setting.program
        with untouched(program.modules, setting.graph.rng), torch.enable_grad():
            self.output = program.on_copies().predict(setting.inputs)
        leaves = [t for t in tree_leaves(self.output) if isinstance(t, Tensor)]
        return {r.index: t for r, t in zip(setting.graph.predictions, leaves, strict=True)}

    def _replay(self) -> dict[int, Tensor]:
        graph = self.setting.graph
        self.leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        self.parameters = self.leaves
        live = {i: self.leaves[v.name] for i, v in enumerate(graph.values)
                if v.kind == "parameters" and v.name in self.leaves}  # fmt: skip
        wanted = [*self.setting.axes, *graph.read_by_loss(self.setting.axes)]
        with torch.enable_grad():
            outs = graph.run(_data(self.setting) | live, wanted, steps=graph.forward_steps)
        found = dict(zip(wanted, outs, strict=True))
        self.inner = {i: t for i, t in found.items() if i not in self.setting.axes}
        return found

    def parts(self, plan: Chunks, outs: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
        for n in range(self.setting.samples):
            alone = {i: self._axis(i).only(g, n, n + 1)[0] for i, g in self.cotangents.items()}
            for name, g in self._pull(alone).items():
                yield name, Part(slice(n, n + 1), g[None])

    def _axis(self, i: int) -> Layout:
        return Layout(self.setting.axes[i], self.setting.samples)

    def _pull(self, cotangents: Mapping[int, Tensor]) -> dict[str, Tensor]:
        outputs = [self.predictions[i] for i in cotangents]
        return gradients(outputs, self.parameters, list(cotangents.values()), retain=True)

    def weighted_sum(self, weights: Tensor) -> dict[str, Tensor]:
        return self._pull({i: self._axis(i).scaled(g, weights) for i, g in self.cotangents.items()})

    def sites(self) -> list[SitePlan]:
        return [SitePlan((n,), "", "", "by autograd", "model") for n in self.parameters]

    def pullbacks(self, plan: Chunks) -> tuple[int, int]:
        return self.setting.samples, 1

    def rest(self) -> dict[str, Tensor]:
        if self.setting.split:
            return {}
        if self.replayed:
            return Recorded(self.setting, self.parameters, "component").rest()
        leaves, spec = tree_flatten(self.output)
        at = iter([r.index for r in self.setting.graph.predictions])
        cut = [t.detach() if isinstance(t, Tensor) and next(at) in self.setting.axes else t for t in leaves]
        return _nonzero_gradients(_loss(self.setting, tree_unflatten(cut, spec)), self.parameters)


def _nonzero_gradients(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {}
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {n: g for n, g in zip(leaves, grads, strict=True) if g is not None and bool((g != 0).any())}


def _noise(graph: Graph) -> dict[int, Tensor]:
    """What was drawn in the loss when it was recorded."""
    refs = [r for s in graph.loss_steps if s.noise for r in s.outs if r is not None]
    return {r.index: v for r in refs if (v := graph.values[r.index].concrete) is not None}


def _widest(x: Any) -> Any:
    return widest(x) if isinstance(x, Tensor) else x


def _data(setting: Setting) -> dict[int, Tensor]:
    graph = setting.graph
    pairs = [(graph.inputs, setting.inputs), (graph.targets, setting.targets)]
    return {r.index: x for refs, tree in pairs for r, x in zip(refs, tree_leaves(tree), strict=True) if r is not None}


def _cotangents(setting: Setting, predictions: Mapping[int, Tensor], inner: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """``∂L/∂F`` for every prediction that has samples."""
    leaves = {i: t.detach().requires_grad_() for i, t in predictions.items() if t.is_floating_point() or t.is_complex()}
    graph = setting.graph
    with torch.enable_grad():
        if setting.own_loss or inner or any(s.noise for s in graph.loss_steps):
            assert graph.loss is not None
            outside = {i: setting.program.parameters[v.name].detach() for i, v in enumerate(graph.values)
                       if v.kind == "parameters"}  # fmt: skip
            constant = {i: t.detach() for i, t in inner.items()}
            feed = {**outside, **_data(setting), **constant, **predictions, **leaves}
            (value,) = graph.run(feed, [graph.loss.index], keep=_noise(graph), steps=graph.loss_steps)
        else:
            copied = any(s.writes for s in graph.loss_steps)
            value = _loss(setting, _filled(setting, {i: t.clone() if copied else t for i, t in leaves.items()}))
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


# --- trust ----------------------------------------------------------------------------------------

ROUNDING = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 2e-3, torch.complex64: 2e-3}


def trusted(setting: Setting, parameters: Mapping[str, Tensor], by: str) -> bool:
    """Whether the planned sweep gives what a plain backward pass gives, for random cotangents and weights of samples.

    Rows by component are linear in the cotangents of the samples: sums with random weights that agree, agree for all
    weights but a set of measure zero. Frozen rows are held against a replay with frozen statistics, copy rows by their
    sum; the row of one sample against a sum in which all others weigh nothing. In float64 where the computation can be
    run in it, so that small gradients count as much as large ones. The answer is kept with the plan.
    """
    key = (tuple(parameters), by)
    if key not in setting.trust:
        setting.flow(parameters, by)
        try:
            agree = _agrees(setting.widened(), {n: widest(p.detach()) for n, p in parameters.items()}, by, 1e-8)
        except (RuntimeError, TypeError, NotImplementedError, IndexError):  # some op does not take float64
            agree = _agrees(setting, parameters, by, setting.rounding)
        setting.trust[key] = agree
    return setting.trust[key]


def _agrees(setting: Setting, parameters: Mapping[str, Tensor], by: str, bound: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    like = next(iter(parameters.values()))
    weights = torch.rand(setting.samples, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.ones_like(weights) if by == "copy" else weights
    weights = weights.to(like.device, real(like.dtype))
    flow_, _ = setting.flow(parameters, by)
    cotangents, expected = plainly(setting.graph, flow_, parameters, _data(setting), weights)
    scale = max((float(g.abs().max()) for g in cotangents.values() if g.numel()), default=0.0)
    source = Recorded(setting, parameters, by, cotangents)
    return _agree(source.weighted_sum(weights), expected, bound, scale) and _consistent(source, bound, scale)


def _consistent(source: Recorded, bound: float, scale: float) -> bool:
    """The row of one sample, and its norm, are those of a sum in which all other weights are zero."""
    n = source.setting.samples // 2
    alone = torch.zeros(source.setting.samples, dtype=torch.float64)
    alone[n] = 1
    like = next(iter(source.parameters.values()))
    expected = source.weighted_sum(alone.to(like.device, real(like.dtype)))
    found = {name: torch.zeros_like(g) for name, g in expected.items()}
    norms = {name: squares(g[None]) for name, g in found.items()}
    for name, part in source.of_samples(n, n + 1):
        norms[name] = part.squared_norms().sqrt()
        found[name] = part.rows()[0]
    lengths = {name: squares(g[None]).sqrt() for name, g in expected.items()}
    return _agree(found, expected, bound, scale) and _agree(norms, lengths, bound, scale)


def _agree(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float, scale: float) -> bool:
    """Up to rounding, of which there is more where what is large cancels (biases right below batch norms)."""
    largest = max([scale, *(float(g.abs().max()) for g in expected.values() if g.numel())])
    if not math.isfinite(largest):
        return True  # nothing can be told, and a plain backward pass would be no better
    for name, g in expected.items():
        allowed = bound * (float(g.abs().max()) + 1e-3 * largest) if g.numel() else 0.0
        if g.numel() and not float((found[name] - g).abs().max()) <= allowed:
            return False
    return True


def real(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights of samples are given."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64) else torch.float64
