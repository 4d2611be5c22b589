"""The verdicts and some numbers of every zoo entry, in train and in eval mode; writes
`docs/benchmarks/zoo.md`.

    python benchmarks/zoo_table.py                  every entry, into docs/benchmarks/zoo.md and results/zoo.json
    python benchmarks/zoo_table.py --resume         ... but for those that are in results/zoo.json
    python benchmarks/zoo_table.py bert cv-resnet   these entries, printed
    python benchmarks/zoo_table.py --quick          every eighth entry, printed

Entries come from `tests/cases/zoo.py`; what is expected of them lives in
`tests/analysis/test_zoo.py`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import unbatch as ub  # noqa: E402
from cases.zoo import ENTRIES, N, ZooEntry, entry  # noqa: E402
from lib import exam  # noqa: E402
from lib.exam import QUESTIONS, Answer, Exam  # noqa: E402
from unbatch.analysis.structure import NAMES  # noqa: E402
from unbatch.analysis.structure_tables import MARKS  # noqa: E402
from unbatch.analysis.verdict import TITLES  # noqa: E402

DOCS = ROOT / "docs" / "benchmarks" / "zoo.md"
RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
MODES = ("train", "eval")
PACKAGES = ("torch", "transformers", "pytorchcv")
QUICK = 8  # every so many entries


@dataclass(frozen=True)
class Reason:
    """Why a verdict does not hold: the op, the line of the model, and the words of the culprit."""

    structure: str
    op: str
    where: str
    why: str


@dataclass(frozen=True)
class Row:
    """One entry in one mode. `failure` is set, and the rest is empty, where a question raised an
    error.
    """

    entry: str
    mode: str
    statuses: dict[str, str] = field(default_factory=dict)
    bases: dict[str, str] = field(default_factory=dict)
    statistics_size: int = 0
    reasons: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()
    milliseconds: float = 0.0
    checked: int = 0
    contradictions: tuple[str, ...] = ()
    failure: str = ""
    exam: Exam | None = None

    @property
    def wrong(self) -> bool:
        return bool(self.failure or self.contradictions) or (
            self.exam is not None and not self.exam.right
        )

    @property
    def refused(self) -> bool:
        return self.exam is not None and any(a.refusal for a in self.exam.answers.values())

    @property
    def settled(self) -> bool:
        """Every verdict is decided, and every number is right."""
        return not (self.wrong or self.refused or self.unknown)

    @property
    def unknown(self) -> tuple[str, ...]:
        return tuple(name for name, status in self.statuses.items() if status == "unknown")


# --- asking ---------------------------------------------------------------------------------------


def problem_of(item: ZooEntry, mode: str) -> ub.Problem:
    """The entry as a user would write it; a model that computes its own
    loss takes the batch alone.
    """
    model, inputs, targets, loss = item.build()
    model.train(mode == "train")
    return (
        ub.Problem(model, batch=inputs)
        if loss is None
        else ub.Problem(model, loss, (inputs, targets))
    )


def ask(item: ZooEntry, mode: str, verify: bool = True, numbers: bool = False) -> Row:
    """Structure and verification of one entry, and its ``numbers``. The milliseconds (CPU) are the
    structure's.
    """
    torch.manual_seed(0)
    problem = problem_of(item, mode)
    start = time.process_time()
    try:
        structure = problem.structure
        milliseconds = 1e3 * (time.process_time() - start)
        checks = problem.verify().checks if verify else ()
        examined = _examined(item, mode) if numbers else None
    except Exception as error:
        return Row(item.name, mode, failure=_without_paths(f"{type(error).__name__}: {error}"))
    return Row(
        item.name,
        mode,
        {v.name: v.status for v in structure.verdicts},
        {v.name: v.basis for v in structure.verdicts},
        structure.statistics_size,
        tuple(_reasons(structure)),
        tuple(_without_paths(note) for note in structure.notes),
        round(milliseconds, 1),
        sum(c.passed is not None for c in checks),
        tuple(
            f"{TITLES[c.name]} {c.status}, but {c.test}: {c.detail}"
            for c in checks
            if c.passed is False
        ),
        exam=examined,
    )


def _examined(item: ZooEntry, mode: str) -> Exam:
    model, *rest = item.build()
    found = exam.examine((model.train(mode == "train"), *rest))
    answers = {q: replace(a, refusal=_without_paths(a.refusal)) for q, a in found.answers.items()}
    return replace(found, answers=answers)


def _reasons(structure: ub.Structure) -> Iterator[Reason]:
    for verdict in structure.verdicts:
        for c in dict.fromkeys((c.op, c.short, c.why) for c in verdict.culprits):
            yield Reason(verdict.name, *c[:2], _without_paths(c[2]))
        if verdict.status == "unknown" and not verdict.culprits:
            yield Reason(verdict.name, "", "", verdict.note or "no reason is given")


def _without_paths(text: str) -> str:
    """Folders of this machine out of a text: only the last part of a path stays."""
    return re.sub(r"(?<![\w.])/[\w.@+-]+(?:/[\w.@+-]+)*/", "", text).splitlines()[0] if text else ""


def rows(
    items: Iterable[ZooEntry],
    modes: Sequence[str] = MODES,
    verify: bool = True,
    numbers: bool = False,
) -> Iterator[Row]:
    """The rows of the entries, as they come."""
    for item in items:
        for mode in modes:
            yield ask(item, mode, verify, numbers)


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# Zoo

<!-- Written by benchmarks/zoo_table.py; change that, not this. -->

Each row is one published architecture, built from the code of `transformers` {transformers} or
`pytorchcv` {pytorchcv} with a tiny random configuration ({samples} samples, a few channels, nothing
downloaded), and analysed with torch {torch} on a CPU, in train mode and in eval mode. So the table
shows what the *code* of these models does to a mini-batch; it says nothing about trained weights,
and little about sizes or branches that these configurations do not reach. A model that computes its
own loss is used with it; the entries called `-outer-loss` use an external one. Every verdict is
then put to a numerical test (other samples replaced, samples permuted, statistics frozen, second
differences of the loss): the last column counts the tests that apply and those that contradict a
verdict. A test can refute a verdict, but not confirm one.

The columns are the six structures ({legend}), the number R of batch statistics, the first culprit
of a verdict that does not hold (`benchmarks/results/zoo.json` has all of them), and the time for
capture, analysis and witnesses in milliseconds: process CPU time on one thread, one cold run each,
so only an order of magnitude. To regenerate this page run `make zoo`, which takes about half an
hour; `python benchmarks/zoo_table.py` with names of entries, or with `--quick`, prints a part of
it.

{summary}
"""

