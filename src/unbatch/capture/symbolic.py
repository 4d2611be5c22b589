"""A recording read symbolically: what each of its values is as a function of data and noise.

What does not depend on data is worked out. A write through one window on a memory is seen through
the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.aliasing import Window, overwritten
from unbatch.capture.expressions import Expr, ExprTable, Operation
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.isolation import storage_of
from unbatch.capture.simplifications import result_of
from unbatch.capture.steps import Ref, Step, Value, filled
from unbatch.capture.trees import flat

# Entries of a constant that is worked out.
LARGEST = 1 << 22

# Ops after which a tensor shows another memory, or has another size.
RESEATING = ("set", "resize", "resize_as")


class SymbolicRun:
    """The expressions of all values of a recording, under what ``table`` assumes.

    ``host_reads`` has the expression of each escape of the graph, as it was when Python read it.
    """

    def __init__(self, graph: Graph, table: ExprTable) -> None:
        self.graph, self.table = graph, table
        self.expressions: dict[int, Expr] = {}
        self.history = 0  # of the draws so far
        self.host_reads: list[Expr] = []
        self.windows: dict[int, list[int]] = {}  # memory -> the values that show it
        self.read_until = graph.last_reads()
        for i, value in enumerate(graph.values):
            if value.kind != "step":
                self._enter(i, self._outside(i, value))
        # In the order of steps, as they were noted.
        waiting = list(graph.host_reads)
        for step in graph.steps:
            self._read_before(step.index, waiting)
            self._run(step)
        self._read_before(len(graph.steps), waiting)

    def __getitem__(self, ref: Ref) -> Expr:
        return self.expressions[ref.index]

    def _read_before(self, step: int, waiting: list[HostRead]) -> None:
        """Note what Python read before a step, which may write to its memory."""
        while waiting and waiting[0].step <= step:
            self.host_reads.append(self[waiting.pop(0).ref])

    def _enter(self, i: int, expr: Expr) -> None:
        """Enter the expression of a value, which now shows its memory."""
        self.expressions[i] = expr
        self.windows.setdefault(self.graph.values[i].storage, []).append(i)

    def _outside(self, i: int, value: Value) -> Expr:
        """Return the expression of a value that no step makes."""
        if value.kind != "constants":
            return self.table.leaf(value.kind, value.name, value)
        assert value.concrete is not None
        if i not in self.graph.foreign:
            return self.table.constant(value.concrete)
        # A tensor of the program that came up on the way: another recording of it has the same
        # memory, but other contents if the program writes to it.
        memory = storage_of(value.concrete), value.offset, value.stride
        return self.table.leaf("constants", memory, value)

    # -- steps --

    def _run(self, step: Step) -> None:
        """Enter the expressions of what a step makes."""
        name = ops.base_name(step.op)
        arguments = self._arguments(step)
        # Noise is no constant, whatever its operands are.
        constants: dict[int, Tensor] = {}
        if step.noise:
            self.history = self._history_after(step, name, arguments)
        else:
            constants = self._worked_out(step, name)
        for slot, ref in _results(step):
            if ref.index in self.expressions:
                continue  # an op in place returns what it has written
            if ref.index in constants:
                expr = self.table.constant(constants[ref.index])
            else:
                value = self.graph.values[ref.index]
                expr = self._result(step, name, arguments, slot, value)
            self._enter(ref.index, expr)
        for _, new in step.writes:
            self._write_through_windows(new.index, step.index)

    def _history_after(self, step: Step, name: str, arguments: Mapping[str, Any]) -> int:
        """Return the number of the history of draws after a step that draws."""
        made = []
        for ref in step.outs:
            if ref is not None:
                value = self.graph.values[ref.index]
                made.append((value.shape, value.dtype))
        return self.table.history(self.history, name, arguments, made)

    def _arguments(self, step: Step) -> dict[str, Any]:
        """Return the arguments that decide a result, by name, as expressions."""
        # A pointwise op gives the same for a constant and for what is broadcast to it.
        find = self.__getitem__
        if ops.is_pointwise(step.op):
            find = self._narrow
        defaults = step.defaults
        arguments = {}
        for name, argument in step.named.items():
            if name in ops.PLACEMENT or (name == "self" and _overwrites(step)):
                continue
            if name in defaults and _is_default(argument, defaults[name]):
                continue
            arguments[name] = filled(argument, find)
        return arguments

    def _narrow(self, ref: Ref) -> Expr:
        """Return the expression of a value; of a constant, the smallest that is broadcast to it."""
        expr = self[ref]
        if expr not in self.table.constants:
            return expr
        small = self.table.constants[expr]
        for d in range(small.ndim):
            if small.shape[d] > 1 and bool((small == small.narrow(d, 0, 1)).all()):
                small = small.narrow(d, 0, 1)
        # Down to one axis: a tensor without any would not count for the type of the result.
        while small.ndim > 1 and small.shape[0] == 1:
            small = small[0]
        return self.table.constant(small)

    def _result(
        self, step: Step, name: str, arguments: Mapping[str, Any], slot: Any, value: Value
    ) -> Expr:
        """Return the expression of one result of a step; ``slot`` says which."""
        # All empty tensors of a shape are one: a program that reads them has no function.
        if "empty" in name:
            return self.table.leaf("empty", (), value)
        if self._shows_unknown_memory(step, name, value):
            return self.table.leaf("opaque", len(self.table.operations), value)
        if name.startswith("as_strided"):
            # The window is an argument, relative to that of the operand.
            arguments = {**arguments, "of": _window(self._operand(step))}
        if step.writes and name == "copy":
            name, arguments = self._written_copy(arguments, value)
        if not _is_first(step, slot):
            name = f"{name}, {slot}"
        history = self.history if step.noise else 0
        operation = Operation(name, arguments, value.shape, value.dtype)
        return result_of(self.table, operation, history, step.noise)

    def _operand(self, step: Step) -> Value:
        """Return the first tensor that a step reads."""
        return self.graph.values[step.refs()[0].index]

    def _shows_unknown_memory(self, step: Step, name: str, value: Value) -> bool:
        """Tell whether a result may show memory that is not in the operand."""
        if name in RESEATING:
            return True
        if not name.startswith("as_strided"):
            return False
        return not Window.of(value).is_part_of(Window.of(self._operand(step)))

    def _written_copy(
        self, arguments: Mapping[str, Any], value: Value
    ) -> tuple[str, Mapping[str, Any]]:
        """Return the op that gives what ``copy_`` leaves in its operand: a cast, or a broadcast."""
        source = arguments["src"]
        if self.table[source].shape != value.shape:
            return "expand", {"self": source}
        return "_to_copy", {"self": source}

    # -- what does not depend on data --

    def _worked_out(self, step: Step, name: str) -> dict[int, Tensor]:
        """Return what an op makes, by value, if its operands are constants; else nothing."""
        if "empty" in name or name.startswith("as_strided"):
            return {}  # what is in that memory is not said
        entries = sum(math.prod(self.graph.values[ref.index].shape) for ref in step.made())
        if entries > LARGEST:
            return {}
        inputs = self._constant_inputs(step)
        if inputs is None:
            return {}
        args, kwargs = filled((step.args, step.kwargs), lambda ref: inputs[ref.index])
        # Constants of a table are on the CPU, whatever device the program has.
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            with torch.no_grad():
                outs = flat(step.op(*args, **kwargs))
        except Exception:  # no kernel on the CPU, say: then it is an expression like others
            return {}
        constants = {new.index: inputs[old.index] for old, new in step.writes}
        for ref, out in zip(step.outs, outs, strict=False):
            if ref is not None and isinstance(out, Tensor):
                constants[ref.index] = out
        return constants

    def _constant_inputs(self, step: Step) -> dict[int, Tensor] | None:
        """Return copies of the operands of a step, by value; None if one is no constant.

        Operands in which no number matters need not be constants, and may hold anything.
        """
        constants = self.table.constants
        refs = step.refs()
        shape_only: set[Ref] = set()
        if ops.reads_shape_only(step.op):
            shape_only.update(refs)
        elif _overwrites(step) and refs.count(refs[0]) == 1:
            shape_only.add(refs[0])
        for ref in refs:
            if ref not in shape_only and self[ref] not in constants:
                return None
        inputs = {}
        for ref in refs:
            if ref in shape_only:
                value = self.graph.values[ref.index]
                inputs[ref.index] = torch.empty(value.shape, dtype=value.dtype)
            else:
                inputs[ref.index] = constants[self[ref]].clone()
        return inputs

    # -- memory --

    def _write_through_windows(self, new: int, step: int) -> None:
        """Bring all values that show the memory of ``new``, and are read later, up to date."""
        values = self.graph.values
        for i in self.windows[values[new].storage]:
            if i != new and self.read_until.get(i, -1) > step:
                self.expressions[i] = self._after_write(i, new)

    def _after_write(self, i: int, new: int) -> Expr:
        """Return what value ``i`` shows after ``new`` was written to its memory."""
        table, values = self.table, self.graph.values
        shown, written = _window(values[i]), _window(values[new])
        was, content = self.expressions[i], self.expressions[new]
        if shown == written:
            return content  # all of it was overwritten
        numbers, other = table.constants.get(was), table.constants.get(content)
        if numbers is not None and other is not None and numbers.dtype == other.dtype:
            windows = Window.of(values[i]), Window.of(values[new])
            return table.constant(overwritten(numbers, windows[0], other, windows[1]))
        both = {"was": was, "written": content}
        operation = Operation("through a window", both, values[i].shape, values[i].dtype)
        return result_of(table, operation, (shown, written))


def _results(step: Step) -> Iterator[tuple[Any, Ref]]:
    """Yield a name for each result of a step, and the result."""
    for i, ref in enumerate(step.outs):
        if ref is not None:
            yield i, ref
    for i, (_, new) in enumerate(step.writes):
        yield f"written {i}", new


def _is_first(step: Step, slot: Any) -> bool:
    """Tell whether it is the result for which the op has its name.

    That is what it writes if it returns nothing.
    """
    if slot == "written 0":
        return not step.outs or step.outs[0] is None
    return bool(slot == 0)


def _overwrites(step: Step) -> bool:
    """Tell whether a step writes whatever was there before."""
    return bool(step.writes) and ops.traits(step.op).overwrites


def _is_default(argument: Any, default: Any) -> bool:
    """Tell whether an argument says what its default says, by type as well: 1 is not True."""
    if isinstance(argument, Ref | Tensor) or type(argument) is not type(default):
        return False
    return bool(argument == default)


def _window(value: Value) -> tuple[Any, ...]:
    """Return which bytes of its memory a value shows: places count entries of its type."""
    return (*Window.of(value), value.dtype)
