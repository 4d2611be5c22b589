"""Models that reach other samples by ways of their own: views, shapes, tables, loops, orders."""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import INDEXED, MIXED, SIMD, STATISTICS

N = D = 6


def sums_by_parity(net, x):
    """Statistics of two sets, each used by its own samples."""
    h = net.linear(x).view(3, 2, D)
    return (h - h.mean(0)).view(N, D)


def largest_mean_by_parity(net, x):
    h = net.linear(x).view(3, 2, D)
    return net.linear(x) - h.mean(0).amax(0)


def normalised_means(net, x):
    m = net.linear(x).view(3, 2, D).mean(1)
    m = (m - m.mean(0)) / m.std(0)
    return net.linear(x) - m.repeat_interleave(2, 0)


def attention_over_sets(net, x):
    s = net.linear(x).view(3, 2, D).sum(1)
    return net.linear(x) + ((s @ s.T).softmax(1) @ s).repeat_interleave(2, 0)


def norm_of_set_means(net, x):
    return net.norm(net.linear(x).view(3, 2, D).mean(1)).repeat_interleave(2, 0) + net.linear(x)


def loop_of_pairs(net, x):
    h = net.linear(x)
    return h - sum((a * b) for a, b in itertools.combinations(h.unbind(0), 2))


def loop_of_neighbours(net, x):
    h = net.linear(x)
    return h - sum((a * b) for a, b in itertools.pairwise(h.unbind(0)))


