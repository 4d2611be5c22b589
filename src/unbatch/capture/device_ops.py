"""How the ops that PyTorch picks on a GPU are written down and replayed.

A GPU runs one fused op where a CPU runs several. Their rules stand with those of other ops; here
stand the facts that the recorder and the replay need. Knows ops only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unbatch.capture import ops
from unbatch.errors import MSG_RECURRENT_DROPOUT, MSG_RECURRENT_EVAL, StructureError

aten = torch.ops.aten


FUSED_DROPOUT = ("native_dropout", "_fused_dropout")


RECURRENCES = ("_cudnn_rnn", "miopen_rnn")


# The numbers and booleans that they return are read off shapes, types and the backend, never off entries.
READS_SHAPES_ONLY = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_cudnn_attention_forward",
    "_efficient_attention_forward",
    "_fused_sdp_choice",
)


# They read the lengths that they are given, and only the shapes of the rest.
READS_LENGTHS = ("_use_cudnn_ctc_loss", "_use_miopen_ctc_loss")


def bound(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments by name, with the defaults of those that were left out."""
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    names = [a.name for a in op._schema.arguments]
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def drops(op: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a fused op with a dropout of its own drops anything."""
    arguments = bound(op, args, kwargs)
    if ops.full_name(op) == "native_dropout":
        return arguments["train"] is not False
    if ops.full_name(op) in RECURRENCES:
        return bool(arguments["train"] and arguments["dropout"])
    return bool(arguments.get("dropout_p", True))


def argued(op: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return those arguments whose entries Python learns about from what the op returns."""
    if ops.full_name(op) in READS_SHAPES_ONLY:
        return ()
    if ops.full_name(op) in READS_LENGTHS:
        arguments = bound(op, args, kwargs)
        return arguments["input_lengths"], arguments["target_lengths"]
    return args, kwargs


def without_buffer(op: Any, args: Any) -> Any:
    """Return the arguments of a recurrence without cuDNN's window on the memory in which all weights lie.

    It says again what the weights say. On a replay the weights are others, and the window still shows the old ones.
    """
    if ops.full_name(op) != "_cudnn_rnn" or len(args) < 4:
        return args
    return (*args[:3], None, *args[4:])


def check_recurrences(steps: Iterable[Any], trained: Callable[[Any], bool]) -> None:
    """Raise ``StructureError`` for recurrences on a GPU that cannot be run again, or not be pulled back.

    The random state of a dropout inside of one cannot be set; in eval mode the libraries have no backward pass.
    ``trained``: whether a parameter needs a gradient.
    """
    for step in steps:
        if step.name not in RECURRENCES:
            continue
        place = f"{step.module or 'The model'}, {step.name}" + (
            f", {step.where}," if step.where else ""
        )
        if step.noise:
            raise StructureError(
                MSG_RECURRENT_DROPOUT.format(place=place, dropout=step.named["dropout"])
            )
        if not step.named["train"] and any(trained(w) for w in step.named["weight"]):
            raise StructureError(MSG_RECURRENT_EVAL.format(place=place))


# --- ops that are others under the name of a library ----------------------------------------------


@dataclass(frozen=True)
class Plain:
    """An op, and its arguments."""

    op: Any
    args: tuple[Any, ...]


def _convolution(a: Mapping[str, Any]) -> Plain:
    still = [0] * len(a["stride"])
    how = (
        a["stride"],
        a["padding"],
        a["dilation"],
        "output_padding" in a,
        a.get("output_padding", still),
        a["groups"],
    )
    return Plain(aten.convolution.default, (a["self"], a["weight"], a.get("bias"), *how))


def _ctc(a: Mapping[str, Any]) -> Plain:
    """The library's second derivative is zero without saying so; this one's is missing, and says so."""
    lengths = a["input_lengths"], a["target_lengths"]
    op = aten._ctc_loss.Tensor if isinstance(lengths[0], torch.Tensor) else aten._ctc_loss.default
    return Plain(op, (a["log_probs"], a["targets"], *lengths, a["blank"], a["zero_infinity"]))


def _grid_sampler(a: Mapping[str, Any]) -> Plain:
    bilinear, zeros, corners_aligned = 0, 0, True
    return Plain(
        aten.grid_sampler_2d.default, (a["self"], a["grid"], bilinear, zeros, corners_aligned)
    )


def _affine_grid(a: Mapping[str, Any]) -> Plain:
    corners_aligned = True
    return Plain(
        aten.affine_grid_generator.default, (a["theta"], [a[k] for k in "NCHW"], corners_aligned)
    )


SAME_AS: dict[str, Callable[[Mapping[str, Any]], Plain]] = {
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


def same_as(op: Any, args: Any, kwargs: Any) -> Plain | None:
    """Return the op of PyTorch that a library's op is, or None."""
    translate = SAME_AS.get(ops.full_name(op))
    if translate is None:
        return None
    return translate(bound(op, args, kwargs))
