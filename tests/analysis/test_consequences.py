"""The table of consequences: complete, free of hidden cases, honest about what is unknown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unbatch as ub
from cases.quantities import ASKED
from unbatch.analysis.consequence_facts import (
    FACTS,
    INDEPENDENT,
    OWN_WEIGHTS,
    REDUCTION,
    SIMD_FORWARD,
    SIMD_LOSS,
    SPLIT,
    STATISTICS,
    STRUCTURES,
    Case,
    Consequence,
    Quantity,
)
from unbatch.analysis.consequence_table import SITUATIONS, TABLE
from unbatch.analysis.consequences import check, consequence, follows, render_markdown, situation

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "consequences.md"

HOLDS = "everything holds"
NORM = "batch norm in train mode"
MIXED = "samples mixed arbitrarily"
NO_SUM = "reduction is not a sum"
NO_LOSS = "loss joins samples"
WEIGHTS = "weights set by other samples"
NO_SPLIT = "parameters in the loss"

BACKPACK = (
    *("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance"),
    *(
        "DiagGGNExact",
        "DiagGGNMC",
        "BatchDiagGGNExact",
        "BatchDiagGGNMC",
        "SqrtGGNExact",
        "SqrtGGNMC",
    ),
    *("DiagHessian", "BatchDiagHessian", "KFAC", "KFLR", "KFRA", "GGNMP", "HMP", "PCHMP"),
)
VIVIT = (
    "EigvalshComputation",
    "EighComputation",
    "DirectionalDerivativesComputation (slopes)",
    "DirectionalDerivativesComputation (curvatures)",
    "DirectionalDampedNewtonComputation",
)

Statuses = tuple[str, ...]


def replaced(statuses: Statuses, at: int, status: str) -> Statuses:
    return (*statuses[:at], status, *statuses[at + 1 :])


def consistent(statuses: Statuses) -> bool:
    """A SIMD forward is independent, and SIMD given statistics (none)."""
    s = dict(zip(STRUCTURES, statuses, strict=True))
    return s[SIMD_FORWARD] != "holds" or "fails" not in (s[INDEPENDENT], s[STATISTICS])


@cache
def every_answer() -> Mapping[Statuses, tuple[Consequence, ...]]:
    return {
        statuses: follows(dict(zip(STRUCTURES, statuses, strict=True)))
        for statuses in product(("holds", "fails", "unknown"), repeat=len(STRUCTURES))
        if consistent(statuses)
    }


def test_the_table_passes_its_checker() -> None:
    check(TABLE)


@pytest.mark.parametrize(
    "peer", [f"BackPACK {q}" for q in BACKPACK] + [f"ViViT {q}" for q in VIVIT]
)
def test_every_quantity_of_the_peers_has_one_row(peer: str) -> None:
    assert [peer in quantity.peers for quantity in TABLE].count(True) == 1


def test_when_everything_holds_nothing_is_lost_or_renamed() -> None:
    assert {c.outcome for c in follows(situation(HOLDS))} == {"exact", "estimate"}
    assert all(c.name == c.quantity for c in follows(situation(HOLDS)))


@pytest.mark.parametrize(
    ("quantity", "where", "outcome", "name"),
    [
        ("gradient", NO_LOSS, "exact", "gradient"),
        ("per-sample gradients", NORM, "renamed", "gradients per component"),
        (
            "per-sample gradients",
            NO_SUM,
            "renamed",
            "gradients per sample, up to a batch-dependent factor",
        ),
        (
            "per-sample gradients",
            WEIGHTS,
            "renamed",
            "gradients per sample, up to a batch-dependent factor",
        ),
        ("component rows", MIXED, "exact", "component rows"),
        (
            "component rows",
            NO_SPLIT,
            "renamed",
            "component rows, of the part through the predictions",
        ),
        ("frozen rows", NORM, "exact", "frozen rows"),
        ("frozen rows", MIXED, "none", ""),
        ("gradient variance", NORM, "renamed", "variance over components"),
        ("gradient variance", WEIGHTS, "renamed", "variance over components"),
        ("sum of squared gradients", NORM, "renamed", "sum of squares of gradients per component"),
        (
            "early stopping criterion",
            NO_LOSS,
            "renamed",
            "early stopping criterion over components",
        ),
        ("GGN eigenvalues", MIXED, "exact", "GGN eigenvalues"),
        ("GGN eigenvalues", NO_LOSS, "exact", "GGN eigenvalues"),
        ("GGN product", NO_SPLIT, "renamed", "GGN product, of the part through the predictions"),
        ("per-sample GGN", NORM, "renamed", "GGN per component"),
        ("per-sample GGN", NO_LOSS, "none", ""),
        ("per-sample GGN", NO_SUM, "none", ""),
        ("GGN rank bound", NORM, "exact", "GGN rank bound"),
        ("GGN rank bound", NO_SUM, "renamed", "rank bound N·C"),
        ("sampled GGN factor", NORM, "estimate", "sampled GGN factor per component"),
        ("sampled GGN factor", NO_LOSS, "none", ""),
        ("sampled GGN diagonal", NO_LOSS, "estimate", "GGN diagonal by random signs"),
        ("KFLR", HOLDS, "exact", "KFLR"),
        ("KFAC", HOLDS, "estimate", "KFAC"),
        ("KFRA", NORM, "none", ""),
        ("Hessian diagonal", MIXED, "exact", "Hessian diagonal"),
        ("Hessian product", NO_SPLIT, "exact", "Hessian product"),
        ("per-sample Hessian diagonals", NORM, "renamed", "Hessian diagonals per component"),
        ("block-diagonal GGN product", MIXED, "exact", "block-diagonal GGN product"),
        ("crosstalk", MIXED, "exact", "crosstalk"),
        ("losses", NORM, "renamed", "losses per component"),
        ("losses", NO_LOSS, "none", ""),
    ],
)
def test_key_facts(quantity: str, where: str, outcome: str, name: str) -> None:
    found = consequence(quantity, situation(where))
    assert (found.outcome, found.name) == (outcome, name)
    assert found.reason


def test_one_consequence_is_the_same_as_among_all() -> None:
    statuses = dict.fromkeys(STRUCTURES, "unknown")
    assert tuple(consequence(quantity.name, statuses) for quantity in TABLE) == follows(statuses)


def test_resolving_an_unknown_never_contradicts_a_definite_answer() -> None:
    answers = every_answer()
    steps = [
        (before, after)
        for statuses, before in answers.items()
        for at, status in enumerate(statuses)
        for resolved in ("holds", "fails")
        if status == "unknown" and (after := answers.get(replaced(statuses, at, resolved)))
    ]
    assert steps
    for before, after in steps:
        for old, new in zip(before, after, strict=True):
            assert old.outcome == "unknown" or (old.outcome, old.name) == (new.outcome, new.name)


def test_unknown_is_said_only_where_completions_differ_and_is_settled_by_what_it_depends_on() -> (
    None
):
    answers = every_answer()
    for statuses, found in answers.items():
        for i, one in enumerate(found):
            assert (one.outcome == "unknown") == bool(one.depends_on)
            seen = set()
            for choice in product(("holds", "fails"), repeat=len(one.depends_on)):
                resolved = statuses
                for fact, status in zip(one.depends_on, choice, strict=True):
                    resolved = replaced(resolved, STRUCTURES.index(fact), status)
                if consistent(resolved):
                    settled = answers[resolved][i]
                    assert settled.outcome != "unknown"
                    seen.add((settled.outcome, settled.name))
            assert (len(seen) > 1) == (one.outcome == "unknown")


def test_unknown_depends_only_on_what_matters() -> None:
    statuses = {
        **situation(HOLDS),
        INDEPENDENT: "unknown",
        SIMD_FORWARD: "unknown",
        REDUCTION: "unknown",
    }
    assert consequence("per-sample gradients", statuses).depends_on == (INDEPENDENT, REDUCTION)
    assert consequence("GGN trace", statuses).outcome == "exact"
    assert consequence("KFRA", {**statuses, REDUCTION: "fails"}).outcome == "none"


def test_own_weights_count_as_holding_unless_told() -> None:
    six = dict.fromkeys(STRUCTURES, "holds")
    assert consequence("gradient variance", six).outcome == "exact"
    unsure = consequence("gradient variance", {**six, OWN_WEIGHTS: "unknown"})
    assert (unsure.outcome, unsure.depends_on) == ("unknown", (OWN_WEIGHTS,))


def test_an_unknown_name_is_refused_with_the_likely_ones() -> None:
    with pytest.raises(KeyError, match=r"'GGN diagnal'.*GGN diagonal"):
        consequence("GGN diagnal", situation(HOLDS))


@pytest.mark.parametrize(
    "statuses",
    [
        {SPLIT: "holds"},
        dict.fromkeys(FACTS, "maybe"),
        {**dict.fromkeys(FACTS, "holds"), "linear": "holds"},
        {**dict.fromkeys(FACTS, "holds"), INDEPENDENT: "fails"},
        {**dict.fromkeys(FACTS, "unknown"), SIMD_FORWARD: "holds", STATISTICS: "fails"},
    ],
)
@pytest.mark.parametrize("ask", [follows, lambda statuses: consequence("gradient", statuses)])
def test_missing_strange_and_contradictory_statuses_are_refused(
    ask: Callable[[Mapping[str, str]], object], statuses: Mapping[str, str]
) -> None:
    with pytest.raises(ValueError, match="got"):
        ask(statuses)


ALWAYS = Case("exact", "always")


@pytest.mark.parametrize(
    ("bug", "flaw"),
    [
        ((ALWAYS, Case("none", "hidden", fails=(INDEPENDENT,))), "case 1 is never reached"),
        (
            (Case("none", "never", holds=(SIMD_FORWARD,), fails=(INDEPENDENT,)), ALWAYS),
            "case 0 is never reached",
        ),
        ((Case("exact", "some", holds=(SIMD_LOSS,)),), "no case for"),
        ((Case("renamed", "to what?"),), "is 'renamed' and named ''"),
        ((Case("exact", "as itself", "something else"),), "is 'exact' and named 'something else'"),
        ((Case("unknown", "not for a table to say"),), "has outcome 'unknown'"),
        ((Case("none", "typo", fails=("independent",)), ALWAYS), r"speaks of \['independent'\]"),
    ],
)
def test_the_checker_catches_planted_bugs(bug: tuple[Case, ...], flaw: str) -> None:
    with pytest.raises(ValueError, match=f"planted: .*{flaw}"):
        check([*TABLE, Quantity("planted", bug)])


def test_the_checker_catches_a_planted_bug_in_the_real_table() -> None:
    victim = next(q for q in TABLE if q.name == "KFLR")
    hiding = Quantity("KFLR", tuple(reversed(victim.cases)), victim.peers)
    with pytest.raises(ValueError, match="KFLR: case 3 is never reached"):
        check([hiding])


def test_the_checker_catches_a_name_given_twice() -> None:
    with pytest.raises(ValueError, match="gradient: named twice"):
        check([*TABLE, Quantity("gradient", (ALWAYS,))])


def test_situations_differ_and_are_consistent() -> None:
    columns = [tuple((c.outcome, c.name) for c in follows(situation(name))) for name in SITUATIONS]
    assert len(set(columns)) == len(columns)


def test_the_page_is_the_rendered_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_markdown()


# --------------------------------------------------------------- the table against what is computed

ROWS: Mapping[str, str] = {
    "per-sample gradients": "component",
    "component rows": "component",
    "copy rows": "copy",
    "frozen rows": "frozen",
}


def computed() -> Mapping[str, list[Any]]:
    """The quantities of rows, by their row in the table."""
    quantities: dict[str, list[Any]] = {}
    for asked in ASKED:
        if asked.row:
            quantities.setdefault(asked.row, []).append(asked.quantity)
    return quantities


COMPUTED = computed()


def ones(problem: ub.Problem) -> Tensor:
    return torch.ones(problem.ggn().shape[0], dtype=torch.float64)


SIGNED = "GGN diagonal by random signs"  # a name that another quantity gets, no row of its own
CURVED: Mapping[str, Callable[[ub.Problem], Any]] = {
    "GGN product": lambda p: p.ggn() @ ones(p),
    "block-diagonal GGN product": lambda p: p.ggn(blocks="parameter") @ ones(p),
    "GGN diagonal": lambda p: p.ggn().diag(),
    "GGN trace": lambda p: p.ggn().trace(),
    "GGN log-determinant": lambda p: p.ggn().slogdet(1.0)[1],
    "GGN solve": lambda p: p.ggn().solve(ones(p), 1.0),
    "GGN eigenvalues": lambda p: p.ggn().eigvalsh(),
    "GGN eigenpairs": lambda p: p.ggn().eigh(2).vectors,
    "damped Newton step": lambda p: p.ggn().space.flat(p.ggn().newton_step(10.0)),
    "GGN rank bound": lambda p: torch.tensor(p.ggn().rank_bound),
    "GGN factor": lambda p: torch.cat([t.flatten() for t in p.ggn().factor().values()]),
    "GGN Gram matrix": lambda p: p.ggn().gram(),
    "per-sample GGN": lambda p: (p.ggn(samples=[0]) / p.samples) @ ones(p),
    "per-sample GGN diagonals": lambda p: p.ggn().diag(per_component=True),
    "directional slopes": lambda p: p.gradients().flat() @ p.ggn().eigh(2).vectors,
    "directional curvatures": lambda p: p.ggn().directions(2).curvatures,
    "sampled GGN factor": lambda p: next(iter(p.ggn(mc_samples=1).factor().values())),
    "sampled per-sample GGN diagonals": lambda p: p.compute(
        ub.DiagGGN(per_component=True, mc_samples=2)
    ).flat(),
    "sampled GGN diagonal": lambda p: p.compute(ub.DiagGGN(mc_samples=2)).flat(),
    SIGNED: lambda p: p.ggn().estimate_diag(2).values,
}
FACTOR = "up to a factor that depends on the batch"


class Between(nn.Linear):
    """Attention between samples."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return (h @ h.mT).softmax(-1) @ h


