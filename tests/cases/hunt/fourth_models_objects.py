"""Models that return their predictions, or get their data, in objects that PyTorch does not open.

A law of `torch.distributions`, a dataclass, an object with attributes: what a loss reads of them
are the predictions, and what lies in them along the samples is data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributions, nn
from torch.nn import functional as F

import unbatch as ub
from cases.hunt.fourth_models_library import along, positive
from cases.hunt.third_losses import OWN, OwnLossCase
from cases.models.table import MIXED, SIMD, STATISTICS, Net, linear
from cases.verdicts import FORWARD
from unbatch import Structure

D = N = 6


@dataclass
class Output:
    """As many projects have it, and not registered with PyTorch."""

    logits: Any
    hidden: Any = None


@dataclass(frozen=True)
class ObjectCase(OwnLossCase):
    """A model `forward(net, x)` and its loss, with the truth about the forward pass."""

    loss: Callable[..., Any] = F.mse_loss
    forward_truth: tuple[str, str, str] = SIMD

    def structure(self) -> Structure:
        torch.manual_seed(0)
        net = Net(self.forward, {"linear": linear(), "norm": lambda: nn.BatchNorm1d(D)})
        return ub.Problem(net, self.loss, self.batch()).structure

    def truth(self) -> dict[str, str]:
        return dict(zip(FORWARD, self.forward_truth, strict=True))


def returned(truth: tuple[str, str, str], cases: dict[str, tuple[Any, Any]]) -> None:
    for name, (forward, loss) in cases.items():
        OWN.append(
            ObjectCase(
                name, forward, data, "holds", "holds", "holds", loss=loss, forward_truth=truth
            )
        )


def data():
    return torch.randn(N, D), torch.randn(N, D)


def likelihood(law, y):
    return -law.log_prob(y).mean()


def of_logits(output, y):
    return F.mse_loss(output.logits, y)


def normal(h):
    return distributions.Normal(h, 1.0)


returned(
    SIMD,
    {
        "own: a law is returned": (lambda n, x: normal(n.linear(x)), likelihood),
        "own: a dataclass is returned": (lambda n, x: Output(n.linear(x)), of_logits),
        "own: a sparse tensor is returned": (
            lambda n, x: n.linear(x).relu().to_sparse(),
            lambda p, y: F.mse_loss(p.to_dense(), y),
        ),
        "own: rows of a sparse tensor are returned": (
            lambda n, x: n.linear(x).relu().to_sparse_csr(),
            lambda p, y: F.mse_loss(p.to_dense(), y),
        ),
        "own: a nested tensor is returned": (
            lambda n, x: torch.nested.as_nested_tensor([*n.linear(x)], layout=torch.jagged),
            lambda p, y: F.mse_loss(p.to_padded_tensor(0.0), y),
        ),
        "own: a masked tensor is returned": (
            lambda n, x: positive(n.linear(x)),
            lambda p, y: (p.to_tensor(0.0) - y).square().mean(),
        ),
        "own: an object is returned beside, that nobody reads": (
            lambda n, x: (n.linear(x), Output(n.norm(x))),
            lambda p, y: F.mse_loss(p[0], y),
        ),
        "own: a pair is returned": (
            lambda n, x: (n.linear(x), "words"),
            lambda p, y: F.mse_loss(p[0], y),
        ),
    },
)
returned(
    STATISTICS,
    {
        "own: a law is returned, with batch norm": (
            lambda n, x: normal(n.norm(n.linear(x))),
            likelihood,
        ),
        "own: a joint law is returned, with batch norm": (
            lambda n, x: distributions.MultivariateNormal(n.norm(n.linear(x)), torch.eye(D)),
            likelihood,
        ),
        "own: a dataclass is returned, with batch norm": (
            lambda n, x: Output(n.norm(n.linear(x))),
            of_logits,
        ),
        "own: a dataclass is returned beside, with batch norm": (
            lambda n, x: (n.linear(x), Output(n.norm(n.linear(x)))),
            lambda p, y: F.mse_loss(p[0], y) + F.mse_loss(p[1].logits, y),
        ),
        "own: a function is returned, with batch norm": (
            lambda n, x: lambda: n.norm(n.linear(x)),
            lambda p, y: F.mse_loss(p(), y),
        ),
        "own: an iterator is returned, with batch norm": (
            lambda n, x: iter([n.norm(n.linear(x))]),
            lambda p, y: F.mse_loss(next(p), y),
        ),
        "own: a namespace is returned, with batch norm": (
            lambda n, x: SimpleNamespace(logits=n.norm(n.linear(x))),
            of_logits,
        ),
    },
)
returned(
    MIXED,
    {
        "own: a law is returned, of others": (
            lambda n, x: normal(n.linear(x).roll(1, 0)),
            likelihood,
        ),
        "own: a dataclass is returned, of others": (
            lambda n, x: Output(n.linear(x).roll(1, 0)),
            of_logits,
        ),
    },
)


along(
    "an array beside, the same for all",
    SIMD,
    lambda n, x, z: n.linear(x) + torch.as_tensor(z).mean(0),
    (N, D),
    lambda: torch.randn(N, D).numpy(),
    in_dims=(0, None),
)
along(
    "a dataclass beside, the same for all",
    SIMD,
    lambda n, x, z: n.linear(x) + z.logits.mean(0),
    (N, D),
    lambda: Output(torch.randn(N, D)),
    in_dims=(0, None),
)
along(
    "data in a dict beside",
    STATISTICS,
    lambda n, x, z: n.linear(x) + z["z"].mean(0),
    (N, D),
    lambda: {"z": torch.randn(N, D)},
    in_dims=0,
)
