"""Losses that select by indices and masks which they fill in through views."""

import torch
from torch.nn import functional as F

from cases.hunt.fourth_losses import TOKENS
from cases.hunt.losses import table
from cases.losses import INDEXED, SUM, TANGLED, D, N, classes


def surprise(p, y):
    return F.cross_entropy(p.flatten(0, 1), y.flatten())


def ignored_columns(p, y):
    y = y.clone()
    y[:, 0] = -100
    return surprise(p, y)


def mask_of_columns(p, y):
    kept = torch.zeros_like(y, dtype=torch.bool)
    kept[:, 1:3] = True
    return F.cross_entropy(p[kept], y[kept])


def weights_of_columns(p, y):
    weights = torch.ones(y.shape)
    weights[:, -1] = 0
    losses = F.cross_entropy(p.transpose(1, 2), y, reduction="none")
    return (losses * weights).sum() / weights.sum()


table(
    SUM,
    TOKENS,
    {
        "written: ignored columns": ignored_columns,
        "written: mask of columns": mask_of_columns,
        "written: weights of columns": weights_of_columns,
    },
)


def ignored_in_a_flat_view(p, y):
    y = y.clone()
    y.view(-1)[::3] = -100
    return surprise(p, y)


def mask_of_another_form(p, y):
    kept = torch.zeros_like(y, dtype=torch.bool)
    kept[0, 1:3] = True
    kept[1:, 0] = True
    return F.cross_entropy(p[kept], y[kept])


table(
    INDEXED,
    TOKENS,
    {
        "written: ignored in a flat view": ignored_in_a_flat_view,
        "written: mask of another form": mask_of_another_form,
    },
    accept_unknown=True,
)


def one_row_twice(p, y):
    index = torch.arange(N)
    index[0] = 1
    return F.cross_entropy(p[index], y)


def one_pair(p, y):
    index = torch.arange(N)
    index[0] = 3
    return (p * p[index]).sum(1).exp().mean()


def each_with_the_next(p, y):
    index = torch.arange(N)
    index[:-1] += 1
    index[-1] = 0
    return (p * p[index]).sum(1).exp().mean()


table(
    TANGLED,
    classes(N, D),
    {
        "written: one row twice": one_row_twice,
        "written: one pair": one_pair,
        "written: each with the next": each_with_the_next,
    },
    accept_unknown=True,
)
