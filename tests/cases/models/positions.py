"""What depends on the index of a sample or on the number of samples, and noise."""

import random

import torch
from torch import nn
from torch.nn import functional as F

from cases.models.table import (
    CUBE,
    FLAT,
    IMAGE,
    INDEXED,
    MIXED,
    ODD,
    SEQUENCE,
    SIMD,
    D,
    N,
    conv,
    forward,
    layers,
    linear,
    weight,
)

# -------------------------------------------------------------- the index of a sample, and N itself

TABLE = {"table": weight(N, D)}


@forward("scaled by the index of the sample", INDEXED)
def _(net, x):
    return net.linear(x) * torch.arange(1.0, len(x) + 1)[:, None]


@forward("features scaled by their index", SIMD)
def _(net, x):
    return net.linear(x) * torch.arange(1.0, x.shape[1] + 1)


@forward("one parameter per sample", INDEXED, **TABLE)
def _(net, x):
    return net.linear(x) + net.table


@forward("positional embedding, as long as the batch", SIMD, CUBE, **TABLE)
def _(net, x):
    return net.linear(x + net.table)


@forward("positional embedding along the samples", INDEXED, CUBE, **TABLE)
def _(net, x):
    return net.linear(x + net.table[:, None])


@forward("embedding of the index of the sample", INDEXED, embed=lambda: nn.Embedding(N, D))
def _(net, x):
    return net.linear(x) + net.embed(torch.arange(len(x)))


@forward("one weight per sample by bmm", INDEXED, w=weight(N, D, D))
def _(net, x):
    return torch.bmm(x[:, None], net.w)[:, 0]


@forward("causal mask put on the samples", INDEXED)
def _(net, x):
    return net.linear(x) * torch.ones(N, D).tril()


@forward("every other sample negated", INDEXED)
def _(net, x):
    h = net.linear(x)
    return torch.where(torch.arange(len(x))[:, None] % 2 == 0, h, -h)


@forward("product with a diagonal matrix", INDEXED, accept_unknown=True)
def _(net, x):
    return torch.arange(1.0, len(x) + 1).diag() @ net.linear(x)


@forward("product with the identity", SIMD, accept_unknown=True)
def _(net, x):
    return torch.eye(len(x)) @ net.linear(x)


@forward("product with a learned matrix over samples", MIXED, mixing=weight(N, N))
def _(net, x):
    return net.mixing @ net.linear(x)


@forward("token mixing within the sample", SIMD, CUBE, mixing=weight(N, N))
def _(net, x):
    return net.mixing @ net.linear(x)


@forward("token mixing over the batch", MIXED, CUBE, mixing=weight(N, N))
def _(net, x):
    return torch.einsum("mn,ntd->mtd", net.mixing, net.linear(x))


@forward("predictions that ignore the inputs", SIMD)
def _(net, x):
    return net.linear.bias.expand(len(x), -1)


@forward("class token put before the sequence", SIMD, SEQUENCE, token=weight(1, 1, D))
def _(net, x):
    h = net.linear(torch.cat([net.token.expand(len(x), -1, -1), x], 1))
    return (h @ h.mT).softmax(-1)[:, 0]


@forward("class token put before the batch", MIXED, token=weight(1, D))
def _(net, x):
    return net.linear(torch.cat([net.token, x]))[: len(x)]


@forward("divided by the batch size", SIMD)
def _(net, x):
    return net.linear(x) / len(x)


@forward("scaled by a constant of the batch size", SIMD, ODD)
def _(net, x):
    return net.linear(x) * torch.ones(len(x), 1).sum().sqrt()


# ---------------------------------------------------------------- noise

layers("dropout", SIMD, FLAT, linear(), nn.Dropout)
layers("dropout of channels", SIMD, IMAGE, conv(), nn.Dropout2d)
layers("alpha dropout", SIMD, FLAT, linear(), nn.AlphaDropout)


@forward("noise on every feature", SIMD)
def _(net, x):
    return net.linear(x + 0.1 * torch.randn_like(x))


@forward("uniform mask of the batch's shape", SIMD)
def _(net, x):
    return net.linear(x) * torch.rand(N, D)


@forward("dropout mask shared by the batch", SIMD)
def _(net, x):
    return net.linear(x) * (torch.rand(1, D) > 0.5)


@forward("a coin per batch, tossed by Python", SIMD)
def _(net, x):
    return net.linear(x) * random.random()


@forward("a coin per sample for the residual branch", SIMD)
def _(net, x):
    return x + net.linear(x) * (torch.rand(len(x), 1) > 0.3)


@forward("Bernoulli with the sample's own probabilities", SIMD)
def _(net, x):
    return net.linear(x) * torch.bernoulli(x.sigmoid())


@forward("reparametrised Gaussian", SIMD, spread=linear())
def _(net, x):
    return net.linear(x) + net.spread(x).exp() * torch.randn(N, D)


@forward("Gumbel softmax, hard", SIMD)
def _(net, x):
    return F.gumbel_softmax(net.linear(x), hard=True) @ net.linear.weight


@forward("random order of the features", SIMD)
def _(net, x):
    return net.linear(x[:, torch.randperm(D)])


@forward("mixup with a random partner", MIXED)
def _(net, x):
    return net.linear(0.6 * x + 0.4 * x[torch.randperm(len(x))])


@forward("a feature shuffled over the batch", MIXED)
def _(net, x):
    return net.linear(torch.cat([x[torch.randperm(len(x)), :1], x[:, 1:]], 1))


@forward("noise averaged over the batch", SIMD, accept_unknown=True)
def _(net, x):
    noise = torch.randn(N, D)
    return net.linear(x) + noise.mean(0)


@forward("a diffusion at a random time for each sample", SIMD, rates=lambda: torch.rand(10))
def _(net, x):
    time = torch.randint(0, 10, (len(x),))
    return net.linear(net.rates[time][:, None] * x + torch.randn_like(x))


@forward("the embedding of a random time", SIMD, embed=lambda: nn.Embedding(10, D))
def _(net, x):
    return net.linear(x) + net.embed(torch.randint(0, 10, (len(x),)))


@forward("a random time for the whole batch", SIMD, embed=lambda: nn.Embedding(10, D))
def _(net, x):
    return net.linear(x) + net.embed(torch.randint(0, 10, (1,)).expand(len(x)))


@forward("a random time as a number", SIMD)
def _(net, x):
    return net.linear(x) * (torch.randint(0, 10, (len(x),)) / 10)[:, None]


@forward("a random word, one-hot", SIMD)
def _(net, x):
    return net.linear(x) + F.one_hot(torch.randint(0, D, (len(x),)), D)


@forward("features rolled by a random number", SIMD, accept_unknown=True)
def _(net, x):
    places = (torch.arange(D) + torch.randint(0, D, (len(x), 1))) % D
    return net.linear(x).gather(1, places)


@forward("noise alone, through a layer", SIMD)
def _(net, x):
    return net.linear(torch.randn_like(x))


@forward("a random partner for each sample", MIXED, accept_unknown=True)
def _(net, x):
    return net.linear(x - x[torch.randint(0, len(x), (len(x),))])
