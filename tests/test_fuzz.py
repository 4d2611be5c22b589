"""Random nets with random losses: the whole pipeline against ``reference.py`` and plain experiments, in float64.

The suite runs the same examples every time. To look for new ones, ``UNBATCH_FUZZ=2000 pytest tests/test_fuzz.py`` runs
that many at random; what it finds prints as a ``Source``, to be kept in ``FOUND``.
"""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import unbatch as ub
from nets import Net, Source, net_source
from unbatch import reference

EXACT = 1e-9  # of the largest entry of a parameter, or of 1e-3 of that of all
FLOOR = 1e-13  # what is rounding where everything else is of size one
SHAKE = 1e-14  # a relative change of all inputs and parameters: what it does to a quantity is rounding
MOVED = 1e-9  # a relative change of predictions that is no rounding
ROWS = {"component": reference.component, "copy": reference.copies, "frozen": reference.frozen}

Named = Mapping[str, Tensor]


class Fuzzed:
    """A net on a batch: the arguments of the reference, and the problem."""

    def __init__(self, source: Source, args: tuple, problem: ub.Problem) -> None:
        self.source, self.args, self.problem = source, args, problem

    @staticmethod
    def of(source: Source) -> "Fuzzed":
        model, loss, x, y = source.build()
        return Fuzzed(source, (model, loss, x, y), ub.Problem(model, loss, (x, y)))

    def elsewhere(self) -> "Fuzzed":
        """The same problem after a step of the parameters, with other samples."""
        model, loss, x, y = self.args
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
        x, y = tree_map(other_samples, x), None if y is None else y.flip(0)
        return Fuzzed(self.source, (model, loss, x, y), self.problem.with_batch(x, y))

    @cached_property
    def shaken(self) -> tuple:
        """The same arguments with everything changed in its last digits."""
        model, loss, _, _ = self.source.build()
        model.load_state_dict(self.args[0].state_dict())
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(7)
            for p in model.parameters():
                p.copy_(shaken(p))
            return model, loss, tree_map(shaken, self.args[2]), self.args[3]

    def near(self, found: Tensor, define: Callable[..., Tensor], what: str) -> None:
        """Raise where a tensor is not as defined, by more than its own rounding."""
        self.all_near({what: found}, lambda *args: {what: define(*args)}, what)

    def all_near(self, found: Named, define: Callable[..., Named], what: str) -> None:
        """The same for one tensor by parameter."""
        expected = define(*self.args)
        assert list(found) == list(expected), f"{what}: {list(found)} where {list(expected)} are expected"
        scale = max(map(largest, expected.values()), default=0.0)
        for name, wanted in expected.items():
            shapes = tuple(found[name].shape), tuple(wanted.shape)
            assert shapes[0] == shapes[1], f"{what} of {name}: {shapes[0]} where {shapes[1]} is expected"
            error, bound = largest(found[name] - wanted), EXACT * max(largest(wanted), 1e-3 * scale)
            if error > bound + FLOOR:
                rounding = max(largest(t - expected[n]) for n, t in define(*self.shaken).items())
                assert error <= 100 * rounding, f"{what} of {name}: off by {error:.1e}, allowed {bound:.1e}"


def other_samples(t: Tensor) -> Tensor:
    return 1.3 * t.flip(0) + 0.1 if t.is_floating_point() else t.flip(0)


def shaken(t: Tensor) -> Tensor:
    return t * (1 + SHAKE * torch.randn_like(t)) if t.is_floating_point() else t


def largest(t: Tensor) -> float:
    """The largest absolute entry; infinite where one is not a number."""
    return float(t.abs().nan_to_num(torch.inf).max()) if t.numel() else 0.0


# ---------------------------------------------------------------- verdicts, by plain experiments


def predictions(model: Net, x: Any) -> Tensor:
    """``[N, entries]``, with the noise of one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        p = reference.predict(model, x)
    return p.detach().flatten(1) if p.ndim > 1 else p.detach()[:, None]


def replaced(x: Any, n: int, seed: int, scale: float) -> Any:
    """The batch with all samples but n drawn anew."""
    generator = torch.Generator().manual_seed(seed)

    def of(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            new = torch.randint(4, t.shape, generator=generator)
        else:
            new = scale * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        new[n] = t[n]
        return new

    return tree_map(of, x)


def largest_move(source: Source) -> float:
    """How far a prediction moves, relative to its size, when others are replaced."""
    worst = 0.0
    _, _, x, _ = source.build()
    mine = predictions(source.build()[0], x)
    for n in range(len(mine)):
        for seed, scale in enumerate((1.0, 3.0, -0.1, 30.0)):
            moved = predictions(source.build()[0], replaced(x, n, seed, scale))[n] - mine[n]
            worst = max(worst, largest(moved) / (largest(mine[n]) + 1e-12 * largest(mine) + 1e-30))
    return worst


def largest_unevenness(source: Source) -> float:
    """How far predictions of the permuted batch are from permuted predictions."""
    _, _, x, _ = source.build()
    mine, worst = predictions(source.build()[0], x), 0.0
    for order in (torch.arange(len(mine)).flip(0), torch.arange(len(mine)).roll(1)):
        theirs = predictions(source.build()[0], tree_map(lambda t, order=order: t[order], x))
        worst = max(worst, largest(theirs - mine[order]) / (largest(mine) + 1e-30))
    return worst


def check_verdicts(source: Source, structure: ub.Structure) -> None:
    """Raise where an experiment contradicts what is claimed of the forward pass."""
    moved = largest_move(source)
    if structure.independent_forward:
        assert moved < MOVED, f"independent_forward holds, and a prediction moved by {moved:.1e}"
    if structure.independent_forward.status == "fails":
        assert moved > 1e-12, "independent_forward fails, and no prediction moved"
    noisy = source.train and "ropout" in source.setup + source.forward
    if noisy:
        return  # a permutation meets other noise
    uneven = largest_unevenness(source)
    for verdict in (structure.simd_forward, structure.simd_given_statistics):
        if verdict and "of groups" not in verdict.note:
            assert uneven < MOVED, f"{verdict.name} holds, and permuting is off by {uneven:.1e}"
    if structure.simd_forward.status == "fails":
        assert max(moved, uneven) > 1e-12, "simd_forward fails, and nothing shows it"


def check_verification(problem: ub.Problem) -> None:
    """Raise where the library's own experiments contradict its verdicts."""
    found = problem.verify()
    assert found, str(found)


