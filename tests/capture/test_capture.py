"""The recorder sees what it must: a replay against the model itself, where steps came from, what
escapes.

That it leaves no trace is shown in `test_purity.py` beside it.
"""

import functools
import linecache
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import unbatch as ub
from cases.function_net import D, N, Net, T, flat
from unbatch.capture import graph as graph_module
from unbatch.capture import isolation
from unbatch.capture import program as capture
from unbatch.capture.program import Program
from unbatch.capture.steps import Step

# ---------------------------------------------------------------- programs


@dataclass(frozen=True)
class Case:
    """A program; `gradients`: whether a replay has the derivatives of the model."""

    name: str
    build: Callable[[], tuple[Callable, Any]]
    gradients: bool = True
    parameters: tuple[str, ...] = ()


CASES: list[Case] = []


def case(
    name: str, *inputs: Callable[[], Any], gradients: bool = True, **parts: Callable[[], Any]
) -> Callable:
    """A case from a forward function."""

    def register(run: Callable) -> Callable:
        def build() -> tuple[nn.Module, tuple]:
            return Net(run, **{k: make() for k, make in parts.items()}), tuple(
                make() for make in inputs or (flat,)
            )

        CASES.append(Case(name, build, gradients))
        return run

    return register


def module(
    name: str,
    make: Callable[[], nn.Module],
    inputs: Callable[[], Any] = flat,
    gradients: bool = True,
) -> None:
    CASES.append(Case(name, lambda: (make(), (inputs(),)), gradients))


