"""Bars: what a terminal shows of a long question, and that pipes, threads and fast questions show
nothing.
"""

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest

import unbatch as ub
from unbatch.running import display
from unbatch.running.display import BarsOfNotebook
from unbatch.running.tasks import task

# What a user runs: a question of 90 passes, in a terminal of its own.
QUESTION = """
import sys
import torch
from torch import nn
import unbatch as ub
from unbatch.running import display

display.DELAY, display.PERIOD = {delay}, 0.002
torch.manual_seed(0)
layers = [nn.Linear(20, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 40), nn.BatchNorm1d(40)]
model = nn.Sequential(*layers, nn.Linear(40, 4)).double()
X, y = torch.randn(30, 20).double(), torch.randint(4, (30,))
{before}
problem = ub.Problem(model, nn.functional.cross_entropy, (X, y))
G = problem.ggn()
assert problem.structure
V = G.factor()
G.solve(torch.ones(G.shape[0]), 1e-2, method="cg", rtol=1e-10)
print(len(V["0.weight"]), "columns")
"""


def in_terminal(code: str, **environment: str) -> tuple[str, str]:
    """Run a script with a pseudo-terminal for its errors; return what it prints, and shows."""
    ours, theirs = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:  # the other end was closed
                return
            if not data:
                return
            shown.append(data)

    settings = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LINES": "40"} | environment
    reader = threading.Thread(target=read)
    reader.start()
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env=settings,
            text=True,
            check=False,
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    text = b"".join(shown).decode()
    assert done.returncode == 0, text
    return done.stdout, text


def script(delay: float = 0.0, before: str = "") -> str:
    return QUESTION.format(delay=delay, before=before)


ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
BAR = re.compile(r"(?P<what>[A-Z][\w\- ]+?) +[━╸╺]+ +(?P<count>.*?passes) (?P<times>[^\r\n]*)")


def bars(shown: str) -> list[tuple[str, str, str]]:
    """Return what, count and times of the bars that were shown one after the other."""
    found = []
    for line in re.split(r"[\r\n]+", ESCAPES.sub("", shown)):
        match = BAR.match(line)
        if match:
            found.append((match["what"], match["count"], match["times"].strip()))
    return found


def check_bars(shown: Sequence[tuple[str, str, str]], what: str, total: int) -> None:
    """Raise where no bar of that name has a count out of the total, and the time that is left."""
    counts = []
    for name, count, times in shown:
        if name != what:
            continue
        done, _, rest = count.partition(" of ")
        assert rest == f"{total} passes", count
        assert 0 <= int(done) <= total, count
        counts.append(int(done))
        if counts[-1]:
            assert re.fullmatch(r"\d+:\d\d, \d+:\d\d left", times), times
    assert counts, f"no bar of {what!r} among {sorted({name for name, _, _ in shown})}"
    assert counts == sorted(counts), counts
    assert len(set(counts)) > 2, counts


def test_a_terminal_shows_how_far_a_long_question_is():
    printed, shown = in_terminal(script())
    assert printed == "90 columns\n"
    check_bars(bars(shown), "Columns of a matrix pulled back", 90)
    text = ESCAPES.sub("", shown)
    assert "Analysing the structure" in text
    assert re.search(
        r"Conjugate gradients .* \d+ of at most 1,000 products .*at most .* left", text
    )
    assert re.search(r"residual \S+, wanted 5e-11", text)
    # The cursor is there again at the end, and no line of the bars.
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert ESCAPES.sub("", shown[shown.rindex("\x1b[?25h") :]).strip() == ""


def test_a_bar_that_miscounts_is_caught():
    good = [("Passes", f"{n} of 9 passes", "0:01, 0:02 left") for n in range(1, 9)]
    check_bars(good, "Passes", 9)
    planted = {
        "another total": [*good, ("Passes", "9 of 10 passes", "0:01, 0:00 left")],
        "backwards": [*good, ("Passes", "2 of 9 passes", "0:01, 0:00 left")],
        "too many": [*good, ("Passes", "12 of 9 passes", "0:01, 0:00 left")],
        "no time left": [*good, ("Passes", "9 of 9 passes", "0:01")],
        "stuck": good[:1] * 5,
        "another name": [("Rows", count, times) for _, count, times in good],
    }
    for shown in planted.values():
        with pytest.raises(AssertionError):
            check_bars(shown, "Passes", 9)


SILENT = {
    "a fast question": (script(delay=1e9), {}),
    "the variable of the environment": (script(), {"UNBATCH_PROGRESS": "0"}),
    "the switch": (script(before="ub.progress(False)"), {}),
    "a callback": (script(before="ub.progress(lambda progress: None)"), {}),
}


