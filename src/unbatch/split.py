"""Where a model that computes its own loss is cut into model and loss.

The rule: the predictions are the last values that a parameter produced, before any parameter-free op. Going up from the
loss, the first steps at which values of samples meet a parameter are the cut; a step that has no sample axis any more
and still takes a parameter (weight decay, say) is no prediction: there the split fails.
"""

from __future__ import annotations

from unbatch.graph import Graph, Ref, Step
from unbatch.walk import Walk


def split(graph: Graph, forward: Walk) -> list[int]:
    """Set the predictions and the loss steps of ``graph``; return the steps where parameters enter the loss."""
    assert graph.loss is not None
    makers = graph.makers
    cut: list[Ref] = []
    entering: list[int] = []
    seen: set[int] = set()
    queue = [graph.loss]
    while queue:
        ref = queue.pop(0)
        step = makers.get(ref.index)
        if step is None or ref.index in seen:
            continue
        seen.add(ref.index)
        if _takes_parameters(step, forward):
            if forward[ref].owned or forward[ref].mixed:
                cut.append(_reshaped(ref, graph))
                continue
            entering.append(step.index)
        queue += [r for r in step.refs() if forward[r].depends_on_batch]
    if cut:
        graph.predictions = sorted(cut, key=lambda r: r.index)
        graph.after_cut = _downstream(graph, cut)
    return entering


def _takes_parameters(step: Step, forward: Walk) -> bool:
    """Values of samples meet a parameter (or something made from parameters only) here."""
    marks = [forward[r] for r in step.refs()]
    shared = any("parameters" in m.sources and not m.depends_on_batch for m in marks)
    return shared and any(m.depends_on_batch for m in marks)


def _reshaped(ref: Ref, graph: Graph) -> Ref:
    """A linear layer flattens its input and unflattens its output: the value it means is the unflattened one."""
    users = [s for s in graph.steps if any(r.index == ref.index for r in s.refs())]
    if len(users) == 1 and users[0].name in ("view", "_unsafe_view") and users[0].outs[0] is not None:
        return users[0].outs[0]
    return ref


def _downstream(graph: Graph, cut: list[Ref]) -> frozenset[int]:
    """Steps that depend on the cut, and are not needed for it."""
    reached = {r.index for r in cut}
    needed = _upstream(graph, cut)
    out = set()
    for step in graph.steps:
        if step.index not in needed and any(r.index in reached for r in step.refs()):
            out.add(step.index)
            reached |= {r.index for r in [*(o for o in step.outs if o), *(new for _, new in step.writes)]}
    return frozenset(out)


def _upstream(graph: Graph, refs: list[Ref]) -> set[int]:
    wanted = {r.index for r in refs}
    out = set()
    for step in reversed(graph.steps):
        if wanted & {r.index for r in [*(o for o in step.outs if o), *(new for _, new in step.writes)]}:
            out.add(step.index)
            wanted |= {r.index for r in step.refs()}
    return out
