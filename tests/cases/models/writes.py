"""Loops over samples, slices, and writes in place."""

import torch
from torch.nn import functional as F

from cases.models.table import INDEXED, MIXED, ODD, SEQUENCE, SIMD, STATISTICS, D, N, forward


@forward("loop over samples", SIMD)
def _(net, x):
    return torch.stack([net.linear(row) for row in x])


@forward("loop over samples into a preallocated output", SIMD, ODD)
def _(net, x):
    out = torch.zeros_like(x)
    for n in range(len(x)):
        out[n] = net.linear(x[n])
    return out


@forward("loop over samples, off by one", MIXED)
def _(net, x):
    return torch.stack([net.linear(x[n]) + x[n - 1] for n in range(len(x))])


@forward("loop over samples with a running sum", MIXED)
def _(net, x):
    total, out = torch.zeros(D), []
    for row in x:
        total = total + net.linear(row)
        out.append(total)
    return torch.stack(out)


@forward("loop over samples with the loop's index as a factor", INDEXED)
def _(net, x):
    return torch.stack([n * net.linear(row) for n, row in enumerate(x)])


@forward("loop over chunks", SIMD, ODD)
def _(net, x):
    return torch.cat([net.linear(chunk) for chunk in x.split(2)])


@forward("chunks joined in reverse", MIXED)
def _(net, x):
    return torch.cat([net.linear(chunk) for chunk in reversed(x.split(2))])


@forward("loop over features, stacked back", SIMD)
def _(net, x):
    return net.linear(torch.stack([column.tanh() for column in x.unbind(1)], 1))


@forward("loop over features, stacked along the batch", MIXED)
def _(net, x):
    return net.linear(torch.stack([column.tanh() for column in x.unbind(1)]))


@forward("first feature overwritten in place", SIMD)
def _(net, x):
    h = net.linear(x)
    h[:, 0] = h[:, 1] * 2
    return h


@forward("first sample overwritten in place", INDEXED)
def _(net, x):
    h = net.linear(x)
    h[0] = h[0] * 2
    return h


@forward("first sample overwritten with the second", MIXED)
def _(net, x):
    h = net.linear(x)
    h[0] = h[1]
    return h


@forward("in-place addition of the previous sample", MIXED)
def _(net, x):
    h = net.linear(x)
    h[1:] += h[:-1].clone()
    return h


@forward("in-place addition of the mean", STATISTICS)
def _(net, x):
    h = net.linear(x)
    h += h.mean(0)
    return h


@forward("in-place write through a chain of views", SIMD, SEQUENCE)
def _(net, x):
    h = net.linear(x)
    h.transpose(0, 1)[1].mul_(h[:, 0])
    return h


@forward("in-place write of the mean through a view", STATISTICS)
def _(net, x):
    h = net.linear(x)
    h.t()[2].sub_(h.mean(0)[2].detach())
    return h


@forward("previous sample by as_strided", MIXED, accept_unknown=True)
def _(net, x):
    h = F.pad(net.linear(x), (0, 0, 1, 0)).contiguous()
    return h[1:] + h.as_strided((N, D), (D, 1))
