"""Values of recordings as symbolic expressions: equal ones are the same function of the data.

An expression is an op with the expressions of its arguments. It gets a number the first time that
it comes up in an ``ExprTable``, so that recordings read with one table (``symbolic.py``) can be
compared. The table also keeps what is assumed: the booleans that Python read, and what follows from
them. Which ops change nothing stands in ``simplifications.py``. Nothing here knows about samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.capture.steps import Value, filled


class Contradiction(Exception):
    """No data gives all the answers that are assumed."""


@dataclass(frozen=True)
class Expr:
    """The ``number``-th expression of a table."""

    number: int


@dataclass(frozen=True)
class Operation:
    """What an expression stands for: an op by its base name, and its arguments by name.

    ``varies``: whether it depends on data or on noise.
    """

    op: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    varies: bool = False

    def operands(self) -> list[Expr]:
        """Return the expressions among the arguments."""
        operands: list[Expr] = []
        filled(dict(self.arguments), operands.append, Expr)
        return operands


class ExprTable:
    """Numbers for expressions, shared by all recordings read with it, and what is assumed of them.

    ``assumed`` holds expressions all of whose entries are one number; ``nonzero`` and ``finite``
    those without a zero, or without an infinite entry.
    """

    def __init__(self) -> None:
        self.numbers: dict[Any, Expr] = {}
        self.operations: list[Operation] = []
        self.constants: dict[Expr, Tensor] = {}
        self.assumed: dict[Expr, Tensor] = {}
        self.nonzero: set[Expr] = set()
        self.finite: set[Expr] = set()
        # Noise is a function of all draws before it. Each history of draws has a number.
        self.histories: dict[Any, int] = {(): 0}

    def __getitem__(self, expr: Expr) -> Operation:
        return self.operations[expr.number]

    # -- making them --

    def expr(self, operation: Operation, extra: Any = ()) -> Expr:
        """Return the expression of an operation; ``extra`` tells apart what is otherwise equal."""
        arguments = _hashable(operation.arguments)
        key = operation.op, arguments, operation.shape, operation.dtype, extra
        expr = self.numbers.get(key)
        if expr is None:
            expr = self.numbers[key] = Expr(len(self.operations))
            self.operations.append(operation)
        # An expression with a known number is that number, from the assumption on.
        if expr in self.assumed:
            return self.constant(self.assumed[expr])
        return expr

    def leaf(self, kind: str, name: Any, value: Value) -> Expr:
        """Return the expression of a value that no step makes, or of which nothing is known."""
        varies = kind in ("inputs", "targets", "opaque")
        return self.expr(Operation(kind, {}, value.shape, value.dtype, varies), name)

    def constant(self, tensor: Tensor) -> Expr:
        """Return the expression of numbers, the same for the same bits."""
        tensor = tensor.detach().cpu()
        # Contiguous memory of its own, whose bytes can be read.
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        content = flat.view(torch.uint8).numpy().tobytes()
        expr = self.expr(Operation("constant", {}, tuple(tensor.shape), tensor.dtype), content)
        self.constants[expr] = tensor
        return expr

    def history(self, before: int, *draw: Any) -> int:
        """Return the number of the history with one more draw than the history ``before``."""
        return self.histories.setdefault((before, _hashable(draw)), len(self.histories))

    # -- questions --

    def is_all(self, x: Any, number: float) -> bool:
        """Tell whether every entry is ``number``."""
        if isinstance(x, Expr):
            return x in self.constants and bool((self.constants[x] == number).all())
        return isinstance(x, int | float) and x == number

    def same_type(self, x: Any, operation: Operation) -> bool:
        """Tell whether an argument has the shape and type that the result of an operation has."""
        if not isinstance(x, Expr):
            return False
        return (self[x].shape, self[x].dtype) == (operation.shape, operation.dtype)

    # -- assumptions --

    def assume(self, expr: Expr, answer: bool) -> None:
        """Assume that all entries of ``expr`` are true, or all false, and what follows from that.

        Raises ``Contradiction`` if no data can have it so.
        """
        # Nothing to assume of a constant, but it may say otherwise.
        if expr in self.constants:
            if not (self.constants[expr].bool() == answer).all():
                raise Contradiction
            return
        operation = self[expr]
        if operation.dtype == torch.bool or not answer:
            self.assumed[expr] = torch.full(operation.shape, answer, dtype=operation.dtype)
        else:
            self.nonzero.add(expr)  # true, but it may be any number except zero
        for operand, implied in _implied(self, operation, answer):
            self.assume(operand, implied)

    def assume_number(self, expr: Expr, number: float) -> None:
        """Assume that all entries of ``expr`` are ``number``."""
        if number == 0:
            self.assume(expr, False)
        elif expr not in self.constants:
            self.assumed[expr] = torch.full(self[expr].shape, number, dtype=self[expr].dtype)


def _hashable(x: Any) -> Any:
    """Return a key for an argument: numbers as they are written, so that 1, 1.0 and True differ."""
    if isinstance(x, Expr):
        return x
    if isinstance(x, Mapping):
        return tuple((name, _hashable(x[name])) for name in sorted(x))
    if isinstance(x, list | tuple):
        return tuple(map(_hashable, x))
    return repr(x)


# --- implications ---------------------------------------------------------------------------------
# If all entries of an expression are true (or all false), of which operands are all entries true,
# or all false? One function for each op; what they cannot say by pairs, they note in the table.

Implied = list[tuple[Expr, bool]]
Implication = Callable[[ExprTable, Operation, Expr, bool], Implied]


def _implied(table: ExprTable, operation: Operation, answer: bool) -> Implied:
    x = operation.arguments.get("self")
    # Without entries everything is true of all of them, and nothing follows.
    if not isinstance(x, Expr) or 0 in operation.shape:
        return []
    implication = IMPLICATIONS.get(operation.op)
    if implication is None:
        return []
    return implication(table, operation, x, answer)


def _cast(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    """A cast to booleans is true where the operand is not zero; others may round to zero."""
    if operation.dtype != torch.bool:
        return []
    return [(x, answer)]


def _moved(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    """All entries of the operand are in the result."""
    return [(x, answer)]


def _all(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    """If ``all`` is false, some entry is; of all of them nothing follows."""
    return [(x, True)] if answer else []


def _any(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    """If ``any`` is true, some entry is; of all of them nothing follows."""
    return [] if answer else [(x, False)]


def _not(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    # Of integers ``bitwise_not`` is another number, which may be true as well.
    if operation.op == "bitwise_not" and table[x].dtype != torch.bool:
        return []
    return [(x, not answer)]


def _and(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    """If ``x & y`` is true, both are; products count among booleans only."""
    if not answer or table[x].dtype != torch.bool:
        return []
    return _both(operation, x, True)


def _or(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    """If ``x | y`` is false, both are."""
    if answer or table[x].dtype != torch.bool:
        return []
    return _both(operation, x, False)


def _both(operation: Operation, x: Expr, answer: bool) -> Implied:
    other = operation.arguments.get("other")
    if isinstance(other, Expr):
        return [(x, answer), (other, answer)]
    return [(x, answer)]


def _is_infinite(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    if not answer:
        table.finite.add(x)
    return []


def _equal(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    number = operation.arguments.get("other")
    if not isinstance(number, int | float):
        return []
    return _compared(table, x, number, answer)


def _unequal(table: ExprTable, operation: Operation, x: Expr, answer: bool) -> Implied:
    number = operation.arguments.get("other")
    if not isinstance(number, int | float):
        return []
    if answer and number == math.inf and table[x].op == "abs":
        # |x| != inf everywhere, as ``isfinite`` is taken apart.
        table.finite.add(table[x].arguments["self"])
        return []
    return _compared(table, x, number, not answer)


def _compared(table: ExprTable, x: Expr, number: float, equal: bool) -> Implied:
    """Return what follows if all entries of ``x`` equal a number, or none does."""
    if not equal:
        return [(x, True)] if number == 0 else []
    summed = table[x].arguments.get("self")
    if table[x].op != "sum" or not isinstance(summed, Expr):
        table.assume_number(x, number)
        return []
    # ``mask.sum() == 0`` or ``== mask.numel()``: none is true, or all are. In int64, where the sum
    # of booleans cannot overflow, and over all axes.
    exact = table[summed].dtype == torch.bool and table[x].dtype == torch.int64
    entries = math.prod(table[summed].shape)
    if exact and not table[x].shape and number in (0, entries):
        return [(summed, number == entries)]
    return []


IMPLICATIONS: dict[str, Implication] = {
    "_to_copy": _cast,
    "reshape": _moved,
    "expand": _moved,
    "transpose": _moved,
    "permute": _moved,
    "all": _all,
    "any": _any,
    "logical_not": _not,
    "bitwise_not": _not,
    "bitwise_and": _and,
    "logical_and": _and,
    "mul": _and,
    "bitwise_or": _or,
    "logical_or": _or,
    "isinf": _is_infinite,
    "eq": _equal,
    "ne": _unequal,
}
