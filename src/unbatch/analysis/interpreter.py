"""Abstract interpretation of a recording: one pass over its steps, with ownership for values.

Here live the order of steps, ops without a rule that are taken apart, host reads, and writes to
memory that other views show. What an op does to ownership is its rule (``rules/``), what a pass
starts from is in ``initial.py``, and what the result means for the loss is read off in
``inference.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch import errors
from unbatch.analysis.completeness import as_list, completed
from unbatch.analysis.decomposition import recorded_body
from unbatch.analysis.domain.choices import Choices
from unbatch.analysis.domain.ownership import (
    Ownership,
    batched,
    code,
    mix,
    moved,
    shared,
    spell_out,
)
from unbatch.analysis.domain.propagation import Propagation
from unbatch.analysis.memory import is_whole, overwritten, scrambled_bytes
from unbatch.analysis.number_facts import Fact, Numbers, alike, exact_numbers
from unbatch.analysis.policy import PROVED_ONLY, Mixed, Policy
from unbatch.analysis.rules import registry
from unbatch.analysis.rules.permutations import OutputRows, PermutedRows, RowCounts, follow
from unbatch.analysis.rules.reductions import running_statistics
from unbatch.capture import ops
from unbatch.capture.aliasing import Window, known_at, places
from unbatch.capture.graph import Graph, HostRead, ModuleCall
from unbatch.capture.steps import Ref, Step, filled, is_ref, refs_in
from unbatch.capture.tracer import SIZING_ARGUMENT, sizes_itself

# --- the interpretation ---------------------------------------------------------------------------


@dataclass
class Interpretation:
    """Ownership of every value of a graph, filled in step by step, and the algebra that made it.

    ``unknown``: ops without a rule, by step. ``assumed`` and ``custom``: modules and ops that were
    declared independent, and ops whose rule was registered from outside. ``permuted``: values whose
    rows the batch has put into an order of its own. ``host_reads``: what Python read, as it was at
    that moment. ``sized``: values whose size depends on the batch. ``above``: for the body of an op
    that is taken apart, the interpretation that it is part of, and the number there of each of its
    inputs. ``fresh``: values that count to the samples by the policy's ``read_by``, and not by what
    they are made of. ``step``: the number of the step that is being interpreted.
    """

    graph: Graph
    algebra: Propagation
    ownership: dict[int, Ownership]
    unknown: dict[int, str] = field(default_factory=dict)
    assumed: set[str] = field(default_factory=set)
    custom: set[str] = field(default_factory=set)
    permuted: dict[int, PermutedRows | RowCounts] = field(default_factory=dict)
    policy: Policy = PROVED_ONLY
    facts: list[Fact] = field(default_factory=list)
    host_reads: dict[HostRead, Ownership] = field(default_factory=dict)
    sized: set[int] = field(default_factory=set)
    above: tuple[Interpretation, Mapping[int, int]] | None = None
    fresh: set[int] = field(default_factory=set)
    step: int = -1

    def __getitem__(self, ref: Ref) -> Ownership:
        return self.ownership[ref.index]

    @property
    def by_place(self) -> bool:
        """Slice n of a value in which samples are mixed counts as sample n's."""
        return self.policy.mixed is Mixed.BY_PLACE

    def rely(self, value: int, function: Callable[[Any], Any]) -> Any:
        """Return a function of the integers or booleans of a value, and rely on the result.

        The function gets None where they are not known.
        """
        # What an op is taken apart into sees the inputs of the op: the numbers are those outside,
        # and the fact is one about the value outside, however deep ops are nested.
        if self.above is not None and value in self.above[1]:
            outer, names = self.above
            return outer.rely(names[value], function)

        def look(t: Tensor | None) -> Any:
            return function(exact_numbers(t))

        # Only the answer becomes a fact. A rule that asks whether -100 occurs among the labels
        # holds another batch to the answer, and not to the labels.
        seen = look(known_at(self.graph, value, self.step))
        if self.above is None:  # the numbers inside of an op do not change with the batch
            self.facts.append(Fact(value, look, _copied(seen), self.step))
        return seen

    def made_at(self, step: Step, value: int) -> frozenset[int]:
        """Return the statistics that a step makes, as far as one of its results rests on them.

        A window on memory makes none, though it shows statistics: those that were written to the
        memory, by another step before or after it.
        """
        made: set[int] = set()
        for root in self.ownership[value].statistics:
            if self.algebra.record.definitions[root].step == step.index:
                made.add(root)
        for ref in step.refs():
            made -= self[ref].statistics
        return frozenset(made)

    def ancestors(self, refs: Iterable[Ref]) -> set[int]:
        """Return the steps that these values depend on, through data and through memory."""
        values = self.graph.values
        needed: set[int] = set()
        storages: set[int] = set()
        for ref in refs:
            needed.add(ref.index)
            storages.add(values[ref.index].storage)
        steps: set[int] = set()
        # Backwards, so that all who need a value come before the step that makes it.
        for step in reversed(self.graph.steps):
            # A write changes what every view of the memory shows, also those that were made before
            # it: so a step counts by the memory it writes, and not by its results alone.
            written = {new.index for _, new in step.writes}
            makes_needed = not needed.isdisjoint(written.union(_indices(step.outs)))
            writes_needed = any(values[i].storage in storages for i in written)
            if not makes_needed and not writes_needed:
                continue
            steps.add(step.index)
            for ref in step.refs():
                needed.add(ref.index)
                # Memory that is there from the start was written before the recording.
                if values[ref.index].kind == "step":
                    storages.add(values[ref.index].storage)
        return steps


