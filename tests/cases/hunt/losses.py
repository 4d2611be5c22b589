"""Losses of the hunt, with their truth, as in `cases/losses.py`."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from cases.losses import (
    INDEXED,
    SEPARATE,
    SUM,
    TANGLED,
    D,
    LossCase,
    N,
    classes,
    values,
)

LOSSES: list[LossCase] = []


def table(
    truth: tuple[str, str],
    inputs: Callable[[], Any],
    losses: dict[str, Callable[..., Any]],
    on_targets: bool | None = None,
    accept_unknown: bool = False,
) -> None:
    for name, loss in losses.items():
        LOSSES.append(LossCase(name, loss, inputs, *truth, on_targets, accept_unknown))


def per_sample(p, y):
    return (p - y).square().sum(1)


def into_integers(p, y):
    total = torch.zeros((), dtype=torch.int64)
    total.copy_(10 * per_sample(p, y).sum())
    return total + p.sum()


def rounded_total(p, y):
    return per_sample(p, y).sum().to(torch.int64) + p.sum()


def into_half(p, y):
    total = torch.zeros((), dtype=torch.float16)
    total.copy_(per_sample(p, y).sum())
    return total.float()


def cross_entropy_fails(p, y):
    try:
        torch.linalg.cholesky(p.T @ p - torch.eye(D))
        return per_sample(p, y).mean()
    except RuntimeError:
        return per_sample(p, y).mean() * 2


def class_out_of_range(p, y):
    try:
        F.nll_loss(torch.zeros(1, 3), (p[:, 0] > 0).sum()[None])
    except (IndexError, RuntimeError):
        return 2 * per_sample(p, y).mean()
    return per_sample(p, y).mean()


def raised(p, y):
    try:
        if p.mean() > 0:
            raise ValueError
    except ValueError:
        return 2 * per_sample(p, y).mean()
    return per_sample(p, y).mean()


def scaled_by_data(p, y):
    losses = per_sample(p, y)
    losses.data = losses.data * torch.arange(1.0, N + 1)
    return losses.sum()


def through_grad(p, y):
    return torch.func.grad(lambda q: per_sample(q, y).sum())(p).square().sum()


def through_grad_of_square(p, y):
    return torch.func.grad(lambda q: per_sample(q, y).sum().square())(p).square().sum()


def lengths(n: int, size: int) -> torch.Tensor:
    return torch.full((n,), size)


def ctc(labels: Callable[[Any], Any], flat: bool = False) -> Any:
    def loss(p, y):
        log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
        y = labels(y)
        return F.ctc_loss(
            log_p, y.flatten() if flat else y, lengths(N, 4), lengths(N, 2), reduction="sum"
        )

    return loss


def ctc_inputs():
    return torch.randn(N, 4 * D), torch.randint(1, D, (N, 2))


def ctc_lengths(p, y):
    log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
    return F.ctc_loss(log_p, y, lengths(N, 4), y.amax(1).clamp(1, 2), reduction="sum")


table(
    SUM,
    values(N, D),
    {
        "square by multiplication with itself": lambda p, y: ((p - y) * (p - y)).sum(),
        "square by a matrix product, diagonal": lambda p, y: ((p - y) @ (p - y).T).diagonal().sum(),
        "square by baddbmm": lambda p, y: torch.bmm((p - y)[:, None], (p - y)[:, :, None]).sum(),
        "trapezoid of squares": lambda p, y: torch.trapezoid((p - y).square(), dim=1).mean(),
        "mean of means": lambda p, y: (p - y).abs().mean(1).mean(),
        "sum over samples first": lambda p, y: (p - y).square().sum(0).sum(),
        "sum over samples first, weighted by output": lambda p, y: (
            (p - y).square().sum(0) * torch.arange(D)
        ).sum(),
        "nansum of squares": lambda p, y: (p - y).square().nansum(),
        "sum into double": lambda p, y: (p - y).square().sum(dtype=torch.float64).float(),
        "Huber of half": lambda p, y: F.huber_loss(p, y, delta=0.3) / 2,
        "cosine embedding": lambda p, y: F.cosine_embedding_loss(p, y, torch.ones(N)),
        "triplet to rolled outputs": lambda p, y: F.triplet_margin_loss(p, p.flip(1), p.roll(1, 1)),
        "multi-label soft margin, summed": lambda p, y: F.multilabel_soft_margin_loss(
            p, (y > 0).float(), reduction="sum"
        ),
        "gradient penalty": through_grad,
        "quantile within the sample": lambda p, y: (p - y).abs().quantile(0.5, 1).sum(),
        "each sample by vmap": lambda p, y: torch.vmap(lambda a, b: (a - b).norm())(p, y).sum(),
        "logsumexp of outputs": lambda p, y: p.logsumexp(1).mean(),
        "norm of each residual": lambda p, y: torch.linalg.vector_norm(p - y, 3, 1).sum(),
        "sum of a stack": lambda p, y: torch.stack(
            [(a - b).norm() for a, b in zip(p, y, strict=True)]
        ).sum(),
        "sum of a cat": lambda p, y: torch.cat([(p - y).square(), (p + y).abs()], 1).sum(),
        "difference of sums": lambda p, y: (p - y).square().sum() - (p * y).sum(),
        "log of the exponential of a total": lambda p, y: per_sample(p, y).mean().exp().log(),
        "copied into half precision": into_half,
    },
    accept_unknown=True,
)
table(
    SEPARATE,
    values(N, D),
    {
        "total copied into integers": into_integers,
        "total cast to integers": rounded_total,
        "sum of the total and its square": lambda p, y: (
            per_sample(p, y).sum().square() + per_sample(p, y).sum()
        ),
        "Frobenius norm": lambda p, y: torch.linalg.matrix_norm(p - y),
        "norm of order one and a half": lambda p, y: (p - y).norm(1.5),
        "tanh of a mean": lambda p, y: per_sample(p, y).mean().tanh(),
        "clamped mean": lambda p, y: per_sample(p, y).mean().clamp(min=0.5),
        "softplus of a sum": lambda p, y: F.softplus(per_sample(p, y).sum() - 10),
        "maximum of a mean and a number": lambda p, y: torch.maximum(
            per_sample(p, y).mean(), torch.tensor(3.0)
        ),
        "a mean over its maximum": lambda p, y: per_sample(p, y).mean() / per_sample(p, y).amax(),
        "standard deviation of losses": lambda p, y: per_sample(p, y).std(),
        "power of a total": lambda p, y: per_sample(p, y).sum() ** 1.5,
        "absolute deviation from a level": lambda p, y: (per_sample(p, y).mean() - 0.3).abs(),
        "floor of a division of a total": lambda p, y: (
            per_sample(p, y).sum().div(0.1, rounding_mode="floor") + 0 * per_sample(p, y).sum()
        ),
        "trimmed mean": lambda p, y: per_sample(p, y).sort().values[1:-1].mean(),
        "where on a mean": lambda p, y: (
            torch.where(per_sample(p, y).mean() > 1, 1.0, 2.0) * per_sample(p, y).mean()
        ),
    },
    accept_unknown=True,
)
table(
    TANGLED,
    values(N, D),
    {
        "product of a sum and a weighted sum": lambda p, y: (
            ((p - y).square().sum() + p.abs().sum()) * ((p - y).square().sum() + 2 * p.abs().sum())
        ),
        "a sum and a multiple inside a root": lambda p, y: (
            (p.abs().sum() + y.sum().abs() + p.square().sum()).sqrt()
            + p.abs().sum()
            + 0.3 * p.square().sum()
        ),
        "square of a summed difference to rolled": lambda p, y: (p - p.roll(1, 0)).square().sum(),
        "gradient penalty of a square": through_grad_of_square,
        "centred kernel": lambda p, y: (p - p.mean(0)).square().sum(),
        "mean of pairs by cdist": lambda p, y: torch.cdist(p, p).mean(),
        "pdist": lambda p, y: torch.pdist(p).mean(),
        "covariance off its diagonal": lambda p, y: torch.cov(p.T).triu(1).square().sum(),
        "spectral norm": lambda p, y: torch.linalg.matrix_norm(p - y, 2),
        "norm of the mean residual": lambda p, y: (p - y).mean(0).norm(),
        "gather of another's output": lambda p, y: (p.gather(0, y.argsort(0)) * p).sum(),
        "sum of cumulative sums": lambda p, y: p.cumsum(0).square().sum(),
        "if on the raised mean": raised,
        "a factor that fails in the loss": cross_entropy_fails,
        "a class out of range in the loss": class_out_of_range,
    },
    accept_unknown=True,
)
table(
    INDEXED,
    values(N, D),
    {
        "powers by index": lambda p, y: (p.abs().sum(1) ** torch.arange(1.0, N + 1)).sum(),
        "squares beyond the third": lambda p, y: p[:3].abs().sum() + p[3:].square().sum(),
        "sine of a phase by index": lambda p, y: (p.sum(1) + torch.arange(N)).sin().sum(),
    },
    accept_unknown=True,
)
table(SUM, values(N, D), {"losses scaled through data": scaled_by_data}, accept_unknown=True)
table(SUM, ctc_inputs, {"paths to own labels": ctc(lambda y: y)}, accept_unknown=True)
table(
    SUM, ctc_inputs, {"paths to labels in one vector": ctc(lambda y: y, True)}, accept_unknown=True
)
table(SUM, ctc_inputs, {"paths to labels of own lengths": ctc_lengths}, accept_unknown=True)


def ctc_vector():
    return torch.randn(N, 4 * D), torch.randint(1, D, (2 * N,))


def ctc_masked(p, y):
    log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
    mask = (y > 2) | (torch.arange(2) == 0)
    return F.ctc_loss(log_p, y[mask], lengths(N, 4), mask.sum(1), reduction="sum")


def ctc_selected(p, y):
    log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
    mask = (y > 2) | (torch.arange(2) == 0)
    return F.ctc_loss(log_p, y.masked_select(mask), lengths(N, 4), mask.sum(1), reduction="sum")


def ctc_selected_from_others(p, y):
    log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
    mask = (y > 2) | (torch.arange(2) == 0)
    flat = y.masked_select(mask).flip(0)
    return F.ctc_loss(log_p, flat, lengths(N, 4), mask.sum(1), reduction="sum")


def ctc_as_lists(labels: Callable[[Any], Any]) -> Any:
    def loss(p, y):
        log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
        flat = labels(y).flatten()
        return F.ctc_loss(log_p, flat, [4] * N, [2] * N, reduction="mean")

    return loss


def ctc_uneven(p, y):
    """The second sample is compared with a label of the first, too."""
    log_p = p.view(N, 4, D).transpose(0, 1).log_softmax(2)
    return F.ctc_loss(log_p, y.flatten(), [4] * N, [1, 3, 2, 2, 2, 2], reduction="sum")


table(
    SUM,
    ctc_inputs,
    {
        "paths to labels by a mask": ctc_masked,
        "paths to selected labels": ctc_selected,
        "paths, by lists": ctc_as_lists(lambda y: y),
    },
    accept_unknown=True,
)
# A vector of targets has no sample axis: each sample has its own function.
table(
    INDEXED,
    ctc_vector,
    {"paths to labels given in one vector": ctc(lambda y: y)},
    accept_unknown=True,
)
table(
    TANGLED,
    ctc_inputs,
    {
        "paths of uneven lengths": ctc_uneven,
        "paths to selected labels of others": ctc_selected_from_others,
        "paths to flipped labels, by lists": ctc_as_lists(lambda y: y.flip(0)),
        "paths to sorted labels": ctc(lambda y: y.sort(0)[0]),
        "paths to labels of others": ctc(lambda y: y.roll(1, 0)),
        "paths to labels mixed with those of others": ctc(lambda y: (y + y.roll(1, 0)) % 4 + 1),
        "paths to labels mixed, in one vector": ctc(lambda y: (y + y.roll(1, 0)) % 4 + 1, True),
    },
    accept_unknown=True,
)
table(
    SUM,
    classes(N, D),
    {
        "cross-entropy of a flattened pair": lambda p, y: F.cross_entropy(
            torch.cat([p, -p]), torch.cat([y, y])
        ),
        "likelihood of one sample at a time": lambda p, y: sum(
            F.cross_entropy(a[None], b[None]) for a, b in zip(p, y, strict=True)
        ),
        "margin of order two": lambda p, y: F.multi_margin_loss(p, y, p=2, margin=0.5),
        "one-hot product": lambda p, y: -(p.log_softmax(1) * F.one_hot(y, D)).sum(),
    },
    accept_unknown=True,
)
table(
    TANGLED,
    classes(N, D),
    {
        "classes along the samples": lambda p, y: F.cross_entropy(p.T, y),
        "labels made of own and the next": lambda p, y: F.cross_entropy(p, (y + y.roll(1)) % D),
        "class weights made of predictions": lambda p, y: F.cross_entropy(
            p, y, p.detach().mean(0).exp()
        ),
        "margins weighted by predictions": lambda p, y: F.multi_margin_loss(
            p, y, weight=p.mean(0).exp()
        ),
        "labels of the next": lambda p, y: F.cross_entropy(p, y.roll(1)),
        "class means": lambda p, y: torch.zeros(D, D).index_add(0, y, p).square().sum(),
    },
    accept_unknown=True,
)

# What the weights depend on: targets of other samples, or not.
table(
    SUM,
    values(N, D),
    {
        "share of the targets": lambda p, y: (per_sample(p, y) * (y.sum(1) / y.sum())).sum(),
        "softmax of sums of targets": lambda p, y: (per_sample(p, y) * y.sum(1).softmax(0)).sum(),
        "divided by the largest target": lambda p, y: per_sample(p, y).sum() / y.abs().max(),
        "divided by a norm of the targets": lambda p, y: per_sample(p, y).sum() / y.norm(),
        "mean over the kept": lambda p, y: (
            (per_sample(p, y) * (y[:, 0] > 0)).sum() / (y[:, 0] > 0).sum()
        ),
        "masked by the median of targets": lambda p, y: (
            per_sample(p, y) * (y[:, 0] > y[:, 0].median())
        ).mean(),
    },
    True,
    accept_unknown=True,
)
table(
    SUM,
    values(N, D),
    {
        "weights that decay": lambda p, y: (per_sample(p, y) * 0.9 ** torch.arange(N)).sum(),
        "half of a mean": lambda p, y: per_sample(p, y).mean() / 2,
        "weights of outputs": lambda p, y: ((p - y).square() * torch.arange(D)).mean(),
    },
    False,
)
table(
    SUM,
    classes(N, D),
    {
        "inverse class counts": lambda p, y: (
            F.cross_entropy(p, y, reduction="none") / torch.bincount(y, minlength=D)[y]
        ).sum(),
    },
    True,
    accept_unknown=True,
)
