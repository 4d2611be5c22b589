"""The nets and batches that are measured: W1 to W7."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """A block of ResNet-20. The shortcut has no parameters (option A): every second pixel, padded
    with zeros.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.stride = wide // narrow
        self.conv1 = nn.Conv2d(narrow, wide, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        pad = (y.shape[1] - x.shape[1]) // 2
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, pad, pad)))


class Encoder(nn.Module):
    """A post-norm transformer encoder layer written with linear layers only: no fused kernel, no
    packed projection.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        x = self.norm1(x + self.out((attention @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.relu(self.up(x))))


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp(norm: bool = False) -> nn.Module:
    """784-512-256-10, optionally with batch norm before the activations."""
    layers: list[nn.Module] = []
    for narrow, wide in ((784, 512), (512, 256)):
        layers += [nn.Linear(narrow, wide), *([nn.BatchNorm1d(wide)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def lenet() -> nn.Module:
    """Two 5 x 5 convolutions and two linear layers: the LeNet of Caffe."""
    convolutions = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)
    )


def net3c3d() -> nn.Module:
    """3c3d as in DeepOBS; rounding up the pooled sizes stands for TensorFlow's padding "same"."""
    layers: list[nn.Module] = []
    for convolution in (
        nn.Conv2d(3, 64, 5),
        nn.Conv2d(64, 96, 3),
        nn.Conv2d(96, 128, 3, padding=1),
    ):
        layers += [convolution, nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    dense = [nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


def resnet20(frozen: bool) -> nn.Module:
    """In train mode; `frozen` puts the batch norms alone in eval mode."""
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [
        Residual(a, b)
        for a, b in ((16, 16),) * 3 + ((16, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64))
    ]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(not frozen)
    return model


def encoder(builtin: bool = False) -> nn.Module:
    """Two layers of width 128 with 4 heads, a linear head on the mean over
    positions; no dropout.
    """
    layer = (
        partial(nn.TransformerEncoderLayer, dropout=0.0, batch_first=True) if builtin else Encoder
    )
    return nn.Sequential(
        layer(128, 4, 512), layer(128, 4, 512), MeanOverPositions(), nn.Linear(128, 10)
    )


@dataclass(frozen=True)
class Workload:
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    mixes: bool = False

    def build(self, samples: int | None = None) -> tuple[nn.Module, Tensor, Tensor]:
        """Return model, inputs and labels, the same at every call."""
        torch.manual_seed(0)
        N = samples or self.samples
        return self.make(), torch.randn(N, *self.shape), torch.randint(10, (N,))


IMAGE = (3, 32, 32)
WORKLOADS = {
    "W1": Workload("MLP 784-512-256-10", mlp, (784,), 128),
    "W2": Workload(
        "two 5x5 convolutions and two linear layers (LeNet), 28x28", lenet, (1, 28, 28), 128
    ),
    "W3": Workload("3c3d, CIFAR-10", net3c3d, IMAGE, 64),
    "W4": Workload("ResNet-20, batch norm in eval mode", partial(resnet20, frozen=True), IMAGE, 64),
    "W5": Workload(
        "ResNet-20, batch norm in train mode", partial(resnet20, frozen=False), IMAGE, 64, True
    ),
    "W6": Workload(
        "MLP 784-512-256-10, batch norm in train mode", partial(mlp, norm=True), (784,), 128, True
    ),
    "W7": Workload(
        "transformer encoder, linear layers and softmax spelled out", encoder, (64, 128), 32
    ),
    "W7b": Workload(
        "transformer encoder, nn.TransformerEncoderLayer", partial(encoder, True), (64, 128), 32
    ),
}
