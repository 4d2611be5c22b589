"""Nets with ops that have no forward mode: where nothing flows through them, and where it does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

SAMPLES, FEATURES = 5, 4


class Coded(nn.Module):
    """An encoder, what is found in a table of codes, and a decoder."""

    def __init__(self, find: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.encode, self.decode, self.find = nn.Linear(FEATURES, 3), nn.Linear(3, FEATURES), find
        self.codes = nn.Parameter(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x).tanh()
        return self.decode(self.find(z, self.codes))


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    code = codes[torch.cdist(z, codes).argmin(1)]
    return z + (code - z).detach()


def nearest_trained(z: Tensor, codes: Tensor) -> Tensor:
    """The code itself is trained; the distances only decide."""
    return z + codes[torch.cdist(z, codes).argmin(1)]


def three_nearest(z: Tensor, codes: Tensor) -> Tensor:
    distances = torch.cdist(z, codes)
    return z * codes[distances.topk(3, largest=False).indices].mean(1)


def farther(z: Tensor, codes: Tensor) -> Tensor:
    """A mask of distances, which is no derivative either."""
    near = (torch.cdist(z, codes) < 2).to(z.dtype)
    return z + near @ codes


def by_distances(z: Tensor, codes: Tensor) -> Tensor:
    return z + torch.cdist(z, codes).neg().softmax(1) @ codes


def by_distances_of_pairs(z: Tensor, codes: Tensor) -> Tensor:
    """Distances within each sample."""
    pairs = torch.stack([F.pdist(one.reshape(3, 1)) for one in z])
    return z + pairs


class Bags(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(9, 6, **options), nn.Linear(6, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.words((3 * x).abs().long()).tanh())


class Packed(nn.Module):
    """The packing of what was computed, and back; the rest is a linear layer at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 3), nn.Linear(3, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x[:, :, None]).tanh()
        lengths = torch.tensor([4, 3, 3, 2, 1])
        packed = pack_padded_sequence(h, lengths, batch_first=True)
        padded, _ = pad_packed_sequence(packed, batch_first=True)
        return self.b(padded.sum(1))


CASES: dict[str, Callable[[], nn.Module]] = {
    "the nearest code": lambda: Coded(nearest),
    "the nearest code, trained": lambda: Coded(nearest_trained),
    "the three nearest codes": lambda: Coded(three_nearest),
    "codes that are near": lambda: Coded(farther),
    "codes by their distances": lambda: Coded(by_distances),
    "distances within a sample": lambda: Coded(by_distances_of_pairs),
    "bags": Bags,
    "bags by their largest word": lambda: Bags(mode="max"),
    "bags with padding": lambda: Bags(padding_idx=0),
    "a packed sequence": Packed,
}


def _has_second_derivative_of_distances() -> bool:
    """Tell whether PyTorch has what forward mode through ``cdist`` is made of."""
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.cdist(x, x + 1).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(slope.sum(), x)
    except RuntimeError:
        return False
    return True


# Those through which a tangent flows: products go by the rows of J.
BAGS = ("bags by their largest word", "bags with padding")
DISTANCES = ("codes by their distances", "distances within a sample")
BY_COLUMNS = BAGS if _has_second_derivative_of_distances() else (*DISTANCES, *BAGS)
