"""Programs with loops that Python ends, in the model or in the loss, and what is true of them.

Each takes inputs [N, D] in float64. ``truth``: whether a verdict holds, as a human sees it; what
the structure says may be less, and is listed with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub

N, D, C = 6, 4, 3
MOST = 20_000  # rounds of a loop that never ends by itself
NEAR = 1e-6


class TooLong(BaseException):
    """Raised by a loop that goes on for too long; no handler of exceptions takes it."""


def rounds() -> Iterator[int]:
    yield from range(MOST)
    raise TooLong


# --- in the model ---------------------------------------------------------------------------------


class Loop(nn.Module):
    """A linear layer, ``inner`` with the weights of another one, and a linear layer."""

    def __init__(self, inner: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(D, D), nn.Linear(D, C), inner
        self.weight = nn.Parameter(torch.randn(D, D) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x), self.weight))


def fixed_point(x: Tensor, w: Tensor) -> Tensor:
    """All samples until all stand still: samples decide together when it ends."""
    z = torch.zeros_like(x)
    for _ in rounds():
        new = torch.tanh(z @ w + x)
        if (new - z).norm() < NEAR:
            break
        z = new
    return new


def anderson(x: Tensor, w: Tensor) -> Tensor:
    """A fixed point by Anderson's mixing of the last two states of each sample."""
    before, z = torch.zeros_like(x), torch.tanh(x)
    for _ in rounds():
        of_before, of_z = torch.tanh(before @ w + x), torch.tanh(z @ w + x)
        one, other = of_before - before, of_z - z
        if other.norm() < NEAR:
            break
        share = (other * (other - one)).sum(1) / ((other - one).square().sum(1) + 1e-12)
        before, z = z, of_z - share.detach()[:, None] * (of_z - of_before)
    return of_z


def power_iteration(x: Tensor, w: Tensor) -> Tensor:
    """Of the weights alone: spectral normalisation until it stands still."""
    v = torch.ones(D, dtype=x.dtype)
    for _ in rounds():
        new = F.normalize(w.mT @ (w @ v), dim=0)
        if (new - v).norm() < NEAR:
            break
        v = new
    return x @ (w / (w @ v).norm())


def adaptive_steps(x: Tensor, w: Tensor) -> Tensor:
    """An integrator with one step for all samples, halved until the error is small."""
    time, step = 0.0, 0.5
    for _ in rounds():
        slope = torch.tanh(x @ w)
        error = step * float((torch.tanh((x + step * slope) @ w) - slope).detach().norm())
        if error > 0.1:
            step /= 2
            continue
        x, time = x + step * slope, time + step
        if time >= 1:
            break
    return x


def counter_and_break(x: Tensor, w: Tensor) -> Tensor:
    count = 0
    while True:
        x = torch.tanh(x @ w) + x
        count += 1
        if count == 5:
            break
    return x


def samples_one_by_one(x: Tensor, w: Tensor) -> Tensor:
    rows = []
    for row in x:
        z = row
        while z.detach().norm() > 1:
            z = z / 2
        rows.append(torch.tanh(z @ w))
    return torch.stack(rows)


def rejection(x: Tensor, w: Tensor) -> Tensor:
    """Noise for all that is drawn until the largest number is small; it reads no sample."""
    for _ in rounds():
        noise = torch.randn_like(x)
        if noise.abs().max() < 3:
            break
    return x @ w + noise


def gram_schmidt(x: Tensor, w: Tensor) -> Tensor:
    """Of the weights alone, twice where once was not enough."""
    columns: list[Tensor] = []
    for column in w.unbind(1):
        for _ in rounds():
            column = column - sum((c @ column) * c for c in columns)
            column = column / column.norm()
            if all(float((c @ column).detach().abs()) < NEAR for c in columns):
                break
        columns.append(column)
    return x @ torch.stack(columns, 1)


