"""Random nets with random losses: the whole pipeline against ``reference.py`` and plain
experiments, in float64.

The suite runs the same examples every time. To look for new ones, ``UNBATCH_FUZZ=2000 pytest
tests/gradients/test_fuzz.py`` runs that many at random; what it finds prints as a ``Source``, to be
kept in ``FOUND``.
"""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map

import unbatch as ub
from cases.nets import Net, Source, net_source
from unbatch.autodiff.contractions.matmul import Linear
from unbatch.reference import definitions as reference
from unbatch.reference import isolated_samples

pytestmark = pytest.mark.filterwarnings(
    "ignore::unbatch.VanishingCurvatureWarning"
)  # losses are linear here and there

EXACT = 1e-9  # of the largest entry of a parameter, or of 1e-3 of that of all
FLOOR = 1e-13  # what is rounding where everything else is of size one
SHAKE = (
    1e-14  # a relative change of all inputs and parameters: what it does to a quantity is rounding
)
FAR = (
    -3.0,
    100.0,
    -0.1,
)  # on which predictions may move that are constant on the batch (all of them zero, say)
MOVED = 1e-9  # a relative change of predictions that is no rounding
NOISE = 3  # the seed of dropout in experiments
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
        """Raise where a tensor made from ``Jᵀ H J`` is not as defined, by more than rounding.

        Entries of H are differences of numbers of size one, where a softmax is sure of itself.
        """
        floor = FLOOR + 1e-15 * self.steepness**2
        self.all_near({what: found}, lambda *args: {what: define(*args)}, what, floor=floor)

    @cached_property
    def steepness(self) -> float:
        """The largest entry of J."""
        return largest(reference.jacobian(*self.args))

    def all_near(
        self,
        found: Named,
        define: Callable[..., Named],
        what: str,
        summands: Named | None = None,
        floor: float = FLOOR,
    ) -> None:
        """Raise where tensors by parameter are not as defined; a sum is known as well as its
        ``summands`` are.
        """
        expected = define(*self.args)
        assert list(found) == list(expected), (
            f"{what}: {list(found)} where {list(expected)} are expected"
        )
        scale = max(map(largest, (summands or expected).values()), default=0.0)
        for name, wanted in expected.items():
            shapes = tuple(found[name].shape), tuple(wanted.shape)
            assert shapes[0] == shapes[1], (
                f"{what} of {name}: {shapes[0]} where {shapes[1]} is expected"
            )
            error, bound = largest(found[name] - wanted), EXACT * max(largest(wanted), 1e-3 * scale)
            if error > bound + floor:
                rounding = max(largest(t - expected[n]) for n, t in define(*self.shaken).items())
                assert error <= 100 * rounding, (
                    f"{what} of {name}: off by {error:.1e}, allowed {bound:.1e}"
                )


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
        torch.manual_seed(NOISE)
        p = isolated_samples.predict(model, x)
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


def largest_move(source: Source, scale_of_all: float = 1.0) -> float:
    """How far a prediction moves, relative to its size, when others are replaced; on the batch, or
    one far out.
    """
    worst = 0.0
    _, _, x, _ = source.build()
    x = tree_map(lambda t: scale_of_all * t if t.is_floating_point() else t, x)
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
    for verdict in (structure.independent_forward, structure.simd_forward):
        if verdict:
            assert moved < MOVED, f"{verdict.name} holds, and a prediction moved by {moved:.1e}"
    if structure.independent_forward.status == "fails":
        moved = (
            max(moved, *(largest_move(source, scale) for scale in FAR)) if moved <= 1e-12 else moved
        )
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
        f.all_near(total, reference.gradient, f"sum of rows by {by}", rows)
    if by == "component":
        f.all_near(
            {n: rows.rest.get(n, torch.zeros_like(g)) for n, g in gradient.items()},
            reference.rest,
            "rest",
        )
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
        ub.SquaredNorms(), ub.SumOfSquares(), ub.Variance(), ub.Dots(), by=by, memory=memory
    )
    f.all_near(norms, of_rows(lambda r: reference.squared_norms(r)[0]), "norms")
    f.all_near(squares, of_rows(reference.sum_of_squares), "sums of squares")
    f.all_near(variance, of_rows(reference.variance), "variance")
    f.all_near({"all": dots}, of_rows(lambda r: {"all": reference.dots(r)}), "inner products")


