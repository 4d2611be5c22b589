"""Rows of the weight of a convolution."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbatch.contractions import Call, Meeting, fill, same_dtype

aten = torch.ops.aten


class Convolution(Meeting):
    """The weight of a convolution. Which of its ways is fastest depends on the shapes and is measured once."""

    lean = frozenset({"weighted_sum"})
    taken = ""
    fastest: dict[tuple[Any, ...], str] = {}  # noqa: RUF012  what has been measured, for all convolutions of a shape

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.x: Tensor = call["input"]
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
        self.geometry = [call[n] for n in names]
        self.g: Tensor

    def receive(self, cotangents: Sequence[Tensor | None]) -> None:
        (g,) = cotangents[:1]
        assert g is not None
        g, x = same_dtype(g, self.x)
        self.g, self.x = self.layout.split(g), self.layout.split(x)

    def rows(self, where: slice, out: Tensor | None = None) -> Tensor:
        g, x = self.g[where], self.x[where]
        self.taken = self._way(g, x)
        return fill(getattr(self, self.taken)(g, x), out)

    @property
    def kind(self) -> str:
        return "convolution" + f" ({self.taken.replace('_', ' ')})" * bool(self.taken)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.g * weights.to(self.g.dtype).reshape(-1, *[1] * (self.g.ndim - 1))
        return self._backward(scaled.flatten(0, 1), self.x.flatten(0, 1))

    def _way(self, g: Tensor, x: Tensor) -> str:
        plain = not self.geometry[3] and self.geometry[5] == 1 and x.ndim == 5
        ways = ["vmapped", "one_by_one", *(["windows"] if plain else [])]
        if len(g) * g[0].numel() < 2**12:
            return "vmapped"
        key = (tuple(g.shape[1:]), min(len(g), 16), tuple(x.shape[1:]), str(self.geometry), g.dtype, g.device)
        if key not in self.fastest:
            self.fastest[key] = min(ways, key=lambda w: _seconds(lambda: getattr(self, w)(g, x)))
        return self.fastest[key]

    def _backward(self, g: Tensor, x: Tensor) -> Tensor:
        wanted = (False, True, False)
        gradient: Tensor = aten.convolution_backward(g, x, self.operand.to(x.dtype), None, *self.geometry, wanted)[1]
        return gradient

    def vmapped(self, g: Tensor, x: Tensor) -> Tensor:
        out: Tensor = torch.func.vmap(self._backward)(g, x)
        return out

    def one_by_one(self, g: Tensor, x: Tensor) -> Tensor:
        return torch.stack([self._backward(a, b) for a, b in zip(g, x, strict=True)])

    def windows(self, g: Tensor, x: Tensor) -> Tensor:
        """Every place that the kernel saw, as a matrix (two dimensions, one group)."""
        (sy, sx), (py, px), (dy, dx) = (_pair(v) for v in self.geometry[:3])
        o, i, ky, kx = self.operand.shape
        n, t, _, height, width = g.shape
        x = F.pad(x, (px, px, py, py)) if px or py else x
        x = x.contiguous()
        s = x.stride()
        shape = (n, i, ky, kx, t, height, width)
        seen = x.as_strided(shape, (s[0], s[2], s[3] * dy, s[4] * dx, s[1], s[3] * sy, s[4] * sx))
        columns = seen.reshape(n, i * ky * kx, t * height * width)
        return torch.bmm(g.transpose(1, 2).reshape(n, o, -1), columns.mT).view(n, o, i, ky, kx)


def _pair(v: Sequence[int]) -> tuple[int, int]:
    return (v[0], v[0]) if len(v) == 1 else (v[0], v[1])


def _seconds(run: Callable[[], object]) -> float:
    """The least of three runs, by the time of this process: others may be at work on the machine."""
    run()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best
