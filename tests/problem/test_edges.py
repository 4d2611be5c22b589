"""Edges of what a net may be made of: rows, norms, variance and the Gauss-Newton matrix against
their definitions.

What is exact is compared in float64; in a narrow type, with the same net in float64, up to what the
type rounds.
"""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from unbatch.reference import definitions as reference

pytestmark = pytest.mark.filterwarnings(
    "ignore::unbatch.VanishingCurvatureWarning"
)  # losses are linear here and there

N, D, C = 5, 4, 3
ROWS = {"component": reference.component, "copy": reference.copies, "frozen": reference.frozen}
EXACT = 1e-10

Case = tuple[nn.Module, Callable, object, Tensor]
CASES: dict[str, Callable[[], Case]] = {}
WITHOUT: dict[str, str] = {}
REFUSED: dict[str, str] = {}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ub.MixedSamplesWarning)
        yield


class Net(nn.Module):
    """Parts by name, and a forward pass in one function."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, *x):
        return self.run(self, *x)


def normals(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def case(name, without="", refused=""):
    """A function that makes ``(model, loss, inputs, targets)``, always the same.

    ``without``: rows that the reference cannot run; ``refused``: rows that the library does not
    have.
    """

    def register(make):
        def made() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model, loss, x, y = make()
            return model.double(), loss, x, y

        CASES[name] = made
        WITHOUT[name], REFUSED[name] = without, refused
        return make

    return register


def labels(n=N, classes=C):
    return torch.arange(n) % classes


# -------------------------------------------------------------- second derivatives inside the model


@case("forces from an energy", without="frozen")
def _():
    def forces(net, x):
        x = x.detach().requires_grad_()
        energy = net.readout(net.hidden(x).tanh()).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]

    net = Net(forces, hidden=nn.Linear(D, D), readout=nn.Linear(D, 1))
    return net, F.mse_loss, normals(N, D), normals(N, D)


@case("forces from an energy below batch norm", refused="copy frozen")
def _():
    def forces(net, x):
        x = x.detach().requires_grad_()
        energy = net.readout(net.hidden(x).tanh()).sum()
        return net.head(net.norm(torch.autograd.grad(energy, x, create_graph=True)[0]))

    parts = {"readout": nn.Linear(D, 1), "norm": nn.BatchNorm1d(D), "head": nn.Linear(D, C)}
    return Net(forces, hidden=nn.Linear(D, D), **parts), F.cross_entropy, normals(N, D), labels()


@case("a step of gradient descent inside")
def _():
    def adapted(net, x, context):
        w = net.weight
        inner = ((context @ w).tanh() - 1).square().sum()
        return x @ (w - 0.1 * torch.autograd.grad(inner, w, create_graph=True)[0])

    net = Net(lambda net, x: adapted(net, x, net.context), weight=nn.Parameter(normals(D, C)))
    net.register_buffer("context", normals(6, D))
    return net, F.cross_entropy, normals(N, D), labels()


# ---------------------------------------------------------------- complex parameters


def spectral(net, x):
    return net.head((torch.fft.rfft(x) * net.filter).abs())


@case("a complex filter")
def _():
    net = Net(
        spectral, filter=nn.Parameter(normals(3, dtype=torch.complex128)), head=nn.Linear(3, C)
    )
    net.double = lambda: net  # a module of complex parameters is in double precision already
    net.head.double()
    return net, F.cross_entropy, normals(N, D), labels()


# ---------------------------------------------------------------- how tensors lie in memory


@case("channels last")
def _():
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, C, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return (
        model,
        F.cross_entropy,
        normals(N, 2, 5, 5).to(memory_format=torch.channels_last),
        labels(),
    )


@case("channels last, two batch norms and no pooling")
def _():
    layers = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, C, 2),
        nn.BatchNorm2d(C),
    ]
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = normals(N, 2, 4, 4).to(memory_format=torch.channels_last)
    return model, F.cross_entropy, x, labels(N)[:, None, None].expand(N, 1, 1)


def mlp(*more):
    return nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh(), *more, nn.Linear(D, C))


@case("inputs transposed in memory")
def _():
    return mlp(), F.cross_entropy, normals(D, N).t(), labels()


@case("inputs with gaps in memory")
def _():
    return mlp(), F.cross_entropy, normals(2 * N, 3 * D)[::2, ::3], labels(2 * N)[::2]


@case("inputs that share their memory")
def _():
    return mlp(), F.mse_loss, normals(N + D).unfold(0, D, 1)[:N], normals(1, C).expand(N, C)


@case("a weight with gaps in memory")
def _():
    weight = nn.Parameter(normals(2 * D, 2 * C)[::2, ::2])
    return (
        Net(lambda net, x: (x @ net.weight).tanh(), weight=weight),
        F.mse_loss,
        normals(N, D),
        normals(N, C),
    )


# ---------------------------------------------------------------- written in place


@case("activations in place")
def _():
    below = [
        nn.Linear(D, D),
        nn.BatchNorm1d(D),
        nn.ReLU(inplace=True),
        nn.Linear(D, D),
        nn.BatchNorm1d(D),
    ]
    above = [nn.Dropout(0.3, inplace=True), nn.ELU(inplace=True), nn.Linear(D, C)]
    return nn.Sequential(*below, *above), F.cross_entropy, normals(N, D), labels()


@case("views written in place")
def _():
    def run(net, x):
        h = net.first(x)
        h[:, :2].sin_()
        h.t()[3] *= 2
        h.view(-1)[::D] += 1
        h = net.norm(h.clone())
        h[:, 1:3] = h[:, :2].clone() * h[:, 3:].clone()
        return net.head(h)

    parts = {"first": nn.Linear(D, D), "norm": nn.BatchNorm1d(D), "head": nn.Linear(D, C)}
    return Net(run, **parts), F.cross_entropy, normals(N, D), labels()


# ---------------------------------------------------------------- sizes


@case("one sample")
def _():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, C)
    )
    return model, F.cross_entropy, normals(1, 2, 3, 3), labels(1)


@case("two samples under batch norm")
def _():
    return mlp(), F.cross_entropy, normals(2, D), labels(2)


@case("seven samples")  # in chunks of which none divides them
def _():
    more = [nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh()]
    return mlp(*more), F.cross_entropy, normals(7, D), labels(7)


@case("one class")
def _():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, 1))
    return model, F.cross_entropy, normals(N, D), labels(N, 1)


@case("one output")
def _():
    model = nn.Sequential(
        nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, 1), nn.Flatten(0)
    )
    return model, F.binary_cross_entropy_with_logits, normals(N, D), labels(N, 2).double()


@case("one feature")
def _():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1), nn.Tanh(), nn.Linear(1, 1))
    return model, F.mse_loss, normals(N, 1), normals(N, 1)


# ---------------------------------------------------------------- nothing in it


@case("parameters without entries")
def _():
    def run(net, x):
        return net.head(torch.cat([net.body(x).tanh(), net.narrow(x)], 1)) + net.nothing.sum()

    parts = {
        "body": nn.Linear(D, D),
        "head": nn.Linear(D, C),
        "nothing": nn.Parameter(torch.zeros(0, 3)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that it initialises nothing
        narrow = nn.Linear(D, 0)
    return Net(run, narrow=narrow, **parts), F.cross_entropy, normals(N, D), labels()


@case("modules without parameters")
def _():
    empty = [nn.ParameterList(), nn.ParameterDict(), nn.ModuleList(), nn.Identity()]
    net = Net(
        lambda net, x: net.body(x),
        body=mlp(),
        list=empty[0],
        dict=empty[1],
        modules_=empty[2],
        same=empty[3],
    )
    return net, F.cross_entropy, normals(N, D), labels()


# ---------------------------------------------------------------- the questions


def made(name: str) -> tuple[Case, ub.Problem]:
    """The arguments of the reference and the problem, both at one random state."""
    torch.manual_seed(0)
    args = CASES[name]()
    return args, ub.Problem(args[0], args[1], (args[2], args[3]))


def largest(t: Tensor) -> float:
    return float(t.abs().max()) if t.numel() else 0.0


def near(found, expected, what, floor=1e-13, rtol=EXACT):
    """Raise where two mappings by name differ by more than rounding, of which there is more where
    numbers cancel.
    """
    assert list(found) == list(expected), what
    scale = max(map(largest, expected.values()), default=0.0)
    for name, wanted in expected.items():
        assert found[name].shape == wanted.shape, f"{what} of {name}: {tuple(found[name].shape)}"
        error = largest(found[name] - wanted)
        allowed = rtol * max(largest(wanted), 1e-2 * scale) + floor
        assert error <= allowed, f"{what} of {name}: off by {error:.1e}, allowed {allowed:.1e}"


UNEVEN = {2000: 2, 4000: 4}  # bytes, and how many of seven samples are a chunk then
MEMORIES = {n: (None, 1, *UNEVEN) if n == "seven samples" else (None, 1) for n in CASES}
EACH = pytest.mark.parametrize("name", CASES)
BY = pytest.mark.parametrize("by", ROWS)


@BY
@EACH
def test_rows(name, by):
    args, problem = made(name)
    if by in WITHOUT[name]:
        pytest.skip("the reference cannot run one sample alone")
    if by in REFUSED[name]:
        with pytest.raises(ub.StructureError, match="do not agree with the model's"):
            problem.gradients(by=by)
        return
    rows = problem.gradients(by=by)
    near(rows, ROWS[by](*args), f"rows by {by}")
    for memory in {1, *MEMORIES[name]} - {None}:
        near(problem.gradients(by=by, memory=memory), dict(rows), f"rows by {by} in {memory} bytes")


@pytest.mark.parametrize("memory", UNEVEN)
def test_chunks_do_not_divide_the_samples(memory):
    _, problem = made("seven samples")
    assert problem.plan(memory=memory).at_once == UNEVEN[memory]


@EACH
def test_rows_sum_to_the_gradient(name):
    args, problem = made(name)
    expected = reference.gradient(*args)
    near(problem.gradient(), expected, "gradient")
    for by in {"component", "copy"} - set(REFUSED[name].split()):
        near({n: r.sum(0) for n, r in problem.gradients(by=by).items()}, expected, f"sum by {by}")


@EACH
def test_norms_and_variance(name):
    for memory in MEMORIES[name]:
        check_norms_and_variance(made(name)[1], memory)


def check_norms_and_variance(problem, memory):
    rows = dict(problem.gradients())
    norms, variance, squares = problem.compute(
        ub.SquaredNorms(), ub.Variance(), ub.SumOfSquares(), memory=memory
    )
    flat = {n: r.abs().square().flatten(1).sum(1) for n, r in rows.items()}
    near(norms, flat, "norms")
    near({"total": norms.total}, {"total": torch.stack(list(flat.values())).sum(0)}, "norms")
    near(variance, {n: (r - r.mean(0)).abs().square().mean(0) for n, r in rows.items()}, "variance")
    near(squares, {n: r.abs().square().sum(0) for n, r in rows.items()}, "sums of squares")


REAL = pytest.mark.parametrize("name", [n for n in CASES if "complex" not in n])


@pytest.mark.parametrize("memory", [None, 1])
@REAL
def test_matrix(name, memory):
    args, problem = made(name)
    expected, G = reference.ggn(*args), problem.ggn(memory=memory)
    v = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    near({"G @ v": G @ v}, {"G @ v": expected @ v}, "product")
    near({"diagonal": G.diag()}, {"diagonal": expected.diagonal()}, "diagonal")
    near({"trace": G.trace()}, {"trace": expected.trace()}, "trace")
    near(
        {"parts": G.diag(per_component=True)},
        {"parts": reference.ggn_diagonals(*args)},
        "diagonals of components",
    )
    values, found = torch.linalg.eigvalsh(expected), G.eigvalsh()
    near({"values": found}, {"values": values[len(values) - len(found) :]}, "eigenvalues")


# ---------------------------------------------------------------- refusals


def test_the_matrix_of_complex_parameters_is_refused():
    args, problem = made("a complex filter")
    for ask in (problem.ggn, lambda: problem.compute(ub.DiagGGN())):
        with pytest.raises(ub.InputError, match=r"'filter' is complex"):
            ask()
    head = problem.ggn(parameters="head.*").diag()
    args[0].filter.requires_grad_(False)
    expected = reference.ggn(*args)
    near({"diagonal": head}, {"diagonal": expected.diagonal()}, "diagonal")


def test_no_parameters_at_all_are_refused():
    problem = ub.Problem(nn.Tanh(), F.mse_loss, (normals(N, C), normals(N, C)))
    for ask in (problem.gradients, problem.ggn, problem.gradient):
        with pytest.raises(ub.InputError, match="no registered parameters"):
            ask()


def test_an_empty_choice_of_parameters_is_refused():
    problem = made("seven samples")[1]
    for ask in (problem.gradients, problem.ggn):
        with pytest.raises(ub.InputError, match="names nothing"):
            ask(parameters=[])


def test_an_empty_block_is_refused():
    problem = made("seven samples")[1]
    with pytest.raises(ub.InputError):
        problem.ggn(blocks=[["0.*"], []])


def test_only_parameters_without_entries():
    problem = made("parameters without entries")[1]
    rows = problem.gradients(parameters=["nothing", "narrow.weight"])
    assert rows.flat().shape == (N, 0)
    norms = problem.compute(ub.SquaredNorms(), parameters="nothing")
    assert torch.equal(norms.total, torch.zeros(N, dtype=torch.float64))


# ---------------------------------------------------------------- narrow types


def rounding_of(dtype: torch.dtype, depth: int) -> float:
    """What is lost in a chain of so many operations, each of which rounds; norms of many entries
    average it out.
    """
    return 4 * math.sqrt(depth) * torch.finfo(dtype).eps


class Plain(nn.Sequential):
    """Layers under autocast, or not."""

    narrow: torch.dtype | None = None

    def forward(self, x):
        with torch.autocast("cpu", self.narrow or torch.bfloat16, enabled=self.narrow is not None):
            return super().forward(x)


def layers(norms):
    more = [nn.LayerNorm(D)] if norms == "layer norm" else [nn.BatchNorm1d(D)]
    return [
        nn.Linear(D, D),
        *more,
        nn.Tanh(),
        nn.Linear(D, D),
        *more[:1],
        nn.Tanh(),
        nn.Linear(D, C),
    ]


def in_two_precisions(dtype, autocast, norms):
    """The same net on the same numbers, narrow and in float64."""
    torch.manual_seed(0)
    x, y = torch.randn(16, D).to(dtype), labels(16)
    narrow, exact = Plain(*layers(norms)).to(dtype), Plain(*layers(norms)).double()
    exact.load_state_dict(
        {k: v.double() if v.is_floating_point() else v for k, v in narrow.state_dict().items()}
    )
    narrow.narrow = autocast
    loss = lambda p, y: F.cross_entropy(p if p.dtype == torch.float64 else p.float(), y)  # noqa: E731
    return ub.Problem(narrow, loss, (x, y)), ub.Problem(exact, loss, (x.double(), y))


PRECISIONS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
    "float16 by autocast": (torch.float32, torch.float16),
}


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("norms", ["layer norm", "batch norm"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_narrow_types_are_as_far_off_as_they_round(precision, norms):
    dtype, autocast = PRECISIONS[precision]
    narrow, exact = in_two_precisions(dtype, autocast, norms)
    bound = rounding_of(autocast or dtype, depth=40)
    for by in ROWS:
        assert apart(narrow.gradients(by=by).flat(), exact.gradients(by=by).flat()) <= bound, by
    for quantity in (ub.SumOfSquares(), ub.Variance(), ub.DiagGGN()):
        assert (
            apart(narrow.compute(quantity).flat(), exact.compute(quantity).flat()) <= 2 * bound
        ), quantity
    assert (
        apart(narrow.compute(ub.SquaredNorms()).total, exact.compute(ub.SquaredNorms()).total)
        <= 2 * bound
    )
    G, expected = narrow.ggn(), exact.ggn()
    v = torch.linspace(-1, 1, G.shape[0], dtype=torch.float64)
    assert apart(G @ v.to(dtype), expected @ v) <= 2 * bound
    top = slice(-5, None)
    assert apart(G.eigvalsh()[top], expected.eigvalsh()[top]) <= 2 * bound


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_net_is_further_off(precision):
    dtype, autocast = PRECISIONS[precision]
    narrow, _ = in_two_precisions(dtype, autocast, "batch norm")
    _, other = in_two_precisions(dtype, autocast, "layer norm")
    assert apart(narrow.gradients().flat(), other.gradients().flat()) > rounding_of(
        autocast or dtype, depth=40
    )


# ---------------------------------------------------------------- planted


def test_a_wrong_row_is_caught():
    args, _ = made("seven samples")
    rows = reference.component(*args)
    near(rows, rows, "rows")
    with pytest.raises(AssertionError, match="off by"):
        near({n: r * (1 + 1e-8) for n, r in rows.items()}, rows, "rows")
