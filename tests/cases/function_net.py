"""A net with one linear layer whose forward pass is a plain function."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N, D, T = 5, 5, 3


class Net(nn.Module):
    """`linear`, more parts under their names, and a plain function as its forward pass."""

    def __init__(self, run: Callable, **parts: Any):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any) -> Any:
        return self.run(self, *inputs)


def flat() -> Tensor:
    return torch.randn(N, D)
