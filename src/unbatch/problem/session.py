"""A program recorded on a batch, what was found out about it, and for how long that is valid.

Other numbers in parameters, buffers and data leave a recording valid where nothing that Python or a rule has looked at
is among them; it is then moved to the new numbers, with its structure and its plans, and nothing is recorded again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from unbatch import errors
from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.inference import AnalysisState, infer_structure
from unbatch.analysis.initial import forward_marks
from unbatch.analysis.rules import registry
from unbatch.analysis.structure import Structure
from unbatch.autodiff.context import Context
from unbatch.capture import control_flow
from unbatch.capture import program as capture
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.guards import Guard, identity, signature
from unbatch.capture.isolation import random_state, untouched
from unbatch.capture.program import Program
from unbatch.errors import CaptureError, InputError, StructureError, UnbatchError
from unbatch.verification.experiment import Experiment
from unbatch.verification.fidelity import unfaithful
from unbatch.verification.verify import settle

MOST_NAMED = 4  # places in a message


@dataclass(frozen=True)
class Batch:
    """Inputs and targets with the axes of their samples, one for every leaf."""

    inputs: Any
    targets: Any
    dims: Sequence[int | None]
    target_dims: Sequence[int | None]
    samples: int

    @property
    def signature(self) -> tuple[Any, ...]:
        return signature(self.inputs, self.targets)

    @property
    def identity(self) -> tuple[Any, ...]:
        return identity(self.inputs, self.targets)


@dataclass(frozen=True)
class Recording:
    """A program as it ran on a batch. ``skeleton``: what it returned, with references in place of tensors."""

    program: Program
    batch: Batch
    guard: Guard
    state: tuple[Any, ...]
    numbers: tuple[Any, ...]
    graph: Graph
    skeleton: Any
    where: str  # the line of the user to whom verdicts belong
    connected: bool  # the loss, with what requires a gradient
    unregistered: str  # tensors whose gradients are overlooked, in words
    output: Any = None  # what the model returned, where it has run on these numbers

    @staticmethod
    def of(program: Program, batch: Batch, where: str, call: str) -> Recording:
        """Run the program once. ``call``: how it is called, for the error message."""
        guard = Guard.of(program)
        try:
            graph, (output, scalar) = capture.record(program, batch.inputs, batch.targets)
        except UnbatchError:
            raise
        except Exception as error:
            said = str(error).rstrip().removesuffix(".")
            message = errors.MSG_MODEL_FAILED.format(
                kind=type(error).__name__, value=said, call=call
            )
            swapped = [errors.MSG_SWAPPED] if _looks_swapped(program) else []
            raise CaptureError(
                " ".join([message, *getattr(error, "__notes__", ()), *swapped])
            ) from error
        _check_scalar(program, graph, output, scalar)
        guard.watch(graph)
        refs = iter(graph.predictions)
        own = capture.own_loss(output) if program.loss is None else None
        named = lambda t: next(refs) if isinstance(t, Tensor) and t is not own else t  # noqa: E731
        skeleton = tree_map(named, output)
        state, loss = _state(guard, batch), scalar if own is None else own
        return Recording(
            program,
            batch,
            guard,
            state,
            _numbers(guard, batch),
            graph,
            skeleton,
            where,
            loss.requires_grad,
            _unregistered(graph, where),
            _cut(output),
        )

    def is_stale(self) -> bool:
        """The program, its numbers or the data are not what they were."""
        return (
            _state(self.guard, self.batch) != self.state
            or _numbers(self.guard, self.batch) != self.numbers
        )

    @cached_property
    def predictions(self) -> Any:
        """What the model returns, with the noise of the recording."""
        if self.output is not None:
            return self.output
        with untouched(self.program.modules, self.graph.rng), torch.enable_grad():
            return _cut(self.program.predict(self.batch.inputs))


# --- what is found out about it -------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """What the rules prove about a recording. ``graph``: the recorded one, with the cut of the loss."""

    recording: Recording
    graph: Graph
    structure: Structure
    findings: AnalysisState

    @cached_property
    def oracle(self) -> Experiment:
        """Return what runs the program on other batches."""
        recording, batch = self.recording, self.recording.batch
        return Experiment(
            recording.program, self.graph, batch.inputs, batch.targets, batch.dims, batch.samples, self.findings
        )  # fmt: skip


@dataclass(frozen=True)
class Fidelity:
    """How far replays agree with the model: ``values`` and ``gradients`` say why they do not, if so.

    ``here``: the same on the batch that was recorded, where values do not agree on another one.
    """

    values: str
    gradients: str
    here: str

    @property
    def unfaithful(self) -> str:
        """Return why the recording cannot stand for the model's derivatives on its batch, if it cannot."""
        # Values that differ on another batch are steered by Python: on its own, the recording may be what ran.
        return self.here if self.values else self.gradients


