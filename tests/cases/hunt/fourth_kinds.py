"""More models of the kinds that the fourth hunt found, each with a cause that has been mended."""

import torch
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import GROUPS, INDEXED, MIXED, SIMD, STATISTICS, weight

D = N = 6


# ---------------------------------------------------------------- what Python reads, by a view


def read_after_two_writes(net, x):
    totals = torch.zeros(2, 2)
    corner = totals[1:, 1:]
    totals[1] = (x.abs() > 3.5).sum()
    totals.t()[1] += 1
    return net.linear(x) * corner.item()


def branch_by_an_older_view(net, x):
    flags = torch.zeros(2, dtype=torch.bool)
    second = flags[1]
    flags.logical_or_((x.abs() > 3.5).any())
    return net.linear(x).relu() if bool(second) else net.linear(x)


table(
    STATISTICS,
    {
        "read after two writes": read_after_two_writes,
        "a branch by an older view": branch_by_an_older_view,
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- the last one stays


def last_stays(net, x):
    place = (x[:, 0].abs() * 300).long().clamp(max=996)
    row = torch.zeros(N, dtype=torch.int64)
    board = torch.zeros(2, 997).index_put((row, place), x[:, 4])
    return net.linear(x) + board.sum()


def written_in_turn(x, values):
    """Two numbers of each sample, at one or two places of its row."""
    rows = torch.arange(N).repeat_interleave(2)
    places = x[:, :2].gt(0).long().flatten()
    return torch.zeros(N, D).index_put((rows, places), values.flatten())


def two_in_turn(net, x):
    return written_in_turn(x, net.linear(x)[:, :2])


def two_in_turns_of_their_own(net, x):
    turns = torch.tensor([[0, 1], [1, 0]] * 3)
    return written_in_turn(x, net.linear(x)[:, :2].gather(1, turns))


table(MIXED, {"the last stays": last_stays}, accept_unknown=True)
table(SIMD, {"two written in turn": two_in_turn}, accept_unknown=True)
table(INDEXED, {"two in turns of their own": two_in_turns_of_their_own}, accept_unknown=True)


# ---------------------------------------------------------------- the largest, in any order


table(
    MIXED,
    {
        "one of the smallest, unsorted": lambda n, x: (
            n.linear(x) - x.topk(3, 0, False, sorted=False).values[-1]
        ),
    },
    (12, D),
    accept_unknown=True,
)
table(
    SIMD,
    {"largest of each, unsorted": lambda n, x: n.linear(x).topk(2, 1, sorted=False).values},
    accept_unknown=True,
)


# ---------------------------------------------------------------- how many statistics


def curved_after_products(net, x):
    """A kernel that is a polynomial: moments of fourth order, and a function of what comes out."""
    return ((x @ x.T).square() @ x.tanh()).relu() + net.linear(x)


def whitened_features(net, x):
    """More numbers than an input has: products of hidden features."""
    h = net.linear(x) @ net.wide
    gram = h @ h.T
    return net.linear(x) + gram @ torch.linalg.solve(gram + torch.eye(len(x)), h.tanh()[:, :D])


table(
    STATISTICS,
    {"curved after products of products": curved_after_products},
    (N, 8),
    accept_unknown=True,
)
table(
    STATISTICS,
    {"a Gram matrix of hidden features": whitened_features},
    accept_unknown=True,
    wide=weight(D, 96),
)
table(
    STATISTICS,
    {
        "cosines of many differences": lambda n, x: n.linear((x[:, None] - x).cos().mean(1)),
        "many curved products": lambda n, x: (x @ x.T @ x.tanh()).relu() + n.linear(x),
    },
    (N, 64),
    accept_unknown=True,
)
table(
    MIXED,
    {
        "attention of many features": lambda n, x: (n.linear(x) @ x.T / 8).softmax(1) @ x,
        "attention of many features, fused": lambda n, x: F.scaled_dot_product_attention(
            n.linear(x)[None], x[None], x[None]
        )[0],
    },
    (N, 64),
)


# ---------------------------------------------------------------- groups that no rule sees


def pooled(x):
    return F.avg_pool1d(x.T[None], 2)[0].T.repeat_interleave(2, 0)


def in_windows_of_two(x, stride):
    """Of two samples beside each other, weighed by which is first."""
    weights = torch.tensor([[[0.3, 0.7]]])
    return F.conv1d(x.T[:, None], weights, stride=stride)[:, 0].T


def first_and_last(net, x):
    """A pair in the middle of samples that are alone."""
    mix = torch.eye(N)
    mix[2:4, 2:4] = 0.5
    return net.linear(x) + mix @ x.tanh()


table(
    GROUPS,
    {
        "a pair among others": first_and_last,
        "smallest of threes by pooling": lambda n, x: (
            n.linear(x) + F.max_pool1d(-x.T[None], 3)[0].T.repeat_interleave(3, 0)
        ),
    },
    accept_unknown=True,
)
table(
    GROUPS,
    {
        "pairs of a large batch by pooling": lambda n, x: n.linear(x) - pooled(x),
        "halves of a large batch by pooling": lambda n, x: (
            n.linear(x) - F.avg_pool1d(x.T[None], 65)[0].T.repeat_interleave(65, 0)
        ),
    },
    (130, D),
    accept_unknown=True,
)
table(
    MIXED,
    {
        "pairs weighed by their places": lambda n, x: (
            n.linear(x) - in_windows_of_two(x, 2).repeat_interleave(2, 0)
        ),
        "sums so far in threes": lambda n, x: n.linear(x) + x.view(2, 3, D).cumsum(1).view(N, D),
        "sums from here on": lambda n, x: n.linear(x) + x.flip(0).cumsum(0).flip(0),
    },
)
table(
    MIXED,
    {
        "windows in a large batch": lambda n, x: (
            n.linear(x) + F.pad(in_windows_of_two(x, 1), (0, 0, 0, 1))
        ),
        "a large batch, rolled": lambda n, x: n.linear(x) + x.roll(1, 0),
    },
    (130, D),
)