def _indices(refs: Iterable[Ref | None]) -> list[int]:
    """Return the numbers of the values among the results of a step."""
    return [ref.index for ref in refs if ref is not None]


def _copied(seen: Any) -> Any:
    """Return an array that stays as it is when its memory is written to."""
    if isinstance(seen, np.ndarray):
        return seen.copy()
    return seen


def interpret(
    graph: Graph,
    samples: int,
    start: Mapping[int, Ownership],
    steps: Sequence[Step],
    assumed: Sequence[str] = (),
    constant: Iterable[str] = (),
    policy: Policy = PROVED_ONLY,
    choices: Choices | None = None,
) -> Interpretation:
    """Propagate ownership through ``steps``; ``start``: that of the values they begin with.

    ``assumed``: paths of modules whose outputs are declared to depend, slice by slice, on their
    inputs. ``constant``: sources that count as known ("targets", "inputs" in a loss).
    ``choices``: those of samples, where a loss is followed through them.
    """
    algebra = Propagation(samples, constant=frozenset(constant), choices=choices)
    interpretation = Interpretation(graph, algebra, dict(start), policy=policy)
    # Buffers and constants may have other numbers in another recording.
    _rely_on_constants(interpretation, start)
    calls = _assumed_calls(graph, assumed)
    last_reads = graph.last_reads()
    waiting = sorted(graph.host_reads, key=lambda read: read.step)
    for step in steps:
        # Before the step: it may write to the memory of what was read.
        waiting = _note_host_reads(interpretation, waiting, step.index)
        algebra.step = step.index
        _step(interpretation, step, last_reads)
        # After the last step of a module: what its inner steps did to samples is overruled as a
        # whole. Their mixing stays in the record, where no prediction refers to it any more.
        for call in calls.get(step.index + 1, ()):
            _assume_independent(interpretation, call)
    _note_host_reads(interpretation, waiting, len(graph.steps))
    return interpretation


def _rely_on_constants(interpretation: Interpretation, start: Mapping[int, Ownership]) -> None:
    """Note along which axes constants are all alike, which their ownership rests on."""
    graph = interpretation.graph
    for value in start:
        is_read = graph.values[value].storage in graph.memories_read
        if is_read and graph.values[value].kind in ("buffers", "constants"):
            dims = alike(graph.values[value].concrete)
            if dims:
                interpretation.facts.append(Fact(value, alike, dims))


def _assumed_calls(graph: Graph, assumed: Sequence[str]) -> dict[int, list[ModuleCall]]:
    """Return the runs of modules that are declared independent, by the step after their last."""
    calls: dict[int, list[ModuleCall]] = {}
    for call in graph.calls:
        if call.module in assumed:
            calls.setdefault(call.stop, []).append(call)
    return calls


def _note_host_reads(
    interpretation: Interpretation, waiting: list[HostRead], step: int
) -> list[HostRead]:
    """Note what Python has read up to a step, and return the reads that come later."""
    # Sorted by step, so the first that comes later ends the search. A value that this pass does
    # not reach (one of the loss, in a forward pass) is left out, and counts as unknown.
    for number, read in enumerate(waiting):
        if read.step > step:
            return waiting[number:]
        if read.ref.index in interpretation.ownership:
            interpretation.host_reads[read] = interpretation[read.ref]
    return []


