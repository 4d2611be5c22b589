"""Programs by what their models are made of: layouts, wrappers, layers and outputs of all kinds.

A case is built afresh for every test, and gives a model, a loss, inputs, targets and keyword
arguments of ``Problem``; models are called in float64.
"""

from __future__ import annotations

import collections
import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

N, T, D, C, WORDS = 5, 4, 6, 3, 7

Case = tuple[nn.Module, Callable, Any, Any, dict]
CASES: dict[str, Callable[[], Case]] = {}


class Net(nn.Module):
    """Parts by name, and a forward pass in one function."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.run = run

    def forward(self, *args):
        return self.run(self, *args)


def case(name):
    def register(make):
        def build():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                model, *rest = make()
                loss, X, y, *options = rest
                return model, loss, X, y, dict(*options)

        assert name not in CASES, name
        CASES[name] = build
        return make

    return register


def reals(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def labels(count=N, classes=C):
    return torch.randint(classes, (count,))


def linear(i, o, **options):
    return nn.Linear(i, o, **options).double()


def mlp(i=D, o=C):
    return nn.Sequential(nn.Linear(i, D), nn.Tanh(), nn.Linear(D, o)).double()


def words(*shape):
    return torch.randint(WORDS, shape)


# ---------------------------------------------------------------- embeddings and sparse tensors


@case("an embedding with sparse gradients")
def _():
    table = nn.Embedding(WORDS, D, sparse=True).double()
    return (
        nn.Sequential(table, nn.Flatten(), linear(T * D, C)),
        F.cross_entropy,
        words(N, T),
        labels(),
    )


@case("two tables with sparse gradients, one of them tied")
def _():
    def run(net, x):
        return F.linear(net.a(x).mean(1) + net.b(x).sum(1).tanh(), net.a.weight)

    tables = {name: nn.Embedding(WORDS, D, sparse=True).double() for name in "ab"}
    return Net(run, **tables), F.cross_entropy, words(N, T), labels(classes=WORDS)


@case("bags of words with sparse gradients")
def _():
    table = nn.EmbeddingBag(WORDS, D, sparse=True).double()
    return nn.Sequential(table, linear(D, C)), F.cross_entropy, words(N, T), labels()


@case("bags of words whose places are data")
def _():
    table = nn.EmbeddingBag(WORDS, D, sparse=True).double()
    net = Net(lambda net, x, o: net.out(net.table(x, o)), table=table, out=linear(D, C))
    X = words(12), torch.tensor([0, 3, 4, 8, 10])
    return net, F.cross_entropy, X, labels(), {"in_dims": ((None, 0), 0)}


@case("a functional embedding with sparse gradients")
def _():
    def run(net, x):
        return net.out(F.embedding(x, net.table, sparse=True).mean(1))

    return Net(run, table=reals(WORDS, D), out=linear(D, C)), F.cross_entropy, words(N, T), labels()


@case("a sparse adjacency in coordinates, as input")
def _():
    def run(net, x, adjacency):
        return torch.sparse.mm(adjacency, net.out(x))

    return (
        Net(run, out=linear(D, C)),
        F.cross_entropy,
        (reals(N, D), torch.eye(N).double().to_sparse()),
        labels(),
        {"in_dims": ((0, None), 0)},
    )


@case("a sparse adjacency by rows, as a buffer")
def _():
    def run(net, x):
        return net.adjacency @ net.out(x)

    net = Net(run, out=linear(D, C))
    net.register_buffer("adjacency", torch.eye(N).double().to_sparse_csr())
    return net, F.cross_entropy, reals(N, D), labels()


@case("a sparse adjacency that joins samples")
def _():
    def run(net, x):
        return torch.sparse.mm(net.adjacency, net.out(x))

    net = Net(run, out=linear(D, C))
    net.register_buffer("adjacency", (reals(N, N) > 0).double().to_sparse())
    return net, F.cross_entropy, reals(N, D), labels()


@case("a sparse weight")
def _():
    def run(net, x):
        return net.out(torch.sparse.mm(net.mask, x.T).T)

    net = Net(run, out=linear(D, C))
    net.register_buffer("mask", (reals(D, D) > 0).double().to_sparse())
    return net, F.cross_entropy, reals(N, D), labels()


@case("a sparse matrix made of the weight")
def _():
    def run(net, x):
        return net.out((torch.sparse.mm(net.w.to_sparse(), x.T)).T)

    return Net(run, w=reals(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a sparse matrix of entries that are parameters")
def _():
    where = torch.tensor([[0, 1, 2, 4], [1, 0, 3, 5]])

    def run(net, x):
        w = torch.sparse_coo_tensor(where, net.entries, (D, D))
        return net.out(torch.sparse.mm(w, x.T).T)

    return Net(run, entries=reals(4), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("sparse samples")
def _():
    def run(net, x):
        return net.out(x.to_dense())

    x = (reals(N, D).relu()).to_sparse()
    return Net(run, out=linear(D, C)), F.cross_entropy, x, labels()


@case("a softmax over sparse entries")
def _():
    def run(net, x):
        mask = net.mask.to_sparse()
        return torch.sparse.softmax(mask, 1).to_dense() @ net.out(x)

    net = Net(run, out=linear(D, C))
    net.register_buffer("mask", torch.eye(N).double())
    return net, F.cross_entropy, reals(N, D), labels()


@case("predictions that are sparse")
def _():
    def run(net, x):
        return net.out(x).relu().to_sparse()

    return Net(run, out=linear(D, C)), lambda p: p.to_dense().square().mean(), reals(N, D), None


# ---------------------------------------------------------------- nested tensors


def nested(layout):
    rows = [reals(length, D) for length in (3, 1, 4, 2, 2)]
    return torch.nested.nested_tensor(rows, layout=layout)


@case("a jagged input")
def _():
    def run(net, x):
        return net.out(x.to_padded_tensor(0.0).sum(1))

    return Net(run, out=linear(D, C)), F.cross_entropy, nested(torch.jagged), labels()


@case("a nested input")
def _():
    def run(net, x):
        return net.out(x.to_padded_tensor(0.0).sum(1))

    return Net(run, out=linear(D, C)), F.cross_entropy, nested(torch.strided), labels()


@case("a jagged tensor inside")
def _():
    lengths = torch.tensor([0, 3, 4, 8, 10, 12])

    def run(net, x):
        rows = torch.nested.nested_tensor_from_jagged(net.inner(x).flatten(0, 1)[:12], lengths)
        return net.out(rows.to_padded_tensor(0.0).sum(1))

    return Net(run, inner=linear(D, D), out=linear(D, C)), F.cross_entropy, reals(N, T, D), labels()


@case("a layer on the rows of a jagged tensor")
def _():
    def run(net, x):
        rows = torch.nested.as_nested_tensor(
            [row[: i % T + 1] for i, row in enumerate(x)], layout=torch.jagged
        )
        return net.out(torch.stack([row.mean(0) for row in net.inner(rows).unbind()]))

    return Net(run, inner=linear(D, D), out=linear(D, C)), F.cross_entropy, reals(N, T, D), labels()


@case("a nested tensor inside")
def _():
    def run(net, x):
        rows = torch.nested.as_nested_tensor(
            [row[: i % T + 1] for i, row in enumerate(net.inner(x))]
        )
        return net.out(rows.to_padded_tensor(0.0).sum(1))

    return Net(run, inner=linear(D, D), out=linear(D, C)), F.cross_entropy, reals(N, T, D), labels()


@case("attention with a padding mask, which is nested in eval mode")
def _():
    layer = nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).double().eval()
    mask = torch.arange(T)[None] >= torch.tensor([4, 1, 3, 4, 2])[:, None]

    def run(net, x, mask):
        return net.out(net.encoder(x, src_key_padding_mask=mask).sum(1))

    X = reals(N, T, D), mask
    return Net(run, encoder=encoder, out=linear(D, C)), F.cross_entropy, X, labels()


# ---------------------------------------------------------------- scripted, traced, compiled


@case("a scripted model")
def _():
    return torch.jit.script(mlp()), F.cross_entropy, reals(N, D), labels()


@case("a scripted model that has run")
def _():
    net, X, y = torch.jit.script(mlp()), reals(N, D), labels()
    for _ in range(3):
        F.cross_entropy(net(X), y).backward()
    net.zero_grad()
    return net, F.cross_entropy, X, y


@case("a traced model")
def _():
    X = reals(N, D)
    return torch.jit.trace(mlp(), X), F.cross_entropy, X, labels()


@case("a scripted part")
def _():
    return (
        nn.Sequential(torch.jit.script(mlp()), linear(C, C)),
        F.cross_entropy,
        reals(N, D),
        labels(),
    )


@case("a traced part that has run")
def _():
    X, y = reals(N, D), labels()
    net = nn.Sequential(torch.jit.trace(mlp(), X), linear(C, C))
    for _ in range(3):
        F.cross_entropy(net(X), y).backward()
    net.zero_grad()
    return net, F.cross_entropy, X, y


@torch.jit.script
def scripted_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * x * x * x)))


@case("a scripted function")
def _():
    def run(net, x):
        return net.b(scripted_gelu(net.a(x)))

    return Net(run, a=linear(D, D), b=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a scripted loss")
def _():
    @torch.jit.script
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(p, y)

    return mlp(), loss, reals(N, D), labels()


@case("a frozen scripted model")
def _():
    net = torch.jit.freeze(torch.jit.script(mlp().eval()))
    return net, F.cross_entropy, reals(N, D), labels()


@case("a compiled model")
def _():
    return torch.compile(mlp(), backend="eager"), F.cross_entropy, reals(N, D), labels()


@case("a compiled part")
def _():
    part = torch.compile(mlp(), backend="eager")
    return nn.Sequential(part, linear(C, C)), F.cross_entropy, reals(N, D), labels()


@case("a compiled function")
def _():
    @torch.compile(backend="eager")
    def gelu(x):
        return F.gelu(x) * 2

    def run(net, x):
        return net.b(gelu(net.a(x)))

    return Net(run, a=linear(D, D), b=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a model compiled in place")
def _():
    net = mlp()
    net.compile(backend="eager")
    return net, F.cross_entropy, reals(N, D), labels()


@case("a compiled loss")
def _():
    loss = torch.compile(lambda p, y: F.cross_entropy(p, y), backend="eager")
    return mlp(), loss, reals(N, D), labels()


@case("a graph module")
def _():
    return torch.fx.symbolic_trace(mlp()), F.cross_entropy, reals(N, D), labels()


@case("an exported program")
def _():
    X = reals(N, D)
    return torch.export.export(mlp(), (X,)).module(), F.cross_entropy, X, labels()


# ---------------------------------------------------------------- outputs


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None
    name: str = "output"


@case("a dataclass that the loss opens")
def _():
    def run(net, x):
        return Output(net.out(x))

    return Net(run, out=mlp()), lambda o, y: F.cross_entropy(o.logits, y), reals(N, D), labels()


@dataclasses.dataclass
class Registered:
    logits: Tensor
    hidden: Tensor


torch.utils._pytree.register_dataclass(Registered)


@case("a registered dataclass")
def _():
    def run(net, x):
        h = net.inner(x).tanh()
        return Registered(net.out(h), h)

    def loss(o, y):
        return F.cross_entropy(o.logits, y) + o.hidden.square().mean()

    return Net(run, inner=linear(D, D), out=linear(D, C)), loss, reals(N, D), labels()


@dataclasses.dataclass
class WithLoss:
    loss: Tensor
    logits: Tensor


@dataclasses.dataclass(frozen=True)
class Both:
    first: Output
    others: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        return self.first.logits + self.others["second"]


@case("a frozen dataclass with another in it, and a property")
def _():
    def run(net, x):
        return Both(Output(net.a(x)), {"second": net.b(x)})

    net = Net(run, a=mlp(), b=mlp())
    return net, lambda o, y: F.cross_entropy(o.total, y), reals(N, D), labels()


@case("a dataclass with the model's own loss")
def _():
    def run(net, x, y):
        logits = net.out(x)
        return WithLoss(F.cross_entropy(logits, y), logits)

    return Net(run, out=mlp()), None, (reals(N, D), labels()), None


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


@case("a named tuple")
def _():
    def run(net, x):
        h = net.inner(x).tanh()
        return Pair(net.out(h), h)

    def loss(o, y):
        return F.cross_entropy(o.logits, y) + o.hidden.square().mean()

    return Net(run, inner=linear(D, D), out=linear(D, C)), loss, reals(N, D), labels()


@case("a dict with strings and None")
def _():
    def run(net, x):
        return {"logits": net.out(x), "name": "net", "cache": None, "count": 3}

    return Net(run, out=mlp()), lambda o, y: F.cross_entropy(o["logits"], y), reals(N, D), labels()


@case("a plain object with a tensor")
def _():
    class Box:
        def __init__(self, logits):
            self.logits = logits

    def run(net, x):
        return Box(net.out(x))

    return Net(run, out=mlp()), lambda o, y: F.cross_entropy(o.logits, y), reals(N, D), labels()


@case("a namespace")
def _():
    import types

    def run(net, x):
        return types.SimpleNamespace(logits=net.out(x))

    return Net(run, out=mlp()), lambda o, y: F.cross_entropy(o.logits, y), reals(N, D), labels()


@case("an ordered dict and a default dict")
def _():
    def run(net, x):
        out = collections.defaultdict(list)
        out["z"].append(net.out(x))
        return collections.OrderedDict(all=out)

    def loss(o, y):
        return F.cross_entropy(o["all"]["z"][0], y)

    return Net(run, out=mlp()), loss, reals(N, D), labels()


@case("nothing")
def _():
    def run(net, x):
        net.out(x)

    return Net(run, out=mlp()), lambda o, y: y.double().mean(), reals(N, D), labels()


@case("a word")
def _():
    def run(net, x):
        net.out(x)
        return "done"

    return Net(run, out=mlp()), lambda o, y: y.double().mean(), reals(N, D), labels()


@case("nothing, and a loss that reads what the model keeps")
def _():
    net = Net(lambda net, x: setattr(net, "kept", net.out(x)), out=mlp())
    return net, lambda o, y: F.cross_entropy(net.kept, y), reals(N, D), labels()


@case("a distribution")
def _():
    def run(net, x):
        mean, scale = net.out(x).chunk(2, 1)
        return torch.distributions.Normal(mean, F.softplus(scale))

    def loss(o, y):
        return -o.log_prob(y).mean()

    return Net(run, out=mlp(D, 2)), loss, reals(N, D), reals(N, 1)


@case("an output of transformers")
def _():
    from transformers.modeling_outputs import SequenceClassifierOutput

    def run(net, x):
        return SequenceClassifierOutput(logits=net.out(x))

    return Net(run, out=mlp()), lambda o, y: F.cross_entropy(o.logits, y), reals(N, D), labels()


@case("an output of transformers with its own loss")
def _():
    from transformers.modeling_outputs import SequenceClassifierOutput

    def run(net, x, y):
        logits = net.out(x)
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, y), logits=logits)

    return Net(run, out=mlp()), None, (reals(N, D), labels()), None


# ---------------------------------------------------------------- derivatives in the forward pass


@case("a jvp inside")
def _():
    def run(net, x):
        value, tangent = torch.func.jvp(net.inner, (x,), (x.cos(),))
        return net.out(value + tangent)

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a gradient by functions inside")
def _():
    def run(net, x):
        slope = torch.func.grad(lambda x: net.inner(x).sin().sum())(x)
        return net.out(slope)

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("vmap inside")
def _():
    def run(net, x):
        return net.out(torch.vmap(net.inner)(x))

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a gradient for each sample inside")
def _():
    def run(net, x):
        slope = torch.vmap(torch.func.grad(lambda x: net.inner(x).sin().sum()))(x)
        return net.out(slope)

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a Jacobian inside")
def _():
    def run(net, x):
        jacobian = torch.vmap(torch.func.jacrev(net.inner))(x)
        return net.out(jacobian.diagonal(dim1=1, dim2=2))

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a Jacobian by forward mode inside")
def _():
    def run(net, x):
        jacobian = torch.vmap(torch.func.jacfwd(net.inner))(x)
        return net.out(jacobian.diagonal(dim1=1, dim2=2))

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a vjp inside")
def _():
    def run(net, x):
        value, pull = torch.func.vjp(net.inner, x)
        return net.out(pull(value.cos())[0])

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("dual numbers inside")
def _():
    import torch.autograd.forward_ad as fwd

    def run(net, x):
        with fwd.dual_level():
            value, tangent = fwd.unpack_dual(net.inner(fwd.make_dual(x, x.cos())))
        return net.out(value + tangent)

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a derivative by an input that requires a gradient")
def _():
    def run(net, x):
        u = net.inner(x)
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope[:, :1] + u

    X = reals(N, D).requires_grad_()
    return Net(run, inner=mlp(D, C)), F.mse_loss, X, reals(N, C)


@case("a derivative by an input that was made of such")
def _():
    def run(net, x, t):
        z = torch.cat([x, t], 1)
        u = net.inner(z)
        (slope,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
        return slope[:, :C] * u

    X = reals(N, D).requires_grad_() * 2, reals(N, 1)
    return Net(run, inner=mlp(D + 1, C)), F.mse_loss, X, reals(N, C)


@case("a derivative by the data in the loss")
def _():
    X = reals(N, D).requires_grad_()

    def loss(u, x):
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return (slope[:, :C] + u).square().mean()

    return mlp(D, C), loss, X, X


@case("models in an ensemble by functions")
def _():
    def run(net, x):
        def one(weight, bias):
            return F.linear(x, weight, bias).tanh()

        return net.out(torch.vmap(one)(net.w, net.b).mean(0))

    net = Net(run, w=reals(4, D, D), b=reals(4, D), out=linear(D, C))
    return net, F.cross_entropy, reals(N, D), labels()


@case("a functional call inside")
def _():
    def run(net, x):
        scaled = {name: p * 0.5 for name, p in net.inner.named_parameters()}
        return net.out(torch.func.functional_call(net.inner, scaled, (x,)))

    return Net(run, inner=mlp(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a Laplacian by functions in the loss")
def _():
    def run(net, x):
        hessian = torch.vmap(torch.func.hessian(lambda x: net.inner(x).sum()))(x)
        return hessian.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)

    return Net(run, inner=mlp(D, 1)), F.mse_loss, reals(N, D), reals(N, 1)


@case("a pushed tangent and a loss of its own")
def _():
    def run(net, x):
        return torch.func.jvp(net.inner, (x,), (torch.ones_like(x),))[1]

    return Net(run, inner=mlp()), F.mse_loss, reals(N, D), reals(N, C)


# ---------------------------------------------------------------- noise


@case("noise alone, of the shape of the input")
def _():
    def run(net, x):
        return net.out(torch.randn_like(x))

    return Net(run, out=mlp()), lambda p: p.square().mean(), reals(N, D), None


@case("noise alone, of the size of the input")
def _():
    def run(net, x):
        return net.out(torch.randn(len(x), D, dtype=torch.float64))

    return Net(run, out=mlp()), F.cross_entropy, reals(N, D), labels()


@case("noise alone, and no input")
def _():
    def run(net):
        return net.out(torch.randn(N, D, dtype=torch.float64))

    return Net(run, out=mlp()), F.cross_entropy, (), labels()


@case("noise alone, of a number of samples")
def _():
    def run(net, count):
        return net.out(torch.randn(count, D, dtype=torch.float64))

    return Net(run, out=mlp()), F.cross_entropy, (N,), labels()


@case("noise alone, judged by a critic")
def _():
    critic = mlp(C, 1).requires_grad_(False)

    def run(net, x):
        return net.out(torch.randn_like(x))

    def loss(p):
        return F.softplus(-critic(p)).mean()

    return Net(run, out=mlp()), loss, reals(N, D), None


@case("noise and input")
def _():
    def run(net, x):
        return net.out(torch.cat([x, torch.rand(N, D, dtype=torch.float64)], 1))

    return Net(run, out=mlp(2 * D)), F.cross_entropy, reals(N, D), labels()


@case("noise that the input scales")
def _():
    def run(net, x):
        mean, scale = net.encode(x).chunk(2, 1)
        return net.out(mean + scale.exp() * torch.randn_like(mean))

    return Net(run, encode=linear(D, 8), out=linear(4, C)), F.cross_entropy, reals(N, D), labels()


# ---------------------------------------------------------------- recurrent layers


for kind in ("RNN", "LSTM", "GRU"):
    for batch_first in (True, False):

        @case(f"{kind}, {'samples' if batch_first else 'time'} first")
        def _(kind=kind, batch_first=batch_first):
            layer = getattr(nn, kind)(D, C, batch_first=batch_first).double()

            def run(net, x):
                return net.out(net.layer(x)[0].mean(1 if batch_first else 0))

            X = reals(N, T, D) if batch_first else reals(T, N, D)
            net, options = Net(run, layer=layer, out=linear(C, C)), {}
            if not batch_first:
                options = {"in_dims": (1, 0)}
            return net, F.cross_entropy, X, labels(), options

    @case(f"{kind} of two layers and two directions, its last state")
    def _(kind=kind):
        layer = getattr(nn, kind)(D, C, 2, bidirectional=True, batch_first=True).double()

        def run(net, x):
            state = net.layer(x)[1]
            if isinstance(state, tuple):
                state = state[0]
            return net.out(state.transpose(0, 1).flatten(1))

        net = Net(run, layer=layer, out=linear(4 * C, C))
        return net, F.cross_entropy, reals(N, T, D), labels()

    @case(f"{kind} from a first state that is a parameter")
    def _(kind=kind):
        layer = getattr(nn, kind)(D, C, batch_first=True).double()

        def run(net, x):
            state = net.first.expand(1, len(x), C).contiguous()
            if kind == "LSTM":
                state = state, state.tanh()
            return net.out(net.layer(x, state)[0][:, -1])

        net = Net(run, layer=layer, first=reals(1, 1, C), out=linear(C, C))
        return net, F.cross_entropy, reals(N, T, D), labels()

    @case(f"a cell of {kind} in a loop")
    def _(kind=kind):
        cell = getattr(nn, f"{kind}Cell")(D, C).double()

        def run(net, x):
            state = None
            for t in range(T):
                state = net.cell(x[:, t], state)
            return net.out(state[0] if kind == "LSTM" else state)

        return Net(run, cell=cell, out=linear(C, C)), F.cross_entropy, reals(N, T, D), labels()


# ---------------------------------------------------------------- types of numbers


@case("complex weights")
def _():
    def run(net, x):
        z = x.to(torch.complex128) @ net.w
        return torch.view_as_real(z).flatten(1)

    w = torch.randn(D, C, dtype=torch.complex128)
    return Net(run, w=w), F.mse_loss, reals(N, D), reals(N, 2 * C)


@case("complex predictions")
def _():
    def run(net, x):
        return x.to(torch.complex128) @ net.w

    w = torch.randn(D, C, dtype=torch.complex128)
    return Net(run, w=w), lambda p, y: (p - y).abs().square().mean(), reals(N, D), reals(N, C)


@case("a Fourier layer with complex weights")
def _():
    def run(net, x):
        h = torch.fft.irfft(torch.fft.rfft(x) * net.w, n=D)
        return net.out(h)

    w = torch.randn(D // 2 + 1, dtype=torch.complex128)
    return Net(run, w=w, out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("a quantized model")
def _():
    net = torch.ao.quantization.quantize_dynamic(mlp().float(), {nn.Linear}, torch.qint8)
    return net, F.cross_entropy, reals(N, D).float(), labels()


@case("a quantized part before a trained head")
def _():
    part = torch.ao.quantization.quantize_dynamic(mlp().float(), {nn.Linear}, torch.qint8)
    return nn.Sequential(part, nn.Linear(C, C)), F.cross_entropy, reals(N, D).float(), labels()


@case("a net prepared for quantization")
def _():
    import torch.ao.quantization as tq

    net = nn.Sequential(tq.QuantStub(), nn.Linear(D, C), tq.DeQuantStub())
    net.qconfig = tq.get_default_qat_qconfig("fbgemm")
    tq.prepare_qat(net.train(), inplace=True)
    X = reals(N, D).float()
    net(X)
    return net, F.cross_entropy, X, labels()


@case("half precision")
def _():
    return mlp().bfloat16(), F.cross_entropy, reals(N, D).bfloat16(), labels()


# ---------------------------------------------------------------- modules and wrappers


@case("a lazy layer that has not run")
def _():
    return nn.Sequential(nn.LazyLinear(C).double()), F.cross_entropy, reals(N, D), labels()


@case("a lazy layer that has run")
def _():
    net, X = nn.Sequential(nn.LazyLinear(C)).double(), reals(N, D)
    net(X)
    return net, F.cross_entropy, X, labels()


@case("a lazy batch norm that has not run")
def _():
    net = nn.Sequential(linear(D, D), nn.LazyBatchNorm1d(), linear(D, C))
    return net, F.cross_entropy, reals(N, D), labels()


@case("parameters on the meta device")
def _():
    return mlp().to("meta"), F.cross_entropy, reals(N, D), labels()


@case("one parameter on the meta device")
def _():
    net = nn.Sequential(mlp(), nn.Linear(C, C, device="meta"))
    return net, F.cross_entropy, reals(N, D), labels()


@case("a buffer on the meta device")
def _():
    def run(net, x):
        return net.out(x) + net.shift

    net = Net(run, out=mlp())
    net.register_buffer("shift", torch.zeros(C, device="meta"))
    return net, F.cross_entropy, reals(N, D), labels()


class LowRank(nn.Module):
    """A frozen layer, and a product of two thin matrices beside it, as adapters of PEFT have it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(reals(rank, layer.in_features))
        self.up = nn.Parameter(reals(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + F.dropout(x, 0.0) @ self.down.T @ self.up.T


@case("low-rank adapters")
def _():
    net = nn.Sequential(LowRank(linear(D, D)), nn.Tanh(), LowRank(linear(D, C)))
    return net, F.cross_entropy, reals(N, D), labels()


class Wrapper(nn.Module):
    """Forwards attributes to what it wraps, as wrappers of PEFT and of accelerate do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@case("a wrapper that forwards attributes")
def _():
    return Wrapper(mlp()), F.cross_entropy, reals(N, D), labels()


@case("a forward pass that is exchanged, as accelerate does")
def _():
    net = mlp()
    plain = net.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", enabled=False):
            return plain(*args, **kwargs)

    net.forward = forward
    return net, F.cross_entropy, reals(N, D), labels()


@case("data in parallel on no device")
def _():
    return nn.DataParallel(mlp()), F.cross_entropy, reals(N, D), labels()


@case("an averaged model")
def _():
    net = torch.optim.swa_utils.AveragedModel(mlp())
    return net, F.cross_entropy, reals(N, D), labels()


@case("tied weights")
def _():
    def run(net, x):
        return net.b(net.a(x).tanh())

    net = Net(run, a=linear(D, D, bias=False), b=linear(D, D, bias=False))
    net.b.weight = net.a.weight
    return net, F.mse_loss, reals(N, D), reals(N, D)


@case("a weight tied to its transpose")
def _():
    def run(net, x):
        return F.linear(net.a(x).tanh(), net.a.weight.T)

    return Net(run, a=linear(D, C)), F.mse_loss, reals(N, D), reals(N, D)


@case("one layer twice")
def _():
    layer = linear(D, D)
    return nn.Sequential(layer, nn.Tanh(), layer), F.mse_loss, reals(N, D), reals(N, D)


@case("an embedding tied to the head")
def _():
    def run(net, x):
        return net.head(net.table(x).mean(1))

    net = Net(run, table=nn.Embedding(WORDS, D).double(), head=linear(D, WORDS, bias=False))
    net.head.weight = net.table.weight
    return net, F.cross_entropy, words(N, T), labels(classes=WORDS)


@case("spectral norm")
def _():
    net = nn.Sequential(parametrizations.spectral_norm(linear(D, D)), nn.Tanh(), linear(D, C))
    return net.eval(), F.cross_entropy, reals(N, D), labels()


@case("an old weight norm")
def _():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.utils.weight_norm(linear(D, D))
    return nn.Sequential(layer, nn.Tanh(), linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("an orthogonal layer")
def _():
    net = nn.Sequential(parametrizations.orthogonal(linear(D, D)), nn.Tanh(), linear(D, C))
    return net, F.cross_entropy, reals(N, D), labels()


@case("a pruned layer")
def _():
    layer = linear(D, D)
    prune.l1_unstructured(layer, "weight", 0.5)
    return nn.Sequential(layer, nn.Tanh(), linear(D, C)), F.cross_entropy, reals(N, D), labels()


@case("parameters in lists and dicts")
def _():
    def run(net, x):
        return x @ net.many[0] + (x @ net.named["b"]).tanh()

    net = Net(run)
    net.many = nn.ParameterList([reals(D, C)])
    net.named = nn.ParameterDict({"b": reals(D, C)})
    return net, F.cross_entropy, reals(N, D), labels()


class Named(Tensor):
    """A subclass that does nothing of its own."""


@case("a parameter of a subclass")
def _():
    net = mlp()
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Named))
    return net, F.cross_entropy, reals(N, D), labels()


@case("inputs of a subclass")
def _():
    return mlp(), F.cross_entropy, reals(N, D).as_subclass(Named), labels()


@case("a parameter that is not used")
def _():
    net = mlp()
    net.register_parameter("unused", nn.Parameter(reals(3)))
    return net, F.cross_entropy, reals(N, D), labels()


@case("a parameter without entries")
def _():
    net = mlp()
    net.register_parameter("empty", nn.Parameter(reals(0, 3)))
    return net, F.cross_entropy, reals(N, D), labels()


@case("masked tensors inside")
def _():
    from torch.masked import masked_tensor

    def run(net, x):
        h = net.inner(x)
        return net.out(masked_tensor(h, h > 0).to_tensor(0.0))

    return Net(run, inner=linear(D, D), out=linear(D, C)), F.cross_entropy, reals(N, D), labels()


# ---------------------------------------------------------------- what is known of them

# What is computed in fewer digits.
ROUNDED = {
    "a quantized part before a trained head": 1e-5,
    "a net prepared for quantization": 1e-5,
    "half precision": 3e-2,
}

ROWS = {"rows", "norms"}
CURVATURE = {"product", "diagonal", "matrix"}
DERIVATIVES = {"gradient", *ROWS, *CURVATURE}
ALL = {"structure", "verification", *DERIVATIVES}

# The questions that are refused.
REFUSED = {
    "sparse samples": ALL,
    "predictions that are sparse": ROWS | CURVATURE,
    "a jagged input": ALL,
    "a nested input": ALL,
    "a nested tensor inside": ALL,
    "a frozen scripted model": DERIVATIVES,
    "a derivative by the data in the loss": ALL,
    "a plain object with a tensor": ROWS | CURVATURE,
    "a distribution": ROWS | CURVATURE,
    "nothing": DERIVATIVES,
    "a word": DERIVATIVES,
    "nothing, and a loss that reads what the model keeps": ROWS | CURVATURE,
    "noise alone, and no input": ALL,
    "noise alone, of a number of samples": ALL,
    "complex weights": CURVATURE,
    "complex predictions": CURVATURE,
    "a Fourier layer with complex weights": CURVATURE,
    "a quantized model": DERIVATIVES,
    "a lazy layer that has not run": ALL,
    "a lazy batch norm that has not run": ALL,
    "parameters on the meta device": ALL,
    "one parameter on the meta device": ALL,
    "a buffer on the meta device": ALL,
}
