"""Values whose rows stand in an order that depends on the batch, as in mixture-of-experts routing.

Sorting tokens by expert permutes them in a way in which every token takes part, and undoing the permutation makes each
row belong to its sample again. A value ``v = u[p]`` with a permutation ``p`` of the batch's making is remembered as the
marks of ``u`` together with the name of ``p``. Ops that act on each row alone act on ``u``; a lookup by the inverse
permutation (or a scatter to ``p``) gives back ``u``; everything else sees a mixed value. How many rows each expert got,
and where its rows end, is remembered as ``Ends``: a product with the matrices of all experts, in which the ends say
whose turn it is, takes for each row the matrix of its own number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from unbatch.analysis.domain.ownership import Ownership, shared, unsqueeze
from unbatch.analysis.rules.registry import Rule, RuleContext
from unbatch.capture import ops
from unbatch.capture.ops import Moves

SMALL = 1 << 24  # numbers below are exact in each of these types


EXACT = (None, torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class Arranged:
    """``v = under[p]`` (or by the inverse of p). ``values``: the numbers of ``under``, where they are known."""

    under: Ownership
    permutation: int
    inverse: bool
    values: Any = None
    numbered: bool = False  # non-negative integers in ascending order: rows are sorted by them

    @property
    def order(self) -> tuple[int, bool]:
        return self.permutation, self.inverse

    @property
    def is_permutation(self) -> bool:
        n = self.under.shape[0]
        return (
            self.values is not None
            and self.values.shape == (n,)
            and np.array_equal(self.values, np.arange(n))
        )


@dataclass(frozen=True)
class Ends:
    """How often each of the ``numbers`` occurs by which rows are sorted; summed up, where its rows end."""

    numbers: Arranged
    summed: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a step made: an arranged value, or plain marks again (``marks``), for its ``slot``-th output."""

    slot: int
    arranged: Arranged | Ends | None = None
    marks: Ownership | None = None


def follow(
    call: RuleContext, step: int, all_known: Mapping[str, Arranged | Ends], rule: Rule | None
) -> list[Outcome]:
    """What is known about the outputs of a step, given which of its arguments are arranged (by argument name)."""
    ends = {k: a for k, a in all_known.items() if isinstance(a, Ends)}
    known = {k: a for k, a in all_known.items() if isinstance(a, Arranged)}
    if call.name in ("sort", "argsort"):
        return _sorted(call, step, known)
    if ends or call.name in ("histc", "bincount"):
        return _by_groups(call, known, ends)
    if not known or rule is None:
        return []
    if call.name in ("index", "index_select"):
        return _looked_up(call, known, rule)
    if call.name in ("index_put", "index_copy", "index_add", "scatter", "_index_put_impl"):
        return _written(call, known, rule)
    if len({a.order for a in known.values()}) > 1:
        return []
    first = next(iter(known.values()))
    if _row_by_row(call, known, first.under.shape[0]):
        results = _under(call, known, rule)
        same = first.numbered and ops.moves(call.op) is Moves.SAME and call["dtype"] in EXACT
        return [
            Outcome(i, Arranged(m, *first.order, _numbers(call, known), same))
            for i, m in enumerate(results)
        ]
    if call.name in ("sum", "mean") and list(known) == ["self"] and len(call.shapes) == 1:
        return [Outcome(0, marks=_under(call, known, rule)[0])]
    return []


def _permutation(n: int, name: int, inverse: bool) -> Arranged:
    return Arranged(shared((n,), "arange"), name, inverse, np.arange(n))


def _sorted(call: RuleContext, step: int, known: Mapping[str, Arranged]) -> list[Outcome]:
    x, slot = call["self"], len(call.shapes) - 1
    if len(x.shape) != 1:
        return []
    if "self" in known:
        was = known["self"]
        return (
            [Outcome(slot, _permutation(x.shape[0], was.permutation, not was.inverse))]
            if was.is_permutation and not call["descending"]
            else []
        )
    if x.mixed:
        return []
    small = lambda v: v is not None and v.min(initial=0) >= 0 and v.max(initial=0) < SMALL  # noqa: E731
    numbered = not call["descending"] and call.sees("self", small)
    values = [Outcome(0, Arranged(x, step, False, numbered=numbered))] if slot else []
    return [*values, Outcome(slot, _permutation(x.shape[0], step, False))]