class Placed(nn.Linear):
    """Every sample is treated by its place in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.arange(1.0, 1 + len(x), dtype=x.dtype)[:, None])


class Tempered(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, p: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(p * self.temperature, y)


def contrastive(p: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(p @ p.T, torch.arange(len(p)))


Asked = tuple[Callable[[], nn.Module], Callable[[], Any]]
PROGRAMS: Mapping[str, Asked] = {
    HOLDS: (lambda: nn.Linear(4, 3), nn.CrossEntropyLoss),
    NORM: (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)),
        nn.CrossEntropyLoss,
    ),
    MIXED: (lambda: Between(4, 3), nn.CrossEntropyLoss),
    NO_SUM: (
        lambda: nn.Linear(4, 3),
        lambda: lambda p, y: F.mse_loss(p, F.one_hot(y, 3).to(p.dtype)).sqrt(),
    ),
    NO_LOSS: (lambda: nn.Linear(4, 3), lambda: contrastive),
    WEIGHTS: (lambda: nn.Linear(4, 3), lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))),
    NO_SPLIT: (lambda: nn.Linear(4, 3), Tempered),
    "by place": (lambda: Placed(4, 3), nn.CrossEntropyLoss),
    "all at once": (lambda: nn.Sequential(nn.BatchNorm1d(4), Between(4, 3)), lambda: contrastive),
}
EVERYWHERE = pytest.mark.parametrize("where", PROGRAMS)


@cache
def asked(where: str) -> tuple[ub.Problem, Mapping[str, Consequence]]:
    torch.manual_seed(0)
    model, loss = (make() for make in PROGRAMS[where])
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    problem = ub.Problem(model.double(), loss, (torch.randn(8, 4).double(), torch.randint(3, (8,))))
    return problem, {c.quantity: c for c in problem.structure.follows()}


def named(what: str, rows: Mapping[str, Any], rest: Mapping[str, Tensor]) -> str:
    """What the table would have to call something made of these rows."""
    kind, note = rows.kind, rows.note  # type: ignore[attr-defined]
    part = ", of the part through the predictions" if rest else ""
    if kind != "per-sample":
        return f"{what} per component{part}"
    assert note in ("", FACTOR)
    return (f"{what} per sample, up to a batch-dependent factor" if note else what) + part


def test_what_is_marked_as_available_is_what_is_computed() -> None:
    available = {c.quantity for c in follows(situation(HOLDS)) if c.available}
    assert available == {"gradient", "crosstalk", *ROWS, *COMPUTED, *CURVED} - {SIGNED}


@pytest.mark.parametrize("where", [w for w in PROGRAMS if w in SITUATIONS])
def test_the_programs_are_in_the_situation_that_they_stand_for(where: str) -> None:
    _, found = asked(where)
    assert found == {c.quantity: c for c in follows(situation(where))}


@EVERYWHERE
def test_rows_are_called_what_the_table_calls_them(where: str) -> None:
    problem, found = asked(where)
    rows = problem.gradients()
    said = found["per-sample gradients"]
    assert (said.outcome == "exact") == (
        rows.kind == "per-sample" and not rows.note and not rows.rest
    )
    assert said.name.removeprefix("per-sample ") == named("gradients", rows, rows.rest)
    assert said.name == said.quantity or said.outcome == "renamed"


@EVERYWHERE
@pytest.mark.parametrize("quantity", ["component rows", "copy rows", "frozen rows"])
def test_decompositions_exist_where_the_table_says_so(where: str, quantity: str) -> None:
    problem, found = asked(where)
    by, said = ROWS[quantity], found[quantity]
    if said.outcome == "none":
        with pytest.raises(ub.StructureError, match="by='component'"):
            problem.gradients(by=by)
        return
    rows, gradient = problem.gradients(by=by), problem.gradient()
    assert (said.outcome == "renamed") == bool(rows.rest)
    off = max(
        float((r.sum(0) + rows.rest.get(k, 0) - gradient[k]).abs().max()) for k, r in rows.items()
    )
    assert (off < 1e-12) == ("do not sum" not in said.reason)
    if "equal the component rows" in said.reason:
        torch.testing.assert_close(rows.flat(), problem.gradients().flat(), rtol=1e-10, atol=1e-12)


@EVERYWHERE
@pytest.mark.parametrize("quantity", COMPUTED)
def test_quantities_warn_and_are_labelled_as_the_table_says(where: str, quantity: str) -> None:
    problem, found = asked(where)
    said, rows = found[quantity], problem.gradients()
    for one in COMPUTED[quantity]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = problem.compute(one)
        assert [w.category for w in caught] == [ub.MixedSamplesWarning] * (
            "with a warning" in said.reason
        )
        if "over components" in said.name:
            assert caught
        if hasattr(result, "kind"):
            assert (result.kind, result.note) == (rows.kind, rows.note)
        if not caught and said.outcome == "renamed" and "per component" in said.name:
            assert rows.kind == "per-component"


@EVERYWHERE
@pytest.mark.parametrize("quantity", [q for q in CURVED if q != SIGNED])
def test_curvature_exists_where_the_table_says_so(where: str, quantity: str) -> None:
    problem, found = asked(where)
    said = found[quantity]
    ask = CURVED[SIGNED if said.name.startswith(SIGNED) else quantity]
    signs = said.name.startswith(SIGNED) and not problem.ggn().positive_semidefinite
    if said.outcome == "none" or signs:
        with pytest.raises(
            ub.StructureError, match="positive semi-definite" if signs else "sum over the samples"
        ):
            ask(problem)
    else:
        assert ask(problem).isfinite().all()


def test_what_is_restricted_says_so_once_for_each_outcome():
    weight = torch.randn(2, 3, requires_grad=True)

    def decayed(p: Tensor, y: Tensor) -> Tensor:
        return (p - y).square().mean() + weight.square().sum()

    data = torch.randn(4, 3), torch.randn(4, 2)
    problem = ub.Problem(lambda w, x: x @ w["w"].T, decayed, data, parameters={"w": weight})
    text = " ".join(str(problem.structure).split())
    assert text.count("of the part through the predictions") == 2, text
    assert "estimate only, of the part through the predictions sampled GGN factor" in text
