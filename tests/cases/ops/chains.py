"""Chains of ops on a square of numbers, in which the axis of samples looks like any other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cases.ops.aten import tensor
from cases.ops.claims import Trial

SIDE = 4  # samples, and features as well

# All take [4, 4] and most return that shape; those that reduce keep the dim or are spread again.
LINKS = """
x + 1
x * 2
-x
x.exp()
x.tanh()
x.abs().sqrt()
x.square()
1 / (1 + x.abs())
x.sin() - x
x.T
x.mT.contiguous()
x.flip(0)
x.flip(1)
x.roll(1, 0)
x.roll(1, 1)
x.rot90()
x.tril()
x.triu(1)
x.reshape(16).reshape(4, 4)
x.reshape(2, 8).T.reshape(4, 4)
x.reshape(2, 2, 4).transpose(0, 1).reshape(4, 4)
x.reshape(4, 2, 2).transpose(1, 2).reshape(4, 4)
x.unsqueeze(1).squeeze(1)
x.expand(2, 4, 4)[1]
x - x.mean(0)
x - x.mean(1, True)
x / x.abs().sum(0)
x / x.abs().sum(1, True)
x.softmax(0)
x.softmax(1)
x.log_softmax(0)
x.log_softmax(1)
x - x.amax(0)
x - x.amax(1, True)
x * x.var(0)
x * x.std(1, keepdim=True)
x + x.sum()
x + x.max()
x * x.norm()
x.sum(0).expand(4, 4)
x.sum(1, True).expand(4, 4)
x + x.median()
x.logsumexp(0) + x
x.logsumexp(1, True) + x
x.prod(0) + x
x.prod(1, True) + x
x + x.median(0).values
x.cumsum(0)
x.cumsum(1)
x.cumprod(1)
x.cummax(0).values
x.sort(0).values
x.sort(1).values
x.argsort(0) + x
x.argsort(1) + x
x.topk(2, 0).values.repeat(2, 1)
x.topk(2, 1).values.repeat(1, 2)
x.diff(dim=0, prepend=x[:1])
x @ x
x @ x.T
x.T @ x
x @ W
W @ x
F.linear(x, W)
x @ W + B
torch.outer(x[:, 0], B)
x * B
x * B[:, None]
F.layer_norm(x, [4])
F.layer_norm(x, [4], B)
F.layer_norm(x, [4, 4])
F.normalize(x, dim=0)
F.normalize(x, dim=1)
F.batch_norm(x, None, None, training=True)
F.instance_norm(x[None], use_input_stats=True)[0]
F.group_norm(x, 2)
F.group_norm(x, 1, B)
F.batch_norm(x[None], None, None, training=True)[0]
x[[1, 2, 3, 0]]
x[:, [1, 2, 3, 0]]
x[[0, 0, 1, 1]]
x[:, [0, 0, 1, 1]]
x[I]
x.gather(0, J)
x.gather(1, J)
x.index_select(0, I)
x.index_select(1, I)
x.take(J)
x.index_add(0, I, x)
x.index_add(1, I, x)
x.index_copy(0, I, x)
x.scatter(0, J, x)
x.scatter_add(0, J, x)
x.scatter_add(1, J, x)
x.index_fill(0, I[:2], 0.5)
x.index_fill(1, I[:2], 0.5)
x.scatter_reduce(0, J, x, 'amax')
x.scatter_reduce(1, J, x, 'prod')
x.masked_fill(J > 1, 0.0)
x.where(J > 1, x.T)
torch.where(x > 0, x, -x)
torch.where(x > x.mean(0), x, 0.0)
x.clamp(min=x.mean())
x.clamp(0.2, 0.8)
torch.cat([x[:2], x[2:]])
torch.cat([x[2:], x[:2]])
torch.cat([x[:, :2], x[:, 2:] * 2], 1)
torch.stack(x.unbind(0), 1)
torch.stack(x.unbind(1), 1)
torch.stack([x[i] * i for i in range(4)])
torch.stack([x[:, i] * i for i in range(4)], 1)
x[:2].repeat(2, 1)
x[:, :2].repeat(1, 2)
x[::2].repeat_interleave(2, 0)
x[:, ::2].repeat_interleave(2, 1)
F.pad(x[1:], (0, 0, 1, 0))
F.pad(x[:, 1:], (1, 0))
F.pad(x[:3], (0, 0, 0, 1), value=1.0)
x.diagonal().expand(4, 4)
x.diag_embed().diagonal()
x.unfold(0, 2, 1).sum(2).repeat(2, 1)[:4]
x.unfold(1, 2, 2).reshape(4, 4)
torch.kron(x[:2, :2], W[:2, :2])
F.conv1d(x[:, None], W[:1, None, :3], padding=1)[:, 0]
F.conv1d(x[None], W[:, :, None])[0]
F.conv1d(x[None], W[:, :, None])[0].T
F.avg_pool1d(x[None], 3, 1, 1)[0]
F.max_pool1d(x[None], 3, 1, 1)[0]
F.avg_pool1d(x.T[None], 3, 1, 1)[0].T
F.interpolate(x[None], 8)[0, :, ::2]
F.scaled_dot_product_attention(x[None], x[None], x[None])[0]
F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
F.embedding(J, x)[:, 0]
F.embedding(J[:, 0], x)
x.view(torch.int64).view(torch.float64)
x.to(torch.float32).to(torch.float64)
x.round().long().double()
(x > 0.5).double()
torch.view_as_real(torch.view_as_complex(x.reshape(4, 2, 2))).reshape(4, 4)
torch.complex(x, x.T).abs()
torch.fft.fft(x, dim=1).abs()
torch.fft.fft(x, dim=0).real
torch.linalg.inv(x + 8 * W)
torch.linalg.solve(8 * W + x.mean(0), x)
torch.cdist(x, x)
torch.cdist(x, W)
torch.einsum('ni,mi->nm', x, x)
torch.einsum('ni,nj->ij', x, x)
torch.einsum('ni,io->no', x, W)
torch.einsum('in,io->no', x, W)
torch.bucketize(x, B.sort().values).double()
torch.searchsorted(x.sort(1).values, x).double()
x.clone()
x.clone().add_(x.mean(0))
x.clone().mul_(x.T)
x.clone().fill_(0.5) * x
x.clone().copy_(x.T)
x.new_zeros(4, 4) + x
x.clone().index_put_((I,), x)
x.index_put((I, I), x[:, 0])
x.select_scatter(x[0], 0, 1)
x.slice_scatter(x[:2], 0, 2)
x.T.clone().T
x.swapaxes(0, 1)
x.movedim(0, 1)
x.narrow(0, 1, 2).repeat(2, 1)
torch.vander(x[:, 0], 4)
x.renorm(2, 0, 0.5)
x + x[:2].mean(0)
torch.cat([x[:2] - x[:2].mean(0), x[2:] - x[2:].mean(0)])
torch.cat([x[:, :2] - x[:, :2].mean(1, True), x[:, 2:] - x[:, 2:].mean(1, True)], 1)
x.reshape(2, 2, 4).mean(1).repeat_interleave(2, 0) + x
x.reshape(4, 2, 2).mean(2).repeat_interleave(2, 1) + x
x - x.reshape(2, 2, 4).mean(0).repeat(2, 1)
x - x.reshape(2, 2, 4).amax(0).repeat(2, 1)
torch.cat([x[:, :2].flip(1), x[:, 2:].flip(1)], 1)
torch.cat([x[:3].flip(0), x[3:]])
torch.cat([x[:, :3].sort(1).values[:, :2], x[:, :2].sort(1).values], 1)
torch.cat([x[:, :3].cumsum(1)[:, :2], x[:, :2].cumsum(1)], 1)
torch.stack([x[:, :3].sum(1), x[:, :2].sum(1), x[:, 1:].sum(1), x.sum(1)], 1)
torch.stack([x[:3].sum(0), x[:2].sum(0), x[1:].sum(0), x.sum(0)])
sum(x.unbind(0)) + x
sum(x.unbind(1))[:, None] + x
x.repeat_interleave(2, 1)[:, :4]
x.repeat_interleave(2, 0)[:4]
"""


@dataclass(frozen=True)
class Link:
    """One op on a square, as source and as a function."""

    source: str
    function: Callable[..., Any]


def links() -> list[Link]:
    names = {
        "torch": torch,
        "F": F,
        "W": tensor((SIDE, SIDE), "float", 71) + torch.eye(SIDE),
        "B": tensor((SIDE,), "float", 72),
        "I": torch.tensor([2, 0, 3, 1]),
        "J": torch.tensor([[1, 0, 2, 3], [3, 2, 1, 0], [0, 0, 2, 1], [2, 1, 3, 3]]),
    }
    found = []
    for source in LINKS.split("\n"):
        if source:
            found.append(Link(source, eval(f"lambda x: {source}", names)))
    return found


def chained(*chain: Link) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for link in chain:
            x = link.function(x)
        return x

    return run


def chains(count: int, seed: int, length: int = 2) -> Iterator[Trial]:
    """Return random chains, on samples along one axis or the other."""
    chance = random.Random(seed)
    every = links()
    draws = [[tensor((SIDE, SIDE), "float", 80 + k)] for k in range(3)]
    for _ in range(count):
        chain = [chance.choice(every) for _ in range(length)]
        dim = chance.randrange(2)
        what = " | ".join(link.source for link in chain)
        yield Trial(f"{what} @{dim}", chained(*chain), draws, (dim,), SIDE)
