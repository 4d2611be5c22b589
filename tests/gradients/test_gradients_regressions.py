"""Programs that once gave wrong rows or crashed, and planted bugs that have to be seen."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unbatch as ub
from unbatch.autodiff.contractions.batch_norm import PooledRows
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.reference import definitions as reference

N, D, C, T = 5, 6, 3, 4
PROGRAMS = {}


class Net(nn.Module):
    """Parts by name and a forward pass in one function."""

    def __init__(self, run, parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.head = nn.Linear(D, C)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def program(name, *shape, loss=F.cross_entropy, **parts):
    """``parts``: functions without arguments that make a module or a tensor."""

    def register(run):
        PROGRAMS[name] = (run, shape or (N, D), parts, loss)
        return run

    return register


def linear():
    return nn.Linear(D, D)


def norm():
    return nn.BatchNorm1d(D)


def table(*shape):
    return lambda: torch.randn(*shape)


def built(name):
    run, shape, parts, loss = PROGRAMS[name]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        net = Net(run, {k: make() for k, make in parts.items()})
        x, y = torch.randn(*shape), torch.randint(0, C, (N,))
    finally:
        torch.set_default_dtype(before)
    return net, loss, x, y


def check(found, expected, tolerance=1e-10):
    scale = max(float(r.abs().max()) for r in expected.values())
    for name, rows in expected.items():
        error = float((found[name] - rows).abs().max())
        assert error <= tolerance * (float(rows.abs().max()) + 1e-3 * scale), (
            f"{name}: off by {error:.1e}"
        )


@program(
    "a transposed convolution right below batch norm",
    N,
    D,
    3,
    3,
    up=lambda: nn.ConvTranspose2d(D, D, 2),
    norm=lambda: nn.BatchNorm2d(D),
)
def _(net, x):
    return net.head(net.norm(net.up(x)).tanh().mean((2, 3)))


@program(
    "what a batch norm takes is a prediction as well",
    a=linear,
    norm=norm,
    loss=lambda p, y: F.cross_entropy(p[0], y) + p[1].square().sum(),
)
def _(net, x):
    h = net.a(x)
    return net.head(net.norm(h).tanh()), h


@program("one parameter twice in one op", w=table(D))
def _(net, x):
    return net.head(F.layer_norm(torch.addcmul(x, net.w, net.w), (D,), net.w, net.w))


@program(
    "samples added in place to what parameters made, below batch norm",
    b=table(D),
    a=linear,
    norm=norm,
)
def _(net, x):
    h = net.b.expand(len(x), D).clone()
    h += net.a(x).tanh()
    return net.head(net.norm(h).tanh())


@program(
    "an lstm below batch norm", N, T, D, rnn=lambda: nn.LSTM(D, D, batch_first=True), norm=norm
)
def _(net, x):
    return net.head(net.norm(net.rnn(x)[0][:, -1]))


@program("a parameter applied in place to a view", a=linear, w=table(3))
def _(net, x):
    h = net.a(x)
    h[:, 1:4].mul_(net.w)
    return net.head(h.tanh())


@program("halves written into a buffer after centring in place", a=linear)
def _(net, x):
    h = net.a(x).clone()
    h -= h.mean(0)
    z = torch.zeros_like(x)
    z[:, :3], z[:, 3:] = h[:, 3:], h[:, :3]
    return net.head(z.tanh())


@program("a mean subtracted in place", a=linear, c=linear)
def _(net, x):
    h = net.a(x).clone()
    h -= net.c(x).mean(0)
    return net.head(h.tanh())


@program("a weight put together in memory", top=table(2, D), rest=table(D - 2, D))
def _(net, x):
    w = torch.zeros(D, D, dtype=x.dtype)
    w[:2], w[2:] = net.top, net.rest
    return net.head((x @ w).tanh())


@program("a class token written into a buffer", token=table(D))
def _(net, x):
    h = torch.zeros(len(x), 3, D, dtype=x.dtype)
    h[:, 0], h[:, 1:] = net.token, x[:, None]
    return net.head(h.tanh().mean(1))


@program("prototypes encoded beside the batch", prototypes=table(C, D), w=table(D, D))
def _(net, x):
    z = torch.cat([x, net.prototypes]) @ net.w
    return z[: len(x)].tanh() @ z[len(x) :].tanh().T


@program("two tokens joined to the batch at once", one=table(1, 1, D), two=table(1, 2, D))
def _(net, x):
    tokens = [t.expand(len(x), -1, -1) for t in (net.one, net.two)]
    return net.head(torch.cat([*tokens, x[:, None]], 1).tanh().mean(1))


@program("complex numbers", w=lambda: torch.randn(D, dtype=torch.complex128))
def _(net, x):
    return net.head((torch.fft.fft(x.to(torch.float64)) * net.w).abs())


@program("a real parameter on complex numbers", w=table(D))
def _(net, x):
    return net.head((torch.fft.fft(x) * net.w).abs())


def other_order():
    return torch.randn(D, 2, 2, 2).contiguous(memory_format=torch.channels_last)


@program(
    "a parameter that lies in memory in another order", w=other_order, mix=lambda: nn.Linear(8, D)
)
def _(net, x):
    return net.head(net.mix(x @ net.w.permute(0, 2, 3, 1).reshape(D, 8)).tanh())


@program(
    "a loss that writes to the predictions",
    loss=lambda p, y: F.cross_entropy(p.mul_(2), y),
    a=linear,
)
def _(net, x):
    return net.head(net.a(x).tanh())


@program("half of the features through batch norm", a=linear, norm=lambda: nn.BatchNorm1d(4))
def _(net, x):
    a, b = net.a(x).split([2, 4], 1)
    return net.head(torch.cat([a, net.norm(b)], 1).tanh())


@program("batch norm of the flipped batch", a=linear, norm=norm)
def _(net, x):
    return net.head(net.norm(net.a(x.flip(0))).flip(0).tanh())


@program("a view of a function of a parameter", b=table(D))
def _(net, x):
    return net.head(net.b.tanh().expand(len(x), D) * x)


@program("a bias that is broadcast twice", b=table(1, D), w=table(D, D), norm=norm)
def _(net, x):
    return net.head(net.norm(torch.addmm(net.b, x, net.w)).tanh())


@program("a running average read after it was written", a=linear, norm=norm)
def _(net, x):
    return net.head(net.norm(net.a(x)).tanh() * net.norm.running_var)


@program("two parameters added before they meet samples", b=table(D), c=table(D), w=table(D, D))
def _(net, x):
    return net.head((x @ net.w + (net.b + net.c)).tanh())


@pytest.mark.parametrize("name", [n for n in PROGRAMS if "writes to the predictions" not in n])
def test_rows_are_those_of_the_definition(name):
    net, loss, x, y = built(name)
    rows = ub.Problem(net, loss, (x, y)).gradients()
    check(rows, reference.component(net, loss, x, y))


@pytest.mark.parametrize("name", PROGRAMS)
def test_rows_sum_to_the_gradient(name):
    net, loss, x, y = built(name)
    problem = ub.Problem(net, loss, (x, y))
    gradient = problem.gradient()
    check({n: r.sum(0) for n, r in problem.gradients().items()}, gradient)
    check({n: r.sum(0) for n, r in problem.gradients(memory=1).items()}, gradient)


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_asked_about_rows_follows_from_them(name):
    net, loss, x, y = built(name)
    problem = ub.Problem(net, loss, (x, y))
    rows = problem.gradients()
    for memory in (None, 1):
        norms, squares, dots = problem.compute(
            ub.SquaredNorms(), ub.SumOfSquares(), ub.Dots(), memory=memory
        )
        check(norms, {n: r.abs().square().flatten(1).sum(1) for n, r in rows.items()})
        check(squares, {n: r.abs().square().sum(0) for n, r in rows.items()})
        flat = rows.flat()
        check({"dots": dots}, {"dots": (flat @ flat.mH).real})


def test_small_gradients_count_in_float32():
    """A branch that weighs 1e-5, with a token written in place: what is lost there is 1e-5 of the
    largest gradient.
    """

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.full((D,), 1e-5))
            self.branch, self.head = nn.Linear(D, D), nn.Linear(D, C)

        def forward(self, x):
            z = torch.zeros(len(x), 3, D)
            z[:, 1:] = x[:, None]
            return self.head(x + self.scale * self.branch(z).tanh().sum(1))

    torch.manual_seed(0)
    problem = ub.Problem(
        Branch(), nn.CrossEntropyLoss(), (torch.randn(N, D), torch.randint(0, C, (N,)))
    )
    rows, gradient = problem.gradients(), problem.gradient()
    for name, g in gradient.items():
        assert torch.allclose(rows[name].sum(0), g, rtol=1e-4, atol=1e-5 * float(g.abs().max())), (
            name
        )


def test_results_of_two_parameters_do_not_share_memory():
    rows = ub.Problem(*_problem("two parameters added before they meet samples")).gradients()
    rows["b"].add_(1)
    assert not torch.equal(rows["b"], rows["c"])


def test_a_parameter_is_not_touched_by_asking():
    net, loss, x, y = built("a view of a function of a parameter")
    value = loss(net(x), y)
    ub.Problem(net, loss, (x, y)).gradients()
    value.backward()  # raises if a version went up


def test_inference_mode_around_a_question_changes_nothing():
    problem = ub.Problem(*_problem("one parameter twice in one op"))
    expected = problem.gradients()
    with torch.inference_mode():
        check(problem.gradients(), expected)


ASKED = {
    "gradient": lambda p, G: p.gradient()["1.weight"],
    "rows": lambda p, G: p.gradients().flat(),
    "crosstalk": lambda p, G: p.crosstalk().matrix,
    "predictions": lambda p, G: p.predictions(),
    "product": lambda p, G: G @ torch.ones(G.shape[0], dtype=G.dtype),
    "diagonal": lambda p, G: G.diag(),
    "eigenvalues": lambda p, G: G.eigvalsh(),
    "solution": lambda p, G: G.solve(torch.ones(G.shape[0], dtype=G.dtype), damping=0.1),
    "curvatures along eigenvectors": lambda p, G: G.directions(2).curvatures,
    "Newton step": lambda p, G: G.newton_step(0.1, 2)["1.weight"],
    "entries estimated": lambda p, G: G.estimate_diag(4, control=p.ggn(by="frozen")).values,
    "eigenpairs by products": lambda p, G: ub.spectra.eigh(G, 2).values,
}


def mixing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    return ub.Problem(net, F.cross_entropy, (torch.randn(6, 4).double(), torch.arange(6) % 3))


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("made", ["inside", "outside"])
def test_derivatives_in_inference_mode_are_those_outside(name, made):
    problem, other = mixing(), mixing()
    expected = ASKED[name](problem, problem.ggn())
    G = other.ggn()
    with torch.inference_mode():
        found = ASKED[name](other, G if made == "outside" else other.ggn())
        assert other.structure.statuses == problem.structure.statuses
        assert other.verify()
    torch.testing.assert_close(found.clone(), expected, rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1e-3


def _problem(name):
    net, loss, x, y = built(name)
    return net, loss, (x, y)


# A plan is not believed before it has been tried: a contraction that is wrong is noticed, and done
# without.


@pytest.mark.parametrize("method", ["rows", "weighted_sum"])
def test_a_wrong_contraction_is_noticed(monkeypatch, method):
    net, loss, x, y = built("a mean subtracted in place")
    right = getattr(Linear, method)
    monkeypatch.setattr(Linear, method, lambda self, *args: right(self, *args).mul_(2))
    problem = ub.Problem(net, loss, (x, y))
    assert {site.way for site in problem.plan().sites} == {"model"}
    check(problem.gradients(), reference.component(net, loss, x, y))


def test_a_wrong_norm_is_noticed(monkeypatch):
    net, loss, x, y = built("an lstm below batch norm")
    monkeypatch.setattr(
        PooledRows, "squared_norms", lambda self, where: self.g.new_ones(where.stop - where.start)
    )
    problem = ub.Problem(net, loss, (x, y))
    rows = problem.gradients()
    check(
        problem.compute(ub.SquaredNorms()),
        {n: r.square().flatten(1).sum(1) for n, r in rows.items()},
    )
