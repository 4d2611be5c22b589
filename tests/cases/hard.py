"""Problems at the edges of what numbers can be, of known derivatives: all are compared with the
definitions in float64.

A case is built afresh for every test, and gives a model, a loss, inputs and targets. What is not
finite is elsewhere (``tests/gradients/test_not_finite.py``).
"""

import itertools
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

N, D, C = 4, 5, 3

Case = tuple[nn.Module, Callable, Any, Any]
CASES: dict[str, Callable[[], Case]] = {}


class Net(nn.Module):
    """Parts by name, and a forward pass in one function."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def case(name):
    def register(make):
        def build():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                model, loss, X, y = make()
                return model.double(), loss, X, y

        assert name not in CASES, name
        CASES[name] = build
        return make

    return register


def mlp(*shape):
    sizes = shape or (D, D, C)
    layers = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def reals(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def labels(count=N, classes=C):
    return torch.randint(classes, (count,))


def squared(p, y):
    return (p - y).square().sum()


# ---------------------------------------------------------------- scales

for power in (-30, -15, -8, 8, 15, 30):

    @case(f"inputs times 1e{power}")
    def _(power=power):
        return nn.Linear(D, C), squared, reals(N, D) * 10.0**power, reals(N, C)

    @case(f"targets times 1e{power}")
    def _(power=power):
        return mlp(), F.mse_loss, reals(N, D), reals(N, C) * 10.0**power

    @case(f"loss times 1e{power}")
    def _(power=power):
        return mlp(), lambda p, y: 10.0**power * F.cross_entropy(p, y), reals(N, D), labels()

    @case(f"one weight times 1e{power}")
    def _(power=power):
        model = mlp()
        with torch.no_grad():
            model[2].weight[0].mul_(10.0**power)
        return model, lambda p, y: F.smooth_l1_loss(p, y, beta=1e40), reals(N, D), reals(N, C)

    @case(f"one sample weighs 1e{power}")
    def _(power=power):
        weights = torch.ones(N, 1, dtype=torch.float64)
        weights[1] = 10.0**power

        def loss(p, y):
            return (weights * (p - y).square()).sum()

        return mlp(), loss, reals(N, D), reals(N, C)


@case("one steep sample of another form")
def _():
    def loss(p, y):
        return (y * 1e14 * p.square().sum(1) + (1 - y) * p.logsumexp(1)).sum()

    return mlp(), loss, reals(N, D), torch.tensor([0.0, 1.0, 0.0, 0.0]).double()


# ---------------------------------------------------------------- slopes and curvatures that vanish


@case("targets equal to predictions")
def _():
    model, X = mlp(), reals(N, D)
    return model, squared, X, model(X).detach()


@case("dead units")
def _():
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return model, F.cross_entropy, reals(N, D), labels()


@case("weights of zeros")
def _():
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model, F.cross_entropy, reals(N, D), labels()


@case("inputs of zeros")
def _():
    return mlp(), F.cross_entropy, torch.zeros(N, D).double(), labels()


@case("huge logits")
def _():
    return Net(lambda self, x: 1e3 * self.a(x), a=mlp()), F.cross_entropy, reals(N, D), labels()


@case("one sample with huge logits")
def _():
    def run(self, x):
        return self.a(x) * torch.tensor([1e4, 1.0, 1.0, 1.0]).double()[:, None]

    return Net(run, a=mlp()), F.cross_entropy, reals(N, D), labels()


@case("saturated sigmoids")
def _():
    loss = F.binary_cross_entropy_with_logits
    return Net(lambda self, x: 300 * self.a(x), a=mlp()), loss, reals(N, D), torch.ones(N, C)


@case("far out of a Huber loss, but for one sample")
def _():
    y = torch.full((N, C), 1e6).double()
    y[1] = 0
    return mlp(), lambda p, y: F.huber_loss(p, y, delta=5.0), reals(N, D), y


@case("absolute errors beside squared ones")
def _():
    def loss(p, y):
        return (p[:, 0] - y[:, 0]).abs().sum() * 1e13 + (p[:, 1:] - y[:, 1:]).square().sum()

    return mlp(), loss, reals(N, D), reals(N, C)


# ---------------------------------------------------------------- losses


@case("label smoothing")
def _():
    loss = nn.CrossEntropyLoss(label_smoothing=0.3)
    return mlp(), loss, reals(N, D), labels()


@case("classes that weigh nothing")
def _():
    weight = torch.tensor([0.0, 1.0, 2.0]).double()
    y = torch.tensor([0, 1, 2, 0])
    return mlp(), lambda p, y: F.cross_entropy(p, y, weight=weight), reals(N, D), y


@case("all labels but one ignored")
def _():
    y = torch.full((N,), -100)
    y[2] = 1
    return mlp(), F.cross_entropy, reals(N, D), y


@case("all labels ignored, summed")
def _():
    y = torch.full((N,), -100)
    return mlp(), lambda p, y: F.cross_entropy(p, y, reduction="sum"), reals(N, D), y


@case("one class")
def _():
    return mlp(D, D, 1), F.cross_entropy, reals(N, D), torch.zeros(N).long()


@case("soft targets that sum to two")
def _():
    y = 2 * reals(N, C).softmax(1)
    return mlp(), lambda p, y: -(y * p.log_softmax(1)).sum(), reals(N, D), y


@case("poisson with huge rates")
def _():
    def loss(p, y):
        return F.poisson_nll_loss(20 * p, y, reduction="sum")

    return mlp(), loss, reals(N, D), torch.ones(N, C).double()


@case("a mask of minus infinity on logits")
def _():
    mask = torch.zeros(C).double()
    mask[2] = -torch.inf
    y = labels(N, 2)
    return mlp(), lambda p, y: F.cross_entropy(p + mask, y), reals(N, D), y


@case("a negative loss")
def _():
    return mlp(), lambda p, y: -squared(p, y), reals(N, D), reals(N, C)


@case("a loss with both signs")
def _():
    def loss(p, y):
        return (y[:, 0] * p[:, 0] ** 2 - p[:, 1] ** 2 + p[:, 2]).sum()

    return mlp(), loss, reals(N, D), reals(N, C)


@case("powers of four")
def _():
    return mlp(), lambda p, y: (p - y).pow(4).sum(), reals(N, D), reals(N, C)


# ---------------------------------------------------------------- sizes


@case("one sample")
def _():
    return mlp(), F.cross_entropy, reals(1, D), labels(1)


@case("one entry everywhere")
def _():
    return nn.Linear(1, 1), squared, reals(N, 1), reals(N, 1)


@case("as many samples as features and classes")
def _():
    return mlp(3, 3, 3), F.cross_entropy, reals(3, 3), labels(3)


@case("a parameter without entries")
def _():
    def run(self, x):
        return self.a(x) + self.empty.sum()

    empty = torch.zeros(0, D)
    return Net(run, a=mlp(), empty=empty), F.cross_entropy, reals(N, D), labels()


@case("an inner dimension of no features")
def _():
    def run(self, x):
        return F.linear(F.linear(x, self.u), self.v) + self.c(x)

    model = Net(run, u=torch.zeros(0, D), v=torch.zeros(C, 0), c=nn.Linear(D, C))
    return model, F.cross_entropy, reals(N, D), labels()


@case("a number for a parameter")
def _():
    scale = torch.tensor(1.3)
    return (
        Net(lambda s, x: s.scale * s.a(x), a=mlp(), scale=scale),
        squared,
        reals(N, D),
        reals(N, C),
    )


# ---------------------------------------------------------------- parameters


@case("a parameter in two names")
def _():
    a, b = nn.Linear(D, D), nn.Linear(D, D)
    b.weight = a.weight
    return (
        Net(lambda s, x: s.c(s.b(s.a(x).tanh())), a=a, b=b, c=nn.Linear(D, C)),
        squared,
        reals(N, D),
        reals(N, C),
    )


@case("a layer used three times")
def _():
    def run(self, x):
        return self.b(self.a(self.a(self.a(x).tanh()).tanh()))

    model = Net(run, a=nn.Linear(D, D), b=nn.Linear(D, C))
    return model, F.cross_entropy, reals(N, D), labels()


@case("a layer used on both factors")
def _():
    model = Net(lambda self, x: self.a(x) * self.a(x.sin()), a=nn.Linear(D, C))
    return model, squared, reals(N, D), reals(N, C)


@case("a weight and its transpose")
def _():
    model = Net(lambda self, x: (x @ self.w).tanh() @ self.w.T, w=torch.randn(D, D))
    return model, squared, reals(N, D), reals(N, D)


@case("an unused parameter")
def _():
    model = Net(lambda self, x: self.a(x), a=mlp(), w=torch.randn(3))
    return model, F.cross_entropy, reals(N, D), labels()


@case("a parameter times zero")
def _():
    model = Net(lambda self, x: self.a(x) + 0 * self.w, a=mlp(), w=torch.randn(C))
    return model, F.cross_entropy, reals(N, D), labels()


@case("a parameter that is not contiguous")
def _():
    layer = nn.Linear(D, C)
    layer.weight = nn.Parameter(torch.randn(2 * D, C).double().T[:, ::2])
    return layer, F.cross_entropy, reals(N, D), labels()


@case("a parameter with two transposed axes")
def _():
    layer = nn.Conv2d(2, 3, 2)
    layer.weight = nn.Parameter(torch.randn(2, 2, 2, 3).double().permute(3, 0, 1, 2))
    model = nn.Sequential(nn.Unflatten(1, (2, 3, 3)), layer, nn.Flatten(), nn.Linear(12, C))
    return model, F.cross_entropy, reals(N, 18), labels()


@case("an expanded parameter")
def _():
    def run(self, x):
        return F.linear(x, self.w.expand(C, D))

    return Net(run, w=torch.randn(1, D)), squared, reals(N, D), reals(N, C)


@case("a bias along the samples' axis")
def _():
    def run(self, x):
        return self.a(x) + self.w[:, None]

    return Net(run, a=mlp(), w=torch.randn(N)), squared, reals(N, D), reals(N, C)


@case("weight norm")
def _():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(D, D)), nn.Tanh(), nn.Linear(D, C))
    return model, F.cross_entropy, reals(N, D), labels()


@case("spectral norm in eval mode")
def _():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, D)), nn.Linear(D, C))
    return model.eval(), F.cross_entropy, reals(N, D), labels()


@case("an orthogonal weight")
def _():
    layer = parametrizations.orthogonal(nn.Linear(D, D).double())
    return nn.Sequential(layer, nn.Linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a weight of low rank")
def _():
    model = Net(lambda self, x: x @ (self.u @ self.v), u=torch.randn(D, 2), v=torch.randn(2, C))
    return model, squared, reals(N, D), reals(N, C)


# ---------------------------------------------------------------- computations


@case("checkpointed")
def _():
    def run(self, x):
        return self.b(checkpoint(self.a, x, use_reentrant=False))

    model = Net(run, a=nn.Sequential(nn.Linear(D, D), nn.Tanh()), b=nn.Linear(D, C))
    return model, F.cross_entropy, reals(N, D), labels()


@case("integers for inputs")
def _():
    model = Net(lambda self, x: self.a(x.double() / 7), a=mlp())
    return model, F.cross_entropy, torch.randint(9, (N, D)), labels()


@case("booleans for inputs")
def _():
    model = Net(lambda self, x: self.a(torch.where(x, self.w, 0.5)), a=mlp(), w=torch.randn(D))
    return model, F.cross_entropy, torch.rand(N, D) > 0.5, labels()


@case("tokens that occur again, and one that never does")
def _():
    model = Net(lambda s, x: s.b(s.a(x).mean(1)), a=nn.Embedding(5, D), b=nn.Linear(D, C))
    return (
        model,
        F.cross_entropy,
        torch.tensor([[0, 0, 1], [1, 1, 1], [2, 0, 2], [3, 3, 0]]),
        labels(),
    )


@case("attention with positions that are masked out")
def _():
    def run(self, x):
        h = self.a(x[..., None])
        mask = torch.zeros(D, D).double().masked_fill(torch.ones(D, D).triu(1) > 0, -torch.inf)
        weights = (h @ h.mT + mask).softmax(-1)
        return self.b((weights @ h).mean(1))

    return Net(run, a=nn.Linear(1, 4), b=nn.Linear(4, C)), F.cross_entropy, reals(N, D), labels()


@case("dropout that drops almost all")
def _():
    model = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.9), nn.Linear(D, C))
    return model.eval(), F.cross_entropy, reals(N, D), labels()


@case("a complex layer inside")
def _():
    def run(self, x):
        return torch.fft.irfft(torch.fft.rfft(self.a(x)) * torch.view_as_complex(self.w), n=D)

    return Net(run, a=nn.Linear(D, D), w=torch.randn(3, 2)), squared, reals(N, D), reals(N, D)


@case("rows sorted, and put back")
def _():
    def run(self, x):
        order = x[:, 0].argsort()
        return self.b(x[order]).tanh()[order.argsort()]

    return Net(run, b=nn.Linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("rows sorted, and copied back")
def _():
    def run(self, x):
        order = x[:, 0].argsort(descending=True)
        h = self.b(x[order]).tanh()
        return torch.zeros_like(h).index_copy(0, order, h)

    return Net(run, b=nn.Linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("rows sorted, and added back")
def _():
    def run(self, x):
        order = x[:, 0].argsort()
        h = self.b(x[order]).tanh()
        return torch.zeros_like(h).index_add(0, order, h)

    return Net(run, b=nn.Linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("rows turned round, and back")
def _():
    def run(self, x):
        return self.b(x.flip(0)).tanh().flip(0)

    return Net(run, b=nn.Linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("sequences packed by length")
def _():
    lengths = torch.tensor([1, 3, 2, 3])

    def run(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(
            x.view(len(x), 3, 2), lengths[: len(x)], batch_first=True, enforce_sorted=False
        )
        return self.b(self.a(packed)[1][0])

    return (
        Net(run, a=nn.RNN(2, 4, batch_first=True), b=nn.Linear(4, C)),
        squared,
        reals(N, 6),
        reals(N, C),
    )


@case("predictions of one axis")
def _():
    return Net(lambda s, x: s.a(x)[:, 0], a=mlp(D, D, 1)), squared, reals(N, D), reals(N)


@case("two predictions, one of them steep")
def _():
    def loss(p, y):
        return squared(p[0], y) + 1e12 * p[1].sum()

    model = Net(lambda s, x: (s.a(x), s.b(x)), a=mlp(), b=nn.Linear(D, 1))
    return model, loss, reals(N, D), reals(N, C)


@case("two branches of very different size")
def _():
    model = Net(lambda s, x: 1e-12 * s.a(x) + 1e6 * s.b(x), a=mlp(), b=nn.Linear(D, C))
    return model, squared, reals(N, D), reals(N, C)
