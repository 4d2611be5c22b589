"""Convolution, pooling and Fourier transforms."""

import torch
from torch import nn
from torch.nn import functional as F

from cases.models.table import (
    CUBE,
    FLAT,
    IMAGE,
    INDEXED,
    MIXED,
    SIMD,
    C,
    D,
    N,
    conv,
    forward,
    layers,
    linear,
    weight,
)


@forward("own kernel per sample by a grouped convolution", SIMD, IMAGE, hyper=linear(C, 2 * C * 9))
def _(net, x):
    kernels = net.hyper(x.mean((2, 3))).view(2 * N, C, 3, 3)
    return F.conv2d(x.reshape(1, N * C, 6, 6), kernels, groups=N).view(N, 2, 4, 4)


@forward(
    "kernel of the next sample by a grouped convolution", MIXED, IMAGE, hyper=linear(C, 2 * C * 9)
)
def _(net, x):
    kernels = net.hyper(x.mean((2, 3))).roll(1, 0).view(2 * N, C, 3, 3)
    return F.conv2d(x.reshape(1, N * C, 6, 6), kernels, groups=N).view(N, 2, 4, 4)


@forward(
    "samples as channels of a full convolution",
    MIXED,
    IMAGE,
    conv=lambda: nn.Conv2d(N * C, N * 2, 3),
)
def _(net, x):
    return net.conv(x.reshape(1, N * C, 6, 6)).view(N, 2, 4, 4)


@forward("samples as channels of an unbatched convolution", MIXED, (N, 5, 5), conv=conv(N, N))
def _(net, x):
    return net.conv(x)


@forward(
    "samples as channels of an unbatched depthwise convolution",
    INDEXED,
    (N, 5, 5),
    conv=conv(N, N, groups=N),
)
def _(net, x):
    return net.conv(x)


@forward("groups that do not match the samples", MIXED, IMAGE, w=weight(N * 2, 2 * C, 3, 3))
def _(net, x):
    return F.conv2d(x.reshape(1, N * C, 6, 6), net.w, groups=N // 2).view(N, 2, 4, 4)


@forward("convolution along the batch", MIXED, conv=lambda: nn.Conv1d(D, D, 3, padding=1))
def _(net, x):
    return net.conv(x.t()[None])[0].t()


@forward(
    "pointwise convolution with the batch as its spatial axis",
    SIMD,
    conv=lambda: nn.Conv1d(D, D, 1),
)
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
layers(
    "patch embedding",
    SIMD,
    IMAGE,
    lambda: nn.Conv2d(C, D, 3, stride=3),
    lambda: nn.Flatten(2),
    linear(4, 4),
)


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
    grid = F.affine_grid(
        net.locate(x.mean((2, 3))).view(N, 2, 3), list(x.shape), align_corners=False
    )
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
