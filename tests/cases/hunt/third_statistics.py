"""How many numbers pass between samples: ranks of the batch, and sizes of statistics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.hunt.table import table
from cases.models.table import FLAT, SEQUENCE, STATISTICS, Net, linear
from cases.verdicts import nothing

D = N = 6
NO_STATISTICS = ("fails", "fails", "fails")
TAPS = torch.tensor([[[0.25, 0.5, 0.2]]])
QUARTILES = torch.tensor([0.25, 0.5, 0.75])


def ranked(x):
    return x[:, 0].sort().values


def one_by_one(function):
    """A model in which each sample looks at as many numbers as the batch has samples."""

    def forward(net, x):
        each = x[:, :1] - function(ranked(x))[None]
        return net.linear(x) * each.tanh().sum(1, keepdim=True)

    return forward


def rank(net, x):
    return net.linear(x) * torch.searchsorted(ranked(x), x[:, 0].contiguous())[:, None]


def rank_by_buckets(net, x):
    return net.linear(x) * torch.bucketize(x[:, :1], ranked(x))


def sum_up_to_the_own_rank(net, x):
    s = ranked(x)
    place = torch.searchsorted(s, x[:, 0].contiguous()).clamp(max=N - 1)
    return net.linear(x) * s.cumsum(0)[place][:, None]


def normal_scores(net, x):
    """Each feature replaced by the normal quantile of its rank."""
    ranks = torch.searchsorted(x.T.sort(1).values, x.T.contiguous()).T
    return net.linear(torch.special.ndtri((ranks + 0.5) / N))


def cumulated_one_after_the_other(net, x):
    out, sums = net.linear(x), ranked(x).cumsum(0)
    for k in range(N):
        out = out * (x[:, :1] - sums[k]).tanh()
    return out


def between_ranks(net, x):
    image = ranked(x).expand(N, 1, 1, N)
    grid = x[:, None, None, :2]
    return net.linear(x) * F.grid_sample(image, grid, align_corners=False)[:, 0, 0]


def filtered_by_ranks(net, x):
    return net.linear(x) * F.conv1d(x[:, None], ranked(x)[None, None])[:, 0]


def solved_with_ranks(net, x):
    outer = torch.outer(ranked(x), ranked(x)) + torch.eye(N)
    return torch.linalg.solve(outer, net.linear(x).T).T


def sorted_features(function):
    """A model with numbers made of the sorted values of each feature."""
    return lambda net, x: net.linear(x) * function(x.sort(0).values)


def sparse_over_samples(net, x):
    """A sparse softmax over the batch: its threshold is one number for each feature."""
    z = net.linear(x)
    s = z.sort(0, descending=True).values
    total, k = s.cumsum(0), torch.arange(1, N + 1)[:, None]
    support = (1 + k * s > total).sum(0, keepdim=True)
    return (z - (total.gather(0, support - 1) - 1) / support).clamp(min=0)


table(
    NO_STATISTICS,
    {
        "all ranks one by one": one_by_one(lambda s: s),
        "a Lorenz curve": one_by_one(lambda s: s.cumsum(0)),
        "sums of ranks from above": one_by_one(lambda s: s.flip(0).cumsum(0)),
        "spacings of ranks": one_by_one(lambda s: s.diff()),
        "ranks smoothed": one_by_one(lambda s: F.avg_pool1d(s[None], 3, 1, 1)[0]),
        "the spectrum of ranks": one_by_one(lambda s: torch.fft.rfft(s).abs()),
        "ranks summed by logarithms": one_by_one(lambda s: s.logcumsumexp(0)),
        "ranks in a softmax": one_by_one(lambda s: s.softmax(0)),
        "ranks normalised": one_by_one(lambda s: F.layer_norm(s, (N,))),
        "ranks by halves": one_by_one(lambda s: s.view(2, 3).cumsum(1).flatten()),
        "a rank by searching": rank,
        "a rank by buckets": rank_by_buckets,
        "the sum up to the own rank": sum_up_to_the_own_rank,
        "normal scores": normal_scores,
        "sums of ranks one after the other": cumulated_one_after_the_other,
        "ranks convolved": one_by_one(lambda s: F.conv1d(s[None, None], TAPS, padding=1)[0, 0]),
        "ranks resampled": one_by_one(
            lambda s: F.interpolate(s[None, None], size=N, mode="linear")[0, 0]
        ),
        "a factor of ranks": one_by_one(
            lambda s: torch.linalg.cholesky(torch.outer(s, s) + torch.eye(N))[:, 0]
        ),
        "all ranks by topk": one_by_one(lambda s: s.topk(N).values),
        "between ranks": between_ranks,
        "filtered by ranks": filtered_by_ranks,
        "solved with ranks": solved_with_ranks,
        "among ranks": lambda n, x: n.linear(x) * (1 + torch.isin(x[:, :1] + 0, ranked(x))),
        "ranks as weights of a norm": lambda n, x: F.layer_norm(n.linear(x), (N,), ranked(x)),
        "ranks looked up": lambda n, x: (
            n.linear(x) * F.embedding((x[:, 0] > 0).long(), ranked(x)[:, None])
        ),
    },
    accept_unknown=True,
)
table(STATISTICS, {"a sparse softmax over samples": sparse_over_samples}, accept_unknown=True)
table(
    STATISTICS,
    {
        "a Gini coefficient": lambda n, x: (
            n.linear(x) * (ranked(x).cumsum(0).sum() / ranked(x).sum())
        ),
        "Gini coefficients": sorted_features(lambda s: s.cumsum(0).sum(0) / s.sum(0)),
        "the last of a Lorenz curve": sorted_features(lambda s: s.cumsum(0)[-1]),
        "the largest gap between ranks": sorted_features(lambda s: s.diff(dim=0).amax(0)),
        "an L-moment": sorted_features(lambda s: (s * torch.arange(N)[:, None]).mean(0)),
        "a distance to a uniform law": sorted_features(
            lambda s: (s - torch.linspace(-1, 1, N)[:, None]).abs().mean(0)
        ),
        "energy of the spectrum of ranks": lambda n, x: (
            n.linear(x) * torch.fft.rfft(ranked(x)).abs().sum()
        ),
        "the median of smoothed ranks": lambda n, x: (
            n.linear(x) * F.avg_pool1d(ranked(x)[None], 3, 1, 1).median()
        ),
        "medians as buckets": lambda n, x: (
            n.linear(x) * torch.bucketize(x, x.median(0).values.sort().values)
        ),
    },
)


# ---------------------------------------------------------------- how many numbers


@dataclass(frozen=True)
class SizeCase:
    """A model with statistics, and how many numbers of these its samples use."""

    name: str
    forward: Callable[..., Any]
    size: int
    shape: tuple[int, ...] = FLAT

    def found(self) -> int:
        torch.manual_seed(0)
        width = self.shape[-1]
        net = Net(self.forward, {"linear": linear(width, width), "small": linear(width, 2)})
        problem = ub.Problem(net, nothing, ((torch.randn(self.shape),), None))
        return problem.structure.statistics_size


SIZES: list[SizeCase] = []


def sizes(models: dict[str, tuple[Callable[..., Any], int]], shape: tuple[int, ...] = FLAT) -> None:
    for name, (forward, size) in models.items():
        SIZES.append(SizeCase(name, forward, size, shape))


def gram(x: Tensor) -> Tensor:
    return x.T @ x + torch.eye(D)


def triangular(net, x):
    return torch.linalg.solve_triangular(torch.linalg.cholesky(gram(x)), x.T, upper=False).T


def kernel_of_the_batch(net, x):
    kernel = torch.einsum("nct,ndt->cdt", x, x)
    return F.conv1d(x, kernel[:, :, :3])


def image_of_the_batch(net, x):
    image = gram(x).expand(N, 1, D, D)
    grid = x[:, None, None, :2]
    return F.grid_sample(image, grid, align_corners=False)[:, 0, 0]


def labels_of_one_class(net, x):
    y = torch.zeros(N, dtype=torch.int64)
    loss = F.cross_entropy(net.linear(x), y, weight=x.mean(0).exp(), reduction="none")
    return loss[:, None]


sizes(
    {
        "a mean": (lambda n, x: n.linear(x) - x.mean(0), D),
        "a mean and a largest": (lambda n, x: (n.linear(x) - x.mean(0)) / x.amax(0), 2 * D),
        "a number made of a mean": (lambda n, x: n.linear(x) * n.small(x.mean(0)).sum(), 1),
        "two numbers made of a mean": (lambda n, x: n.small(x) * n.small(x.mean(0)), 2),
        "quartiles as buckets": (
            lambda n, x: n.linear(x) * torch.bucketize(x, x[:, 0].quantile(QUARTILES)),
            3,
        ),
        "sorted means as buckets": (
            lambda n, x: n.linear(x) * torch.bucketize(x, x.mean(0).sort().values),
            D,
        ),
        "a matrix that is solved": (
            lambda n, x: torch.linalg.solve(gram(x), n.linear(x).T).T,
            D * D,
        ),
        "a factor that is solved": (
            lambda n, x: torch.cholesky_solve(x.T, torch.linalg.cholesky(gram(x))).T,
            D * D,
        ),
        "a triangle that is solved": (triangular, D * D),
        "a matrix as a table": (lambda n, x: F.embedding((x[:, 0] > 0).long(), gram(x)), D * D),
        "a matrix as an image": (image_of_the_batch, D * D),
        "distances to two prototypes": (
            lambda n, x: torch.cdist(x, torch.stack([x.mean(0), x.amax(0)])),
            2 * D,
        ),
        "weights of classes": (labels_of_one_class, 1),
        "quartiles looked up": (
            lambda n, x: n.linear(x) * x[:, 0].quantile(QUARTILES)[(x > 0).long()],
            3,
        ),
        "quartiles as an image": (
            lambda n, x: F.grid_sample(
                x[:, 0].quantile(QUARTILES).expand(N, 1, 1, 3),
                x[:, None, None, :2],
                align_corners=False,
            )[:, 0, 0],
            3,
        ),
        "a mean of weights of a recurrence": (
            lambda n, x: torch.gru_cell(
                x, x, gram(x).repeat(3, 1), n.linear.weight.repeat(3, 1), None, None
            ),
            D * D,
        ),
        "a mean as weights of a norm": (lambda n, x: F.layer_norm(x, (D,), x.mean(0)), D),
    }
)
sizes({"a kernel with three taps": (kernel_of_the_batch, 4 * 4 * 3)}, (5, 4, 7))
sizes(
    {"a batch norm of sequences": (lambda n, x: nn.BatchNorm1d(4)(x), 2 * 4)},
    SEQUENCE,
)
