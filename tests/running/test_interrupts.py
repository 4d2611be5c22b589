"""Ctrl-C at any moment: it stops at the next pass, leaves all as it was, and says what was reached.

Moments are counted in calls and returns of Python functions, so that a test stops where it stopped
before; the signals are real ones.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbatch as ub
from cases.autograd_state import state
from cases.state import assert_unchanged, stateful_problem
from unbatch.linalg.operators import Operator
from unbatch.linalg.solvers import conjugate_gradients
from unbatch.problem import spot_check
from unbatch.running import interrupts
from unbatch.running.interrupts import Held, is_held, stop_if_asked
from unbatch.running.tasks import task


@pytest.fixture(autouse=True)
def raising():
    """Let Ctrl-C raise: a shell that starts tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---------------------------------------------------------------- at random moments


class Noisy(nn.Module):
    """Two batch norms, dropout, and noise from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.3))
        self.above = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=self.generator)
        return self.above(self.below(x + 0.1 * noise))


class Interrupting:
    """Sends SIGINT at one call or return of a function, or none; counts them all."""

    def __init__(self, at: int | None = None, inside: str = "") -> None:
        self.at, self.inside, self.count = at, inside, 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        if self.inside and not (event == "return" and frame.f_code.co_qualname == self.inside):
            return
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(signal.SIGINT)

    def during(self, act: Callable[[], Any]) -> KeyboardInterrupt | None:
        """Do it; return the interrupt, if it came."""
        sys.setprofile(self)
        try:
            act()
        except KeyboardInterrupt as interrupt:
            return interrupt
        finally:
            sys.setprofile(None)
        return None


def whole_state(problem: ub.Problem) -> dict[str, Any]:
    generator = problem.program.model.generator
    return state(problem) | {
        "generator": generator.get_state(),
        "inference mode": torch.is_inference_mode_enabled(),
        "handler": signal.getsignal(signal.SIGINT),
        "warnings": list(warnings.filters),
        "held": is_held(),
    }


def rows_and_structure(problem: ub.Problem) -> list[Tensor]:
    rows = problem.gradients()
    return [rows.flat(), problem.compute(ub.SquaredNorms()).flat()]


def curvature(problem: ub.Problem) -> list[Tensor]:
    G = problem.ggn()
    ones = torch.ones(G.shape[0])
    return [G.diag(), G.eigvalsh(), G @ ones, G.solve(ones, 0.1), G.diag(rtol=0.1)]


def verdicts(problem: ub.Problem) -> list[Tensor]:
    assert problem.verify()
    return [problem.crosstalk().matrix, problem.gradients(by="frozen").flat()]


QUESTIONS = {
    "rows": rows_and_structure,
    "curvature": curvature,
    "tests of the verdicts": verdicts,
}
MOMENTS = range(10)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_an_interrupt_at_a_random_moment_changes_nothing(ask, moment, monkeypatch):
    monkeypatch.setattr(spot_check, "SHARE", 0.0)  # so that all runs take the same calls
    expected = ask(stateful_problem(Noisy))
    clean = Interrupting()
    assert clean.during(lambda: ask(stateful_problem(Noisy))) is None
    problem = stateful_problem(Noisy)
    before = whole_state(problem)
    # What makes the problem took calls as well, which are no moments of the question.
    at = random.Random(f"{ask.__name__} {moment}").randrange(1, clean.count * 9 // 10)
    interrupt = Interrupting(at).during(lambda: ask(problem))
    assert interrupt is not None
    assert_unchanged(before, whole_state(problem))
    # Nothing is half kept: the next answer is that of a problem that was never stopped.
    for found, right in zip(ask(problem), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_an_interrupt_that_does_not_wait_is_caught(monkeypatch):
    """By the same comparison, where it comes at the end of an ``__enter__``."""
    at = Interrupting(2, inside="no_grad.__enter__")
    problem = stateful_problem(Noisy)
    before = whole_state(problem)
    assert at.during(problem.gradients) is not None
    assert_unchanged(before, whole_state(problem))
    monkeypatch.setattr(Held, "__enter__", lambda self: None)
    at = Interrupting(2, inside="no_grad.__enter__")
    problem = stateful_problem(Noisy)
    with torch.enable_grad():  # the mode is one of those things that are left behind
        assert at.during(problem.gradients) is not None
        with pytest.raises(AssertionError, match="running_mean"):
            assert_unchanged(before, whole_state(problem))


# ---------------------------------------------------------------- what it says


def test_an_interrupt_says_what_was_reached(monkeypatch):
    monkeypatch.setattr(spot_check, "SHARE", 0.0)
    G = stateful_problem(Noisy).ggn()
    G.diag()

    def told(progress: ub.Progress) -> None:
        if progress.done == 3:
            signal.raise_signal(signal.SIGINT)

    with ub.progress(told), pytest.raises(KeyboardInterrupt) as stopped:
        G.factor()
    assert stopped.value.__notes__ == [
        "Interrupted in columns of a matrix pulled back, after 3 of 25 passes.",
        interrupts.UNCHANGED,
    ]


class Stopping(Operator):
    """A symmetric matrix that is interrupted in one of its products."""

    symmetric = True

    def __init__(self, matrix: Tensor, at: int) -> None:
        self.matrix, self.at, self.products = matrix, at, 0
        self.shape, self.dtype = tuple(matrix.shape), matrix.dtype
        self.device = matrix.device

    def _apply(self, v: Tensor) -> Tensor:
        self.products += 1
        if self.products == self.at:
            signal.raise_signal(signal.SIGINT)
        return self.matrix @ v


def symmetric(size: int) -> Tensor:
    A = torch.randn(size, size, dtype=torch.float64)
    return A @ A.T / size + torch.eye(size)


@pytest.mark.parametrize("at", [1, 2, 7, 26, 27, 40])
def test_eigenpairs_are_there_as_far_as_the_search_got(at):
    A = symmetric(60)
    with pytest.raises(KeyboardInterrupt) as stopped:
        ub.spectra.eigh(Stopping(A, at), 4, rtol=1e-12)
    pairs, search = stopped.value.reached
    count = min(4, at)
    assert pairs.vectors.shape == (60, count)
    eye = torch.eye(count, dtype=A.dtype)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, eye, atol=1e-10, rtol=0)
    residuals = (A @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(search.residuals, residuals, atol=1e-8, rtol=1e-6)
    assert not search.converged
    assert search.products == at
    assert interrupts.REACHED in stopped.value.__notes__


@pytest.mark.parametrize("at", [1, 2, 9])
def test_a_solution_is_there_as_far_as_it_got(at):
    A, b = symmetric(40), torch.randn(40, dtype=torch.float64)
    stopping = Stopping(A, at)
    with pytest.raises(KeyboardInterrupt) as stopped:
        conjugate_gradients(lambda v: stopping @ v, b, 1e-12, 100)
    x, solved = stopped.value.reached
    # Exactly the iterate that a limit of so many products gives.
    expected, _ = conjugate_gradients(lambda v: A @ v, b, 1e-12, at - 1)
    torch.testing.assert_close(x, expected, rtol=0, atol=0)
    residual = float((b - A @ x).norm() / b.norm())
    assert solved.residual == pytest.approx(residual, rel=1e-6)
    assert solved.iterations == at - 1
    with pytest.raises(ub.ConvergenceError, match="interrupted"):
        solved.check()


# ---------------------------------------------------------------- how it is held back


def interrupted(act: Callable[[], None], sealed: bool = False) -> None:
    """Hold interrupts back meanwhile; raise where none came in the end, or where some are held."""
    with pytest.raises(KeyboardInterrupt), Held(sealed):
        act()
    assert not is_held()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stop_if_asked()  # it was answered, and no more is to come


def send() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("sealed", [False, True])
def test_an_interrupt_waits_for_the_end(sealed):
    done = []

    def act() -> None:
        send()
        with Held():
            done.append("inside")
        if sealed:
            stop_if_asked()
        done.append("end")

    interrupted(act, sealed)
    assert done == ["inside", "end"]


def test_an_interrupt_waits_for_a_pass():
    done = []

    def act() -> None:
        with task("Passes", 9) as passes:
            for n in passes.over(range(9)):
                if n == 4:
                    send()
                done.append(n)

    interrupted(act)
    assert done == [0, 1, 2, 3, 4]


def test_one_answer_for_one_interrupt():
    """What waits is dropped where an interrupt is already on its way."""

    def act() -> None:
        send()
        raise KeyboardInterrupt

    interrupted(act)


def test_a_second_interrupt_does_not_wait_for_long(monkeypatch):
    monkeypatch.setattr(interrupts, "PATIENCE", 0.0)
    done = []

    def act() -> None:
        send()
        done.append("first")
        with Held(sealed=True):
            send()
            stop_if_asked()
            done.append("sealed")
        send()
        done.append("never")

    interrupted(act)
    assert done == ["first", "sealed"]


def test_a_second_interrupt_at_once_is_the_first():
    done = []

    def act() -> None:
        send()
        send()
        done.append("held")

    interrupted(act)
    assert done == ["held"]


@pytest.fixture
def handled():
    """A handler that raises nothing, as that of ``asyncio``."""
    calls = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGINT, before)


def test_another_handler_is_called_once(handled):
    mine = signal.getsignal(signal.SIGINT)
    with task("Passes", 3) as passes:
        for n in passes.over(range(3)):
            if n == 1:
                signal.raise_signal(signal.SIGINT)
            assert len(handled) == (n == 2)
    assert handled == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is mine


def test_a_process_that_ignores_it_goes_on():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Held():
            signal.raise_signal(signal.SIGINT)
            stop_if_asked()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_left_alone():
    held = []

    def work() -> None:
        with task("Passes", 2) as passes:
            for _ in passes.over(range(2)):
                held.append(is_held())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert held == [False, False]


FORKING = """
import os, signal
from unbatch.running.interrupts import Held

