"""Batch norm and other layers that normalise."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from cases.models.table import (
    FLAT,
    IMAGE,
    INDEXED,
    MIXED,
    ODD,
    SEQUENCE,
    SIMD,
    STATISTICS,
    C,
    D,
    N,
    T,
    conv,
    forward,
    layers,
    linear,
    norm,
    weight,
)

# ---------------------------------------------------------------- batch norm, by layer

layers(
    "batch norm 2d",
    STATISTICS,
    IMAGE,
    conv(),
    lambda: nn.BatchNorm2d(4),
    nn.ReLU,
    nn.Flatten,
    linear(64, 3),
)
layers(
    "batch norm 2d in eval", SIMD, IMAGE, conv(), lambda: nn.BatchNorm2d(4), nn.ReLU, train=False
)
layers("batch norm 1d", STATISTICS, FLAT, linear(), norm(), nn.Tanh, linear())
layers(
    "batch norm 1d, batch of five", STATISTICS, ODD, linear(8, 8), norm(8), nn.Tanh, linear(8, 3)
)
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
layers(
    "batch norm 3d in eval",
    SIMD,
    (N, 2, 3, 4, 4),
    lambda: nn.BatchNorm3d(2),
    nn.Flatten,
    train=False,
)
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
    """Centres by a running mean, updated before or after it is used, in
    place or by reassignment.
    """

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
layers(
    "subclass of batch norm under another name",
    STATISTICS,
    FLAT,
    linear(),
    lambda: LayerNormByName(D),
)
layers("layer norm under the name of batch norm", SIMD, FLAT, linear(), lambda: BatchNormByName(D))
layers(
    "running mean updated in place, then used",
    STATISTICS,
    FLAT,
    linear(),
    lambda: RunningCentre(True, True),
)
layers(
    "running mean reassigned, then used",
    STATISTICS,
    FLAT,
    linear(),
    lambda: RunningCentre(True, False),
)
layers(
    "running mean used, then updated in place",
    SIMD,
    FLAT,
    linear(),
    lambda: RunningCentre(False, True),
)
layers(
    "running mean used, then reassigned", SIMD, FLAT, linear(), lambda: RunningCentre(False, False)
)


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


@forward(
    "batch norm with samples as channels and an affine part",
    INDEXED,
    scale=weight(N),
    shift=weight(N),
)
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
layers(
    "instance norm in eval",
    SIMD,
    IMAGE,
    lambda: nn.InstanceNorm2d(C, track_running_stats=True),
    train=False,
)
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
    return F.conv2d(
        x, F.batch_norm(w.view(1, len(w), -1), None, None, training=True).view_as(w), net.conv.bias
    )


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