# ---------------------------------------------------------------- gradients


def check_rows(f: Fuzzed, by: str, memory: int | None) -> bool:
    """Raise where rows are not as defined; whether there was a definition to compare with."""
    try:
        rows = f.problem.gradients(by=by, memory=memory)
    except ub.StructureError:
        assert by != "component", "component rows exist for every net"
        return False
    gradient = reference.gradient(*f.args)
    if by != "frozen" or rows.kind == "per-sample":
        total = {n: rows[n].sum(0) + rows.rest.get(n, torch.zeros(())) for n in rows}
        f.all_near(total, reference.gradient, f"sum of rows by {by}")
    if by == "component":
        f.all_near({n: rows.rest.get(n, torch.zeros_like(g)) for n, g in gradient.items()}, reference.rest, "rest")
    if rows.kind == "per-sample":
        f.all_near(rows, reference.component, f"per-sample rows by {by}")
    try:
        ROWS[by](*f.args)
    except (ValueError, RuntimeError, IndexError):
        assert by != "component"
        return False  # a sample cannot run on its own
    f.all_near(rows, ROWS[by], f"rows by {by}")
    return True


def check_quantities(f: Fuzzed, by: str, memory: int | None) -> None:
    """Raise where what is asked about rows does not follow from them."""
    rows = f.problem.gradients(by=by)
    of_rows = lambda define: lambda *_: define(dict(rows))  # noqa: E731
    norms, squares, variance, dots = f.problem.compute(
        ub.Norms(), ub.SumOfSquares(), ub.Variance(), ub.Dots(), by=by, memory=memory
    )
    f.all_near(norms, of_rows(lambda r: reference.squared_norms(r)[0]), "norms")
    f.all_near(squares, of_rows(reference.sum_of_squares), "sums of squares")
    f.all_near(variance, of_rows(reference.variance), "variance")
    f.near(dots, of_rows(reference.dots), "inner products")


# ---------------------------------------------------------------- the Gauss-Newton matrix


def check_matrix(f: Fuzzed, by: str, memory: int | None) -> None:
    """Raise where the matrix, or what is made of it, is not ``Jᵀ H J``."""
    define = partial(reference.ggn, frozen=by == "frozen")
    G = f.problem.ggn(by=by, memory=memory)
    v = torch.linspace(-1, 1, G.shape[0], dtype=torch.float64)
    f.near(G @ v, lambda *args: define(*args) @ v, "G @ v")
    f.near(G.diag(), lambda *args: define(*args).diagonal(), "diagonal")
    f.near(G.trace(), lambda *args: define(*args).trace(), "trace")
    values = G.eigvalsh()

    def spectrum(*args: Any) -> Tensor:
        wanted = torch.linalg.eigvalsh(define(*args))
        return wanted[wanted.abs().argsort(descending=True)][: len(values)].sort().values

    f.near(values, spectrum, "eigenvalues")


def check_components_of_matrix(f: Fuzzed) -> None:
    """Raise where diagonals of components are not as defined, or are handed out for a loss that is no sum."""
    if f.problem.structure.reduction:
        f.near(f.problem.ggn().diag(per_component=True), reference.ggn_diagonals, "diagonals of components")
        return
    with pytest.raises(ub.StructureError):
        f.problem.ggn().diag(per_component=True)


def check_frozen_matrix(f: Fuzzed) -> None:
    """The same with frozen statistics, where both the library and the reference have it."""
    try:
        reference.ggn(*f.args, frozen=True)
        f.problem.ggn(by="frozen") @ torch.ones(f.problem.ggn().shape[0], dtype=torch.float64)
    except (ub.StructureError, ValueError, RuntimeError, IndexError):
        return
    check_matrix(f, "frozen", None)


# ---------------------------------------------------------------- all of it


def check(source: Source, memory: int | None = None) -> Counter[str]:
    """Raise where anything is wrong; otherwise what was compared."""
    f, seen = Fuzzed.of(source), Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ub.MixedSamplesWarning)
        check_verdicts(source, f.problem.structure)
        check_verification(f.problem)
        for by in ROWS:
            seen[f"rows by {by}"] += check_rows(f, by, memory)
        check_quantities(f, "component", memory)
        check_matrix(f, "component", memory)
        check_components_of_matrix(f)
        check_frozen_matrix(f)
        there = f.elsewhere()
        check_rows(there, "component", None)
        check_matrix(there, "component", None)
    for verdict in f.problem.structure.verdicts:
        seen[f"{verdict.name} {verdict.status}"] += 1
    return seen
