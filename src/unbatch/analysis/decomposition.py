"""PyTorch's own definition of an op, recorded, for ops that have no rule.

What the recorded steps do to ownership is found out in ``interpreter.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map

from unbatch.analysis.rules.registry import stand_in
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step, is_ref
from unbatch.capture.tracer import Recorder


def recorded_body(
    outer: Graph, body: Callable[..., Any], step: Step
) -> tuple[Graph, dict[int, int], list[Ref | None]] | None:
    """Record the definition of an op.

    Returns the graph, its inputs (number there -> number outside) and its outputs; None where the
    definition fails on tensors without contents, or calls the op itself, and of tensors that are
    not strided.
    """
    recorder = Recorder({})
    # What is sparse or nested has no strides.
    for ref in step.refs():
        value = outer.values[ref.index]
        if len(value.stride) != len(value.shape):
            return None
    stand_ins = {r.index: stand_in(outer.values[r.index]) for r in step.refs()}

    def without_contents(leaf: Any) -> Any:
        if isinstance(leaf, Ref):
            return stand_ins[leaf.index]
        return leaf

    args, kwargs = tree_map(without_contents, (step.args, step.kwargs), is_leaf=is_ref)
    inputs: dict[int, int] = {}
    try:
        with recorder:
            for index, tensor in stand_ins.items():
                inputs[recorder.declare(tensor, "inputs", str(index)).index] = index
            result = body(*args, **kwargs)
        # A definition that calls the op itself defines nothing.
        if any(s.op is step.op for s in recorder.graph.steps):
            return None
        results = result if isinstance(result, tuple | list) else [result]
        outputs: list[Ref | None] = []
        for t in results:
            if isinstance(t, torch.Tensor):
                outputs.append(recorder.ref(t))
            else:
                outputs.append(None)
    except Exception:
        # Definitions may do anything, and without numbers much of it fails. Then the op stays
        # unknown, which is never wrong.
        return None
    return recorder.graph, inputs, outputs
