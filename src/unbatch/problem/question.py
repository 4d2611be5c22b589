"""One question about gradients or curvature: where its rows, columns and products come from, and what they are called.

What is meant and how it is asked is settled before (``problem.py``); what is answered, after (``gradients.py``,
``ggn.py``). Which source of rows can answer it is decided in ``request.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch import errors
from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.structure import TITLES, Structure
from unbatch.capture.isolation import outside_inference_mode
from unbatch.curvature.block_ggn import BlockGGN, made_of
from unbatch.curvature.ggn import GGN, Point
from unbatch.curvature.strategy import Curvature
from unbatch.errors import MixedSamplesWarning
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import Label, Quantity, is_moment
from unbatch.gradients.request import Request, recorded_precision
from unbatch.problem.evaluate import answer, planned
from unbatch.problem.session import Session


@outside_inference_mode()
@dataclass(frozen=True)
class Question:
    """``by``: the decomposition; ``memory``: bytes for temporaries."""

    session: Session
    parameters: Mapping[str, Tensor]
    by: str
    memory: int

    @property
    def samples(self) -> int:
        return self.session.batch.samples

    @property
    def request(self) -> Request:
        """Return the question as the engine sees it."""
        analysis = self.session.analysis
        return Request(
            analysis.setting,
            analysis.structure,
            self.parameters,
            self.by,
            self.memory,
            analysis.unfaithful,
        )

    def answer(
        self, quantities: Sequence[Quantity], out: Mapping[str, Tensor] | None = None
    ) -> list[Any]:
        """Return results in this order; warn where one of them is no statistic over samples."""
        analysis = self.session.analysis
        structure = analysis.structure
        marks = analysis.marks_in_loss if structure.reduction else None
        label = label_of(structure, self.by, marks)
        _warn(structure, quantities, label)
        with torch.no_grad(), recorded_precision():
            return answer(self.request, quantities, label, out or {})

    def plan(self, quantities: Sequence[Quantity]) -> Plan:
        return planned(self.request, quantities)

    def ggn(
        self,
        blocks: Sequence[Sequence[str]] | None,
        draws: tuple[int, int] | None,
        picked: Tensor | None,
    ) -> GGN | BlockGGN:
        request = self.request
        with recorded_precision():
            at = Point(request, Curvature(request), self.session.recording.is_stale)
            return made_of(at, blocks, draws, picked)


# --- what rows are called -----------------------------------------------------------------------


def label_of(s: Structure, by: str, marks: Mapping[int, Ownership] | None = None) -> Label:
    """What the rows are: without mixing the three decompositions are one, and per-sample if the loss is, too."""
    apart = bool(s.independent_forward) and bool(s.simd_loss)
    kinds = {"component": "per-component", "copy": "per-copy", "frozen": "frozen"}
    kind = "per-sample" if apart else kinds[by]
    factor = apart and not (s.reduction and not s.reduction.weights_depend_on)
    others = apart and s.simd_loss.weights_depend_on
    notes = ["up to a factor that depends on the batch"] * factor
    notes += [f"of losses {s.simd_loss.note}"] * bool(others)
    return Label(by, kind, ", ".join(notes), marks)


def _warn(s: Structure, quantities: Sequence[Quantity], label: Label) -> None:
    asked = [type(q).__name__ for q in quantities if is_moment(q)]
    needed = (s.simd_forward, s.reduction, s.simd_loss)
    lost = [
        f"{TITLES[v.name]} ({'it fails' if v.status == 'fails' else 'it is unknown'})"
        for v in needed
        if not v
    ]
    if s.reduction and s.reduction.weights_depend_on:
        lost.append("weights that depend on no other sample (they do)")
    if s.simd_loss.weights_depend_on:
        lost.append(f"losses that listen to no other sample (they are {s.simd_loss.note})")
    if asked and lost:
        text = errors.MSG_MIXED_MOMENT.format(
            what=", ".join(asked), kind=label.kind, lost=", ".join(lost), n=s.samples
        )
        errors.warn(text, MixedSamplesWarning)
