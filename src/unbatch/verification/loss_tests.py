"""Numerical witnesses about the loss, as a function of the predictions.

Second differences over two samples show that a loss is no sum; the direction in which one prediction enters shows
whether it does so through one scalar of its own. In float64 where the loss takes it; what rounding does is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from unbatch.capture.isolation import untouched
from unbatch.linalg.precision import (
    LOSS_IN_DOUBLE,
    LOSS_WITH_CASTS,
    NARROW,
    LossTolerances,
    in_double,
)
from unbatch.verification.experiment import Experiment
from unbatch.verification.forward_tests import Counterexample


@dataclass
class LossExperiment:
    """The loss as a function of the rows of the predictions, in float64."""

    oracle: Experiment
    output: Any

    def __post_init__(self) -> None:
        self.boundary: dict[int, Tensor] = {}
        if self.oracle.program.loss is None:
            self._open_up()
            return
        leaves, self.spec = tree_flatten(self.output)
        at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        self.leaves = leaves
        self.at = [at[i] for i in self.oracle.places]
        self.double = self._takes_double()

    def _open_up(self) -> None:
        """The loss lies inside the model: run its steps alone, from the values they read."""
        graph = self.oracle.graph
        read = {r.index for s in graph.loss_steps for r in s.refs()}
        assert graph.loss is not None
        graph.run(
            {},
            [graph.loss.index],
            visit=lambda i, t: (
                self.boundary.__setitem__(i, t.detach().clone()) if i in read else None
            ),
        )
        self.leaves = [self.boundary[graph.predictions[i].index] for i in self.oracle.places]
        self.at = list(range(len(self.leaves)))
        self.double = all(t.dtype == torch.float64 for t in self.leaves)

    def _takes_double(self) -> bool:
        """The loss can be evaluated in float64, and is finite there."""
        try:
            self.__dict__["double"] = True
            return bool(torch.isfinite(self.value([self.leaves[i] for i in self.at])))
        except Exception:
            return False

    def _cast(self, t: Any) -> Any:
        return in_double(t.detach()) if isinstance(t, Tensor) and self.double else t

    def value(self, predictions: Sequence[Tensor]) -> Tensor:
        graph = self.oracle.graph
        if self.oracle.program.loss is None:
            assert graph.loss is not None
            places = (graph.predictions[i].index for i in self.oracle.places)
            feed = self.boundary | dict(zip(places, predictions, strict=True))
            return graph.run(feed, [graph.loss.index], steps=graph.loss_steps)[0]
        leaves = [self._cast(t) for t in self.leaves]
        for i, p in zip(self.at, predictions, strict=True):
            leaves[i] = p.to(torch.float64) if self.double and p.is_floating_point() else p
        output = tree_unflatten(leaves, self.spec)
        targets = tree_map(self._cast, self.oracle.targets)
        program = self.oracle.program
        with untouched(program.modules, self.oracle.graph.rng), torch.enable_grad():
            value: Tensor = program.evaluate(output, targets)
        return value

    def swapped(self, rows: Mapping[int, int]) -> list[Tensor]:
        """The predictions with the rows of some samples taken from other samples."""
        out = []
        for i, dim in zip(self.at, self.oracle.out_dims, strict=True):
            t = self._cast(self.leaves[i]).detach().clone(memory_format=torch.contiguous_format)
            if dim is not None:
                source = t.clone()
                for n, m in rows.items():
                    t.select(dim, n).copy_(source.select(dim, m))
            out.append(t)
        return out

    def scaled(self, rows: Sequence[int], factor: float) -> list[Tensor]:
        """The predictions with some rows multiplied by ``factor``."""
        out = self.swapped({})
        for t, dim in zip(out, self.oracle.out_dims, strict=True):
            if dim is not None and t.is_floating_point():
                for n in rows:
                    t.select(dim, n).mul_(factor)
        return out

    def slope(self, predictions: Sequence[Tensor], n: int, entries: int = 6) -> Tensor:
        """The first entries of the gradient by prediction n, by central differences: sees through ``detach``."""
        out = []
        for i, dim in enumerate(self.oracle.out_dims):
            if dim is None or not predictions[i].is_floating_point():
                continue
            for c in range(min(entries, predictions[i].select(dim, n).numel())):
                pair = []
                for sign in (1, -1):
                    moved = [p.clone() for p in predictions]
                    row = moved[i].select(dim, n)
                    row.view(-1)[c] += sign * 1e-5 if row.is_contiguous() else 0.0
                    pair.append(self.value(moved).detach())
                out.append((pair[0] - pair[1]) / 2e-5)
        return torch.stack(out).to(torch.float64) if out else torch.zeros(0, dtype=torch.float64)

    def gradient(self, predictions: Sequence[Tensor]) -> Tensor:
        leaves = [
            p.detach().clone().requires_grad_() if p.is_floating_point() else p for p in predictions
        ]
        value = self.value(leaves)
        wanted = [p for p in leaves if p.requires_grad]
        grads = (
            torch.autograd.grad(value, wanted, allow_unused=True)
            if value.requires_grad
            else [None] * len(wanted)
        )
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)
        ]
        dims = [d for p, d in zip(leaves, self.oracle.out_dims, strict=True) if p.requires_grad]
        rows = [
            g.movedim(d, 0).reshape(self.oracle.samples, -1)
            for g, d in zip(filled, dims, strict=True)
            if d is not None
        ]
        return torch.cat(rows, 1) if rows else torch.zeros(self.oracle.samples, 0)

    @cached_property
    def rounding(self) -> float:
        """How much the value changes, relative to its size, when predictions change by one rounding."""
        generator = torch.Generator().manual_seed(0)
        base = self.swapped({})
        worst, here = 0.0, self.value(base).detach()
        for _ in range(3):
            nudged = [
                p
                * (
                    1
                    + torch.finfo(p.dtype).eps
                    * (torch.rand(p.shape, generator=generator).to(p) - 0.5)
                )
                if p.is_floating_point()
                else p
                for p in base
            ]
            worst = max(
                worst,
                float((self.value(nudged).detach() - here).abs()) / (float(here.abs()) + 1e-300),
            )
        return worst

    @property
    def fine(self) -> bool:
        """Values are good to float64: nothing on the way is cast to a coarser type."""
        casts = [
            s.kwargs.get("dtype") for s in self.oracle.graph.loss_steps if s.name == "_to_copy"
        ]
        return (
            self.double
            and not any(d in NARROW for d in casts)
            and self.value(self.swapped({})).dtype == torch.float64
        )

    @property
    def tolerances(self) -> LossTolerances:
        return LOSS_IN_DOUBLE if self.fine else LOSS_WITH_CASTS

    def floor(self, gradient: Tensor) -> float:
        """Norms below this are rounding: by the other rows, the size of loss and predictions, and a trial."""
        allowed = self.tolerances
        here = self.swapped({})
        size = (
            max(
                (float(p.abs().max()) for p in here if p.is_floating_point() and p.numel()),
                default=1.0,
            )
            + 1e-300
        )
        slope = float(self.value(here).detach().abs()) / size
        nudged = self.gradient([p * (1 + 1e-7) if p.is_floating_point() else p for p in here])
        noise = 10 * float((nudged - self.gradient(here)).norm(dim=1).max())
        return (
            max(allowed.norm * float(gradient.norm(dim=1).max()), allowed.size * slope, noise)
            + 1e-300
        )

    @contextmanager
    def targets(self, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, every per-sample target is changed."""
        oracle, kept = self.oracle, self.oracle.targets
        n = oracle.samples
        try:
            oracle.targets = tree_map(
                lambda t: change(t) if isinstance(t, Tensor) and t.ndim and t.shape[0] == n else t,
                kept,
            )
            yield
        finally:
            oracle.targets = kept


