"""Recorded steps, run again on other tensors.

An interpreter of steps: it keeps the tensors that later steps read, and lets go of the others.
Which steps are run, and with which random state, is for the graph to say (``graph.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unbatch.capture.effort import spend
from unbatch.capture.steps import Ref, Step, Value, filled
from unbatch.capture.trees import flat
from unbatch.running.interrupts import stop_if_asked

Visit = Callable[[int, Tensor], None]


class Replay:
    """One run of recorded steps.

    ``feed``: tensors that the run starts from, by value; others come from the recording.
    ``pinned``: values that have these tensors whatever the steps compute (frozen statistics).
    ``instead``: functions to run in place of some steps' ops, by step.
    ``visit``: called with every value that a step returns.
    ``overwritten``: the memories that the recording writes to.
    """

    def __init__(
        self,
        values: Sequence[Value],
        overwritten: Collection[int],
        feed: Mapping[int, Tensor],
        pinned: Mapping[int, Tensor],
        instead: Mapping[int, Callable[..., Any]],
        visit: Visit | None,
    ) -> None:
        self.values = values
        self.overwritten = overwritten
        self.feed = feed
        self.pinned = pinned
        self.instead = instead
        self.visit = visit
        self.tensors: dict[int, Tensor] = {}

    def run(
        self, steps: Sequence[Step], wanted: Sequence[int], last_uses: Mapping[int, Sequence[int]]
    ) -> list[Tensor]:
        """Run ``steps`` in order and return the values ``wanted``.

        ``last_uses``: step -> the values that no later one reads, whose memory is free then.
        """
        spend(sum(step.ops for step in steps))
        tensors, needed = self.tensors, set(wanted)
        for step in steps:
            stop_if_asked()
            self._store(step, self._call(step))
            # By the whole recording: of a part of the steps no value goes too early.
            for index in last_uses.get(step.index, ()):
                if index not in needed:
                    tensors.pop(index, None)
        return [self.tensor(Ref(index)) for index in wanted]

    def tensor(self, ref: Ref) -> Tensor:
        """Return the tensor of a value; ``ValueError`` if nothing has made it."""
        tensor = self.tensors.get(ref.index)
        if tensor is None:
            tensor = self.tensors[ref.index] = self._from_outside(ref.index)
        return tensor

    def _from_outside(self, index: int) -> Tensor:
        """Return what the caller feeds for a value, or the recording has for it."""
        tensor = self.feed.get(index, self.values[index].concrete)
        if tensor is None:
            raise ValueError(
                f"Value {index} ({self.values[index]}) was not computed: "
                "feed it, or replay the step that makes it."
            )
        return self._own(index, tensor)

    def _own(self, index: int, tensor: Tensor) -> Tensor:
        """Return a tensor of the caller, or a copy of it if the steps will write to its memory."""
        if self.values[index].storage in self.overwritten:
            return tensor.clone()
        # What a sparse tensor is made of lies in other memories than its own.
        if self.overwritten and tensor.layout != torch.strided:
            return tensor.clone()
        return tensor

    def _call(self, step: Step) -> list[Any]:
        """Return the results of a step's op, or of what runs in its place, on the tensors here."""
        tensor = self.tensor
        # Most steps have their tensors by place: no tree to go through.
        if step.plain:
            args: Any = [tensor(a) if type(a) is Ref else a for a in step.args]
            kwargs: Any = step.kwargs
        else:
            args = filled(step.args, tensor)
            kwargs = filled(step.kwargs, tensor)
        op = self.instead.get(step.index, step.op)
        # As recorded: what was computed under ``no_grad`` is a constant to autograd.
        if step.grad or not torch.is_grad_enabled():
            return flat(op(*args, **kwargs))
        with torch.no_grad():
            return flat(op(*args, **kwargs))

    def _store(self, step: Step, outs: Sequence[Any]) -> None:
        """Enter what a step returned, and new versions of what it wrote to."""
        tensors = self.tensors
        for ref, out in zip(step.outs, outs, strict=False):
            if ref is not None and isinstance(out, bool):
                out = torch.tensor(out)  # an answer is a value like others
            if ref is not None and isinstance(out, Tensor):
                tensors[ref.index] = out
        if self.pinned:
            self._pin(step)
        if self.visit is not None:
            self._show(step, self.visit)
        for old, new in step.writes:
            if new.index in self.pinned:
                tensors[old.index].copy_(self.pinned[new.index])
            # What the op returned may be another tensor than it was given (a substitute's copy):
            # then older views of the value have to go by that one, too.
            if new.index in tensors:
                tensors[old.index] = tensors[new.index]
            else:
                tensors[new.index] = tensors[old.index]

    def _pin(self, step: Step) -> None:
        """Put pinned tensors in place of what a step returned.

        The op has run all the same: it may write to other values, and draw.
        """
        for ref in step.outs:
            if ref is not None and ref.index in self.pinned and ref.index in self.tensors:
                self.tensors[ref.index] = self._own(ref.index, self.pinned[ref.index])

    def _show(self, step: Step, visit: Visit) -> None:
        """Call ``visit`` with what a step returned."""
        for ref in step.outs:
            if ref is not None and ref.index in self.tensors:
                visit(ref.index, self.tensors[ref.index])