# ---------------------------------------------------------------- the Gauss-Newton matrix


def check_matrix(f: Fuzzed, by: str, memory: int | None) -> None:
    """Raise where the matrix, or what is made of it, is not ``Jᵀ H J``."""
    define = partial(reference.ggn, frozen=by == "frozen")
    G = f.problem.ggn(by=by, memory=memory)
    v = torch.linspace(-1, 1, G.shape[0], dtype=torch.float64)
    try:
        f.near(G @ v, lambda *args: define(*args) @ v, "G @ v")
    except ub.StructureError as error:
        if "contradict its backward pass" in str(error) and torch_is_wrong(f, v):
            return
        raise
    f.near(G.diag(), lambda *args: define(*args).diagonal(), "diagonal")
    f.near(G.trace(), lambda *args: define(*args).trace(), "trace")
    values = G.eigvalsh()

    def spectrum(*args: Any) -> Tensor:
        wanted = torch.linalg.eigvalsh(define(*args))
        return wanted[wanted.abs().argsort(descending=True)][: len(values)].sort().values

    f.near(values, spectrum, "eigenvalues")


def torch_is_wrong(f: Fuzzed, v: Tensor) -> bool:
    """``J v`` by backward passes is not what predictions do when parameters move along v."""
    moved = []
    for step in (1e-6, -1e-6):
        model, _, _, _ = f.source.build()
        model.load_state_dict(f.args[0].state_dict())
        at = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
        torch.nn.utils.vector_to_parameters(at + step * v, model.parameters())
        moved.append(predictions(model, f.args[2]).flatten())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(NOISE)
        claimed, found = reference.jacobian(*f.args) @ v, (moved[0] - moved[1]) / 2e-6
    return largest(claimed - found) > 1e-3 * largest(found)


def check_components_of_matrix(f: Fuzzed) -> None:
    """Raise where diagonals of components are not as defined, or are handed out for a loss that is
    no sum.
    """
    if f.problem.structure.reduction:
        f.near(
            f.problem.ggn().diag(per_component=True),
            reference.ggn_diagonals,
            "diagonals of components",
        )
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
    """Raise where anything is wrong; otherwise say what was compared."""
    torch.manual_seed(0)
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


EXAMPLES = int(os.environ.get("UNBATCH_FUZZ", "25"))
QUIET = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
]


def test_random_nets():
    tally: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize="UNBATCH_FUZZ" not in os.environ,
        suppress_health_check=QUIET,
    )
    @given(st.data())
    def run(data):
        choose = lambda options: data.draw(st.sampled_from(list(options)))  # noqa: E731
        source, memory = net_source(choose), choose([None, None, 1])
        note(f"{source}, memory={memory}")
        tally.update(check(source, memory))
        tally["nets"] += 1

    run()
    sys.stdout.write(f"{dict(tally)}\n")  # shown by pytest -s
    for by in ROWS:
        assert tally[f"rows by {by}"] > 0.5 * tally["nets"], (
            f"few nets have rows by {by} to compare with: {tally}"
        )


