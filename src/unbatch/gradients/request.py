"""One question to the engine as plain data, and the source of rows that answers it.

A request holds what the question is about and nothing that could ask another one: the recording as
the engine sees it, the parameters, the decomposition, the memory. What is computed from the rows is
not decided here (``quantities.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbatch.analysis.structure import Structure
from unbatch.autodiff.context import Context
from unbatch.capture.device_ops import check_recurrences
from unbatch.errors import (
    MSG_HIDDEN,
    MSG_NO_ARRAY,
    MSG_NO_OUTPUT,
    MSG_NO_ROWS,
    MSG_NOT_LINEAR,
    MSG_NOT_REPLAYED,
    StructureError,
)
from unbatch.gradients.eager_rows import EagerRows
from unbatch.gradients.replayed_rows import ReplayedRows
from unbatch.gradients.self_check import trusted
from unbatch.gradients.sources import Source
from unbatch.linalg.space import Space

# Why a plan is not used: its self-check failed.
REFUTED = "the backward plan for it does not reproduce its gradient"
UNTESTED = "its gradient is not finite, so that a backward plan for it cannot be tested"


HOUR = 3600.0


@dataclass(frozen=True)
class Request:
    """What is asked: ``by`` which decomposition, with ``memory`` bytes for temporaries.

    ``replay_difference``: why the recording cannot stand for the model's derivatives, empty where
    it can. ``seconds``: for what can be counted beforehand.
    """

    context: Context
    structure: Structure
    parameters: Mapping[str, Tensor]
    by: str
    memory: int
    replay_difference: str
    seconds: float = HOUR

    @property
    def samples(self) -> int:
        return self.context.samples

    @property
    def space(self) -> Space:
        """Return names and shapes of the parameters."""
        return Space({name: tuple(p.shape) for name, p in self.parameters.items()})

    @property
    def samples_are_independent(self) -> bool:
        """Return whether all decompositions are one, because no sample depends on another."""
        if self.context.joined_backward:
            return False
        return self.samples < 2 or bool(self.structure.independent_forward)

    @property
    def planned_by(self) -> str:
        """Return the decomposition that a backward plan is made for.

        Without dependence all decompositions are one. That by component knows to whom the rows of a
        layer belong from what the predictions make of them, and not from their places: inside a
        layer, samples may be in another order.
        """
        if self.samples_are_independent:
            return "component"
        return self.by

    def of(self, parameters: Mapping[str, Tensor]) -> Request:
        """Return the same question about these parameters."""
        return replace(self, parameters=parameters)

    def on_copies(self) -> Request:
        """Return the same question on copies of parameters, buffers and data."""
        context = self.context.on_copies()
        parameters = {name: context.program.parameters[name] for name in self.parameters}
        return replace(self, context=context, parameters=parameters)

    def frozen(self) -> Request:
        """Return the same question with batch statistics held constant."""
        return replace(self, by="frozen")


def is_planned(request: Request) -> bool:
    """Return whether a backward plan of the recorded graph answers it: one that is trusted."""
    return bool(_trust(request))


def _trust(request: Request) -> bool | None:
    """Return whether there is a plan that passes its self-check; None where it cannot be tried."""
    # One sample's rows are the gradient, and a recording with other derivatives cannot be pulled
    # back.
    if request.samples < 2 or not request.context.faithful:
        return False
    with recorded_precision():
        return trusted(request.context, request.parameters, request.planned_by, request.memory)


def source_of(request: Request) -> Source:
    """Return the recorded computation where it can be trusted, and otherwise the model itself.

    Raises ``StructureError`` where no prediction has a sample axis, or where rows by this
    decomposition need the recording and cannot have it.
    """
    context, by = request.context, request.by
    check_predictions_of(request)
    check_recurrences_of(request)
    # One sample's row is the gradient, whatever that is made by.
    if request.samples > 1:
        check_linear(request)
    if not context.axes:
        shapes = list(request.structure.predictions)
        raise StructureError(MSG_NO_ROWS.format(shapes=shapes, n=request.samples))
    trust = _trust(request)
    if trust:
        return ReplayedRows(context, request.parameters, request.planned_by)
    # No plan: say why, and refuse decompositions that only a plan can give.
    why = request.replay_difference
    if request.samples > 1 and context.faithful:
        why = UNTESTED if trust is None else REFUTED
    if by != "component" and not request.samples_are_independent:
        raise StructureError(MSG_NOT_REPLAYED.format(by=by, why=why))
    independent = request.samples_are_independent
    return EagerRows(context, request.parameters, context.faithful, why, independent)


def check_linear(request: Request) -> None:
    """Raise ``StructureError`` where what PyTorch pulls back is not linear in the cotangents."""
    if request.context.not_linear:
        raise StructureError(MSG_NOT_LINEAR.format(places=request.context.not_linear))


def check_predictions_of(request: Request) -> None:
    """Raise ``StructureError`` where predictions are no tensors of numbers, or are not known."""
    graph = request.context.graph
    if graph.hides_predictions:
        raise StructureError(MSG_HIDDEN.format(what=", ".join(graph.closed)))
    if not graph.used_predictions:
        raise StructureError(MSG_NO_OUTPUT)
    for ref in graph.used_predictions:
        value = graph.values[ref.index]
        if not value.is_strided:
            raise StructureError(MSG_NO_ARRAY.format(shape=tuple(value.shape)))


def check_recurrences_of(request: Request) -> None:
    """Raise ``StructureError`` for a recurrence on a GPU that cannot be replayed."""
    graph = request.context.graph
    check_recurrences(graph.forward_steps, lambda weight: graph.values[weight.index].requires_grad)


@contextmanager
def recorded_precision() -> Iterator[None]:
    """Switch autocast off: casts were recorded where they happened."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