def _assume_independent(interpretation: Interpretation, call: ModuleCall) -> None:
    """Replace what was found out about the outputs of a module by what the user declares."""
    interpretation.assumed.add(call.module)
    inputs = [interpretation[r] for r in call.inputs if r.index in interpretation.ownership]
    for ref in call.outputs:
        shape = interpretation.graph.values[ref.index].shape
        interpretation.ownership[ref.index] = registry.assumed(
            interpretation.algebra, inputs, shape, ("assumed", call.module)
        )


# --- one step -------------------------------------------------------------------------------------


def _step(interpretation: Interpretation, step: Step, last_reads: Mapping[int, int]) -> None:
    """Work out the ownership of what a step returns, and of what it writes."""
    interpretation.step = step.index
    call = _rule_context(interpretation, step)
    results = _apply(interpretation, call, step)
    _note_sizes(interpretation, call, step)
    # A rule may return fewer results than the op does; the others then have no ownership.
    for ref, marks in zip(step.outs, results, strict=False):
        if ref is not None and marks is not None:
            settled = _settled(interpretation, call, step, ref, marks)
            interpretation.ownership[ref.index] = interpretation.policy.held.get(ref.index, settled)
    # After the rule, which knows nothing of orders and calls permuted rows mixed: its answer is
    # replaced where the rows have come back to their places.
    _follow_order(interpretation, call, step)
    hidden = _running_statistics(call, step)
    # A write that is also a result (``add_`` returns what it writes) has its ownership by now.
    for old, new in step.writes:
        if new.index not in interpretation.ownership:
            shape = interpretation.graph.values[new.index].shape
            interpretation.ownership[new.index] = _written(call, hidden, shape)
        if new.index in interpretation.policy.held:
            interpretation.ownership[new.index] = interpretation.policy.held[new.index]
        _through_views(interpretation, old, new, step.index, last_reads)


def _rule_context(interpretation: Interpretation, step: Step) -> registry.RuleContext:
    """Return the arguments of a step as its rule sees them: ownership in place of tensors."""
    # All parameters by name, whether given by place, by name or not at all: a rule has one way to
    # ask for an argument, and the title of an op does not depend on how it was called.
    arguments = dict.fromkeys(step.parameters) | step.defaults | step.named
    # Memory for results (``out=``): what was in it before does not matter.
    for name in ops.results_given(step.op):
        del arguments[name]

    def marks(ref: Ref) -> Ownership:
        return interpretation.ownership[ref.index]

    owned: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for name, argument in arguments.items():
        owned[name] = filled(argument, marks)
        if refs_in(argument):
            tensors[name] = argument
    shapes = [interpretation.graph.values[index].shape for index in _indices(step.outs)]
    numbers = Numbers(interpretation.rely, tensors)
    return registry.RuleContext(
        interpretation.algebra,
        step.op,
        owned,
        shapes,
        numbers,
        numbers.look,
        step.function,
        _types(interpretation.graph, step, tensors),
    )


def _types(graph: Graph, step: Step, tensors: Mapping[str, Any]) -> registry.Types:
    """Return the types of what a step reads and returns."""

    def of(refs: Iterable[Any]) -> list[torch.dtype]:
        return [graph.values[r.index].dtype for r in refs if is_ref(r)]

    arguments = {name: frozenset(of(refs_in(a))) for name, a in tensors.items()}
    return registry.Types(arguments, of(step.outs))


def _settled(
    interpretation: Interpretation,
    call: registry.RuleContext,
    step: Step,
    ref: Ref,
    marks: Ownership,
) -> Ownership:
    """Return the ownership of a result by the policy; mixed where the rule gives another shape."""
    shape, policy = interpretation.graph.values[ref.index].shape, interpretation.policy
    # What a rule says of another shape says nothing of this value: it counts as an op without a
    # rule.
    if marks.shape != shape:
        marks = registry.mixed(call, shape, registry.NO_RULE)
        text = f"{step.name} (its rule gave another shape)"
        interpretation.unknown.setdefault(step.index, text)
    if interpretation.sized and not marks.depends_on_batch:
        marks = _of_size(interpretation, call, step, marks)
    if policy.counted and not marks.depends_on_batch:
        marks = _counted(interpretation, ref, marks, step)
    if ref.index in policy.read_by:
        marks = _as_read(interpretation, ref, marks)
    if marks.mixed:
        marks = policy.of_mixed(call, marks, ref)
    return marks


