"""What a program writes itself and does not depend on: counters, histories, the last activations.

Such things change with every step of a training loop, and a recording stays valid all the same.
That is tried out, and only for programs that are seen to write: the program runs again where it
left off, and with its counters far ahead. What escapes that, the spot checks are for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch.capture.holders import Holder
from unbatch.capture.isolation import contents_untouched, set_random_state
from unbatch.capture.program import Program
from unbatch.capture.trees import copied

# How far counters are moved: beyond any warm-up.
FAR = 10**7

Written = dict[int, set[Hashable]]


def idle(program: Program, inputs: Any, targets: Any, rng: tuple[Any, ...]) -> Written:
    """Return what the program changes without reading it: numbers of holders, and names there."""
    reached = program.reachable
    written = {i: set(names) for i, names in reached.written.items()}
    if not written:
        return {}
    counters = _counters(reached.holders, written)
    try:
        with program.untouched(rng), torch.enable_grad():
            first = _run(program, inputs, targets)
            set_random_state(rng)
            again = _run(program, inputs, targets)
            for holder, name, number in counters:
                holder.put(name, number + FAR)
            set_random_state(rng)
            ahead = _run(program, inputs, targets)
    except Exception:
        return {}  # it depends on them so much that it does not run
    if not _equal(first, again):
        return {}
    if not _equal(first, ahead):
        for i, names in written.items():
            names -= {name for holder, name, _ in counters if holder is reached.holders[i]}
    return written


def _counters(holders: list[Holder], written: Written) -> list[tuple[Holder, Any, Any]]:
    """Return the numbers among what is written, with their places."""
    counters: list[tuple[Holder, Any, Any]] = []
    for i, names in written.items():
        for name, value in holders[i].values():
            if name in names and isinstance(value, int | float) and not isinstance(value, bool):
                counters.append((holders[i], name, value))
    return counters


def _run(program: Program, inputs: Any, targets: Any) -> list[Any]:
    """Return what the program returns; what it writes to tensors is put back at once."""
    with contents_untouched():
        output = program.predict(inputs)
        results = tree_leaves(output)
        if program.loss is not None:
            results += tree_leaves(program.evaluate(output, targets))
        return [copied(result) for result in results]


def _equal(first: list[Any], second: list[Any]) -> bool:
    """Return whether results are the same in every bit."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        if not isinstance(a, Tensor):
            continue
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return False
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            return False
    return True
