"""A sweep over PyTorch's own table of ops: each rule is held against what the op does to numbers.

`python tests/analysis/op_sweep.py` writes the page ``docs/reference/ops.md``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases.ops import calls, roles
from cases.ops.calls import Sample
from cases.ops.claims import INVALID, RAISED, WRONG, Outcome, Recorded, Trial, judge, recording_of
from cases.ops.roles import Call
from cases.ops.table import op_table

DTYPES = (torch.float64, torch.complex128, torch.int64, torch.bool)
MOST_SAMPLES = {torch.float64: 3, torch.complex128: 1, torch.int64: 1, torch.bool: 1}


@dataclass
class Row:
    """What came of all trials of one op, by the arguments that depended on samples."""

    op: str
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    ops: set[str] = field(default_factory=set)

    def add(self, title: str, what: str, outcome: Outcome) -> None:
        self.ops |= outcome.ops
        self.counts.setdefault(outcome.status, Counter())[arguments_in(what)] += 1
        if outcome.status in (WRONG, RAISED):
            self.findings.append(f"{outcome.status} | {self.op} | {title} {what} | {outcome.why}")

    @property
    def faulty(self) -> bool:
        """Some rule was wrong, or raised."""
        return bool(self.findings)


def arguments_in(what: str) -> str:
    """Return which arguments of a trial depend on samples: "0" or "0+1", with their kind."""
    found = []
    for part in what.split():
        name, _, place = part.partition("@")
        kind = place.rstrip("0123456789")
        found.append(name.removeprefix("arg") + (f" {kind}" if kind else ""))
    return "+".join(found)


def chosen(drawn: Sequence[list[Sample]], most: int) -> list[list[Sample]]:
    """Return a few sample inputs that differ in shapes or in other arguments."""
    different = {}
    for draws in drawn:
        different.setdefault((draws[0].signature, draws[0].constants), draws)
    found = list(different.values())
    if len(found) <= most:
        return found
    # Evenly over the list, in which PyTorch goes from plain cases to special ones.
    return [found[i * len(found) // most] for i in range(most)]


class Session:
    """The recordings of the calls of one op, which trials of one function share."""

    def __init__(self) -> None:
        self.recordings: dict[int, Recorded | Outcome] = {}
        self.kept: list[Any] = []

    def judge(self, trial: Trial, shares: bool) -> Outcome:
        if not shares:
            return judge(trial)
        key = id(trial.function)
        if key not in self.recordings:
            self.kept.append(trial.function)
            self.recordings[key] = recording_of(trial)
        run = self.recordings[key]
        if isinstance(run, Outcome):
            return run
        return judge(trial, run)


def plain_trials(call: Call) -> Iterator[tuple[Trial, bool]]:
    """All roles of a call. With each: whether it is the program itself, so that one recording
    serves all.
    """
    yield from _shared(islice(roles.owned_alone(call), 8))
    yield from _shared(roles.owned_in_pairs(call, 4))
    yield from _shared(islice(roles.owned_together(call), 1))
    yield from ((trial, False) for trial in islice(roles.statistics(call), 4))
    yield from ((trial, False) for trial in islice(roles.mixtures(call), 3))


def few_trials(call: Call) -> Iterator[tuple[Trial, bool]]:
    yield from _shared(islice(roles.owned_alone(call), 5))
    yield from _shared(roles.owned_in_pairs(call, 2))


def _shared(trials: Iterable[Trial]) -> Iterator[tuple[Trial, bool]]:
    for trial in trials:
        yield trial, True


def forms(op: Any, draws: list[Sample], first: bool) -> Iterator[tuple[str, Call, Any]]:
    """The forms in which one sample input of an op is run, with the trials of each."""
    call = calls.plain(op.op, draws)
    yield "plain", call, plain_trials
    if not first:
        return
    yield "inference", calls.inference(call), few_trials
    if op.inplace_variant is not None:
        yield "in place", calls.in_place(op.inplace_variant, call, draws), few_trials
    if op.supports_out:
        yield from _with_out(op, call, draws)
    outputs = calls.differentiated(call)
    if outputs:
        yield "backward", calls.backward(call, outputs), few_trials
        yield "twice", calls.backward(call, outputs, 2), few_trials


def _with_out(op: Any, call: Call, draws: list[Sample]) -> Iterator[tuple[str, Call, Any]]:
    yield "fresh out", calls.into_fresh(op.op, call, draws), few_trials
    try:
        out = call.function(*[t.clone() for t in call.tensors])
    except Exception:
        return
    if isinstance(out, torch.Tensor) and out.ndim and out.numel():
        yield "owned out", calls.into_buffer(op.op, draws, out), few_trials


def sweep(name: str) -> Row:
    """Run all trials of one op."""
    op, row, session = op_table()[name], Row(name), Session()
    for dtype in DTYPES:
        if dtype not in op.dtypes:
            continue
        try:
            drawn = calls.drawn(op, dtype)
        except Exception as error:
            row.add(str(dtype), "", Outcome(INVALID, f"{type(error).__name__}: {error}"))
            continue
        for number, draws in enumerate(chosen(drawn, MOST_SAMPLES[dtype])):
            few = dtype in (torch.float64, torch.complex128) and number < 1
            for form, call, trials in forms(op, draws, few):
                for trial, shares in trials(call):
                    title = f"{form} {dtype} {described(draws[0])}"
                    row.add(title, trial.what, session.judge(trial, shares))
        if dtype == torch.float64 or torch.float64 not in op.dtypes:
            _constants(op, drawn, row, session)
    return row


def _constants(op: Any, drawn: Sequence[list[Sample]], row: Row, session: Session) -> None:
    """Calls with other arguments that are no tensors, all in one program."""
    groups = sorted(calls.by_signature(drawn), key=len, reverse=True)
    for group in groups[:2]:
        draws = group[0]
        changed = calls.variants([d[0] for d in group])
        changed = calls.accepted(op.op, changed, draws)
        if len(changed) < 2:
            continue
        call = calls.several(op.op, changed, draws)
        for trial in islice(roles.owned_alone(call), 3):
            title = f"constants {described(draws[0])} {[s.constants for s in changed]}"
            row.add(title, f"constants+{trial.what}", session.judge(trial, True))


def described(sample: Sample) -> str:
    parts = []
    for leaf in sample.leaves:
        parts.append(str(list(leaf.shape)) if isinstance(leaf, torch.Tensor) else repr(leaf))
    return f"({', '.join(parts)})"


if __name__ == "__main__":
    import time

    torch.set_num_threads(1)
    names = sys.argv[2:] or list(op_table())
    with open(sys.argv[1], "a") as log:
        for name in names:
            begun = time.time()
            try:
                row = sweep(name)
            except Exception as error:
                log.write(f"CRASH | {name} | {type(error).__name__} {error}\n")
                continue
            log.write(f"ROW | {name} | {dict(row.counts)} | {time.time() - begun:.1f}\n")
            log.write(f"OPS | {name} | {' '.join(sorted(row.ops))}\n")
            for finding in row.findings:
                log.write(finding[:1500].replace("\n", " ") + "\n")
            log.flush()
