"""A sweep over PyTorch's own table of ops: each rule is held against what the op does to numbers.

`python tests/analysis/op_sweep.py` writes the page ``docs/reference/ops.md``; with names behind it,
the lines of these ops alone. What the installed PyTorch does not have keeps its line.
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

from cases.ops import aten, calls, roles
from cases.ops.calls import Sample
from cases.ops.claims import (
    IMPRECISE,
    INVALID,
    MIXING,
    RAISED,
    REFUSED,
    RIGHT,
    UNKNOWN,
    WRONG,
    Outcome,
    Recorded,
    Trial,
    judge,
    recording_of,
)
from cases.ops.known import LEFT_OUT, OWN_ARGUMENTS, UNCHECKED_INTEGERS, UNCHECKED_SIZES
from cases.ops.own import OWN
from cases.ops.roles import Call
from cases.ops.table import op_table

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "ops.md"

STATUSES = (RIGHT, MIXING, IMPRECISE, UNKNOWN, REFUSED)
TITLES = ("right", "mixed on purpose", "mixed, though nothing mixes", "unknown", "refused")

HEAD = """# Ops and their rules

How each op passes on which sample owns what is a *rule*. This table holds the rules against the
ops themselves. Each op of PyTorch's own table of ops runs on the inputs that PyTorch tests it on,
with samples along one axis of one or several arguments, or with a statistic or a mixture of the
samples for an argument; plain, in place, into a buffer, backward, backward twice, and in
inference mode; with real, complex, integer and boolean numbers. Samples are then replaced and put
into other orders. *Right* means: what the rule says of each number (whose it is, and which
function of its sample) held. Numbers count such runs by argument: `0+1` says that the first two
arguments depended on samples, `0 statistic` that the first was a statistic of the batch.

- **mixed on purpose**: numbers depend on several samples, in no symmetric way, and the rule says
  so
- **mixed, though nothing mixes**: the rule says so where numbers depended on one sample each:
  verdicts become unknown
- **unknown**: no rule, or a number that Python read
- **refused**: the question is refused, with a message

`python tests/analysis/op_sweep.py` writes this page, and a test holds it to what the sweep says.
"""

FOOT = """Ops without a line take no tensor that may hold samples, accept no other samples, or
draw as many random numbers as their arguments say, so that two runs cannot be compared:"""

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
    yield from _shared(islice(roles.owned_alone(call), 6))
    yield from _shared(roles.owned_in_pairs(call, 3))
    yield from _shared(islice(roles.owned_together(call), 1))
    yield from ((trial, False) for trial in islice(roles.statistics(call), 3))
    yield from ((trial, False) for trial in islice(roles.mixtures(call), 2))


def few_trials(call: Call) -> Iterator[tuple[Trial, bool]]:
    yield from _shared(islice(roles.owned_alone(call), 4))
    yield from _shared(roles.owned_in_pairs(call, 1))


def _shared(trials: Iterable[Trial]) -> Iterator[tuple[Trial, bool]]:
    for trial in trials:
        yield trial, True


def forms(op: Any, draws: list[Sample], first: bool) -> Iterator[tuple[str, Call, Any]]:
    """The forms in which one sample input of an op is run, with the trials of each."""
    call = calls.plain(op.op, draws)
    yield "plain", call, plain_trials
    if not first:
        return
    sizes = None
    if op.name not in UNCHECKED_SIZES:
        sizes = calls.of_many_sizes(call)
    if sizes is not None:
        yield "sizes", sizes, few_trials
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
        integers = op.name not in UNCHECKED_INTEGERS
        changed = calls.variants([d[0] for d in group], integers)
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


# --- ops of ATen called directly ------------------------------------------------------------------


def sweep_aten(name: str) -> Row:
    """Run trials of all overloads of an op of ATen, with arguments made from its schema."""
    row, session = Row(f"aten.{name}"), Session()
    for op in aten.overloads(name):
        for attempt in aten.attempts(op):
            for trial, shares in plain_trials(attempt.call):
                row.add(f"{op} {attempt.title}", trial.what, session.judge(trial, shares))
    return row


def sweep_own(name: str) -> Row:
    """Run trials of a call written by hand."""
    row, session = Row(f"own.{name}"), Session()
    for own in OWN:
        if own.name == name:
            for trial, shares in plain_trials(own.call):
                row.add("", trial.what, session.judge(trial, shares))
    return row


def row_of(name: str) -> Row:
    """Return the row of an op, by its name in the page."""
    kind, _, rest = name.partition(".")
    if kind == "aten":
        return sweep_aten(rest)
    if kind == "own":
        return sweep_own(rest)
    return sweep(name)


# --- the page -------------------------------------------------------------------------------------


def cell(counts: Counter[str]) -> str:
    """Return counts by argument: "0: 12, 1: 8"."""
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))


def line_of(row: Row) -> str:
    cells = [f"`{row.op}`"]
    for status in STATUSES:
        cells.append(cell(row.counts.get(status, Counter())))
    return f"| {' | '.join(cells)} |"


def statuses_in(line: str) -> dict[str, set[str]]:
    """Return which arguments a line of the page has under each status."""
    cells = [part.strip() for part in line.strip().strip("|").split(" | ")]
    cells += [""] * (1 + len(STATUSES) - len(cells))
    found = {}
    for status, text in zip(STATUSES, cells[1:], strict=False):
        found[status] = {part.split(":")[0] for part in text.split(", ") if part}
    return found


def lines_of_page() -> dict[str, str]:
    """Return the lines of the table in the page, by op."""
    lines = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            lines[line.split("`")[1]] = line
    return lines


def idle_on_page() -> list[str]:
    """Return the ops without a line, which stand at the end of the page."""
    _, _, names = PAGE.read_text(encoding="utf-8").partition(FOOT)
    return names.split("`")[1::2]


def write_page(names: Sequence[str]) -> None:
    """Run the sweeps of these ops and write the page; what is wrong goes to the terminal."""
    lines, idle = lines_of_page(), dict.fromkeys(idle_on_page())
    for name in names:
        row = row_of(name)
        idle.pop(name, None)
        if row.faulty:
            lines.pop(name, None)
            sys.stdout.write("\n".join(row.findings[:2])[:1500] + "\n")
        elif any(row.counts.get(status) for status in STATUSES):
            lines[name] = line_of(row)
        else:
            lines.pop(name, None)
            idle[name] = None
    text = [HEAD, f"| op | {' | '.join(TITLES)} |", "|---" * (1 + len(TITLES)) + "|"]
    text += [*lines.values(), "", FOOT, "", ", ".join(f"`{name}`" for name in idle) + "."]
    PAGE.write_text("\n".join(text) + "\n", encoding="utf-8")


def names_of_sweeps() -> list[str]:
    """Return the ops of PyTorch's table, and those with a rule that it does not reach."""
    names = [name for name in op_table() if name not in LEFT_OUT]
    names += [f"aten.{name}" for name in OWN_ARGUMENTS]
    return names + [f"own.{own.name}" for own in OWN]


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_page(sys.argv[1:] or names_of_sweeps())