def _under(call: RuleContext, known: Mapping[str, Arranged], rule: Rule) -> list[Ownership]:
    """The rule of the op, applied to the values before they were permuted."""
    marks = {k: known[k].under if k in known else a for k, a in call.arguments.items()}
    values = {k: known[k].values if k in known else v for k, v in call.values.items()}
    result = rule(replace(call, arguments=marks, values=values))
    return list(result) if isinstance(result, list | tuple) else [result]


def _numbers(call: RuleContext, known: Mapping[str, Arranged]) -> Any:
    """The op on the known numbers before they were permuted, for integer arithmetic on indices."""
    tensors = [k for k, a in call.arguments.items() if isinstance(a, Ownership)]
    numbers = {k: known[k].values if k in known else call.values.get(k) for k in tensors}
    if len(call.shapes) != 1 or any(v is None for v in numbers.values()):
        return None
    arguments = {
        k: torch.as_tensor(numbers[k]) if k in numbers else a for k, a in call.arguments.items()
    }
    out = call.op(**arguments)
    return out.numpy() if not out.is_floating_point() else None


# --- matrices that rows choose by number ----------------------------------------------------------


def _by_groups(
    call: RuleContext, known: Mapping[str, Arranged], ends: Mapping[str, Ends]
) -> list[Outcome]:
    """Counts of numbers, their sums, and products with the matrix of each row's number."""
    if call.name in ("histc", "bincount"):
        numbers, counts = known.get("self"), call.shape[0]
        every = call.name == "bincount" or (call["bins"], call["min"], call["max"]) == (
            counts,
            0,
            counts - 1,
        )
        every = every and call["weights"] is None
        ok = set(known) == {"self"} and numbers is not None and numbers.numbered and every
        return [Outcome(0, Ends(numbers))] if ok and numbers is not None else []
    if call.name == "cumsum" and not ends["self"].summed:
        return [Outcome(0, replace(ends["self"], summed=True))]
    if ops.moves(call.op) is Moves.SAME and call["dtype"] in EXACT:
        return [Outcome(0, ends["self"])]
    if (
        call.name != "_grouped_mm"
        or set(known) != {"self"}
        or "offs" not in ends
        or call["bias"] is not None
    ):
        return []
    x, matrices, groups = known["self"], call["mat2"], ends["offs"]
    if (
        not groups.summed
        or groups.numbers.order != x.order
        or matrices.depends_on_batch
        or len(matrices.shape) != 3
    ):
        return []
    a = call.algebra
    product = a.contract(call.name, [x.under, a.reduce("sum", matrices, [0])], ["no", "oi"], "ni")
    chosen = a.pointwise("matrix by number", product, unsqueeze(groups.numbers.under, 1))
    return [Outcome(0, Arranged(chosen, *x.order))]


# --- which ops act on each row alone --------------------------------------------------------------


def _other_dims(call: RuleContext) -> bool:
    x = call["self"] if call["self"] is not None else call["input"]
    dim = call["dim"]
    dims = dim if isinstance(dim, list | tuple) else [dim]
    return dim is not None and all(d % len(x.shape) != 0 for d in dims)


def _left_only(call: RuleContext, known: Mapping[str, Arranged]) -> bool:
    left = {"mm": "self", "addmm": "mat1", "linear": "input"}[call.name]
    bias: tuple[int, ...] = call["self"].shape if call.name == "addmm" else ()
    return set(known) == {left} and len(call[left].shape) > 1 and (len(bias) < 2 or bias[0] == 1)


# All entries in their order, so that as many rows as before are the same rows. Those that add an axis, or drop one, are
# asked which.
IN_ORDER = ops.names(lambda row: row.moves in (Moves.SAME, Moves.RESHAPED))


