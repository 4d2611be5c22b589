"""From ownership to verdicts: what is proved about model and loss of one recording.

``infer_structure`` interprets the forward pass, finds where the loss begins, interprets the loss,
and collects what the verdicts rest on. The verdicts themselves are read off in
``forward_inference.py`` and ``loss_inference.py``; whether an open one fails is settled in
``verification/``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from unbatch.analysis.domain.choices import ANONYMOUS, ORDERED, Choices
from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.forward_inference import forward_evidence, hidden, judge_forward
from unbatch.analysis.initial import initial_ownership, loss_marks, scrambled
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.loss_boundary import folded, placed, split
from unbatch.analysis.loss_inference import LossEvidence, judge_loss, parameters_in_own_loss
from unbatch.analysis.rules import registry
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Verdict
from unbatch.capture.graph import SIZE_READ, Graph, HostRead
from unbatch.capture.sample_axes import Fold
from unbatch.capture.steps import Ref, Step

# What the loss may depend on without depending on a prediction.
CONSTANTS = frozenset({"targets", "inputs"})


NO_SAMPLE = "no output of the model has a sample axis"


# Sources through which a value says something about the batch.
BATCH_SOURCES = frozenset({"inputs", "targets", "predictions", "internals"})


@dataclass(frozen=True)
class AnalysisState:
    """The interpretations behind a structure, and what its numerical tests have to know.

    ``leading``: samples lie along the first axis of every input. ``nonlinear`` and ``ranks``: see
    ``ForwardEvidence.nonlinear`` and ``ranks``. ``host_reads``: those that may steer the forward
    pass.
    """

    forward: Interpretation
    loss: Interpretation | None
    leading: bool
    nonlinear: bool = False
    ranks: bool = False
    host_reads: tuple[HostRead, ...] = ()


@dataclass(frozen=True)
class _Assumptions:
    """What the user has declared, and what was found out about host reads in other ways.

    ``modules``: paths of modules that are assumed to act on each sample alone. ``harmless``: tells
    of a host read whether the program is the same whatever Python reads there.
    """

    modules: Sequence[str]
    harmless: Callable[[HostRead], bool]


def infer_structure(
    graph: Graph,
    samples: int,
    dims: Sequence[int | None],
    target_dims: Sequence[int | None],
    assumed: Sequence[str] = (),
    harmless: Callable[[HostRead], bool] = lambda read: False,
    fold: Fold | None = None,
) -> tuple[Structure, AnalysisState]:
    """Interpret model and loss and return what is proved about them.

    ``dims`` and ``target_dims``: the sample axis of each input and target, None where it has none.
    ``assumed``: modules that are declared to act on each sample alone. Where the model computes its
    own loss, the graph of the state is cut into model and loss, and ``fold`` has been applied to
    its predictions. Raises ``InputError`` where ``fold`` fits no prediction.
    """
    assumptions = _Assumptions(assumed, harmless)
    fixed = fold is not None and fold.is_ragged
    leading = all(d in (0, None) for d in dims)
    # A model that computes its own loss is interpreted as a whole, cut, and from then on treated as
    # any other. One that has been cut already (``after_cut``) is two parts from the start.
    own_loss = graph.own_loss and not graph.after_cut
    steps = graph.steps if own_loss else graph.forward_steps
    forward = interpret(graph, samples, initial_ownership(graph, dims, fixed), steps, assumed)
    parameter_steps: list[Step] = []
    if own_loss:
        forward, parameter_steps = _cut_own_loss(forward, dims, assumed, fold)
        graph = forward.graph
    # After the cut, which decides to which of the two parts a read belongs.
    before, after = _reads_by_part(graph, forward, own_loss)
    reads = _steering(graph, before, forward, assumptions)
    evidence = forward_evidence(graph, forward, leading, reads)
    structure = judge_forward(graph, forward, evidence, leading)
    loss: Interpretation | None = None
    if graph.loss is not None:
        start = loss_marks(graph, forward, target_dims, samples, leading, fixed)
        loss = _interpret_loss(graph, forward, start, assumed, own_loss)
        reads_after = _steering(graph, after, loss, assumptions)
        found = _loss_evidence(graph, graph.loss, forward, loss, reads_after)
        outputs = [start[ref.index] for ref in graph.used_predictions]
        verdicts = _through_choices(_judged_loss(found, outputs), found, start)
        structure = structure.with_verdicts(*verdicts)
    # Whatever the verdict on the loss: these parameters enter it past the cut.
    if parameter_steps:
        structure = structure.with_verdicts(parameters_in_own_loss(parameter_steps))
    if own_loss and loss is not None:
        structure = replace(structure, notes=structure.notes + _cut_notes(graph))
    if graph.hides_predictions:
        structure = structure.with_verdicts(*hidden(graph))
    state = AnalysisState(
        forward, loss, leading, evidence.nonlinear, evidence.ranks, evidence.reads
    )
    return _with_premises(structure, state), state


def _judged_loss(evidence: LossEvidence, outputs: Sequence[Ownership]) -> list[Verdict]:
    """Return the verdicts on the loss, which are open where no output belongs to a sample."""
    split, *of_samples = judge_loss(evidence)
    if outputs and not any(marks.owned for marks in outputs):
        of_samples = [_of_no_sample(verdict) for verdict in of_samples]
    return [split, *of_samples]


def _selects(graph: Graph) -> bool:
    """Tell whether the loss selects by masks, which samples may have each their own."""
    masks = (torch.bool, torch.uint8)
    for step in graph.loss_steps:
        if step.name not in ("index", "masked_select"):
            continue
        if any(graph.values[ref.index].dtype in masks for ref in step.refs()[1:]):
            return True
    return False


def _through_choices(
    verdicts: list[Verdict], found: LossEvidence, start: dict[int, Ownership]
) -> list[Verdict]:
    """Return verdicts with an open SIMD loss settled, if it is one of what each chooses."""
    split, reduction, simd_loss = verdicts
    graph, loss, samples = found.graph, found.loss, found.algebra.samples
    is_open = bool(reduction) and simd_loss.status == "unknown" and not loss.assumed
    if graph.loss is None or not is_open or not _selects(graph):
        return verdicts
    steps = list(graph.loss_steps)
    if graph.own_loss:
        steps = [*statistics_of_data(graph, found.forward), *steps]
    # With the labels where the first interpretation has placed them.
    begin = {i: loss.ownership.get(i, marks) for i, marks in start.items()}
    for mode in (ORDERED, ANONYMOUS):
        choices = Choices(samples, mode)
        followed = interpret(graph, samples, begin, steps, (), CONSTANTS, choices=choices)
        evidence = replace(found, loss=followed, marks=followed[graph.loss])
        *_, simd_loss = judge_loss(evidence)
        if not choices.counts or not simd_loss:
            return verdicts
    return [split, reduction, simd_loss]


def _cut_own_loss(
    forward: Interpretation,
    dims: Sequence[int | None],
    assumed: Sequence[str],
    fold: Fold | None,
) -> tuple[Interpretation, list[Step]]:
    """Return the forward pass of a model that computes its own loss, cut where the loss begins.

    The second value are the steps at which parameters enter the loss all the same.
    """
    graph, parameter_steps = split(forward.graph, forward)
    forward = replace(forward, graph=graph)
    if fold is None or not fold.of_outputs:
        return forward, parameter_steps
    # Folding inserts steps, so the numbers of all values change with it.
    graph = folded(graph, forward, fold)
    start = initial_ownership(graph, dims, fold.is_ragged)
    samples = forward.algebra.samples
    return interpret(graph, samples, start, graph.forward_steps, assumed), parameter_steps


def _of_no_sample(verdict: Verdict) -> Verdict:
    """Return a verdict on the loss of samples where no output that it reads belongs to samples."""
    if not verdict:
        return verdict
    return replace(verdict, status="unknown", basis="", note=NO_SAMPLE)


def _interpret_loss(
    graph: Graph,
    forward: Interpretation,
    start: dict[int, Ownership],
    assumed: Sequence[str],
    own_loss: bool,
) -> Interpretation:
    """Interpret the loss, with each label counted to the sample whose prediction it is set beside.

    Which label that is shows only in an interpretation, and may show for more of them once some are
    in place: repeated until no label is added.
    """
    steps = list(graph.loss_steps)
    # A mean over unmasked words, say: the model counts them, and its loss divides by the count.
    # Interpreting these steps once more defines the count in the record of the loss as well.
    if own_loss:
        steps = [*statistics_of_data(graph, forward), *steps]
    labels: dict[int, Ownership] = {}
    while True:
        loss = interpret(graph, forward.algebra.samples, start | labels, steps, assumed, CONSTANTS)
        # Ends, as labels are only added and there are finitely many.
        more = placed(graph, forward, start, loss)
        if more.keys() <= labels.keys():
            return loss
        labels = more | labels


def statistics_of_data(graph: Graph, forward: Interpretation) -> list[Step]:
    """Return the steps of a model that make statistics of its inputs alone, which its loss may use.

    How many words a mask leaves, say: in the loss that is a constant of the batch.
    """
    steps = []
    for step in graph.forward_steps:
        results = list(step.outs)
        for _, new in step.writes:
            results.append(new)
        if any(_is_data_statistic(forward, ref) for ref in results):
            steps.append(step)
    return steps


def _is_data_statistic(forward: Interpretation, ref: Ref | None) -> bool:
    if ref is None:
        return False
    return bool(forward[ref].statistics) and "parameters" not in forward[ref].sources


# --- what Python reads ----------------------------------------------------------------------------


def sees(marks: Ownership) -> bool:
    """Tell whether a value says something about the batch."""
    return marks.depends_on_batch or bool(marks.sources & BATCH_SOURCES)


def _reads_by_part(
    graph: Graph, forward: Interpretation, own_loss: bool
) -> tuple[list[HostRead], list[HostRead]]:
    """Return the host reads that come before the predictions, and those that cannot steer them.

    A loss of the model's own has no first step in the program: there the last step that the
    predictions depend on separates the two.
    """
    last = -1
    if own_loss:
        last = max(forward.ancestors(graph.used_predictions), default=-1)
    before, after = [], []
    for read in graph.host_reads:
        is_late = read.step > last if own_loss else read.in_loss
        if is_late:
            after.append(read)
        else:
            before.append(read)
    return before, after


def _steering(
    graph: Graph,
    reads: Sequence[HostRead],
    interpretation: Interpretation,
    assumptions: _Assumptions,
) -> list[HostRead]:
    """Return the host reads through which the batch may steer the program.

    ``harmless`` comes last: it may have to record every path that the program can take.
    """
    steering = []
    for read in reads:
        if not _reads_batch(read, interpretation):
            continue
        # A declaration excuses a read whatever it says of the batch, and ``harmless`` is not
        # asked.
        if _is_declared(graph, read, assumptions.modules) or assumptions.harmless(read):
            continue
        steering.append(read)
    return steering


def _reads_batch(read: HostRead, interpretation: Interpretation) -> bool:
    """Tell whether what Python reads may say something about the batch; unknown values may."""
    if read.blind or read not in interpretation.host_reads:
        return True
    # The recorder takes every value that was made of a selection for one of a size of its own.
    if read.how == SIZE_READ and read.ref.index not in interpretation.sized:
        return False
    return sees(interpretation.host_reads[read])


def _is_declared(graph: Graph, read: HostRead, modules: Sequence[str]) -> bool:
    """Tell whether the user has declared the module that reads, or the op that made the value."""
    # -1 for a value that no step has made, an input say.
    maker = graph.values[read.ref.index].step
    if maker >= 0 and graph.steps[maker].op in registry.ASSUMED:
        return True
    return any(read.module == m or read.module.startswith(m + ".") for m in modules)


def constant(read: HostRead, loss: Interpretation) -> bool:
    """Tell whether what is read is made of targets and inputs alone: constants in the loss."""
    return read in loss.host_reads and loss.host_reads[read].sources <= CONSTANTS


def _loss_evidence(
    graph: Graph,
    scalar: Ref,
    forward: Interpretation,
    loss: Interpretation,
    reads: Sequence[HostRead],
) -> LossEvidence:
    """Return what the loss at ``scalar`` rests on.

    A constant that is read steers nothing in the loss; that it is read of the whole batch is kept.
    """
    # ``if y.max() > 1`` in a loss looks at targets, and in the loss these are what they are: no
    # other branch has to be considered. But a weight may now depend on the targets of all samples.
    steering = []
    constants_read: set[str] = set()
    for read in reads:
        if read.blind or not constant(read, loss):
            steering.append(read)
        else:
            constants_read |= loss.host_reads[read].sources
    for value in scrambled(graph, forward):
        constants_read |= loss.ownership[value].sources
    return LossEvidence(
        graph=graph,
        forward=forward,
        loss=loss,
        marks=loss[scalar],
        steps=frozenset(loss.ancestors([scalar])),
        reads=tuple(steering),
        constants_read=frozenset(constants_read),
    )


# --- what the verdicts rest on --------------------------------------------------------------------


def _with_premises(structure: Structure, state: AnalysisState) -> Structure:
    """Return the structure with assumptions, rules from outside, and ops that have no rule."""
    # Over both passes, and sorted: what is printed must not depend on the order of sets.
    assumed: set[str] = set()
    custom: set[str] = set()
    unknown: set[str] = set()
    for interpretation in (state.forward, state.loss):
        if interpretation is not None:
            assumed |= interpretation.assumed
            custom |= interpretation.custom
            unknown.update(interpretation.unknown.values())
    return replace(
        structure,
        assumptions=tuple(sorted(assumed)),
        custom_rules=tuple(sorted(custom)),
        unknown_ops=tuple(sorted(unknown)),
    )


def _cut_notes(graph: Graph) -> tuple[str, ...]:
    """Return in words where a model that computes its own loss was cut."""
    notes = []
    for ref in graph.used_predictions:
        value = graph.values[ref.index]
        step = graph.steps[value.step]
        place = f"{step.module or 'the model'}, {os.path.basename(step.where) or step.name}"
        notes.append(f"cut into model and loss at a value of shape {list(value.shape)} ({place})")
    return tuple(notes)
