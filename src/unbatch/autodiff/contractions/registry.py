"""Which kind of contraction an op is, by its name and the argument that is the shared operand.

A new kind of site is a ``Meeting`` and one entry here: a function, marked with ``kind``, from the op as it ran to the
meeting, or to None where the arguments do not fit; the generic one then serves.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unbatch.analysis.domain.sample_layout import Scattered
from unbatch.autodiff.contractions.batch_norm import Projected, ProjectedRows
from unbatch.autodiff.contractions.broadcast import Pointwise, Scale, Shift
from unbatch.autodiff.contractions.contraction import Contraction, GenericContraction, OperandUse
from unbatch.autodiff.contractions.convolution import Convolution
from unbatch.autodiff.contractions.embedding import Embedding
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.capture import ops
from unbatch.capture.substitutes import moments

KINDS: dict[str, Callable[[OperandUse], Contraction | None]] = {}


def contraction_kind(
    names: str,
) -> Callable[
    [Callable[[OperandUse], Contraction | None]], Callable[[OperandUse], Contraction | None]
]:
    """Register a function for ops, by the names that they have without ``aten::`` (space-separated)."""

    def register(
        function: Callable[[OperandUse], Contraction | None],
    ) -> Callable[[OperandUse], Contraction | None]:
        KINDS.update(dict.fromkeys(names.split(), function))
        return function

    return register


def contraction_for(call: OperandUse) -> Contraction:
    """The kind that fits, or the generic one."""
    if (
        isinstance(call.layout, Scattered)
        or call.outputs[0].is_complex()
        or call.operand.is_complex()
        or _twice(call)
    ):
        return GenericContraction(call)
    make = KINDS.get(ops.base_name(call.op))
    found = make(call) if make is not None else None
    if found is None and call["self"] is not None and _once(call) and ops.is_pointwise(call.op):
        found = Pointwise(call)
    return found or GenericContraction(call)


def _twice(call: OperandUse) -> bool:
    """The operand stands in more than one place."""
    operand, places = call.operand, 0
    for a in call.arguments.values():
        places += a is operand if not isinstance(a, list | tuple) else sum(b is operand for b in a)
    return places > 1


def _once(call: OperandUse) -> bool:
    """The operand is an argument, broadcast against the others, and the op does not write in place."""
    return not ops.may_write(call.op) and isinstance(call.arguments.get(call.name), Tensor)


def projected(call: OperandUse, norm: OperandUse) -> Contraction:
    """The meeting of a weight, or bias, with the input of a topmost batch norm."""
    xhat, scale = normalised(norm)
    gain = scale if norm["weight"] is None else scale * norm["weight"]
    plain = contraction_for(call)
    if isinstance(plain, Linear) and call.name == "mat2" and plain.x.ndim == 2 and xhat.ndim == 2:
        return ProjectedRows(plain, gain, xhat)
    channel = 0 if call.name in ("weight", "bias", "mat1") else call.operand.ndim - 1
    return Projected(plain, channel, gain, xhat)


# --- the kinds ------------------------------------------------------------------------------------


@contraction_kind("mm bmm")
def _matmul(call: OperandUse) -> Contraction | None:
    left, right = ("mat1", "mat2") if call["mat1"] is not None else ("self", "mat2")
    a, b = call[left], call[right]
    if a.ndim == 3:
        if a.shape[0] != 1 or call.layout.dim == 0:
            return None
        a, b = a[0], b[0]
    if call.name == right and call.layout.dim == call.outputs[0].ndim - 2:
        return Linear(call, a, features_first=False)
    if call.name == left and call.layout.dim == call.outputs[0].ndim - 1:
        return Linear(call, b.T, features_first=True)
    return None


def _factor(number: float | None) -> float | None:
    return None if number in (None, 1) else number


@contraction_kind("addmm")
def _addmm(call: OperandUse) -> Contraction | None:
    if call.name == "self":
        return Shift(call, _factor(call["beta"]))
    return _matmul(call)


@contraction_kind("convolution")
def _convolution(call: OperandUse) -> Contraction | None:
    if call.layout.dim != 0 or call.name not in ("weight", "bias"):
        return None
    return Convolution(call) if call.name == "weight" else Shift(call, axis=1)


@contraction_kind("add")
def _add(call: OperandUse) -> Contraction | None:
    if isinstance(call["self"], Tensor) and isinstance(call["other"], Tensor):
        return Shift(call, _factor(call["alpha"]) if call.name == "other" else None)
    return None


@contraction_kind("sub")
def _sub(call: OperandUse) -> Contraction | None:
    return Shift(call, -(_factor(call["alpha"]) or 1) if call.name == "other" else None)


@contraction_kind("mul")
def _mul(call: OperandUse) -> Contraction | None:
    other = call["other" if call.name == "self" else "self"]
    return Scale(call, other) if isinstance(other, Tensor) else None


@contraction_kind("expand")
def _expand(call: OperandUse) -> Contraction | None:
    return Shift(call)


@contraction_kind("embedding")
def _embedding(call: OperandUse) -> Contraction | None:
    indexed = call["indices"].ndim > call.layout.dim
    return Embedding(call) if call.name == "weight" and indexed else None


@contraction_kind("native_layer_norm")
def _layer_norm(call: OperandUse) -> Contraction | None:
    if call.layout.dim >= call.outputs[0].ndim - len(call["normalized_shape"]):
        return None
    _, mean, rstd = call.outputs
    return Shift(call) if call.name == "bias" else Scale(call, call["input"], mean, rstd)


@contraction_kind("native_group_norm")
def _group_norm(call: OperandUse) -> Contraction | None:
    if call.layout.dim != 0:
        return None
    if call.name == "bias":
        return Shift(call, axis=1)
    x, groups = call["input"], call["group"]
    each = x.shape[1] // groups
    view = (len(x), x.shape[1], *[1] * (x.ndim - 2))
    mean, rstd = (
        o.reshape(len(x), groups, 1).expand(-1, -1, each).reshape(view) for o in call.outputs[1:]
    )
    return Scale(call, x, mean, rstd, axis=1)


def normalised(call: OperandUse) -> tuple[Tensor, Tensor]:
    """Return ``x̂`` of a batch norm, and ``1/σ``."""
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    x, (mean, scale) = norm.input, moments(call.op, norm, call.outputs)
    view = [1, -1, *[1] * (x.ndim - 2)]
    return (x - mean.reshape(view)) * scale.reshape(view), scale


@contraction_kind(" ".join(ops.names(lambda row: row.batch_norm)))
def _batch_norm(call: OperandUse) -> Contraction | None:
    if call.name == "bias":
        return Shift(call, axis=1)
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    view = [1, -1, *[1] * (norm.input.ndim - 2)]
    mean, scale = moments(call.op, norm, call.outputs)
    return Scale(call, norm.input, mean.reshape(view), axis=1, factor=scale.reshape(view))
