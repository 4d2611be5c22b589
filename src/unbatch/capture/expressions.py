"""The values of recordings as terms: two values with the same term are the same function of the data.

A term is an op with the terms of its arguments, numbered the first time it is met, so that recordings that are read
with one ``Terms`` (``reading.py``) can be compared. Ops that change nothing give their operand (``SIMPLER``), which may
rest on what is assumed of terms: the answers that Python was given when it asked. Nothing here knows about samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.graph import Value, filled
from unbatch.capture.ops import Moves


class Contradiction(Exception):
    """No data gives all the answers that are assumed."""


@dataclass(frozen=True)
class Expr:
    number: int


@dataclass(frozen=True)
class Made:
    """What a term stands for: an op without its underscore, and its arguments by name."""

    op: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    moving: bool  # it depends on data, or on noise

    def operands(self) -> list[Expr]:
        found: list[Expr] = []
        filled(dict(self.arguments), found.append, Expr)
        return found


class ExprTable:
    """Numbers for terms, shared by all recordings that are read with it, and what is assumed of them."""

    def __init__(self) -> None:
        self.numbers: dict[Any, Expr] = {}
        self.made: list[Made] = []
        self.constants: dict[Expr, Tensor] = {}
        self.assumed: dict[Expr, Tensor] = {}
        self.true: set[Expr] = set()  # without a zero
        self.finite: set[Expr] = set()  # without an infinite entry
        self.histories: dict[Any, int] = {
            (): 0
        }  # of draws: what the state of the generator depends on

    def __getitem__(self, term: Expr) -> Made:
        return self.made[term.number]

    # -- making them --

    def term(self, made: Made, extra: Any = ()) -> Expr:
        key = made.op, _frozen(made.arguments), made.shape, made.dtype, extra
        found = self.numbers.get(key)
        if found is None:
            found = self.numbers[key] = Expr(len(self.made))
            self.made.append(made)
        return self.constant(self.assumed[found]) if found in self.assumed else found

    def leaf(self, kind: str, name: Any, value: Value) -> Expr:
        moving = kind in ("inputs", "targets", "opaque")
        return self.term(Made(kind, {}, value.shape, value.dtype, moving), name)

    def constant(self, tensor: Tensor) -> Expr:
        tensor = tensor.detach().cpu()
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
        content = flat.view(torch.uint8).numpy().tobytes()
        term = self.term(Made("constant", {}, tuple(tensor.shape), tensor.dtype, False), content)
        self.constants[term] = tensor
        return term

    def op(
        self,
        name: str,
        arguments: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        extra: Any = 0,
        noise: bool = False,
    ) -> Expr:
        """The term of one result of an op, or a simpler one that is the same."""
        simpler = SIMPLER.get(name)
        found = (
            simpler(self, arguments, Made(name, {}, shape, dtype, False))
            if simpler is not None
            else None
        )
        if isinstance(found, Expr):
            return found
        name, arguments = found if found is not None else (name, arguments)
        made = Made(name, arguments, shape, dtype, False)
        moving = noise or any(self[x].moving for x in made.operands())
        return self.term(Made(name, arguments, shape, dtype, moving), extra)

    def drawn(self, before: int, *draw: Any) -> int:
        """A number for the history of one more draw."""
        return self.histories.setdefault((before, _frozen(draw)), len(self.histories))

    def is_all(self, x: Any, number: float) -> bool:
        """Every entry is ``number``."""
        if isinstance(x, Expr):
            return x in self.constants and bool((self.constants[x] == number).all())
        return isinstance(x, int | float) and x == number

    def same_type(self, x: Any, made: Made) -> bool:
        return isinstance(x, Expr) and (self[x].shape, self[x].dtype) == (made.shape, made.dtype)

    # -- assuming --

    def assume(self, term: Expr, answer: bool) -> None:
        """All entries of ``term`` are true, or all are false; and what follows for what it was made from.

        Raises ``Contradiction`` where that cannot be.
        """
        if term in self.constants:
            if not (self.constants[term].bool() == answer).all():
                raise Contradiction
            return
        made = self[term]
        if made.dtype == torch.bool or not answer:
            self.assumed[term] = torch.full(made.shape, answer, dtype=made.dtype)
        else:
            self.true.add(term)
        for operand, follows in _follows(self, made, answer):
            self.assume(operand, follows)

    def is_number(self, term: Expr, number: float) -> None:
        if number == 0:
            self.assume(term, False)
        elif term not in self.constants:
            self.assumed[term] = torch.full(self[term].shape, number, dtype=self[term].dtype)


def _frozen(x: Any) -> Any:
    """To be compared: numbers by how they are written, so that 1 and 1.0 and True are three."""
    if isinstance(x, Expr):
        return x
    if isinstance(x, Mapping):
        return tuple((k, _frozen(x[k])) for k in sorted(x))
    return tuple(map(_frozen, x)) if isinstance(x, list | tuple) else repr(x)


def _follows(terms: ExprTable, made: Made, answer: bool) -> Iterator[tuple[Expr, bool]]:
    """If all entries of a term are true (or false), of which operands are all entries true, or false?"""
    x, other = made.arguments.get("self"), made.arguments.get("other")
    if not isinstance(x, Expr) or 0 in made.shape:
        return
    boolean, op = terms[x].dtype == torch.bool, made.op
    cast = op == "_to_copy" and made.dtype == torch.bool
    if cast or op in ("reshape", "expand", "transpose", "permute", "all" if answer else "any"):
        yield x, answer
    elif op == "logical_not" or (op == "bitwise_not" and boolean):
        yield x, not answer
    elif (
        op in (("bitwise_and", "logical_and", "mul") if answer else ("bitwise_or", "logical_or"))
        and boolean
    ):
        yield from ((o, answer) for o in (x, other) if isinstance(o, Expr))
    elif op == "isinf" and not answer:
        terms.finite.add(x)
    elif op == "ne" and answer and other == math.inf and terms[x].op == "abs":
        terms.finite.add(terms[x].arguments["self"])
    elif op in ("eq", "ne") and isinstance(other, int | float):
        if (op == "eq") != answer:
            yield from [(x, True)] if other == 0 else []
        elif terms[x].op == "sum" and isinstance(summed := terms[x].arguments.get("self"), Expr):
            entries = math.prod(terms[summed].shape)
            exact = (
                terms[summed].dtype == torch.bool and terms[x].dtype == torch.int64
            )  # nothing overflows
            if exact and not terms[x].shape and other in (0, entries):
                yield summed, other == entries
        else:
            terms.is_number(x, other)


# --- ops that change nothing, or are another op ----------------------------------------------------
# Each gives a term that is the same, the op and arguments to count as, or None: as it stands.


Simpler = Callable[
    [ExprTable, Mapping[str, Any], Made], "Expr | tuple[str, Mapping[str, Any]] | None"
]


def _copied(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) else ("_to_copy", {"self": a["self"]})


def _reshaped(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    x = a["self"]
    if terms[x].dtype != made.dtype:
        return "view as another type", {"self": x}
    while terms[x].op == "reshape":
        x = terms[x].arguments["self"]
    return x if terms.same_type(x, made) else ("reshape", {"self": x})


def _expanded(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) else ("expand", {"self": a["self"]})


def _sliced(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) and a.get("step", 1) == 1 else None


def _sum(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    for x, y in (("self", "other"), ("other", "self")) if "alpha" not in a else ():
        if terms.same_type(a[x], made) and terms.is_all(a[y], 0):
            return a[x]
    return None


def _difference(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) and terms.is_all(a["other"], 0) else None


def _product(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    for x, y in (("self", "other"), ("other", "self")):
        if terms.same_type(a[x], made) and terms.is_all(a[y], 1):
            return a[x]
    return None


def _quotient(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    plain = terms.same_type(a["self"], made) and a.get("rounding_mode") is None
    return a["self"] if plain and terms.is_all(a["other"], 1) else None


def _chosen(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    for branch, number in (("self", 1), ("other", 0)):
        if terms.is_all(a["condition"], number) and terms.same_type(a.get(branch), made):
            return a[branch]
    return None


def _filled(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.is_all(a["mask"], 0) and terms.same_type(a["self"], made) else None


def _as_bool(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    if made.dtype == torch.bool and a["self"] in terms.true:
        return terms.constant(torch.ones(made.shape, dtype=torch.bool))
    return _copied(terms, a, made)


def _compared(to_zero: bool) -> Simpler:
    """``x == 0`` and ``x != 0`` for x without a zero."""

    def compared(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
        known = a["self"] in terms.true and terms.is_all(a["other"], 0)
        return terms.constant(torch.full(made.shape, not to_zero)) if known else None

    return compared


def _clamped(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    """Between the largest numbers there are, what is finite stays what it is."""
    low, high = a.get("min"), a.get("max")
    if not made.dtype.is_floating_point or a["self"] not in terms.finite:
        return None
    largest = torch.finfo(made.dtype).max
    wide = all(
        b is None or (isinstance(b, int | float) and s * b >= largest)
        for s, b in ((-1, low), (1, high))
    )
    return a["self"] if wide and terms.same_type(a["self"], made) else None


def _attention(terms: ExprTable, a: Mapping[str, Any], made: Made) -> Any:
    """Whichever kernel; a mask that hides nothing is none, and one that hides what comes later is "causal"."""
    mask, causal = a.get("attn_mask", a.get("attn_bias")), bool(a.get("is_causal", False))
    if isinstance(mask, Expr) and mask in terms.constants:
        hides = terms.constants[mask] == (False if terms[mask].dtype == torch.bool else -math.inf)
        rest = terms.constants[mask][~hides]
        plain = terms[mask].dtype == torch.bool or bool((rest == 0).all())
        later = torch.ones(
            terms[a["query"]].shape[-2], terms[a["key"]].shape[-2], dtype=torch.bool
        ).triu(1)
        if plain and not hides.any():
            mask = None
        elif plain and not causal and bool((hides == later).all()):
            mask, causal = None, True
    kept = {n: a.get(n) for n in ("query", "scale", "dropout_p")}
    heads = terms[a["query"]].shape[-3]
    repeated = {n: _repeated(terms, a[n], heads) for n in ("key", "value")}
    return "attention", {**kept, **repeated, "mask": mask, "causal": causal}


def _repeated(terms: ExprTable, x: Expr, heads: int) -> Expr:
    """Keys or values with as many heads as there are queries, each repeated as often as it is shared."""
    *batch, had, length, width = terms[x].shape
    if had == heads:
        return x
    dtype = terms[x].dtype
    apart = terms.op("reshape", {"self": x}, (*batch, had, 1, length, width), dtype)
    spread = terms.op("expand", {"self": apart}, (*batch, had, heads // had, length, width), dtype)
    return terms.op("reshape", {"self": spread}, (*batch, heads, length, width), dtype)


SIMPLER: dict[str, Simpler] = {
    **dict.fromkeys(ops.names(lambda row: row.moves is Moves.SAME and not row.rounds), _copied),
    **dict.fromkeys(ops.names(lambda row: row.moves is Moves.RESHAPED), _reshaped),
    "_to_copy": _as_bool,
    "expand": _expanded,
    "slice": _sliced,
    "add": _sum,
    "sub": _difference,
    "mul": _product,
    "div": _quotient,
    "where": _chosen,
    "masked_fill": _filled,
    "eq": _compared(True),
    "ne": _compared(False),
    "clamp": _clamped,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
}
