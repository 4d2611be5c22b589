"""What a run of a program has left behind, for its backward passes.

All that a run changes is put back when it ends (``isolation.py``). What autograd has kept of it may
lie in the parameters and buffers of the program, and hooks and functions of the user's own may read
what the run has noted in Python. So a backward pass is made in the state that the run has left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from unbatch.capture.holders import Holder, contents, restore
from unbatch.capture.reachable import Reachable
from unbatch.capture.tensor_states import Saved, TensorState, put_content, set_version
from unbatch.capture.trees import version_of


def lasting() -> contextlib.AbstractContextManager[None]:
    """Return a context in which autograd keeps copies of what has no derivatives.

    A run may write to buffers that are put back, and read them before or after.
    """
    return saved_tensors_hooks(_lasting, lambda t: t)


def _lasting(saved: Tensor) -> Tensor:
    # Of what has derivatives autograd knows the history, which would be kept in a circle.
    return saved.detach() if saved.requires_grad else saved.clone()


@dataclass
class AfterRun:
    """What was there before and has been changed, as a run has left it.

    ``tensors``: the memories that it has written to. ``states``: of tensors that it has given
    another memory, or hooks. ``places``, ``contents``: all places in Python, if it has changed one:
    there may be new ones behind. ``noted``: there has been a run.
    """

    tensors: list[Saved] = field(default_factory=list)
    states: list[TensorState] = field(default_factory=list)
    places: list[Holder] = field(default_factory=list)
    contents: list[Any] = field(default_factory=list)
    noted: bool = False

    @property
    def changed(self) -> list[Tensor]:
        """Return the tensors that have another memory, or other hooks."""
        return [state.tensor for state in self.states]

    def note(
        self,
        reached: Reachable,
        contents_before: Sequence[Any],
        saved: Iterable[Saved],
        states_before: Iterable[TensorState],
    ) -> None:
        """Note what is left, by what was there before in places, memories and tensors."""
        self._note_tensors(saved, states_before)
        self._note_places(reached, contents_before)
        self.noted = True

    def _note_tensors(self, saved: Iterable[Saved], before: Iterable[TensorState]) -> None:
        for tensor, whole, content, version in saved:
            if whole.untyped_storage().nbytes() < content.nbytes:
                continue  # it has been freed: a backward pass cannot need it
            if version_of(tensor) != version or not torch.equal(whole, content):
                self.tensors.append((tensor, whole, whole.clone(), version_of(tensor)))
        for state in before:
            now = TensorState.of(state.tensor)
            has_hooks = now.hooks != state.hooks or now.later_hooks != state.later_hooks
            if has_hooks or not state.lies_as(state.tensor):
                self.states.append(now)

    def _note_places(self, reached: Reachable, before: Sequence[Any]) -> None:
        for holder, content in zip(reached.holders, before, strict=True):
            if not _is_as_it_was(holder, content):
                self.places = Reachable(reached.roots).holders
                self.contents = contents(self.places)
                return

    def put_in_place(self, save: Callable[[Tensor], None], failures: list[Exception]) -> None:
        """Let all be as the run left it, and note what cannot be among the ``failures``.

        ``save`` is called before a tensor is written to.
        """
        restore(self.places, self.contents, failures)
        for state in self.states:
            state.restore_memory()
            state.restore_hooks()
        # All before the first write: two may be one memory, as another library hands it out.
        for tensor, *_ in self.tensors:
            save(tensor)
        with torch.no_grad():
            for tensor, whole, content, version in self.tensors:
                put_content(whole, content)
                set_version(tensor, version)


def _is_as_it_was(holder: Holder, content: Any) -> bool:
    """Return whether a place has that content; not where it cannot be looked at."""
    with contextlib.suppress(Exception):
        return holder.same(holder.mark_of(content))
    return False