def _as_read(interpretation: Interpretation, ref: Ref, marks: Ownership) -> Ownership:
    """Return the ownership of a result that counts as what reads it, where its own says less.

    What counts to no sample is a constant, whatever it is made of.
    """
    read = interpretation.policy.read_by[ref.index]
    if not read.owned:
        return read
    if marks.owned and not marks.coupled:
        return marks
    interpretation.fresh.add(ref.index)
    return read


def _counted(interpretation: Interpretation, ref: Ref, marks: Ownership, step: Step) -> Ownership:
    """Return the ownership of a shared result that is to count as the samples'.

    A result that is written into such a value belongs to the samples that the value belonged to.
    """
    # An example: a table of zeros whose rows count as the samples'. Filled in place with
    # constants, it depends on no sample by the rules; its rows count as theirs all the same.
    counted = interpretation.policy.counted
    if ref.index in counted:
        return batched(marks.shape, counted[ref.index], ("spread", ref.index), marks.sources)
    for old, new in step.writes:
        if new == ref:
            before = interpretation[old]
            if not before.owned or not _in_counted_memory(interpretation, ref):
                return marks
            key = mix(before.key, code("written", ref.index))
            return replace(before, key=key, sources=before.sources | marks.sources)
    return marks


def _note_sizes(interpretation: Interpretation, call: registry.RuleContext, step: Step) -> None:
    """Note which results have a size that depends on the batch, as what is selected by a mask."""
    graph = interpretation.graph
    made = [ref.index for ref in step.made()]
    if graph.dynamic.isdisjoint(made):
        return
    # The recorder knows where sizes depend on values; whether these depend on the batch is said by
    # their ownership.
    selects = sizes_itself(step.op, step.args, graph) and not all(
        registry.known_for_every_batch(m) for m in _sizing_operands(call)
    )
    if selects or _sized_operands(interpretation, step):
        interpretation.sized.update(i for i in made if graph.values[i].shape)


def _sizing_operands(call: registry.RuleContext) -> list[Ownership]:
    """Return the ownership of what says how large a result is: of a selection, the index alone."""
    name = SIZING_ARGUMENT.get(call.name)
    if name is None:
        return call.tensors
    return [m for m in tree_leaves(call[name]) if m is not None]


def _sized_operands(interpretation: Interpretation, step: Step) -> list[Ownership]:
    """Return the ownership of what a step reads whose size depends on the batch.

    Of the operands whose size is that of the result: a write leaves the size of what it writes to.
    """
    refs = step.refs()
    if ops.keeps_size(step.op):
        refs = refs[:1]
    return [interpretation[ref] for ref in refs if ref.index in interpretation.sized]


def _of_size(
    interpretation: Interpretation, call: registry.RuleContext, step: Step, marks: Ownership
) -> Ownership:
    """Return what is made of a size alone (ones, noise): it depends on what the size depends on."""
    for operand in _sized_operands(interpretation, step):
        if operand.all_owned and operand.shape == marks.shape:
            # There are as many as samples have chosen, each where a sample's own is.
            marks = call.algebra.pointwise("of a size", operand, marks)
            continue
        if not operand.statistics or operand.coupled or operand.owned:
            return registry.mixed(call, marks.shape, "data-dependent shape")
        statistics = marks.statistics | operand.statistics
        marks = replace(marks, statistics=statistics, sources=marks.sources | operand.sources)
    return marks


def _in_counted_memory(interpretation: Interpretation, ref: Ref) -> bool:
    values = interpretation.graph.values
    storages = {values[i].storage for i in interpretation.policy.counted}
    return values[ref.index].storage in storages


def _running_statistics(call: registry.RuleContext, step: Step) -> list[Ownership]:
    """Return what a batch norm writes to its running statistics, which no result of its rule is."""
    # Some variants return what they write, and then the rule has said it already.
    returned = any(new in step.outs for _, new in step.writes)
    if not step.writes or returned or call["running_mean"] is None:
        return []
    return list(running_statistics(call).values())


def _written(
    call: registry.RuleContext, hidden: Sequence[Ownership], shape: tuple[int, ...]
) -> Ownership:
    """Return what an op writes that is no result of its rule; mixed where that is not known."""
    # Mean and variance have one shape. Which of the two it is makes no difference to whose it is.
    for marks in hidden:
        if marks.shape == shape:
            return marks
    return registry.mixed(call, shape, registry.NO_RULE)