@pytest.mark.parametrize(("code", "environment"), SILENT.values(), ids=SILENT)
def test_a_terminal_shows_nothing_of(code, environment):
    printed, shown = in_terminal(code, **environment)
    assert printed == "90 columns\n"
    assert shown == ""


def test_a_pipe_gets_nothing():
    command = [sys.executable, "-c", script()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("90 columns\n", "")


def test_what_draws_is_imported_when_something_is_drawn():
    late = script(delay=1e9) + "\nprint('rich.progress' in sys.modules)"
    assert in_terminal(late)[0] == "90 columns\nFalse\n"
    assert in_terminal(script() + "\nprint('rich.progress' in sys.modules)")[0].endswith("True\n")


def test_other_threads_show_nothing(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert display.is_possible()
    possible = []
    thread = threading.Thread(target=lambda: possible.append(display.is_possible()))
    thread.start()
    thread.join()
    assert possible == [False]


# ---------------------------------------------------------------- what is drawn


class Drawn:
    """Stands for bars: keeps what would be shown."""

    def __init__(self) -> None:
        self.shown: list[list[tuple[str, int]]] = []
        self.closed = False

    def draw(self, records: Sequence[ub.Progress]) -> None:
        self.shown.append([(record.what, record.done) for record in records])

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def watcher(monkeypatch):
    """One that looks when it is told to."""
    watcher = display._Watcher()
    monkeypatch.setattr(watcher, "watch", lambda tasks: setattr(watcher, "tasks", tasks))
    monkeypatch.setattr(display, "_watcher", watcher)
    monkeypatch.setattr(display, "is_possible", lambda: True)
    monkeypatch.setattr(display, "DELAY", 0.0)
    return watcher


def test_the_outermost_and_the_innermost_are_drawn(watcher, monkeypatch):
    drawn = Drawn()
    monkeypatch.setattr(display, "BarsOfTerminal", lambda: drawn)
    with task("Outer", 2) as outer:
        watcher.look()
        with task("Between", 2), task("Inner", 2) as inner, task("Single", 1):
            inner.advance()
            watcher.look()
        outer.advance(2)
        watcher.look()
        assert not drawn.closed
    assert drawn.closed
    assert drawn.shown == [
        [("Outer", 0)],
        [("Outer", 0), ("Inner", 1)],
        [("Outer", 2)],
    ]


def test_nothing_is_drawn_where_nothing_more_is_to_come(watcher, monkeypatch):
    monkeypatch.setattr(display, "BarsOfTerminal", lambda: pytest.fail("a bar"))
    with task("Outer", 2) as outer:
        outer.advance(2)
        watcher.look()


def test_a_single_pass_is_drawn_where_nothing_else_is(watcher, monkeypatch):
    drawn = Drawn()
    monkeypatch.setattr(display, "BarsOfTerminal", lambda: drawn)
    with task("Single", 1):
        watcher.look()
    with task("Outer", 2), task("Single", 1):
        watcher.look()
    assert drawn.shown == [[("Single", 0)], [("Outer", 0)]]


@pytest.mark.parametrize("method", ["draw", "close"])
def test_what_cannot_be_drawn_stops_nothing(watcher, monkeypatch, method):
    def fail(*_: Any) -> None:
        raise OSError("the terminal is gone")

    drawn = Drawn()
    monkeypatch.setattr(drawn, method, fail)
    monkeypatch.setattr(display, "BarsOfTerminal", lambda: drawn)
    with task("Passes", 2):
        watcher.look()
    assert watcher.gave_up


def test_a_thread_that_looks_ends_when_nothing_runs(monkeypatch):
    monkeypatch.setattr(display, "PERIOD", 0.0)
    watcher = display._Watcher()
    watcher.watch([])
    thread = watcher.thread
    if thread is not None:  # it may have ended already
        thread.join(60)
    assert watcher.thread is None


def test_a_notebook_has_one_output_which_is_empty_at_the_end():
    outputs: list[Any] = []

    class Handle:
        def update(self, shown: Any) -> None:
            outputs.append(shown)

    def show(shown: Any, display_id: bool) -> Handle:
        assert display_id
        outputs.append(shown)
        return Handle()

    bars = BarsOfNotebook(show, "nothing")
    for done in (1, 2):
        bars.draw([ub.Progress("Passes", done, 3, "passes", 1.0, 2.0)])
    bars.close()
    *tables, last = outputs
    assert last == "nothing"
    for done, table in enumerate(tables, start=1):
        html = table._repr_mimebundle_([], [])["text/html"]
        assert f"{done} of 3 passes" in html
        assert "0:02 left" in html
