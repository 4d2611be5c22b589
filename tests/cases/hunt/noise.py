"""Models that draw random numbers, by the values of their samples or not."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import MIXED, SIMD, STATISTICS, linear

N = D = 6


def slopes_in_place(net, x):
    h = net.linear(x).clone()
    F.rrelu_(h, training=True)
    return h


def slopes_by_hand(net, x):
    h = net.linear(x)
    return torch.where(h < 0, h * torch.empty_like(h).uniform_(0.1, 0.3), h)


def slopes_after_a_mean(net, x):
    h = net.linear(x)
    return F.rrelu(h - h.mean(0), training=True)


def reparametrised(net, x):
    mean, scale = net.linear(x).chunk(2, 1)
    return torch.normal(mean.detach(), scale.detach().exp()) + mean


def gumbel(net, x):
    return F.gumbel_softmax(net.linear(x), hard=True)


def drawn_classes(net, x):
    return net.table[torch.multinomial(net.linear(x).softmax(1), 1)[:, 0]]


def dropped_by_values(net, x):
    h = net.linear(x)
    return h * torch.bernoulli(h.detach().sigmoid())


def dropped_by_the_next(net, x):
    h = net.linear(x)
    return h * torch.bernoulli(h.detach().roll(1, 0).sigmoid())


def dropped_by_the_mean(net, x):
    h = net.linear(x)
    return h * torch.bernoulli(h.detach().mean(0).sigmoid())


def noise_of_the_next(net, x):
    noise = torch.randn_like(x)
    return net.linear(x) + noise - noise.roll(1, 0)


def mean_noise(net, x):
    return net.linear(x) + torch.randn_like(x).mean(0)


table(
    SIMD,
    {
        "random slopes, used": lambda n, x: n.linear(F.rrelu(n.linear(x), training=True)),
        "random slopes in a layer": lambda n, x: n.rrelu(n.linear(x)),
        "random slopes of a view": lambda n, x: F.rrelu(
            n.linear(x).view(N, 2, 3), training=True
        ).flatten(1),
        "random slopes transposed": lambda n, x: F.rrelu(n.linear(x).T, training=True).T,
        "random slopes without training": lambda n, x: F.rrelu(n.linear(x)),
        "random slopes in place": slopes_in_place,
        "random slopes by hand": slopes_by_hand,
        "normal numbers by own moments": reparametrised,
        "Gumbel softmax, hard": gumbel,
        "numbers kept by own values": dropped_by_values,
        "Poisson numbers of own rates": lambda n, x: torch.poisson(n.linear(x).exp()) + n.linear(x),
        "gamma numbers of own shapes": lambda n, x: torch._standard_gamma(n.linear(x).exp()),
        "alpha dropout of a view": lambda n, x: F.alpha_dropout(
            n.linear(x).view(N, 2, 3), training=True
        ).flatten(1),
        "noise of the samples, transposed": lambda n, x: n.linear(x) + torch.randn(D, N).T,
        "noise of one number": lambda n, x: n.linear(x) * torch.rand(()),
    },
    accept_unknown=True,
    linear=linear(6, 6),
    rrelu=nn.RReLU,
)
table(
    SIMD,
    {"classes drawn by own scores": drawn_classes},
    accept_unknown=True,
    table=lambda: nn.Parameter(torch.randn(D, 3)),
)
table(
    STATISTICS,
    {
        "random slopes after a mean": slopes_after_a_mean,
        "numbers kept by the mean": dropped_by_the_mean,
        "random slopes of the mean": lambda n, x: n.linear(x) - F.rrelu(x.mean(0), training=True),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {
        "numbers kept by the next sample": dropped_by_the_next,
        "random slopes of the next sample": lambda n, x: F.rrelu(
            n.linear(x).roll(1, 0), training=True
        ),
    },
    accept_unknown=True,
)
table(
    SIMD,
    {"noise and that of the next": noise_of_the_next, "mean noise": mean_noise},
    accept_unknown=True,
)
