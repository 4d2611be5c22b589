"""The values of recordings as terms: two values with the same term are the same function of the data.

A term is an op with the terms of its arguments, numbered the first time it is met, so that recordings that are read
with one ``Terms`` can be compared. What does not depend on data is worked out, and ops that change nothing give their
operand (``SIMPLER``). Both may rest on what is assumed of terms: the answers that Python was given when it asked.
Nothing here knows about samples, or what made the recordings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.graph import Graph, Ref, Step, Value, filled, flat

LARGEST = 1 << 22  # entries of a constant that is worked out
RESHAPES = ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten")
COPIES = ("detach", "alias", "lift_fresh", "clone", "contiguous", "positive")
OVERWRITES = ("fill", "zero", "copy", "bernoulli", "normal", "uniform", "exponential", "random")  # in place


class Contradiction(Exception):
    """No data gives all the answers that are assumed."""


@dataclass(frozen=True)
class Term:
    number: int


@dataclass(frozen=True)
class Made:
    """What a term stands for: an op without its underscore, and its arguments by name."""

    op: str
    arguments: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    moving: bool  # it depends on data, or on noise

    def operands(self) -> list[Term]:
        found: list[Term] = []
        filled(dict(self.arguments), found.append, Term)
        return found


class Terms:
    """Numbers for terms, shared by all recordings that are read with it, and what is assumed of them."""

    def __init__(self) -> None:
        self.numbers: dict[Any, Term] = {}
        self.made: list[Made] = []
        self.constants: dict[Term, Tensor] = {}
        self.assumed: dict[Term, Tensor] = {}
        self.true: set[Term] = set()  # without a zero
        self.finite: set[Term] = set()  # without an infinite entry

    def __getitem__(self, term: Term) -> Made:
        return self.made[term.number]

    # -- making them --

    def term(self, made: Made, extra: Any = ()) -> Term:
        key = made.op, _frozen(made.arguments), made.shape, made.dtype, extra
        found = self.numbers.get(key)
        if found is None:
            found = self.numbers[key] = Term(len(self.made))
            self.made.append(made)
        return self.constant(self.assumed[found]) if found in self.assumed else found

    def leaf(self, kind: str, name: Any, value: Value) -> Term:
        moving = kind in ("inputs", "targets", "opaque")
        return self.term(Made(kind, {}, value.shape, value.dtype, moving), name)

    def constant(self, tensor: Tensor) -> Term:
        tensor = tensor.detach().cpu()
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
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
    ) -> Term:
        """The term of one result of an op, or a simpler one that is the same."""
        simpler = SIMPLER.get(name)
        found = simpler(self, arguments, Made(name, {}, shape, dtype, False)) if simpler is not None else None
        if isinstance(found, Term):
            return found
        name, arguments = found if found is not None else (name, arguments)
        made = Made(name, arguments, shape, dtype, False)
        moving = noise or any(self[x].moving for x in made.operands())
        return self.term(Made(name, arguments, shape, dtype, moving), extra)

    def is_all(self, x: Any, number: float) -> bool:
        """Every entry is ``number``."""
        if isinstance(x, Term):
            return x in self.constants and bool((self.constants[x] == number).all())
        return isinstance(x, int | float) and x == number

    def same_type(self, x: Any, made: Made) -> bool:
        return isinstance(x, Term) and (self[x].shape, self[x].dtype) == (made.shape, made.dtype)

    # -- assuming --

    def assume(self, term: Term, answer: bool) -> None:
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

    def is_number(self, term: Term, number: float) -> None:
        if number == 0:
            self.assume(term, False)
        elif term not in self.constants:
            self.assumed[term] = torch.full(self[term].shape, number, dtype=self[term].dtype)


def _frozen(x: Any) -> Any:
    """To be compared: numbers by how they are written, so that 1 and 1.0 and True are three."""
    if isinstance(x, Term):
        return x
    if isinstance(x, Mapping):
        return tuple((k, _frozen(x[k])) for k in sorted(x))
    return tuple(map(_frozen, x)) if isinstance(x, list | tuple) else repr(x)


def _follows(terms: Terms, made: Made, answer: bool) -> Iterator[tuple[Term, bool]]:
    """If all entries of a term are true (or false), of which operands are all entries true, or false?"""
    x, other = made.arguments.get("self"), made.arguments.get("other")
    if not isinstance(x, Term) or 0 in made.shape:
        return
    boolean, op = terms[x].dtype == torch.bool, made.op
    cast = op == "_to_copy" and made.dtype == torch.bool
    if cast or op in ("reshape", "expand", "transpose", "permute", "all" if answer else "any"):
        yield x, answer
    elif op == "logical_not" or (op == "bitwise_not" and boolean):
        yield x, not answer
    elif op in (("bitwise_and", "logical_and", "mul") if answer else ("bitwise_or", "logical_or")) and boolean:
        yield from ((o, answer) for o in (x, other) if isinstance(o, Term))
    elif op == "isinf" and not answer:
        terms.finite.add(x)
    elif op == "ne" and answer and other == math.inf and terms[x].op == "abs":
        terms.finite.add(terms[x].arguments["self"])
    elif op in ("eq", "ne") and isinstance(other, int | float):
        if (op == "eq") != answer:
            yield from [(x, True)] if other == 0 else []
        elif terms[x].op == "sum" and isinstance(summed := terms[x].arguments.get("self"), Term):
            entries = math.prod(terms[summed].shape)
            if terms[summed].dtype == torch.bool and not terms[x].shape and other in (0, entries):
                yield summed, other == entries
        else:
            terms.is_number(x, other)


# --- ops that change nothing, or are another op ----------------------------------------------------
# Each gives a term that is the same, the op and arguments to count as, or None: as it stands.

Simpler = Callable[[Terms, Mapping[str, Any], Made], "Term | tuple[str, Mapping[str, Any]] | None"]


def _copied(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) else ("_to_copy", {"self": a["self"]})


def _reshaped(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    x = a["self"]
    if terms[x].dtype != made.dtype:
        return "view as another type", {"self": x}
    while terms[x].op == "reshape":
        x = terms[x].arguments["self"]
    return x if terms.same_type(x, made) else ("reshape", {"self": x})


def _expanded(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) else ("expand", {"self": a["self"]})


def _sliced(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) and a.get("step", 1) == 1 else None


def _sum(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    for x, y in (("self", "other"), ("other", "self")) if "alpha" not in a else ():
        if terms.same_type(a[x], made) and terms.is_all(a[y], 0):
            return a[x]
    return None


def _difference(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.same_type(a["self"], made) and terms.is_all(a["other"], 0) else None


def _product(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    for x, y in (("self", "other"), ("other", "self")):
        if terms.same_type(a[x], made) and terms.is_all(a[y], 1):
            return a[x]
    return None


def _quotient(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    plain = terms.same_type(a["self"], made) and a.get("rounding_mode") is None
    return a["self"] if plain and terms.is_all(a["other"], 1) else None


def _chosen(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    for branch, number in (("self", 1), ("other", 0)):
        if terms.is_all(a["condition"], number) and terms.same_type(a.get(branch), made):
            return a[branch]
    return None


def _filled(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    return a["self"] if terms.is_all(a["mask"], 0) and terms.same_type(a["self"], made) else None


def _as_bool(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    if made.dtype == torch.bool and a["self"] in terms.true:
        return terms.constant(torch.ones(made.shape, dtype=torch.bool))
    return _copied(terms, a, made)


def _compared(to_zero: bool) -> Simpler:
    """``x == 0`` and ``x != 0`` for x without a zero."""

    def compared(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
        known = a["self"] in terms.true and terms.is_all(a["other"], 0)
        return terms.constant(torch.full(made.shape, not to_zero)) if known else None

    return compared


def _clamped(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    """Between the largest numbers there are, what is finite stays what it is."""
    low, high = a.get("min"), a.get("max")
    if not made.dtype.is_floating_point or a["self"] not in terms.finite:
        return None
    largest = torch.finfo(made.dtype).max
    wide = all(b is None or (isinstance(b, int | float) and s * b >= largest) for s, b in ((-1, low), (1, high)))
    return a["self"] if wide and terms.same_type(a["self"], made) else None


def _softmax(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    """The safe one differs where every entry is minus infinity."""
    return "softmax", {"self": a["self"], "dim": a["dim"] % max(len(made.shape), 1)}


def _attention(terms: Terms, a: Mapping[str, Any], made: Made) -> Any:
    """Whichever kernel; a mask that hides nothing is none, and one that hides what comes later is "causal"."""
    mask, causal = a.get("attn_mask", a.get("attn_bias")), bool(a.get("is_causal", False))
    if isinstance(mask, Term) and mask in terms.constants:
        hides = terms.constants[mask] == (False if terms[mask].dtype == torch.bool else -math.inf)
        rest = terms.constants[mask][~hides]
        plain = terms[mask].dtype == torch.bool or bool((rest == 0).all())
        later = torch.ones(hides.shape[-2:], dtype=torch.bool).triu(1)
        if plain and not hides.any():
            mask = None
        elif plain and not causal and bool((hides == later).all()):
            mask, causal = None, True
    kept = {n: a.get(n) for n in ("query", "scale", "dropout_p")}
    heads = terms[a["query"]].shape[-3]
    repeated = {n: _repeated(terms, a[n], heads) for n in ("key", "value")}
    return "attention", {**kept, **repeated, "mask": mask, "causal": causal}


def _repeated(terms: Terms, x: Term, heads: int) -> Term:
    """Keys or values with as many heads as there are queries, each repeated as often as it is shared."""
    *batch, had, length, width = terms[x].shape
    if had == heads:
        return x
    dtype = terms[x].dtype
    apart = terms.op("reshape", {"self": x}, (*batch, had, 1, length, width), dtype)
    spread = terms.op("expand", {"self": apart}, (*batch, had, heads // had, length, width), dtype)
    return terms.op("reshape", {"self": spread}, (*batch, heads, length, width), dtype)


SIMPLER: dict[str, Simpler] = {
    **dict.fromkeys(COPIES, _copied),
    **dict.fromkeys(RESHAPES, _reshaped),
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
    "_softmax": _softmax,
    "_safe_softmax": _softmax,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
}


# --- reading a recording --------------------------------------------------------------------------

PLACES = ("device", "layout", "pin_memory", "memory_format", "non_blocking")  # do not matter for numbers


class Reading:
    """The terms of all values of a recording, under what ``terms`` has been told to assume."""

    def __init__(self, graph: Graph, terms: Terms) -> None:
        self.graph, self.terms = graph, terms
        self.of: dict[int, Term] = {}
        self.drawn = 0  # how often noise was
        self.windows: dict[int, list[int]] = {}  # memory -> the values that show it
        self.read_until = {r.index: s.index for s in graph.steps for r in s.refs()}
        self.read_until |= {r.index: len(graph.steps) for r in [*graph.predictions, graph.loss] if r is not None}
        for i, value in enumerate(graph.values):
            if value.kind != "step":
                self._keep(i, self._outside(i, value))
        for step in graph.steps:
            self._step(step)

    def __getitem__(self, ref: Ref) -> Term:
        return self.of[ref.index]

    def _keep(self, i: int, term: Term) -> None:
        self.of[i] = term
        self.windows.setdefault(self.graph.values[i].storage, []).append(i)

    def _outside(self, i: int, value: Value) -> Term:
        if value.kind != "constants":
            return self.terms.leaf(value.kind, value.name, value)
        assert value.concrete is not None
        if i in self.graph.foreign:  # the same where it is the same memory
            return self.terms.leaf("constants", (value.concrete.data_ptr(), value.stride), value)
        return self.terms.constant(value.concrete)

    def _step(self, step: Step) -> None:
        name = step.name if step.name.endswith("__") else step.name.removesuffix("_")
        arguments = self._arguments(step, name)
        self.drawn += step.noise
        known = {} if step.noise else self._worked_out(step, name, arguments)
        results: list[tuple[Any, Ref]] = [(i, r) for i, r in enumerate(step.outs) if r is not None]
        results += [(f"written {i}", new) for i, (_, new) in enumerate(step.writes)]
        for slot, ref in results:
            if ref.index not in self.of:
                value = self.graph.values[ref.index]
                found = self.terms.constant(known[ref.index]) if ref.index in known else None
                self._keep(ref.index, found or self._result(step, name, arguments, slot, value))
        for _, new in step.writes:
            self._seen_through_windows(new.index, step.index)

    def _arguments(self, step: Step, name: str) -> dict[str, Any]:
        given = {n: a for n, a in step.named.items() if n not in PLACES and not (step.writes and _drops(name, n))}
        plain = {n: a for n, a in given.items() if n not in step.defaults or not _same(a, step.defaults[n])}
        find = self._narrow if torch.Tag.pointwise in step.op.tags else self.__getitem__
        return {n: filled(a, find) for n, a in plain.items()}

    def _narrow(self, ref: Ref) -> Term:
        """A constant as the smallest that is broadcast to it."""
        term = self[ref]
        if term not in self.terms.constants:
            return term
        small = self.terms.constants[term]
        for d in range(small.ndim):
            if small.shape[d] > 1 and bool((small == small.narrow(d, 0, 1)).all()):
                small = small.narrow(d, 0, 1)
        while small.ndim and small.shape[0] == 1:
            small = small[0]
        return self.terms.constant(small)

    def _result(self, step: Step, name: str, arguments: Mapping[str, Any], slot: Any, value: Value) -> Term:
        """``slot``: which result of the op it is."""
        noise = self.drawn if step.noise else 0
        if "empty" in name:
            return self.terms.leaf("empty", (), value)
        if name == "as_strided" and not self._inside(step, value):
            return self.terms.leaf("opaque", len(self.terms.made), value)
        if step.writes and name == "copy":
            name, arguments = "_to_copy", {"self": arguments["src"]}
            if self.terms[arguments["self"]].shape != value.shape:
                name = "expand"
        if slot not in (0, "written 0") or (slot == "written 0" and step.outs and step.outs[0] is not None):
            name = f"{name}, {slot}"
        return self.terms.op(name, arguments, value.shape, value.dtype, noise, step.noise)

    def _inside(self, step: Step, value: Value) -> bool:
        """A window on the memory of a value shows nothing but what is in the value."""
        whole = self.graph.values[step.refs()[0].index]
        last = value.offset + sum((n - 1) * s for n, s in zip(value.shape, value.stride, strict=True))
        dense = whole.stride == torch.empty(whole.shape, device="meta").stride()
        return dense and whole.offset <= value.offset and last < whole.offset + math.prod(whole.shape)

    def _worked_out(self, step: Step, name: str, arguments: Mapping[str, Any]) -> dict[int, Tensor]:
        """What the op makes, where that does not depend on data."""
        terms, values = self.terms, self.graph.values
        shapes_only = name.startswith("new_") or name.endswith("_like")
        made = [r for r in [*step.outs, *(new for _, new in step.writes)] if r is not None]
        entries = sum(math.prod(values[r.index].shape) for r in made)
        if "empty" in name or name == "as_strided" or entries > LARGEST:
            return {}
        overwritten = step.refs()[:1] if step.writes and name in OVERWRITES else []

        def number(ref: Ref) -> Tensor:
            if shapes_only or ref in overwritten:
                return torch.empty(values[ref.index].shape, dtype=values[ref.index].dtype)
            return terms.constants[self[ref]].clone()

        if not all(shapes_only or r in overwritten or self[r] in terms.constants for r in step.refs()):
            return {}
        inputs = {r.index: number(r) for r in step.refs()}
        args, kwargs = filled((step.args, step.kwargs), lambda r: inputs[r.index])
        kwargs = {n: torch.device("cpu") if n == "device" and a is not None else a for n, a in kwargs.items()}
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
                self.of[i] = terms.constant(_overwritten(known[0], there[:3], known[1], here[:3]))
            else:
                both = {"was": self.of[i], "written": self.of[new]}
                self.of[i] = terms.op("through a window", both, values[i].shape, values[i].dtype, (there, here))


def _drops(name: str, argument: str) -> bool:
    return name in OVERWRITES and argument == "self"


def _same(a: Any, default: Any) -> bool:
    return not isinstance(a, Ref | Tensor) and type(a) is type(default) and a == default


def _window(value: Value) -> tuple[Any, ...]:
    return value.shape, value.stride, value.offset, value.dtype


def _overwritten(was: Tensor, there: tuple[Any, ...], written: Tensor, here: tuple[Any, ...]) -> Tensor:
    """What a window shows after something was written through another on the same memory."""
    last = max(o + sum((n - 1) * s for n, s in zip(sh, st, strict=True)) for sh, st, o in (there, here))
    memory = was.new_empty(last + 1)
    memory.as_strided(*there).copy_(was)
    memory.as_strided(*here).copy_(written)
    return memory.as_strided(*there).clone()
