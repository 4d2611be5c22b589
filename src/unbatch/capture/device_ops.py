"""How the ops that PyTorch picks on a GPU are recorded and replayed.

A GPU runs one fused op where a CPU runs several. Facts about them are rows of the table in
``ops.py``, and their rules stand with those of other ops. Here is what needs code: which of their
arguments matter, which op of PyTorch they are, and which of them cannot be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unbatch.capture import ops
from unbatch.capture.steps import Step
from unbatch.capture.trees import tensors_in
from unbatch.errors import MSG_RECURRENT_DROPOUT, MSG_RECURRENT_EVAL, StructureError

aten = torch.ops.aten


def decisive_arguments(op: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments whose entries decide the numbers and booleans that an op returns.

    Python reads those numbers, so that it reads the entries behind them.
    """
    # None: nothing is known of the op, and all of them may matter.
    names = ops.traits(op).answers_from
    if names is None:
        return args, kwargs
    arguments = ops.bound(op, args, kwargs)
    return tuple(arguments[name] for name in names)


def decisive_for_errors(op: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors by whose numbers an op may raise an error."""
    names = ops.raises_by(op)
    if not names:
        return []
    arguments = ops.by_argument(op, args, kwargs)
    tensors = tensors_in([arguments.get(name) for name in names])
    if ops.base_name(op) in ops.DIVIDES:
        return [t for t in tensors if not (t.is_floating_point() or t.is_complex())]
    return list(tensors)


def without_packed_weights(op: Any, args: Any) -> Any:
    """Return the arguments of a recurrence without the block of memory that holds all its weights.

    It shows again what is in the weights. On a replay those are others, and it still shows the old.
    """
    recurrence = ops.traits(op).recurrence
    if recurrence is None or not recurrence.packed:
        return args
    place = ops.argument_names(op).index(recurrence.packed)
    if place >= len(args):
        return args
    return (*args[:place], None, *args[place + 1 :])


def check_recurrences(steps: Iterable[Step], trained: Callable[[Any], bool]) -> None:
    """Raise ``StructureError`` for recurrences of a GPU that cannot be run again, or pulled back.

    The random state of a dropout inside one cannot be set, and in eval mode the libraries have no
    backward pass. ``trained``: whether a gradient is taken by a value.
    """
    for step in steps:
        recurrence = ops.traits(step.op).recurrence
        if recurrence is None:
            continue
        arguments = step.named
        place = f"{step.module or 'The model'}, {step.name}"
        if step.where:
            place = f"{place}, {step.where},"
        # The library keeps the random state to itself: another run would drop other entries.
        if step.noise:
            dropout = arguments[recurrence.dropout]
            raise StructureError(MSG_RECURRENT_DROPOUT.format(place=place, dropout=dropout))
        # In training it also returns what its backward pass needs; in eval mode it does not.
        if arguments[recurrence.training]:
            continue
        if any(map(trained, arguments[recurrence.weights])):
            raise StructureError(MSG_RECURRENT_EVAL.format(place=place))


# --- ops of a library that are ops of PyTorch under another name ----------------------------------


@dataclass(frozen=True)
class Call:
    """An op, and its arguments by place: what a step records."""

    op: Any
    args: tuple[Any, ...]


Translation = Callable[[Mapping[str, Any]], Call]


def _convolution(a: Mapping[str, Any]) -> Call:
    # Only the transposed forms have an output padding.
    transposed = "output_padding" in a
    output_padding = a.get("output_padding", [0] * len(a["stride"]))
    tensors = a["self"], a["weight"], a.get("bias")
    geometry = a["stride"], a["padding"], a["dilation"], transposed, output_padding
    return Call(aten.convolution.default, (*tensors, *geometry, a["groups"]))


def _ctc(a: Mapping[str, Any]) -> Call:
    """Return the loss whose second derivative is missing with an error.

    The library's is zero without saying so.
    """
    lengths = a["input_lengths"], a["target_lengths"]
    op = aten._ctc_loss.default
    if isinstance(lengths[0], torch.Tensor):
        op = aten._ctc_loss.Tensor
    return Call(op, (a["log_probs"], a["targets"], *lengths, a["blank"], a["zero_infinity"]))


def _grid_sampler(a: Mapping[str, Any]) -> Call:
    # The library has one form, which other names fix: the one with these arguments.
    bilinear, zeros, corners_aligned = 0, 0, True
    args = a["self"], a["grid"], bilinear, zeros, corners_aligned
    return Call(aten.grid_sampler_2d.default, args)


def _affine_grid(a: Mapping[str, Any]) -> Call:
    corners_aligned = True
    size = [a["N"], a["C"], a["H"], a["W"]]
    return Call(aten.affine_grid_generator.default, (a["theta"], size, corners_aligned))


# Only ops whose first result is the same; the others of a library are its own notes.
SAME_AS: dict[str, Translation] = {
    "cudnn_convolution": _convolution,
    "cudnn_convolution_transpose": _convolution,
    "miopen_convolution": _convolution,
    "miopen_convolution_transpose": _convolution,
    "miopen_depthwise_convolution": _convolution,
    "_cudnn_ctc_loss": _ctc,
    "miopen_ctc_loss": _ctc,
    "cudnn_grid_sampler": _grid_sampler,
    "cudnn_affine_grid_generator": _affine_grid,
}


def same_as(op: Any, args: Any, kwargs: Any) -> Call | None:
    """Return the call of PyTorch that a call of a library's op is, or None."""
    translate = SAME_AS.get(ops.full_name(op))
    if translate is None:
        return None
    return translate(ops.bound(op, args, kwargs))