# Nets that were once answered wrongly or crashed.
FOUND = {
    "columns of a loss that joins samples, few parameters at a time": Source(
        "x = normals(4, 3)\nnet.a = nn.Linear(3, 3)\nnet.b = nn.Linear(3, 2)\ny = torch.randn((4, 2))",
        "h = net.b(net.a(h).tanh())",
        "(p - y).square().flatten(1).sum(1).logsumexp(0)",
    ),
    "a seed in memory that a parameter was written to": Source(
        "x = normals(2, 1, 2, 3)\nnet.a = nn.GroupNorm(1, 1)\nnet.c = nn.Parameter(normals(1))\n"
        "net.f = nn.Linear(14, 4)",
        "h = net.a(h.unsqueeze(1))\nh = torch.cat([h, h], -1)\nz = h.new_zeros(*h.shape[:-1], 7)\nz[..., 1:] = h\n"
        "z[..., 0] = net.c\nh = z.clone()\nh -= h.mean(0)\nh = h - h.detach().mean(0)\nh = net.f(h.flatten(1))",
        "(p - p.mean(0)).square().sum() + p.sum().tanh()",
    ),
    "samples as the time of an lstm": Source(
        "x = normals(2, 4)\nnet.d = nn.Parameter(normals(4))\nnet.f = nn.LSTM(4, 2, batch_first=True)\n"
        "y = torch.randn((2, 2))",
        "h = net.f(h + net.d)[0]",
        "F.mse_loss(p, y)",
    ),
    "half of what batch norm gives, written into a buffer": Source(
        "x = normals(3, 3)\nnet.a = nn.Linear(3, 3)\nnet.c = nn.BatchNorm1d(3)\ny = torch.randn((3, 3))",
        "h = net.c(net.a(h))\nz = torch.zeros_like(h)\nz[:, 0] = h[:, -1]\nz[:, 1:] = h[:, 1:]\nh = z",
        "F.mse_loss(p, y, reduction='sum')",
    ),
    "circular padding after batch norm": Source(
        "x = normals(3, 2, 3, 2)\nnet.a = nn.Conv2d(2, 1, 3, padding=1, padding_mode='circular')\n"
        "y = torch.randn((3, 1, 3, 2))",
        "h = net.a(h - h.mean(0))",
        "F.mse_loss(p, y)",
    ),
    "instance norm after batch norm": Source(
        "x = normals(3, 3, 3, 3)\nnet.b = nn.BatchNorm2d(3)\nnet.c = nn.InstanceNorm2d(3, affine=True)\n"
        "y = torch.randn((3, 3, 3, 3))",
        "h = net.c(net.b(h @ torch.einsum('n...i,n...j->ij', h, h).tanh()))",
        "F.mse_loss(p, y)",
    ),
    "batch norm of what lies in memory in another order": Source(
        "x = normals(2, 3, 3)\nnet.a = nn.Linear(3, 4)\nnet.b = nn.BatchNorm1d(3)\nnet.c = nn.Linear(4, 2)\n"
        "y = torch.randn((2, 6))",
        "h = net.a(h.transpose(0, 1)).transpose(0, 1)\nh = net.c(net.b(h)).flatten(1)",
        "F.mse_loss(p, y)",
    ),
    "attention and an lstm": Source(
        "x = normals(2, 3, 2)\nnet.g = nn.MultiheadAttention(2, 1, batch_first=True)\n"
        "net.h = nn.LSTM(2, 2, batch_first=True)\ny = torch.randn((2, 3, 2))",
        "h = net.g(h, h, h, need_weights=False)[0]\nh = net.h(h)[0]",
        "F.mse_loss(p, y)",
    ),
    "weight norm and a buffer": Source(
        "x = normals(5, 3)\nnet.d = nn.Linear(3, 3)\nnet.f = parametrizations.weight_norm(nn.Linear(3, 1))\n"
        "y = torch.randn((5, 1))",
        "z = torch.zeros_like(h)\nz[:, 0] = h[:, -1]\nz[:, 1:] = net.d(h)[:, 1:]\nh = net.f(z)",
        "F.mse_loss(p, y)",
    ),
    "spectral norm and a buffer": Source(
        "x = normals(4, 3)\nnet.c = nn.Linear(3, 3)\nnet.f = parametrizations.spectral_norm(nn.Linear(3, 4))\n"
        "y = torch.randn((4, 4))",
        "z = torch.zeros_like(h)\nz[:, 0] = h[:, -1]\nz[:, 1:] = net.c(h)[:, 1:]\nh = net.f(z)",
        "F.mse_loss(p, y)",
    ),
    "zeros without memory, pulled through a group norm": Source(
        "x = normals(4, 5)\nnet.b = nn.Linear(5, 4, bias=False)\nnet.c = nn.GroupNorm(4, 4)\ny = torch.randn((4, 4))",
        "h = net.c(net.b(h))",
        "(p - y).abs().mean()",
    ),
    # PyTorch 2.13 gives a batch norm the wrong derivative there (on the CPU, a cotangent in another
    # order of memory): what it says itself by backward and by forward mode differs, and products
    # with the matrix are refused.
    "batch norm of channels that were moved from the last axis": Source(
        "x = normals(5, 1, 4, 3)\nnet.b = nn.Parameter(normals(3))\nnet.c = nn.BatchNorm2d(3)\n"
        "y = torch.randn((5, 3, 4, 1))",
        "h = net.c((h**2 * net.b.exp()).transpose(1, -1))",
        "F.mse_loss(p, y)",
    ),
    "predictions that do not move": Source(
        "x = normals(5, 3)\nnet.a = nn.Linear(3, 3)\nnet.d = nn.BatchNorm1d(3, affine=False)\ny = torch.randn((5, 3))",
        "h = net.d(h + net.a(h.mean(0)).tanh())",
        "(p - y).tanh().square().mean()",
    ),
    "a softmax that is sure and wrong": Source(
        "x = normals(1, 2)\nnet.b = nn.Linear(2, 3)\ny = torch.tensor([2])",
        "h = 0.01 * net.b(h) + torch.tensor([1.27, -0.19, 0.03])",
        "F.cross_entropy(25 * p, y)",
    ),
}