# --- is it a sum? ---------------------------------------------------------------------------------


def not_a_sum(loss: LossExperiment) -> Counterexample | None:
    """A second difference over two samples that does not vanish."""
    n = loss.oracle.samples
    if n < 2:
        return None
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b][:12]
    tolerance = max(loss.tolerances.second_difference, 100 * loss.rounding)
    for a, b in pairs:
        rows = [
            loss.swapped(r)
            for r in ({}, {a: (a + 1) % n}, {b: (b + 1) % n}, {a: (a + 1) % n, b: (b + 1) % n})
        ]
        found = abs(_second_difference(loss, rows))
        if found > tolerance and _steady(loss, rows):
            return Counterexample("second difference over two samples", found)
    far = _stretched(loss, max(tolerance, 1e-6))
    return Counterexample("second difference over two samples, stretched", far) if far else None


def _second_difference(loss: LossExperiment, rows: list[list[Tensor]]) -> float:
    terms = [loss.value(r).detach() for r in rows]
    if not all(torch.isfinite(t) for t in terms):
        return 0.0
    return float(terms[0] - terms[1] - terms[2] + terms[3]) / (
        max(float(t.abs()) for t in terms) + 1e-300
    )


def _steady(loss: LossExperiment, rows: list[list[Tensor]]) -> bool:
    """A true difference hardly changes when predictions move a little; rounding comes out anew."""
    here = _second_difference(loss, rows)
    for nudge in (1e-7, -3e-7, 5e-7, -7e-7):
        there = _second_difference(
            loss, [[p * (1 + nudge) if p.is_floating_point() else p for p in r] for r in rows]
        )
        if abs(here - there) > 0.1 * abs(here):
            return False
    return True


