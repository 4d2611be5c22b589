"""The outputs that a loss reads: along which axis their samples lie, and which have none.

Both belong to ``F``, as a function of the parameters. What is said of single samples is about those
with an axis alone; the others, *joined outputs*, belong to the batch as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.sample_layout import prediction_dim
from unbatch.capture.graph import Graph


@dataclass(frozen=True)
class Outputs:
    """The outputs that a loss reads, by their number in the graph.

    ``axes``: of those with an axis of samples, that axis. ``joined``: those without one that
    parameters move; what parameters do not move is a constant of the loss. ``smooth``: all by which
    the loss is differentiated, in the order of the model.
    """

    axes: Mapping[int, int]
    joined: tuple[int, ...]
    smooth: tuple[int, ...]

    @staticmethod
    def of(
        graph: Graph, ownership: Mapping[int, Ownership], samples: int, leading: bool
    ) -> Outputs:
        """``leading``: samples lie along the first axis of every input."""
        axes: dict[int, int] = {}
        joined: dict[int, None] = {}
        smooth: dict[int, None] = {}
        for ref in graph.used_predictions:
            i, marks = ref.index, ownership[ref.index]
            dim = prediction_dim(marks, samples, leading)
            if dim is not None:
                axes[i] = dim
            if not _has_derivatives(graph, i):
                continue
            if dim is None and "parameters" in marks.sources:
                joined[i] = None
            if i in axes or i in joined:
                smooth[i] = None
        return Outputs(axes, tuple(joined), tuple(smooth))


def _has_derivatives(graph: Graph, value: int) -> bool:
    """Tell whether a value is no integer and no boolean."""
    dtype = graph.values[value].dtype
    return dtype.is_floating_point or dtype.is_complex
