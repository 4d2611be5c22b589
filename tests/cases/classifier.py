"""A small classifier with batch norm, its data and its loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N, D, C = 5, 4, 3


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D, C), nn.BatchNorm1d(C))


def x() -> Tensor:
    return torch.randn(N, D)


def y() -> Tensor:
    return torch.arange(N) % C


def loss(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p, y)


def with_nan() -> Tensor:
    out = x()
    out[3, 1] = float("nan")
    return out