def tree(x: Tensor, w: Tensor) -> Tensor:
    """Recursion over the features."""

    def of(features: Sequence[Tensor]) -> Tensor:
        if len(features) == 1:
            return features[0]
        half = len(features) // 2
        return torch.tanh(w[0, 0] * of(features[:half]) + w[0, 1] * of(features[half:]))

    return x * of(x.unbind(1))[:, None]


def beam_search(x: Tensor, w: Tensor) -> Tensor:
    """The best two of each sample's states, three times."""
    states, scores = x[:, None], x.new_zeros(len(x), 1)
    for _ in range(3):
        options = torch.stack([torch.tanh(states @ w), torch.tanh(states @ w.mT)], 2).flatten(1, 2)
        totals = scores.repeat_interleave(2, 1) + options.sum(2)
        scores, chosen = totals.topk(2, 1)
        states = options.gather(1, chosen[..., None].expand(-1, -1, D))
    return states.mean(1)


def conjugate_gradients(x: Tensor, w: Tensor) -> Tensor:
    """``(wᵀw + 1)⁻¹ x``, all samples until the residual of all is small."""
    matrix = w.mT @ w + torch.eye(D, dtype=x.dtype)
    z, residual = torch.zeros_like(x), x
    direction = residual
    for _ in rounds():
        if residual.detach().norm() < NEAR:
            break
        product = direction @ matrix
        step = residual.square().sum(1) / (direction * product).sum(1).clamp(min=1e-30)
        z = z + step[:, None] * direction
        new = residual - step[:, None] * product
        turn = new.square().sum(1) / residual.square().sum(1).clamp(min=1e-30)
        residual, direction = new, new + turn[:, None] * direction
    return z


# --- in the loss ----------------------------------------------------------------------------------


def newton(p: Tensor, _: Tensor) -> Tensor:
    """The root of each prediction's size, until each is near enough."""
    roots = []
    for a in p[:, 0].exp():
        u = a.detach()
        while (u * u - a).abs() > NEAR:
            u = (u + a / u) / 2
        roots.append(u)
    return torch.stack(roots).mean()


def sinkhorn(p: Tensor, _: Tensor) -> Tensor:
    """Transport between predictions and classes; samples share its columns."""
    plan = (-p.square()).exp()
    for _ in rounds():
        plan = plan / plan.sum(0) / C
        rows = plan.sum(1)
        if (rows - 1 / N).abs().max() < NEAR:
            break
        plan = plan / rows[:, None] / N
    return (plan * p.square()).sum()


def bisection(p: Tensor, _: Tensor) -> Tensor:
    low, high = p.detach().min() - 1, p.detach().max() + 1
    for _ in rounds():
        if high - low < NEAR:
            break
        middle = (low + high) / 2
        if middle.exp() > p.detach().exp().mean():
            high = middle
        else:
            low = middle
    return (p - high).square().sum()


def line_search(p: Tensor, y: Tensor) -> Tensor:
    """Cross entropy after a step along its own gradient, halved until it is less."""
    base = F.cross_entropy(p, y)
    (slope,) = torch.autograd.grad(base, p, create_graph=True)
    step = 64.0
    for _ in rounds():
        after = F.cross_entropy(p - step * slope, y)
        if after < base:
            break
        step /= 2
    return after


def mixture(p: Tensor, _: Tensor) -> Tensor:
    """Expectation and maximisation for two centres of the predictions, until they stand still."""
    centres = p[:2].detach()
    for _ in rounds():
        shares = (-torch.cdist(p.detach(), centres).square()).softmax(1)
        new = shares.mT @ p.detach() / shares.sum(0)[:, None]
        if (new - centres).norm() < NEAR:
            break
        centres = new
    return (shares * torch.cdist(p, centres).square()).sum()


def k_means(p: Tensor, _: Tensor) -> Tensor:
    centres = p[:2].detach()
    for _ in rounds():
        nearest = torch.cdist(p.detach(), centres).argmin(1)
        new = torch.stack([p.detach()[nearest == k].mean(0) for k in range(2)])
        if torch.equal(new.nan_to_num(), centres.nan_to_num()):
            break
        centres = new
    return (p - centres[nearest].nan_to_num()).square().sum()


