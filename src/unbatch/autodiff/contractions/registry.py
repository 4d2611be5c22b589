"""Which kind of contraction an op is, by its name and the argument that is the shared operand.

A new kind is a ``Contraction`` and one entry here: a function, marked with ``contraction_kind``,
from the op as it ran to the contraction, or to None where the arguments do not fit; the generic one
then serves.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from unbatch.analysis.domain.sample_layout import Scattered, SeveralAxes
from unbatch.autodiff.contractions.batch_norm import Projected, ProjectedRows
from unbatch.autodiff.contractions.broadcast import ByEntry, Pointwise, Scale, Shift
from unbatch.autodiff.contractions.contraction import Contraction, GenericContraction, OperandUse
from unbatch.autodiff.contractions.convolution import Convolution
from unbatch.autodiff.contractions.convolution_by_pixel import ConvolutionByPixel
from unbatch.autodiff.contractions.embedding import Embedding
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.capture import ops
from unbatch.capture.substitutes import moments

# From an op as it ran to its contraction, or None where the arguments do not fit.
Kind = Callable[[OperandUse], Contraction | None]

KINDS: dict[str, Kind] = {}


def contraction_kind(names: str) -> Callable[[Kind], Kind]:
    """Register a function for ops, by their names without ``aten::``, separated by spaces."""

    def register(function: Kind) -> Kind:
        KINDS.update(dict.fromkeys(names.split(), function))
        return function

    return register


def contraction_for(call: OperandUse) -> Contraction:
    """Return the contraction of the kind that fits, or the generic one."""
    if not _is_regular(call):
        return GenericContraction(call)
    contraction = _of_kind(call)
    if isinstance(contraction, Shift) and isinstance(call.layout, SeveralAxes):
        contraction = _by_entry(contraction, call.layout)
    return contraction or GenericContraction(call)


def _by_entry(shift: Shift, layout: SeveralAxes) -> Contraction | None:
    """Return the contraction of an operand with entries along some of the axes of samples."""
    if len(shift.spanned) in (0, len(layout.dims)):
        return shift
    places = layout.places(shift.spanned)
    if places is None:
        return None
    return ByEntry(shift, places)


def _of_kind(call: OperandUse) -> Contraction | None:
    """Return the contraction of the kind that fits, if there is one."""
    make = KINDS.get(ops.base_name(call.op))
    if make is not None:
        contraction = make(call)
        if contraction is not None:
            return contraction
    if _is_pointwise_argument(call):
        return Pointwise(call)
    return None


def _is_regular(call: OperandUse) -> bool:
    """Return whether numbers are real, samples lie along one dim, and the operand stands once."""
    if isinstance(call.layout, Scattered):
        return False
    if call.outputs[0].is_complex() or call.operand.is_complex():
        return False
    return _uses(call) <= 1


def _uses(call: OperandUse) -> int:
    """Return how often the operand stands among the arguments, those in lists included."""
    uses = 0
    for argument in call.arguments.values():
        values = argument if isinstance(argument, list | tuple) else [argument]
        for value in values:
            uses += value is call.operand
    return uses


def _is_pointwise_argument(call: OperandUse) -> bool:
    """Return whether the operand is an argument of an elementwise op that writes nothing."""
    if call["self"] is None or ops.may_write(call.op) or not ops.is_pointwise(call.op):
        return False
    return isinstance(call.arguments.get(call.name), Tensor)


def projected(call: OperandUse, norm: OperandUse) -> Contraction:
    """Return the contraction of a weight, or bias, right below a topmost batch norm."""
    xhat, scale = normalised(norm)
    gain = scale if norm["weight"] is None else scale * norm["weight"]
    # What the op would be, were there no batch norm above it.
    plain = contraction_for(call)
    one_position = xhat.ndim == 2
    if isinstance(plain, Linear) and call.name == "mat2" and plain.x.ndim == 2 and one_position:
        return ProjectedRows(plain, gain, xhat)
    # The outputs of the op are the batch norm's channels: the operand's first dim, or its last.
    channel = 0 if call.name in ("weight", "bias", "mat1") else call.operand.ndim - 1
    return Projected(plain, channel, gain, xhat)


# --- the kinds ------------------------------------------------------------------------------------


@contraction_kind("mm bmm")
def _matmul(call: OperandUse) -> Contraction | None:
    """A product of two matrices, either of which may be the operand."""
    left = "self" if call["mat1"] is None else "mat1"
    a, b = call[left], call["mat2"]
    if a.ndim == 3:
        # A stack of one matrix is that matrix, as long as the stack is not over samples.
        if a.shape[0] != 1 or 0 in call.layout.dims:
            return None
        a, b = a[0], b[0]
    # Samples have to lie along the dim of the output that the operand has no part in.
    ndim = call.outputs[0].ndim
    if call.name == "mat2" and call.layout.dims == (ndim - 2,):
        return Linear(call, a, features_first=False)
    if call.name == left and call.layout.dims == (ndim - 1,):
        return Linear(call, b.T, features_first=True)
    return None


def _factor(number: float | None) -> float | None:
    """Return a factor of ``Shift``: None for one, which costs a multiplication otherwise."""
    if number == 1:
        return None
    return number


@contraction_kind("addmm")
def _addmm(call: OperandUse) -> Contraction | None:
    """``β·self + α·mat1 @ mat2``."""
    if call.name == "self":  # the bias
        return Shift(call, _factor(call["beta"]))
    return _matmul(call)


@contraction_kind("convolution")
def _convolution(call: OperandUse) -> Contraction | None:
    # Samples among channels are for the generic contraction.
    if 1 in call.layout.dims:
        return None
    if call.name == "bias":
        return Shift(call, axis=1)
    if call.name != "weight":
        return None
    if call.layout.dims == (0,):
        return Convolution(call)
    # Samples are pixels, or rows of pixels.
    return ConvolutionByPixel(call)


@contraction_kind("add")
def _add(call: OperandUse) -> Contraction | None:
    """``self + α·other``, both tensors."""
    if not isinstance(call["self"], Tensor) or not isinstance(call["other"], Tensor):
        return None
    if call.name == "other":
        return Shift(call, _factor(call["alpha"]))
    return Shift(call)


@contraction_kind("sub")
def _sub(call: OperandUse) -> Contraction | None:
    """``self − α·other``."""
    if call.name != "other":
        return Shift(call)
    alpha = 1 if call["alpha"] is None else call["alpha"]
    return Shift(call, -alpha)


@contraction_kind("mul")
def _mul(call: OperandUse) -> Contraction | None:
    other = call["other"] if call.name == "self" else call["self"]
    if not isinstance(other, Tensor):
        return None
    return Scale(call, other)


@contraction_kind("expand")
def _expand(call: OperandUse) -> Contraction | None:
    return Shift(call)


@contraction_kind("embedding")
def _embedding(call: OperandUse) -> Contraction | None:
    # A sample axis behind those of the indices is one of the table's own dims.
    if call.name != "weight" or call["indices"].ndim <= max(call.layout.dims):
        return None
    # What shorter samples are filled up with would be counted.
    if call.layout.padded and call["scale_grad_by_freq"]:
        return None
    return Embedding(call)


@contraction_kind("native_layer_norm")
def _layer_norm(call: OperandUse) -> Contraction | None:
    # Samples must not lie along a dim that is normalised over.
    if max(call.layout.dims) >= call.outputs[0].ndim - len(call["normalized_shape"]):
        return None
    if call.name == "bias":
        return Shift(call)
    _, mean, rstd = call.outputs
    return Scale(call, call["input"], mean, rstd)


@contraction_kind("native_group_norm")
def _group_norm(call: OperandUse) -> Contraction | None:
    if 1 in call.layout.dims:
        return None
    if call.name == "bias":
        return Shift(call, axis=1)
    _, mean, rstd = call.outputs
    return Scale(call, call["input"], _per_channel(call, mean), _per_channel(call, rstd), axis=1)


def _per_channel(call: OperandUse, statistic: Tensor) -> Tensor:
    """Return a statistic of groups ``[n, groups]`` for every channel, ``[n, c, 1, ..]``."""
    x, groups = call["input"], call["group"]
    samples, channels = x.shape[:2]
    of_groups = statistic.reshape(samples, groups, 1).expand(-1, -1, channels // groups)
    return of_groups.reshape(samples, channels, *[1] * (x.ndim - 2))


def normalised(call: OperandUse) -> tuple[Tensor, Tensor]:
    """Return ``x̂`` of a batch norm, and ``1/σ``."""
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    mean, scale = moments(call.op, norm, call.outputs)
    view = _along_channels(norm.input)
    return (norm.input - mean.reshape(view)) * scale.reshape(view), scale


def _along_channels(x: Tensor) -> list[int]:
    """Return the shape in which one number for each channel is broadcast against ``[n, c, ..]``."""
    return [1, -1, *[1] * (x.ndim - 2)]


@contraction_kind(" ".join(ops.names(lambda row: row.batch_norm)))
def _batch_norm(call: OperandUse) -> Contraction | None:
    """``weight·x̂ + bias`` with the statistics that the op used, of the batch or running ones."""
    if call.name == "bias":
        return Shift(call, axis=1)
    norm = ops.batch_norm_arguments(call.op, call.arguments)
    view = _along_channels(norm.input)
    # 1/σ is one number for each channel, as the weight is: it can be applied to the sums.
    mean, scale = moments(call.op, norm, call.outputs)
    return Scale(call, norm.input, mean.reshape(view), axis=1, factor=scale.reshape(view))
