"""Which memories the results of a recording depend on, of those that it starts from.

What a program only updates in place from itself, such as running statistics in training or a count
of batches, changes no result: other numbers there leave all answers valid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from unbatch.capture import ops
from unbatch.capture.steps import Ref, Step, Value


def read_memories(
    values: Sequence[Value], steps: Sequence[Step], results: Iterable[Ref]
) -> frozenset[int]:
    """Return the memories that results depend on, by their numbers in the recording.

    Of memory that is written to nothing finer is known: all of it counts.
    """
    needed: set[int] = set()
    memories: set[int] = set()

    def note(refs: Iterable[Ref]) -> None:
        for ref in refs:
            needed.add(ref.index)
            memories.add(values[ref.index].storage)

    note(results)
    # Backwards, so that all who need a value come before the step that makes it.
    for step in reversed(steps):
        if _writes_to(step, memories, values):
            note(step.refs())
        else:
            note(_read_for(step, needed))
    return frozenset(memories)


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