COLUMNS = ("split", "independent", "SIMD", "SIMD given s", "reduction", "SIMD loss")


def page(table: Sequence[Row]) -> str:
    """`docs/benchmarks/zoo.md`: how it was made, the table, and what stayed unknown and why."""
    versions = {name: version(name).partition("+")[0] for name in PACKAGES}
    legend = ", ".join(f"{mark} {status}" for status, mark in MARKS.items())
    head = HEADER.format(**versions, samples=N, legend=legend, summary=summary(table))
    parts = [
        _table(table),
        _numbers(table),
        _failures(table),
        _contradictions(table),
        _unknowns(table),
    ]
    return "\n".join([head, *(line for part in parts for line in part)]).rstrip() + "\n"


def summary(table: Sequence[Row]) -> str:
    """How many verdicts hold, fail and are open, in words."""
    counts = Counter(status for row in table for status in row.statuses.values())
    contradicted = sum(bool(row.contradictions) for row in table)
    failed = sum(bool(row.failure) for row in table)
    wrong, refused = (
        {row.entry for row in table if getattr(row, what)} for what in ("wrong", "refused")
    )
    entries = {row.entry for row in table}
    open_ = {row.entry for row in table if not row.settled}
    return (
        f"In the {len(table)} rows below, of {len(entries)} entries, "
        f"{counts['holds']} verdicts hold, {counts['fails']} fail and {counts['unknown']} are unknown.\n"
        f"Rows where a test contradicts a verdict: {contradicted}. Rows that ended in an error: {failed}.\n"
        f"Entries with a wrong result: {len(wrong)}. Entries for which a number is refused, with the reason: "
        f"{len(refused - wrong)}.\n"
        f"Entries for which every verdict is decided and every number is right, in both modes: "
        f"{len(entries - open_)} of {len(entries)}."
    )