class Cube(torch.autograd.Function):
    """An ordinary function with its own derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class SignThatPassesGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


@case("custom function", gradients=False)
def _(net, x):
    return Cube.apply(net.linear(x))


@case("straight through, by a custom function", gradients=False)
def _(net, x):
    return SignThatPassesGradients.apply(net.linear(x))


@case("straight through, by detach")
def _(net, x):
    h = net.linear(x)
    return h + (h.sign() - h).detach()


@case("tensor hook that changes the gradient", gradients=False)
def _(net, x):
    h = net.linear(x)
    h.register_hook(lambda g: 2 * g + 1)
    return h.tanh()


@case("tensor hook that only looks")
def _(net, x):
    h = net.linear(x)
    h.register_hook(lambda g: None)
    return h.tanh()


@case("gradient inside the forward pass", gradients=False)
def _(net, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net.linear(x).tanh().square().sum(), x, create_graph=True)
    return g


@case("tied weights")
def _(net, x):
    return F.linear(net.linear(x).tanh(), net.linear.weight.t()) @ net.linear.weight


@case("data of a value")
def _(net, x):
    h = net.linear(x)
    return h * h.data.abs()


@case("block without gradients")
def _(net, x):
    h = net.linear(x)
    with torch.no_grad():
        scale = h.abs().amax(1, keepdim=True)
    return h / scale


@case("writes through views")
def _(net, x):
    h = net.linear(x).clone()
    h[1:] *= 2
    h.t()[0] += 1
    h.view(-1)[::3] = 0
    return h


@case("write to the input")
def _(net, x):
    x.mul_(2)
    return net.linear(x)


@case("written output of a loop")
def _(net, x):
    out = torch.empty(N, D, dtype=x.dtype)
    for i, row in enumerate(x):
        out[i] = net.linear(row).tanh()
    return out


@case("buffer updated before it is used", seen=lambda: nn.Buffer(torch.zeros(D)))
def _(net, x):
    net.seen.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    return net.linear(x - net.seen)


@case("dropout twice", drop=nn.Dropout)
def _(net, x):
    return net.drop(net.linear(x)) + net.drop(x)


@case("noise added")
def _(net, x):
    h = net.linear(x)
    return h + torch.randn_like(h) * torch.rand(D, dtype=h.dtype)


@case("checkpoint")
def _(net, x):
    return checkpoint(lambda z: net.linear(z).tanh(), x, use_reentrant=False)


@case("numbers that left and came back")
def _(net, x):
    h = net.linear(x)
    return h / (1 + h.abs().max().item()) + torch.tensor(h.mean(0).tolist(), dtype=h.dtype)


@case(
    "two inputs and a dict of outputs",
    flat,
    lambda: torch.randint(D, (N,)),
    table=lambda: nn.Embedding(D, D),
)
def _(net, x, i):
    return {"sum": net.linear(x) + net.table(i), "first": (x[:, :1],)}


@case("selection and scatter")
def _(net, x):
    h = net.linear(x)
    return (
        torch.zeros_like(h)
        .scatter(1, h.argsort(1), h)
        .index_add(1, torch.tensor([0, 0, 1, 2, 4]), h)
    )


@case("experts chosen by their scores", router=lambda: nn.Linear(D, 2))
def _(net, x):
    order = net.router(x).argmax(1).argsort(stable=True)
    return net.linear(x[order]).relu()[order.argsort()]


@case("vmap over samples")
def _(net, x):
    return torch.vmap(lambda row: net.linear(row) / row.norm())(x)


@case("complex numbers")
def _(net, x):
    return torch.fft.rfft(net.linear(x), dim=1).abs()


def with_hooks(kind: str, hook: Callable) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
        getattr(net[1], kind)(hook)
        return net

    return make


module("forward hook", with_hooks("register_forward_hook", lambda m, x, out: out - out.mean(0)))
module("forward pre-hook", with_hooks("register_forward_pre_hook", lambda m, x: (2 * x[0],)))
module(
    "full backward hook that changes the gradient",
    with_hooks("register_full_backward_hook", lambda m, gi, go: (3 * gi[0],)),
    gradients=False,
)
module(
    "full backward hook that only looks",
    with_hooks("register_full_backward_hook", lambda m, gi, go: None),
    gradients=False,
)
module("batch norm", lambda: nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.ReLU()))
module(
    "weight norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, D)), nn.Tanh())
)
module("spectral norm", lambda: parametrizations.spectral_norm(nn.Linear(D, D)))
module("recurrent", lambda: nn.LSTM(D, D, batch_first=True), lambda: torch.randn(N, T, D))
module(
    "transformer",
    lambda: nn.TransformerEncoderLayer(D, 1, 7, batch_first=True),
    lambda: torch.randn(N, T, D),
)
module(
    "convolution",
    lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.MaxPool2d(2), nn.Flatten()),
    lambda: torch.randn(N, 2, 5, 5),
)


def functional(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return (x @ parameters["w"]).tanh() + parameters["b"]


# ---------------------------------------------------------------- replay against eager


def to_double(tree: Any) -> Any:
    return tree_map(
        lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree
    )


def summed(predictions: Any) -> Tensor:
    return sum(t.sum() for t in tree_leaves(predictions))


def problem_of(case: Case) -> ub.Problem:
    torch.manual_seed(0)
    model, inputs = case.build()
    return ub.Problem(
        model.double(), lambda p: summed(p), (to_double(inputs), None), in_dims=(0, None)
    )


def other_batch(inputs: Any) -> Any:
    return tree_map(
        lambda t: torch.randn_like(t) * 3 if t.is_floating_point() else t.flip(0), inputs
    )


def eager(program: capture.Program, graph: graph_module.Graph, inputs: Any) -> list[Tensor]:
    """The model itself, from the random state of the recording; without a trace."""
    with isolation.untouched(program.modules, graph.rng):
        return tree_leaves(program.predict(tree_map(torch.clone, inputs)))


def replayed(
    graph: graph_module.Graph, inputs: Any, parameters: dict[int, Tensor] | None = None
) -> list[Tensor]:
    feed = {
        ref.index: x
        for ref, x in zip(graph.inputs, tree_leaves(inputs), strict=True)
        if ref is not None
    }
    return graph.run(feed | (parameters or {}), [p.index for p in graph.predictions])


def assert_same(mine: list[Tensor], true: list[Tensor]) -> None:
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


def gradients_agree(program: capture.Program, graph: graph_module.Graph, inputs: Any) -> None:
    """Raise where the parameters' gradients of one random combination of the outputs differ."""
    places = {v.name: i for i, v in enumerate(graph.values) if v.kind == "parameters"}
    fresh = {
        i: program.parameters[name].detach().clone().requires_grad_() for name, i in places.items()
    }
    cotangents = [
        torch.randn(v.shape, dtype=v.dtype)
        for v in (graph.values[p.index] for p in graph.predictions)
    ]
    combine = lambda outs: sum((c * o).sum() for c, o in zip(cotangents, outs, strict=True))  # noqa: E731
    true = torch.autograd.grad(
        combine(eager(program, graph, inputs)),
        [program.parameters[n] for n in places],
        allow_unused=True,
    )
    value = combine(replayed(graph, inputs, fresh))
    assert value.requires_grad, "no gradient flows through the replay"
    mine = torch.autograd.grad(value, list(fresh.values()), allow_unused=True)
    for p, m, t in zip(fresh.values(), mine, true, strict=True):
        none = torch.zeros_like(p)
        assert_same([none if m is None else m], [none if t is None else t])


