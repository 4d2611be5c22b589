"""The noise of a recording: which values it is, and whether other data would draw another one.

Knows recordings, and nothing about samples: whose noise is whose stands in ``noise_owners.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, Step


def draws(graph: Graph) -> bool:
    """Return whether the forward pass draws random numbers."""
    return any(step.noise for step in graph.forward_steps)


def stream_depends_on_data(graph: Graph) -> bool:
    """Return whether the data decide how many random numbers are drawn.

    Poisson and gamma numbers are drawn by rejection: with another rate of one sample, all noise
    behind it is another one, that of all other samples too.
    """
    return any(step.noise and ops.draws_by_rejection(step.op) for step in graph.forward_steps)


def recorded_noise(graph: Graph) -> dict[int, Tensor]:
    """Return all noise that the recording knows, by value of the graph."""
    noise = {}
    for ref in noise_refs(graph):
        value = graph.known(ref)
        if value is not None:
            noise[ref] = value
    return noise


def noise_refs(graph: Graph) -> Iterator[int]:
    """Yield every value of the forward pass that a random op returns or writes."""
    for step in graph.forward_steps:
        if not step.noise:
            continue
        refs: set[int] = set()
        for ref in results_of(step):
            refs.add(ref.index)
        # Some ops return what they write to.
        yield from refs


def results_of(step: Step) -> Iterator[Ref]:
    """Yield what a step returns, then what it writes."""
    for ref in step.outs:
        if ref is not None:
            yield ref
    for _, new in step.writes:
        yield new
