"""Asking for rows and their quantities changes nothing: not after an answer, a refusal, an error or
an interrupt.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import unbatch as ub
from cases.autograd_state import state
from cases.function_net import D, N, Net
from cases.gradients import Twice
from cases.state import STATEFUL, Countdown, assert_unchanged, stateful_problem
from unbatch.autodiff.contractions import broadcast as broadcasts
from unbatch.autodiff.contractions import matmul as products
from unbatch.autodiff.contractions.row_block import RowBlock
from unbatch.gradients import replayed_rows
from unbatch.gradients.quantities import About, Basic, Collector
from unbatch.problem import spot_check

# ---------------------------------------------------------------- what must not change


EVERYTHING = (
    ub.Gradients(),
    ub.SquaredNorms(),
    ub.SumOfSquares(),
    ub.Variance(),
    ub.Dots(),
    ub.Histogram(),
    ub.NoiseScale(),
    ub.OrthogonalityTest(),
    ub.EarlyStopping(),
    ub.SignalToNoise(),
    ub.ClippedSum(0.1),
)


def quietly(ask: Callable[[ub.Problem], Any]) -> Callable[[ub.Problem], Any]:
    def asked(problem: ub.Problem) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ub.MixedSamplesWarning)
            return ask(problem)

    return asked


def into_buffers(problem: ub.Problem) -> Any:
    rows = problem.gradients()
    return problem.gradients(out={k: torch.empty_like(r) for k, r in rows.items()})


QUESTIONS: dict[str, Callable[[ub.Problem], Any]] = {
    "gradients": lambda p: p.gradients(),
    "gradients by copy": lambda p: p.gradients(by="copy"),
    "gradients by frozen": lambda p: p.gradients(by="frozen"),
    "gradients into buffers": into_buffers,
    "everything": quietly(lambda p: p.compute(*EVERYTHING)),
    "everything, one sample at a time": quietly(lambda p: p.compute(*EVERYTHING[1:], memory=1)),
    "norms by copy": lambda p: p.compute(ub.SquaredNorms(), ub.ClippedSum(0.1), by="copy"),
    "norms by frozen": lambda p: p.compute(ub.SquaredNorms(), ub.ClippedSum(0.1), by="frozen"),
    "a statistic that is an error": lambda p: p.compute(ub.Variance()),  # warnings are errors here
}


# ---------------------------------------------------------------- messy models


def counting(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.count.add_(1)
        net.sums.mul_(0.9).add_(x.sum(0))
    return net.linear(x) * (1 + 0 * net.count)


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D))
    net[0].register_forward_hook(lambda m, args, out: out + 1)
    net[2].register_forward_pre_hook(lambda m, args: (args[0].tanh(),))
    net[2].register_full_backward_hook(lambda m, gi, go: None)
    net[0].weight.register_hook(lambda g: g)
    return net


def counting_backward() -> nn.Module:
    """A hook that changes the gradient, and counts in a buffer and an
    attribute how often it ran.
    """
    net = normed()
    net.register_buffer("passes", torch.zeros(()))
    net.seen = []

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        net.passes.add_(1)
        net.seen.append(1)
        return (2 * grad_input[0],)

    net[2].register_full_backward_hook(hook)
    return net


def checkpointed(net: Net, x: Tensor) -> Tensor:
    """Its backward pass runs the batch norm again, and so moves the running statistics again."""
    return Twice.apply(checkpoint(lambda h: net.norm(net.linear(h)), x, use_reentrant=False))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(1, D, batch_first=True, num_layers=2, dropout=0.3)
        self.norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.rnn(x[:, :, None])[0][:, -1])


def normed(**options: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D, **options), nn.Tanh(), nn.Linear(D, D))


MESSY: dict[str, Callable[[], nn.Module]] = {
    **STATEFUL,
    "batch norm, cumulative average": lambda: normed(momentum=None),
    "two batch norms": lambda: nn.Sequential(normed(), normed(momentum=None)),
    "spectral norm of old": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Linear(D, D)), nn.Tanh()
    ),
    "spectral norm below batch norm": lambda: nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(D, D)), nn.BatchNorm1d(D), nn.Linear(D, D)
    ),
    "dropout": lambda: nn.Sequential(
        nn.Linear(D, D), nn.Dropout(0.4), nn.Linear(D, D), nn.AlphaDropout(0.2)
    ),
    "hooks": hooked,
    "own derivative": lambda: Net(lambda net, x: Twice.apply(net.linear(x)).tanh()),
    "own derivative under batch norm": lambda: Net(
        lambda net, x: net.norm(Twice.apply(net.linear(x))), norm=nn.BatchNorm1d(D)
    ),
    "hooks that count backward passes": counting_backward,
    "own derivative under checkpointing": lambda: Net(checkpointed, norm=nn.BatchNorm1d(D)),
    "lstm": Last,
    "counter": lambda: Net(
        counting, count=nn.Buffer(torch.tensor(0)), sums=nn.Buffer(torch.zeros(D))
    ),
    "eval": lambda: normed().eval(),
    "partly frozen": lambda: nn.Sequential(normed().requires_grad_(False), normed()),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("make", MESSY.values(), ids=MESSY)
def test_asking_for_rows_changes_nothing(make, question):
    """Whether it gets an answer, a refusal, or stops: some of these programs cut their own
    gradients off.
    """
    problem = stateful_problem(make)
    before = state(problem)
    with suppress(RuntimeError, ValueError, ub.MixedSamplesWarning):
        QUESTIONS[question](problem)
    assert_unchanged(before, state(problem))
    with suppress(RuntimeError, ValueError, ub.MixedSamplesWarning):
        QUESTIONS[question](problem)
    assert_unchanged(before, state(problem))


ANSWERED = [
    "batch norm and dropout",
    "spectral norm",
    "batch norm, cumulative average",
    "two batch norms",
    "dropout",
    "hooks",
    "own derivative",
    "own derivative under batch norm",
    "lstm",
    "counter",
    "eval",
    "partly frozen",
    "spectral norm of old",
    "spectral norm below batch norm",
    "hooks that count backward passes",
    "own derivative under checkpointing",
]


@pytest.mark.parametrize("make", [MESSY[k] for k in ANSWERED], ids=ANSWERED)
def test_messy_models_do_get_an_answer(make):
    """So that nothing being changed is not for nothing being done."""
    problem = stateful_problem(make)
    rows = problem.gradients()
    gradient = problem.gradient()
    assert list(rows) == list(gradient)
    for name, g in gradient.items():
        # A batch norm makes rounding larger; the gradient itself is off by a third of this.
        size = float(g.abs().max())
        torch.testing.assert_close(rows[name].sum(0), g, rtol=1e-4, atol=1e-6 + 1e-4 * size)


@pytest.mark.parametrize("make", [MESSY[k] for k in ANSWERED], ids=ANSWERED)
def test_no_gradient_is_given_to_those_that_have_none(make):
    problem = stateful_problem(make)
    for p in problem.program.model.parameters():
        p.grad = None
    before = state(problem)
    QUESTIONS["everything"](problem)
    assert all(p.grad is None for p in problem.program.model.parameters())
    assert_unchanged(before, state(problem))


@pytest.mark.parametrize("enabled", [True, False])
def test_the_grad_mode_of_the_caller_is_kept_and_does_not_matter(enabled):
    problem = stateful_problem(MESSY["two batch norms"])
    expected = problem.gradients().flat()
    with torch.set_grad_enabled(enabled):
        before = state(problem)
        found = problem.gradients()
        assert_unchanged(before, state(problem))
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(found.flat(), expected)
    assert not found.flat().requires_grad


# ---------------------------------------------------------------- what stops in the middle


class ByRunningLoss(nn.Module):
    """The loss relative to a running one, which it writes to before it reads it."""

    def __init__(self, after=lambda loss: loss) -> None:
        super().__init__()
        self.register_buffer("running", torch.ones((), dtype=torch.float64))
        self.after = after

    def forward(self, p: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(p, y)
        with torch.no_grad():
            self.running.mul_(0.9).add_(loss, alpha=0.1)
        return self.after(loss / self.running)


@pytest.mark.parametrize("after", [lambda loss: loss, lambda loss: loss**2])
def test_what_a_loss_writes_lasts_for_its_derivatives(after):
    net = nn.Linear(3, 2).double()
    X, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    problem = ub.Problem(net, ByRunningLoss(after), (X, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ub.MixedSamplesWarning)
        rows, gradient, G = problem.gradients(), problem.gradient(), problem.ggn()
    ByRunningLoss(after)(net(X), y).backward()
    for name, p in net.named_parameters():
        assert torch.allclose(gradient[name], p.grad, rtol=0, atol=1e-15)
        assert torch.allclose(rows[name].sum(0), p.grad, rtol=0, atol=1e-15)
    assert problem.program.loss.running == 1
    assert not problem.structure.reduction
    assert problem.structure.simd_loss
    assert torch.allclose(G @ torch.ones(8).double(), G.to_dense().sum(1))


class Stop(Exception):
    pass


ERRORS = pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
BY = pytest.mark.parametrize("by", ["component", "copy", "frozen"])


def ask(problem: ub.Problem, by: str) -> Any:
    """Much of it: rows, contractions without rows, weighted sums, and more than one question."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ub.MixedSamplesWarning)
        problem.compute(ub.SquaredNorms(), ub.Variance(), ub.ClippedSum(0.1), by=by)
        problem.compute(ub.Dots(), ub.OrthogonalityTest(), by=by, memory=1)
        return problem.gradients(by=by)