@dataclass(frozen=True)
class Analysis:
    """A recording with its verdicts, and as the engine sees it.

    ``unfaithful``: why replays cannot stand for the model's derivatives, empty where they can.
    """

    interpretation: Inference
    structure: Structure
    unfaithful: str
    setting: Context

    @property
    def findings(self) -> AnalysisState:
        """The walks behind the structure."""
        return self.interpretation.findings

    @property
    def marks_in_loss(self) -> Mapping[int, Ownership]:
        """What is known about the values in the loss, where there is one to judge."""
        loss = self.findings.loss
        return {} if loss is None else loss.marks

    def moved(self, recording: Recording, graph: Graph) -> Analysis | None:
        """Return the same about other numbers; None where a fact that it rests on does not hold for them."""
        walks = [self.findings.forward, *([self.findings.loss] if self.findings.loss else [])]
        facts = [fact for walk in walks for fact in walk.facts] + self.setting.facts
        if not all(fact.holds(graph) for fact in facts):
            return None
        program, batch = recording.program, recording.batch
        interpretation = replace(self.interpretation, recording=recording, graph=graph)
        data = {"inputs": batch.inputs, "targets": batch.targets}
        setting = replace(self.setting, program=program, graph=graph, **data)
        return replace(self, interpretation=interpretation, setting=setting)


def analyse(recording: Recording) -> Analysis:
    """Prove what the rules can, hold replays against the model, and put to a test what is open."""
    interpretation = infer(recording)
    fidelity = fidelity_of(interpretation.oracle)
    structure = verified(interpretation, fidelity)
    setting = _setting(interpretation, structure, faithful=not fidelity.unfaithful)
    return Analysis(interpretation, structure, fidelity.unfaithful, setting)


def infer(recording: Recording) -> Inference:
    """Return what the rules prove about a recording, on every way that the program may take."""
    program, batch, graph = recording.program, recording.batch, recording.graph
    names = program.module_names
    assumed = [names[i] for i in registry.ASSUMED_MODULES if i in names]
    general = functools.cache(
        lambda: control_flow.equivalent_on_all_paths(program, batch.inputs, batch.targets, graph)
    )

    def harmless(escape: HostRead) -> bool:
        return escape.answer is not None and general() is not None

    def judged(graph: Graph) -> tuple[Structure, AnalysisState]:
        return infer_structure(
            graph, batch.samples, batch.dims, batch.target_dims, assumed, harmless, program.fold
        )

    structure, findings = judged(graph)
    other = general() if general.cache_info().currsize else None  # where it mattered
    if other is not None and other is not graph:
        structure = structure.no_more_than(judged(other)[0])
    return Inference(recording, findings.forward.graph, structure, findings)


def fidelity_of(oracle: Experiment) -> Fidelity:
    """Return how far replays agree with the model, in values and in gradients."""
    values, gradients = unfaithful(oracle)
    here = next(filter(None, unfaithful(oracle, here=True)), "") if values else ""
    return Fidelity(values, gradients, here)


def verified(interpretation: Inference, fidelity: Fidelity) -> Structure:
    """Return the structure with what was open put to a numerical test, and with its notes."""
    recording, structure = interpretation.recording, interpretation.structure
    # What an assumption hides may well differ on another batch: that refutes nothing.
    differs = "" if structure.assumptions else fidelity.values
    structure = settle(structure, interpretation.oracle, recording.predictions, differs)
    notes = structure.notes
    if recording.unregistered:
        notes += (recording.unregistered,)
    if fidelity.gradients:
        notes += (
            f"the recorded computation has other derivatives than the model ({fidelity.gradients}): "
            "derivatives are taken by running the model",
        )
    return replace(structure, notes=notes).located(recording.where)


def _setting(interpretation: Inference, structure: Structure, faithful: bool) -> Context:
    recording, graph = interpretation.recording, interpretation.graph
    batch, findings = recording.batch, interpretation.findings
    return Context(
        recording.program, graph, findings.forward, forward_marks(graph, batch.dims), batch.samples,
        findings.leading, batch.inputs, batch.targets, recording.skeleton, faithful,
        bool(structure.canonical_split),
    )  # fmt: skip


# --- what is kept between questions ---------------------------------------------------------------


