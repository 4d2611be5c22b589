"""Problems whose samples have rows of their own number: graphs, packed sequences, boxes of images.

A case is built afresh for every test, with ``independent`` and ``reduction`` as they truly are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import unbatch as ub

D, H, C, WORDS = 5, 6, 3, 9
SIZES = torch.tensor([3, 1, 4, 2])
N, R = len(SIZES), int(SIZES.sum())
BATCH = torch.arange(N).repeat_interleave(SIZES)

# The ends of edges, each within its graph.
EDGES = torch.tensor([[0, 1, 1, 2, 4, 5, 6, 7, 4, 8, 9], [1, 0, 2, 1, 5, 4, 7, 6, 7, 9, 8]])


@dataclass(frozen=True)
class Case:
    """``owners``: the sample of each row of the predictions; by default row n is sample n's."""

    model: nn.Module
    loss: Callable | None
    X: Any
    y: Any
    in_dims: Any
    out_dims: Any = None
    owners: Tensor | None = None
    samples: int = N
    independent: bool = True
    is_open: bool = False  # whether that is more than the analysis sees
    # The predictions of a model that computes its own loss, and that loss of them.
    logits: Callable | None = None

    @property
    def problem(self) -> ub.Problem:
        options = {"in_dims": self.in_dims, "out_dims": self.out_dims}
        if self.loss is None:
            return ub.Problem(self.model, batch=self.X, **options)
        return ub.Problem(self.model, self.loss, (self.X, self.y), **options)

    def predictions(self) -> Tensor:
        if self.logits is not None:
            return self.logits(self.model)
        X = self.X
        if isinstance(X, tuple) and not isinstance(X, PackedSequence):
            return self.model(*X)
        return self.model(X)

    def value(self, predictions: Tensor) -> Tensor:
        if self.loss is None:
            return F.cross_entropy(predictions, self.y)
        return self.loss(predictions, self.y)


CASES: dict[str, Callable[[], Case]] = {}


def case(name: str) -> Callable:
    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        def build() -> Case:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                return make()

        assert name not in CASES, name
        CASES[name] = build
        return make

    return register


class Net(nn.Module):
    """Two layers, and what lies between them."""

    def __init__(self, run: Callable, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, H), nn.Linear(H, C)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run
        self.double()

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def reals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def classes(count: int) -> Tensor:
    return torch.randint(C, (count,))


def count_of(batch: Tensor) -> int:
    return int(batch.max()) + 1


def summed(h: Tensor, batch: Tensor) -> Tensor:
    return h.new_zeros(count_of(batch), h.shape[1]).index_add(0, batch, h)


def passed(h: Tensor, edges: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])


def by_node(net: Net, x: Tensor) -> Tensor:
    return net.b(net.a(x).tanh())


def by_edges(net: Net, x: Tensor, edges: Tensor) -> Tensor:
    h = net.a(x)
    return net.b((h + passed(h, edges)).tanh())


# ---------------------------------------------------------------- rows one by one


@case("nodes")
def _() -> Case:
    rows = ub.rows_of(BATCH)
    return Case(Net(by_node), F.cross_entropy, reals(R, D), classes(R), rows, rows, BATCH)


@case("nodes, whose predictions are not declared")
def _() -> Case:
    rows = ub.rows_of(BATCH)
    return Case(Net(by_node), F.cross_entropy, reals(R, D), classes(R), rows, None, BATCH)


@case("nodes by pointers")
def _() -> Case:
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), SIZES.cumsum(0)])
    rows = ub.rows_of(ptr=ptr)
    return Case(Net(by_node), F.mse_loss, reals(R, D), reals(R, C), rows, rows, BATCH)


@case("nodes in no order")
def _() -> Case:
    owners = BATCH[torch.randperm(R)]
    rows = ub.rows_of(owners)
    return Case(Net(by_node), F.cross_entropy, reals(R, D), classes(R), rows, rows, owners)


@case("graphs without nodes, in the middle and at the end")
def _() -> Case:
    owners = torch.where(BATCH < 1, BATCH, BATCH + 1)
    rows = ub.rows_of(owners, samples=N + 2)
    return Case(Net(by_node), F.cross_entropy, reals(R, D), classes(R), rows, rows, owners, N + 2)