EVERY_CASE = pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES])


@EVERY_CASE
def test_replay_gives_the_values_of_the_model(case):
    problem = problem_of(case)
    graph, _ = capture.record(problem.program, problem.inputs, None)
    assert_same(replayed(graph, problem.inputs), eager(problem.program, graph, problem.inputs))
    other = other_batch(problem.inputs)
    assert_same(replayed(graph, other), eager(problem.program, graph, other))


@EVERY_CASE
def test_wrong_gradients_are_noted(case):
    problem = problem_of(case)
    graph, _ = capture.record(problem.program, problem.inputs, None)
    noted = any("other derivatives" in note for note in problem.structure.notes)
    assert noted == (not case.gradients), problem.structure.notes
    if case.gradients:
        gradients_agree(problem.program, graph, problem.inputs)
    else:
        with pytest.raises(AssertionError):
            gradients_agree(problem.program, graph, problem.inputs)


@EVERY_CASE
def test_questions_about_gradients_ask_the_model(case):
    problem = problem_of(case)
    graph, _ = capture.record(problem.program, problem.inputs, None)
    with isolation.untouched(problem.program.modules, graph.rng):
        value = summed(problem.program.predict(tree_map(torch.clone, problem.inputs)))
        true = torch.autograd.grad(
            value, list(problem.program.parameters.values()), allow_unused=True
        )
    gradient = problem.gradient()
    assert list(gradient) == list(problem.program.parameters)
    assert_same(
        [gradient[n] for n, g in zip(gradient, true, strict=True) if g is not None],
        [g for g in true if g is not None],
    )


def test_functional_model():
    parameters = {
        "w": torch.randn(D, 3, dtype=torch.float64),
        "b": torch.randn(3, dtype=torch.float64),
    }
    parameters = {n: p.requires_grad_() for n, p in parameters.items()}
    x = flat().double()
    problem = ub.Problem(
        functional, lambda p, y: (p * y).sum(), (x, torch.ones(N, 3)), parameters=parameters
    )
    graph, _ = capture.record(problem.program, problem.inputs, problem.targets)
    for batch in (x, other_batch(x)):
        assert_same(replayed(graph, batch), [functional(parameters, batch)])
    assert problem.structure.simd_forward
    assert_same([problem.predictions()], [functional(parameters, x)])
    true = torch.autograd.grad(functional(parameters, x).sum(), list(parameters.values()))
    assert_same(list(problem.gradient().values()), list(true))


def test_replay_of_the_loss():
    model, x, y = nn.Linear(D, D), flat(), torch.arange(N)
    problem = ub.Problem(model, nn.CrossEntropyLoss(), (x, y))
    graph, (_, loss) = capture.record(problem.program, x, y)
    assert graph.loss is not None
    feed = {graph.inputs[0].index: 2 * x, graph.targets[0].index: y.flip(0)}
    assert_same(graph.run({}, [graph.loss.index]), [loss])
    assert_same(graph.run(feed, [graph.loss.index]), [F.cross_entropy(model(2 * x), y.flip(0))])