def tree_of_sums(net, x):
    rows = list(net.linear(x).unbind(0))
    while len(rows) > 1:
        rows = [sum(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    return net.linear(x) - rows[0]


def tree_of_means(net, x):
    rows = list(net.linear(x).unbind(0))
    while len(rows) > 1:
        rows = [sum(rows[i : i + 2]) / len(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    return net.linear(x) - rows[0]


def reduced_by_maximum(net, x):
    rows = list(net.linear(x).unbind(0))
    top = rows[0]
    for row in rows[1:]:
        top = torch.maximum(top, row)
    return net.linear(x) - top


def exponential_average(net, x):
    h = net.linear(x)
    average = torch.zeros(D)
    for row in h.unbind(0):
        average = 0.9 * average + 0.1 * row
    return h - average


def sum_from_zeros(net, x):
    h, total = net.linear(x), torch.zeros(D)
    for row in h.unbind(0):
        total = total + row
    return h - total


def sum_into_a_buffer(net, x):
    h, total = net.linear(x), torch.zeros(1, D)
    for i in range(N):
        total[0] += h[i]
    return h - total


def one_row_from_zeros(net, x):
    h, total = net.linear(x), torch.zeros(D)
    for row in h[:1].unbind(0):
        total += row
    return h - total


def weights_by_position(net, x):
    h = net.linear(x)
    return h - torch.linspace(0, 1, N) @ h


def equal_weights(net, x):
    h = net.linear(x)
    return h - torch.full((N,), 0.5) @ h


def mean_by_convolution(net, x):
    h = net.linear(x)
    return h - F.conv1d(h.T[:, None], torch.ones(1, 1, N))[:, 0, 0]


def edge_by_convolution(net, x):
    h = net.linear(x)
    return h - F.conv1d(h.T[:, None], torch.tensor([[[1.0, 0, 0, 0, 0, -1.0]]]))[:, 0, 0]


def alternating_sum(net, x):
    h = net.linear(x)
    return h - (h[::2].sum(0) - h[1::2].sum(0))


def squares_of_halves(net, x):
    h = net.linear(x)
    return h - (h[:3].sum(0).square() + h[3:].sum(0).square())


def product_of_halves(net, x):
    h = net.linear(x)
    return h - h[:3].sum(0) * h[3:].sum(0)


def difference_of_maxima(net, x):
    h = net.linear(x)
    return h - torch.maximum(h[:3].amax(0), h[3:].amax(0))


def sums_stacked_and_maximised(net, x):
    h = net.linear(x)
    return h - torch.stack([h[::2].sum(0), h[1::2].sum(0)]).amax(0)


def sets_in_a_norm(net, x):
    return net.linear(x) - F.instance_norm(x.view(1, 3, 2 * D)).mean(1).view(2, D).mean(0)


def counted_sets(net, x):
    return net.linear(x) * ((x.view(3, 2, D).amax(1) > 1).sum(0))


def fraction_of_all(net, x):
    return net.linear(x) * ((x.view(3, 2, D) > 1).sum(1).sum(0) / N)


table(
    STATISTICS,
    {
        "means by parity": sums_by_parity,
        "sum over all pairs of products": loop_of_pairs,
        "a tree of sums": tree_of_sums,
        "a maximum by reduction": reduced_by_maximum,
        "sum that begins with zeros": sum_from_zeros,
        "sum into a row of zeros": sum_into_a_buffer,
        "weights that are all equal": equal_weights,
        "a mean by convolution": mean_by_convolution,
        "larger of the maxima of halves": difference_of_maxima,
        "fraction of all, by pairs": fraction_of_all,
        "mean of means, twice": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).mean(0).mean(0) * n.linear(x).mean(0)
        ),
        "total of totals by feature": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).sum(1).sum(1, True).sum(0)
        ),
        "maximum of features of maxima": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).amax(1).amax(1).amax(0)
        ),
        "sum of sums in double": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).sum(1).double().sum(0).float()
        ),
        "sum of sums cloned and transposed": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).sum(1).clone().T.contiguous().sum(1)
        ),
        "sum of sums of a matrix product": lambda n, x: (
            n.linear(x) - (n.linear(x).view(3, 2, D).sum(1) @ n.linear.weight).sum(0)
        ),
        "sum of sums, negated and shifted": lambda n, x: (
            n.linear(x) - (2 - n.linear(x).view(3, 2, D).sum(1)).mean(0)
        ),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {
        "largest of two means by parity": largest_mean_by_parity,
        "means of pairs normalised": normalised_means,
        "attention over means of pairs": attention_over_sets,
        "sum of products of neighbours": loop_of_neighbours,
        "a tree of means of uneven sets": tree_of_means,
        "an exponential average": exponential_average,
        "the first row from zeros": one_row_from_zeros,
        "weights by position": weights_by_position,
        "an edge by convolution": edge_by_convolution,
        "an alternating sum": alternating_sum,
        "squares of sums of halves": squares_of_halves,
        "product of sums of halves": product_of_halves,
        "larger of the sums by parity": sums_stacked_and_maximised,
        "counted pairs": counted_sets,
        "minimum of features of maxima": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).amax(1).amin(1).amax(0)
        ),
        "sums in whole numbers": lambda n, x: (
            n.linear(x) - n.linear(x).view(3, 2, D).sum(1).int().sum(0)
        ),
        "rounded sums": lambda n, x: n.linear(x) - n.linear(x).view(3, 2, D).sum(1).round().sum(0),
        "sums divided into a number": lambda n, x: (
            n.linear(x) - (torch.ones(3, 1) / n.linear(x).view(3, 2, D).exp().sum(1)).sum(0)
        ),
        "sums as exponents": lambda n, x: (
            n.linear(x) - (2.0 ** n.linear(x).view(3, 2, D).sum(1)).sum(0)
        ),
        "sums of pairs times sums of pairs": lambda n, x: (
            n.linear(x)
            - torch.einsum("gi,gj->j", n.linear(x).view(3, 2, D).sum(1), x.view(3, 2, D).sum(1))
        ),
        "sums of pairs padded and multiplied": lambda n, x: (
            n.linear(x) - F.pad(n.linear(x).view(3, 2, D).sum(1), (0, 1), value=1.0).prod(1).sum(0)
        ),
        "moments of pairs by var_mean": lambda n, x: (
            n.linear(x) - sum(t.sum(0) for t in torch.var_mean(x.view(3, 2, D), 1))
        ),
        "normal numbers by pairs": lambda n, x: (
            n.linear(x)
            - F.layer_norm(n.linear(x).view(3, 2 * D), (2 * D,)).square().sum(0).sum()
            * n.linear(x).view(3, 2, D).mean(1).tanh().sum(0)
        ),
    },
    accept_unknown=True,
)
table(
    MIXED,
    {"batch norm of means of pairs": norm_of_set_means},
    accept_unknown=True,
    norm=lambda: nn.BatchNorm1d(D),
)
table(
    SIMD,
    {
        "sums of parts of a sample": lambda n, x: (
            n.linear(x) - n.linear(x).view(N, 3, 2).sum(2).exp().amax(1, True)
        ),
        "zeros added": lambda n, x: torch.zeros(D) + n.linear(x) + torch.zeros(N, 1),
    },
)
table(INDEXED, {"zeros but for one": lambda n, x: n.linear(x) + torch.eye(N)})
table(
    MIXED,
    {"an image normalised by parts of the batch": sets_in_a_norm},
    accept_unknown=True,
)