def _apply(
    interpretation: Interpretation, call: registry.RuleContext, step: Step
) -> list[Ownership | None]:
    """Return the ownership of each result of a step: by its rule, or by its parts, or unknown."""
    # Its result depends on how memory is laid out, which no rule gets to see.
    if call.name == "as_strided":
        return [_restrided(interpretation, call, step)]
    if call.op in registry.CUSTOM:
        interpretation.custom.add(str(call.op))
    elif call.op in registry.ASSUMED:
        interpretation.assumed.add(str(call.op))
    rule = registry.lookup(call.op)
    # What PyTorch itself takes apart has the rules of its parts. Inference mode shows such ops.
    is_composite = ops.is_composite(call.op) and not registry.is_declared(call.op)
    if rule is None or is_composite:
        of_parts = _decompose(interpretation, call, step)
        if of_parts is not None:
            return of_parts
    if rule is None:
        # Without a result there is nothing to be wrong about, and made of constants it is constant.
        if _indices(step.outs) and call.depends_on_batch:
            interpretation.unknown[step.index] = step.name
        rule = registry.unknown
    results = iter(_by_rule(interpretation, call, step, rule))
    return [None if ref is None else next(results, None) for ref in step.outs]


def _has_symbolic_sizes(call: registry.RuleContext) -> bool:
    """Tell whether a tensor is read that has a size which is no number."""
    sizes = [size for marks in call.tensors for size in marks.shape]
    return any(not isinstance(size, int) for size in sizes)


def _by_rule(
    interpretation: Interpretation, call: registry.RuleContext, step: Step, rule: registry.Rule
) -> Sequence[Ownership | None]:
    """Return what a rule says; a rule that raises counts as none, except in our own tests."""
    # Rules from outside, and what is declared, are taken at their word.
    try:
        if registry.is_declared(call.op) or rule is registry.unknown:
            return as_list(rule(call))
        results, forgotten = completed(call, rule, step.defaults)
    except Exception as error:
        # Of no samples there is nothing to be wrong about. Sizes that are no numbers, as those of
        # nested tensors, no rule was made to know.
        if errors.STRICT and interpretation.algebra.samples and not _has_symbolic_sizes(call):
            raise
        reason = f"{step.name} (its rule raised {type(error).__name__})"
        interpretation.unknown[step.index] = reason
        return registry.unknown(call)
    if forgotten:
        names = " and ".join(sorted(forgotten))
        interpretation.unknown[step.index] = f"{step.name} (its rule does not look at {names})"
    return results


# --- ops that are taken apart ---------------------------------------------------------------------


def _decompose(
    interpretation: Interpretation, call: registry.RuleContext, step: Step
) -> list[Ownership | None] | None:
    """Return what PyTorch's own definition of an op does; None where there is none that helps.

    The definition runs on tensors without contents and is recorded, and what it does is interpreted
    as a part of this interpretation.
    """
    # Three ways out, all to "unknown": there is no definition, it cannot be recorded, or it has an
    # op without a rule inside.
    body = registry.decomposition(call.op)
    if body is None:
        return None
    recorded = recorded_body(interpretation.graph, body, step)
    if recorded is None:
        return None
    graph, inputs, outputs = recorded
    # Without contents some ops return other sizes.
    if [graph.values[i].shape for i in _indices(outputs)] != call.shapes:
        return None
    marks = {inner: interpretation.ownership[outer] for inner, outer in inputs.items()}
    part = Interpretation(graph, interpretation.algebra, marks, above=(interpretation, inputs))
    for index, value in enumerate(graph.values):
        if value.kind == "constants":
            part.ownership[index] = shared(value.shape, ("constant", step.index, index))
    # The same algebra at the same ``step``: what happens inside is noted at the op of the user.
    # What it returns is read after the last step, which may write to it.
    last_reads = graph.last_reads() | dict.fromkeys(_indices(outputs), len(graph.steps))
    for inner_step in graph.steps:
        _step(part, inner_step, last_reads)
        if part.unknown:
            return None
    return [None if ref is None else part[ref] for ref in outputs]


# --- orders that depend on the data ---------------------------------------------------------------


