"""What ownership proves about the loss: whether it can be split off, is a sum, and is SIMD.

``judge_loss`` says *holds* where it is proved and leaves the rest open, with culprits. One verdict
can fail here: a parameter that enters the loss refutes the canonical split for good.

Vocabulary, of ``domain/propagation.py``: an *atom* is a scalar per sample through which predictions
enter the loss; the loss is *additive* where it is a sum over samples of such scalars.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from unbatch.analysis.domain.ownership import Ownership
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.explanations import REMEDY, WHY, culprit, host_read_culprit
from unbatch.analysis.forward_inference import statistic_culprits
from unbatch.analysis.interpreter import Interpretation
from unbatch.analysis.verdict import Culprit, Verdict
from unbatch.capture import ops
from unbatch.capture.graph import SIZE_READ, Graph, HostRead
from unbatch.capture.steps import Ref, Step

REST_NOTE = "that part of the gradient is carried as `rest`"


# Ops that only put totals together, as the sum of two losses does.
SUMS = ("add", "sub", "rsub", "cat", "stack", "sum", "mean")


@dataclass(frozen=True)
class LossEvidence:
    """The interpretation of a loss, and what Python reads while it is computed.

    ``steps``: those that the loss depends on. ``reads``: host reads that may steer the loss.
    ``constants_read``: sources ("targets", "inputs") of which more than one sample's are read.
    """

    graph: Graph
    forward: Interpretation
    loss: Interpretation
    marks: Ownership
    steps: frozenset[int]
    reads: tuple[HostRead, ...]
    constants_read: frozenset[str]

    @property
    def algebra(self) -> Propagation:
        return self.loss.algebra

    @property
    def steps_after_cut(self) -> list[Step]:
        """The steps from the predictions to the loss, in order."""
        return [self.graph.steps[s] for s in sorted(self.steps & self.graph.after_cut)]


def judge_loss(evidence: LossEvidence) -> tuple[Verdict, Verdict, Verdict]:
    """Return the verdicts on canonical split, reduction and SIMD loss."""
    marks, algebra = evidence.marks, evidence.algebra
    basis = "assumed" if evidence.loss.assumed else "proved"
    # An example: a mean over the labels that are not ignored divides by their number. That is a
    # statistic of the targets and a factor of every term: the loss is a weighted sum all the same,
    # but with weights that depend on the targets of others. What Python has read may be a factor.
    factors = _batch_constants(algebra, marks, as_factors=True) | evidence.constants_read
    terms = _batch_constants(algebra, marks, as_factors=False)
    # One list for both open verdicts: whatever couples the samples in the loss stands in the way of
    # a sum over them and of one function for all of them.
    culprits = _loss_culprits(evidence)
    simd_loss = Verdict("simd_loss", "unknown", culprits=culprits)
    if _is_simd(evidence):
        note = ""
        if terms:
            note = f"given statistics of the {' and '.join(sorted(terms))} of all samples"
        simd_loss = Verdict("simd_loss", "holds", basis, note=note, weights_depend_on=terms)
    reduction = Verdict("reduction", "unknown", culprits=culprits, weights_depend_on=factors)
    # A term that reads targets of other samples is no term of its sample alone. What one function
    # of all reads of them is told by the SIMD loss.
    if _is_additive(evidence) and (simd_loss or not terms):
        if not simd_loss:
            simd_loss = replace(simd_loss, culprits=_own_terms(culprits))
        note = ""
        if factors:
            note = f"weights depend on {' and '.join(sorted(factors))}"
        reduction = Verdict("reduction", "holds", basis, note=note, weights_depend_on=factors)
    return _judge_split(evidence), reduction, simd_loss


def _own_terms(culprits: Sequence[Culprit]) -> tuple[Culprit, ...]:
    """Return the culprits of a sum over samples of which each has a term of its own."""
    why, remedy = WHY["own terms"], REMEDY["own terms"]
    return tuple(replace(found, why=why, remedy=remedy) for found in culprits)


def _is_additive(evidence: LossEvidence) -> bool:
    """Tell whether the loss is proved to be a sum over the samples; of one sample any loss is."""
    marks = evidence.marks
    if evidence.reads:
        return False
    # A function of the targets alone is no loss of the samples' predictions.
    if marks.depends_on_batch and "predictions" not in marks.sources:
        return False
    return marks.additive or (evidence.algebra.samples == 1 and not marks.mixed)


def _is_simd(evidence: LossEvidence) -> bool:
    """Tell whether predictions enter through one scalar per sample, by the same function for all.

    Equal atoms are the same function, so one atom says both. Without any, no prediction may enter.
    """
    marks = evidence.marks
    if evidence.reads or marks.mixed:
        return False
    # A statistic of some of the samples is no one function of all, unless it is a sum over them.
    if marks.grouped and not marks.additive:
        return False
    if not marks.atoms:
        return not evidence.algebra.uses_predictions(marks)
    return len(marks.atoms) == 1


def _batch_constants(algebra: Propagation, marks: Ownership, as_factors: bool) -> frozenset[str]:
    """Return of which constants statistics over the batch enter the loss.

    ``as_factors``: as factors of its terms, which makes them weights; otherwise inside of terms.
    """
    sources: set[str] = set()
    for root in marks.statistics:
        statistic = algebra.record.definitions[root]
        is_factor = root in algebra.record.factors
        if is_factor == as_factors and "predictions" not in statistic.sources:
            sources |= statistic.sources
    return frozenset(sources & {"targets", "inputs"})


# --- the canonical split --------------------------------------------------------------------------


def _judge_split(evidence: LossEvidence) -> Verdict:
    """Return whether only predictions, and nothing else made of parameters, enter the loss."""
    # Parameters first, and reads second: a parameter in the loss refutes the split, whatever Python
    # has read, and what was read only leaves it open.
    culprits = []
    for step in evidence.steps_after_cut:
        # ``ones_like(parameter)`` takes nothing of the parameter but its shape.
        if not ops.reads_shape_only(step.op):
            culprits += _parameters_entering(evidence, step)
    if culprits:
        # Each place once, in order: one step may take a parameter twice.
        return _split_fails(dict.fromkeys(culprits))
    reads = [e for e in evidence.graph.host_reads if _may_enter_loss(evidence, e)]
    if reads:
        return Verdict("canonical_split", "unknown", culprits=tuple(map(host_read_culprit, reads)))
    return Verdict("canonical_split", "holds", "proved")


def _may_enter_loss(evidence: LossEvidence, read: HostRead) -> bool:
    """Tell whether Python may bring a number made of parameters into the loss.

    What the forward pass reads the loss may read from where it was kept. Booleans and integers
    matter there only if the program was seen to keep anything; sizes do not.
    """
    graph = evidence.graph
    is_number = graph.values[read.ref.index].dtype.is_floating_point
    kept = graph.keeps and not graph.own_loss
    if not read.in_loss and (read.how == SIZE_READ or not (is_number or kept)):
        return False
    return _reads_parameters(evidence, read)


def _parameters_entering(evidence: LossEvidence, step: Step) -> list[Culprit]:
    """Return a culprit for each operand of a step that brings parameters past the predictions."""
    graph = evidence.graph
    culprits = []
    for ref in step.refs():
        value = graph.values[ref.index]
        if value.kind == "parameters":
            culprits.append(_split_culprit(step, f"the parameter {value.name!r}"))
        elif _is_inner_value(graph, ref) and "parameters" in evidence.forward[ref].sources:
            culprits.append(_split_culprit(step, "an inner value of the model"))
    return culprits


def _is_inner_value(graph: Graph, ref: Ref) -> bool:
    """Tell whether the model computes this value and does not return it as a prediction."""
    value = graph.values[ref.index]
    if value.kind != "step" or value.step in graph.after_cut:
        return False
    return ref not in graph.predictions


def _reads_parameters(evidence: LossEvidence, read: HostRead) -> bool:
    """Tell whether Python reads something made of parameters, and may use it in the loss."""
    index = read.ref.index
    if read.blind or evidence.graph.values[index].kind == "parameters":
        return True
    # The loss has the later word on a value that both know. What neither knows may be anything.
    marks = evidence.loss.ownership.get(index) or evidence.forward.ownership.get(index)
    if marks is None:
        return True
    return bool(marks.sources & {"parameters", "internals"})


def parameters_in_own_loss(steps: Sequence[Step]) -> Verdict:
    """Return the verdict where a loss inside the model takes a parameter at each of ``steps``."""
    return _split_fails(_split_culprit(step, "a parameter") for step in steps)


def _split_fails(culprits: Iterable[Culprit]) -> Verdict:
    return Verdict("canonical_split", "fails", "proved", tuple(culprits), REST_NOTE)


def _split_culprit(step: Step, what: str) -> Culprit:
    return Culprit(
        step.module,
        step.name,
        step.where,
        f"{what} enters the loss beside the predictions",
        "Move it into the model, or keep it: its part of the gradient is reported as `rest`.",
    )


# --- the culprits ---------------------------------------------------------------------------------


def _loss_culprits(evidence: LossEvidence) -> tuple[Culprit, ...]:
    """Return where the loss makes predictions of different samples interact."""
    graph, algebra, marks = evidence.graph, evidence.algebra, evidence.marks
    # Steps of the forward pass as well: what it makes of the inputs alone keeps its mixing when
    # the loss reads it.
    mixing_steps = evidence.forward.algebra.record.mixing | algebra.record.mixing
    mixing = []
    for index in sorted(marks.mixers & mixing_steps.keys()):
        step = graph.steps[index]
        mixing.append(_mixing_culprit(graph, step, mixing_steps[index]))
    reads = [*map(host_read_culprit, evidence.reads)]
    uses = [
        use for use in algebra.record.uses.values() if _of_predictions(algebra, use.definitions)
    ]
    statistics = statistic_culprits(graph, algebra, uses)
    # A total that enters nonlinearly is blamed last: where samples are mixed, or share statistics,
    # that is the nearer reason.
    totals: list[Culprit] = []
    if not mixing and not statistics:
        totals = _total_culprits(evidence)
    return tuple(mixing + reads + statistics + totals)


def _of_predictions(algebra: Propagation, roots: Iterable[int]) -> frozenset[int]:
    """Return those of the statistics that are made of predictions."""
    return frozenset(r for r in roots if "predictions" in algebra.record.definitions[r].sources)


def _mixing_culprit(graph: Graph, step: Step, how: str) -> Culprit:
    """Return a step that mixes samples as a culprit.

    Predictions ``[N, 1]`` beside targets ``[N]`` are what happens most often: broadcasting sets
    every sample beside every other, and the two shapes explain it better than any word.
    """
    if how == "pairwise" and (ops.is_pointwise(step.op) or "_loss" in step.name):
        shapes: dict[str, None] = {}
        for ref in step.refs():
            operand = _before_expand(graph, ref)
            shapes[str(list(graph.values[operand.index].shape))] = None
        if len(shapes) > 1:
            return culprit(step, "broadcast", shapes=" and ".join(shapes))
    return culprit(step, how)


def _before_expand(graph: Graph, ref: Ref) -> Ref:
    """Return what a loss has expanded before it compares."""
    # One step back: PyTorch's loss functions expand their two arguments right before they compare.
    maker = graph.makers.get(ref.index)
    if maker is not None and maker.name == "expand":
        return maker.refs()[0]
    return ref


def _total_culprits(evidence: LossEvidence) -> list[Culprit]:
    """Return the totals over samples that the loss is not linear in, or all if none stands out."""
    totals = _of_predictions(evidence.algebra, evidence.marks.statistics)
    nonlinear = totals & _nonlinear_totals(evidence)
    culprits = []
    for root in sorted(nonlinear or totals):
        step = evidence.graph.steps[evidence.algebra.record.definitions[root].step]
        culprits.append(
            Culprit(
                step.module,
                step.name,
                step.where,
                "a total over the samples enters the loss in more than a linear way",
                "Reduce the losses of the samples by a (weighted) sum or mean.",
            )
        )
    return culprits


def _nonlinear_totals(evidence: LossEvidence) -> frozenset[int]:
    """Return the totals over samples from which something is made that is no sum over samples.

    A total that is only added to such a thing, as a cross-entropy to a dice loss, is none of them.
    """
    nonlinear: set[int] = set()
    for step in evidence.steps_after_cut:
        if not _makes_no_sum(evidence.loss, step):
            continue
        operands = _totals_among(evidence.loss, step.refs())
        # Where an operand is no sum already, an op that only puts totals together is not to blame;
        # the step that made that operand is.
        if _all_sums(operands) or ops.base_name(step.op) not in SUMS:
            for operand in operands:
                if operand.additive:
                    nonlinear |= operand.statistics
    return frozenset(nonlinear)


def _makes_no_sum(loss: Interpretation, step: Step) -> bool:
    """Tell whether a result of the step rests on totals over samples and is no sum itself."""
    return not _all_sums(_totals_among(loss, step.outs))


def _all_sums(totals: Iterable[Ownership]) -> bool:
    return all(m.additive for m in totals)


def _totals_among(loss: Interpretation, refs: Iterable[Ref | None]) -> list[Ownership]:
    """Return the ownership of those values that rest on totals over the samples."""
    totals = []
    for ref in refs:
        if ref is None:
            continue
        marks = loss.ownership.get(ref.index)
        if marks is not None and marks.statistics:
            totals.append(marks)
    return totals