def _table(table: Sequence[Row]) -> Iterator[str]:
    columns = ("entry", "mode", *COLUMNS, "R", "first culprit", "ms", "tests")
    yield _line(columns)
    yield _line(["---"] * len(columns))
    for row in table:
        marks = (
            [MARKS[row.statuses[name]] for name in NAMES] if row.statuses else ["–"] * len(NAMES)
        )
        size = str(row.statistics_size) if row.statistics_size else ""
        time_ = "" if row.failure else f"{row.milliseconds:.0f}"
        yield _line([row.entry, row.mode, *marks, size, _first_culprit(row), time_, _tests(row)])
    yield ""


NUMBERS = """\
## Numbers

Component rows of the gradient, a product with the Gauss-Newton matrix and its diagonal were
computed for four of the parameters of each entry (of up to {largest} entries each), and compared
with plain autograd on the unmodified model: every row by its own backward pass, products by double
backward, and some entries of the diagonal by products with unit vectors. In float64, or in float32
if the model has an op that supports nothing else; ✓ is a relative error below {fine} or {coarse}.
Times are multiples of one forward and backward pass of the whole model, cold: recording, analysis
and self-check included, which a second question does not need. MiB is the peak growth of resident
memory. *Refused* is followed by the reason; a dash means that a prediction has so many entries
({columns}) that the diagonal would need as many backward passes.
"""


def _numbers(table: Sequence[Row]) -> Iterator[str]:
    found = [(row, row.exam) for row in table if row.exam is not None]
    if not found:
        return
    bounds = {"fine": exam.RIGHT[torch.float64], "coarse": exam.RIGHT[torch.float32]}
    yield NUMBERS.format(largest=exam.LARGEST, columns=f"over {exam.COLUMNS}", **bounds)
    columns = (
        "entry",
        "mode",
        "type",
        "step, ms",
        *(c for q in QUESTIONS for c in (q, "steps", "MiB")),
    )
    yield _line(columns)
    yield _line(["---"] * len(columns))
    for row, sat in found:
        cells = [c for q in QUESTIONS for c in _cells(sat, sat.answers[q])]
        yield _line([row.entry, row.mode, sat.dtype, f"{1e3 * sat.step:.0f}", *cells])
    yield ""


def _cells(sat: Exam, answer: Answer) -> list[str]:
    if answer.refusal:
        return [f"refused: {answer.refusal.partition('. ')[0]}", "", ""]
    if answer.error is None:
        return ["–", "", ""]
    mark = "✓" if sat.holds(answer) else f"**off by {answer.error:.1g}**"
    return [mark, f"{answer.seconds / sat.step:.0f}", f"{answer.mebibytes:.0f}"]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _first_culprit(row: Row) -> str:
    reasons = dict.fromkeys((r.op, r.where) for r in row.reasons if r.where)
    if not reasons:
        return ""
    (op, where), *others = reasons
    return f"`{op}` {where}" + (f", {len(others)} more" if others else "")


def _tests(row: Row) -> str:
    if row.failure:
        return "error"
    against = len(row.contradictions)
    return f"**{against} of {row.checked} contradict**" if against else f"{row.checked} agree"