def dynamic_programme(p: Tensor, _: Tensor) -> Tensor:
    """The soft cheapest way through the predictions of each sample."""
    costs = p.square()
    best = costs[:, 0]
    for t in range(1, C):
        stay, go = best + costs[:, t], best + 2 * costs[:, t - 1]
        best = -torch.logaddexp(-stay, -go)
    return best.mean()


def alignment(p: Tensor, y: Tensor) -> Tensor:
    """A forward recursion as of CTC, over the classes as positions, sample by sample."""
    losses = []
    for scores, label in zip(p.log_softmax(1), y.tolist(), strict=True):
        empty, seen = scores[0], scores[label]
        for t in range(1, C):
            seen = torch.logaddexp(seen, empty) + scores[t]
            empty = empty + scores[0]
        losses.append(-torch.logaddexp(seen, empty))
    return torch.stack(losses).mean()


def levenberg(p: Tensor, _: Tensor) -> Tensor:
    """A scale for all predictions, fitted with a damping that is raised until the fit is better."""
    scale, damping = p.new_ones(()), 1e-3
    for _ in rounds():
        residual = scale * p.detach() - p.detach().tanh()
        before = residual.square().sum()
        step = (residual * p.detach()).sum() / (p.detach().square().sum() + damping)
        after = ((scale - step) * p.detach() - p.detach().tanh()).square().sum()
        if after > before:
            damping *= 10
            continue
        scale = scale - step
        if step.abs() < NEAR:
            break
    return (scale * p - p.tanh()).square().sum()


# --- the table ------------------------------------------------------------------------------------

VERDICTS = ("independent_forward", "reduction")


@dataclass(frozen=True)
class Case:
    """``truth``: of independence and reduction; ``said``: what the structure says where it is less.

    ``part``: what goes into the model, or the loss.
    """

    part: Any
    truth: tuple[str, str]
    said: tuple[str, str] = ("", "")
    in_loss: bool = field(default=False)

    def problem(self, effort: float = 50.0) -> ub.Problem:
        torch.manual_seed(0)
        X, y = torch.randn(N, D).double(), torch.arange(N) % C
        if self.in_loss:
            return ub.Problem(nn.Linear(D, C).double(), self.part, (X, y), effort=effort)
        return ub.Problem(Loop(self.part).double(), F.cross_entropy, (X, y), effort=effort)

    @property
    def expected(self) -> tuple[str, ...]:
        pairs = zip(self.said, self.truth, strict=True)
        return tuple(said or truth for said, truth in pairs)


def model(part: Any, independent: str, said: str = "") -> Case:
    return Case(part, (independent, "holds"), (said, ""))


def loss(part: Any, reduction: str, said: str = "") -> Case:
    return Case(part, ("holds", reduction), ("", said), in_loss=True)


LOOPS = {
    "fixed point of a layer": model(fixed_point, "fails"),
    "Anderson mixing": model(anderson, "fails"),
    "power iteration": model(power_iteration, "holds"),
    "integrator with adaptive steps": model(adaptive_steps, "fails"),
    "counter and break": model(counter_and_break, "holds"),
    "loop over samples": model(samples_one_by_one, "holds", "unknown"),
    "iterated rejection": model(rejection, "holds"),
    "Gram-Schmidt": model(gram_schmidt, "holds"),
    "recursion on a tree": model(tree, "holds"),
    "beam search": model(beam_search, "holds"),
    "conjugate gradients": model(conjugate_gradients, "fails", "unknown"),
    "Newton's method": loss(newton, "holds", "unknown"),
    "Sinkhorn": loss(sinkhorn, "fails"),
    "bisection": loss(bisection, "fails"),
    "line search": loss(line_search, "fails", "unknown"),
    "expectation and maximisation": loss(mixture, "fails"),
    "k-means": loss(k_means, "fails", "unknown"),
    "dynamic programming": loss(dynamic_programme, "holds"),
    "alignment": loss(alignment, "holds"),
    "Levenberg-Marquardt": loss(levenberg, "fails"),
}
