"""What is special about ops that PyTorch picks on a GPU, where it is a matter of how they are written down or replayed.

A GPU runs one fused op where a CPU runs several. Their rules stand with those of other ops; here stand the facts that
the recorder and the replay need. Knows ops only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unbatch.errors import MSG_RECURRENT_DROPOUT, StructureError

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


def name_of(op: Any) -> str:
    name: str = op._schema.name
    return name.removeprefix("aten::")


def bound(op: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments by name, with the defaults of those that were left out."""
    defaults = {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}
    names = [a.name for a in op._schema.arguments]
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def drops(op: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a fused op with a dropout of its own drops anything."""
    arguments = bound(op, args, kwargs)
    if name_of(op) == "native_dropout":
        return arguments["train"] is not False
    if name_of(op) in RECURRENCES:
        return bool(arguments["train"] and arguments["dropout"])
    return bool(arguments.get("dropout_p", True))


def shown(op: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return those arguments whose entries Python learns about from what the op returns."""
    if name_of(op) in READS_SHAPES_ONLY:
        return ()
    if name_of(op) in READS_LENGTHS:
        arguments = bound(op, args, kwargs)
        return arguments["input_lengths"], arguments["target_lengths"]
    return args, kwargs


def without_buffer(op: Any, args: Any) -> Any:
    """Return the arguments of a recurrence without cuDNN's window on the memory in which all weights lie.

    It says again what the weights say. On a replay the weights are others, and the window still shows the old ones.
    """
    if name_of(op) != "_cudnn_rnn" or len(args) < 4:
        return args
    return (*args[:3], None, *args[4:])


def check_repeatable(name: str, arguments: Mapping[str, Any], place: str) -> None:
    """Raise ``StructureError`` for dropout inside of a recurrence, whose random state PyTorch does not let one set."""
    if name in RECURRENCES and arguments["train"] and arguments["dropout"]:
        raise StructureError(MSG_RECURRENT_DROPOUT.format(place=place, dropout=arguments["dropout"]))
