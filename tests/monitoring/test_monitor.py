"""A monitor says what a fresh problem says, keeps its accounts, goes on with its file, and training
does not notice it.

Runs with and without a monitor start from the same seed and are compared bit by bit, with
everything that a run leaves behind: weights, buffers, gradients, momentum, random states and the
losses on the way.
"""

import copy
import importlib.util
import json
import math
import random
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.gradients.quantities import Derived
from unbatch.monitoring import metrics
from unbatch.monitoring.account import Account
from unbatch.reference import definitions as reference

N, D, C = 6, 4, 3

# Noise scales of nets with batch norm come with it, once for each monitor; that it comes is a test
# below.
pytestmark = pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, C))


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(D, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.4), nn.Linear(5, C)
    )


class Fragile(nn.Module):
    """Fails on a batch of zeros, after it has written to buffers and drawn noise."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = noisy(), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        random.random(), np.random.rand(), torch.rand(1)
        if not x.any():
            raise RuntimeError("a batch of zeros")
        return self.last(hidden)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = noisy()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.body(x)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


@dataclass(frozen=True)
class Broken(Derived):
    """A quantity that draws noise and then fails."""

    def bases(self) -> Any:
        return (ub.SquaredNorms(),)

    def combine(self, about: Any, *results: Any) -> Any:
        torch.rand(3), random.random(), np.random.rand()
        raise RuntimeError("planted")


def batches(count: int = 7, size: int = N) -> list[tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(5)
    sizes = [size] * (count - 1) + [size - 2]
    return [
        (torch.randn(n, D, generator=made), torch.randint(C, (n,), generator=made)) for n in sizes
    ]


def problem_of(net: nn.Module, X: Tensor, y: Tensor) -> ub.Problem:
    return ub.Problem(copy.deepcopy(net), F.cross_entropy, (X, y))


# ---------------------------------------------------------------- runs, with and without

Step = Callable[[Any, Any], Any]


@dataclass
class Run:
    """``ask``: where in a step, and how, the monitor is called. ``fails``: of what the monitor
    warns.
    """

    make: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    where: str = "after"
    accumulate: int = 1
    precision: torch.dtype | None = None
    around: Callable[[], Any] = nullcontext
    zeros: bool = False
    fails: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def ask(self, step: Step, where: str, X: Tensor, y: Tensor) -> None:
        if where == self.where:
            with self.around():
                step(torch.zeros_like(X) if self.zeros else X, y)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


RUNS = {
    "batch norm, momentum": Run(normed, momentum),
    "before the step": Run(noisy, momentum, "before"),
    "between forward and backward": Run(noisy, momentum, "between"),
    "dropout, Adam": Run(noisy, torch.optim.Adam),
    "gradients accumulated": Run(noisy, momentum, "after backward", accumulate=3),
    "autocast, asked inside before the forward pass": Run(
        noisy, momentum, "inside", precision=torch.bfloat16
    ),
    "autocast, asked outside": Run(noisy, momentum, precision=torch.bfloat16),
    "asked under no_grad": Run(noisy, momentum, around=torch.no_grad),
    "asked in inference mode": Run(noisy, momentum, around=torch.inference_mode),
    "the model fails when asked": Run(
        Fragile, momentum, "before", zeros=True, fails="a batch of zeros"
    ),
    "a question fails": Run(
        noisy, momentum, fails="planted", options=(("quantities", [ub.SquaredNorms(), Broken()]),)
    ),
    "all that has a name": Run(
        normed, momentum, options=(("quantities", [*metrics.ROW_METRICS, *metrics.BATCH_METRICS]),)
    ),
    "copy rows": Run(
        noisy, momentum, options=(("by", "copy"), ("quantities", ["variance", "crosstalk"]))
    ),
}


def trained(
    run: Run, step: Step | None, net: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Any]:
    """What a run leaves behind."""
    losses, ask = [], (lambda where, X, y: run.ask(step, where, X, y) if step is not None else None)
    for i, (X, y) in enumerate(batches()):
        ask("before", X, y)
        with torch.autocast("cpu", run.precision) if run.precision is not None else nullcontext():
            ask("inside", X, y)
            loss = F.cross_entropy(net(X), y)
        ask("between", X, y)
        loss.backward()
        losses.append(loss.detach())
        ask("after backward", X, y)
        if i % run.accumulate == run.accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()
        ask("after", X, y)
    grads = [p.grad for p in net.parameters()]
    moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    noise = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1]]
    flags = [(m.training, len(m._forward_pre_hooks), sorted(m.__dict__)) for m in net.modules()]
    return [net.state_dict(), losses, grads, moments, noise, flags]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value.tolist() if isinstance(value, np.ndarray) else value


def assert_bitwise_equal(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        else:
            assert x == y


@contextmanager
def seeded() -> Iterator[None]:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    yield


def both(run: Run, monitored: Callable[[nn.Module], Any]) -> tuple[list[Any], list[Any], Any]:
    with seeded():
        net = run.make()
        without = trained(run, None, net, run.optimizer(net.parameters()))
    with seeded():
        net = run.make()
        monitor = monitored(net)
        within = trained(run, monitor.step, net, run.optimizer(net.parameters()))
    return without, within, monitor


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_training_goes_as_without(run, tmp_path):
    options = {"every": 2, "path": tmp_path / "run.jsonl"} | dict(run.options)
    with pytest.warns(ub.MonitorWarning, match=run.fails) if run.fails else nullcontext():
        without, within, monitor = both(
            run, lambda net: ub.Monitor(net, F.cross_entropy, **options)
        )
    assert_bitwise_equal(without, within)
    lines = read(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    failed = [
        "error" in line or any("error" in a for a in line["quantities"].values()) for line in lines
    ]
    assert any(failed) == (run.fails != "")
    assert monitor.failed == sum(failed)


def test_a_model_with_its_own_loss_trains_as_without(tmp_path):
    def run(monitored: bool) -> list[Any]:
        with seeded():
            net = OwnLoss()
            optimizer = momentum(net.parameters())
            monitor = ub.Monitor(net, every=2, path=tmp_path / "run.jsonl")
            for X, y in batches():
                inputs = {"x": X, "labels": y}
                if monitored:
                    monitor.step(inputs)
                optimizer.zero_grad()
                net(**inputs)["loss"].backward()
                optimizer.step()
            return [net.state_dict(), torch.get_rng_state()]

    assert_bitwise_equal(run(False), run(True))
    assert all(
        "value" in a for line in read(tmp_path / "run.jsonl") for a in line["quantities"].values()
    )


class DrawsNoise(ub.Monitor):
    def step(self, inputs: Any, targets: Any = None, *, step: int | None = None) -> Any:
        torch.rand(1)
        return super().step(inputs, targets, step=step)


class MovesStatistics(ub.Monitor):
    def step(self, inputs: Any, targets: Any = None, *, step: int | None = None) -> Any:
        state = torch.get_rng_state()
        with torch.no_grad():
            self.model(inputs)
        torch.set_rng_state(state)
        return super().step(inputs, targets, step=step)


class DropsGradients(ub.Monitor):
    def step(self, inputs: Any, targets: Any = None, *, step: int | None = None) -> Any:
        for p in self.model.parameters():
            p.grad = None
        return super().step(inputs, targets, step=step)


PLANTED = {
    "noise": (DrawsNoise, "dropout, Adam"),
    "statistics": (MovesStatistics, "batch norm, momentum"),
    "gradients": (DropsGradients, "gradients accumulated"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_monitor_that_changes_training_is_caught(name):
    planted, run = PLANTED[name]
    without, within, _ = both(RUNS[run], lambda net: planted(net, F.cross_entropy, every=2))
    with pytest.raises(AssertionError):
        assert_bitwise_equal(without, within)


def test_an_interrupt_passes_through_and_leaves_everything(tmp_path):
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.stop = noisy(), True

        def forward(self, x: Tensor) -> Tensor:
            out = self.body(x)
            if self.stop:
                raise KeyboardInterrupt
            return out

    net = Interrupted()
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    path = tmp_path / "run.jsonl"
    with (
        ub.Monitor(net, F.cross_entropy, every=1, path=path) as monitor,
        pytest.raises(KeyboardInterrupt),
    ):
        monitor.step(*batches()[0])
    assert_bitwise_equal(before, (net.state_dict(), torch.get_rng_state()))
    assert path.read_text() == ""
    net.stop = False
    assert monitor.step(*batches()[0])["step"] == 1


# ---------------------------------------------------------------- what is written


def read(path: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def summary(t: Tensor) -> dict[str, float]:
    return {"mean": t.mean(), "median": t.median(), "min": t.min(), "max": t.max()}


def close(found: Any, truth: Any) -> None:
    as_double = [torch.as_tensor(value, dtype=torch.float64) for value in (found, truth)]
    torch.testing.assert_close(*as_double, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make", [normed, lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, C))]
)
def test_numbers_are_those_of_a_fresh_problem_and_of_the_definitions(make, tmp_path):
    net = make().double()
    optimizer = momentum(net.parameters())
    monitor = ub.Monitor(net, F.cross_entropy, every=3, path=tmp_path / "run.jsonl")
    copies = {}
    for i, (X, y) in enumerate(batches()):
        X = X.double()
        if monitor(X, y) is not None:
            copies[i] = copy.deepcopy(net), X, y
        optimizer.zero_grad()
        F.cross_entropy(net(X), y).backward()
        optimizer.step()
    lines = read(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == list(copies) == [0, 3, 6]
    for line in lines:
        frozen, X, y = copies[line["step"]]
        found, problem = line["quantities"], ub.Problem(frozen, F.cross_entropy, (X, y))
        rows = problem.gradients()
        assert line["structure"] == {v.name: v.status for v in problem.structure.verdicts}
        assert found["squared_norms"]["kind"] == found["noise_scale"]["kind"] == rows.kind
        assert {found[name]["samples"] for name in ("squared_norms", "trace")} == {len(X)}
        close(found["noise_scale"]["value"], problem.compute(ub.NoiseScale()))
        close(found["crosstalk"]["value"], problem.crosstalk(probes=1).strength)
        close(found["trace"]["value"], problem.ggn().trace())
        close(found["top_eigenvalues"]["value"], problem.ggn().eigvalsh()[-metrics.TOP :])
        # the same by the definitions
        norms = reference.squared_norms(reference.component(frozen, F.cross_entropy, X, y))[1]
        G = reference.ggn(frozen, F.cross_entropy, X, y)
        for name, value in summary(norms).items():
            close(found["squared_norms"]["value"][name], value)
        close(found["trace"]["value"], G.trace())
        close(found["top_eigenvalues"]["value"], torch.linalg.eigvalsh(G)[-metrics.TOP :])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_numbers_are_the_same_where_nothing_is_differentiated(around):
    net, (X, y) = normed().double(), batches()[0]
    X = X.double()
    truth = ub.Monitor(net, F.cross_entropy).step(X, y)["quantities"]
    with around():
        found = ub.Monitor(net, F.cross_entropy).step(X, y)["quantities"]
    for name in ("squared_norms", "trace", "top_eigenvalues", "crosstalk"):
        values = [list(leaves(line[name]["value"])) for line in (found, truth)]
        numbers = [[x for x in value if isinstance(x, float)] for value in values]
        close(*numbers)
        assert any(numbers[1])


def test_a_few_samples_are_those_of_the_whole_batch():
    net, (X, y) = normed().double(), batches()[0]
    X = X.double()
    line = ub.Monitor(net, F.cross_entropy, samples=2).step(X, y)
    problem, found = problem_of(net, X, y), line["quantities"]
    close(found["trace"]["value"], problem.ggn(samples=[0, 1]).trace())
    close(
        found["trace"]["value"],
        reference.ggn_diagonals(net, F.cross_entropy, X, y)[:2].sum() * N / 2,
    )
    matrix = problem.crosstalk(probes=1).matrix[:2] ** 2
    close(found["crosstalk"]["value"], 1 - (matrix[0, 0] + matrix[1, 1]) / matrix.sum())
    assert [found[name]["samples"] for name in found] == [N, N, 2, 2, 2]


def test_crosstalk_of_a_few_is_part_of_that_of_all():
    X, y = batches()[0]
    problem = problem_of(normed(), X, y)
    some, every = problem.crosstalk(samples=[1, 4]), problem.crosstalk()
    assert torch.equal(some.matrix[[1, 4]], every.matrix[[1, 4]])
    assert not some.matrix[[0, 2, 3, 5]].any()
    with pytest.raises(ub.InputError, match="from 0 to 5"):
        problem.crosstalk(samples=[6])


def test_crosstalk_of_a_few_by_replacement():
    net = nn.Sequential(nn.Embedding(5, D), nn.BatchNorm1d(D), nn.Linear(D, C))
    problem = ub.Problem(net, F.cross_entropy, (torch.arange(N) % 5, torch.arange(N) % C))
    some, every = problem.crosstalk(samples=[0, 5]), problem.crosstalk()
    assert every.by == "replacement"
    assert torch.equal(some.matrix[[0, 5]], every.matrix[[0, 5]])
    assert not some.matrix[1:5].any()


def test_where_columns_are_many_curvature_is_estimated_and_says_so(monkeypatch):
    net, (X, y) = normed().double(), batches()[0]
    X = X.double()
    exact = ub.Monitor(net, F.cross_entropy).step(X, y)["quantities"]
    monkeypatch.setattr(metrics, "LARGEST_GRAM", 4)
    found = ub.Monitor(net, F.cross_entropy).step(X, y)["quantities"]
    assert "estimated" in found["trace"]["note"]
    off = abs(found["trace"]["value"] - exact["trace"]["value"])
    assert off <= 5 * found["trace"]["standard_error"] + 1e-9
    assert "by products" in found["top_eigenvalues"]["note"]
    for value, truth in zip(
        found["top_eigenvalues"]["value"], exact["top_eigenvalues"]["value"], strict=True
    ):
        assert value == pytest.approx(truth, rel=0.05)


def test_rows_by_another_name_and_with_frozen_statistics():
    net, (X, y) = normed().double(), batches()[0]
    X = X.double()
    chosen = ["squared_norms", "trace"]
    frozen = ub.Monitor(net, F.cross_entropy, quantities=chosen, by="frozen").step(X, y)[
        "quantities"
    ]
    assert (frozen["squared_norms"]["kind"], frozen["trace"]["kind"]) == (
        "frozen",
        "GGN with frozen statistics",
    )
    close(frozen["trace"]["value"], reference.ggn(net, F.cross_entropy, X, y, frozen=True).trace())
    copied = ub.Monitor(net, F.cross_entropy, quantities=chosen[:1], by="copy").step(X, y)[
        "quantities"
    ]
    norms = reference.squared_norms(reference.copies(net, F.cross_entropy, X, y))[1]
    close(copied["squared_norms"]["value"]["mean"], norms.mean())


def test_answers_by_parameter_and_of_many_numbers_are_summed_up():
    net, (X, y) = normed().eval().double(), batches()[0]
    X = X.double()
    quantities = [ub.Variance(), ub.Histogram(bins=4), ub.Dots(), ub.NormTest(), ub.DiagGGN()]
    monitor = ub.Monitor(
        net, F.cross_entropy, quantities=quantities, parameters=net[3].parameters()
    )
    answered = monitor.step(X, y)["quantities"]
    assert (answered["variance"]["kind"], answered["diag_ggn"]["kind"]) == ("per-sample", "GGN")
    found = {name: a["value"] for name, a in answered.items()}
    problem = problem_of(net, X, y)
    variance, histogram, dots = problem.compute(*quantities[:3], parameters="3.*")
    assert list(found["variance"]) == ["3.weight", "3.bias"]
    close(found["variance"]["3.weight"]["max"], variance["3.weight"].max())
    assert found["histogram"]["3.bias"] == histogram["3.bias"].tolist()
    close(found["dots"]["mean"], dots.mean())
    assert isinstance(found["norm_test"], float)
    close(found["diag_ggn"]["3.bias"]["mean"], problem.ggn(parameters="3.*").diag()[-C:].mean())


@contextmanager
def session() -> Iterator[list[warnings.WarningMessage]]:
    """What a user is shown who shows everything."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield shown


