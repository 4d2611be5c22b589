"""What is found out about a recording, and for how long that is valid.

Other numbers in parameters, buffers and data leave a recording valid where nothing that Python or
a rule has looked at is among them. It is then moved to the new numbers, with its structure and its
plans, and nothing is recorded again. The recording itself is in ``recording.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unbatch import errors
from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.inference import AnalysisState, infer_structure
from unbatch.analysis.initial import initial_ownership
from unbatch.analysis.rules import registry
from unbatch.analysis.structure import Structure
from unbatch.autodiff.context import Context
from unbatch.capture import control_flow
from unbatch.capture import program as capture
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.isolation import generators_in, random_state
from unbatch.capture.program import Program
from unbatch.errors import StructureError
from unbatch.gradients.request import recorded_precision
from unbatch.problem.recording import Batch, Recording, numbers_of, state_of
from unbatch.verification.experiment import Experiment
from unbatch.verification.fidelity import replay_difference
from unbatch.verification.variants import without_nan
from unbatch.verification.verify import settle


@dataclass(frozen=True)
class Inference:
    """What the rules prove about a recording. ``graph``: its graph, with the loss cut off."""

    recording: Recording
    graph: Graph
    structure: Structure
    findings: AnalysisState

    @cached_property
    def experiment(self) -> Experiment:
        """Return what runs the program on other batches."""
        recording, batch = self.recording, self.recording.batch
        return Experiment(
            recording.program,
            self.graph,
            without_nan(batch.inputs, batch.dims, batch.samples),
            batch.targets,
            batch.dims,
            batch.samples,
            self.findings,
            batch.target_dims,
            recording.output,
        )


@dataclass(frozen=True)
class Fidelity:
    """How far replays agree with the model.

    ``values``, ``gradients``: in words, why they do not on another batch; empty where they do.
    ``on_batch``: the same on the recorded batch, where values do not agree on another one.
    """

    values: str
    gradients: str
    on_batch: str

    @property
    def replay_difference(self) -> str:
        """Return why the recording cannot replace the model on its own batch; empty if it can."""
        # Values that differ on another batch may do so because Python took another path there:
        # on the recorded batch, the recording may still be exactly what ran.
        return self.on_batch if self.values else self.gradients


@dataclass(frozen=True)
class Analysis:
    """A recording with its verdicts, and as the engine sees it."""

    inference: Inference
    structure: Structure
    fidelity: Fidelity
    context: Context

    @property
    def replay_difference(self) -> str:
        """Return why replays cannot stand for the model's derivatives; empty where they can."""
        return self.fidelity.replay_difference

    @property
    def findings(self) -> AnalysisState:
        """Return the abstract interpretations behind the structure."""
        return self.inference.findings

    @property
    def ownership_in_loss(self) -> Mapping[int, Ownership]:
        """Return the ownership of the values in the loss, where there is one to judge."""
        loss = self.findings.loss
        return {} if loss is None else loss.ownership

    def moved(self, recording: Recording, graph: Graph) -> Analysis | None:
        """Return the same about other numbers; None where a fact that it rests on fails there."""
        if not self._holds_for(graph):
            return None
        inference = replace(self.inference, recording=recording, graph=graph)
        context = replace(
            self.context,
            program=recording.program,
            graph=graph,
            inputs=recording.batch.inputs,
            targets=recording.batch.targets,
        )
        return replace(self, inference=inference, context=context)

    def _holds_for(self, graph: Graph) -> bool:
        """Return whether every fact about values that a rule or a plan used holds in ``graph``."""
        # Fresh lists: those of the interpretations are not to grow.
        facts = [*self.findings.forward.facts]
        if self.findings.loss is not None:
            facts += self.findings.loss.facts
        facts += self.context.facts
        return all(fact.holds(graph) for fact in facts)


# --- analysing a recording ------------------------------------------------------------------------


def analyse(recording: Recording) -> Analysis:
    """Prove what the rules can, compare replays with the model, and test what is open."""
    inference = infer(recording)
    fidelity = fidelity_of(inference.experiment)
    structure = verified(inference, fidelity)
    context = _context(inference, structure, faithful=not fidelity.replay_difference)
    return Analysis(inference, structure, fidelity, context)


