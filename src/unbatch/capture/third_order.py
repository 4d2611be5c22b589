"""A derivative that PyTorch does not have: the third one of a batch norm or a layer norm.

Where a program takes second derivatives of such a norm, they are computed from the mean and the
deviation that the norm has kept, which autograd takes for constants. So the next derivative is
wrong without a word (layer norms, and batch norms in PyTorch 2.13), or raises.
"""

from __future__ import annotations

from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Step, indices


def norm_without_gradient(graph: Graph) -> Step | None:
    """Return the first norm whose second derivative the program goes on with; None without one."""
    if not any("_norm_backward" in step.name for step in graph.steps):
        return None
    norms: dict[int, Step] = {}  # what a norm keeps -> the norm
    differentiated: set[int] = set()  # those values that its backward pass has read
    reached = _reached_from_loss(graph)
    for step in graph.steps:
        kept = [i for i in indices(step.refs()) if i in norms]
        if _keeps_statistics(step):
            statistics = [ref for ref in step.outs[1:3] if ref is not None]
            norms.update(dict.fromkeys(indices(statistics), step))
        elif step.name == "detach" and kept:
            norms.update(dict.fromkeys(indices(step.made()), norms[kept[0]]))
            if kept[0] in differentiated:
                differentiated.update(indices(step.made()))
        elif "_backward" in step.name:
            differentiated.update(kept)
        elif step.index in reached and differentiated.intersection(kept):
            return norms[kept[0]]
    return None


def _reached_from_loss(graph: Graph) -> set[int]:
    """Return the steps that a gradient of the loss comes to: a cut ends its way."""
    steps: set[int] = set()
    values: set[int] = set()
    if graph.loss is not None:
        values.add(graph.loss.index)
    for step in reversed(graph.steps):
        if values.isdisjoint(indices(step.made())):
            continue
        if step.grad and not ops.traits(step.op).cuts:
            steps.add(step.index)
            values.update(indices(step.refs()))
    return steps


def _keeps_statistics(step: Step) -> bool:
    return ops.traits(step.op).batch_norm is not None or step.name == "native_layer_norm"
