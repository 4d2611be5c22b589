"""Pairs of samples, and samples in another order."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.models.table import (
    CUBE,
    FLAT,
    MIXED,
    ODD,
    SIMD,
    STATISTICS,
    D,
    N,
    forward,
    linear,
    weight,
)

# ---------------------------------------------------------------- pairs of samples


@forward("minibatch discrimination", MIXED, head=linear(D + 1, D))
def _(net, x):
    h = net.linear(x)
    close = (-(h[:, None] - h[None]).abs().sum(-1)).exp().sum(1, keepdim=True)
    return net.head(torch.cat([x, close], 1))


@forward("nearest neighbour in the batch", MIXED, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    nearest = (torch.cdist(h, h) + 1e3 * torch.eye(N)).argmin(1)
    return h + h[nearest]


@forward("mean of the three nearest neighbours", MIXED)
def _(net, x):
    h = net.linear(x)
    return h[torch.cdist(h, h).topk(3, largest=False).indices].mean(1)


@forward("similarity to all samples", MIXED)
def _(net, x):
    h = F.normalize(net.linear(x), dim=1)
    return h @ h.t()


@forward("correlation matrix of the samples", MIXED)
def _(net, x):
    return torch.corrcoef(net.linear(x))


@forward("covariance matrix of the features, taken for predictions", MIXED)
def _(net, x):
    h = net.linear(x)
    return h.t() @ h


@forward("distances to learned prototypes", SIMD, prototypes=weight(N, D))
def _(net, x):
    return torch.cdist(net.linear(x), net.prototypes)


@forward("product of the samples of two inputs", SIMD, FLAT, FLAT)
def _(net, x, y):
    return torch.einsum("nd,nk->ndk", net.linear(x), y)


@forward("similarity of the samples of two inputs", MIXED, FLAT, FLAT)
def _(net, x, y):
    return torch.einsum("nd,md->nm", net.linear(x), y)


@forward("bilinear form of a sample with itself", SIMD, form=lambda: nn.Bilinear(D, D, 3))
def _(net, x):
    return net.form(x, net.linear(x))


# Or statistics of pairs: the sum of both says what the mirror is.
@forward(
    "bilinear form of a sample with its mirror",
    MIXED,
    accept_unknown=True,
    form=lambda: nn.Bilinear(D, D, 3),
)
def _(net, x):
    return net.form(x, x.flip(0))


@forward("memory queue, read then written", SIMD, queue=lambda: torch.randn(8, D))
def _(net, x):
    h = F.normalize(net.linear(x), dim=1)
    logits = h @ net.queue.t()
    net.queue = torch.cat([h.detach(), net.queue])[:8]
    return logits


@forward("memory queue, written then read", MIXED, queue=lambda: torch.randn(8, D))
def _(net, x):
    h = F.normalize(net.linear(x), dim=1)
    net.queue = torch.cat([h.detach(), net.queue])[:8]
    return h @ net.queue.t()


# ---------------------------------------------------------------- order


@forward("cumulative sum over time", SIMD, CUBE)
def _(net, x):
    return net.linear(x).cumsum(1)


@forward("cumulative sum over the batch", MIXED)
def _(net, x):
    return net.linear(x).cumsum(0)


@forward("cumulative maximum over the batch", MIXED)
def _(net, x):
    return net.linear(x).cummax(0).values


@forward("differences of neighbouring features", SIMD)
def _(net, x):
    return net.linear(x).diff(dim=1)


@forward("differences of neighbouring samples", MIXED)
def _(net, x):
    return net.linear(x).diff(dim=0, prepend=torch.zeros(1, D))


@forward("sorted within the sample", SIMD)
def _(net, x):
    return net.linear(x).sort(1).values


@forward("sorted over the batch", MIXED)
def _(net, x):
    return net.linear(x).sort(0).values


@forward("largest features of the sample", SIMD, ODD)
def _(net, x):
    return net.linear(x).topk(3, 1).values


@forward("largest features kept by scatter", SIMD)
def _(net, x):
    h = net.linear(x)
    return h * torch.zeros_like(h).scatter(1, h.topk(2, 1).indices, 1.0)


@forward("largest of the batch kept by scatter", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * torch.zeros_like(h).scatter(0, h.topk(2, 0).indices, 1.0)


@forward("ranks within the sample", SIMD)
def _(net, x):
    h = net.linear(x)
    return h * h.argsort(1).argsort(1)


@forward("ranks over the batch", MIXED)
def _(net, x):
    h = net.linear(x)
    return h * h.argsort(0).argsort(0)


@forward("empirical distribution function of the batch", MIXED)
def _(net, x):
    h = net.linear(x)
    return h * (h[:, None] > h[None]).to(h).mean(1)
