"""A recording with what is found out about it, and for how long that is valid.

Other numbers in parameters, buffers and data leave a recording valid where what Python or a rule
has looked at is the same. It is then moved to the new numbers, with its structure and its
plans, and nothing is recorded again. The recording itself is in ``recording.py``, what is found out
about it in ``analysis.py``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unbatch import errors
from unbatch.analysis.structure import Structure
from unbatch.capture import program as capture
from unbatch.capture.decisions import Decisions
from unbatch.capture.graph import Graph
from unbatch.capture.guards import SMALL
from unbatch.capture.isolation import generators_in, random_state
from unbatch.capture.program import Program
from unbatch.errors import StructureError
from unbatch.gradients.request import recorded_precision
from unbatch.problem.analysis import Analysis, analyse
from unbatch.problem.known_forms import KnownForms
from unbatch.problem.recording import Batch, Recording, contents_of, numbers_of, state_of
from unbatch.running.tasks import task
from unbatch.verification.experiment import Experiment


class Session:
    """A recording with its analysis, which is made when a question first needs it.

    ``known``: recordings of other sizes that were judged.
    """

    def __init__(
        self, recording: Recording, known: KnownForms, analysis: Analysis | None = None
    ) -> None:
        self.recording, self.known = recording, known
        self._analysis = analysis
        self.checks = 0  # how often the recording was held against the model
        self.decisions: Decisions | None = None

    @property
    def analysis(self) -> Analysis:
        """Return the analysis. Cost: a few forward passes, the first time."""
        if self._analysis is None:
            with task("Analysing the structure"):
                self._analysis = analyse(self.recording, self.known)
            self._note_contents()
        return self._analysis

    def put_aside(self) -> None:
        """Let go of what is made again when it is needed: runs on other batches."""
        if self._analysis is not None:
            vars(self._analysis.inference).pop("experiment", None)

    @property
    def is_judged(self) -> bool:
        """Return whether the analysis is there, made for this recording or for other numbers."""
        return self._analysis is not None

    @property
    def graph(self) -> Graph:
        """Return the recorded computation, with the cut of the loss where that is known."""
        if self._analysis is None:
            return self.recording.graph
        return self._analysis.inference.graph

    @property
    def batch(self) -> Batch:
        return self.recording.batch

    @property
    def structure(self) -> Structure:
        return self.analysis.structure

    @property
    def experiment(self) -> Experiment:
        """Return what runs the program on other batches."""
        return self.analysis.inference.experiment

    @property
    def predictions(self) -> Any:
        """Return what the model returns, with the noise of the recording."""
        return self.recording.predictions

    def outcome(self) -> list[Tensor] | None:
        """Return what the model returns, and the loss, as the recording has them.

        None where replays have other values than the model.
        """
        recording, graph = self.recording, self.graph
        if recording.outcome is not None:
            return recording.outcome
        if self._analysis is not None and self._analysis.fidelity.values:
            return None
        assert graph.loss is not None
        wanted = [graph.loss.index]
        if recording.program.loss is not None:
            wanted = [ref.index for ref in graph.predictions] + wanted
        with torch.no_grad(), recorded_precision():
            return graph.run({}, wanted)

    @property
    def at_the_cut(self) -> Any:
        """Return the values that the loss of a model with its own loss is cut at."""
        context = self.analysis.context
        # In the order of the structure, which shows them.
        cut = list(dict.fromkeys(ref.index for ref in context.graph.used_predictions))
        values = list(context.numbers(cut).values())
        return values[0] if len(values) == 1 else tuple(values)

    def check_third_derivatives(self) -> None:
        """Raise ``StructureError`` where the gradient is one that PyTorch does not have."""
        norm = self.recording.norm_without_gradient
        if norm is None:
            return
        place = f" ({norm.where})" if norm.where else ""
        raise StructureError(errors.MSG_THIRD_DERIVATIVE.format(op=norm.name, place=place))

    def check_connected(self) -> None:
        """Raise ``StructureError`` where autograd does not reach from the loss to anything."""
        if self.recording.connected:
            return
        # Which step cut the predictions off is not known: the last one that may have is shown.
        place = ""
        for step in self.recording.graph.steps:
            cuts_off = step.name == "detach" or not step.grad
            if step.where and cuts_off:
                place = f", such as at {os.path.basename(step.where)}"
        raise StructureError(errors.MSG_DETACHED.format(place=place))

    def watched_by(self, again: Recording) -> None:
        """Be compared with another recording of the same computation from here on."""
        self.recording = replace(
            self.recording,
            guard=again.guard,
            state=again.state,
            numbers=again.numbers,
            contents=again.contents,
        )

    def at(self, program: Program, batch: Batch) -> Session | None:
        """Return this session, or the same moved to other numbers.

        None where the program has to be recorded again.
        """
        recording = self.recording
        # Parameters may be other tensors than those that were recorded, under the same names.
        recording.guard.program = program
        if state_of(recording.guard, batch) != recording.state:
            return None
        numbers = numbers_of(recording.guard, batch)
        if numbers == recording.numbers and self._has_kept_numbers():
            return self
        return self._moved(program, batch, numbers)

    def _has_kept_numbers(self) -> bool:
        """Return whether all numbers are there still that something known rests on."""
        return not self._keeps_numbers or self.recording.has_its_contents()

    def _note_contents(self) -> None:
        """Note all numbers of a recording that was moved, where something known rests on them."""
        recording = self.recording
        if recording.contents is None and self._keeps_numbers:
            contents = contents_of(recording.guard, recording.batch)
            self.recording = replace(recording, contents=contents)

    @property
    def _keeps_numbers(self) -> bool:
        """Return whether numbers that Python or a rule has looked at are part of what is known."""
        graph = self.graph
        if graph.host_reads or graph.dynamic:
            return True
        if self._analysis is None:
            return False
        return any(graph.values[f.value].entries > SMALL for f in self._analysis.facts)

    def _moved(self, program: Program, batch: Batch, numbers: tuple[Any, ...]) -> Session | None:
        graph = self.graph  # cut, if it has been judged: the cut does not depend on numbers
        if self.recording.guard.reached.draws:
            return None
        rng = graph.rng
        if any(step.noise for step in graph.steps):
            # Fresh noise, as another run of the model would have.
            rng = random_state(generators_in(graph.rng))
        graph = capture.moved(graph, program, batch.inputs, batch.targets, rng)
        # Python may take another path, or sizes may change, with the new numbers.
        decisions = self._decisions_of(graph)
        if not decisions.are_same(graph):
            return None
        recording = replace(
            self.recording,
            program=program,
            batch=batch,
            numbers=numbers,
            contents=None,
            graph=graph,
            output=None,
            outcome=None,
        )
        # The output belongs to the numbers before; verdicts do not, where their facts hold.
        analysis = None
        if self._analysis is not None:
            analysis = self._analysis.moved(recording, graph)
        session = Session(recording, self.known, analysis)
        session.checks, session.decisions = self.checks, decisions
        session._note_contents()
        return session

    def _decisions_of(self, graph: Graph) -> Decisions:
        """Return what decided the way of the recording; found out once."""
        if self.decisions is None or self.decisions.steps is not graph.steps:
            self.decisions = Decisions.of(graph)
        return self.decisions
