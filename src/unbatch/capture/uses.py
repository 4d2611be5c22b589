"""Which memories and which steps the results of a recording depend on.

What a program only updates in place from itself, such as running statistics in training or a count
of batches, changes no result: other numbers there leave all answers valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from unbatch.capture import ops
from unbatch.capture.steps import Ref, Step, Value, indices


@dataclass
class Needs:
    """What results depend on: values, the memories that they lie in, and the steps between."""

    values: set[int] = field(default_factory=set)
    memories: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)

    @staticmethod
    def of(values: Sequence[Value], steps: Sequence[Step], results: Iterable[Ref]) -> Needs:
        """Return what results need.

        Of memory that is written to nothing finer is known: all of it counts.
        """
        needs = Needs()
        needs.note(results, values)
        # Backwards, so that all who need a value come before the step that makes it.
        for step in reversed(steps):
            if _writes_to(step, needs.memories, values):
                needs.note(step.refs(), values)
                needs.steps.append(step)
            elif not needs.values.isdisjoint(indices(step.made())):
                needs.note(_read_for(step, needs.values), values)
                needs.steps.append(step)
        needs.steps.reverse()
        return needs

    def note(self, refs: Iterable[Ref], values: Sequence[Value]) -> None:
        for ref in refs:
            self.values.add(ref.index)
            self.memories.add(values[ref.index].storage)


def read_memories(
    values: Sequence[Value], steps: Sequence[Step], results: Iterable[Ref]
) -> frozenset[int]:
    """Return the memories that results depend on, by their numbers in the recording."""
    return frozenset(Needs.of(values, steps, results).memories)


def steps_behind(
    values: Sequence[Value], steps: Sequence[Step], results: Iterable[Ref]
) -> list[Step]:
    """Return the steps that results depend on, in their order."""
    return Needs.of(values, steps, results).steps


def kinds_behind(
    values: Sequence[Value], steps: Sequence[Step], results: Iterable[Ref]
) -> set[str]:
    """Return the kinds of the values that results depend on."""
    return {values[i].kind for i in Needs.of(values, steps, results).values}


def _writes_to(step: Step, memories: set[int], values: Sequence[Value]) -> bool:
    """Return whether a step writes to one of these memories.

    That shows in every view of it, those that were made before the step as well.
    """
    return any(values[new.index].storage in memories for _, new in step.writes)


def _read_for(step: Step, needed: set[int]) -> list[Ref]:
    """Return what a step reads for those of its results that are needed."""
    returned = [i for i, ref in enumerate(step.outs) if ref is not None and ref.index in needed]
    if not returned:
        return []
    updated = ops.only_updated(step.op, step.named, returned)
    return [ref for ref in step.refs() if not _is_among(ref, step, updated)]


def _is_among(ref: Ref, step: Step, names: Sequence[str]) -> bool:
    """Return whether a value is an argument of one of these names, and of no other."""
    if not names:
        return False
    places = {name for name, argument in step.named.items() if argument == ref}
    return bool(places) and places.issubset(names)
