"""Ops on lists of tensors (``torch._foreach_*``) as the same op on one tensor after the other.

That is what they are: PyTorch loops over them, or fuses the loop. Everything that is known of the
op is then known of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from unbatch.capture import ops

PREFIX = "_foreach_"

# Those that do more than a loop over the op of that name.
OTHERS = ("norm", "max", "powsum")


class Part(NamedTuple):
    """One op of the loop."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def parts_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Part] | None:
    """Return the loop that an op on lists stands for; None if it is none, or not known."""
    name = ops.full_name(func)
    if not name.startswith(PREFIX):
        return None
    single = name.removeprefix(PREFIX)
    packet = getattr(torch.ops.aten, single, None)
    if ops.stripped(single) in OTHERS or packet is None or not _is_loop(func):
        return None
    counts = {len(a) for a in [*args, *kwargs.values()] if isinstance(a, list | tuple)}
    if len(counts) != 1:
        return None
    parts = []
    for i in range(counts.pop()):
        of_one = tuple(_entry(a, i) for a in args)
        named = {key: _entry(a, i) for key, a in kwargs.items()}
        try:
            overload = torch._C._jit_resolve_packet(f"aten::{single}", *of_one, **named)
        except RuntimeError:  # it takes other arguments
            return None
        parts.append(Part(getattr(packet, overload or "default"), of_one, named))
    return parts


def _is_loop(func: Any) -> bool:
    """Tell whether an op returns a list, or writes to one and returns nothing."""
    returns = func._schema.returns
    if ops.results_given(func):
        return False
    if not returns:
        return ops.writes_in_place(func)
    return len(returns) == 1 and not func._schema.is_mutable


def _entry(argument: Any, i: int) -> Any:
    if isinstance(argument, list | tuple):
        return argument[i]
    return argument