def _follow_order(interpretation: Interpretation, call: registry.RuleContext, step: Step) -> None:
    """Keep track of rows that the batch has put into an order of its own, and of their return."""
    permuted = _permuted_arguments(interpretation, step)
    # An order is extra knowledge: where following it fails, the rule's answer stands.
    try:
        outcomes = follow(call, step.index, permuted, registry.lookup(call.op))
    except Exception:
        if errors.STRICT:
            raise
        return
    # What an op without a rule does to rows may be known all the same (a grouped product, say).
    if outcomes:
        interpretation.unknown.pop(step.index, None)
    refs, policy = [ref for ref in step.outs if ref is not None], interpretation.policy
    # Slots count the results that exist, as the shapes do that a rule gets.
    for outcome in outcomes:
        # An order among what counts as read is none that the batch is known to be in.
        if outcome.slot < len(refs) and refs[outcome.slot].index not in policy.read_by:
            _note_order(interpretation, refs[outcome.slot], outcome)


def _permuted_arguments(
    interpretation: Interpretation, step: Step
) -> dict[str, PermutedRows | RowCounts]:
    """Return those arguments of a step whose rows are in an order of the batch's own, by name."""
    permuted: dict[str, PermutedRows | RowCounts] = {}
    for name, argument in step.named.items():
        ref = _single_ref(argument)
        if ref is not None and ref.index in interpretation.permuted:
            permuted[name] = interpretation.permuted[ref.index]
    return permuted


def _single_ref(argument: Any) -> Ref | None:
    """Return the value that an argument is, or the first of a list with no other (``x[index]``)."""
    if isinstance(argument, list | tuple):
        first, others = argument[:1], argument[1:]
        # [index] or [index, None, ..]; with two indices rows are not followed.
        if not first or any(other is not None for other in others):
            return None
        argument = first[0]
    return argument if isinstance(argument, Ref) else None


def _note_order(interpretation: Interpretation, ref: Ref, outcome: OutputRows) -> None:
    """Note an order, or plain ownership again, where it fits the shape that was recorded."""
    shape = interpretation.graph.values[ref.index].shape
    # Rows may have been followed in another form than was recorded: then nothing is noted, and the
    # value stays as its rule says.
    order = outcome.rows
    if isinstance(order, RowCounts) or (order is not None and order.original.shape == shape):
        interpretation.permuted[ref.index] = order
    if outcome.ownership is not None and outcome.ownership.shape == shape:
        interpretation.ownership[ref.index] = outcome.ownership


# --- memory: a write through one view is seen through the others ----------------------------------


def _through_views(
    interpretation: Interpretation, old: Ref, new: Ref, step: int, last_reads: Mapping[int, int]
) -> None:
    """Bring what was written to ``old`` (``new`` from there on) to views that are read later."""
    values, marks = interpretation.graph.values, interpretation.ownership
    written = values[new.index]
    # Views made later start from ``new``. Of those made before, only the ones that are read again
    # matter.
    views = []
    for index, value in enumerate(values[: new.index]):
        same_memory = value.storage == written.storage and index != old.index
        if same_memory and index in marks and last_reads.get(index, -1) > step:
            views.append(index)
    if not views:
        return
    update = spell_out(marks[new.index])
    hits = places(Window.of(written), [Window.of(values[i]) for i in views])
    for view, hit in zip(views, hits, strict=True):
        # Places are counted in items. Of bytes seen as items of another size nothing is known,
        # wherever the write was.
        if values[view].dtype.itemsize != written.dtype.itemsize:
            interpretation.permuted.pop(view, None)
            marks[view] = scrambled_bytes(interpretation.algebra, marks[view], update)
        elif (hit >= 0).any():
            interpretation.permuted.pop(view, None)
            # A view of all that was written, in order, is just that: nothing has to be spelled
            # out.
            if is_whole(hit, marks[view], update):
                marks[view] = marks[new.index]
            else:
                marks[view] = overwritten(interpretation.algebra, marks[view], update, hit)


def _restrided(interpretation: Interpretation, call: registry.RuleContext, step: Step) -> Ownership:
    """Return the ownership of a window on the memory of a value, element by element."""
    values, (window,) = interpretation.graph.values, step.outs
    source = values[step.refs()[0].index]
    target = values[window.index if window is not None else 0]
    # A window may reach beyond the value, into memory beside it, and whose that is is not known.
    (place,) = places(Window.of(source), [Window.of(target)])
    if (place < 0).any() or source.dtype.itemsize != target.dtype.itemsize:
        return registry.mixed(call, target.shape, "resized")
    return moved(call["self"], lambda _: place, target.shape)
