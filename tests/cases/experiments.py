"""What perturbing samples shows about a program, held against its verdicts."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cases.programs import N, Program, noise
from unbatch import Structure

FORWARD = ("independent_forward", "simd_forward", "simd_given_statistics")


MOVED = 1e-6  # relative change that is no rounding


ORDERS = [
    torch.tensor(o) for o in ([1, 2, 3, 0], [3, 2, 1, 0], [1, 0, 2, 3], [2, 0, 3, 1], [0, 2, 1, 3])
]


Run = Callable[[Tensor], Tensor]


def rows(run: Run, x: Tensor) -> Tensor:
    """Predictions of a batch as `[N, entries]`."""
    with torch.no_grad():
        return run(x.clone()).reshape(N, -1)


def batches(x: Tensor) -> Iterator[Tensor]:
    """The batch itself, others of its kind, and some that are far out."""
    yield x
    yield 100 * x
    yield noise(*x.shape, seed=1)
    yield noise(*x.shape, seed=2) * noise(N, *[1] * (x.ndim - 1), seed=3).exp() ** 2


def replacements(x: Tensor, n: int) -> Iterator[Tensor]:
    """The batch with other samples than n replaced: all or one, by draws of many sizes and special
    values.
    """
    scales = [1.0, 1.0, 0.3, 10.0, 1e3, -1e3, 1e-3, 0.0]
    for seed, scale in enumerate(scales):
        new = scale * noise(*x.shape, seed=10 + seed) + (0.1 * scale if seed % 2 else 0)
        new[n] = x[n]
        yield new
    for m in range(N):
        if m != n:
            for scale in (-1.0, 100.0):
                one = x.clone()
                one[m] = scale * noise(*x.shape[1:], seed=30 + m)
                yield one
    yield x[[n] * N]
    yield torch.where(torch.arange(N).reshape(-1, *[1] * (x.ndim - 1)) == n, x, -x)


def apart(a: Tensor, b: Tensor, size: Tensor) -> float:
    """The largest difference relative to `size`; infinite where one of two is not a number."""
    if bool((torch.isfinite(a) != torch.isfinite(b)).any()):
        return float("inf")
    change = torch.where(torch.isfinite(a), (a - b).abs(), torch.zeros(()))
    return float(change.max() / (size + 1e-30)) if a.numel() else 0.0


def largest_move(run: Run, x: Tensor) -> float:
    """How much a prediction moves, relative to its size, when other samples are replaced."""
    worst = 0.0
    for base in batches(x):
        mine = rows(run, base)
        if not torch.isfinite(mine).all():
            continue
        for n in range(N):
            size = mine[n].abs().max() + 1e-9 * mine.abs().max()
            worst = max(
                [worst, *(apart(rows(run, new)[n], mine[n], size) for new in replacements(base, n))]
            )
    return worst


def largest_unevenness(run: Run, x: Tensor) -> float:
    """How far predictions of the permuted batch are from permuted predictions, beyond what rounding
    explains.

    The second largest over the batches, so that a tie in one of them proves nothing.
    """
    found = []
    for base in batches(x):
        mine = rows(run, base)
        if torch.isfinite(mine).all():
            size = mine.abs().max() + 1e-9 * base.abs().max()
            off = max(apart(rows(run, base[order]), mine[order], size) for order in ORDERS)
            found.append(off if off > 1e3 * wobble(run, base, mine) else 0.0)
    return sorted(found)[-2] if len(found) > 1 else 0.0


def wobble(run: Run, x: Tensor, mine: Tensor) -> float:
    """How much predictions move when inputs change in their last digits:
    large where they cancel.
    """
    shaken = (x * (1 + 1e-14 * noise(*x.shape, seed=s)) for s in range(40, 44))
    return max(apart(rows(run, s), mine, mine.abs().max() + 1e-9 * x.abs().max()) for s in shaken)


def rank_between_samples(run: Run, x: Tensor) -> int:
    """The rank of what half of the samples tell the other half: at most R, by R statistics."""
    if wobble(run, x, rows(run, x)) > 1e-9:
        return 0  # a cancellation: derivatives are rounding
    jacobian = torch.autograd.functional.jacobian(lambda z: run(z).reshape(N, -1), x).reshape(
        N, -1, N, x[0].numel()
    )
    blocks = [
        jacobian[list(s)][:, :, [m for m in range(N) if m not in s]]
        for s in ((0, 1), (0, 2), (0, 3))
    ]
    flat = [b.reshape(b.shape[0] * b.shape[1], -1) for b in blocks]
    usable = [b for b in flat if b.numel() and torch.isfinite(jacobian).all()]
    size = max([1e-3, float(jacobian.abs().max()), float(rows(run, x).abs().max() / x.abs().max())])
    return max((int(torch.linalg.matrix_rank(b, atol=1e-9 * size)) for b in usable), default=0)


def check_forward(structure: Structure, run: Run, x: Tensor) -> None:
    """Raise where a verdict contradicts the oracle."""
    independent, simd, given_ = (getattr(structure, name) for name in FORWARD)
    moved, uneven = largest_move(run, x), largest_unevenness(run, x)
    if independent:
        assert moved < MOVED, f"independent_forward holds, and a prediction moved by {moved:.2g}"
    if independent.status == "fails":
        assert moved > 1e-10, "independent_forward fails, and no prediction moved"
    if simd:
        assert uneven < MOVED, f"simd_forward holds, and permuting is off by {uneven:.2g}"
    if simd.status == "fails":
        assert max(moved, uneven) > 1e-10, "simd_forward fails, and nothing shows it"
    if given_ and "of groups" not in given_.note:
        assert uneven < MOVED, f"simd_given_statistics holds, and permuting is off by {uneven:.2g}"
    if given_ and "of groups" not in given_.note:
        rank = rank_between_samples(run, x)
        assert rank <= structure.statistics_size, (
            f"rank {rank} between samples, with R = {structure.statistics_size}"
        )


def values_of(x: Tensor) -> Iterator[Tensor]:
    yield x
    yield 30 * noise(*x.shape, seed=1)
    yield noise(*x.shape, seed=2).abs() + 1
    yield -1e3 * x
    yield -30 * noise(*x.shape, seed=3).abs()
    yield 0.1 * noise(*x.shape, seed=4)
    yield x.roll(1, 0)


def second_difference(run: Run, p: Tensor) -> float:
    """How far the loss is from a sum over samples: changing two at once, against one after the
    other.

    Relative to the loss, and 0 where rounding explains it.
    """
    worst = 0.0
    for base in values_of(p):
        for new in values_of(p.roll(1, 0)):
            for a in range(N):
                for b in range(a):
                    at = [run(_with(base, new, who)) for who in ((), (a,), (b,), (a, b))]
                    second, size = (
                        float((at[0] - at[1] - at[2] + at[3]).abs()),
                        max(float(t.abs()) for t in at),
                    )
                    if all(torch.isfinite(t) for t in at) and second > worst * size:
                        shaken = run(base * (1 + 1e-14 * noise(*p.shape, seed=40)))
                        rounding = float((shaken - at[0]).abs())
                        worst = second / size if second > 1e3 * rounding + 1e-12 else worst
    return worst


def _with(base: Tensor, new: Tensor, who: tuple[int, ...]) -> Tensor:
    out = base.clone()
    out[list(who)] = new[list(who)]
    return out


def gradient(run: Run, p: Tensor) -> Tensor:
    p = p.clone().requires_grad_()
    value = run(p)
    return torch.autograd.grad(value, p)[0] if value.requires_grad else torch.zeros_like(p)


def angle(a: Tensor, b: Tensor) -> float:
    """The sine between two gradients, 0 where one of them vanishes."""
    norms = float(a.norm() * b.norm())
    if not norms > 1e-12 or norms == float("inf"):
        return 0.0
    a, b = a / a.norm(), b / b.norm()
    return float((a - (a @ b) * b).norm())


def largest_turn(run: Run, p: Tensor) -> float:
    """How much the direction of the gradient by one prediction turns when the others change."""
    worst = 0.0
    for base in values_of(p):
        mine = gradient(run, base)
        for n in range(N):
            for new in values_of(noise(*p.shape, seed=8)):
                other = new.clone()
                other[n] = base[n]
                worst = max(worst, angle(mine[n], gradient(run, other)[n]))
    return worst


def other_targets(y: Tensor, n: int) -> Tensor:
    """Targets that select the same samples by their signs, and are
    otherwise new but for sample n.
    """
    out = noise(*y.shape, seed=9).abs() * y.sign()
    out[n] = y[n]
    return out


def largest_turn_by_targets(loss: Program, p: Tensor, y: Tensor) -> float:
    """The same when the targets of the others change: a loss of one sample knows its own target
    only.
    """
    worst = 0.0
    for base in values_of(p):
        mine = gradient(lambda q: loss(q, y), base)
        for n in range(N):
            other = other_targets(y, n)
            worst = max(worst, angle(mine[n], gradient(lambda q, t=other: loss(q, t), base)[n]))
    return worst


def largest_difference_by_index(loss: Program, p: Tensor, y: Tensor) -> float:
    """With equal targets and equal predictions: how far gradient rows are from being parallel."""
    worst = 0.0
    for base in values_of(p):
        for k in range(N):
            mine = gradient(lambda q, k=k: loss(q, y[[k] * N]), base[[k] * N])
            worst = max([worst, *(angle(mine[0], mine[n]) for n in range(1, N))])
    return worst


def largest_change_of_weights(loss: Program, p: Tensor, y: Tensor) -> float:
    """With equal targets and equal predictions, gradient rows are as the weights, whatever the
    predictions.
    """
    shares: list[Tensor] = []
    for base in values_of(p):
        for k in range(N):
            sizes = gradient(lambda q: loss(q, y[[0] * N]), base[[k] * N]).norm(dim=1)
            shares += [sizes / sizes.sum()] if 1e-9 < float(sizes.sum()) < 1e9 else []
    return max((float((s - shares[0]).abs().max()) for s in shares), default=0.0)


def is_flat(loss: Program, p: Tensor, y: Tensor) -> bool:
    """Saturated wherever it was looked at: gradients that are zero cannot turn."""
    return all(
        float(gradient(lambda q: loss(q, y), base).abs().max()) < 1e-5 for base in values_of(p)
    )


def check_loss(structure: Structure, loss: Program, p: Tensor, y: Tensor) -> None:
    """Raise where a verdict contradicts the oracle."""
    if isinstance(loss, Program):  # values know no detach
        loss = Program([line.replace(".detach()", "") for line in loss.lines], {}, "p, y")
    second, turn = second_difference(lambda q: loss(q, y), p), largest_turn(lambda q: loss(q, y), p)
    selects_none = "y[:, 0] > 0" not in repr(
        loss
    )  # a selection can be empty when targets are equal
    uneven = largest_difference_by_index(loss, p, y) if selects_none else 0.0
    foreign = largest_turn_by_targets(loss, p, y)
    if structure.reduction:
        assert second < MOVED, f"reduction holds, and a second difference is {second:.2g}"
    if structure.reduction.status == "fails":
        assert max(second, turn) > 1e-11, "reduction fails, and nothing shows it"
    if structure.reduction and structure.simd_loss:
        weights = largest_change_of_weights(loss, p, y) if selects_none else 0.0
        assert weights < MOVED, (
            f"both hold, and the weights of equal samples moved by {weights:.2g}"
        )
    if structure.simd_loss:
        assert turn < MOVED, f"simd_loss holds, and a gradient row turned by {turn:.2g}"
        assert uneven < MOVED, f"simd_loss holds, and rows of equal samples are {uneven:.2g} apart"
    if structure.simd_loss.status == "fails" and not is_flat(loss, p, y):
        assert max(turn, uneven, foreign) > 1e-8, "simd_loss fails, and no gradient row turned"
    if structure.reduction and not structure.reduction.weights_depend_on:
        check_weights_are_own(loss, p, y)


def check_weights_are_own(loss: Program, p: Tensor, y: Tensor) -> None:
    """Raise where the gradient by one prediction listens to the targets of others."""
    mine = gradient(lambda q: loss(q, y), p)
    for n in range(N):
        other = other_targets(y, n)
        off = apart(gradient(lambda q, t=other: loss(q, t), p)[n], mine[n], mine.abs().max())
        assert off < MOVED, (
            f"no weight depends on targets, and row {n} moved by {off:.2g} with the others' targets"
        )