class Failing(nn.Module):
    """Stops in the middle of a run, when it has changed this and that."""

    def __init__(self, countdown: Countdown) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(D, D),
            nn.BatchNorm1d(D),
            nn.Dropout(0.3),
            nn.Linear(D, D),
            nn.BatchNorm1d(D, momentum=None),
            nn.Linear(D, D),
        )
        self.countdown = countdown

    def forward(self, x: Tensor) -> Tensor:
        h = self.model[:3](x)
        h.mul_(2)
        self.late = h
        self.countdown.tick()
        return self.model[3:](h)


def assert_stops_cleanly(
    problem: ub.Problem, by: str, error: type[BaseException], allowed: tuple = ()
) -> None:
    """Raise where anything is changed after the question stopped."""
    before = state(problem)
    with suppress(error, *allowed):
        ask(problem, by)
    assert_unchanged(before, state(problem))


@ERRORS
@BY
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8])
def test_a_model_that_stops_changes_nothing(at, by, error):
    problem = stateful_problem(lambda: Failing(Countdown(at, error)))
    assert_stops_cleanly(problem, by, error, (ub.CaptureError,))
    assert problem.program.model.countdown.runs >= 1


@ERRORS
@BY
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_loss_that_stops_changes_nothing(at, by, error):
    countdown = Countdown(at, error)

    def loss(p: Tensor, y: Tensor) -> Tensor:
        value = nn.functional.mse_loss(p, y)
        countdown.tick()
        return value

    problem = stateful_problem(lambda: Failing(Countdown(10**6, error)))
    problem.program = type(problem.program)(
        problem.program.model, loss, problem.program.parameters, False
    )
    assert_stops_cleanly(problem, by, error, (ub.CaptureError,))
    assert countdown.runs >= 1


