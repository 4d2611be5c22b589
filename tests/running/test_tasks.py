"""Tasks count what loops do: who is told, what of, and that the counts are those of the passes."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbatch as ub
from unbatch.linalg.operators import Operator
from unbatch.running import tasks
from unbatch.running.interrupts import is_held
from unbatch.running.tasks import task

N, C = 12, 3


def normed(*more: nn.Module) -> ub.Problem:
    torch.manual_seed(0)
    first = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 6), nn.BatchNorm1d(6)]
    model = nn.Sequential(*first, *more, nn.Linear(6, C)).double()
    X, y = torch.randn(N, 4).double(), torch.randint(C, (N,))
    return ub.Problem(model, nn.functional.cross_entropy, (X, y))


# ---------------------------------------------------------------- counts


class Asked:
    """The records of tasks, each from its beginning to its end."""

    def __init__(self) -> None:
        self.open: dict[int, list[ub.Progress]] = {}
        self.tasks: list[list[ub.Progress]] = []

    def __call__(self, progress: ub.Progress) -> None:
        records = self.open.setdefault(progress.level, [])
        records.append(progress)
        if progress.ended:
            self.tasks.append(self.open.pop(progress.level))

    def named(self, what: str) -> list[ub.Progress]:
        """The last records of the tasks of that name."""
        return [records[-1] for records in self.tasks if records[0].what == what]


def check_counts(asked: Asked) -> None:
    """Raise where a task does not count from zero, by one after the other, to its total."""
    assert asked.tasks
    assert not asked.open, f"not ended: {asked.open}"
    for records in asked.tasks:
        first, last = records[0], records[-1]
        where = f"{last.what}: {last.count}"
        assert first.done == 0, where
        assert first.left is None, where
        for before, after in itertools.pairwise(records):
            assert (after.what, after.total) == (before.what, before.total), where
            assert after.done > before.done or after.ended, where
            assert after.seconds >= before.seconds, where
        if last.total is None:
            continue
        assert last.done <= last.total, where
        assert last.at_most or last.done == last.total, where
        assert last.done < last.total or last.left == 0.0, where


def block_by_block(problem: ub.Problem) -> None:
    blocks = problem.ggn(blocks="module")
    ones = torch.ones(blocks.shape[0])
    blocks.eigvalsh()
    blocks.logdet(0.1)
    blocks.solve(ones, 0.1)
    blocks @ ones


QUESTIONS: dict[str, Callable[[ub.Problem], Any]] = {
    "structure": lambda p: p.structure,
    "gradients": lambda p: p.gradients(),
    "norms, one sample at a time": lambda p: p.compute(ub.SquaredNorms(), memory=1),
    "verify": lambda p: p.verify(),
    "crosstalk": lambda p: p.crosstalk(),
    "crosstalk of some": lambda p: p.crosstalk(2, samples=[1, 4]),
    "diag": lambda p: p.ggn().diag(),
    "diag with a tolerance": lambda p: p.ggn().diag(rtol=0.1),
    "diag, forward": lambda p: p.ggn().diag(method="forward"),
    "solve, many right-hand sides": lambda p: p.ggn().solve(torch.ones(p.ggn().shape[0], 3), 0.1),
    "diag, drawn": lambda p: p.ggn(mc_samples=2).diag(),
    "gram": lambda p: p.ggn().gram(),
    "gram with a tolerance": lambda p: p.ggn().gram(rtol=0.1),
    "gram, little memory": lambda p: p.ggn(memory=10_000).gram(),
    "eigh": lambda p: p.ggn().eigh(),
    "directions": lambda p: p.ggn().directions(2),
    "factor": lambda p: p.ggn().factor(),
    "to_dense": lambda p: p.ggn().to_dense(),
    "solve": lambda p: p.ggn().solve(torch.ones(p.ggn().shape[0]), 0.1, method="cg"),
    "estimate": lambda p: p.ggn().estimate_diag(5),
    "estimate with a control": lambda p: p.ggn().estimate_diag(5, control=p.ggn(by="frozen")),
    "block by block": block_by_block,
    "Lanczos": lambda p: ub.spectra.eigh(p.ggn(), 3),
    "density": lambda p: ub.spectra.density(p.ggn(), probes=3, steps=5),
    "trace": lambda p: ub.spectra.trace(p.ggn(), 8, method="hutchinson"),
    "diagonal": lambda p: ub.spectra.diagonal(p.ggn(), 8),
}


@pytest.mark.parametrize("ask", QUESTIONS.values(), ids=QUESTIONS)
def test_every_task_counts_to_its_total(ask):
    asked = Asked()
    with ub.progress(asked):
        ask(normed())
    check_counts(asked)
    assert not is_held()


def test_the_report_counts_its_parts(tmp_path):
    asked = Asked()
    with ub.progress(asked):
        ub.write_report(normed(), tmp_path / "report.html")
    check_counts(asked)
    (report,) = asked.named("Computing the report")
    assert report.done > 3


class Joint(nn.Module):
    """A loss that is no sum over samples."""

    def forward(self, p: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(p, y).square()


def test_columns_that_run_through_all_samples_are_counted():
    problem = normed()
    problem = ub.Problem(problem.program.model, Joint(), (problem.inputs, problem.targets))
    asked = Asked()
    with ub.progress(asked):
        G = problem.ggn()
        G.diag()
    check_counts(asked)
    (columns,) = asked.named("Columns of the Gauss-Newton factor")
    assert columns.total == G.root.rank
    assert columns.unit == "columns"


MISCOUNTS = {
    "one too few": [0, 1, 1],
    "one too many": [1, 1, 1, 1],
    "two at once": [1, 2, 1],
    "backwards": [2, -1, 1, 1],
}


@pytest.mark.parametrize("steps", MISCOUNTS.values(), ids=MISCOUNTS)
def test_a_task_that_miscounts_is_caught(steps):
    asked = Asked()
    with ub.progress(asked), task("Passes", 3) as passes:
        for count in steps:
            passes.advance(count)
    with pytest.raises(AssertionError):
        check_counts(asked)


class Counting(Operator):
    """A matrix that counts its products."""

    symmetric = True

    def __init__(self, size: int) -> None:
        A = torch.randn(size, size, dtype=torch.float64)
        self.matrix, self.products = A @ A.T, 0
        self.shape, self.dtype, self.device = (size, size), A.dtype, A.device

    def _apply(self, v: Tensor) -> Tensor:
        self.products += v.shape[1]
        return self.matrix @ v


ITERATIVE: dict[str, tuple[Callable[[Counting], Any], Sequence[str]]] = {
    "eigenpairs": (
        lambda A: ub.spectra.eigh(A, 3),
        ("Eigenpairs by Lanczos", "Residuals of the eigenpairs"),
    ),
    "density": (
        lambda A: ub.spectra.density(A, probes=3, steps=7),
        ("Lanczos from one vector",),
    ),
    "diagonal": (lambda A: ub.spectra.diagonal(A, 6), ("Diagonal by random signs",)),
    "a matrix": (lambda A: A.to_dense(), ("Columns of the matrix",)),
}


@pytest.mark.parametrize(("ask", "names"), ITERATIVE.values(), ids=ITERATIVE)
def test_products_are_those_that_were_made(ask, names):
    A, asked = Counting(50), Asked()
    with ub.progress(asked):
        ask(A)
    told = 0
    for name in names:
        told += sum(record.done for record in asked.named(name))
    assert told == A.products > 0


def test_an_iteration_says_how_far_it_is_and_has_to_get():
    asked = Asked()
    with ub.progress(asked):
        ub.spectra.eigh(Counting(50), 3, rtol=1e-8)
        G = normed().ggn()
        G.solve(torch.ones(G.shape[0]), 0.1, method="cg")
    (search,) = asked.named("Eigenpairs by Lanczos")
    assert search.remark.startswith("3 of 3 pairs, residual ")
    assert search.remark.endswith(", wanted 5e-09")
    assert search.at_most
    (solve,) = asked.named("Conjugate gradients")
    assert solve.remark.startswith("residual ")
    assert solve.count == f"{solve.done:,} of at most 1,000 products"


# ---------------------------------------------------------------- records in words


def test_records_in_words():
    record = ub.Progress("Columns of the factor", 1132, 6435, "passes", 12.0, 3675.4)
    assert record.count == "1,132 of 6,435 passes"
    assert record.times == "0:12, 1:01:15 left"
    assert record.interrupted == (
        "Interrupted in columns of the factor, after 1,132 of 6,435 passes."
    )
    record = ub.Progress("Solve", 3, 90, "products", 61.0, 9.0, "residual 1e-3", at_most=True)
    assert record.count == "3 of at most 90 products"
    assert record.times == "1:01, at most 0:09 left; residual 1e-3"
    assert record.interrupted.endswith(", after 3 of at most 90 products (residual 1e-3).")
    assert ub.Progress("Recording", 0, None, "passes", 0.0, None).count == ""


def test_the_time_left_counts_what_is_done_of_the_pass_inside(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(tasks.time, "monotonic", lambda: now[0])
    records = []
    with ub.progress(records.append), task("Outer", 4) as outer:
        outer.advance()
        with task("Inner", 10) as inner:
            now[0] += 15
            inner.advance(5)
            assert records[-1].left == 15
            # One and a half of four have taken 15 seconds: two and a half take 25.
            assert outer.record().left == 25
            with task("Innermost", 2) as innermost:
                innermost.advance()
                assert outer.record().left == pytest.approx(15 * (4 - 1.55) / 1.55)
    assert [record.level for record in records if record.ended] == [2, 1, 0]


# ---------------------------------------------------------------- who is told


def told(act: Callable[[], Any]) -> int:
    records: list[ub.Progress] = []
    with ub.progress(records.append):
        act()
    return len(records)


def passes() -> None:
    with task("Passes", 3) as three:
        for _ in three.over(range(3)):
            pass


def test_the_switch():
    records: list[ub.Progress] = []
    with ub.progress(records.append):
        with ub.progress(False):
            passes()
        assert not records
        with ub.progress(True):
            passes()
        assert not records
        passes()
    assert [record.done for record in records] == [0, 1, 2, 3, 3]
    passes()
    assert len(records) == 5
    setting = ub.progress(records.append)  # without a block, from now on
    passes()
    setting.__exit__()
    passes()
    assert len(records) == 10
    with pytest.raises(ub.InputError, match="by True, by False or by a function; got 'off'"):
        ub.progress("off")


@pytest.mark.parametrize(
    ("value", "shown"), [("0", False), ("off", False), ("", True), ("1", True)]
)
def test_the_variable_of_the_environment(value, shown):
    code = "from unbatch.running import tasks; print(tasks._settings.shown)"
    environment = os.environ | {tasks.VARIABLE: value}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{shown}\n"


def test_nobody_is_told_of_a_single_pass():
    def single() -> None:
        with task("Passes", 1) as one:
            one.advance()

    assert told(single) == 0
    assert told(passes) == 5


def test_nobody_is_told_under_a_monitor():
    problem = normed()
    model, loss = problem.program.model, nn.functional.cross_entropy
    monitor = ub.Monitor(model, loss, every=1, quantities=[ub.SquaredNorms()])
    records: list[ub.Progress] = []
    with ub.progress(records.append), monitor:
        assert monitor.step(problem.inputs, problem.targets)
        assert not records
        passes()
    assert len(records) == 5


def test_a_worker_thread_tells_a_callback_by_itself():
    records: list[tuple[str, ub.Progress]] = []

    def note(progress: ub.Progress) -> None:
        records.append((threading.current_thread().name, progress))

    def work() -> None:
        passes()

    with ub.progress(note), task("Outside", 2) as outside:
        outside.advance()
        worker = threading.Thread(target=work, name="worker")
        worker.start()
        worker.join()
        outside.advance()
    # Its tasks are not inside those of this thread.
    levels = [(name, record.level) for name, record in records if record.ended]
    assert levels == [("worker", 0), (threading.main_thread().name, 0)]


class Enough(Exception):
    pass


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_callback_may_stop_the_question(at):
    told: list[int] = []

    def note(progress: ub.Progress) -> None:
        told.append(progress.done)
        if progress.done == at:
            raise Enough

    with ub.progress(note), pytest.raises(Enough):
        passes()
    assert told == list(range(at + 1))
    assert not is_held()
    assert not tasks._running.tasks


def test_a_task_reads_no_clock_where_nobody_looks(monkeypatch):
    def clock() -> float:
        raise AssertionError("somebody looked at the clock")

    monkeypatch.setattr(tasks.time, "monotonic", clock)
    with ub.progress(False):
        passes()
    passes()  # standard error is no terminal here
    with pytest.raises(AssertionError, match="looked at the clock"):
        told(passes)
