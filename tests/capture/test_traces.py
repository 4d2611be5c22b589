"""A question leaves no trace of a program that changes what it can reach; what cannot be put back
is refused before it changes.
"""

import io
import itertools
import threading
import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import unbatch as ub
from cases.changes import D, N, Net, squares
from cases.messy import MESSY, REFUSED, Meter
from unbatch.capture import foreign, holders, isolation, program, reachable, switches


def problem_of(make: Any) -> ub.Problem:
    torch.manual_seed(0)
    return ub.Problem(make(), squares, (torch.randn(N, D), torch.randn(N, D)))


def ask(problem: ub.Problem) -> list[Any]:
    assert problem.structure.samples == N
    rows = problem.gradients()
    torch.testing.assert_close({name: r.sum(0) for name, r in rows.items()}, problem.gradient())
    return [problem.predictions(), rows.flat(), problem.ggn().diag()]


@pytest.mark.parametrize("name", MESSY)
def test_a_question_leaves_no_trace(name):
    make, keeps = MESSY[name]
    problem = problem_of(make)
    model = problem.program.model
    before = keeps(model)
    first = ask(problem)
    assert keeps(model) == before
    torch.testing.assert_close(ask(problem), first)
    problem.verify()
    assert keeps(model) == before


@pytest.mark.parametrize("name", MESSY)
def test_the_programs_do_leave_one(name):
    """Run plainly, each changes what it is said to change."""
    make, keeps = MESSY[name]
    problem = problem_of(make)
    model = problem.program.model
    before = keeps(model)
    with problem.program.untouched():
        model(problem.inputs)
        changed = keeps(model) != before
    assert changed or name == "a cycle"
    assert keeps(model) == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_put_back_is_refused(name):
    make, keeps = REFUSED[name]
    problem = problem_of(make)
    with pytest.raises(ub.CaptureError, match="cannot be put back"):
        _ = problem.structure
    assert keeps(problem.program.model)[1] == keeps(make())[1], "it was used up"


def test_an_iterator_that_nobody_uses_is_no_reason_to_refuse():
    model = Net(lambda net, x: net.linear(x) if net.items else x, items=iter(map(float, [1])))
    assert problem_of(lambda: model).structure
    assert next(model.items) == 1.0


# --- training goes on as if nobody had asked ------------------------------------------------------


def test_a_counter_makes_no_question_record_again(monkeypatch):
    """What a program writes and does not depend on may change between two questions."""
    recorded: list[int] = []
    record = program.record
    monkeypatch.setattr(program, "record", lambda *args: recorded.append(1) or record(*args))

    def run(net, x):
        net.calls += 1
        net.history.append(net.calls)
        net.meter.update(1.0)
        net.last = net.linear(x)
        net.table["last"] = net.last
        return net.last

    model = Net(run, calls=0, history=[], meter=Meter(), table={})
    problem = problem_of(lambda: model)
    for _ in range(4):
        problem = problem.with_batch(torch.randn(N, D), torch.randn(N, D))
        ask(problem)
        model(problem.inputs)
    assert model.calls == len(model.history) == 4
    assert len(recorded) == 1


def printing(net, x):
    net.calls += 1
    net.text = f"call {net.calls}"
    if net.calls % 100 == 0:
        net.shown = net.text
    return net.linear(x)


def measuring(net, x):
    out = net.linear(x)
    net.meter.update(out.detach().mean().item())
    net.average = 0.9 * net.average + 0.1 * out.detach().mean()
    return out


def keeping(net, x):
    net.last = SimpleNamespace(out=net.linear(x), calls=net.last.calls + 1)
    net.recent.append(net.last.calls)
    return net.last.out


def warming(net, x):
    net.calls += 1
    return net.linear(x) * (0.5 if net.calls < 1000 else 1.0)


def numbering(net, x):
    net.last = next(net.numbers)
    return net.linear(x)


def writing(net, x):
    net.file.write("a line")
    return net.linear(x)


COUNTING = {
    "a text every hundredth time": lambda: Net(printing, calls=0, text=""),
    "means": lambda: Net(measuring, meter=Meter(), average=torch.zeros(())),
    "the last results": lambda: Net(keeping, last=SimpleNamespace(calls=0), recent=deque(maxlen=3)),
    "a warm-up that lasts": lambda: Net(warming, calls=0),
    "an iterator that counts": lambda: Net(numbering, numbers=itertools.count(), last=0),
    "a file": lambda: Net(writing, file=io.StringIO()),
}