def stopping(function: Callable, countdown: Countdown, late: bool) -> Callable:
    """The same function, which raises before or after its work when the count is down."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not late:
            countdown.tick()
        result = function(*args, **kwargs)
        if late:
            countdown.tick()
        return result

    return run


@dataclass(frozen=True)
class Place:
    """Something of the engine or of torch that may stop: an attribute of an owner."""

    owner: Any
    name: str
    late: bool = False


PLACES = {
    "rows of a linear layer": Place(products.Linear, "rows"),
    "after the rows of a linear layer": Place(products.Linear, "rows", late=True),
    "rows of a shift": Place(broadcasts.Shift, "rows"),
    "a weighted sum": Place(products.Linear, "weighted_sum"),
    "an op": Place(torch, "mul"),
    "another op": Place(torch, "einsum"),
    "a backward pass": Place(torch.autograd, "grad"),
    "after a backward pass": Place(torch.autograd, "grad", late=True),
}


@ERRORS
@pytest.mark.parametrize("at", [1, 2, 4, 9])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("by", ["component", "copy"])
def test_stopping_inside_the_engine_changes_nothing(by, place, at, error, monkeypatch):
    problem = stateful_problem(lambda: Failing(Countdown(10**6, error)))
    expected = ask(stateful_problem(lambda: Failing(Countdown(10**6, error))), by)
    _ = problem.structure  # so that it is the sweep that stops
    countdown = Countdown(at, error)
    with monkeypatch.context() as patched:
        patched.setattr(spot_check, "SHARE", 0.0)  # and no spot check before it
        patched.setattr(
            place.owner,
            place.name,
            stopping(getattr(place.owner, place.name), countdown, place.late),
        )
        assert_stops_cleanly(problem, by, error)
    # What was kept is not spoilt: the next answer is that of a problem that was never stopped.
    torch.testing.assert_close(ask(problem, by).flat(), expected.flat(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_interrupts_of_the_engine_are_not_swallowed(place, monkeypatch):
    problem = stateful_problem(lambda: Failing(Countdown(10**6, Stop)))
    _ = problem.structure
    countdown = Countdown(1, KeyboardInterrupt)
    monkeypatch.setattr(
        place.owner, place.name, stopping(getattr(place.owner, place.name), countdown, place.late)
    )
    with pytest.raises(KeyboardInterrupt):
        ask(problem, "component")
    assert countdown.runs == 1


@ERRORS
def test_stopping_in_a_model_that_is_run_itself_changes_nothing(error, monkeypatch):
    problem = stateful_problem(MESSY["own derivative under batch norm"])
    expected = problem.gradients()
    for at in (1, 2, 4):
        with monkeypatch.context() as patched:
            patched.setattr(
                torch.autograd, "grad", stopping(torch.autograd.grad, Countdown(at, error), False)
            )
            before = state(problem)
            with pytest.raises(error):
                problem.gradients()
            assert_unchanged(before, state(problem))
    assert torch.equal(problem.gradients().flat(), expected.flat())


@dataclass(frozen=True)
class Stopping(Basic):
    """A quantity of the user's that stops at the given block."""

    error: type[BaseException]
    at: int

    def start(self, about: About) -> Collector:
        return _Stopping(about, Countdown(self.at, self.error))


