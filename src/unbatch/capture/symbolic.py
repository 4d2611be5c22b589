"""The terms of a recording: what each of its values is as a function of data, parameters and noise.

What does not depend on data is worked out; writes through one window on a memory are seen through the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.aliasing import Window, overwritten
from unbatch.capture.expressions import Expr, ExprTable
from unbatch.capture.graph import Graph, HostRead, Ref, Step, Value, filled, flat
from unbatch.capture.isolation import storage_of

LARGEST = 1 << 22  # entries of a constant that is worked out


class SymbolicRun:
    """The terms of all values of a recording, under what ``terms`` has been told to assume."""

    def __init__(self, graph: Graph, terms: ExprTable) -> None:
        self.graph, self.terms = graph, terms
        self.of: dict[int, Expr] = {}
        self.drawn = 0  # the history of noise
        self.asked: list[Expr] = []  # what Python was told, at the moment when it asked
        self.windows: dict[int, list[int]] = {}  # memory -> the values that show it
        self.read_until = {r.index: s.index for s in graph.steps for r in s.refs()}
        self.read_until |= {
            r.index: len(graph.steps) for r in [*graph.predictions, graph.loss] if r is not None
        }
        for i, value in enumerate(graph.values):
            if value.kind != "step":
                self._keep(i, self._outside(i, value))
        waiting = list(graph.escapes)
        for step in graph.steps:
            self._ask(waiting, step.index)
            self._step(step)
        self._ask(waiting, len(graph.steps))

    def __getitem__(self, ref: Ref) -> Expr:
        return self.of[ref.index]

    def _ask(self, waiting: list[HostRead], step: int) -> None:
        """Before a step: its memory may be written to."""
        while waiting and waiting[0].step <= step:
            self.asked.append(self[waiting.pop(0).ref])

    def _keep(self, i: int, term: Expr) -> None:
        self.of[i] = term
        self.windows.setdefault(self.graph.values[i].storage, []).append(i)

    def _outside(self, i: int, value: Value) -> Expr:
        if value.kind != "constants":
            return self.terms.leaf(value.kind, value.name, value)
        assert value.concrete is not None
        if i in self.graph.foreign:  # the same where it is the same memory
            return self.terms.leaf(
                "constants", (storage_of(value.concrete), value.offset, value.stride), value
            )
        return self.terms.constant(value.concrete)

    def _step(self, step: Step) -> None:
        name = ops.base_name(step.op)
        arguments = self._arguments(step)
        if step.noise:
            made = [self.graph.values[r.index] for r in step.outs if r is not None]
            self.drawn = self.terms.drawn(
                self.drawn, name, arguments, [(v.shape, v.dtype) for v in made]
            )
        known = {} if step.noise else self._worked_out(step, name)
        results: list[tuple[Any, Ref]] = [(i, r) for i, r in enumerate(step.outs) if r is not None]
        results += [(f"written {i}", new) for i, (_, new) in enumerate(step.writes)]
        for slot, ref in results:
            if ref.index not in self.of:
                value = self.graph.values[ref.index]
                found = self.terms.constant(known[ref.index]) if ref.index in known else None
                self._keep(ref.index, found or self._result(step, name, arguments, slot, value))
        for _, new in step.writes:
            self._seen_through_windows(new.index, step.index)

    def _arguments(self, step: Step) -> dict[str, Any]:
        find = self._narrow if ops.is_pointwise(step.op) else self.__getitem__
        out = {}
        for name, a in step.named.items():
            overwritten = name == "self" and _overwrites(step)
            by_default = name in step.defaults and _same(a, step.defaults[name])
            if not (name in ops.PLACEMENT or overwritten or by_default):
                out[name] = filled(a, find)
        return out

    def _narrow(self, ref: Ref) -> Expr:
        """A constant as the smallest that is broadcast to it."""
        term = self[ref]
        if term not in self.terms.constants:
            return term
        small = self.terms.constants[term]
        for d in range(small.ndim):
            if small.shape[d] > 1 and bool((small == small.narrow(d, 0, 1)).all()):
                small = small.narrow(d, 0, 1)
        while (
            small.ndim > 1 and small.shape[0] == 1
        ):  # one without dims would not count for the type of the result
            small = small[0]
        return self.terms.constant(small)

    def _result(
        self, step: Step, name: str, arguments: Mapping[str, Any], slot: Any, value: Value
    ) -> Expr:
        """``slot``: which result of the op it is."""
        noise = self.drawn if step.noise else 0
        if "empty" in name:
            return self.terms.leaf("empty", (), value)
        if name.startswith("as_strided"):
            if not self._inside(step, value):
                return self.terms.leaf("opaque", len(self.terms.made), value)
            arguments = {**arguments, "of": _window(self.graph.values[step.refs()[0].index])}
        if name in ("set", "resize", "resize_as"):
            return self.terms.leaf("opaque", len(self.terms.made), value)
        if step.writes and name == "copy":
            name, arguments = "_to_copy", {"self": arguments["src"]}
            if self.terms[arguments["self"]].shape != value.shape:
                name = "expand"
        if slot not in (0, "written 0") or (
            slot == "written 0" and step.outs and step.outs[0] is not None
        ):
            name = f"{name}, {slot}"
        return self.terms.op(name, arguments, value.shape, value.dtype, noise, step.noise)

    def _inside(self, step: Step, value: Value) -> bool:
        """A window on the memory of a value shows nothing but what is in the value."""
        whole = self.graph.values[step.refs()[0].index]
        return Window.of(value).is_part_of(Window.of(whole))

    def _worked_out(self, step: Step, name: str) -> dict[int, Tensor]:
        """What the op makes, where that does not depend on data."""
        terms, values = self.terms, self.graph.values
        shapes_only = ops.reads_shape_only(step.op)
        made = [r for r in [*step.outs, *(new for _, new in step.writes)] if r is not None]
        entries = sum(math.prod(values[r.index].shape) for r in made)
        if "empty" in name or name.startswith("as_strided") or entries > LARGEST:
            return {}
        refs = step.refs()
        overwritten = refs[:1] if _overwrites(step) and refs.count(refs[0]) == 1 else []

        def number(ref: Ref) -> Tensor:
            if shapes_only or ref in overwritten:
                return torch.empty(values[ref.index].shape, dtype=values[ref.index].dtype)
            return terms.constants[self[ref]].clone()

        if not all(
            shapes_only or r in overwritten or self[r] in terms.constants for r in step.refs()
        ):
            return {}
        inputs = {r.index: number(r) for r in step.refs()}
        args, kwargs = filled((step.args, step.kwargs), lambda r: inputs[r.index])
        kwargs = {
            n: torch.device("cpu") if n == "device" and a is not None else a
            for n, a in kwargs.items()
        }
        try:
            with torch.no_grad():
                outs = flat(step.op(*args, **kwargs))
        except Exception:
            return {}
        found = {new.index: inputs[old.index] for old, new in step.writes}
        pairs = zip(step.outs, outs, strict=False)
        return found | {r.index: o for r, o in pairs if r is not None and isinstance(o, Tensor)}

    def _seen_through_windows(self, new: int, step: int) -> None:
        """What was written is seen by all values that show the same memory."""
        values, terms, here = self.graph.values, self.terms, _window(self.graph.values[new])
        for i in self.windows[values[new].storage]:
            if i == new or self.read_until.get(i, -1) <= step:
                continue
            there, known = _window(values[i]), [terms.constants.get(self.of[j]) for j in (i, new)]
            if there == here:
                self.of[i] = self.of[new]
            elif known[0] is not None and known[1] is not None and known[0].dtype == known[1].dtype:
                shown, written = Window.of(values[i]), Window.of(values[new])
                self.of[i] = terms.constant(overwritten(known[0], shown, known[1], written))
            else:
                both = {"was": self.of[i], "written": self.of[new]}
                self.of[i] = terms.op(
                    "through a window", both, values[i].shape, values[i].dtype, (there, here)
                )


def _overwrites(step: Step) -> bool:
    """What was there before does not matter."""
    return bool(step.writes) and ops.traits(step.op).overwrites


def _same(a: Any, default: Any) -> bool:
    return not isinstance(a, Ref | Tensor) and type(a) is type(default) and a == default


def _window(value: Value) -> tuple[Any, ...]:
    return (*Window.of(value), value.dtype)
