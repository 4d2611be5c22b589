"""The outputs that a loss reads: along which axis their samples lie, and which have none.

Both belong to ``F``, as a function of the parameters. What is said of single samples is about those
with an axis alone; the others, *joined outputs*, belong to the batch as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.sample_layout import prediction_dim
from unbatch.capture.graph import Graph


def sample_axes(
    graph: Graph, ownership: Mapping[int, Ownership], samples: int, leading: bool
) -> dict[int, int]:
    """Return for every output that the loss reads the axis of its samples, where there is one.

    ``leading``: samples lie along the first axis of every input.
    """
    axes: dict[int, int] = {}
    for ref in graph.used_predictions:
        dim = prediction_dim(ownership[ref.index], samples, leading)
        if dim is not None:
            axes[ref.index] = dim
    return axes


def joined_outputs(
    graph: Graph, ownership: Mapping[int, Ownership], axes: Mapping[int, int]
) -> tuple[int, ...]:
    """Return the outputs that the loss reads, parameters move, and no axis divides into samples."""
    joined: dict[int, None] = {}
    for ref in graph.used_predictions:
        # What parameters do not move is a constant of the loss.
        moves = "parameters" in ownership[ref.index].sources
        if ref.index not in axes and moves and is_number(graph, ref.index):
            joined[ref.index] = None
    return tuple(joined)


def is_number(graph: Graph, value: int) -> bool:
    """Tell whether a value has derivatives: integers and booleans have none."""
    dtype = graph.values[value].dtype
    return dtype.is_floating_point or dtype.is_complex