def test_a_warning_is_written_and_shown_once(tmp_path):
    monitor = ub.Monitor(normed(), F.cross_entropy, every=1, path=tmp_path / "run.jsonl")
    with session() as shown:
        for X, y in batches(3):  # the last is smaller, and the text has its size in it
            monitor.step(X, y)
    said = [line.get("warnings", []) for line in read(tmp_path / "run.jsonl")]
    assert [len(texts) for texts in said] == [1, 0, 0]
    assert said[0][0].startswith(
        "MixedSamplesWarning: NoiseScale: the number is exact for the per-component rows"
    )
    (warning,) = shown
    assert warning.category is ub.MixedSamplesWarning
    assert said[0] == [f"MixedSamplesWarning: {warning.message}"]
    assert warning.filename == __file__  # where the monitor was called


def test_a_warning_that_a_user_made_an_error_is_one_after_the_line_was_written(tmp_path):
    monitor = ub.Monitor(normed(), F.cross_entropy, every=1, path=tmp_path / "run.jsonl")
    (X, y), *_ = batches()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ub.MixedSamplesWarning)
        with pytest.raises(ub.MixedSamplesWarning, match="NoiseScale"):
            monitor.step(X, y)
        monitor.step(X, y)
    lines = read(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == [0, 1]
    assert all("value" in a for line in lines for a in line["quantities"].values())


def test_warnings_of_the_model_come_from_where_they_were_given():
    class Warns(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            warnings.warn_explicit("it will go", DeprecationWarning, "model.py", 7)
            return super().forward(x)

    monitor = ub.Monitor(Warns(D, C), F.cross_entropy, every=1, quantities=["squared_norms"])
    with session() as shown:
        for X, y in batches(3):
            monitor.step(X, y)
    assert [(str(w.message), w.filename, w.lineno) for w in shown] == [
        ("it will go", "model.py", 7)
    ]


CHANGES = {
    "eval": (lambda net: net.eval(), "independent forward: fails → holds"),
    "a layer swapped": (
        lambda net: net.__setitem__(1, nn.LayerNorm(5)),
        "simd forward: fails → holds",
    ),
    "one without parameters": (lambda net: net.__setitem__(2, nn.Softmax(0)), ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_verdict_that_changed_is_told_once(name, tmp_path):
    change, text = CHANGES[name]
    net = normed()
    monitor = ub.Monitor(
        net, F.cross_entropy, every=1, quantities=["squared_norms"], path=tmp_path / "run.jsonl"
    )
    for i, (X, y) in enumerate(batches(5, size=5)[:4]):
        if i == 2:
            change(net)
        monitor.step(X, y)
        fresh = problem_of(net, X, y).structure
        assert monitor.last["structure"] == {v.name: v.status for v in fresh.verdicts}
    changes = [" ".join(line.get("changes", [])).lower() for line in read(tmp_path / "run.jsonl")]
    assert changes[:2] == ["", ""]
    assert changes[3] == ""
    assert text.lower() in changes[2]


def test_the_recording_is_kept_between_steps(monkeypatch):
    from unbatch.capture import program as capture

    seen, record = [], capture.record
    monkeypatch.setattr(capture, "record", lambda *args: seen.append(1) or record(*args))
    net = normed()
    monitor = ub.Monitor(net, F.cross_entropy, every=1)
    for X, y in batches(5)[:4]:
        monitor.step(X, y)
        with torch.no_grad():
            net[0].weight.add_(0.1)
    assert len(seen) == 1


def test_an_error_is_written_with_its_reason_and_training_goes_on(tmp_path):
    net = normed()
    path = tmp_path / "run.jsonl"
    monitor = ub.Monitor(
        net, F.cross_entropy, every=1, quantities=["squared_norms", Broken(), "trace"], path=path
    )
    (X, y), *_ = batches()
    with session() as shown:
        monitor.step(X, y)
        monitor.step(X, y[:-1])
        monitor.step(X.index_fill(0, torch.tensor([1]), math.nan), y)
        monitor.step(X, y)
    first, sizes, nan, last = read(path)
    assert first["quantities"]["broken"] == {"error": "RuntimeError: planted"}
    assert "value" in first["quantities"]["squared_norms"]
    assert "value" in first["quantities"]["trace"]
    assert sizes["error"].startswith("InputError: Every per-sample input")
    assert nan["error"].startswith("InputError: X[0] contains 4 values that are NaN")
    assert "error" not in last
    assert monitor.failed == 4
    assert "4 questions failed" in repr(monitor)
    assert [w.category for w in shown] == [ub.MonitorWarning] * 3
    assert [w.filename for w in shown] == [__file__] * 3
    for warning, text in zip(
        shown, ["broken at step 0", "anything at step 1", "anything at step 2"], strict=True
    ):
        assert text in str(warning.message)


def test_what_fails_alike_is_told_together_and_once(monkeypatch):
    def fails(asked: Any) -> Any:
        raise RuntimeError(f"no {len(seen)} bytes left")

    seen: list[str] = []
    for name in ("trace", "crosstalk"):
        monkeypatch.setitem(metrics.BATCH_METRICS, name, fails)
    monitor = ub.Monitor(normed(), F.cross_entropy, every=1, quantities=["trace", "crosstalk"])
    with session() as shown:
        for X, y in batches(3):
            seen.append("asked")
            monitor.step(X, y)
    (warning,) = shown
    assert "could not compute trace, crosstalk at step 0" in str(warning.message)
    assert str(warning.message).endswith("RuntimeError: no 1 bytes left")
    assert monitor.failed == 6


@pytest.mark.filterwarnings("error::unbatch.MonitorWarning")
def test_a_failure_can_be_made_to_stop_the_training():
    monitor = ub.Monitor(normed(), F.cross_entropy, quantities=[Broken()])
    with pytest.raises(ub.MonitorWarning, match="planted"):
        monitor.step(*batches()[0])


def test_numbers_that_are_not_finite_are_still_json(tmp_path):
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return (p.sum(1) * 1e30).square().mean()

    path = tmp_path / "run.jsonl"
    ub.Monitor(nn.Linear(D, C), loss, quantities=["squared_norms"], path=path).step(*batches()[0])
    (line,) = [
        json.loads(text, parse_constant=pytest.fail) for text in path.read_text().splitlines()
    ]
    assert line["quantities"]["squared_norms"]["value"]["max"] == "Infinity"


def test_after_a_training_has_diverged_all_lines_are_json(tmp_path):
    net, path = normed(), tmp_path / "run.jsonl"
    monitor = ub.Monitor(net, F.cross_entropy, every=1, path=path)
    with session():
        for bad in (1.0, math.inf, math.nan):
            with torch.no_grad():
                net[3].bias.fill_(bad)
            monitor.step(*batches()[0])
    texts = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(text, parse_constant=pytest.fail)["step"] for text in texts] == [0, 1, 2]
    assert '"NaN"' in texts[2]


def test_whatever_a_line_holds_is_json(tmp_path):
    from unbatch.monitoring.log import Journal

    journal = Journal(tmp_path / "run.jsonl")
    line = {
        "step": 0,
        "values": (math.nan, [-math.inf, {"x": np.float64(math.inf)}]),
        "error": "a name \udcff",
    }
    journal.write(line)
    (found,) = [
        json.loads(t, parse_constant=pytest.fail)
        for t in journal.path.read_bytes().decode().splitlines()
    ]
    assert found == {
        "step": 0,
        "values": ["NaN", ["-Infinity", {"x": "Infinity"}]],
        "error": "a name \udcff",
    }


# ---------------------------------------------------------------- the file


def test_a_second_run_goes_on_with_the_file(tmp_path):
    path = tmp_path / "runs" / "run.jsonl"
    net = normed()
    for _ in range(2):
        with ub.Monitor(
            net, F.cross_entropy, every=2, quantities=["squared_norms"], path=path
        ) as monitor:
            for X, y in batches(5, size=5)[:3]:
                monitor.step(X, y)
        net.eval()
    lines = read(path)
    assert [line["step"] for line in lines] == [0, 2, 3, 5]
    assert [bool(line.get("changes")) for line in lines] == [False, False, True, False]
    assert monitor.step(*batches()[0], step=40) is None  # not due
    assert monitor.step(*batches()[0], step=41)["step"] == 41


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "run.jsonl"
    for whole in ('{"step": 7, "note": "α"}\n', ""):
        path.write_text(whole + '{"step": 8, "sec', encoding="utf-8")
        ub.Monitor(normed(), F.cross_entropy, quantities=["squared_norms"], path=path).step(
            *batches()[0]
        )
        assert [line["step"] for line in read(path)] == ([7, 8] if whole else [0])


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.txt").write_text("something of mine\n")
    (tmp_path / "half.txt").write_text("something of mine")
    (tmp_path / "other.jsonl").write_text('{"loss": 1}\n')
    for name in ("", "file/below.jsonl", "notes.txt", "half.txt", "other.jsonl"):
        with pytest.raises(ub.InputError, match="monitor cannot write to"):
            ub.Monitor(normed(), F.cross_entropy, path=tmp_path / name)
    assert (tmp_path / "notes.txt").read_text() == "something of mine\n"
    assert (tmp_path / "half.txt").read_text() == "something of mine"


def test_a_disk_that_fails_later_is_a_warning(tmp_path):
    path = tmp_path / "run.jsonl"
    monitor = ub.Monitor(
        normed(), F.cross_entropy, every=1, quantities=["squared_norms"], path=path
    )
    path.unlink()
    path.mkdir()
    with session() as shown:
        for X, y in batches(3):
            monitor.step(X, y)
    (warning,) = shown
    assert warning.category is ub.MonitorWarning
    assert "could not write down step 0" in str(warning.message)


def test_a_board_that_fails_is_a_warning():
    class Board:
        def add_scalar(self, *what: Any) -> None:
            raise ValueError("full")

    monitor = ub.Monitor(
        normed(), F.cross_entropy, quantities=["squared_norms"], tensorboard=Board()
    )
    with pytest.warns(ub.MonitorWarning, match="could not write down step 0 .* ValueError: full"):
        assert "value" in monitor.step(*batches()[0])["quantities"]["squared_norms"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every": 0}, "every= is 'auto'"),
        ({"every": "often"}, "'often'"),
        ({"every": True}, "True"),
        ({"share": 0}, "share"),
        ({"samples": 0}, "samples"),
        ({"by": "layer"}, "'layer'"),
        ({"quantities": ["norms"]}, "squared_norms, noise_scale.*got 'norms'"),
        ({"quantities": ["squared_norms", ub.SquaredNorms()]}, "each once"),
        ({"quantities": [ub.SquaredNorms]}, "Norms"),
        (
            {"by": "copy"},
            r"trace, top_eigenvalues: a Gauss-Newton .*'squared_norms', 'noise_scale', 'crosstalk'",
        ),
        (
            {"by": "copy", "quantities": [ub.SquaredNorms(), ub.DiagGGN()]},
            "by='copy' does not exist for diag_ggn: a Gauss-Newton matrix",
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once(options, said):
    with pytest.raises(ub.InputError, match=said):
        ub.Monitor(normed(), F.cross_entropy, **options)


def of_predictions(p: Tensor) -> Tensor:
    return p.square().mean()


(X0, Y0), *_ = batches()
WRONG: dict[str, tuple[Any, Any, str]] = {
    "a pair": (
        F.cross_entropy,
        ((X0, Y0),),
        r"cross_entropy takes targets .* a tuple of 2 alone.*step\(\*batch\)",
    ),
    "a list": (F.cross_entropy, ([X0, Y0],), "a list of 2 alone"),
    "inputs alone": (F.cross_entropy, (X0,), r"a tensor of shape \[6, 4\] alone"),
    "a dict": (F.cross_entropy, ({"x": X0, "labels": Y0},), "a dict of 'x', 'labels' alone"),
    "a loss that is a module": (nn.CrossEntropyLoss(), (X0,), "CrossEntropyLoss takes targets"),
    "targets that no loss takes": (
        of_predictions,
        (X0, Y0),
        r"takes predictions alone.* shape \[6\]\. Leave",
    ),
    "targets beside a model's own loss": (
        None,
        ({"x": X0}, Y0),
        r"separate targets: a tensor of shape \[6\]",
    ),
    "no loss at all": (None, (X0,), "Neither a loss nor a model that returns one"),
    "sizes that differ": (F.cross_entropy, (X0, Y0[:-1]), "same number of samples"),
    "no tensors": (F.cross_entropy, ("words", Y0), "X must be a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_first_call_that_is_wrong_raises_and_has_not_happened(name, tmp_path):
    loss, arguments, said = WRONG[name]
    net, path = normed(), tmp_path / "run.jsonl"
    monitor = ub.Monitor(net, loss, quantities=["squared_norms"], path=path)
    before = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.raises(ub.InputError, match=said):
        monitor.step(*arguments)
    assert_bitwise_equal(before, (net.state_dict(), torch.get_rng_state()))
    assert path.read_text() == ""
    if loss is F.cross_entropy:
        assert "value" in monitor.step(X0, Y0)["quantities"]["squared_norms"]


def test_parameters_that_are_not_there_are_refused_at_the_first_call():
    monitor = ub.Monitor(normed(), F.cross_entropy, parameters="head.*")
    with pytest.raises(ub.InputError, match=r"'head\.\*' matches no parameter"):
        monitor.step(X0, Y0)


def test_a_wrong_call_later_on_is_a_warning():
    monitor = ub.Monitor(normed(), F.cross_entropy, quantities=["squared_norms"], every=1)
    monitor.step(X0, Y0)
    with pytest.warns(ub.MonitorWarning, match="could not compute anything at step 1"):
        assert "error" in monitor.step((X0, Y0))


RIGHT: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "a loss without targets": (of_predictions, (X0,)),
    "targets that may be left out": (lambda p, y=None: of_predictions(p), (X0,)),
    "a loss of any arguments": (lambda *args: of_predictions(args[0]), (X0, Y0)),
    "a loss that is not written in Python": (torch.dist, (X0, X0[:, :C])),
    "inputs as a pair": (F.cross_entropy, ((X0,), Y0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_calls_that_are_right(name):
    loss, arguments = RIGHT[name]
    found = ub.Monitor(normed(), loss, quantities=["squared_norms"]).step(*arguments)
    assert "value" in found["quantities"]["squared_norms"]


def test_steps_are_whole_numbers(tmp_path):
    monitor = ub.Monitor(
        normed(), F.cross_entropy, quantities=["squared_norms"], path=tmp_path / "run.jsonl"
    )
    with pytest.raises(ub.InputError, match=r"step= is a whole number.* got 1\.5"):
        monitor.step(X0, Y0, step=1.5)
    monitor.step(X0, Y0, step=np.int64(7))
    assert read(tmp_path / "run.jsonl")[0]["step"] == 7
    assert ub.Monitor(normed(), F.cross_entropy, path=tmp_path / "run.jsonl").start == 8


# ---------------------------------------------------------------- what it costs


class Clock:
    """A clock whose time questions do not put back, as they do with plain attributes."""

    __module__ = "concurrent"  # a package whose objects nobody looks into

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def asked_at(
    account: Account, clock: Clock, costs: Iterator[float], train: float, calls: int
) -> list[int]:
    """The calls at which a question was asked, each of which takes what ``costs`` says."""
    found = []
    for i in range(calls):
        start, due = account.start_call(), account.is_due()
        clock.now += next(costs) if due else 0.0
        account.end_call(start, due)
        found += [i] if due else []
        clock.now += train
    return found


def test_the_account_adds_up():
    clock = Clock()
    account = Account(2, 0.1, clock)
    assert account.overhead is None  # there is nothing yet to compare with
    assert asked_at(account, clock, iter([3.0, 1.0]), 5.0, 4) == [0, 2]
    assert (account.measuring, account.training) == (
        4.0,
        15.0,
    )  # what follows the last call is not known yet
    assert account.overhead == pytest.approx(4 / 15)
    start = account.start_call()
    assert account.training == 20.0
    clock.now += 2
    assert account.report(start) == {"seconds": 2.0, "overhead": pytest.approx(6 / 20)}


def test_auto_keeps_within_the_share():
    clock = Clock()
    account = Account(None, 0.1, clock)
    found = asked_at(account, clock, iter([4.0] + [2.0] * 99), 1.0, 1000)
    # 4 spent and 4 expected: at 80 of training; then 6 and 2: at 80 again, so at the next call;
    # then every 20
    assert found[:5] == [0, 80, 81, 100, 120]
    assert account.overhead <= 0.1
    assert account.measuring > 0.09 * account.training


def test_auto_pays_for_the_first_question_and_then_stays_within_the_share():
    """Short runs are above, and are told so."""
    clock = Clock()
    account = Account(None, 0.1, clock)
    shares = []
    for _ in range(300):
        asked_at(
            account, clock, iter([4.0] + [2.0] * 99) if not shares else iter([2.0] * 99), 1.0, 1
        )
        shares.append(account.overhead)
    assert shares[0] is None
    assert all(share > 0.1 for share in shares[1:40])
    assert all(share <= 0.1 + 1e-9 for share in shares[40:])


def test_overhead_is_that_of_the_clock_given(tmp_path):
    clock = Clock()

    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 0.5
            return super().forward(x)

    net = Slow(D, C)
    path = tmp_path / "run.jsonl"
    monitor = ub.Monitor(
        net, F.cross_entropy, every=2, quantities=["squared_norms"], path=path, clock=clock
    )
    for X, y in batches()[:5]:
        clock.now += 10
        monitor.step(X, y)
    lines = read(path)
    assert [line["overhead"] is None for line in lines] == [True, False, False]
    assert monitor.account.training == 40.0  # not what was before the first call
    assert monitor.account.measuring == sum(line["seconds"] for line in lines) > 0
    assert monitor.overhead == lines[-1]["overhead"] == monitor.account.measuring / 40


# ---------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "run.jsonl"
    options = {"every": 2, "path": path, "tensorboard": tmp_path / "board"}
    run = RUNS["dropout, Adam"]
    without, within, monitor = both(run, lambda net: ub.Monitor(net, F.cross_entropy, **options))
    monitor.close()
    assert_bitwise_equal(without, within)
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    lines = read(path)
    for tag, of in {
        "unbatch/squared_norms/mean": lambda line: line["quantities"]["squared_norms"]["value"][
            "mean"
        ],
        "unbatch/trace": lambda line: line["quantities"]["trace"]["value"],
        "unbatch/top_eigenvalues/1": lambda line: line["quantities"]["top_eigenvalues"]["value"][
            -1
        ],
        "unbatch/overhead": lambda line: line["overhead"],
    }.items():
        shown = [(e.step, e.value) for e in events.Scalars(tag)]
        known = [(line["step"], of(line)) for line in lines if of(line) is not None]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in known]
    assert "unbatch/warnings/text_summary" in events.Tags()["tensors"]


def test_a_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"unbatch\[tensorboard\]"):
        ub.Monitor(normed(), F.cross_entropy, tensorboard=tmp_path)


# ---------------------------------------------------------------- Lightning, Transformers


def lightning() -> Any:
    """Under either of its names."""
    names = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    found = [module for package, module in names.items() if importlib.util.find_spec(package)]
    return pytest.importorskip(found[0] if found else "lightning")


class OwnData(torch.utils.data.Dataset):
    """Samples as a dict, in the words of Transformers."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(2)
        self.words = torch.randint(1, 20, (24, 6), generator=made)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[i], "labels": self.words[i] % C}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_as_without(precision, accumulate, tmp_path):
    L = lightning()
    from unbatch.integrations.lightning import monitor_callback

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = noisy()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> Tensor:
            X, y = batch
            loss = F.cross_entropy(self(X), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return momentum(self.parameters())

    def run(monitored: bool) -> tuple[list[Any], Any]:
        with seeded():
            lit = Lit()
            monitor = ub.Monitor(lit, F.cross_entropy, every=3, path=tmp_path / "run.jsonl")
            data = [(X, y) for X, y in batches(7)[:-1]]
            trainer = L.Trainer(
                max_epochs=2,
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                precision=precision,
                enable_progress_bar=False,
                enable_model_summary=False,
                accumulate_grad_batches=accumulate,
                callbacks=[monitor_callback(monitor)] if monitored else [],
            )
            trainer.fit(lit, torch.utils.data.DataLoader(data, batch_size=None))
            (optimizer,) = trainer.optimizers
            moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
            left = [
                lit.state_dict(),
                [p.grad for p in lit.parameters()],
                moments,
                torch.get_rng_state(),
            ]
            return left, trainer.callback_metrics["loss"]

    assert_bitwise_equal(run(False), run(True))
    lines = read(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == [i // accumulate for i in (0, 3, 6, 9)]
    assert all("value" in a for line in lines for a in line["quantities"].values())


@pytest.mark.filterwarnings("ignore")
def test_lightning_asks_about_the_batch_that_comes(tmp_path):
    L = lightning()
    from unbatch.integrations.lightning import monitor_callback

    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.seen = normed(), []

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.seen.append((copy.deepcopy(self.net), batch["x"], batch["y"]))
            return F.cross_entropy(self.net(batch["x"]), batch["y"])

        def configure_optimizers(self) -> Any:
            return momentum(self.parameters())

    lit = Lit()
    monitor = ub.Monitor(
        lit.net, F.cross_entropy, every=1, quantities=["squared_norms"], path=tmp_path / "run.jsonl"
    )
    callback = monitor_callback(monitor, split=lambda batch: (batch["x"], batch["y"]))
    data = [{"x": X, "y": y} for X, y in batches()]
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lit, torch.utils.data.DataLoader(data, batch_size=None))
    for line, (net, X, y) in zip(read(tmp_path / "run.jsonl"), lit.seen, strict=True):
        truth = reference.squared_norms(reference.component(net, F.cross_entropy, X, y))[1]
        assert line["quantities"]["squared_norms"]["value"]["mean"] == pytest.approx(
            float(truth.mean()), rel=1e-4
        )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch", [{"x": X0, "y": Y0}, [X0, Y0, X0]])
def test_lightning_refuses_a_batch_that_is_no_pair(batch):
    lightning()
    from unbatch.integrations.lightning import monitor_callback

    callback = monitor_callback(ub.Monitor(normed(), F.cross_entropy))
    trainer = types.SimpleNamespace(is_global_zero=True, global_step=0)
    trainer.precision_plugin = types.SimpleNamespace(train_step_context=nullcontext)
    with pytest.raises(
        ub.InputError, match=rf"this batch is a {type(batch).__name__} of .*split=lambda"
    ):
        callback.on_train_batch_start(trainer, None, batch, 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_of_transformers_trains_as_without(accumulate, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from unbatch.integrations.transformers import monitor_callback

    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=C,
    )

    def run(monitored: bool) -> list[Any]:
        with seeded():
            net = transformers.BertForTokenClassification(config)
            monitor = ub.Monitor(
                net, every=2, quantities=["squared_norms", "crosstalk"], path=tmp_path / "run.jsonl"
            )
            arguments = transformers.TrainingArguments(
                str(tmp_path / "out"),
                per_device_train_batch_size=4,
                num_train_epochs=2,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_strategy="no",
                gradient_accumulation_steps=accumulate,
                logging_strategy="no",
            )
            callbacks = [monitor_callback(monitor)] if monitored else []
            trainer = transformers.Trainer(
                net, arguments, train_dataset=OwnData(), callbacks=callbacks
            )
            trainer.train()
            moments = [
                v for s in trainer.optimizer.state_dict()["state"].values() for v in s.values()
            ]
            hooks = [len(m._forward_pre_hooks) for m in net.modules()]
            return [net.state_dict(), moments, torch.get_rng_state(), random.getstate(), hooks]

    assert_bitwise_equal(run(False), run(True))
    lines = read(tmp_path / "run.jsonl")
    assert [line["step"] for line in lines] == list(range(0, 12 // accumulate, 2))
    assert all("value" in a for line in lines for a in line["quantities"].values())
    assert lines[0]["quantities"]["squared_norms"]["kind"] == "per-sample"
    assert lines[0]["quantities"]["squared_norms"]["samples"] == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", ["lightning", "trainer"])
def test_the_page_shows_runs_that_work(tool, tmp_path, monkeypatch):
    """Those that need a package; all others are run by tests/documents/test_readme.py."""
    if tool == "trainer":
        pytest.importorskip("accelerate")
    else:  # by the name that the page has
        package = types.ModuleType("lightning")
        package.pytorch = lightning()
        monkeypatch.setitem(sys.modules, "lightning", package)
        monkeypatch.setitem(sys.modules, "lightning.pytorch", package.pytorch)
    page = (Path(__file__).parents[2] / "docs" / "guides" / "monitor_training.md").read_text(
        encoding="utf-8"
    )
    (code,) = re.findall(rf"^```python\n(# {tool}_run.py\n.*?)^```$", page, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{tool}_run.py", "exec"), {"__name__": "page"})
    (line,) = read(tmp_path / f"{tool}.jsonl")
    measured = [name for name, entry in line["quantities"].items() if "value" in entry]
    assert measured == list(metrics.DEFAULT_METRICS)


def test_the_trainer_of_transformers_takes_no_loss_apart():
    pytest.importorskip("transformers")
    from unbatch.integrations.transformers import monitor_callback

    with pytest.raises(ub.InputError, match="this one was made with cross_entropy"):
        monitor_callback(ub.Monitor(normed(), F.cross_entropy))


def test_the_trainer_of_transformers_says_where_another_model_is_trained():
    pytest.importorskip("transformers")
    from unbatch.integrations.transformers import monitor_callback

    net = OwnLoss()
    callback, state = (
        monitor_callback(ub.Monitor(net)),
        types.SimpleNamespace(is_world_process_zero=True),
    )
    callback.on_train_begin(None, state, None)
    with session() as shown:
        for _ in range(2):
            OwnLoss()(x=X0, labels=Y0)
            callback.on_pre_optimizer_step(None, state, None)
    callback.on_train_end(None, state, None)
    assert [w.category for w in shown] == [ub.MonitorWarning]
    assert "Training never calls the monitor's model" in str(shown[0].message)
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("tool", ["lightning", "transformers"])
def test_a_missing_tool_says_what_to_install(tool, monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    callback = importlib.import_module(f"unbatch.integrations.{tool}").monitor_callback
    with pytest.raises(ImportError, match=rf"unbatch\[{tool}\]"):
        callback(ub.Monitor(normed(), F.cross_entropy))


# ---------------------------------------------------------------- the benchmark


ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    """The module; with what it imports beside it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    specification = importlib.util.spec_from_file_location(
        "benchmark_of_monitor", ROOT / "benchmarks" / "monitor_overhead.py"
    )
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, specification.name, module)
    specification.loader.exec_module(module)
    return module


def test_the_benchmark_measures_what_the_overview_shows(benchmark):
    pytest.importorskip("sklearn")
    found = benchmark.medians([benchmark.measured({"every": 2}, benchmark.demo.load(), 3)])
    assert found["lines"] == 2
    case = {"setting": "every=2", "steps": 3} | found
    shown = benchmark.overview.monitor(
        {"date": "today", "device": "here", "torch": "2", "cases": [case]}
    )
    assert "| every=2 | 3 | " in shown


def test_the_page_quotes_what_was_measured(benchmark):
    measured = json.loads(
        (ROOT / "benchmarks" / "results" / "monitor.json").read_text(encoding="utf-8")
    )
    default = {
        case["steps"]: case for case in measured["cases"] if case["setting"] == benchmark.AUTO
    }
    long, demo, short = (
        default[steps] for steps in (benchmark.LONG, benchmark.DEMO, benchmark.SHORT)
    )
    added = [benchmark.overview.share(case["added"]) for case in (long, demo, short)]
    text = (
        f"first question takes {long['first']:.2g} s, and the default adds {added[0]} to a run "
        f"of {long['steps']} steps, {added[1]} to one of {demo['steps']} (as many as "
        f"`unbatch demo` trains) and {added[2]} to one of {short['steps']}."
    )
    assert text in " ".join(
        (ROOT / "docs" / "guides" / "monitor_training.md").read_text(encoding="utf-8").split()
    )
    assert long["added"] <= 0.1
