"""One question about gradients or curvature: where its rows, columns and products come from, and what they are called.

What is meant and how it is asked is settled before (``problem.py``); what is answered, after (``gradients.py``,
``ggn.py``). Here the recording is asked whether it can stand for the model, and the way is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from unbatch import errors
from unbatch.blocks import BlockGGN, made_of
from unbatch.cotangents import LossAt
from unbatch.curvature import Curvature, Through
from unbatch.device_ops import check_recurrences
from unbatch.errors import MixedSamplesWarning, StructureError
from unbatch.ggn import GGN, Point
from unbatch.gradients import Label, answer, is_moment, planned
from unbatch.linearised import Linearised, LinearisedModel
from unbatch.plan import Plan
from unbatch.purity import outside_inference_mode
from unbatch.quantities import Quantity
from unbatch.recording import Recording
from unbatch.sources import Ran, Recorded, Source
from unbatch.statistics import Statistics
from unbatch.tree import Space
from unbatch.trust import trusted
from unbatch.verdicts import TITLES, Structure
from unbatch.weights import weights


@outside_inference_mode("_answered")
@dataclass(frozen=True)
class Question:
    """``by``: the decomposition; ``memory``: bytes for temporaries."""

    kept: Recording
    parameters: Mapping[str, Tensor]
    by: str
    memory: int

    @property
    def samples(self) -> int:
        return self.kept.batch.samples

    # -- what is answered --

    def answer(self, quantities: Sequence[Quantity], out: Mapping[str, Tensor] | None = None) -> list[Any]:
        """Their results in this order; warns where one of them is no statistic over samples."""
        kept, structure = self.kept, self.kept.structure
        known = partial(weights, kept.graph, kept.marks_in_loss, self.samples) if structure.reduction else lambda: None
        label = label_of(structure, self.by, known)
        _warn(structure, quantities, label)
        return self._answered(quantities, label, out or {})

    def plan(self, quantities: Sequence[Quantity]) -> Plan:
        source = self.source()
        curvature = cache(lambda: self.curvature(source.loss))
        return planned(source, quantities, self.parameters, self.samples, self.by, self.memory, curvature)

    def ggn(
        self, blocks: Sequence[Sequence[str]] | None, draws: tuple[int, int] | None, picked: Tensor | None
    ) -> GGN | BlockGGN:
        kept, curvature = self.kept, cache(self.curvature)
        kept.structure  # noqa: B018  settled before anything is kept

        def ask(quantities: Sequence[Quantity], parameters: Mapping[str, Tensor]) -> list[Any]:
            label = label_of(kept.structure, self.by, lambda: None)
            return replace(self, parameters=parameters)._answered(quantities, label, {}, curvature)

        with _precision_of_recording():
            at = Point(self.parameters, self.samples, curvature, ask, kept.is_stale, self.memory)
            return made_of(at, blocks, draws, picked)

    def _answered(
        self, quantities: Sequence[Quantity], label: Label, out: Mapping[str, Tensor],
        curvature: Callable[[], Curvature] | None = None,
    ) -> list[Any]:  # fmt: skip
        with torch.no_grad(), _precision_of_recording():
            source = self.source()
            curved = curvature or cache(lambda: self.curvature(source.loss))
            return answer(source, quantities, self.parameters, self.samples, label, self.memory, out, curved)

    # -- where it comes from --

    def source(self) -> Source:
        """The recorded computation where it can be trusted, and otherwise the model itself."""
        setting, structure, why = self.kept.setting, self.kept.structure, self.kept.replays
        self._check_recurrences()
        if not setting.axes:
            raise StructureError(errors.MSG_NO_ROWS.format(shapes=list(structure.predictions), n=self.samples))
        if self.samples > 1 and setting.faithful:
            with _precision_of_recording():
                if trusted(setting, self.parameters, self.by, self.memory):
                    return Recorded(setting, self.parameters, self.by)
            why = "the sweep that was planned for it does not reproduce its gradient"
        alike = self.samples == 1 or bool(structure.independent_forward)
        if not (alike or self.by == "component"):
            raise StructureError(errors.MSG_NOT_REPLAYED.format(by=self.by, why=why))
        return Ran(setting, self.parameters, setting.faithful, why)

    def _check_recurrences(self) -> None:
        graph = self.kept.setting.graph
        check_recurrences(graph.forward_steps, lambda weight: graph.values[weight.index].requires_grad)

    def curvature(self, loss: LossAt | None = None) -> Curvature:
        """``loss``: where the sweep for the rows has left it, if there was one."""
        setting, linearise = self.kept.setting, cache(self._linearised)
        if loss is None:
            lin = linearise()
            loss = LossAt(setting, lin.predictions, lin.inner, lin.all_outputs)
        dims = {i: d for i, d in setting.axes.items() if i in loss.predictions}
        through = self._through if self.by == "component" else lambda: None
        return Curvature(loss, dims, self.kept.structure, linearise, through, self.memory)

    def _linearised(self) -> Linearised:
        setting = self.kept.setting
        self._check_recurrences()
        if setting.faithful:
            return Linearised(setting, self.parameters, self.by == "frozen")
        if self.by == "frozen" and not self.kept.structure.independent_forward:
            raise StructureError(errors.MSG_NOT_REPLAYED.format(by=self.by, why=self.kept.replays))
        return LinearisedModel(setting, self.parameters)

    def _through(self) -> Through | None:
        """Where samples listen to each other by batch norms alone, and in more than one place."""
        source = self.source()
        if not isinstance(source, Recorded) or not source.flow.columns:
            return None
        statistics = Statistics.of(self.kept.setting, self.parameters)
        if statistics is None:
            return None
        frozen = lambda some: replace(self, by="frozen", parameters=some).source()  # noqa: E731
        return Through(statistics, frozen, Space({n: tuple(p.shape) for n, p in self.parameters.items()}))


# --- what rows are called -----------------------------------------------------------------------


def label_of(s: Structure, by: str, known: Callable[[], Tensor | None]) -> Label:
    """What the rows are: without mixing the three decompositions are one, and per-sample if the loss is, too."""
    apart = bool(s.independent_forward) and bool(s.simd_loss)
    kinds = {"component": "per-component", "copy": "per-copy", "frozen": "frozen"}
    kind = "per-sample" if apart else kinds[by]
    factor = apart and not (s.reduction and not s.reduction.weights_depend_on)
    others = apart and s.simd_loss.weights_depend_on
    notes = ["up to a factor that depends on the batch"] * factor
    notes += [f"of losses {s.simd_loss.note}"] * bool(others)
    return Label(by, kind, ", ".join(notes), known)


def _warn(s: Structure, quantities: Sequence[Quantity], label: Label) -> None:
    asked = [type(q).__name__ for q in quantities if is_moment(q)]
    needed = (s.simd_forward, s.reduction, s.simd_loss)
    lost = [f"{TITLES[v.name]} ({'it fails' if v.status == 'fails' else 'it is unknown'})" for v in needed if not v]
    if s.reduction and s.reduction.weights_depend_on:
        lost.append("weights that depend on no other sample (they do)")
    if s.simd_loss.weights_depend_on:
        lost.append(f"losses that listen to no other sample (they are {s.simd_loss.note})")
    if asked and lost:
        text = errors.MSG_MIXED_MOMENT.format(what=", ".join(asked), kind=label.kind, lost=", ".join(lost), n=s.samples)
        errors.warn(text, MixedSamplesWarning)


@contextmanager
def _precision_of_recording() -> Iterator[None]:
    """Casts were recorded where they happened; an autocast around the question has done its work."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
