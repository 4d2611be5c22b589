"""Losses of what samples choose by masks of their own, as the words of a sentence that count.

``ONE_FUNCTION``: sums of one term for each sample, all one function. ``OTHERS``: they are not, or
by the place in the batch alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

N, T, D, C = 5, 4, 3, 4

MASK = torch.tensor(
    [[1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.bool
)
COUNTED = int(MASK.sum())
LAST = 5  # of the rows of sample 1, which has most

Loss = Callable[[Tensor, dict[str, Tensor]], Tensor]


def data(seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Return inputs and targets: a mask, labels, numbers and shares for each word."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(N, T, C, dtype=torch.float64, generator=generator)
    y = {
        "mask": MASK.clone(),
        "labels": torch.randint(C, (N, T), generator=generator),
        "numbers": numbers,
        "shares": numbers.softmax(2),
    }
    return torch.randn(N, T, D, dtype=torch.float64, generator=generator), y


def of_labels(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss of the predictions and the labels that count."""
    return lambda p, y: loss(p[y["mask"]], y["labels"][y["mask"]])


def of(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss of the predictions and of other targets that count."""
    return lambda p, y: loss(p[y["mask"]], y[name][y["mask"]])


def each(p: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(p, labels, reduction="none")


def flat(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    mask = y["mask"].flatten()
    return F.cross_entropy(p.flatten(0, 1)[mask], y["labels"].flatten()[mask])


def by_places(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    rows, columns = y["mask"].nonzero(as_tuple=True)
    return F.cross_entropy(p[rows, columns], y["labels"][rows, columns])


def selected(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    first = torch.masked_select(p[..., 0], y["mask"])
    return (first - torch.masked_select(y["numbers"][..., 0], y["mask"])).square().mean()


def selected_whole(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    mask = y["mask"][..., None]
    return (p.masked_select(mask) - y["numbers"].masked_select(mask)).square().mean()


def focal(p: Tensor, labels: Tensor) -> Tensor:
    losses = each(p, labels)
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def with_penalty(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    return of_labels(F.cross_entropy)(p, y) + p.square().mean()


ONE_FUNCTION: dict[str, Loss] = {
    "cross entropy": of_labels(F.cross_entropy),
    "its sum": of_labels(lambda p, t: F.cross_entropy(p, t, reduction="sum")),
    "its sum over the count": of_labels(lambda p, t: each(p, t).sum() / len(t)),
    "smooth labels": of_labels(lambda p, t: F.cross_entropy(p, t, label_smoothing=0.1)),
    "weights of classes": of_labels(lambda p, t: F.cross_entropy(p, t, torch.arange(4).double())),
    "two layers before": of_labels(lambda p, t: F.cross_entropy(p.tanh() * 2, t)),
    "a label looked up": of_labels(lambda p, t: -p.log_softmax(1).gather(1, t[:, None]).mean()),
    "a label looked up by rows": of_labels(lambda p, t: p[torch.arange(len(t)), t].mean()),
    "one hot": of_labels(lambda p, t: (p.softmax(1) - F.one_hot(t, C)).square().sum(1).mean()),
    "ones of their size": of_labels(lambda p, t: (each(p, t) * torch.ones_like(t)).mean()),
    "focal": of_labels(focal),
    "flat": flat,
    "labels above zero": lambda p, y: F.cross_entropy(
        p[y["labels"] > 0], y["labels"][y["labels"] > 0]
    ),
    "squared errors": of("numbers", F.mse_loss),
    "shares": of("shares", lambda p, s: F.kl_div(p.log_softmax(1), s, reduction="batchmean")),
    "bits": of("shares", F.binary_cross_entropy_with_logits),
    "masked select": selected,
    "masked select of all entries": selected_whole,
    "beside a penalty of all": with_penalty,
}


# One function as well, which nobody proves yet.
OPEN: dict[str, Loss] = {"places of what counts": by_places}


def by_position(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    weights = torch.arange(T).double().expand(N, T)[y["mask"]]
    return (each(p[y["mask"]], y["labels"][y["mask"]]) * weights).mean()


def by_rank(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    mask = y["mask"]
    return (each(p[mask], y["labels"][mask]) / mask.cumsum(1)[mask]).mean()


def with_the_others(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    return of_labels(F.cross_entropy)(p, y) + p[~y["mask"]].square().mean()


def next_words(p: Tensor, y: dict[str, Tensor]) -> Tensor:
    mask = y["mask"][:, 1:]
    return F.cross_entropy(p[:, :-1][mask], y["labels"][:, 1:][mask])


ONE_FUNCTION |= {
    "weights by position": by_position,
    "weights by rank": by_rank,
    "beside the others": with_the_others,
    "next words": next_words,
}


def special(p: Tensor, row: int) -> Tensor:
    return torch.cat([p[:row], 2 * p[row : row + 1], p[row + 1 :]])


def put_in(p: Tensor, t: Tensor) -> Tensor:
    rows = torch.arange(COUNTED)
    rows[0] = 1
    return F.cross_entropy(p[rows], t[rows])


# For each row that counts, a number by its sample; and an order that exchanges two of sample 1.
WEIGHTS = torch.arange(1, N + 1).double()[:, None].expand(N, T)[MASK]
ORDER = torch.arange(COUNTED)
ORDER[[LAST, LAST - 1]] = ORDER[[LAST - 1, LAST]]

OTHERS: dict[str, Loss] = {
    "weights by row": of_labels(lambda p, t: (each(p, t) * torch.arange(COUNTED)).sum()),
    "weights by row, counted": of_labels(lambda p, t: (each(p, t) * torch.arange(len(t))).sum()),
    "weights by sample": of_labels(lambda p, t: (each(p, t) * WEIGHTS).sum()),
    "scales by sample": of_labels(lambda p, t: F.cross_entropy(p * WEIGHTS[:, None], t)),
    "the first rows": of_labels(lambda p, t: F.cross_entropy(p[:7], t[:7])),
    "all but the last row": of_labels(lambda p, t: F.cross_entropy(p[:-1], t[:-1])),
    "every second row": of_labels(lambda p, t: F.cross_entropy(p[::2], t[::2])),
    "labels in the other order": of_labels(lambda p, t: F.cross_entropy(p, t.flip(0))),
    "labels of one sample in another order": of_labels(lambda p, t: F.cross_entropy(p, t[ORDER])),
    "one row twice": of_labels(lambda p, t: F.cross_entropy(special(p, 2), t)),
    "the last row of the longest twice": of_labels(
        lambda p, t: F.cross_entropy(special(p, LAST), t)
    ),
    "a row in the place of another": of_labels(put_in),
    "signs in turn": of_labels(
        lambda p, t: (each(p, t) * torch.tensor([1.0, -1]).repeat(COUNTED)[:COUNTED]).mean()
    ),
    "a row without weight": of_labels(
        lambda p, t: (each(p, t) * (torch.arange(COUNTED) != 3)).sum()
    ),
    "a constant mask": lambda p, y: F.cross_entropy(p[MASK], y["labels"][MASK]),
    "the mask of the next sample": lambda p, y: F.cross_entropy(
        p[y["mask"].roll(1, 0)], y["labels"][y["mask"].roll(1, 0)]
    ),
    "differences of neighbours": of_labels(lambda p, t: p.diff(dim=0).square().mean()),
    "centred": of_labels(lambda p, t: F.cross_entropy(p - p.mean(0), t)),
    "cumulative": of_labels(lambda p, t: F.cross_entropy(p.cumsum(0), t)),
    "ones counted": of_labels(lambda p, t: (each(p, t) * torch.ones_like(t).cumsum(0)).sum()),
    "squares of two totals": of_labels(lambda p, t: p[:, 0].sum() ** 2 + p[:, 1].sum() ** 2),
}