@pytest.mark.parametrize("name", COUNTING)
def test_what_does_not_matter_makes_no_question_record_again(name, monkeypatch):
    recorded: list[int] = []
    record = program.record
    monkeypatch.setattr(program, "record", lambda *args: recorded.append(1) or record(*args))
    problem = problem_of(COUNTING[name])
    for _ in range(4):
        ask(problem)
        problem.program.model(problem.inputs)
    assert len(recorded) == 1


def test_a_counter_that_decides_is_seen():
    """Also one that decides nothing yet."""
    model = Net(warms_up, calls=0)
    problem = problem_of(lambda: model)
    ask(problem)
    for calls in (5, 20):
        model.calls = calls
        fresh = ub.Problem(model, squares, (problem.inputs, problem.targets))
        torch.testing.assert_close(ask(problem), ask(fresh))


def warms_up(net, x):
    net.calls += 1
    return net.linear(x) * (1.0 if net.calls < 10 else 3.0)


def test_threads_leave_each_other_alone():
    before = list(warnings.filters), torch.get_rng_state(), torch.get_default_dtype()
    problems = [problem_of(MESSY[name][0]) for name in ("default type", "a generator")]
    alone = [ask(problem_of(MESSY[name][0])) for name in ("default type", "a generator")]
    out: list[Any] = [None, None]

    def work(i: int) -> None:
        for _ in range(3):
            out[i] = ask(problems[i])
            _ = problems[i].with_batch(problems[i].inputs, problems[i].targets).structure

    torch.set_rng_state(before[1])
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before[0]
    assert torch.get_default_dtype() == before[2]
    assert torch.equal(torch.get_rng_state(), before[1])
    torch.testing.assert_close(out, alone)


# --- planted --------------------------------------------------------------------------------------

PLANTED = {
    "arrays": (holders.Array, "an array"),
    "lists and deques": (holders.Items, "a deque"),
    "attributes": (holders.Attributes, "a plain object"),
    "members of classes": (holders.Names, "a class"),
    "files": (foreign.InMemory, "a file"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_place_that_is_not_put_back_is_caught(kind, monkeypatch):
    holder, name = PLANTED[kind]
    monkeypatch.setattr(holder, "restore", lambda self, content: None)
    with pytest.raises(AssertionError):
        test_a_question_leaves_no_trace(name)


def test_generators_that_are_forgotten_are_caught(monkeypatch):
    monkeypatch.setattr(reachable, "GENERATORS", ())
    with pytest.raises(AssertionError):
        test_a_question_leaves_no_trace("a generator")


def test_settings_that_are_not_set_back_are_caught(monkeypatch):
    before = switches.all_settings()
    monkeypatch.setattr(isolation, "set_back", lambda settings: None)
    with pytest.raises(AssertionError):
        test_a_question_leaves_no_trace("default type")
    switches.set_back(before)


class Sealed(type):
    """Lets nobody set an attribute of its classes by the usual way."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError("it is sealed")


class Counts(metaclass=Sealed):
    seen = 0


def counts_in_spite(net: Any, x: torch.Tensor) -> torch.Tensor:
    type.__setattr__(Counts, "seen", Counts.seen + 1)
    net.kept.append(torch.rand(()))
    return net.linear(x)


def test_all_is_tried_where_something_cannot_be_put_back():
    model = Net(counts_in_spite, kept=[])
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    random_state = torch.get_rng_state()
    with pytest.raises(ub.CaptureError, match="it is sealed"):
        problem.gradients()
    assert model.kept == []
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_write_to_an_array_too_large_to_be_copied_is_an_error(monkeypatch):
    def writes(net: Any, x: torch.Tensor) -> torch.Tensor:
        net.kept[0] += 1
        return net.linear(x)

    monkeypatch.setattr(holders, "LARGEST_ARRAY", 2**10)
    model = Net(writes, kept=np.zeros(2**10))
    problem = ub.Problem(model, squares, (torch.randn(N, D), torch.randn(N, D)))
    with pytest.raises(ub.CaptureError, match="array of 8192 bytes"):
        problem.gradients()