class _OtherPaths:
    """The execution paths of a program other than the recorded one; searched for at most once."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.searched = False
        self.graph: Graph | None = None

    def is_harmless(self, read: HostRead) -> bool:
        """Return whether Python reading this value leads to an equivalent computation."""
        return read.answer is not None and self.equivalent() is not None

    def equivalent(self) -> Graph | None:
        """Return a graph that stands for all paths; None where there is none."""
        if not self.searched:
            program, batch = self.recording.program, self.recording.batch
            self.graph = control_flow.equivalent_on_all_paths(
                program, batch.inputs, batch.targets, self.recording.graph
            )
            self.searched = True
        return self.graph


def infer(recording: Recording) -> Inference:
    """Return what the rules prove about a recording, on every path the program may take."""
    program, batch = recording.program, recording.batch
    # Modules that the user has declared independent, of those that this program has.
    names = program.module_names
    assumed = [names[i] for i in registry.ASSUMED_MODULES if i in names]
    paths = _OtherPaths(recording)

    def inferred(graph: Graph) -> tuple[Structure, AnalysisState]:
        return infer_structure(
            graph,
            batch.samples,
            batch.dims,
            batch.target_dims,
            assumed,
            paths.is_harmless,
            program.fold,
        )

    structure, findings = inferred(recording.graph)
    # Where no verdict depended on a host read, the other paths were not searched and do not matter.
    if paths.graph is not None and paths.graph is not recording.graph:
        structure = structure.no_more_than(inferred(paths.graph)[0])
    return Inference(recording, findings.forward.graph, structure, findings)


def fidelity_of(experiment: Experiment) -> Fidelity:
    """Return how far replays agree with the model, in values and in gradients."""
    # Compared on another batch than the recorded one, where constants of that batch would show.
    values, gradients = replay_difference(experiment)
    if not values:
        return Fidelity(values, gradients, "")
    values_on_batch, gradients_on_batch = replay_difference(experiment, on_recorded_batch=True)
    return Fidelity(values, gradients, values_on_batch or gradients_on_batch)


def verified(inference: Inference, fidelity: Fidelity) -> Structure:
    """Return the structure with open verdicts tested numerically, and with its notes."""
    recording, structure = inference.recording, inference.structure
    # What an assumption hides may well differ on another batch: that refutes nothing.
    differs = fidelity.values
    if structure.assumptions:
        differs = ""
    structure = settle(structure, inference.experiment, recording.predictions, differs)
    notes = list(structure.notes)
    if recording.unregistered:
        notes.append(recording.unregistered)
    if fidelity.gradients:
        notes.append(
            "the recorded computation has other derivatives than the model "
            f"({fidelity.gradients}): derivatives are taken by running the model"
        )
    return replace(structure, notes=tuple(notes)).located(recording.where)


def _context(inference: Inference, structure: Structure, faithful: bool) -> Context:
    """Return the recording as the engine sees it."""
    recording, graph = inference.recording, inference.graph
    batch, findings = recording.batch, inference.findings
    return Context(
        recording.program,
        graph,
        findings.forward,
        initial_ownership(graph, batch.dims),
        batch.samples,
        findings.leading,
        batch.inputs,
        batch.targets,
        recording.skeleton,
        faithful,
        bool(structure.canonical_split),
    )


# --- what is kept between questions ---------------------------------------------------------------


class Session:
    """A recording with its analysis, which is made when a question first needs it."""

    def __init__(self, recording: Recording, analysis: Analysis | None = None) -> None:
        self.recording = recording
        self._analysis = analysis

    @property
    def analysis(self) -> Analysis:
        """Return the analysis. Cost: a few forward passes, the first time."""
        if self._analysis is None:
            self._analysis = analyse(self.recording)
        return self._analysis

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
        # In the order of their axes of samples, which is that of the structure.
        values = list(context.numbers(list(context.axes)).values())
        return values[0] if len(values) == 1 else tuple(values)

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
            self.recording, guard=again.guard, state=again.state, numbers=again.numbers
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
        if numbers == recording.numbers:
            return self  # the same in every bit
        return self._moved(program, batch, numbers)

    def _moved(self, program: Program, batch: Batch, numbers: tuple[Any, ...]) -> Session | None:
        graph = self.graph  # cut, if it has been judged: the cut does not depend on numbers
        # Python may take another path, or sizes may change, with the new numbers.
        if graph.host_reads or graph.dynamic or self.recording.guard.reached.draws:
            return None
        rng = graph.rng
        if any(step.noise for step in graph.steps):
            # Fresh noise, as another run of the model would have.
            rng = random_state(generators_in(graph.rng))
        graph = capture.moved(graph, program, batch.inputs, batch.targets, rng)
        recording = replace(
            self.recording,
            program=program,
            batch=batch,
            numbers=numbers,
            graph=graph,
            output=None,
            outcome=None,
        )
        # The output belongs to the numbers before; verdicts do not, where their facts hold.
        analysis = None
        if self._analysis is not None:
            analysis = self._analysis.moved(recording, graph)
        return Session(recording, analysis)