with Held(), Held(sealed=True):
    child = os.fork()
    if not child:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(0)
        os._exit(3)  # it was held back
    _, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system forks no processes")
def test_a_process_that_is_forked_inside_stops_at_once():
    command = [sys.executable, "-c", FORKING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


# ---------------------------------------------------------------- in an import

IMPORTING = """
import os, signal, sys, time
import torch
from torch import nn
import unbatch as ub
from unbatch.running.interrupts import Held

class Finder:
    asked = 0
    def find_spec(self, name, path=None, target=None):
        if name == "sympy.core.core":
            Finder.asked += 1
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
        return None

sys.meta_path.insert(0, Finder())
if "unheld" in sys.argv:
    Held.__enter__ = lambda self: None
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
X, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
problem = ub.Problem(model, nn.functional.cross_entropy, (X, y))
assert "sympy" not in sys.modules, "there is nothing to interrupt"
try:
    problem.gradients()
except KeyboardInterrupt:
    print("interrupted", Finder.asked)
rows, gradient = problem.gradients(), problem.gradient()
right = all(torch.allclose(rows[k].sum(0), gradient[k], atol=1e-6) for k in rows)
print("right", right, hasattr(sys.modules["sympy"], "core"))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", IMPORTING, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_an_interrupt_while_sympy_is_imported_spoils_nothing():
    done = run()
    assert done.stdout == "interrupted 1\nright True True\n", done.stderr


def test_an_import_that_is_interrupted_is_caught():
    done = run("unheld")
    assert "right True True" not in done.stdout
    assert "sympy" in done.stderr


def test_a_stop_of_the_whole_process_keeps_its_exit_status():
    """An interrupt that nobody catches ends a process as one of Python's own."""
    code = """
import signal
from unbatch.running.tasks import task
with task("Passes", 9) as passes:
    for n in passes.over(range(9)):
        if n == 4:
            signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    lines = done.stderr.rstrip().splitlines()
    assert lines[-3] == "KeyboardInterrupt"
    assert lines[-2] == "Interrupted in passes, after 5 of 9 passes."
