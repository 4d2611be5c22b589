"""Rows of models that are run on their own parameters, which they know by more than numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import unbatch as ub
from cases import own_parameters
from cases.own_parameters import FEATURES, PROGRAMS, SAMPLES
from unbatch.capture.after_run import AfterRun

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


def squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum()


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = PROGRAMS[name]()
    return net, torch.randn(SAMPLES, FEATURES).double(), torch.randn(SAMPLES, FEATURES).double()


def truth(name: str) -> Tensor:
    """Return the rows by a plain loop, each on a net of its own, as a run may change it."""
    rows = []
    for n in range(SAMPLES):
        net, x, y = build(name)
        parameters = list(net.parameters())
        output = net(x)
        loss = squares(output[n], y[n])
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def jacobian(name: str) -> Tensor:
    rows = []
    for i in range(SAMPLES * FEATURES):
        net, x, _ = build(name)
        grads = torch.autograd.grad(net(x).flatten()[i], list(net.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("step", [own_parameters.Step, own_parameters.Smooth])
@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_are_those_of_a_plain_loop(name, step, monkeypatch):
    monkeypatch.setattr(own_parameters, "Step", step)
    net, x, y = build(name)
    assert_close(ub.Problem(net, squares, (x, y)).gradients().flat(), truth(name))


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_matrix_is_that_of_a_plain_loop(name):
    net, x, y = build(name)
    J = jacobian(name)
    G = ub.Problem(net, squares, (x, y)).ggn()
    v = torch.linspace(-1, 1, J.shape[1]).double()
    assert_close(G @ v, 2 * J.T @ (J @ v))
    assert_close(G.diag(), 2 * J.square().sum(0))


def state(net: nn.Module) -> list[Any]:
    """Return what a question has to leave as it was."""
    tensors = [*net.parameters(), *net.buffers()]
    return [(t.tolist(), t._version, t.data_ptr(), len(t._backward_hooks or ())) for t in tensors]


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_question_leaves_no_trace(name):
    net, x, y = build(name)
    before = state(net)
    problem = ub.Problem(net, squares, (x, y))
    problem.gradients()
    problem.ggn().diag()
    assert state(net) == before


LEFT = [
    "a mean that moves",
    "weights in another memory",
    "a hook that a run adds",
    "a slope in an array",
    "a slope that is used up",
]


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_put_in_place_is_caught(name, monkeypatch):
    monkeypatch.setattr(AfterRun, "put_in_place", lambda self, save, failures: None)
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        test_rows_are_those_of_a_plain_loop(name, own_parameters.Step, monkeypatch)


# --- other kinds of programs ----------------------------------------------------------------------


class WithLoss(nn.Module):
    """Computes its own loss, and weighs it by what it knows its parameters by."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.gains = {id(self.linear.weight): 3.0}

    def predict(self, x: Tensor) -> Tensor:
        gain = self.gains.get(id(self.linear.weight), 1.0)
        return self.last(own_parameters.Step.apply(self.linear(x)) * gain)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.predict(x), y, reduction="sum")


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, FEATURES).double(), torch.randn(SAMPLES, FEATURES).double()


def rows_of(predict: Any, parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    rows = []
    for n in range(SAMPLES):
        grads = torch.autograd.grad(squares(predict(x)[n], y[n]), parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_a_model_that_computes_its_loss():
    model, (x, y) = WithLoss().double(), data()
    rows = ub.Problem(model, batch={"x": x, "y": y}).gradients().flat()
    assert_close(rows, rows_of(model.predict, list(model.parameters()), x, y))


def test_a_function_of_parameters():
    x, y = data()
    weight = torch.randn(FEATURES, FEATURES).double().requires_grad_()
    gains = {id(weight): 3.0}

    def model(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        gain = gains.get(id(parameters["weight"]), 1.0)
        return own_parameters.Step.apply(x @ parameters["weight"]) * gain

    rows = ub.Problem(model, squares, (x, y), parameters={"weight": weight}).gradients().flat()
    assert_close(rows, rows_of(lambda x: model({"weight": weight}, x), [weight], x, y))


def test_a_scripted_layer_under_a_step():
    net, x, y = build("a set of ids")
    net.linear = torch.jit.script(net.linear)
    own_parameters.known_ids(net)
    expected = rows_of(net, list(net.parameters()), x, y)
    assert_close(ub.Problem(net, squares, (x, y)).gradients().flat(), expected)


def test_a_loss_that_knows_the_parameters_beside_the_predictions():
    """What passes by the predictions is in the rest, and with the rows sums to the gradient."""
    net, x, y = build("weights that shrink")
    decays = {id(net.linear.weight): 3.0}

    def loss(output: Tensor, target: Tensor) -> Tensor:
        decay = decays.get(id(net.linear.weight), 0.0)
        return squares(output, target) + decay * net.linear.weight.square().sum()

    problem = ub.Problem(net, loss, (x, y))
    gradient = problem.gradient()
    rows = problem.gradients()
    twin, _, _ = build("weights that shrink")
    value = squares(twin(x), y) + 3.0 * twin.linear.weight.square().sum()
    plain = torch.autograd.grad(value, list(twin.parameters()))
    for expected, (name, g) in zip(plain, gradient.items(), strict=True):
        assert_close(g, expected)
        assert_close(rows[name].sum(0) + rows.rest.get(name, 0), expected)


class Noting(nn.Module):
    """Notes the size of what it is given, which its backward pass scales by; and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.calls = 0.0, 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.size = 3.0
        return ByLoss.apply((output - target).square(), self).sum()


class ByLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Noting) -> Tensor:
        ctx.loss = loss
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.loss.calls += 1
        return g * ctx.loss.size, None


class Hooking:
    """Is called with the gradient, which it notes and scales by what it has noted before."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.scale = 1.0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.scale = 3.0
        output = output * 1
        output.register_hook(self.scaled)
        return squares(output, target)

    def scaled(self, g: Tensor) -> Tensor:
        self.norms.append(float(g.norm()))
        return g * self.scale


@pytest.mark.parametrize("make", [Noting, Hooking])
def test_a_loss_whose_backward_pass_reads_what_it_has_noted(make):
    net, (x, y) = nn.Linear(FEATURES, FEATURES).double(), data()
    loss = make()
    before = {k: repr(v) for k, v in vars(loss).items()}
    problem = ub.Problem(net, loss, (x, y))
    assert_close(problem.gradients().flat(), 3 * rows_of(net, list(net.parameters()), x, y))
    gradient = torch.cat([g.flatten() for g in problem.gradient().values()])
    assert_close(gradient, problem.gradients().flat().sum(0))
    assert {k: repr(v) for k, v in vars(loss).items()} == before
