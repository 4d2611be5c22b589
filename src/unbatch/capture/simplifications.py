"""Ops that change nothing, or that are another op: what a symbolic expression is reduced to.

Each function gets the arguments of an op by name, and the operation as it stands (shape and type of
the result). It returns an expression that is the same, or the op and arguments to count as, or None
if there is nothing simpler. What they conclude may rest on what the table assumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unbatch.capture import ops
from unbatch.capture.expressions import Expr, ExprTable, Operation
from unbatch.capture.ops import Moves

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """One form for calls that are the same: an op, and its arguments by name."""

    op: str
    arguments: Arguments


Simpler = Callable[[ExprTable, Arguments, Operation], Expr | Form | None]


def result_of(table: ExprTable, operation: Operation, extra: Any = 0, noise: bool = False) -> Expr:
    """Return the expression of one result of an op, or a simpler one that is the same.

    ``extra`` tells apart what is otherwise equal; ``noise``: whether the op draws random numbers.
    """
    # A simplification sees the op before anything is entered, so that equal calls in different
    # words (``x + 0``, ``x.clone()``) get one expression.
    form: Expr | Form | None = None
    simpler = SIMPLER.get(operation.op)
    if simpler is not None:
        form = simpler(table, operation.arguments, operation)
    if isinstance(form, Expr):
        return form
    if form is None:
        form = Form(operation.op, operation.arguments)
    shape, dtype = operation.shape, operation.dtype
    operands = Operation(form.op, form.arguments, shape, dtype).operands()
    varies = noise or any(table[x].varies for x in operands)
    return table.expr(Operation(form.op, form.arguments, shape, dtype, varies), extra)


# --- what only moves or copies --------------------------------------------------------------------


def _same(table: ExprTable, x: Any, result: Operation) -> Expr | None:
    """Return ``x`` if it has shape and type of the result."""
    if table.same_type(x, result):
        return x
    return None


# A form names the operand alone. Shape and type of the result, which decide the rest, belong to
# every operation; arguments that say the same in other words (``size``, ``dtype``) are left out.


def _copied(table: ExprTable, a: Arguments, result: Operation) -> Expr | Form:
    return _same(table, a["self"], result) or Form("_to_copy", {"self": a["self"]})


def _cast(table: ExprTable, a: Arguments, result: Operation) -> Expr | Form:
    """Return a copy in another type; what has no zero is true everywhere."""
    if result.dtype == torch.bool and a["self"] in table.nonzero:
        return table.constant(torch.ones(result.shape, dtype=torch.bool))
    return _copied(table, a, result)


def _reshaped(table: ExprTable, a: Arguments, result: Operation) -> Expr | Form:
    """Return one reshape for a chain of them, and none for one into the shape that it has."""
    x = a["self"]
    # ``view(dtype)`` reads the same bits as other numbers.
    if table[x].dtype != result.dtype:
        return Form("view as another type", {"self": x})
    # Entries keep their order, so only the last shape counts.
    while table[x].op == "reshape":
        x = table[x].arguments["self"]
    return _same(table, x, result) or Form("reshape", {"self": x})


def _expanded(table: ExprTable, a: Arguments, result: Operation) -> Expr | Form:
    return _same(table, a["self"], result) or Form("expand", {"self": a["self"]})


def _sliced(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return the operand of a slice that takes everything."""
    if a.get("step", 1) != 1:
        return None
    return _same(table, a["self"], result)


# --- arithmetic -----------------------------------------------------------------------------------


def _without(table: ExprTable, a: Arguments, result: Operation, neutral: float) -> Expr | None:
    """Return the other operand of two if one is the neutral element."""
    for x, y in (("self", "other"), ("other", "self")):
        if table.same_type(a[x], result) and table.is_all(a[y], neutral):
            return a[x]
    return None


