"""Experts and graphs."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.models.table import (
    MIXED,
    SEQUENCE,
    SIMD,
    STATISTICS,
    D,
    N,
    T,
    forward,
    integers,
    linear,
    standardise,
    weight,
)

EXPERTS = {
    "router": linear(D, 3),
    "experts": lambda: nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
}


@forward("mixture of experts, dense", SIMD, **EXPERTS)
def _(net, x):
    outs = torch.stack([expert(x) for expert in net.experts], -1)
    return (outs * net.router(x).softmax(1)[:, None]).sum(-1)


@forward(
    "mixture of experts by sort and unsort",
    SIMD,
    SEQUENCE,
    router=linear(D, 3),
    w=weight(3, D, D),
    accept_unknown=True,
)
def _(net, x):
    tokens = x.flatten(0, 1)
    expert, order = net.router(tokens).argmax(1).sort(stable=True)
    return torch.einsum("td,tdo->to", tokens[order], net.w[expert])[order.argsort()].view_as(x)


GROUPED = {
    "router": linear(D, 3),
    "other": linear(D, 3),
    "w": weight(3, 8, 8),
}  # the kernel wants multiples of four


def _grouped(net, tokens, order, numbers):
    """Rows in an order, each times the matrix of the group that its place falls into; in that
    order.
    """
    ends = torch.histc(numbers.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(F.pad(tokens[order], (0, 8 - D)), net.w, offs=ends)[:, :D]


@forward("mixture of experts by a grouped product, unsorted", SIMD, SEQUENCE, **GROUPED)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = net.router(tokens).argmax(1).sort()
    return _grouped(net, tokens, order, numbers)[order.argsort()].view_as(x)


@forward(
    "mixture of experts by a grouped product, left sorted",
    MIXED,
    SEQUENCE,
    accept_unknown=True,
    **GROUPED,
)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = net.router(tokens).argmax(1).sort()
    return _grouped(net, tokens, order, numbers).view_as(x)


@forward(
    "grouped by the numbers of another router", MIXED, SEQUENCE, accept_unknown=True, **GROUPED
)
def _(net, x):
    tokens = x.flatten(0, 1)
    order = net.router(tokens).argmax(1).sort().indices
    numbers = net.other(tokens).argmax(1).sort().values
    return _grouped(net, tokens, order, numbers)[order.argsort()].view_as(x)


@forward("grouped upwards, sorted downwards", MIXED, SEQUENCE, accept_unknown=True, **GROUPED)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = net.router(tokens).argmax(1).sort(descending=True)
    return _grouped(net, tokens, order, numbers)[order.argsort()].view_as(x)


@forward("grouped by counts that leave one out", MIXED, SEQUENCE, accept_unknown=True, **GROUPED)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = (net.router(tokens).argmax(1) - 1).sort()
    return _grouped(net, tokens, order, numbers)[order.argsort()].view_as(x)


@forward("grouped by counts that weigh", MIXED, SEQUENCE, accept_unknown=True, **GROUPED)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = net.router(tokens).argmax(1).sort()
    weigh = torch.tensor([0.5, 1.5]).repeat(len(numbers) // 2)
    ends = torch.bincount(numbers, weigh, 3).cumsum(0).int()
    ends[-1] = len(numbers)
    return F.grouped_mm(F.pad(tokens[order], (0, 8 - D)), net.w, offs=ends)[
        order.argsort(), :D
    ].view_as(x)


@forward("mixture of experts by masks and index_add", SIMD, accept_unknown=True, **EXPERTS)
def _(net, x):
    chosen, out = net.router(x).argmax(1), torch.zeros_like(x)
    for e, expert in enumerate(net.experts):
        rows = (chosen == e).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(x[rows]))
    return out


@forward("mixture of experts with a capacity", MIXED, **EXPERTS)
def _(net, x):
    member = F.one_hot(net.router(x).argmax(1), 3)
    member = member * (member.cumsum(0) <= 1)
    return sum(member[:, e, None] * expert(x) for e, expert in enumerate(net.experts))


@forward("mixture of experts scaled by their load", STATISTICS, **EXPERTS)
def _(net, x):
    gate = net.router(x).softmax(1)
    return sum(
        gate[:, e, None] / gate[:, e].sum() * expert(x) for e, expert in enumerate(net.experts)
    )


EDGES = torch.tensor([[0, 1, 2, 3, 1], [1, 2, 3, 0, 3]])


def _messages(h, source, target):
    return h + torch.zeros_like(h).index_add(0, target, h[source])


@forward("graph batch with edges inside the graphs", SIMD, SEQUENCE)
def _(net, x):
    source, target = (EDGES[:, None] + T * torch.arange(N)[:, None]).flatten(1)
    h = _messages(net.linear(x).flatten(0, 1), source, target).relu()
    graph = torch.arange(N).repeat_interleave(T)
    return torch.zeros(N, D).index_add(0, graph, h) / T


@forward("graph batch with an edge between graphs", MIXED, SEQUENCE)
def _(net, x):
    source, target = (EDGES[:, None] + T * torch.arange(N)[:, None]).flatten(1)
    h = _messages(
        net.linear(x).flatten(0, 1),
        torch.cat([source, torch.tensor([7])]),
        torch.cat([target, torch.tensor([8])]),
    )
    return h.view(N, T, D).mean(1)


@forward("graph batch with nodes numbered across graphs", MIXED, SEQUENCE)
def _(net, x):
    source, target = (EDGES[:, None] * N + torch.arange(N)[:, None]).flatten(1)
    return _messages(net.linear(x).flatten(0, 1), source, target).view(N, T, D).mean(1)


@forward("graph batch with a dense adjacency per graph", SIMD, SEQUENCE, integers(2, N, T, T))
def _(net, x, adjacency):
    return torch.bmm(adjacency.to(x), net.linear(x)).relu().sum(1)


@forward("graph normalisation over the nodes of the batch", STATISTICS, SEQUENCE)
def _(net, x):
    h = standardise(net.linear(x).flatten(0, 1))
    return h.view(N, T, D).amax(1)
