"""Programs whose control flow depends on booleans in the data, and whether that matters.

``if mask.all(): leave the mask out`` reads all samples and changes nothing. The program is recorded
on every path that it can take. A recording that computes what each of the others does, for the data
that take the other's path, stands for all. The proof compares symbolic expressions
(``symbolic.py``), with the answers that Python got as assumptions.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from unbatch import errors
from unbatch.capture.effort import OutOfEffort
from unbatch.capture.expressions import Contradiction, Expr, ExprTable
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.program import Program, record_answered
from unbatch.capture.symbolic import SymbolicRun
from unbatch.errors import HERE

# Paths that some data takes. Each is recorded once, and compared with all others.
MOST_PATHS = 8

# Recordings, with those that end in an error of the program's own.
MOST_TRIED = 64

# Reads of a value that only go into the message of an error.
PRINTED = ("repr()", "str()", "format()", "printing")

RAISES = ("raise ", "assert ", "raise(", "assert(")

Answers = tuple[bool, ...]


class Undecided(Exception):
    """There are too many paths, or one reads more than booleans."""


def equivalent_on_all_paths(
    program: Program, inputs: Any, targets: Any, graph: Graph
) -> Graph | None:
    """Return the recording that computes what the program does, whichever path it takes, or None.

    None as well if that cannot be decided.
    """

    def record(answers: Answers) -> Graph:
        return record_answered(program, inputs, targets, answers)

    # The first that stands for all is as good as any; ``graph`` itself comes first.
    try:
        paths = list(_paths(graph, record))
        for path in paths:
            if all(path is other or _computes(path, other) for other in paths):
                return path
    except (Undecided, OutOfEffort):
        return None
    except Exception:  # a value that no rule here was made for: nothing is proved
        if errors.STRICT:
            raise
    return None


def _paths(graph: Graph, record: Callable[[Answers], Graph]) -> Iterator[Graph]:
    """Yield one recording for every path that some data may take, ``graph`` the first."""
    # A recording, and how many of its answers have been varied by those before it.
    waiting: list[tuple[Graph, int]] = [(graph, 0)]
    left, tried = MOST_PATHS, 0
    while waiting:
        path, settled = waiting.pop(0)
        # Only answers that no earlier recording has varied: each path comes up once.
        others, possible = _forks(path, settled)
        tried += len(others)
        if possible and path.stopped is None:
            left -= 1
            yield path
        elif possible and not _raised_by_program(path.stopped):
            raise Undecided from path.stopped
        if left < 0 or tried > MOST_TRIED:
            raise Undecided
        waiting += [(record(answers), len(answers)) for answers in others]


def _forks(path: Graph, settled: int) -> tuple[list[Answers], bool]:
    """Return other answers that may be given on a path, and whether any data takes the path itself.

    None does if an answer contradicts those before it; then the other answer is the only one.
    """
    table = ExprTable()
    answers: list[bool] = []
    others: list[Answers] = []
    for i, read in enumerate(path.host_reads):
        # Read anew each time: what is assumed by now may simplify what comes.
        expr = SymbolicRun(path, table).host_reads[i]
        # What depends on parameters alone is the same for all data: no other path there.
        varies = table[expr].varies
        if read.answer is None:
            if (varies or read.blind) and not _only_printed(path, read):
                raise Undecided
            continue
        other = (*answers, not read.answer)
        try:
            table.assume(expr, read.answer)
        except Contradiction:
            return [*others, other], False
        if varies and len(answers) >= settled:
            others.append(other)
        answers.append(read.answer)
    return others, True


def _only_printed(path: Graph, read: HostRead) -> bool:
    """Tell whether a value was read for the message of the error that ended the path."""
    return path.stopped is not None and read.how in PRINTED


def _computes(one: Graph, other: Graph) -> bool:
    """Tell whether ``one`` gives what ``other`` does, for all data that take the other's path."""
    # One table for both, under the assumptions of ``other``: what is equal has one expression.
    table = ExprTable()
    for i, read in enumerate(other.host_reads):
        if read.answer is not None:
            table.assume(SymbolicRun(other, table).host_reads[i], read.answer)
    return _results(one, table) == _results(other, table)


def _results(graph: Graph, table: ExprTable) -> list[Expr]:
    """Return the expressions of what the program returns.

    Where a loss of the model's own is cut is decided for each recording anew, so that the
    predictions of another one say nothing.
    """
    run = SymbolicRun(graph, table)
    results = []
    if not graph.own_loss:
        results = [run[prediction] for prediction in graph.predictions]
    if graph.loss is not None:
        results.append(run[graph.loss])
    return results


def _raised_by_program(error: Exception | None) -> bool:
    """Tell whether the program itself raised, by a ``raise`` or ``assert`` of its own."""
    if error is None or error.__traceback__ is None:
        return False
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    in_this_package = trace.tb_frame.f_code.co_filename.startswith(HERE)
    return not in_this_package and _is_raise(trace)


def _is_raise(trace: TracebackType) -> bool:
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return line.startswith(RAISES)