@case("one node in each graph")
def _() -> Case:
    owners = torch.randperm(N)
    rows = ub.rows_of(owners)
    return Case(Net(by_node), F.cross_entropy, reals(N, D), classes(N), rows, rows, owners)


@case("nodes along the second axis")
def _() -> Case:
    rows, last = ub.rows_of(BATCH, dim=1), ub.rows_of(BATCH)
    net = Net(lambda net, x: by_node(net, x.T))
    return Case(net, F.cross_entropy, reals(D, R), classes(R), (rows, last), last, BATCH)


@case("kinds of atoms")
def _() -> Case:
    rows = ub.rows_of(BATCH)
    net = Net(lambda net, x: net.b(net.kinds(x)), kinds=nn.Embedding(WORDS, H))
    X = torch.randint(WORDS, (R,))
    return Case(net, F.cross_entropy, X, classes(R), rows, rows, BATCH)


@case("a sum over nodes in place of a mean")
def _() -> Case:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(p, y, reduction="sum")

    rows = ub.rows_of(BATCH)
    return Case(Net(by_node), loss, reals(R, D), classes(R), rows, rows, BATCH)


@case("nodes of a model with its own loss")
def _() -> Case:
    def run(net: Net, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = by_node(net, x)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}

    rows, x, y = ub.rows_of(BATCH), reals(R, D), classes(R)
    return Case(Net(run), None, (x, y), y, rows, None, BATCH, logits=lambda net: by_node(net, x))


@case("batch norm over all nodes")
def _() -> Case:
    rows = ub.rows_of(BATCH)
    net = Net(lambda net, x: net.b(net.norm(net.a(x))), norm=nn.BatchNorm1d(H))
    X, y = reals(R, D), classes(R)
    return Case(net, F.cross_entropy, X, y, rows, rows, BATCH, independent=False)


# ---------------------------------------------------------------- messages between nodes


@case("messages")
def _() -> Case:
    rows = ub.rows_of(BATCH)
    X = reals(R, D), EDGES
    return Case(Net(by_edges), F.cross_entropy, X, classes(R), ((rows, None), rows), rows, BATCH)


