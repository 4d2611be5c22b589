"""Rows permuted by a permutation that depends on the batch, as in mixture-of-experts routing.

Sorting tokens by expert permutes them in a way in which every token takes part; undoing the
permutation makes each row belong to its sample again. So beside its ownership, which is mixed, a
value ``v = u[p]`` with a permutation ``p`` of the batch's making is remembered as *permuted rows*:
the ownership of ``u``, with the name of ``p``.

    order = argsort(experts)          the permutation p
    x = tokens[order]                 rows of tokens, permuted by p
    y = f(x)                          acts on each row alone: rows of f(tokens), permuted by p
    out[order] = y                    written to where they came from: f(tokens) itself

Whatever else happens to ``v``, it sees a mixed value. How many rows each expert got, and where
its rows end, is remembered as ``RowCounts``: a product with the matrices of all experts, in which
the ends say whose turn it is, takes for each row the matrix of its own number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from unbatch.analysis.domain.ownership import Ownership, shared, unsqueeze
from unbatch.analysis.rules.indexing import is_mask
from unbatch.analysis.rules.registry import Rule, RuleContext
from unbatch.capture import ops
from unbatch.capture.ops import Moves

# Numbers of experts, and counts of them, may be cast on the way (``histc`` wants floats). In these
# types whole numbers below SMALL stay exact; None: the type stays as it is.
SMALL = 1 << 24
EXACT = (None, torch.int32, torch.int64, torch.float32, torch.float64)


@dataclass(frozen=True)
class PermutedRows:
    """A value ``v = original[p]``, or ``original`` permuted by the inverse of p.

    ``permutation``: the step that made p. ``values``: the numbers of ``original``, where known.
    ``numbered``: they are non-negative integers, and ascending in ``v``: rows are sorted by them.
    """

    original: Ownership
    permutation: int
    inverse: bool
    values: Any = None
    numbered: bool = False

    @property
    def order(self) -> tuple[int, bool]:
        """The order in which the rows are; values of the same order agree row by row."""
        return self.permutation, self.inverse

    @property
    def is_permutation(self) -> bool:
        """Whether ``v`` is p itself: the rows under it are counted through."""
        n = self.original.shape[0]
        if self.values is None or self.values.shape != (n,):
            return False
        return np.array_equal(self.values, np.arange(n))


@dataclass(frozen=True)
class RowCounts:
    """How often each of the ``numbers`` occurs by which rows are sorted; summed up, their ends."""

    numbers: PermutedRows
    summed: bool = False


@dataclass(frozen=True)
class OutputRows:
    """What is known about the ``slot``-th output of a step: permuted rows, or plain ownership."""

    slot: int
    rows: PermutedRows | RowCounts | None = None
    ownership: Ownership | None = None


Permuted = Mapping[str, PermutedRows]  # the arguments of a step that are permuted rows, by name


def follow(
    call: RuleContext,
    step: int,
    arguments: Mapping[str, PermutedRows | RowCounts],
    rule: Rule | None,
) -> list[OutputRows]:
    """Return what is known about the outputs of a step beyond what its rule says.

    ``arguments``: those of its arguments that are permuted rows, or counts of them, by name.
    """
    rows: dict[str, PermutedRows] = {}
    ends: dict[str, RowCounts] = {}
    for name, argument in arguments.items():
        if isinstance(argument, RowCounts):
            ends[name] = argument
        else:
            rows[name] = argument
    if call.name in ("sort", "argsort"):
        return _sorted(call, step, rows)
    if call.name in ("histc", "bincount"):
        return _counted(call, rows)
    if ends:
        return _by_ends(call, rows, ends)
    if not rows or rule is None:
        return []
    if call.name in ("index", "index_select"):
        return _looked_up(call, rows, rule)
    if call.name in ("index_put", "index_copy", "index_add", "scatter", "_index_put_impl"):
        return _written(call, rows, rule)
    return _row_by_row(call, rows, rule)


# --- ops that act on each row alone ---------------------------------------------------------------


def _row_by_row(call: RuleContext, rows: Permuted, rule: Rule) -> list[OutputRows]:
    """Ops that act on each row alone act on what was permuted; sums forget the order."""
    # Rows in two orders do not belong together: row i of the one is not that of the other.
    first = next(iter(rows.values()))
    if any(a.order != first.order for a in rows.values()):
        return []
    if _acts_on_rows(call, rows, first.original.shape[0]):
        sorted_still = first.numbered and _keeps_numbers(call)
        values = _numbers(call, rows)
        outputs = []
        for slot, marks in enumerate(_of_originals(call, rows, rule)):
            out = PermutedRows(marks, *first.order, values, sorted_still)
            outputs.append(OutputRows(slot, out))
        return outputs
    # A sum over the rows is the same in any order: that of u.
    if call.name in ("sum", "mean") and list(rows) == ["self"] and len(call.shapes) == 1:
        return [OutputRows(0, ownership=_of_originals(call, rows, rule)[0])]
    return []


def _keeps_numbers(call: RuleContext) -> bool:
    """Tell whether the op only copies, into a type in which small whole numbers are exact."""
    return ops.moves(call.op) is Moves.SAME and call["dtype"] in EXACT


def _of_originals(call: RuleContext, rows: Permuted, rule: Rule) -> list[Ownership]:
    """The rule of the op, applied to the values before they were permuted."""
    # f acts on each row alone, so f(u[p]) = f(u)[p]: the rule is asked about u, and p stays.
    arguments, values = dict(call.arguments), dict(call.values)
    for name, a in rows.items():
        arguments[name] = a.original
        values[name] = a.values
    result = rule(replace(call, arguments=arguments, values=values))
    if isinstance(result, list | tuple):
        return list(result)
    return [result]


def _numbers(call: RuleContext, rows: Permuted) -> Any:
    """The op on the known numbers before they were permuted: integer arithmetic on indices."""
    if len(call.shapes) != 1:
        return None
    arguments = dict(call.arguments)
    for name, argument in call.arguments.items():
        if not isinstance(argument, Ownership):
            continue
        numbers = rows[name].values if name in rows else call.values.get(name)
        if numbers is None:
            return None
        arguments[name] = torch.as_tensor(numbers)
    # Numbers have to stay numbers of rows: what becomes a fraction is of no use as an index.
    out = call.op(**arguments)
    if out.is_floating_point():
        return None
    return out.numpy()


def _left_only(call: RuleContext, rows: Permuted) -> bool:
    """Rows times a matrix, with a bias that is the same for all rows."""
    left = {"mm": "self", "addmm": "mat1", "linear": "input"}[call.name]
    if set(rows) != {left} or len(call[left].shape) < 2:
        return False
    if call.name != "addmm":
        return True
    bias = call["self"].shape
    return len(bias) < 2 or bias[0] == 1


def _all_tensors(call: RuleContext, rows: Permuted) -> bool:
    """All factors of a batched product are permuted alike."""
    return len(rows) == len(call.tensors)


def _other_dims(call: RuleContext, rows: Permuted) -> bool:
    """The op acts along dims other than the first."""
    if call["dim"] is None:
        return False
    of = "input" if call["self"] is None else "self"
    return 0 not in call.dims(of=of)


def _in_order(call: RuleContext, rows: Permuted) -> bool:
    """All entries stay in their order: as many rows as before are the same rows."""
    return True


def _expands_rows(call: RuleContext, rows: Permuted) -> bool:
    """No dim comes before that of the rows."""
    return len(call["self"].shape) == len(call.shape)


def _inserts_behind(call: RuleContext, rows: Permuted) -> bool:
    """The new dim comes behind that of the rows."""
    return call["dim"] % (len(call["self"].shape) + 1) != 0


def _permutes_behind(call: RuleContext, rows: Permuted) -> bool:
    """Rows stay the first dim."""
    return call["dims"][0] == 0


def _transposes_behind(call: RuleContext, rows: Permuted) -> bool:
    """Two dims are exchanged, neither of them that of the rows."""
    ndim = len(call["self"].shape)
    return call["dim0"] % ndim != 0 and call["dim1"] % ndim != 0


def _pads_behind(call: RuleContext, rows: Permuted) -> bool:
    """No rows are added: the pads, given from the last dim on, do not go as far as the first."""
    return len(call["pad"]) < 2 * len(call["self"].shape)


def _normalises_rows(call: RuleContext, rows: Permuted) -> bool:
    """Moments are taken within a row, with weights that are the same for all rows."""
    return set(rows) == {"input"} and len(call["normalized_shape"]) < len(call["input"].shape)


# Which ops act on each row alone, and when. Ops that are pointwise need no entry.
ALONG_DIMS = (
    "_softmax _log_softmax sum mean amax amin logsumexp select slice squeeze "
    "split chunk split_with_sizes unbind"
)
IN_ORDER = ops.names(lambda row: row.moves in (Moves.SAME, Moves.RESHAPED))

ROWS: dict[str, Callable[[RuleContext, Permuted], bool]] = {
    **dict.fromkeys(IN_ORDER, _in_order),
    **dict.fromkeys(ALONG_DIMS.split(), _other_dims),
    **dict.fromkeys(["mm", "addmm", "linear"], _left_only),
    **dict.fromkeys(["bmm", "baddbmm"], _all_tensors),
    "expand": _expands_rows,
    "unsqueeze": _inserts_behind,
    "permute": _permutes_behind,
    "transpose": _transposes_behind,
    "constant_pad_nd": _pads_behind,
    "native_layer_norm": _normalises_rows,
}


def _acts_on_rows(call: RuleContext, rows: Permuted, count: int) -> bool:
    """Tell whether row i of every output is a function of row i of the permuted arguments."""
    # Every output, as one that has no rows could not be put back into their order.
    for shape in call.shapes:
        if shape[:1] != (count,):
            return False
    if call.name in ROWS:
        return ROWS[call.name](call, rows)
    if not ops.is_pointwise(call.op):
        return False
    ndim = len(call.shape)
    for name, argument in call.arguments.items():
        if name in rows:
            aligned = len(rows[name].original.shape) == ndim
        elif isinstance(argument, Ownership):
            # Anything else has to be the same for all rows.
            aligned = len(argument.shape) < ndim or argument.shape[0] == 1
        else:
            continue
        if not aligned:
            return False
    return True


# --- sorting --------------------------------------------------------------------------------------


def _permutation(n: int, name: int, inverse: bool) -> PermutedRows:
    """The permutation of n rows that a step made, or its inverse: 0, 1, .. permuted by it."""
    return PermutedRows(shared((n,), "arange"), name, inverse, np.arange(n))


def _sorted(call: RuleContext, step: int, rows: Permuted) -> list[OutputRows]:
    """Sorting makes a permutation; sorting a permutation gives its inverse.

    The last output is where the values were, the first (of two) the values in order.
    """
    x, last = call["self"], len(call.shapes) - 1
    if len(x.shape) != 1:
        return []
    # argsort(p) is the inverse of p; sorted downwards it is that inverse, reversed: not followed.
    if "self" in rows:
        p = rows["self"]
        if call["descending"] or not p.is_permutation:
            return []
        return [OutputRows(last, _permutation(x.shape[0], p.permutation, not p.inverse))]
    if x.mixed:
        return []
    positions = OutputRows(last, _permutation(x.shape[0], step, False))
    # Rows sorted by small whole numbers can be counted by number later, as experts are.
    numbered = not call["descending"] and call.sees("self", _small_and_whole)
    if last == 0:
        return [positions]
    return [OutputRows(0, PermutedRows(x, step, False, numbered=numbered)), positions]


def _small_and_whole(values: Any) -> bool:
    """Tell whether numbers are known, not negative, and not too large to be exact."""
    return values is not None and values.min(initial=0) >= 0 and values.max(initial=0) < SMALL


# --- matrices that rows choose by number ----------------------------------------------------------


def _counted(call: RuleContext, rows: Permuted) -> list[OutputRows]:
    """How often each number occurs by which rows are sorted."""
    # With weights it is no count. Without an order nothing would say which rows the counts are of.
    if set(rows) != {"self"} or not rows["self"].numbered or call["weights"] is not None:
        return []
    if call.name == "histc":
        # One bin for each number.
        counts = call.shape[0]
        if (call["bins"], call["min"], call["max"]) != (counts, 0, counts - 1):
            return []
    return [OutputRows(0, RowCounts(rows["self"]))]


def _by_ends(call: RuleContext, rows: Permuted, ends: Mapping[str, RowCounts]) -> list[OutputRows]:
    """Counts of rows are summed up, copied, and used in a product."""
    # Counts 2, 0, 3 have the ends 2, 2, 5: rows 0 and 1 are of number 0, rows 2 to 4 of number 2.
    if call.name == "cumsum" and not ends["self"].summed:
        return [OutputRows(0, replace(ends["self"], summed=True))]
    if _keeps_numbers(call):
        return [OutputRows(0, ends["self"])]
    if call.name == "_grouped_mm" and set(rows) == {"self"} and "offs" in ends:
        return _grouped_product(call, rows["self"], ends["offs"])
    return []


def _grouped_product(call: RuleContext, x: PermutedRows, ends: RowCounts) -> list[OutputRows]:
    """Rows times the matrix of their number, [e, i, o]: before they were permuted, and of any e.

    Rows between two ends are those of one number, as long as rows and numbers are in one order.
    """
    matrices = call["mat2"]
    if call["bias"] is not None or len(matrices.shape) != 3 or matrices.depends_on_batch:
        return []
    if not ends.summed or ends.numbers.order != x.order:
        return []
    a = call.algebra
    # Which of the matrices a row is multiplied by depends on its number alone: so it is the
    # product with any of them, and then a function of that and of the number.
    any_matrix = a.reduce("sum", matrices, [0])
    product = a.contract(call.name, [x.original, any_matrix], ["no", "oi"], "ni")
    chosen = a.pointwise("matrix by number", product, unsqueeze(ends.numbers.original, 1))
    return [OutputRows(0, PermutedRows(chosen, *x.order))]


# --- lookups and writes ---------------------------------------------------------------------------


def _looked_up(call: RuleContext, rows: Permuted, rule: Rule) -> list[OutputRows]:
    """``x[p]`` is rows of x; ``x[p]`` where x is permuted by the inverse of p is what it was."""
    index = rows.get("indices" if call.name == "index" else "index")
    along_rows = call.name == "index" or call["dim"] in (0, None)
    if index is None or not along_rows or is_mask(index.values):
        return []
    x = rows.get("self")
    if x is None:
        return [OutputRows(0, PermutedRows(_with_index(call, rows, rule), *index.order))]
    # u[p][q] with q the inverse of p is u; any other order of an order is not followed.
    undone = x.permutation == index.permutation and x.inverse != index.inverse
    if index.is_permutation and undone:
        return [OutputRows(0, ownership=x.original)]
    return []


def _with_index(call: RuleContext, rows: Permuted, rule: Rule) -> Ownership:
    """The rule with an index (also in a list of one) as it was before it was permuted."""
    arguments, values = dict(call.arguments), dict(call.values)
    for name, a in rows.items():
        if isinstance(arguments[name], list | tuple):
            arguments[name], values[name] = [a.original], [a.values]
        else:
            arguments[name], values[name] = a.original, a.values
    result = rule(replace(call, arguments=arguments, values=values))
    if isinstance(result, list | tuple):
        return result[0]
    return result


def _written(call: RuleContext, rows: Permuted, rule: Rule) -> list[OutputRows]:
    """Rows written to (or added at) the places they came from: the order no longer matters."""
    index = rows.get("index" if call["indices"] is None else "indices")
    source = _source_name(call)
    if index is None or source is None or not _one_row_each(call, index, source):
        return []
    # What is written into is in place: permuted itself, it would have to be put back first.
    if "self" in rows:
        return []
    adding = call.name == "index_add" or bool(call["accumulate"])
    if source not in rows:
        return [] if adding else _inverse_by_write(call, index, source)
    if rows[source].order != index.order or index.values is None:
        return []
    if adding or index.is_permutation:
        return [OutputRows(0, ownership=_with_index(call, rows, rule))]
    # Where a place is written to twice, which row is left depends on the order after all.
    return []


def _inverse_by_write(call: RuleContext, index: PermutedRows, source: str) -> list[OutputRows]:
    """The inverse of p, made by writing 0, 1, .. to where p says."""
    # ``inverse[p] = arange(n)``, which is how programs undo a sort without sorting again.
    if call["reduce"] or not index.is_permutation or not _counts_through(call, source):
        return []
    count = index.original.shape[0]
    return [OutputRows(0, _permutation(count, index.permutation, not index.inverse))]


def _one_row_each(call: RuleContext, index: PermutedRows, source: str) -> bool:
    """Tell whether a vector of indices along the first dim has a row of the source each."""
    if call["dim"] not in (0, None) or is_mask(index.values) or len(index.original.shape) != 1:
        return False
    return call[source].shape == (*index.original.shape, *call["self"].shape[1:])


def _source_name(call: RuleContext) -> str | None:
    """The name of the argument that is written."""
    for name in ("values", "source", "src"):
        if isinstance(call[name], Ownership):
            return name
    return None


def _counts_through(call: RuleContext, name: str) -> bool:
    """Tell whether an argument is known to be the vector 0, 1, 2, .."""
    if len(call[name].shape) != 1:
        return False
    numbers = call.values.get(name)
    return numbers is not None and np.array_equal(numbers, np.arange(len(numbers)))
