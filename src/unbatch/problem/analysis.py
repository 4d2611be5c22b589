"""What is found out about a recording: what the rules prove, and what tests and trials leave of it.

What came of the trials on a batch of other sizes is not asked again (``known_forms.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten, tree_leaves_with_path, tree_unflatten

from unbatch.analysis.domain.ownership import Ownership, is_sample
from unbatch.analysis.inference import AnalysisState, infer_structure
from unbatch.analysis.initial import initial_ownership
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.number_facts import Fact
from unbatch.analysis.outputs import Outputs
from unbatch.analysis.rules import registry
from unbatch.analysis.structure import Structure
from unbatch.autodiff.context import Context, Tested
from unbatch.autodiff.own_backward import joining, tried
from unbatch.capture import control_flow
from unbatch.capture.effort import metered
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.same_form import Form
from unbatch.capture.sample_axes import Fold
from unbatch.capture.steps import is_ref
from unbatch.errors import (
    MSG_EMPTY_JOINT,
    MSG_EMPTY_UNKNOWN,
    MSG_JOINED_BACKWARD,
    MSG_ROWS_UNCLEAR,
    InputError,
    StructureError,
)
from unbatch.problem.known_forms import FEW, Judged, KnownForms
from unbatch.problem.recording import Batch, Recording, state_of_program
from unbatch.verification.experiment import Experiment
from unbatch.verification.fidelity import replay_difference
from unbatch.verification.variants import variant_of, without_nan
from unbatch.verification.verify import settle, settle_as


@dataclass(frozen=True)
class Inference:
    """What the rules prove about a recording. ``graph``: its graph, with the loss cut off."""

    recording: Recording
    graph: Graph
    structure: Structure
    findings: AnalysisState
    outputs: Outputs

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


NO_DIFFERENCE = Fidelity("", "", "")


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
        return all(fact.holds(graph) for fact in self.facts)

    @property
    def facts(self) -> list[Fact]:
        """Return the facts about values that a rule or a plan has used."""
        # Fresh lists: those of the interpretations are not to grow.
        facts = [*self.findings.forward.facts]
        if self.findings.loss is not None:
            facts += self.findings.loss.facts
        return facts + self.context.facts


# --- analysing a recording ------------------------------------------------------------------------


def analyse(recording: Recording, known: KnownForms) -> Analysis:
    """Prove what the rules can, compare replays with the model, and test what is open.

    What ``known`` recordings of other sizes have shown is not asked again.
    """
    with metered(recording.graph.ops, recording.program.effort) as meter:
        inference, form = infer(recording), Form.of(recording.graph)
        judged = _known_of(recording, form, inference, known)
        fidelity, own_backward = NO_DIFFERENCE, recording.own_backward
        is_known = judged is not None and judged.is_current() and not own_backward
        if recording.batch.samples and not is_known:
            fidelity = fidelity_of(inference.experiment, own_backward)
        if fidelity != NO_DIFFERENCE:
            judged = None  # another computation may run on other batches
        settled = _settled(inference, fidelity, judged)
    if meter.stopped:
        settled = replace(settled, notes=(*settled.notes, meter.stopped))
    tested = Tested() if judged is None else judged.tested
    if fidelity == NO_DIFFERENCE:
        # As good as tried, and nearer to what comes next.
        state = state_of_program(recording.guard)
        proved = inference.structure
        known.add(Judged(form, recording.guard, state, proved, settled, tested))
    structure = _with_notes(settled, recording, fidelity)
    context = _context(inference, structure, faithful=not fidelity.replay_difference)
    structure, context = with_backward(structure, replace(context, tested=tested))
    return Analysis(inference, structure, fidelity, context)


def _known_of(
    recording: Recording, form: Form, inference: Inference, known: KnownForms
) -> Judged | None:
    """Return what recordings of other sizes have shown of the same computation."""
    if recording.batch.samples < FEW:
        return _of_more_samples(recording, form, known)
    return known.of_other_sizes(form, inference.structure)


def _settled(inference: Inference, fidelity: Fidelity, judged: Judged | None) -> Structure:
    """Return the structure with proofs tried and open verdicts tested, here or on other sizes."""
    recording, structure = inference.recording, inference.structure
    if not recording.batch.samples:
        if judged is None:
            raise InputError(MSG_EMPTY_UNKNOWN)
        if not judged.settled.reduction:
            raise StructureError(MSG_EMPTY_JOINT.format(status=judged.settled.reduction.status))
    if judged is not None and recording.batch.samples < FEW:
        return judged.for_few(structure)
    if judged is not None:
        return settle_as(judged.settled, structure, inference.experiment, recording.predictions)
    # What an assumption hides may well differ on another batch: that refutes nothing.
    differs = fidelity.values
    if structure.assumptions:
        differs = ""
    return settle(structure, inference.experiment, recording.predictions, differs)


def _of_more_samples(recording: Recording, form: Form, known: KnownForms) -> Judged | None:
    """Return what is known of the same computation on more samples."""
    samples = recording.batch.samples
    judged = known.of_more_samples(form, samples)
    # One sample alone shows nothing, and nobody has asked about more of them.
    if judged is not None or (samples and not known.judged):
        return judged
    others = several(recording)
    if others is not None:
        analyse(others, known)
    return known.of_more_samples(form, samples)


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
    graph = findings.forward.graph
    if program.fold is not None:
        _check_guess(program.fold, findings.forward)
    outputs = Outputs.of(graph, findings.forward.ownership, batch.samples, findings.leading)
    if outputs.joined:
        words = _in_words(outputs.joined, recording.skeleton, graph)
        structure = replace(structure, joined=words, divides=bool(outputs.axes))
    return Inference(recording, graph, structure, findings, outputs)


def _check_guess(fold: Fold, forward: Interpretation) -> None:
    """Raise ``InputError`` where predictions were taken for rows of an input, and are not in order.

    They belong to single samples, and to others than those of the input.
    """
    for ref in forward.graph.predictions:
        marks = forward[ref]
        if marks.mixed or marks.shape[:2] not in fold.guessed:
            continue
        samples = np.arange(marks.shape[0]).reshape(-1, *[1] * (len(marks.shape) - 1))
        if (is_sample(marks.owner) & (marks.owner != samples)).any():
            why = "the model has put them into another order"
            raise InputError(MSG_ROWS_UNCLEAR.format(rows="rows", why=why))


def _in_words(outputs: Sequence[int], skeleton: Any, graph: Graph) -> tuple[str, ...]:
    """Return outputs by their place in what the model returns, or in a model with its own loss."""
    places: dict[int, str] = {}
    for path, leaf in tree_leaves_with_path(skeleton, is_leaf=is_ref):
        if is_ref(leaf):
            places[leaf.index] = f"output{keystr(path)}"
    words = []
    for i in outputs:
        value = graph.values[i]
        place = places.get(i)
        if place is None:  # the loss of the model's own is cut there
            place = f"the value made in {graph.steps[value.step].place}"
        words.append(f"{place} of shape {list(value.shape)}")
    return tuple(words)


def fidelity_of(experiment: Experiment, own_backward: bool = False) -> Fidelity:
    """Return how far replays agree with the model, in values and in gradients.

    ``own_backward``: code of backward passes may decide by numbers what it does.
    """
    # Compared on another batch than the recorded one, where constants of that batch would show.
    values, gradients = replay_difference(experiment)
    if own_backward and not values and not gradients:
        values, gradients = replay_difference(experiment, on_recorded_batch=True)
    if not values:
        return Fidelity(values, gradients, "")
    values_on_batch, gradients_on_batch = replay_difference(experiment, on_recorded_batch=True)
    return Fidelity(values, gradients, values_on_batch or gradients_on_batch)


def _with_notes(structure: Structure, recording: Recording, fidelity: Fidelity) -> Structure:
    """Return the structure with notes on gradients, and with places for all culprits."""
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
    batch, findings, program = recording.batch, inference.findings, recording.program
    return Context(
        program,
        graph,
        findings.forward,
        initial_ownership(graph, batch.dims, program.fold is not None and program.fold.is_ragged),
        batch.samples,
        findings.leading,
        inference.outputs,
        batch.inputs,
        batch.targets,
        recording.skeleton,
        faithful,
        bool(structure.canonical_split),
    )


def with_backward(structure: Structure, context: Context) -> tuple[Structure, Context]:
    """Return both with what the backward pass does beyond the derivatives of the recording."""
    joined = " and ".join(joining(context.graph.forward_steps))
    if not context.faithful:
        independent = bool(structure.independent_forward)
        try:
            trial = tried(context, independent)
        except Exception:  # a question that needs it raises the same, with a reason
            return structure, context
        if not trial.linear:
            note = f"what {trial.named} does to gradients is not linear: rows do not exist"
            structure = replace(structure, notes=(*structure.notes, note))
            return structure, replace(context, not_linear=trial.named)
        if not trial.separate:
            joined = trial.named
    if not joined or not structure.independent_forward:
        return structure, context
    note = MSG_JOINED_BACKWARD.format(places=joined)
    structure = replace(structure, joined_backward=note, notes=(*structure.notes, note))
    return structure, replace(context, joined_backward=joined)


# --- several samples in place of one --------------------------------------------------------------

# How many, the first that no size is a multiple of.
COUNTS = (5, 7, 11, 13, 17, 19, 23)


def several(recording: Recording) -> Recording | None:
    """Return a recording of the program on samples like the one there, or made up where none is.

    None where they would all be the same, so that trials tell nothing, or the program takes none.
    """
    batch, program = recording.batch, recording.program
    if program.fold is not None:
        return None
    sizes = {size for value in recording.graph.values for size in value.shape}
    count = next((n for n in COUNTS if all(size % n for size in sizes if size)), None)
    if count is None:
        return None
    inputs, varied = _repeated(batch.inputs, batch.dims, count)
    targets, _ = _repeated(batch.targets, batch.target_dims, count)
    if not varied:
        return None
    others = Batch((inputs, targets), inputs, targets, batch.dims, batch.target_dims, count)
    try:
        return Recording.of(program, others, recording.where, "")
    except Exception:
        return None


def _repeated(tree: Any, dims: Sequence[int | None], count: int) -> tuple[Any, bool]:
    """Return data with ``count`` samples like the first, and whether these differ."""
    generator = torch.Generator().manual_seed(0)
    leaves, spec = tree_flatten(tree)
    varied = False
    for i, dim in enumerate(dims):
        if dim is None or not isinstance(leaves[i], Tensor):
            continue
        rows = leaves[i].detach().movedim(dim, 0)
        if not len(rows):
            rows = rows.new_zeros(1, *rows.shape[1:])
        rows = rows[:1].expand(count, *rows.shape[1:])
        if rows.is_floating_point():
            rows = variant_of(rows, rows, "noisy", generator)
        elif rows.ndim > 1:
            # Numbers in range, in other places: tokens of a sentence.
            rows = torch.stack([row.roll(n, -1) for n, row in enumerate(rows)])
        varied |= not torch.equal(rows[0], rows[1])
        leaves[i] = rows.movedim(0, dim).contiguous()
    return tree_unflatten(leaves, spec), varied
