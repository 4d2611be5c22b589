"""Programs that ask a boolean value which way to go, and whether the answer matters.

``if mask.all(): leave the mask out`` reads all samples and changes nothing. The program is recorded on every way it can
go; a recording that computes what each of the others does, for the data that take the other's way, stands for all.
The proof goes by terms (``terms.py``), with the answers as assumptions.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from typing import Any

from unbatch import errors
from unbatch.capture.expressions import Contradiction, Expr, ExprTable
from unbatch.capture.graph import Graph
from unbatch.capture.program import Program, record_answered
from unbatch.capture.symbolic import SymbolicRun
from unbatch.capture.tracer import LIBRARY

MOST_PATHS = 8


PRINTED = ("repr()", "str()", "format()", "printing")  # in the message of an error


MOST_TRIED = 64  # with those that end in an error of the program's own


Answers = tuple[bool, ...]


class Undecided(Exception):
    """There are too many ways, or one reads more than booleans."""


def equivalent_on_all_paths(
    program: Program, inputs: Any, targets: Any, graph: Graph
) -> Graph | None:
    """The recording that computes what the program does, whichever way it goes; None where none is found."""
    try:
        ways = list(
            _ways(graph, lambda answers: record_answered(program, inputs, targets, answers))
        )
        return next(
            (
                way
                for way in ways
                if all(_computes(way, other) for other in ways if other is not way)
            ),
            None,
        )
    except Undecided:
        return None
    except Exception:  # a value that no rule here was made for: nothing is proved
        if errors.STRICT:
            raise
        return None


def _ways(graph: Graph, record: Callable[[Answers], Graph]) -> Iterator[Graph]:
    """One recording for every way that some data may take, ``graph`` the first."""
    todo: list[tuple[Graph, int]] = [
        (graph, 0)
    ]  # a recording, and how many of its answers are not to be changed
    left, tried = MOST_PATHS, 0
    while todo:
        way, settled = todo.pop(0)
        others, goes = _forks(way, settled)
        tried += len(others)
        if goes and way.stopped is not None and not _raised_by_program(way.stopped):
            raise Undecided from way.stopped
        if goes and way.stopped is None:
            left -= 1
            yield way
        if left < 0 or tried > MOST_TRIED:
            raise Undecided
        todo += [(record(answers), len(answers)) for answers in others]


def _forks(way: Graph, settled: int) -> tuple[list[Answers], bool]:
    """Other answers that may be given on a way, and whether any data takes the way itself.

    None does where an answer contradicts those before it; there the other answer is the only one.
    """
    terms = ExprTable()
    given: list[bool] = []
    others: list[Answers] = []
    for i, asked in enumerate(way.escapes):
        term = SymbolicRun(way, terms).asked[i]
        moves = terms[term].moving
        if asked.answer is None:
            if (moves or asked.blind) and not (way.stopped is not None and asked.how in PRINTED):
                raise Undecided
            continue
        try:
            terms.assume(term, asked.answer)
        except Contradiction:
            return [*others, (*given, not asked.answer)], False
        if moves and len(given) >= settled:
            others.append((*given, not asked.answer))
        given.append(asked.answer)
    return others, True


def _computes(one: Graph, other: Graph) -> bool:
    """``one`` gives what ``other`` does, for all data that take the other's way."""
    terms = ExprTable()
    for i, asked in enumerate(other.escapes):
        if asked.answer is not None:
            terms.assume(SymbolicRun(other, terms).asked[i], asked.answer)
    here, there = (_results(g, SymbolicRun(g, terms)) for g in (one, other))
    return here == there


def _results(graph: Graph, reading: SymbolicRun) -> list[Expr]:
    """What the program is judged by; where a model's own loss is cut, is for the recording to find."""
    predictions = () if graph.own_loss else graph.predictions
    return [reading[r] for r in (*predictions, graph.loss) if r is not None]


def _raised_by_program(error: Exception) -> bool:
    """The program itself raised, by a ``raise`` or ``assert`` of its own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return (
        trace is not None
        and not trace.tb_frame.f_code.co_filename.startswith(LIBRARY[1])
        and _is_raise(trace)
    )


def _is_raise(trace: Any) -> bool:
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return line.startswith(("raise ", "assert ", "raise(", "assert("))
