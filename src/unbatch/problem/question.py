"""One question about gradients or curvature: its context, the warnings, what its rows are called.

Arguments are valid by then (``problem.py``); which source of rows can answer it is decided in
``gradients/request.py``, and the answer is made in ``evaluate.py`` or ``curvature/ggn.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unbatch import errors
from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import TITLES
from unbatch.capture.isolation import outside_inference_mode
from unbatch.curvature.block_ggn import BlockGGN, matrix_of
from unbatch.curvature.ggn import GGN
from unbatch.curvature.point import Point
from unbatch.curvature.strategy import Curvature
from unbatch.errors import InputError, MixedSamplesWarning
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import Label, Quantity, is_moment
from unbatch.gradients.request import HOUR, Request, recorded_precision
from unbatch.problem.evaluate import answer, planned
from unbatch.problem.session import Session
from unbatch.problem.staleness import is_stale
from unbatch.running.tasks import task


@outside_inference_mode()
@dataclass(frozen=True)
class Question:
    """``by``: the decomposition; ``memory``: bytes for temporaries; ``seconds``: of time."""

    session: Session
    parameters: Mapping[str, Tensor]
    by: str
    memory: int
    seconds: float = HOUR

    @property
    def samples(self) -> int:
        return self.session.batch.samples

    @property
    def request(self) -> Request:
        """Return the question as the engine sees it."""
        analysis = self.session.analysis
        return Request(
            analysis.context,
            analysis.structure,
            self.parameters,
            self.by,
            self.memory,
            analysis.replay_difference,
            self.seconds,
        )

    def answer(
        self, quantities: Sequence[Quantity], out: Mapping[str, Tensor] | None = None
    ) -> list[Any]:
        """Return results in this order; warn where one of them is no statistic over samples."""
        analysis = self.session.analysis
        structure = analysis.structure
        # Weights of the losses of samples are read off the ownership, and exist for a sum only.
        ownership = None
        if structure.reduction:
            ownership = analysis.ownership_in_loss
        label = label_of(structure, self.by, ownership)
        _warn_of_moments(structure, quantities, label)
        # The engine switches gradients on where it needs them, and only there.
        # By the names that the user has typed.
        names = [type(quantity).__name__ for quantity in quantities]
        with task(", ".join(names)), torch.no_grad(), recorded_precision():
            return answer(self.request, quantities, label, out or {})

    def plan(self, quantities: Sequence[Quantity]) -> Plan:
        """Return what ``answer`` would do."""
        with torch.no_grad(), recorded_precision():
            return planned(self.request, quantities)

    def ggn(
        self,
        blocks: Sequence[Sequence[str]] | None,
        draws: tuple[int, int] | None,
        samples: Tensor | None,
    ) -> GGN | BlockGGN:
        """Return the matrix at the numbers of this moment; nothing is differentiated yet."""
        request = self.request
        # One curvature for all blocks: H and the linear map belong to the whole question.
        with recorded_precision():
            point = Point(request, Curvature(request), partial(is_stale, self.session))
            return matrix_of(point, blocks, draws, samples)


# --- what rows are called -------------------------------------------------------------------------

STATUS = {"fails": "it fails", "unknown": "it is unknown"}

KINDS = {"component": "per-component", "copy": "per-copy", "frozen": "frozen"}


def label_of(s: Structure, by: str, ownership: Mapping[int, Ownership] | None = None) -> Label:
    """Return what the rows are called.

    Without cross-sample dependence the three decompositions are one; they are per-sample if the
    loss has the same form for every sample, or is a sum of a term for each.
    """
    if s.joined_backward:
        return Label(by, KINDS[by], s.joined_backward, ownership)
    notes = []
    if s.joined:
        notes.append(f"{s.joined_in_words} has no sample axis: its part is in `rest`")
    own_terms = s.reduction and not s.reduction.weights_depend_on
    if not (s.independent_forward and (s.simd_loss or own_terms)):
        return Label(by, KINDS[by], ", ".join(notes), ownership)
    if not s.simd_loss:
        notes.append("of losses of their own")
    # The loss is no sum of losses of samples, or their weights depend on other samples: a row is
    # right up to that factor.
    if not s.reduction or s.reduction.weights_depend_on:
        notes.append("up to a factor that depends on the batch")
    if s.simd_loss.weights_depend_on:
        notes.append(f"of losses {s.simd_loss.note}")
    return Label(by, "per-sample", ", ".join(notes), ownership)


def _warn_of_moments(s: Structure, quantities: Sequence[Quantity], label: Label) -> None:
    """Warn where a statistic over samples is asked for and rows are no samples of anything.

    Raises ``InputError`` where there are none.
    """
    # Sums and norms of rows are exact whatever samples depend on: only moments are affected.
    moments = [type(quantity).__name__ for quantity in quantities if is_moment(quantity)]
    if moments and not s.samples:
        raise InputError(errors.MSG_EMPTY_MOMENT.format(what=", ".join(moments)))
    lost = _lost_for_moments(s)
    if moments and lost:
        text = errors.MSG_MIXED_MOMENT.format(
            what=", ".join(moments), kind=label.kind, lost=", ".join(lost), n=s.samples
        )
        errors.warn(text, MixedSamplesWarning)


def _lost_for_moments(s: Structure) -> list[str]:
    """Return in words the properties that a statistic over samples needs and the loss lacks."""
    needed = (s.simd_forward, s.reduction, s.simd_loss)
    lost = [f"{TITLES[v.name]} ({STATUS[v.status]})" for v in needed if not v]
    if s.joined_backward:
        lost.append("a backward pass that keeps samples apart (it joins them)")
    # Verdicts that hold may still let other samples in by way of the weights.
    if s.reduction and s.reduction.weights_depend_on:
        lost.append("weights that depend on no other sample (they do)")
    if s.simd_loss.weights_depend_on:
        lost.append(f"losses that depend on no other sample (they are {s.simd_loss.note})")
    return lost