def _failures(table: Sequence[Row]) -> Iterator[str]:
    failed = [r for r in table if r.failure]
    if failed:
        yield from ["## Errors", "", *(f"- {r.entry}, {r.mode}: {r.failure}" for r in failed), ""]


def _contradictions(table: Sequence[Row]) -> Iterator[str]:
    found = [(r, c) for r in table for c in r.contradictions]
    if found:
        yield from ["## Contradicted", "", *(f"- {r.entry}, {r.mode}: {c}" for r, c in found), ""]


def _unknowns(table: Sequence[Row]) -> Iterator[str]:
    """One paragraph per reason: what was not established, in which entries, and where in their
    code.
    """
    entries: dict[str, dict[str, None]] = {}
    places: dict[str, Counter[str]] = {}
    for row in table:
        for r in (r for r in row.reasons if r.structure in row.unknown):
            why = re.sub(r"\d+ numbers", "some numbers", r.why)
            entries.setdefault(why, {})[row.entry] = None
            places.setdefault(why, Counter())[f"`{r.op}` {r.where}" if r.where else r.op] += 1
    yield from ["## What stayed unknown", ""]
    if not entries:
        yield "Nothing."
    for why in sorted(entries, key=lambda w: (-len(entries[w]), w)):
        where = [place for place, _ in places[why].most_common(6) if place]
        more = len(places[why]) - len(where)
        count = f"{len(entries[why])} entries" if len(entries[why]) > 1 else "One entry"
        yield f"**{why[:1].upper()}{why[1:]}.** {count}: {', '.join(entries[why])}."
        if where:
            yield f"Where: {', '.join(where)}" + (f", and {more} more." if more > 0 else ".")
        yield ""


# --- the command ----------------------------------------------------------------------------------


def as_json(table: Sequence[Row]) -> str:
    """Rows and versions as JSON; nothing in it names this machine."""
    facts: dict[str, Any] = {"python": platform.python_version()}
    facts |= {name: version(name) for name in PACKAGES}
    facts["rows"] = [asdict(row) for row in table]
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def loaded(results: Path = RESULTS) -> list[Row]:
    """The rows that were written before, of entries that were asked in every mode."""
    found = json.loads(results.read_text())["rows"] if results.exists() else []
    asked = Counter(row["entry"] for row in found)
    return [_row(row) for row in found if asked[row["entry"]] == len(MODES)]


def _row(row: dict[str, Any]) -> Row:
    sat = row["exam"] and Exam(
        **row["exam"] | {"answers": {q: Answer(**a) for q, a in row["exam"]["answers"].items()}}
    )
    return Row(**row | {"reasons": tuple(Reason(**r) for r in row["reasons"]), "exam": sat})


def save(table: Sequence[Row], docs: Path = DOCS, results: Path = RESULTS) -> None:
    """Write the page and the data behind it, in the order of the zoo."""
    order = {item.name: i for i, item in enumerate(ENTRIES)}
    table = sorted(table, key=lambda row: order.get(row.entry, len(order)))
    results.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page(table))
    results.write_text(as_json(table))


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", help="entries to ask; all of them by default")
    parser.add_argument("--quick", action="store_true", help=f"every {QUICK}th entry only")
    parser.add_argument(
        "--resume", action="store_true", help="leave out entries that have been asked"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    items = [entry(name) for name in options.names] or ENTRIES[:: QUICK if options.quick else 1]
    whole = len(items) == len(ENTRIES)
    table = loaded() if options.resume else []
    done = {row.entry for row in table}
    for row in rows([item for item in items if item.name not in done], numbers=True):
        table.append(row)
        marks = "".join(MARKS[s] for s in row.statuses.values()) or "error"
        line = f"{row.entry:24} {row.mode:5} {marks:6} {row.milliseconds:7.0f} ms  {_tests(row)}{'  WRONG' * row.wrong}"
        print(line, file=sys.stderr, flush=True)
        if whole:
            save(table)  # what is there so far, should it end early
    if not whole:
        print(page(table))


if __name__ == "__main__":
    main()