class Session:
    """A recording with its analysis, which is made when a question first needs it."""

    def __init__(self, recording: Recording, analysis: Analysis | None = None) -> None:
        self.recording = recording
        self._analysis = analysis

    @property
    def analysis(self) -> Analysis:
        if self._analysis is None:
            self._analysis = analyse(self.recording)
        return self._analysis

    @property
    def graph(self) -> Graph:
        """The recorded computation, with the cut of the loss where that is known."""
        return (
            self.recording.graph if self._analysis is None else self._analysis.interpretation.graph
        )

    @property
    def batch(self) -> Batch:
        return self.recording.batch

    @property
    def structure(self) -> Structure:
        return self.analysis.structure

    @property
    def oracle(self) -> Experiment:
        return self.analysis.interpretation.oracle

    @property
    def predictions(self) -> Any:
        """What the model returns, with the noise of the recording."""
        return self.recording.predictions

    @property
    def at_the_cut(self) -> Any:
        """What the loss of a model that brings its own is cut at."""
        setting = self.analysis.setting
        values = list(setting.numbers(list(setting.axes)).values())
        return values[0] if len(values) == 1 else tuple(values)

    def check_connected(self) -> None:
        """Raise ``StructureError`` where autograd does not reach from the loss to anything."""
        if self.recording.connected:
            return
        cuts = [
            s for s in self.recording.graph.steps if s.where and (s.name == "detach" or not s.grad)
        ]
        place = f", such as at {os.path.basename(cuts[-1].where)}" if cuts else ""
        raise StructureError(errors.MSG_DETACHED.format(place=place))

    def at(self, program: Program, batch: Batch) -> Session | None:
        """Return this, or the same moved to other numbers; None where the program has to be recorded again."""
        recording = self.recording
        recording.guard.program = program
        if _state(recording.guard, batch) != recording.state:
            return None
        numbers = _numbers(recording.guard, batch)
        return self if numbers == recording.numbers else self._moved(program, batch, numbers)

    def _moved(self, program: Program, batch: Batch, numbers: tuple[Any, ...]) -> Session | None:
        graph = self.graph
        if graph.escapes or graph.dynamic:
            return None
        rng = random_state() if any(s.noise for s in graph.steps) else graph.rng
        graph = capture.moved(graph, program, batch.inputs, batch.targets, rng)
        recording = replace(
            self.recording, program=program, batch=batch, numbers=numbers, graph=graph, output=None
        )
        analysis = None if self._analysis is None else self._analysis.moved(recording, graph)
        return Session(recording, analysis)


def _unregistered(graph: Graph, where: str) -> str:
    """In words, the tensors whose gradients are overlooked; empty where there are none."""
    found = graph.unregistered
    places = dict.fromkeys(
        f"{list(v.shape)} ({os.path.basename(s.where or where)})" for v, s in found
    )
    listed = ", ".join([*places][:MOST_NAMED]) + (", .." if len(places) > MOST_NAMED else "")
    count = f"{len(found)} tensor{'s' * (len(found) != 1)}"
    return errors.MSG_UNREGISTERED.format(count=count, places=listed) if found else ""


def _looks_swapped(program: Program) -> bool:
    """The loss has parameters, and the model has none."""
    has = [
        isinstance(m, nn.Module) and any(True for _ in m.parameters())
        for m in (program.model, program.loss)
    ]
    return not program.functional and has == [False, True]


def _cut(output: Any) -> Any:
    """Without the graph that it hangs on, which is as large as the activations."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)


def _state(guard: Guard, batch: Batch) -> tuple[Any, ...]:
    """What decides which computation it is."""
    declared = (
        tuple(sorted(registry.ASSUMED_MODULES)),
        tuple((k, id(v)) for k, v in registry.CUSTOM.items()),
        tuple(registry.ASSUMED),
    )
    return guard.state(), batch.signature, declared


def _numbers(guard: Guard, batch: Batch) -> tuple[Any, ...]:
    return guard.numbers(), batch.identity


def _check_scalar(program: Program, graph: Graph, output: Any, scalar: Any) -> None:
    if program.loss is None:
        if graph.loss is None:
            raise InputError(errors.MSG_NO_LOSS.format(value=type(output).__name__))
    elif not isinstance(scalar, Tensor) or scalar.numel() != 1:
        value = (
            f"a tensor of shape {tuple(scalar.shape)}"
            if isinstance(scalar, Tensor)
            else repr(scalar)
        )
        raise InputError(errors.MSG_NOT_SCALAR.format(value=value))
