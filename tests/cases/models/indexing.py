"""Indexing, gather and scatter."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.models.table import (
    FLAT,
    MIXED,
    SEQUENCE,
    SHUFFLED,
    SIMD,
    STATISTICS,
    D,
    N,
    T,
    forward,
    integers,
    linear,
    weight,
)

VOCABULARY = {"embed": lambda: nn.Embedding(9, D)}


@forward("embedding and mean", SIMD, integers(9, N, T), linear=linear(), **VOCABULARY)
def _(net, ids):
    return net.linear(net.embed(ids).mean(1))


@forward(
    "embedding bag with flat offsets",
    SIMD,
    integers(9, N, T),
    linear=linear(),
    bag=lambda: nn.EmbeddingBag(9, D),
)
def _(net, ids):
    return net.linear(net.bag(ids.flatten(), torch.arange(N) * T))


@forward(
    "embedding of the distinct tokens of the batch",
    SIMD,
    integers(9, N, T),
    linear=linear(),
    accept_unknown=True,
    **VOCABULARY,
)
def _(net, ids):
    distinct, where = ids.unique(return_inverse=True)
    return net.linear(net.embed(distinct))[where].sum(1)


@forward("embedding table made of the batch itself", MIXED, FLAT, integers(N, N))
def _(net, x, ids):
    return F.embedding(ids, net.linear(x))


@forward("gather of the sample's own features", SIMD)
def _(net, x):
    h = net.linear(x)
    return h.gather(1, h.argmax(1, keepdim=True))


@forward("gather over the batch", MIXED)
def _(net, x):
    h = net.linear(x)
    return h.gather(0, h.argmax(1, keepdim=True).expand(-1, D))


@forward("take_along_dim within the sample", SIMD)
def _(net, x):
    h = net.linear(x)
    return torch.take_along_dim(h, x.argsort(1), 1)


@forward("take_along_dim over the batch", MIXED)
def _(net, x):
    return torch.take_along_dim(net.linear(x), x.argsort(1), 0)


@forward("one time step per sample", SIMD, SEQUENCE)
def _(net, x):
    h = net.linear(x)
    return h[torch.arange(N), h[..., 0].argmax(1)]


@forward("one time step per sample, taken from the sample before", MIXED, SEQUENCE)
def _(net, x):
    h = net.linear(x)
    return h[torch.arange(N) - 1, h[..., 0].argmax(1)]


@forward("a sample chosen by each sample", MIXED)
def _(net, x):
    h = net.linear(x)
    return h[h.argmax(1)]


@forward("features chosen by a constant index", SIMD)
def _(net, x):
    return net.linear(x)[:, SHUFFLED]


@forward("take from the flat batch with own offsets", SIMD)
def _(net, x):
    h = net.linear(x)
    return h.take(h.argmax(1) + D * torch.arange(N))


@forward("take from the flat batch without offsets", MIXED)
def _(net, x):
    h = net.linear(x)
    return h.take(h.argmax(1) + torch.arange(N))


@forward("where and masked_fill on own values", SIMD)
def _(net, x):
    h = net.linear(x)
    return torch.where(h > 0, h, 0.1 * h).masked_fill(x < -1, 0.0)


@forward("where on the value of the next sample", MIXED)
def _(net, x):
    h = net.linear(x)
    return torch.where(h.roll(1, 0) > 0, h, 0.1 * h)


@forward("masked by the batch mean", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h * (h > h.mean(0))


@forward("index_add within the sample", SIMD)
def _(net, x):
    return torch.zeros(N, 2).index_add(1, torch.tensor([0, 1, 1, 0, 1, 0]), net.linear(x))


@forward("index_add across samples", MIXED)
def _(net, x):
    return torch.zeros(N, D).index_add(0, torch.tensor([0, 1, 1, 3, 4, 0]), net.linear(x))


@forward("index_add that puts samples where they were", SIMD)
def _(net, x):
    return torch.ones(N, D).index_add(0, torch.arange(N), net.linear(x))


@forward("scatter_add within the sample", SIMD)
def _(net, x):
    h = net.linear(x)
    return torch.zeros(N, 3).scatter_add(1, x.argsort(1) % 3, h)


@forward("scatter_add across samples", MIXED)
def _(net, x):
    return torch.zeros(N, D).scatter_add(0, x.argsort(1), net.linear(x))


@forward("vector quantisation, straight through", SIMD, codebook=weight(5, D))
def _(net, x):
    h = net.linear(x)
    return h + (net.codebook[torch.cdist(h, net.codebook).argmin(1)] - h).detach()


@forward("binarised, straight through", SIMD)
def _(net, x):
    h = net.linear(x)
    return h + (h.sign() - h).detach()