FEW_AT_A_TIME = [n for n in FOUND if "few parameters" in n or "a seed" in n]


@pytest.mark.parametrize("name", FOUND)
def test_nets_found(name):
    check(FOUND[name], memory=1 if name in FEW_AT_A_TIME else None)


# ---------------------------------------------------------------- planted

PLAIN = FOUND["columns of a loss that joins samples, few parameters at a time"]
NORMED = FOUND["half of what batch norm gives, written into a buffer"]


def test_rows_in_another_order_are_caught(monkeypatch):
    right = reference.component
    monkeypatch.setitem(
        ROWS, "component", lambda *args: {n: r.flip(0) for n, r in right(*args).items()}
    )
    with pytest.raises(AssertionError, match="rows by component"):
        check_rows(Fuzzed.of(NORMED), "component", None)


def test_a_wrong_contraction_is_caught(monkeypatch):
    monkeypatch.setattr(
        "unbatch.gradients.self_check._close", lambda *_: True
    )  # the plan is believed as it is
    right = Linear.rows
    monkeypatch.setattr(Linear, "rows", lambda self, *args: right(self, *args).mul_(1.001))
    with pytest.raises(AssertionError, match="off by"):
        check(NORMED)


def test_frozen_statistics_that_move_are_caught():
    f = Fuzzed.of(NORMED)
    with pytest.raises(AssertionError, match="off by"):
        f.all_near(f.problem.gradients(), reference.frozen, "rows")


@pytest.mark.parametrize("verdict", ["independent_forward", "simd_forward"])
def test_a_wrong_verdict_is_caught(verdict):
    structure = Fuzzed.of(NORMED).problem.structure
    wrong = replace(getattr(structure, verdict), status="holds")
    with pytest.raises(AssertionError, match=verdict):
        check_verdicts(NORMED, structure.with_verdicts(wrong))


def test_a_failure_that_is_none_is_caught():
    structure = Fuzzed.of(PLAIN).problem.structure
    wrong = replace(structure.independent_forward, status="fails")
    with pytest.raises(AssertionError, match="no prediction moved"):
        check_verdicts(PLAIN, structure.with_verdicts(wrong))


def test_a_matrix_of_another_loss_is_caught():
    f = Fuzzed.of(PLAIN)
    model, _, x, y = f.args
    f.problem = ub.Problem(model, torch.nn.functional.mse_loss, (x, y))
    with pytest.raises(AssertionError, match="off by"):
        check_matrix(f, "component", None)


@pytest.mark.filterwarnings("ignore::unbatch.MixedSamplesWarning")
def test_quantities_of_other_rows_are_caught(monkeypatch):
    monkeypatch.setattr(reference, "variance", lambda rows: {n: r.var(0) for n, r in rows.items()})
    with pytest.raises(AssertionError, match="variance"):
        check_quantities(Fuzzed.of(PLAIN), "component", None)
