"""Rows of the weight of a convolution."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbatch.autodiff.contractions.contraction import Contraction, OperandUse
from unbatch.linalg.rows import fill, same_dtype

aten = torch.ops.aten


SAMPLE = 16  # samples on which ways are compared


WHOLE = 32 * 2**20  # bytes of rows formed at a time where one call forms them


class Convolution(Contraction):
    """The weight of a convolution. Which of its ways is fastest depends on the shapes and is measured once."""

    lean = frozenset({"weighted_sum"})
    taken = ""
    fastest: dict[tuple[Any, ...], str] = {}  # noqa: RUF012

    def __init__(self, call: OperandUse) -> None:
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
        self.taken = self._way(g, x, out)
        rows: Tensor = getattr(self, self.taken)(g, x, out)
        return rows

    @property
    def compact(self) -> bool:
        return self.g[0].numel() < self.operand.numel()

    @property
    def portion(self) -> int:  # type: ignore[override]
        """Many samples at a time where one call serves them all."""
        few = slice(0, SAMPLE)
        return (
            WHOLE if self._way(self.g[few], self.x[few], None) == "vmapped" else Contraction.portion
        )

    @property
    def kind(self) -> str:
        return "convolution" + f" ({self.taken.replace('_', ' ')})" * bool(self.taken)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        scaled = self.g * weights.to(self.g.dtype).reshape(-1, *[1] * (self.g.ndim - 1))
        return self._backward(scaled.flatten(0, 1), self.x.flatten(0, 1))

    def _way(self, g: Tensor, x: Tensor, out: Tensor | None) -> str:
        plain = not self.geometry[3] and self.geometry[5] == 1 and x.ndim == 5
        ways = ["vmapped", "one_by_one", *(["windows", "channels_last"] if plain else [])]
        if len(g) * g[0].numel() < 2**12:
            return "vmapped"
        g, x = g[:SAMPLE], x[:SAMPLE]
        key = (tuple(g.shape), tuple(x.shape[1:]), str(self.geometry), g.dtype, g.device)
        if key not in self.fastest:
            room = out[:SAMPLE] if out is not None else g.new_empty(len(g), *self.operand.shape)
            self.fastest[key] = min(
                ways, key=lambda w: _seconds(lambda: getattr(self, w)(g, x, room))
            )
        return self.fastest[key]

    def _backward(self, g: Tensor, x: Tensor) -> Tensor:
        wanted = (False, True, False)
        gradient: Tensor = aten.convolution_backward(
            g, x, self.operand.to(x.dtype), None, *self.geometry, wanted
        )[1]
        return gradient

    def _room(self, g: Tensor, out: Tensor | None) -> Tensor:
        fits = out is not None and out.dtype == g.dtype and out.is_contiguous()
        return out if fits and out is not None else g.new_empty(len(g), *self.operand.shape)

    def vmapped(self, g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        return fill(torch.func.vmap(self._backward)(g, x), out)

    def one_by_one(self, g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        rows = self._room(g, out)
        for row, a, b in zip(rows, g, x, strict=True):
            row.copy_(self._backward(a, b))
        return rows if rows is out else fill(rows, out)

    def windows(self, g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Every place that the kernel saw, as a matrix (two dimensions, one group)."""
        rows, (n, o) = self._room(g, out), (len(g), self.operand.shape[0])
        columns = self._places(self._padded(x).contiguous(), g).reshape(
            n, self.operand[0].numel(), -1
        )
        torch.bmm(g.transpose(1, 2).reshape(n, o, -1), columns.mT, out=rows.view(n, o, -1))
        return rows if rows is out else fill(rows, out)

    def channels_last(self, g: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
        """The same with channels innermost, which is faster to lay out; but the product has to be turned."""
        n, (o, i, ky, kx) = len(g), self.operand.shape
        x = self._padded(x).movedim(2, -1).contiguous().movedim(-1, 2)
        columns = self._places(x, g).permute(0, 4, 5, 6, 2, 3, 1).reshape(n, -1, ky * kx * i)
        turned = torch.bmm(g.transpose(1, 2).reshape(n, o, -1), columns)
        rows = turned.view(n, o, ky, kx, i).movedim(-1, 2)
        return rows.contiguous() if out is None else out.copy_(rows)

    def _padded(self, x: Tensor) -> Tensor:
        py, px = _pair(self.geometry[1])
        return F.pad(x, (px, px, py, py)) if px or py else x

    def _places(self, x: Tensor, g: Tensor) -> Tensor:
        """``[n, i, ky, kx, t, height, width]``, a view of the padded input."""
        (sy, sx), (dy, dx) = _pair(self.geometry[0]), _pair(self.geometry[2])
        (n, t, _, height, width), (_, i, ky, kx), s = g.shape, self.operand.shape, x.stride()
        strides = (s[0], s[2], s[3] * dy, s[4] * dx, s[1], s[3] * sy, s[4] * sx)
        return x.as_strided((n, i, ky, kx, t, height, width), strides)


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
