"""What a run of a program has left behind, for its backward passes.

All that a run changes is put back when it ends (``isolation.py``). What autograd has kept of it may
lie in the parameters and buffers of the program, and hooks and functions of the user's own may read
what the run has noted in Python. So a backward pass is made in the state that the run has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unbatch.capture.holders import Holder, contents, restore
from unbatch.capture.reachable import Reachable
from unbatch.capture.tensor_states import Saved, TensorState, put_content, set_version
from unbatch.capture.trees import version_of


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

    def note_tensors(self, saved: Iterable[Saved], before: Iterable[TensorState]) -> None:
        """Note what is left in tensors, by what was there before the first write to each."""
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
        self.noted = True

    def note_places(self, reached: Reachable, before: Sequence[Any]) -> None:
        """Note what is left in Python, by what was there before."""
        for holder, content in zip(reached.holders, before, strict=True):
            if not holder.same(holder.mark_of(content)):
                self.places = Reachable(reached.roots).holders
                self.contents = contents(self.places)
                return

    def put_in_place(self, save: Callable[[Tensor], None]) -> None:
        """Let all be as the run left it; ``save`` is called before a tensor is written to."""
        restore(self.places, self.contents, [])
        for state in self.states:
            state.restore_memory()
            state.restore_hooks()
        with torch.no_grad():
            for tensor, whole, content, version in self.tensors:
                save(tensor)
                put_content(whole, content)
                set_version(tensor, version)
