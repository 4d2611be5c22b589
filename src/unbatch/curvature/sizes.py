"""From what the cost of a question about G is counted: sizes, passes, multiplications.

Everything here is read off shapes and the recorded graph; nothing is run. Which way is taken is
decided in ``ways.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from unbatch.autodiff.jvp import differentiated
from unbatch.capture.steps import Step
from unbatch.curvature.batch_statistics import multiplications
from unbatch.curvature.strategy import Curvature, Draws
from unbatch.errors import StructureError
from unbatch.gradients.request import Request

# What it takes to start an op, in multiplications: some microseconds.
CALL = 3e5

# Of a matrix that multiplies one vector for each sample: rows are outer products.
ONE_VECTOR = ("addmm", "mm")


@dataclass(frozen=True)
class Sizes:
    """What costs are counted from.

    ``columns``: M, of the factor V; ``entries``: D, of the parameters. ``column_pulls``: whole
    backward passes that all columns take; ``dots``: multiplications for the inner product of two
    columns. ``work``, ``ops``: multiplications and ops of a forward pass.
    """

    columns: int
    entries: int
    column_pulls: float
    dots: float
    work: float
    ops: int
    element_size: int

    @property
    def of_pass(self) -> float:
        """Return the multiplications of a pass: two for each of the forward pass."""
        return 2 * self.work + CALL * self.ops

    @property
    def smaller(self) -> int:
        return min(self.columns, self.entries)


def sizes_of(curvature: Curvature, request: Request, draws: Draws) -> Sizes:
    """Return the sizes for a matrix of the parameters of ``request``."""
    columns = columns_of(curvature, request, draws)
    # Where only a part of the model is asked about, tangents begin there.
    steps = _moving(request)
    like = next(iter(request.parameters.values()))
    return Sizes(
        columns,
        request.space.size,
        pulls_of(curvature, request, columns),
        _dots(request),
        sum(multiplications(request.context.graph, step) for step in steps),
        len(steps),
        like.element_size(),
    )


def columns_of(curvature: Curvature, request: Request, draws: Draws) -> int:
    """Return how many columns V has, or may have at most: H need not be known yet."""
    root = curvature.known_root(draws)
    if root is not None:
        return root.size
    if draws is not None:
        return request.samples * draws[0]
    return sum(math.prod(shape) for shape in request.structure.predictions)


def _moving(request: Request) -> list[Step]:
    """Return the steps that tangents go through."""
    graph = request.context.graph
    try:
        return differentiated(graph, request.context.schedule(request.parameters, "component"))
    except StructureError:  # of no use for columns; products go through the model itself
        return list(graph.forward_steps)


def pulls_of(curvature: Curvature, request: Request, columns: int) -> float:
    """Return how many whole backward passes so many columns take."""
    context, structure = request.context, request.structure
    if not structure.reduction or not context.axes or context.outputs.joined:
        return columns  # each is pulled back on its own, as one vector
    of_sample = columns / max(request.samples, 1)
    try:
        plan = context.schedule(request.parameters, request.by).plan
    except StructureError:
        plan = None
    if plan is None or not context.faithful:
        # By the model: a pass for each sample, unless samples are independent.
        return of_sample if request.samples_are_independent else columns
    # With no site below the mixing, one pass carries a column of every sample.
    if not plan.columns:
        return of_sample
    # Under batch norms, columns or statistics, whichever takes less.
    passes = curvature.counted_passes(columns)
    if passes is not None:
        return passes
    lowest = max(site.step for site in plan.columns)
    return of_sample + columns * _share_until(request, lowest)


def _share_until(request: Request, last: int) -> float:
    """Return what part of a pass is made of the steps up to one."""
    graph = request.context.graph
    below, total = 0, 1
    for step in _moving(request):
        work = multiplications(graph, step)
        total += work
        if step.index <= last:
            below += work
    return below / total


def _dots(request: Request) -> float:
    """Return the multiplications of an inner product of two columns, over all parameters."""
    graph = request.context.graph
    total = float(request.space.size)
    try:
        schedule = request.context.schedule(request.parameters, request.by)
    except StructureError:
        return total
    # An inner product of outer products needs neither of them.
    for site in schedule.plan.sites:
        output = graph.steps[site.step].outs[0]
        if output is None or graph.steps[site.step].name not in ONE_VECTOR:
            continue
        if graph.values[output.index].shape[0] != request.samples:
            continue
        for name in schedule.operands.parameters_of(site.operand):
            # ⟨g ⊗ x, g' ⊗ x'⟩ = ⟨g, g'⟩⟨x, x'⟩
            shape = request.parameters[name].shape
            total += sum(shape) - math.prod(shape)
    return max(total, 1.0)