# ---------------------------------------------------------------- where steps came from


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, x):
        return self.inner(x).tanh()


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(D, 2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + x.sin()
        return self.head(x)


def test_steps_know_their_module_and_line():
    problem = ub.Problem(Named(), lambda p: p.square().sum(), (flat(), None))
    graph, _ = capture.record(problem.program, problem.inputs, None)
    modules = [(s.name, s.module) for s in graph.forward_steps if s.name not in ("t", "detach")]
    blocks = [
        step
        for i in (0, 1)
        for step in (
            ("addmm", f"blocks.{i}.inner"),
            ("tanh", f"blocks.{i}"),
            ("sin", "Named"),
            ("add", "Named"),
        )
    ]
    assert modules == [*blocks, ("relu", "head.0"), ("addmm", "head.1")]
    written = {
        "tanh": ".tanh()",
        "sin": "x.sin()",
        "add": "+",
        "relu": "self.head(x)",
        "square": "p.square()",
        "sum": ".sum()",
    }
    for step in graph.steps:
        file, _, line = step.where.rpartition(":")
        assert file == __file__, step
        assert written.get(step.name, "") in linecache.getline(file, int(line)), step


def test_every_step_of_user_code_has_a_line():
    for case in CASES:
        problem = problem_of(case)
        graph, _ = capture.record(problem.program, problem.inputs, None)
        if isinstance(problem.program.model, Net):
            lost = [
                (case.name, s.name, s.where)
                for s in graph.steps
                if s.where.rpartition(":")[0] != __file__
            ]
            assert not lost, lost
            assert all(s.module for s in graph.forward_steps), case.name


# ---------------------------------------------------------------- what leaves the tensor world


def scaled_by_bool(net, x):
    return net.linear(x) * (2.0 if bool(x.mean() > 0) else 1.0)


def branch(net, x):
    h = net.linear(x)
    return h * 2 if h.abs().max() > 1 else h


def by_float(net, x):
    return net.linear(x) * float(x.mean())


def by_int(net, x):
    return net.linear(x) + int(x.abs().sum())


def by_numpy(net, x):
    return net.linear(x) * float(np.mean(x.detach().numpy()))


def by_array(net, x):
    return net.linear(x) * float(np.asarray(x.detach()).mean())


def by_shape(net, x):
    return net.linear(x) / (1 + x[x[:, 0] > 0].shape[0])


def by_length(net, x):
    return net.linear(x) / (1 + len(torch.nonzero(x > 0)))


def by_item_in_maths(net, x):
    return net.linear(x) * np.tanh(float(x.mean().item()))


def by_item_in_a_branch(net, x):
    return net.linear(x) * (3 if x.mean().item() > 0 else 2)


def by_item(net, x):
    return net.linear(x) * x.mean().item()


def by_item_arithmetic(net, x):
    mean = x.mean().item()
    return net.linear(x) * (1 + 2 * mean**2 - mean / 3)


def by_tolist(net, x):
    first, *_ = x.mean(0).tolist()
    return net.linear(x) * first


def by_tensor_of_list(net, x):
    return net.linear(x) - torch.tensor(x.mean(0).tolist())


def same_both_ways(net, x):
    return net.linear(x) * 2 if net.linear.weight.sum() > 0 else net.linear(x)


ESCAPES = [
    scaled_by_bool,
    branch,
    by_float,
    by_int,
    by_numpy,
    by_array,
    by_shape,
    by_length,
    by_item_in_maths,
    by_item_in_a_branch,
]
FOLLOWED = [by_item, by_item_arithmetic, by_tolist, by_tensor_of_list]


@pytest.mark.parametrize("run", ESCAPES, ids=lambda f: f.__name__)
def test_escapes_are_recorded(run):
    problem = ub.Problem(Net(run), lambda p: p.sum(), (flat(), None))
    graph, _ = capture.record(problem.program, problem.inputs, None)
    assert graph.host_reads
    for escape in graph.host_reads:
        file, _, line = escape.where.rpartition(":")
        first = run.__code__.co_firstlineno
        assert file == __file__, escape
        assert first < int(line) < first + 4, escape
        assert escape.module == "Net"
    structure = problem.structure
    assert not structure.simd_forward, structure.simd_forward
    assert not structure.simd_given_statistics, structure.simd_given_statistics


@pytest.mark.parametrize("run", FOLLOWED, ids=lambda f: f.__name__)
def test_numbers_are_followed(run):
    problem = ub.Problem(Net(run), lambda p: p.sum(), (flat(), None))
    graph, _ = capture.record(problem.program, problem.inputs, None)
    assert not graph.host_reads
    assert problem.structure.independent_forward.status == "fails"
    assert problem.structure.simd_given_statistics.status == "holds"


def test_branch_on_parameters_is_no_escape_of_the_batch():
    assert ub.Problem(Net(same_both_ways), lambda p: p.sum(), (flat(), None)).structure.simd_forward


def test_a_program_has_names_for_its_parts():
    """A module is called by its class, a function by its name, and a partial by what it is of."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    smoothed = functools.partial(
        functools.partial(F.cross_entropy, label_smoothing=0.1), reduction="sum"
    )
    program = Program(model, smoothed, dict(model.named_parameters()))
    assert program.names == ("Sequential", "cross_entropy")
    assert Program(model, None, {}).names == ("Sequential", "its own loss")
    assert program.module_names == {id(model): "Sequential", id(model[0]): "0", id(model[1]): "1"}


def test_a_step_says_where_it_stands():
    step = Step(0, torch.ops.aten.add.Tensor, (), {}, (), (), True, "layer.1", "net.py:3")
    assert step.place == "layer.1, add, net.py:3"
    assert replace(step, module="", where="").place == "the model, add"