ROWS: dict[str, Callable[[RuleContext, Mapping[str, Arranged]], bool]] = {
    **dict.fromkeys(["mm", "addmm", "linear"], _left_only),
    **dict.fromkeys(["bmm", "baddbmm"], lambda c, k: len(k) == len(c.marks)),
    **dict.fromkeys(
        ["_softmax", "_log_softmax", "sum", "mean", "amax", "amin", "logsumexp", "select", "slice"],
        lambda c, k: _other_dims(c),
    ),
    **dict.fromkeys(["split", "chunk", "split_with_sizes", "unbind"], lambda c, k: _other_dims(c)),
    **dict.fromkeys(IN_ORDER, lambda c, k: True),
    "expand": lambda c, k: len(c["self"].shape) == len(c.shape),
    "unsqueeze": lambda c, k: c["dim"] % (len(c["self"].shape) + 1) != 0,
    "squeeze": lambda c, k: _other_dims(c),
    "permute": lambda c, k: c["dims"][0] == 0,
    "transpose": lambda c, k: (
        0 not in (c["dim0"] % len(c["self"].shape), c["dim1"] % len(c["self"].shape))
    ),
    "constant_pad_nd": lambda c, k: len(c["pad"]) < 2 * len(c["self"].shape),
    "native_layer_norm": lambda c, k: (
        set(k) == {"input"} and len(c["normalized_shape"]) < len(c["input"].shape)
    ),
}


def _row_by_row(call: RuleContext, known: Mapping[str, Arranged], rows: int) -> bool:
    if any(not s or s[0] != rows for s in call.shapes):
        return False
    if call.name in ROWS:
        return ROWS[call.name](call, known)
    if not ops.is_pointwise(call.op):
        return False
    ndim = len(call.shape)
    others = [m for k, m in call.arguments.items() if isinstance(m, Ownership) and k not in known]
    return all(len(a.under.shape) == ndim for a in known.values()) and all(
        len(m.shape) < ndim or m.shape[0] == 1 for m in others
    )


# --- lookups and writes ---------------------------------------------------------------------------


def _index_of(call: RuleContext, known: Mapping[str, Arranged]) -> Arranged | None:
    """The one index along dim 0, if it is arranged."""
    return (
        known.get("index")
        if call["dim"] in (0, None) and call.name != "index"
        else known.get("indices")
    )


def _looked_up(call: RuleContext, known: Mapping[str, Arranged], rule: Rule) -> list[Outcome]:
    index = _index_of(call, known)
    if index is None or _is_mask(index):
        return []
    if "self" not in known:
        return [
            Outcome(
                0,
                Arranged(
                    _with_index(call, {k: a for k, a in known.items() if k != "self"}, rule),
                    *index.order,
                ),
            )
        ]
    x = known["self"]
    if index.is_permutation and x.permutation == index.permutation and x.inverse != index.inverse:
        return [Outcome(0, marks=x.under)]
    return []


def _is_mask(index: Arranged) -> bool:
    return index.values is not None and index.values.dtype == bool


def _with_index(call: RuleContext, known: Mapping[str, Arranged], rule: Rule) -> Ownership:
    """The rule with a list of one index replaced by what it was before it was permuted."""
    arguments, values = dict(call.arguments), dict(call.values)
    for k, a in known.items():
        as_list = isinstance(arguments[k], list | tuple)
        arguments[k] = [a.under] if as_list else a.under
        values[k] = [a.values] if as_list else a.values
    result = rule(replace(call, arguments=arguments, values=values))
    return result[0] if isinstance(result, list | tuple) else result


def _written(call: RuleContext, known: Mapping[str, Arranged], rule: Rule) -> list[Outcome]:
    """Rows written to (or added at) the places they came from: the order no longer matters."""
    index = known.get("indices") if call["indices"] is not None else known.get("index")
    source = next((k for k in ("values", "source", "src") if isinstance(call[k], Ownership)), None)
    if (
        index is None
        or source is None
        or "self" in known
        or call["dim"] not in (0, None)
        or _is_mask(index)
    ):
        return []
    if len(index.under.shape) != 1 or call[source].shape != (
        *index.under.shape,
        *call["self"].shape[1:],
    ):
        return []
    rows = known.get(source)
    adding = call.name == "index_add" or bool(call["accumulate"])
    if rows is None:
        counting = (
            not adding
            and not call["reduce"]
            and call[source].shape == index.under.shape
            and call.values.get(source) is not None
        )
        if (
            counting
            and index.is_permutation
            and np.array_equal(call.values[source], np.arange(index.under.shape[0]))
        ):
            return [
                Outcome(0, _permutation(index.under.shape[0], index.permutation, not index.inverse))
            ]
        return []
    if rows.order != index.order or (index.values is None) or not (adding or index.is_permutation):
        return []
    return [
        Outcome(0, marks=_with_index(call, {k: a for k, a in known.items() if k != "self"}, rule))
    ]