def _sum(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return ``x`` for ``x + 0`` and ``0 + x``."""
    # ``x + alpha · y``: an argument that is left to its default is not there.
    if "alpha" in a:
        return None
    return _without(table, a, result, 0)


def _product(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return ``x`` for ``x · 1`` and ``1 · x``."""
    return _without(table, a, result, 1)


def _difference(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return ``x`` for ``x - 0``, however often that is subtracted."""
    if not table.is_all(a["other"], 0):
        return None
    return _same(table, a["self"], result)


def _quotient(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return ``x`` for ``x / 1`` without rounding."""
    if a.get("rounding_mode") is not None or not table.is_all(a["other"], 1):
        return None
    return _same(table, a["self"], result)


def _clamped(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Between the largest numbers that there are, what is finite stays what it is."""
    if not result.dtype.is_floating_point or a["self"] not in table.finite:
        return None
    largest = torch.finfo(result.dtype).max
    if _reaches(a.get("min"), -1, largest) and _reaches(a.get("max"), 1, largest):
        return _same(table, a["self"], result)
    return None


def _reaches(bound: Any, sign: int, largest: float) -> bool:
    """Tell whether a bound of ``clamp`` lets the largest number through."""
    if bound is None:
        return True
    return isinstance(bound, int | float) and sign * bound >= largest


# --- choices and comparisons ----------------------------------------------------------------------


def _chosen(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return the branch that a constant condition takes everywhere."""
    # ``where`` takes "self" where the condition is true.
    for branch, number in (("self", 1), ("other", 0)):
        if table.is_all(a["condition"], number) and table.same_type(a.get(branch), result):
            return a[branch]
    return None


def _filled(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    """Return what a mask without a true entry leaves as it is."""
    if not table.is_all(a["mask"], 0):
        return None
    return _same(table, a["self"], result)


def _equal(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    return _compared_to_zero(table, a, result, False)


def _unequal(table: ExprTable, a: Arguments, result: Operation) -> Expr | None:
    return _compared_to_zero(table, a, result, True)


def _compared_to_zero(
    table: ExprTable, a: Arguments, result: Operation, answer: bool
) -> Expr | None:
    """Return the answer for what has no zero."""
    if a["self"] in table.nonzero and table.is_all(a["other"], 0):
        return table.constant(torch.full(result.shape, answer))
    return None


# --- attention ------------------------------------------------------------------------------------


def _attention(table: ExprTable, a: Arguments, result: Operation) -> Form:
    """Return attention, whichever kernel computes it.

    A mask that hides nothing is none, and one that hides what comes later is "causal".
    """
    mask, causal = a.get("attn_mask", a.get("attn_bias")), bool(a.get("is_causal", False))
    if isinstance(mask, Expr) and mask in table.constants:
        queries, keys = table[a["query"]].shape[-2], table[a["key"]].shape[-2]
        hidden = _hidden(table, mask)
        # Query t attends to keys up to t, counted from the first of each.
        later = torch.ones(queries, keys, dtype=torch.bool).triu(1)
        if hidden is not None and not hidden.any():
            mask = None
        elif hidden is not None and not causal and bool((hidden == later).all()):
            mask, causal = None, True
    heads = table[a["query"]].shape[-3]
    form = {name: a.get(name) for name in ("query", "scale", "dropout_p")}
    form |= {"mask": mask, "causal": causal}
    for name in ("key", "value"):
        form[name] = _for_each_head(table, a[name], heads)
    return Form("attention", form)


def _hidden(table: ExprTable, mask: Expr) -> torch.Tensor | None:
    """Return what a constant mask hides; None if it also adds numbers to what it shows."""
    numbers = table.constants[mask]
    if numbers.dtype == torch.bool:
        return numbers.logical_not()
    hidden = numbers == -math.inf
    if bool((numbers[~hidden] == 0).all()):
        return hidden
    return None


def _for_each_head(table: ExprTable, x: Expr, heads: int) -> Expr:
    """Return keys or values with as many heads as queries have; several queries may share one."""
    *batch, shared, length, width = table[x].shape
    if shared == heads:
        return x
    dtype, copies = table[x].dtype, heads // shared
    # Each head is repeated in place, ``1 1 2 2``, as PyTorch pairs them with queries.
    split, spread = (*batch, shared, 1, length, width), (*batch, shared, copies, length, width)
    x = result_of(table, Operation("reshape", {"self": x}, split, dtype))
    x = result_of(table, Operation("expand", {"self": x}, spread, dtype))
    merged = (*batch, heads, length, width)
    return result_of(table, Operation("reshape", {"self": x}, merged, dtype))


SIMPLER: dict[str, Simpler] = {
    **dict.fromkeys(ops.names(lambda row: row.moves is Moves.SAME and not row.rounds), _copied),
    **dict.fromkeys(ops.names(lambda row: row.moves is Moves.RESHAPED), _reshaped),
    **dict.fromkeys(ops.names(lambda row: row.attention), _attention),
    "_to_copy": _cast,
    "expand": _expanded,
    "slice": _sliced,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "where": _chosen,
    "masked_fill": _filled,
    "eq": _equal,
    "ne": _unequal,
    "clamp": _clamped,
}
