"""Models whose forward structure is known: what the analyser has to say about each of them.

The truth is about functions, at fixed N, noise and parameters. Predictions carry samples on `out_dim`, inputs
on `in_dims` (one number for all inputs, or one per input, None for an input shared by the batch).
`accept_unknown` marks cases where an honest "unknown" is good enough: control flow in Python, values that
leave the tensor world, permutations that depend on data, structure that only algebra reveals.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

N, D, T, C = 6, 6, 4, 3  # as many samples as features: nothing can be told by size alone

FLAT = (N, D)
SEQUENCE = (N, T, D)
CUBE = (N, N, D)  # N == T == D
IMAGE = (N, C, 6, 6)
ODD = (5, 8)
ODD_SEQUENCE = (5, 3, 8)
SHUFFLED = [2, 0, 3, 5, 1, 4]


@dataclass(frozen=True)
class ModelCase:
    name: str
    build: Callable[[], tuple[Callable, tuple]]
    independent: str
    simd: str
    given: str
    accept_unknown: bool = False
    in_dims: Any = 0
    out_dim: int = 0


SIMD = ("holds", "holds", "holds")
INDEXED = ("holds", "fails", "fails")
STATISTICS = ("fails", "fails", "holds")
GROUPS = STATISTICS  # holds given statistics of groups
MIXED = ("fails", "fails", "fails")

MODELS: list[ModelCase] = []


class Net(nn.Module):
    """Parts under their names, and a plain function `forward(net, *inputs)`."""

    def __init__(self, forward, parts):
        super().__init__()
        for name, make in parts.items():
            setattr(self, name, make())
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


def built(name, truth, **options):
    """A case from a function that returns `(model, inputs)`."""

    def register(build):
        MODELS.append(ModelCase(name, build, *truth, **options))
        return build

    return register


def layers(name, truth, shape, *makers, train=True):
    """A case from layers in a row."""
    built(name, truth)(lambda: (nn.Sequential(*(make() for make in makers)).train(train), (torch.randn(shape),)))


def forward(name, truth, *inputs, train=True, accept_unknown=False, in_dims=0, out_dim=0, **parts):
    """A case from a forward function; inputs are shapes or makers, `net.linear` is there unless given."""
    inputs = inputs or (FLAT,)

    def register(function):
        def build():
            made = tuple(i() if callable(i) else torch.randn(i) for i in inputs)
            width = made[0].shape[-1]
            net = Net(function, {"linear": lambda: nn.Linear(width, width), **parts})
            return net.train(train), made

        return built(name, truth, accept_unknown=accept_unknown, in_dims=in_dims, out_dim=out_dim)(build)

    return register


def linear(i=D, o=D, **options):
    return lambda: nn.Linear(i, o, **options)


def conv(i=C, o=4, **options):
    return lambda: nn.Conv2d(i, o, 3, **options)


def norm(width=D, **options):
    return lambda: nn.BatchNorm1d(width, **options)


def weight(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


def integers(high, *shape):
    return lambda: torch.randint(high, shape)


def standardise(h, dim=0):
    return (h - h.mean(dim, keepdim=True)) / h.std(dim, keepdim=True)


# ---------------------------------------------------------------- batch norm, by layer

layers("batch norm 2d", STATISTICS, IMAGE, conv(), lambda: nn.BatchNorm2d(4), nn.ReLU, nn.Flatten, linear(64, 3))
layers("batch norm 2d in eval", SIMD, IMAGE, conv(), lambda: nn.BatchNorm2d(4), nn.ReLU, train=False)
layers("batch norm 1d", STATISTICS, FLAT, linear(), norm(), nn.Tanh, linear())
layers("batch norm 1d, batch of five", STATISTICS, ODD, linear(8, 8), norm(8), nn.Tanh, linear(8, 3))
layers("batch norm 1d in eval", SIMD, FLAT, linear(), norm(), train=False)
layers("batch norm 1d over sequences", STATISTICS, SEQUENCE, norm(T), linear())
layers(
    "batch norm 3d",
    STATISTICS,
    (N, 2, 3, 4, 4),
    lambda: nn.Conv3d(2, 3, 2),
    lambda: nn.BatchNorm3d(3),
    nn.Flatten,
)
layers("batch norm 3d in eval", SIMD, (N, 2, 3, 4, 4), lambda: nn.BatchNorm3d(2), nn.Flatten, train=False)
layers("two batch norms", STATISTICS, FLAT, linear(), norm(), nn.ReLU, linear(), norm(), linear())
layers("batch norm without affine part", STATISTICS, FLAT, linear(), norm(affine=False))
layers(
    "batch norm without running statistics, in eval",
    STATISTICS,
    FLAT,
    norm(track_running_stats=False),
    train=False,
)
layers("batch norm with a cumulative average", STATISTICS, FLAT, linear(), norm(momentum=None))
layers("dropout, then batch norm", STATISTICS, FLAT, linear(), nn.Dropout, norm())


class FrozenNorm(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


class LayerNormByName(nn.BatchNorm1d):
    """Called a layer norm, is a batch norm."""

    def forward(self, x):
        return x + super().forward(x)


class BatchNormByName(nn.LayerNorm):
    """Called a batch norm, is a layer norm."""


class RunningCentre(nn.Module):
    """Centres by a running mean, updated before or after it is used, in place or by reassignment."""

    def __init__(self, before, in_place):
        super().__init__()
        self.before, self.in_place = before, in_place
        self.register_buffer("running", torch.zeros(D))

    def update(self, x):
        mean = x.detach().mean(0)
        if self.in_place:
            self.running.lerp_(mean, 0.1)
        else:
            self.running = 0.9 * self.running + 0.1 * mean

    def forward(self, x):
        if self.before:
            self.update(x)
            return x - self.running
        out = x - self.running
        self.update(x)
        return out


layers("batch norm frozen while the model trains", SIMD, FLAT, linear(), lambda: FrozenNorm(D))
layers("subclass of batch norm under another name", STATISTICS, FLAT, linear(), lambda: LayerNormByName(D))
layers("layer norm under the name of batch norm", SIMD, FLAT, linear(), lambda: BatchNormByName(D))
layers("running mean updated in place, then used", STATISTICS, FLAT, linear(), lambda: RunningCentre(True, True))
layers("running mean reassigned, then used", STATISTICS, FLAT, linear(), lambda: RunningCentre(True, False))
layers("running mean used, then updated in place", SIMD, FLAT, linear(), lambda: RunningCentre(False, True))
layers("running mean used, then reassigned", SIMD, FLAT, linear(), lambda: RunningCentre(False, False))


@forward("functional batch norm that always trains, model in eval", STATISTICS, train=False)
def _(net, x):
    return F.batch_norm(net.linear(x), None, None, training=True)


@forward(
    "functional batch norm that never trains, model in train",
    SIMD,
    mean=lambda: torch.randn(D),
    var=lambda: torch.rand(D) + 1,
)
def _(net, x):
    return F.batch_norm(net.linear(x), net.mean, net.var, training=False)


@forward("batch norm of frames merged into the sample axis", STATISTICS, SEQUENCE, bn=norm())
def _(net, x):
    return net.bn(net.linear(x).flatten(0, 1)).view_as(x).mean(1)


@forward("batch norm of features of a sequence", STATISTICS, SEQUENCE, bn=norm())
def _(net, x):
    return net.bn(net.linear(x).transpose(1, 2)).transpose(1, 2)


@forward(
    "residual block with batch norms",
    STATISTICS,
    IMAGE,
    a=conv(C, C, padding=1),
    bn=lambda: nn.BatchNorm2d(C),
)
def _(net, x):
    return (x + net.bn(net.a(x))).relu().mean((2, 3))


@forward("batch norm of the transposed batch, a layer norm", SIMD)
def _(net, x):
    return F.batch_norm(net.linear(x).t(), None, None, training=True).t()


@forward("batch norm with samples as channels, an instance norm", SIMD, IMAGE, conv=conv())
def _(net, x):
    h = net.conv(x)
    return F.batch_norm(h.reshape(1, -1, *h.shape[2:]), None, None, training=True).view_as(h)


@forward("batch norm with samples as channels and an affine part", INDEXED, scale=weight(N), shift=weight(N))
def _(net, x):
    return F.batch_norm(net.linear(x).t(), None, None, net.scale, net.shift, training=True).t()


@forward("batch norm scaled by the index of the sample", MIXED, bn=norm())
def _(net, x):
    return net.bn(net.linear(x)) * torch.arange(1.0, len(x) + 1)[:, None]


@forward("batch norm under checkpointing", STATISTICS, bn=norm())
def _(net, x):
    return checkpoint(lambda h: net.bn(net.linear(h)), x, use_reentrant=False)


@forward(
    "batch renormalisation",
    STATISTICS,
    running_mean=lambda: torch.zeros(D),
    running_std=lambda: torch.ones(D),
)
def _(net, x):
    h = net.linear(x)
    mean, std = h.mean(0), h.std(0)
    r = (std / net.running_std).detach().clamp(1 / 3, 3)
    d = ((mean - net.running_mean) / net.running_std).detach().clamp(-5, 5)
    return (h - mean) / std * r + d


# ---------------------------------------------------------------- other normalisations

layers("instance norm", SIMD, IMAGE, conv(), lambda: nn.InstanceNorm2d(4, affine=True))
layers(
    "instance norm with running statistics",
    SIMD,
    IMAGE,
    lambda: nn.InstanceNorm2d(C, track_running_stats=True),
)
layers("instance norm in eval", SIMD, IMAGE, lambda: nn.InstanceNorm2d(C, track_running_stats=True), train=False)
layers(
    "instance norm of an unbatched signal, samples as channels",
    SIMD,
    FLAT,
    linear(),
    lambda: nn.InstanceNorm1d(N),
)
layers("layer norm", SIMD, SEQUENCE, linear(), lambda: nn.LayerNorm(D))
layers("layer norm over time and features", SIMD, SEQUENCE, linear(), lambda: nn.LayerNorm((T, D)))
layers(
    "layer norm over the whole batch",
    STATISTICS,
    FLAT,
    linear(),
    lambda: nn.LayerNorm(FLAT, elementwise_affine=False),
)
layers("group norm", SIMD, IMAGE, conv(), lambda: nn.GroupNorm(2, 4))
layers("RMS norm", SIMD, SEQUENCE, linear(), lambda: nn.RMSNorm(D))
layers("local response norm", SIMD, IMAGE, conv(), lambda: nn.LocalResponseNorm(2))
layers("weight norm", SIMD, FLAT, lambda: parametrizations.weight_norm(nn.Linear(D, D)), nn.Tanh)
layers(
    "spectral norm with its power iteration",
    SIMD,
    FLAT,
    lambda: parametrizations.spectral_norm(nn.Linear(D, D)),
)
layers("orthogonal weight", SIMD, FLAT, lambda: parametrizations.orthogonal(nn.Linear(D, D)))


@forward("weight standardisation through functional batch norm", SIMD, IMAGE, conv=conv())
def _(net, x):
    w = net.conv.weight
    return F.conv2d(x, F.batch_norm(w.view(1, len(w), -1), None, None, training=True).view_as(w), net.conv.bias)


@forward("layer norm of the transposed batch, a batch norm", STATISTICS)
def _(net, x):
    return F.layer_norm(net.linear(x).t(), (len(x),)).t()


@forward("instance norm of the transposed batch, a batch norm", STATISTICS)
def _(net, x):
    return F.instance_norm(net.linear(x).t()[None])[0].t()


@forward("virtual batch norm with a stored reference batch", SIMD, reference=weight(N, D))
def _(net, x):
    ref = net.linear(net.reference)
    return (net.linear(x) - ref.mean(0)) / ref.std(0)


@forward("virtual batch norm with the first half as the reference", MIXED)
def _(net, x):
    h = net.linear(x)
    return (h - h[:3].mean(0)) / h[:3].std(0)


# ---------------------------------------------------------------- statistics by hand


@forward("mean and std by hand", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return (h - h.mean(0)) / h.std(0)


@forward("mean and std by hand, batch of five", STATISTICS, ODD)
def _(net, x):
    h = net.linear(x)
    return (h - h.mean(0)) / h.std(0)


@forward("mean and std over features by hand", SIMD)
def _(net, x):
    return standardise(net.linear(x), 1)


@forward("var_mean by hand", STATISTICS)
def _(net, x):
    h = net.linear(x)
    var, mean = torch.var_mean(h, 0)
    return (h - mean) * torch.rsqrt(var + 1e-5)


@forward("mean by einsum with ones", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - torch.einsum("n,nd->d", torch.ones(len(x)), h) / len(x)


@forward("mean by matmul with ones", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - torch.ones(1, len(x)) @ h / len(x)


@forward("mean by bmm with ones", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - torch.bmm(torch.full((1, 1, len(x)), 1 / len(x)), h[None])[0]


@forward("mean by sums and divisions", STATISTICS)
def _(net, x):
    h = net.linear(x)
    mean = h.sum(0) / len(x)
    return (h - mean) / ((h * h).sum(0) / len(x) - mean * mean + 1e-3).sqrt()


@forward("mean by Python's sum over rows", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - sum(h) / len(h)


@forward("mean by pooling over the batch", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - F.avg_pool1d(h.t()[None], len(h))[0].t()


@forward("mean by the centring matrix", STATISTICS, accept_unknown=True)
def _(net, x):
    n = len(x)
    return (torch.eye(n) - torch.full((n, n), 1 / n)) @ net.linear(x)


@forward("weighted mean with weights by index", MIXED)
def _(net, x):
    h = net.linear(x)
    return h - torch.arange(1.0, len(x) + 1) @ h / 21


@forward("mean weighted by the samples' own scores", STATISTICS, score=linear(D, 1))
def _(net, x):
    return x - (net.score(x).softmax(0) * net.linear(x)).sum(0)


@forward("mean of all other samples", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - (h.sum(0) - h) / (len(x) - 1)


@forward("detached statistics", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return (h - h.mean(0).detach()) / h.std(0).detach()


@forward("statistics of .data", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.data.mean(0)


@forward("statistics under no_grad", STATISTICS)
def _(net, x):
    h = net.linear(x)
    with torch.no_grad():
        mean, std = h.mean(0), h.std(0)
    return (h - mean) / std


@forward("statistic through item()", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / h.detach().abs().mean().item()


@forward("statistic through float()", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - float(h.detach().mean())


@forward("statistic through numpy", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - torch.from_numpy(h.detach().numpy().mean(0))


@forward("statistic through tolist()", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h - torch.tensor(h.detach().mean(0).tolist())


@forward("statistic through an attribute of the module", STATISTICS)
def _(net, x):
    h = net.linear(x)
    net.centre = h.detach().mean(0)
    return torch.tanh(h) - net.centre


@forward("statistic through an attribute that holds a float", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    net.scale = float(h.detach().abs().max())
    return h / net.scale


@forward("statistic through the size of a selection", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / (1 + h[h > 0].numel())


@forward("own value through numpy", SIMD, accept_unknown=True)
def _(net, x):
    return net.linear(torch.from_numpy(np.tanh(x.numpy())))


@forward("own value through item()", SIMD, accept_unknown=True)
def _(net, x):
    return torch.stack([net.linear(row) * row.abs().max().item() for row in x])


@forward("every prediction is the batch mean", STATISTICS)
def _(net, x):
    return net.linear(x).mean(0).expand(len(x), -1)


@forward("scaled by the largest entry of the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h / h.abs().max()


@forward("quantised with the range of the batch, straight through", STATISTICS)
def _(net, x):
    h = net.linear(x)
    step = h.abs().amax().detach() / 7
    return h + ((h / step).round() * step - h).detach()


@forward("normalised along the batch", STATISTICS)
def _(net, x):
    return F.normalize(net.linear(x), dim=0)


@forward("normalised along the features", SIMD)
def _(net, x):
    return F.normalize(net.linear(x), dim=1)


@forward("median over the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.median(0).values


@forward("logsumexp over the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.logsumexp(0)


@forward("softmax over the batch", STATISTICS)
def _(net, x):
    return net.linear(x).softmax(0)


@forward("softmax with a default axis by position", SIMD)
def _(net, x):
    return net.linear(x).softmax(-1)


@forward("quantiles over the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    low, high = h.quantile(torch.tensor([0.25, 0.75]), 0)
    return (h - low) / (high - low)


@forward("third largest of the batch as a threshold", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h * (h >= h.topk(3, 0).values[-1])


@forward("mean of the three largest of the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h - h.topk(3, 0).values.mean(0)


@forward("the sample of largest norm, as a prototype", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * h[h.norm(dim=1).argmax()]


@forward("the first sample, as a prototype", MIXED)
def _(net, x):
    h = net.linear(x)
    return h - h[0]


@forward("statistics of statistics", STATISTICS)
def _(net, x):
    h = net.linear(x)
    mean = h.mean(0)
    return h - (mean - mean.mean()) / mean.std()


@forward("gate computed from a statistic by a layer", STATISTICS, gate=linear())
def _(net, x):
    h = net.linear(x)
    return h * net.gate(h.mean(0)).sigmoid()


@forward("a weight computed from a statistic", STATISTICS)
def _(net, x):
    return F.linear(net.linear(x), x.t() @ x / len(x))


@forward("statistic of another input", STATISTICS, FLAT, FLAT)
def _(net, x, y):
    return net.linear(x) + y.mean(0)


@forward("minibatch standard deviation", STATISTICS, head=linear(D + 1, D))
def _(net, x):
    return net.head(torch.cat([x, x.std(0).mean().expand(len(x), 1)], 1))


@forward("minibatch standard deviation of groups", GROUPS, IMAGE, conv=conv(C + 1))
def _(net, x):
    spread = x.view(2, 3, *x.shape[1:]).std(1).mean((1, 2, 3))
    plane = spread.repeat_interleave(3).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return net.conv(torch.cat([x, plane], 1)).mean((2, 3))


@forward("noise scaled by the spread of the batch", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h + 0.1 * torch.randn_like(h) * h.std(0)


@forward("class means by one-hot matmul", STATISTICS, router=linear(D, 3))
def _(net, x):
    member = F.one_hot(net.router(x).argmax(1), 3).to(x)
    return x - member @ ((member.t() @ x) / (1 + member.sum(0)[:, None]))


@forward("class means by index_add", STATISTICS, router=linear(D, 3), accept_unknown=True)
def _(net, x):
    owner = net.router(x).argmax(1)
    return x - torch.zeros(3, x.shape[1]).index_add(0, owner, net.linear(x))[owner]


@forward("class frequencies by bincount", STATISTICS, FLAT, integers(4, N), accept_unknown=True)
def _(net, x, label):
    return net.linear(x) / torch.bincount(label, minlength=4)[label][:, None]


@forward("histogram of the batch", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * torch.histc(h.detach(), 6, -3, 3)


@forward("one k-means step on a codebook, then assignment", STATISTICS, codebook=weight(3, D), accept_unknown=True)
def _(net, x):
    member = F.one_hot(torch.cdist(x, net.codebook).argmin(1), 3).to(x)
    codebook = 0.5 * net.codebook + 0.5 * member.t() @ x
    return net.linear(x) + codebook[torch.cdist(x, codebook).argmin(1)]


@forward("cross-correlation of features", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return torch.einsum("nk,dk->nd", h, torch.einsum("nd,nk->dk", h, x))


@forward("linear attention over the batch, state first", STATISTICS, key=linear(), value=linear())
def _(net, x):
    return net.linear(x) @ (net.key(x).t() @ net.value(x))


@forward(
    "linear attention over the batch, scores first",
    STATISTICS,
    key=linear(),
    value=linear(),
    accept_unknown=True,
)
def _(net, x):
    return (net.linear(x) @ net.key(x).t()) @ net.value(x)


@forward("mean squared distance to all samples, by pairs", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h * (h[:, None] - h[None]).square().sum(-1).mean(1)[:, None]


@forward("whitening by Cholesky", STATISTICS, (7, 3))
def _(net, x):
    h = net.linear(x)
    h = h - h.mean(0)
    factor = torch.linalg.cholesky(h.t() @ h / len(h) + 0.1 * torch.eye(h.shape[1]))
    return torch.linalg.solve_triangular(factor, h.t(), upper=False).t()


@forward("whitening by eigenvectors", STATISTICS, (7, 3))
def _(net, x):
    h = net.linear(x)
    values, vectors = torch.linalg.eigh(torch.cov(h.t()) + 0.1 * torch.eye(h.shape[1]))
    return (h - h.mean(0)) @ vectors * values.rsqrt() @ vectors.t()


@forward("ridge regression on the batch", STATISTICS, FLAT, (N, 2))
def _(net, x, y):
    h = net.linear(x)
    return h @ torch.linalg.solve(h.t() @ h + torch.eye(D), h.t() @ y)


@forward("kernel ridge regression on the batch", MIXED, FLAT, (N, 2))
def _(net, x, y):
    kernel = (-torch.cdist(x, x)).exp()
    return kernel @ torch.linalg.solve(kernel + torch.eye(len(x)), y)


@forward("statistic that a rare torch.where lets through", STATISTICS)
def _(net, x):
    h = net.linear(x)
    mean = h.mean(0)
    return torch.where(mean > 50, mean, h)


@forward("statistic in a clamp that rarely acts", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return torch.minimum(h, 50 + h.std(0))


@forward("an if on a batch statistic that rarely fires", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / 2 if h.abs().max() > 50 else h


@forward("an if on a batch statistic that often fires", STATISTICS, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h / 2 if h.mean() > 0 else h


@forward("gradient norm style clipping of activations", STATISTICS)
def _(net, x):
    h = net.linear(x)
    return h * (1 / h.norm()).clamp(max=1.0)


@forward("raise on a batch statistic", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    if not torch.isfinite(h).all():
        raise ValueError("not finite")
    return h


@forward("assert on a batch statistic", SIMD, accept_unknown=True)
def _(net, x):
    assert x.abs().max() < 1e6
    return net.linear(x)


@forward("an if on the sample's own value", SIMD, accept_unknown=True)
def _(net, x):
    return torch.stack([net.linear(row) if row.sum() > 0 else -row for row in x])


@forward("fixed point iterated until the whole batch has converged", STATISTICS, accept_unknown=True)
def _(net, x):
    w, z = 0.4 * F.normalize(net.linear.weight, dim=None), torch.zeros_like(x)
    while True:
        new = torch.tanh(z @ w.t() + x)
        if (new - z).abs().max() < 0.02:
            return new
        z = new


@forward("fixed point iterated five times", SIMD)
def _(net, x):
    z = torch.zeros_like(x)
    for _ in range(5):
        z = torch.tanh(net.linear(z) + x)
    return z


@forward("a statistic times zero", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return h + 0 * h.mean(0)


@forward("a statistic that softmax cancels", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return (h + h.mean()).softmax(1)


@forward("a scale of the batch that normalisation cancels", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    return F.normalize(h / h.norm(), dim=1, eps=0)


@forward("a mean subtracted and added back", SIMD, accept_unknown=True)
def _(net, x):
    h = net.linear(x)
    mean = h.mean(0)
    return (h - mean) + mean


# ---------------------------------------------------------------- statistics of groups


@forward("ghost batch norm by chunks", GROUPS, bn=norm())
def _(net, x):
    return torch.cat([net.bn(chunk) for chunk in net.linear(x).chunk(2)])


@forward("ghost batch norm by a view", GROUPS)
def _(net, x):
    return standardise(net.linear(x).view(2, 3, D), 1).view(N, D)


@forward("ghost batch norm of interleaved groups", GROUPS)
def _(net, x):
    return standardise(net.linear(x).view(3, 2, D), 0).view(N, D)


@forward("ghost batch norm through functional batch norm", GROUPS)
def _(net, x):
    h = net.linear(x).view(2, 3, D).transpose(1, 2).reshape(1, 2 * D, 3)
    return F.batch_norm(h, None, None, training=True).view(2, D, 3).transpose(1, 2).reshape(N, D)


@forward("ghost batch norm with one group", STATISTICS)
def _(net, x):
    return standardise(net.linear(x).view(1, N, D), 1).view(N, D)


@forward("ghost batch norm with groups of one", SIMD)
def _(net, x):
    h = net.linear(x)
    return h / (1 + h.view(N, 1, D).mean(1).abs())


@forward("groups that take their neighbours' statistics", MIXED, accept_unknown=True)
def _(net, x):
    h = net.linear(x).view(2, 3, D)
    return (h - h.mean(1, keepdim=True).flip(0)).view(N, D)


# ---------------------------------------------------------------- merging and splitting the sample axis


@forward("frames merged into the sample axis and split back", SIMD, (N, T, C, 5, 5), conv=conv())
def _(net, x):
    return net.conv(x.flatten(0, 1)).relu().flatten(1).view(N, T, -1).mean(1)


@forward("frames merged, split back in the wrong order", MIXED, (N, T, C, 5, 5), conv=conv())
def _(net, x):
    return net.conv(x.flatten(0, 1)).relu().flatten(1).view(T, N, -1).mean(0)


@forward("frames merged time first and split back time first", SIMD, ODD_SEQUENCE)
def _(net, x):
    return net.linear(x.transpose(0, 1).reshape(15, 8)).view(3, 5, 8).sum(0)


@forward("frames merged time first, split back samples first", MIXED, ODD_SEQUENCE)
def _(net, x):
    return net.linear(x.transpose(0, 1).reshape(15, 8)).view(5, 3, 8).sum(1)


@forward("transposed by a reshape, then mean over time", MIXED, SEQUENCE)
def _(net, x):
    return net.linear(x).reshape(T, N, D).mean(0)


@forward("cube merged and split back", SIMD, CUBE)
def _(net, x):
    return net.linear(x.view(-1, D)).view(N, N, D).mean(1)


@forward("cube merged, split and reduced over the wrong axis", MIXED, CUBE)
def _(net, x):
    return net.linear(x.view(-1, D)).view(N, N, D).mean(0)


@forward("cube transposed, reduced over the time axis", SIMD, CUBE)
def _(net, x):
    return net.linear(x.transpose(0, 1)).mean(0)


@forward("transposed and back", SIMD)
def _(net, x):
    return (net.linear.weight @ x.t()).tanh().t()


@forward("transposed and not back", MIXED)
def _(net, x):
    return net.linear(x).t()


@forward("permuted and back", SIMD, CUBE)
def _(net, x):
    return net.linear(x.permute(2, 0, 1)).permute(1, 2, 0)


@forward("permuted and back to another place", MIXED, CUBE)
def _(net, x):
    return net.linear(x.permute(2, 0, 1)).permute(2, 0, 1)


@forward("flipped and flipped back", SIMD)
def _(net, x):
    return net.linear(x.flip(0)).tanh().flip(0)


@forward("flipped along the batch", MIXED)
def _(net, x):
    return net.linear(x).flip(0)


@forward("flipped along the features", SIMD)
def _(net, x):
    return net.linear(x).flip(1)


@forward("blended with the next sample", MIXED)
def _(net, x):
    return net.linear(0.7 * x + 0.3 * x.roll(1, 0))


@forward("rolled and rolled back", SIMD)
def _(net, x):
    return net.linear(x.roll(2, 0)).tanh().roll(-2, 0)


@forward("rolled all the way round", SIMD)
def _(net, x):
    return net.linear(x).roll(len(x), 0)


@forward("rolled without an axis", MIXED)
def _(net, x):
    return net.linear(x).roll(1)


@forward("fixed permutation of the samples", MIXED)
def _(net, x):
    return net.linear(x)[SHUFFLED]


@forward("fixed permutation of the samples, undone", SIMD)
def _(net, x):
    order = torch.tensor(SHUFFLED)
    return net.linear(x[order]).tanh()[order.argsort()]


@forward("fixed permutation of the samples, applied twice", MIXED)
def _(net, x):
    return net.linear(x[SHUFFLED]).tanh()[SHUFFLED]


@forward("random permutation of the samples, undone", SIMD)
def _(net, x):
    order = torch.randperm(len(x))
    return net.linear(x[order]).tanh()[torch.argsort(order)]


@forward("random permutation of the samples, undone by indexed assignment", SIMD)
def _(net, x):
    order = torch.randperm(len(x))
    out = torch.empty_like(x)
    out[order] = net.linear(x[order])
    return out


@forward("sorted by a score, processed, unsorted", SIMD, score=linear(D, 1), accept_unknown=True)
def _(net, x):
    order = net.score(x)[:, 0].argsort()
    return net.linear(x[order]).tanh()[order.argsort()]


@forward("sorted by a score, processed, left sorted", MIXED, score=linear(D, 1))
def _(net, x):
    return net.linear(x[net.score(x)[:, 0].argsort()])


@forward("halves swapped and swapped back", SIMD)
def _(net, x):
    h = net.linear(torch.cat([x[3:], x[:3]])).tanh()
    return torch.cat([h[3:], h[:3]])


@forward("two views of each sample, concatenated along the batch", SIMD)
def _(net, x):
    a, b = net.linear(torch.cat([x, x.flip(1)])).tanh().chunk(2)
    return a + b


@forward("two views of each sample through one batch norm", STATISTICS, bn=norm())
def _(net, x):
    a, b = net.bn(net.linear(torch.cat([x, x.flip(1)]))).chunk(2)
    return a * b


@forward("beams by repeat, split as beams first", SIMD)
def _(net, x):
    return (
        (net.linear(x.repeat(2, 1)) + torch.tensor([[0.0], [1.0]]).repeat_interleave(N, 0)).tanh().view(2, N, D).sum(0)
    )


@forward("beams by repeat, split as samples first", MIXED)
def _(net, x):
    return net.linear(x.repeat(2, 1)).view(N, 2, D).sum(1)


@forward("beams by repeat_interleave, split as samples first", SIMD)
def _(net, x):
    return net.linear(x.repeat_interleave(2, 0)).view(N, 2, D).sum(1)


@forward("beams by repeat_interleave, split as beams first", MIXED)
def _(net, x):
    return net.linear(x.repeat_interleave(2, 0)).view(2, N, D).sum(0)


@forward("diagonal of the merged axes", SIMD, CUBE)
def _(net, x):
    return net.linear(x).diagonal(dim1=1, dim2=2)


@forward("diagonal across samples and time", INDEXED, CUBE)
def _(net, x):
    return net.linear(x).diagonal(dim1=0, dim2=1).t()


# ---------------------------------------------------------------- loops, slices, in-place writes


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


# ---------------------------------------------------------------- recurrence and attention

for cell in (nn.LSTM, nn.GRU):
    kind = cell.__name__

    @forward(f"{kind}, batch first", SIMD, SEQUENCE, rnn=functools.partial(cell, D, D, batch_first=True))
    def _(net, x):
        return net.rnn(x)[0]

    @forward(f"{kind} that takes samples for time steps", MIXED, SEQUENCE, rnn=functools.partial(cell, D, D))
    def _(net, x):
        return net.rnn(x)[0]

    @forward(f"{kind} that takes samples for time steps, cube", MIXED, CUBE, rnn=functools.partial(cell, D, D))
    def _(net, x):
        return net.rnn(x)[0].mean(1)

    @forward(f"{kind}, time-major", SIMD, (T, N, D), rnn=functools.partial(cell, D, D), in_dims=1, out_dim=1)
    def _(net, x):
        return net.rnn(x)[0]


@forward("LSTM, unbatched, samples as time steps", MIXED, rnn=lambda: nn.LSTM(D, D))
def _(net, x):
    return net.rnn(x)[0]


@forward("LSTM, time-major, last state", SIMD, (T, N, D), rnn=lambda: nn.LSTM(D, D), in_dims=1)
def _(net, x):
    return net.rnn(x)[1][0][-1]


@forward(
    "GRU of two layers, states split in the wrong order",
    MIXED,
    SEQUENCE,
    rnn=lambda: nn.GRU(D, D, 2, batch_first=True),
)
def _(net, x):
    return net.rnn(x)[1].view(len(x), -1)


@forward(
    "GRU of two layers, states transposed first",
    SIMD,
    SEQUENCE,
    rnn=lambda: nn.GRU(D, D, 2, batch_first=True),
)
def _(net, x):
    return net.rnn(x)[1].transpose(0, 1).reshape(len(x), -1)


@forward("bidirectional LSTM", SIMD, SEQUENCE, rnn=lambda: nn.LSTM(D, 3, bidirectional=True, batch_first=True))
def _(net, x):
    return net.rnn(x)[0].amax(1)


@forward("LSTM cell in a loop over time", SIMD, SEQUENCE, cell=lambda: nn.LSTMCell(D, D))
def _(net, x):
    state = None
    for t in range(T):
        state = net.cell(x[:, t], state)
    return state[0]


@forward("GRU cell in a loop over samples", MIXED, SEQUENCE, cell=lambda: nn.GRUCell(D, D))
def _(net, x):
    state, out = None, []
    for row in x:
        state = net.cell(row, state)
        out.append(state)
    return torch.stack(out)


@forward(
    "LSTM over packed sequences",
    SIMD,
    SEQUENCE,
    integers(T, N),
    rnn=lambda: nn.LSTM(D, D),
    accept_unknown=True,
)
def _(net, x, lengths):
    packed = pack_padded_sequence(x, lengths + 1, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(net.rnn(packed)[0], batch_first=True, total_length=T)[0]


@forward("time-major mean over time", SIMD, (T, N, D), in_dims=1)
def _(net, x):
    return net.linear(x).mean(0)


@forward("time-major mean over samples", MIXED, CUBE, in_dims=1)
def _(net, x):
    return net.linear(x).mean(1)


@forward("time-major batch norm", STATISTICS, (T, N, D), bn=norm(), in_dims=1, out_dim=1)
def _(net, x):
    return net.bn(net.linear(x).permute(1, 2, 0)).permute(2, 0, 1)


@forward("time-major sequence beside a flat input", SIMD, FLAT, (T, N, D), in_dims=(0, 1))
def _(net, x, sequence):
    return net.linear(x) * sequence.mean(0)


@forward("cross-attention to an input shared by the batch", SIMD, SEQUENCE, (N, D), in_dims=(0, None))
def _(net, x, memory):
    return (net.linear(x) @ memory.t()).softmax(-1) @ memory


attention = functools.partial(nn.MultiheadAttention, D, 2)


@forward("multi-head attention, batch first", SIMD, SEQUENCE, attend=lambda: attention(batch_first=True))
def _(net, x):
    return net.attend(x, x, x)[0]


@forward("multi-head attention over the batch", MIXED, SEQUENCE, attend=attention)
def _(net, x):
    return net.attend(x, x, x)[0]


@forward("multi-head attention over the batch, fused", MIXED, CUBE, attend=attention)
def _(net, x):
    return net.attend(x, x, x, need_weights=False)[0]


@forward("multi-head attention, transposed to time-major and back", SIMD, CUBE, attend=attention)
def _(net, x):
    h = x.transpose(0, 1)
    return net.attend(h, h, h, need_weights=False)[0].transpose(0, 1)


@forward("multi-head attention of a flat batch, taken for a sequence", MIXED, attend=attention)
def _(net, x):
    return net.attend(x, x, x)[0]


@forward("multi-head attention with a padding mask", SIMD, SEQUENCE, attend=lambda: attention(batch_first=True))
def _(net, x):
    padded = (x[..., 0] < 0) & (torch.arange(T) > 0)
    return net.attend(x, x, x, key_padding_mask=padded)[0]


encoder = functools.partial(nn.TransformerEncoderLayer, D, 2, 8)
layers("transformer layer, batch first", SIMD, SEQUENCE, lambda: encoder(dropout=0.0, batch_first=True))
layers(
    "transformer layer with dropout",
    SIMD,
    ODD_SEQUENCE,
    lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
)
layers("transformer layer, batch first, in eval", SIMD, CUBE, lambda: encoder(batch_first=True), train=False)
layers("transformer layer over the batch", MIXED, SEQUENCE, lambda: encoder(dropout=0.0))
layers("transformer layer over the batch, cube, in eval", MIXED, CUBE, encoder, train=False)


@forward("attention by hand within the sample", SIMD, CUBE, key=linear(), value=linear())
def _(net, x):
    return (net.linear(x) @ net.key(x).transpose(1, 2)).softmax(-1) @ net.value(x)


@forward("attention by hand over the batch", MIXED, key=linear(), value=linear())
def _(net, x):
    return (net.linear(x) @ net.key(x).t()).softmax(-1) @ net.value(x)


@forward("attention by hand over the batch, cube", MIXED, CUBE, key=linear(), value=linear())
def _(net, x):
    q, k, v = (f(x).transpose(0, 1) for f in (net.linear, net.key, net.value))
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1)


@forward("causal attention within the sample", SIMD, CUBE)
def _(net, x):
    return F.scaled_dot_product_attention(net.linear(x), x, x, is_causal=True)


@forward("attention to earlier samples only", MIXED)
def _(net, x):
    scores = (net.linear(x) @ x.t()).masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ x


@forward("attention over the batch, masked down to the sample itself", SIMD, accept_unknown=True)
def _(net, x):
    scores = (net.linear(x) @ x.t()).masked_fill(~torch.eye(N, dtype=torch.bool), -torch.inf)
    return scores.softmax(-1) @ x


@forward("heads merged into the sample axis after a transpose", SIMD, SEQUENCE)
def _(net, x):
    h = net.linear(x).view(N, T, 2, 3).transpose(1, 2).reshape(2 * N, T, 3)
    return torch.bmm(torch.bmm(h, h.mT).softmax(-1), h).view(N, 2, T, 3).transpose(1, 2).reshape(N, T, D)


@forward("heads merged without the transpose, wrong but within the sample", SIMD, SEQUENCE)
def _(net, x):
    h = net.linear(x).view(2 * N, T, 3)
    return torch.bmm(torch.bmm(h, h.mT).softmax(-1), h).view(N, T, D)


@forward("heads merged before the samples, split after them", MIXED, SEQUENCE)
def _(net, x):
    h = net.linear(x).view(N, T, 2, 3).permute(2, 0, 1, 3).reshape(2 * N, T, 3)
    return torch.bmm(torch.bmm(h, h.mT).softmax(-1), h).view(N, 2, T, 3).transpose(1, 2).reshape(N, T, D)


@forward("as many heads as samples, merged and split alike", SIMD, CUBE)
def _(net, x):
    h = net.linear(x).view(N, N, N, 1).permute(2, 0, 1, 3).reshape(N * N, N, 1)
    return (torch.bmm(h, h.mT).softmax(-1) @ h).view(N, N, N, 1).permute(1, 2, 0, 3).reshape(N, N, D)


@forward("as many heads as samples, confused with each other", MIXED, CUBE)
def _(net, x):
    h = net.linear(x).view(N, N, N, 1).permute(2, 0, 1, 3).reshape(N * N, N, 1)
    return (torch.bmm(h, h.mT).softmax(-1) @ h).view(N, N, N, 1).transpose(1, 2).reshape(N, N, D)


@forward("padding mask and masked mean", SIMD, SEQUENCE, integers(2, N, T))
def _(net, x, mask):
    return (net.linear(x) * mask[..., None]).sum(1) / (1 + mask.sum(1, keepdim=True))


@forward("masked mean divided by the count of the batch", STATISTICS, SEQUENCE, integers(2, N, T))
def _(net, x, mask):
    return (net.linear(x) * mask[..., None]).sum(1) / (1 + mask.sum())


@forward("padding cropped to the longest sample", SIMD, SEQUENCE, integers(T + 1, N), accept_unknown=True)
def _(net, x, lengths):
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]
    return (net.linear(x[:, :longest]) * mask[..., None]).sum(1)


@forward(
    "padding trimmed to the longest sample without a mask",
    STATISTICS,
    SEQUENCE,
    integers(T - 1, N),
    accept_unknown=True,
)
def _(net, x, lengths):
    return net.linear(x[:, : int(lengths.max()) + 1]).sum(1)


@forward("padded tokens dropped, processed, put back", SIMD, SEQUENCE, integers(2, N, T), accept_unknown=True)
def _(net, x, mask):
    keep = mask.bool()
    out = torch.zeros_like(x)
    out[keep] = net.linear(x[keep]).tanh()
    return out


@forward("kept tokens moved to the front of the batch", MIXED, SEQUENCE, integers(2, N, T))
def _(net, x, mask):
    keep = mask.bool().flatten()
    flat = net.linear(x).flatten(0, 1)
    return torch.cat([flat[keep], flat[~keep]]).view_as(x)


# ---------------------------------------------------------------- the index of a sample, and N itself

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


# ---------------------------------------------------------------- pairs of samples


@forward("minibatch discrimination", MIXED, head=linear(D + 1, D))
def _(net, x):
    h = net.linear(x)
    close = (-(h[:, None] - h[None]).abs().sum(-1)).exp().sum(1, keepdim=True)
    return net.head(torch.cat([x, close], 1))


@forward("nearest neighbour in the batch", MIXED)
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


@forward("bilinear form of a sample with its mirror", MIXED, form=lambda: nn.Bilinear(D, D, 3))
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


# ---------------------------------------------------------------- indexing, gather, scatter

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


# ---------------------------------------------------------------- experts and graphs

EXPERTS = {"router": linear(D, 3), "experts": lambda: nn.ModuleList(nn.Linear(D, D) for _ in range(3))}


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


GROUPED = {"router": linear(D, 3), "other": linear(D, 3), "w": weight(3, 8, 8)}  # the kernel wants multiples of four


def _grouped(net, tokens, order, numbers):
    """Rows in an order, each times the matrix of the group that its place falls into; in that order."""
    ends = torch.histc(numbers.float(), bins=3, min=0, max=2).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(F.pad(tokens[order], (0, 8 - D)), net.w, offs=ends)[:, :D]


@forward("mixture of experts by a grouped product, unsorted", SIMD, SEQUENCE, **GROUPED)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = net.router(tokens).argmax(1).sort()
    return _grouped(net, tokens, order, numbers)[order.argsort()].view_as(x)


@forward("mixture of experts by a grouped product, left sorted", MIXED, SEQUENCE, accept_unknown=True, **GROUPED)
def _(net, x):
    tokens = x.flatten(0, 1)
    numbers, order = net.router(tokens).argmax(1).sort()
    return _grouped(net, tokens, order, numbers).view_as(x)


@forward("grouped by the numbers of another router", MIXED, SEQUENCE, accept_unknown=True, **GROUPED)
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
    return F.grouped_mm(F.pad(tokens[order], (0, 8 - D)), net.w, offs=ends)[order.argsort(), :D].view_as(x)


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
    return sum(gate[:, e, None] / gate[:, e].sum() * expert(x) for e, expert in enumerate(net.experts))


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


# ---------------------------------------------------------------- convolution, pooling, Fourier


@forward("own kernel per sample by a grouped convolution", SIMD, IMAGE, hyper=linear(C, 2 * C * 9))
def _(net, x):
    kernels = net.hyper(x.mean((2, 3))).view(2 * N, C, 3, 3)
    return F.conv2d(x.reshape(1, N * C, 6, 6), kernels, groups=N).view(N, 2, 4, 4)


@forward("kernel of the next sample by a grouped convolution", MIXED, IMAGE, hyper=linear(C, 2 * C * 9))
def _(net, x):
    kernels = net.hyper(x.mean((2, 3))).roll(1, 0).view(2 * N, C, 3, 3)
    return F.conv2d(x.reshape(1, N * C, 6, 6), kernels, groups=N).view(N, 2, 4, 4)


@forward("samples as channels of a full convolution", MIXED, IMAGE, conv=lambda: nn.Conv2d(N * C, N * 2, 3))
def _(net, x):
    return net.conv(x.reshape(1, N * C, 6, 6)).view(N, 2, 4, 4)


@forward("samples as channels of an unbatched convolution", MIXED, (N, 5, 5), conv=conv(N, N))
def _(net, x):
    return net.conv(x)


@forward("samples as channels of an unbatched depthwise convolution", INDEXED, (N, 5, 5), conv=conv(N, N, groups=N))
def _(net, x):
    return net.conv(x)


@forward("groups that do not match the samples", MIXED, IMAGE, w=weight(N * 2, 2 * C, 3, 3))
def _(net, x):
    return F.conv2d(x.reshape(1, N * C, 6, 6), net.w, groups=N // 2).view(N, 2, 4, 4)


@forward("convolution along the batch", MIXED, conv=lambda: nn.Conv1d(D, D, 3, padding=1))
def _(net, x):
    return net.conv(x.t()[None])[0].t()


@forward("pointwise convolution with the batch as its spatial axis", SIMD, conv=lambda: nn.Conv1d(D, D, 1))
def _(net, x):
    return net.conv(x.t()[None])[0].t()


@forward("convolution along the features", SIMD, conv=lambda: nn.Conv1d(1, 2, 3, padding=1))
def _(net, x):
    return net.conv(x[:, None]).flatten(1)


@forward(
    "convolution over an image made of samples and features",
    MIXED,
    conv=lambda: nn.Conv2d(1, 1, 3, padding=1),
)
def _(net, x):
    return net.conv(x[None, None])[0, 0]


@forward("own weights per sample by a hypernetwork", SIMD, hyper=linear(D, 3 * D))
def _(net, x):
    return torch.einsum("nkd,nd->nk", net.hyper(x).view(N, 3, D), x)


@forward("own weights per sample, split in the wrong order", MIXED, hyper=linear(D, 3 * D))
def _(net, x):
    return torch.einsum("knd,nd->nk", net.hyper(x).view(3, N, D), x)


@forward(
    "depthwise separable convolution",
    SIMD,
    IMAGE,
    depth=conv(C, C, groups=C),
    point=lambda: nn.Conv2d(C, 4, 1),
)
def _(net, x):
    return net.point(net.depth(x)).amax((2, 3))


layers("transposed convolution", SIMD, IMAGE, lambda: nn.ConvTranspose2d(C, 2, 3, stride=2))
layers(
    "pooling",
    SIMD,
    IMAGE,
    conv(),
    lambda: nn.MaxPool2d(2),
    lambda: nn.AdaptiveAvgPool2d(1),
    nn.Flatten,
    linear(4, 3),
)
layers("pooling of features, samples as channels", SIMD, FLAT, linear(), lambda: nn.MaxPool1d(2))
layers("interpolation", SIMD, IMAGE, lambda: nn.Upsample(scale_factor=2, mode="bilinear"), conv())
layers("pixel shuffle", SIMD, (N, 4, 3, 3), conv(4, 4, padding=1), lambda: nn.PixelShuffle(2))
layers(
    "unfold and fold",
    SIMD,
    IMAGE,
    lambda: nn.Unfold(3, stride=3),
    linear(4, 4),
    lambda: nn.Fold((6, 6), 3, stride=3),
)
layers("patch embedding", SIMD, IMAGE, lambda: nn.Conv2d(C, D, 3, stride=3), lambda: nn.Flatten(2), linear(4, 4))


@forward("pooling over an image made of samples and features", MIXED)
def _(net, x):
    return F.max_pool2d(net.linear(x)[None, None], 3, stride=1, padding=1)[0, 0]


@forward("pixel shuffle of samples as channels, four each", SIMD, (N, 4, 3, 3))
def _(net, x):
    return F.pixel_shuffle(net.linear(x).view(1, 4 * N, 3, 3), 2)[0].tanh()


@forward("pixel shuffle of samples as channels, two each", MIXED, (N, 2, 3, 3))
def _(net, x):
    return F.pixel_shuffle(net.linear(x).view(1, 2 * N, 3, 3), 2).reshape(N, -1)


@forward("interpolation along the batch", MIXED)
def _(net, x):
    h = net.linear(x).t()[None]
    return F.interpolate(F.interpolate(h, size=9, mode="linear"), size=N, mode="linear")[0].t()


@forward("sliding windows over the features", SIMD)
def _(net, x):
    return net.linear(x).unfold(1, 3, 1).amax(-1)


@forward("sliding windows over the batch", MIXED)
def _(net, x):
    return F.pad(net.linear(x), (0, 0, 1, 1)).unfold(0, 3, 1).mean(-1)


@forward("spatial transformer", SIMD, IMAGE, locate=linear(C, 6))
def _(net, x):
    grid = F.affine_grid(net.locate(x.mean((2, 3))).view(N, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


@forward("Fourier transform of the features", SIMD)
def _(net, x):
    return torch.fft.rfft(net.linear(x), dim=1).abs()


@forward("Fourier transform of the batch", MIXED)
def _(net, x):
    return torch.fft.fft(net.linear(x), dim=0).real


@forward("Fourier transform of the batch and back", SIMD, accept_unknown=True)
def _(net, x):
    return torch.fft.ifft(torch.fft.fft(net.linear(x), dim=0), dim=0).real


@forward("Fourier transform over time and features", SIMD, CUBE)
def _(net, x):
    return torch.fft.fft2(net.linear(x)).real


@forward("Fourier transform over samples and features", MIXED)
def _(net, x):
    return torch.fft.fft2(net.linear(x)).real


# ---------------------------------------------------------------- programs


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
        return torch.autograd.grad(net.bn(net.linear(x)).tanh().square().sum(), x, create_graph=True)[0]


@forward("gradient of a product of energies", STATISTICS, accept_unknown=True)
def _(net, x):
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(net.linear(x).tanh().square().sum() ** 2, x, create_graph=True)[0]


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
