"""All ops on the same numbers: two of them may share a key only where they share a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cases.ops.aten import DRAWS, tensor
from cases.ops.claims import (
    DRAWS_BY_VALUE,
    UP_TO_SIGN,
    Entries,
    Outcome,
    Trial,
    claims_of,
    enter,
    interpreted,
    misshapen,
    recording_of,
    runs_of,
    tolerance,
)
from cases.ops.known import LEFT_OUT
from cases.ops.roles import Call, owned
from cases.ops.table import op_table
from cases.ops.warned import quietly
from unbatch.capture.trees import tensors_in

SKIPPED = ("set_", "resize", "_foreach", "_fused", "_test", "sparse", "_values", "empty", "new_emp")


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """PyTorch's table, and all ops of ATen that write nothing."""
    for name, op in op_table().items():
        if name not in LEFT_OUT:
            yield name, op.op
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        left_out = name in LEFT_OUT or name.startswith(SKIPPED)
        if left_out or not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in packet.overloads():
            op = getattr(packet, overload)
            if not op._schema.is_mutable:
                yield str(op), op


def returns_plain_tensors(function: Callable[..., Any], tensors: Sequence[Tensor]) -> bool:
    """Tell whether a function takes these tensors, and returns such as are in memory."""
    try:
        with quietly():
            outputs = tensors_in(function(*[t.clone() for t in tensors]))
    except Exception:
        return False
    for t in outputs:
        if t.layout != torch.strided or t.is_quantized or t.is_nested or t.device.type != "cpu":
            return False
    return True


def entered(entries: Entries, name: str, trial: Trial) -> int:
    """Enter what a function does to a batch and to another one; return how many outputs it has."""
    run = recording_of(trial)
    if isinstance(run, Outcome) or run.noisy:
        return 0
    if run.ops & {*DRAWS_BY_VALUE, *UP_TO_SIGN} or any("empty" in op for op in run.ops):
        return 0
    found = interpreted(run, trial)
    runs = runs_of(trial, run)[:2]
    if found.host_reads or misshapen(run, found) or len(runs) < 2:
        return 0
    own = enter(Entries(), claims_of(run, found), runs, [tolerance(t) for t in run.outputs])
    if own.conflict():
        return 0  # by itself: the sweep of the op says so
    enter(entries, claims_of(run, found), runs, [tolerance(t) for t in run.outputs], title=name)
    return len(run.outputs)


def collision(shapes: Sequence[tuple[int, ...]], kind: str) -> tuple[str, int]:
    """Return two ops that share a key without sharing the number ("" if none do), and how many
    outputs were compared.
    """
    entries = Entries()
    count = 0
    draws = [[tensor(s, kind, 10 * k + i) for i, s in enumerate(shapes)] for k in range(DRAWS)]
    names = [f"arg{i}" for i in range(len(shapes))]
    dims = {i: shape.index(4) for i, shape in enumerate(shapes)}
    for name, function in functions():
        if returns_plain_tensors(function, draws[0]):
            count += entered(entries, name, owned(Call(function, draws, names), dims))
    return entries.conflict(), count