def _stretched(loss: LossExperiment, tolerance: float) -> float:
    """The same with rows far from where they are, for branches that rarely fire."""
    for factor in (30.0, -1e3):
        try:
            rows = [loss.scaled(r, factor) for r in ((), (0,), (1,), (0, 1))]
            found = abs(_second_difference(loss, rows))
            if found > tolerance and _steady(loss, rows):
                return found
        except Exception:
            return 0.0
    return 0.0


# --- through one scalar of its own? ---------------------------------------------------------------


def entangled(loss: LossExperiment) -> Counterexample | None:
    """The direction in which a prediction enters the loss depends on other predictions."""
    n = loss.oracle.samples
    base = loss.gradient(loss.swapped({}))
    if base.shape[1] < 2 or n < 2:
        return _entangled_scalars(loss) if base.shape[1] == 1 else None
    worst, which, floor = 0.0, 0, loss.floor(base)
    for shift in (1, 2):
        for keep in range(n):
            other = loss.gradient(
                loss.swapped({m: (m + shift) % n for m in range(n) if m != keep})
            )[keep]
            worst, which = max((worst, which), (_sine(base[keep], other, floor), keep))
    tolerance = loss.tolerances.direction
    if worst <= tolerance and loss.fine:
        worst, which, tolerance = _entangled_values(loss), 0, LOSS_WITH_CASTS.direction
    return (
        Counterexample(
            "direction of the gradient by one prediction when the others change", worst, -1, which
        )
        if worst > tolerance
        else None
    )


def _entangled_values(loss: LossExperiment) -> float:
    """The same by differences of values, which see through ``detach``."""
    n = loss.oracle.samples
    worst, size = 0.0, float(loss.value(loss.swapped({})).detach().abs())
    for shift in (1, 2):
        here, there = (
            loss.slope(loss.swapped(rows), 0)
            for rows in ({}, {m: (m + shift) % n for m in range(1, n)})
        )
        worst = max(worst, _sine(here, there, 1e-6 + 1e6 * loss.rounding * size))
    return worst


def _entangled_scalars(loss: LossExperiment) -> Counterexample | None:
    """With one entry per sample: mixed second derivatives that are not of rank one off the diagonal."""
    n = loss.oracle.samples
    if n < 4 or not loss.fine:
        return None
    leaves = [p.requires_grad_() for p in loss.swapped({})]
    value = loss.value(leaves)
    if not value.requires_grad:
        return None
    (g,) = torch.autograd.grad(value, leaves, create_graph=True)
    g = g.reshape(-1)
    if not g.requires_grad:
        return None
    H = torch.stack(
        [torch.autograd.grad(g[i], leaves, retain_graph=True)[0].reshape(-1) for i in range(n)]
    )
    quadruples = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (n - 1, 0, n - 2, 1)]
    worst = max(
        float((H[a, b] * H[c, d] - H[a, d] * H[c, b]).abs()) for a, b, c, d in quadruples
    ) / (float(H.abs().max()) ** 2 + 1e-300)
    return Counterexample("mixed second derivatives of the loss", worst) if worst > 1e-8 else None