class _Stopping(Collector):
    def __init__(self, about: About, countdown: Countdown) -> None:
        super().__init__(about)
        self.countdown = countdown

    def take(self, name: str, block: RowBlock) -> None:
        block.rows()
        self.countdown.tick()

    def finish(self) -> Any:
        return None


@ERRORS
@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_quantity_that_stops_changes_nothing(at, error):
    for make in (MESSY["two batch norms"], MESSY["own derivative"], MESSY["dropout"]):
        problem = stateful_problem(make)
        before = state(problem)
        with pytest.raises(error):
            problem.compute(ub.SquaredNorms(), Stopping(error, at), memory=1)
        assert_unchanged(before, state(problem))
        problem.gradients()


def test_an_interrupt_leaves_no_gate_closed(monkeypatch):
    """A flag of the engine that is not the problem's: other problems must not notice either."""
    other = stateful_problem(MESSY["two batch norms"])
    expected = other.gradients().flat()
    problem = stateful_problem(MESSY["two batch norms"])
    for at in range(1, 12):
        with monkeypatch.context() as patched:
            patched.setattr(
                torch.autograd,
                "grad",
                stopping(torch.autograd.grad, Countdown(at, KeyboardInterrupt), True),
            )
            with suppress(KeyboardInterrupt):
                problem.gradients()
        assert torch.equal(other.gradients().flat(), expected)


# ---------------------------------------------------------------- the checker sees changes


PLANTED: dict[str, Callable[[ub.Problem], Any]] = {
    "parameter": lambda p: p.program.model[0].weight.data.mul_(1 + 1e-6),
    "version": lambda p: p.program.model[0].weight.detach().mul_(1),
    "running statistics": lambda p: p.program.model[1].num_batches_tracked.add_(1),
    "gradient": lambda p: p.program.model[0].weight.grad.add_(1),
    "gradient of one without": lambda p: setattr(p.program.model[0].bias, "grad", torch.zeros(D)),
    "a call of backward": lambda p: p.program.loss(p.program.model(p.inputs), p.targets).backward(),
    "flag": lambda p: p.program.model[1].eval(),
    "hook": lambda p: p.program.model[0].register_full_backward_hook(print),
    "storage": lambda p: setattr(
        p.program.model[0].weight, "data", p.program.model[0].weight.data.clone()
    ),
    "noise": lambda p: torch.rand(N),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_change_is_caught(name):
    problem = stateful_problem(normed)
    before = state(problem)
    assert_unchanged(before, state(problem))
    PLANTED[name](problem)
    with pytest.raises(AssertionError, match="changed"):
        assert_unchanged(before, state(problem))


def test_an_engine_that_writes_to_parameters_is_caught(monkeypatch):
    problem = stateful_problem(normed)
    rest = replayed_rows.ReplayedRows.rest

    def writing(self: replayed_rows.ReplayedRows) -> dict[str, Tensor]:
        next(iter(self.parameters.values())).detach().mul_(1)
        return rest(self)

    monkeypatch.setattr(replayed_rows.ReplayedRows, "rest", writing)
    before = state(problem)
    problem.gradients()
    with pytest.raises(AssertionError, match=r"changed.*version"):
        assert_unchanged(before, state(problem))
