"""The model in which the ops of a GPU are tried."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cases.device_rows import E, H


class Net(nn.Module):
    """Modules that cases share. ``device``: with the op of a GPU; ``centred``: behind a mean over
    the batch.
    """

    def __init__(self, forward: Any, device: bool, centred: bool = False, **rnn: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.device, self.centred = forward, device, centred
        kind = rnn.pop("kind", None)
        if kind is not None:
            self.rnn = kind(E, H, **rnn)
        self.inner = nn.Linear(E, E)
        self.weight = nn.Parameter(torch.randn(E, 1, 3, 3))
        self.gain = nn.Parameter(torch.rand(E) + 0.5)
        self.matrix = nn.Parameter(torch.randn(4 * E, E))
        self.shift = nn.Parameter(torch.randn(4 * E))
        self.out = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.centred:
            h = h - h.mean(0)
        return self.out(self.run(self, h).flatten(1))