@case("messages along edges that have features")
def _() -> Case:
    def run(net: Net, x: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        h = net.a(x)
        sent = h[edges[0]] * net.e(features)
        return net.b((h + torch.zeros_like(h).index_add(0, edges[1], sent)).tanh())

    rows, of_edges = ub.rows_of(BATCH), ub.rows_of(BATCH[EDGES[0]])
    X = reals(R, D), EDGES, reals(EDGES.shape[1], 2)
    dims = ((rows, None, of_edges), rows)
    return Case(Net(run, e=nn.Linear(2, H)), F.cross_entropy, X, classes(R), dims, rows, BATCH)


@case("an edge from one graph to another")
def _() -> Case:
    edges = EDGES.clone()
    edges[1, 0] = 4
    rows, X = ub.rows_of(BATCH), (reals(R, D), edges)
    dims = ((rows, None), rows)
    return Case(Net(by_edges), F.cross_entropy, X, classes(R), dims, rows, BATCH, independent=False)


@case("attention within each graph by a mask")
def _() -> Case:
    def run(net: Net, x: Tensor, batch: Tensor) -> Tensor:
        h = net.a(x)
        scores = (h @ h.T).masked_fill(batch[:, None] != batch, -torch.inf)
        return net.b(scores.softmax(1) @ h)

    rows, X = ub.rows_of(BATCH), (reals(R, D), BATCH)
    dims = ((rows, None), rows)
    net = Net(run)
    return Case(net, F.cross_entropy, X, classes(R), dims, rows, BATCH, is_open=True)


# ---------------------------------------------------------------- graphs as a whole


def readout(name: str, run: Callable) -> None:
    @case(f"graphs read out by {name}")
    def _() -> Case:
        X = reals(R, D), EDGES, BATCH
        dims = ((ub.rows_of(BATCH), None, None), 0)
        return Case(Net(run), F.cross_entropy, X, classes(N), dims)


def by_sum(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h = net.a(x)
    return net.b(summed((h + passed(h, edges)).tanh(), batch))


def by_mean(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h = net.a(x).tanh()
    counts = torch.bincount(batch, minlength=count_of(batch))
    return net.b(summed(h, batch) / counts[:, None])


def by_scatter(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h = net.a(x).tanh()
    top = h.new_zeros(count_of(batch), H)
    where = batch[:, None].expand_as(h)
    return net.b(top.scatter_reduce(0, where, h, "amax", include_self=False))


def by_attention(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h = net.a(x)
    weights = h[:, :1].sigmoid().exp()
    weights = weights / summed(weights, batch)[batch]
    return net.b(summed(h * weights, batch))


def by_splitting(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    parts = net.a(x).tanh().split(SIZES.tolist())
    return net.b(torch.stack([part.mean(0) for part in parts]))


readout("a sum", by_sum)
readout("a mean", by_mean)
readout("the largest", by_scatter)
readout("attention", by_attention)
readout("splitting", by_splitting)


def by_a_loop(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h = passed(net.a(x), edges).tanh()
    return net.b(torch.stack([h[batch == n].sum(0) for n in range(count_of(batch))]))


readout("a loop over graphs", by_a_loop)


@case("graphs of a model with its own loss")
def _() -> Case:
    def run(net: Net, x: Tensor, batch: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = by_mean(net, x, EDGES, batch)
        return {"loss": F.cross_entropy(logits, y), "logits": logits}

    x, y = reals(R, D), classes(N)
    dims = (ub.rows_of(BATCH), None, 0)
    return Case(
        Net(run), None, (x, BATCH, y), y, dims, logits=lambda net: by_mean(net, x, EDGES, BATCH)
    )


@case("bags of words, all in one row")
def _() -> Case:
    bags = nn.EmbeddingBag(WORDS, H, sparse=True)
    net = Net(lambda net, words, offsets: net.b(net.bags(words, offsets)), bags=bags)
    offsets = SIZES.cumsum(0) - SIZES
    X = torch.randint(WORDS, (R,)), offsets
    dims = ((ub.rows_of(BATCH), None), 0)
    return Case(net, F.cross_entropy, X, classes(N), dims)


def by_graph_norm(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h, counts = net.a(x), torch.bincount(batch)[:, None]
    h = h - (summed(h, batch) / counts)[batch]
    spread = (summed(h.square(), batch) / counts)[batch]
    return net.b(summed((h / (spread + 1e-3).sqrt()).tanh(), batch))


def by_self_loops(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    loops = torch.arange(len(x)).expand(2, -1)
    start, end = torch.cat([edges, loops], 1)
    h = net.a(x)
    degrees = torch.zeros(len(x)).double().index_add(0, end, torch.ones(len(end)).double())
    weights = (degrees[start] * degrees[end]).rsqrt()[:, None]
    return net.b(summed(torch.zeros_like(h).index_add(0, end, h[start] * weights).relu(), batch))


def by_dense_batch(net: Net, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
    h, counts = net.a(x), torch.bincount(batch)
    place = torch.arange(len(x)) - (counts.cumsum(0) - counts)[batch]
    dense = h.new_zeros(len(counts), int(counts.max()), H)
    is_there = torch.zeros(dense.shape[:2], dtype=torch.bool)
    dense[batch, place], is_there[batch, place] = h, True
    scores = (dense @ dense.mT).masked_fill(~is_there[:, None], -1e9)
    return net.b((scores.softmax(2) @ dense * is_there[..., None]).sum(1))


readout("graph norm", by_graph_norm)
readout("self loops and degrees", by_self_loops)
readout("a dense batch", by_dense_batch)


@case("nodes that hear of their graph")
def _() -> Case:
    def run(net: Net, x: Tensor, batch: Tensor) -> Tensor:
        h = net.a(x).tanh()
        return net.b((h + (net.whole + summed(h, batch))[batch]).tanh())

    rows, X = ub.rows_of(BATCH), (reals(R, D), BATCH)
    net = Net(run)
    net.whole = nn.Parameter(reals(1, H))
    return Case(net, F.cross_entropy, X, classes(R), ((rows, None), rows), rows, BATCH)


# ---------------------------------------------------------------- sequences that are packed


def packed() -> PackedSequence:
    return pack_sequence([reals(length, D) for length in SIZES.tolist()], enforce_sorted=False)


for kind in ("RNN", "LSTM", "GRU"):

    @case(f"sentences that are packed, in a {kind}")
    def _(kind: str = kind) -> Case:
        def run(net: Net, x: PackedSequence) -> Tensor:
            return net.b(pad_packed_sequence(net.layer(x)[0])[0].sum(0))

        X, layer = packed(), getattr(nn, kind)(D, H)
        dims = (ub.rows_of(X), 0)
        return Case(Net(run, layer=layer), F.cross_entropy, X, classes(N), dims)

    @case(f"words of sentences that are packed, in a {kind}")
    def _(kind: str = kind) -> Case:
        def run(net: Net, x: PackedSequence) -> Tensor:
            return net.b(net.layer(x)[0].data)

        X, layer = packed(), getattr(nn, kind)(D, H)
        rows = ub.rows_of(X)
        net, owners = Net(run, layer=layer), rows.owners
        return Case(net, F.cross_entropy, X, classes(R), rows, rows, owners)


@case("words and tags of sentences that are packed, each with rows of its own")
def _() -> Case:
    X = packed()
    tags = pack_sequence([classes(k) for k in SIZES.tolist()], enforce_sorted=False)
    net = Net(lambda net, x: net.b(net.layer(x)[0].data), layer=nn.GRU(D, H))
    dims = (ub.rows_of(X), ub.rows_of(tags))

    def loss(p: Tensor, y: PackedSequence) -> Tensor:
        return F.cross_entropy(p, y.data)

    return Case(net, loss, X, tags, dims, ub.rows_of(X), ub.rows_of(X).owners)


@case("two sentences in each sample, both packed")
def _() -> Case:
    def run(net: Net, x: PackedSequence, z: PackedSequence) -> Tensor:
        return net.b(net.first(x)[1][0] * net.second(z)[1][0])

    X, Z = packed(), pack_sequence([reals(k, D) for k in (1, 2, 2, 4)], enforce_sorted=False)
    net = Net(run, first=nn.GRU(D, H), second=nn.GRU(D, H))
    dims = ((ub.rows_of(X), ub.rows_of(Z)), 0)
    return Case(net, F.cross_entropy, (X, Z), classes(N), dims)


# ---------------------------------------------------------------- targets in their own number


@case("boxes of images")
def _() -> Case:
    def loss(p: Tensor, boxes: Tensor) -> Tensor:
        return (p[BATCH] - boxes).square().sum(1).mean()

    dims = (0, ub.rows_of(BATCH))
    return Case(Net(by_node), loss, reals(N, D), reals(R, C), dims)


@case("a set of labels for each image")
def _() -> Case:
    def loss(p: Tensor, labels: Tensor) -> Tensor:
        chosen = p.log_softmax(1)[BATCH, labels]
        return -(torch.zeros(N).double().index_add(0, BATCH, chosen) / SIZES).mean()

    return Case(Net(by_node), loss, reals(N, D), classes(R), (0, ub.rows_of(BATCH)))


@case("boxes of images beside their numbers")
def _() -> Case:
    def loss(p: Tensor, y: dict[str, Tensor]) -> Tensor:
        return F.smooth_l1_loss(p[y["image"]], y["boxes"])

    y = {"boxes": reals(R, C), "image": BATCH}
    dims = (0, {"boxes": ub.rows_of(BATCH), "image": None})
    return Case(Net(by_node), loss, reals(N, D), y, dims)


@case("boxes that begin with the number of their image")
def _() -> Case:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return (p[y[:, 0].long()] - y[:, 1:]).square().sum(1).mean()

    y = torch.cat([BATCH[:, None].double(), reals(R, C)], 1)
    return Case(Net(by_node), loss, reals(N, D), y, (0, ub.rows_of(BATCH)))


@case("images of which the last has no boxes")
def _() -> Case:
    def loss(p: Tensor, boxes: Tensor) -> Tensor:
        return (p[BATCH] - boxes).square().sum(1).mean()

    X, dims = reals(N + 1, D), (0, ub.rows_of(BATCH))
    return Case(Net(by_node), loss, X, reals(R, C), dims, samples=N + 1)