def index_matters(loss: LossExperiment) -> Counterexample | None:
    """With equal predictions and targets for all samples, gradient rows still have different directions."""
    n = loss.oracle.samples
    if n < 2:
        return None
    floor = loss.floor(loss.gradient(loss.swapped({})))
    with loss.targets(lambda t: t[:1].expand(n, *t.shape[1:]).contiguous()):
        for k in range(min(n, 3)):
            rows = loss.gradient(loss.swapped(dict.fromkeys(range(n), k)))
            worst = max(_sine(rows[0], row, floor) for row in rows) if rows.shape[1] > 1 else 0.0
            if worst > loss.tolerances.direction:
                return Counterexample("gradient rows of equal samples", worst)
    return None


def foreign_targets(loss: LossExperiment) -> Counterexample | None:
    """The direction in which a prediction enters the loss depends on the targets of other samples, and on its own.

    Where all targets together are one constant for all samples (their order does not matter), nothing is said.
    """
    n = loss.oracle.samples
    base = loss.gradient(loss.swapped({}))
    if base.shape[1] < 2 or n < 3:
        return None
    floor, worst, which = loss.floor(base), 0.0, -1
    with loss.targets(lambda t: t.roll(1, 0)):
        rolled = loss.gradient(loss.swapped({}))
    if (
        max(_sine(a, b, floor) for a, b in zip(base, rolled, strict=True))
        < LOSS_WITH_CASTS.direction
    ):
        return None
    for keep in range(n):
        own = torch.tensor([(keep + 1) % n if m == keep else m for m in range(n)])
        with loss.targets(lambda t, own=own: t[own.to(t.device)]):  # type: ignore[misc]
            if (
                _sine(base[keep], loss.gradient(loss.swapped({}))[keep], floor)
                < LOSS_WITH_CASTS.direction
            ):
                continue
        order = torch.tensor([m if m == keep else (keep + 1) % n for m in range(n)])
        with loss.targets(lambda t, order=order: t[order.to(t.device)]):  # type: ignore[misc]
            worst, which = max(
                (worst, which),
                (_sine(base[keep], loss.gradient(loss.swapped({}))[keep], floor), keep),
            )
    tolerance = loss.tolerances.direction
    return (
        Counterexample(
            "direction of the gradient by one prediction when targets of others change",
            worst,
            -1,
            which,
        )
        if worst > tolerance
        else None
    )


def _sine(a: Tensor, b: Tensor, floor: float) -> float:
    """How far two gradients are from being multiples of each other; 0 where one of them vanishes."""
    if (
        not len(a)
        or float(min(a.norm(), b.norm())) < floor
        or not torch.isfinite(b).all()
        or not torch.isfinite(a).all()
    ):
        return 0.0
    a, b = a / a.norm(), b / b.norm()
    return float((a - b * torch.sign((a * b).sum())).norm())


# --- do parameters enter? -------------------------------------------------------------------------


def parameters_matter(loss: LossExperiment) -> Counterexample | None:
    """With the predictions held fixed, the loss changes when a parameter changes."""
    program = loss.oracle.program
    if program.loss is None or not program.modules:
        return None
    here, fixed = loss.value(loss.swapped({})).detach(), loss.swapped({})
    for name, p in program.parameters.items():
        if not p.is_floating_point():
            continue
        with untouched(program.modules), torch.no_grad():
            p.mul_(1.5).add_(0.1)
            there = loss.value(fixed).detach()
        off = float((there - here).abs()) / (float(here.abs()) + 1e-300)
        if off > max(loss.tolerances.parameter, 100 * loss.rounding):
            return Counterexample(
                f"changing the parameter {name!r} with the predictions held fixed", off
            )
    return None
