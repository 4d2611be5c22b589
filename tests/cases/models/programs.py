"""What Python does: control flow, calls, and values that leave the world of tensors."""

import functools

import torch
from torch import nn
from torch.nn import functional as F

from cases.models.table import FLAT, MIXED, SIMD, STATISTICS, D, built, forward, norm


class CentreRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        return x - x.mean(dim, keepdim=True)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(ctx.dim, keepdim=True), None


class SharedGradient(torch.autograd.Function):
    """The identity, with a gradient averaged over the batch."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.mean(0, keepdim=True).expand_as(g)


@forward("custom function over the features", SIMD)
def _(net, x):
    return CentreRows.apply(net.linear(x), 1)


@forward("custom function over the batch", STATISTICS)
def _(net, x):
    return CentreRows.apply(net.linear(x), 0)


@forward("custom function that mixes only in its backward pass", SIMD, accept_unknown=True)
def _(net, x):
    return SharedGradient.apply(net.linear(x))


@forward("vmap over samples", SIMD)
def _(net, x):
    return torch.vmap(lambda row: net.linear(row) / row.norm())(x)


@forward("vmap over features", STATISTICS)
def _(net, x):
    return torch.vmap(lambda column: column - column.mean(), in_dims=1, out_dims=1)(net.linear(x))


@forward("gradient of an energy", SIMD, accept_unknown=True)
def _(net, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(net.linear(x).tanh().square().sum(), x, create_graph=True)[0]


@forward("gradient of an energy with batch norm", STATISTICS, bn=norm(), accept_unknown=True)
def _(net, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(
            net.bn(net.linear(x)).tanh().square().sum(), x, create_graph=True
        )[0]


@forward("gradient of a product of energies", STATISTICS, accept_unknown=True)
def _(net, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(net.linear(x).tanh().square().sum() ** 2, x, create_graph=True)[
            0
        ]


@forward("a weight used twice", SIMD)
def _(net, x):
    return net.linear(net.linear(x).tanh()) @ net.linear.weight


@forward("a detached copy of the input", SIMD)
def _(net, x):
    return net.linear(x) * x.data.abs()


@forward("tied encoder and decoder around batch norm", STATISTICS, bn=norm())
def _(net, x):
    return F.linear(net.bn(net.linear(x)).relu(), net.linear.weight.t())


@built("forward hook that centres over the batch", STATISTICS)
def _():
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    net[0].register_forward_hook(lambda module, inputs, out: out - out.mean(0))
    return net, (torch.randn(FLAT),)


@built("forward hook that only looks", SIMD)
def _():
    seen = {}
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    net[0].register_forward_hook(lambda module, inputs, out: seen.update(mean=out.mean(0)))
    return net, (torch.randn(FLAT),)


@built("forward pre-hook that rolls the batch", MIXED)
def _():
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh())
    net[1].register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, 0),))
    return net, (torch.randn(FLAT),)


@built("a function that normalises the features", SIMD)
def _():
    return functools.partial(F.normalize, dim=1), (torch.randn(FLAT),)


@built("a function that normalises the batch", STATISTICS)
def _():
    return functools.partial(F.normalize, dim=0), (torch.randn(FLAT),)


@built("an object with weights that is no module", SIMD)
def _():
    class Affine:
        def __init__(self):
            self.w, self.b = torch.randn(D, 3), torch.randn(3)

        def __call__(self, x):
            return x @ self.w + self.b

    return Affine(), (torch.randn(FLAT),)
