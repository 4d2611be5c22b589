"""Which quantities survive the loss of a structure, and why: one table and four functions over it.

Here live the table (`TABLE`), its reader (`follows`, `consequence`), its checker (`check`) and its
rendering (`render_markdown`). No tensors, no networks, and no verdicts: those come in as words.

A *world* is the set of facts that hold; a quantity's cases are tried in order and the first one that
matches the world is its answer. An unknown structure means several worlds: where all of them give the
same answer it stands, otherwise it is `"unknown"`, together with the fewest facts that would settle it.

Legend: `F_n` prediction and `ℓ_n` loss of sample n, `L` the loss, `w_n` its weights, `J = ∂F/∂θ`,
`H = ∇²_F L` with blocks `H_n`, `G = JᵀHJ = VΣVᵀ` the GGN, `N·C` the number of predicted entries.

Sources: Dangel, "Structural implications of batch normalization" (2021), for the structures and what rests
on them; Dangel, Kunstner, Hennig, "BackPACK" (2020), and Dangel, Tatzel, Hennig, "ViViT" (2021), for the
quantities of these packages; Schneider, Dangel, Hennig, "Cockpit" (2021), for the statistics of gradients;
Chen et al., "BDA-PCH" (2018), for the positive-curvature Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from itertools import combinations

from unbatch.analysis.consequence_table import (
    FACTS,
    INDEPENDENT,
    OUTCOMES,
    OWN_WEIGHTS,
    PART,
    REST,
    SIMD,
    SITUATIONS,
    SPLIT,
    STATISTICS,
    STATUSES,
    STRUCTURES,
    TABLE,
    Case,
    Consequence,
    Outcome,
    Quantity,
    World,
)

"""A fact beside the structures: `w_n` depends on N and on sample n's own target and input, on no others."""


# The reasons ------------------------------------------------------------------------------------------
# The families of rules --------------------------------------------------------------------------------
# The table --------------------------------------------------------------------------------------------
# The reader -------------------------------------------------------------------------------------------


def follows(statuses: Mapping[str, str]) -> tuple[Consequence, ...]:
    """What follows for every quantity, in the order of the table.

    `statuses` maps each of `STRUCTURES` to `"holds"`, `"fails"` or `"unknown"`. The entry `"own_weights"`
    may be left out and then counts as holding: pass it where the weights depend on targets or inputs.
    Raises `ValueError` for missing or strange entries, and for verdicts that contradict each other.
    """
    worlds, unknown = _completions(statuses), [s for s in FACTS if statuses.get(s) == "unknown"]
    return tuple(_conclude(quantity, worlds, unknown) for quantity in TABLE)


def consequence(quantity: str, statuses: Mapping[str, str]) -> Consequence:
    """What follows for one quantity; `statuses` as in `follows`. Raises `KeyError` for an unknown name."""
    found = next((q for q in TABLE if q.name == quantity), None)
    if found is None:
        names = [q.name for q in TABLE]
        close = get_close_matches(quantity, names) or names
        raise KeyError(
            f"no quantity is called {quantity!r}; do you mean one of: {', '.join(close)}?"
        )
    return _conclude(
        found, _completions(statuses), [s for s in FACTS if statuses.get(s) == "unknown"]
    )


@cache
def _worlds() -> tuple[World, ...]:
    """All sets of facts that can hold together: a SIMD forward is independent, and SIMD given no statistics.

    The converse is not used, as statistics may be those of groups, and groups may differ.
    """
    subsets = (frozenset(s) for size in range(len(FACTS) + 1) for s in combinations(FACTS, size))
    return tuple(w for w in subsets if SIMD not in w or {INDEPENDENT, STATISTICS} <= w)


def _completions(statuses: Mapping[str, str]) -> list[World]:
    known = {OWN_WEIGHTS: "holds", **statuses}
    if set(known) != set(FACTS) or not set(known.values()) <= set(STATUSES):
        raise ValueError(f"need one of {STATUSES} for each of {STRUCTURES}, got {dict(statuses)}")
    held = {s for s, status in known.items() if status == "holds"}
    failed = {s for s, status in known.items() if status == "fails"}
    worlds = [w for w in _worlds() if held <= w and not failed & w]
    if not worlds:
        raise ValueError(
            f"a SIMD forward is independent and SIMD given statistics, but got {dict(statuses)}"
        )
    return worlds


def _decide(quantity: Quantity, world: World) -> Case:
    """The first case that matches, restricted to the part through the predictions where the split fails."""
    case = next(c for c in quantity.cases if c.matches(world))
    if SPLIT in world or not quantity.through_predictions or case.outcome == "none":
        return case
    outcome: Outcome = "renamed" if case.outcome == "exact" else case.outcome
    return Case(outcome, f"{case.reason} {REST}", (case.name or quantity.name) + PART)


def _conclude(quantity: Quantity, worlds: Sequence[World], unknown: Sequence[str]) -> Consequence:
    cases = {world: _decide(quantity, world) for world in worlds}
    answers = {world: (case.outcome, _label(quantity, case)) for world, case in cases.items()}
    settling = _settling(answers, unknown)
    if settling:
        return _undecided(quantity, sorted(set(answers.values())), settling)
    outcome, name = next(iter(answers.values()))
    reason = " Or: ".join(dict.fromkeys(case.reason for case in cases.values()))
    return Consequence(quantity.name, outcome, name, reason, quantity.peers, quantity.available)


def _undecided(
    quantity: Quantity, answers: list[tuple[Outcome, str]], on: tuple[str, ...]
) -> Consequence:
    told = dict.fromkeys(OUTCOMES[outcome] for outcome, _ in answers)
    reason = f"Depends on {', '.join(on)}: {' or '.join(told)}."
    return Consequence(quantity.name, "unknown", "", reason, quantity.peers, quantity.available, on)


def _label(quantity: Quantity, case: Case) -> str:
    return "" if case.outcome == "none" else case.name or quantity.name


def _settling(
    answers: Mapping[World, tuple[Outcome, str]], unknown: Sequence[str]
) -> tuple[str, ...]:
    """The fewest of the unknown facts of which the answer is a function; none of them if it is constant."""

    def settles(subset: tuple[str, ...]) -> bool:
        seen: dict[World, tuple[Outcome, str]] = {}
        return all(
            seen.setdefault(w.intersection(subset), answer) == answer
            for w, answer in answers.items()
        )

    subsets = (s for size in range(len(unknown) + 1) for s in combinations(unknown, size))
    return next(filter(settles, subsets))


# The checker ------------------------------------------------------------------------------------------


def check(table: Sequence[Quantity]) -> None:
    """Raise `ValueError` listing every flaw: names given twice, malformed, hidden and missing cases."""
    names = [quantity.name for quantity in table]
    flaws = [f"{name}: named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    flaws += [f"{quantity.name}: {flaw}" for quantity in table for flaw in _flaws(quantity)]
    if flaws:
        raise ValueError("the table of consequences is flawed:\n" + "\n".join(flaws))


def _flaws(quantity: Quantity) -> Iterator[str]:
    for i, case in enumerate(quantity.cases):
        if case.outcome not in OUTCOMES or case.outcome == "unknown":
            yield f"case {i} has outcome {case.outcome!r}"
        if case.outcome != "estimate" and bool(case.name) != (case.outcome == "renamed"):
            yield f"case {i} is {case.outcome!r} and named {case.name!r}"
        if strange := {*case.holds, *case.fails}.difference(FACTS):
            yield f"case {i} speaks of {sorted(strange)}"
    first = [
        next((i for i, c in enumerate(quantity.cases) if c.matches(w)), None) for w in _worlds()
    ]
    yield from (f"case {i} is never reached" for i in range(len(quantity.cases)) if i not in first)
    if None in first:
        yield f"no case for {sorted(_worlds()[first.index(None)])}"


# The rendering ----------------------------------------------------------------------------------------


"""Typical situations, and the facts that fail in each."""


INTRO = """# What follows from which structure

Generated from the table in `unbatch.analysis.consequence_table`.

- **exact**: the quantity exists and is computed as it is defined.
- **renamed**: exact, but the number is another quantity and carries its name.
- **estimate**: only an estimate can be had, or the quantity is an estimate by definition.
- **none**: does not exist, and is refused.

*Parameters in the loss*: a weight decay or a temperature, say. *Weights set by other samples* (`own_weights`
fails): a mean over class weights or unmasked entries, whose denominator the other targets set. A star marks
what this release computes. Of several cases below the first that matches counts.
"""


def situation(name: str) -> dict[str, str]:
    """The statuses of one of the `SITUATIONS`, by its name."""
    return {s: "fails" if s in SITUATIONS[name] else "holds" for s in FACTS}


def render_markdown() -> str:
    """The documentation page: quantities against typical situations, and all cases with their reasons."""
    answers = zip(*(follows(situation(name)) for name in SITUATIONS), strict=True)
    head = [_line("quantity", *SITUATIONS), _line(*["---"] * (len(SITUATIONS) + 1))]
    rows = [
        _line(one[0].quantity + " \\*" * one[0].available, *(c.outcome for c in one))
        for one in answers
    ]
    return "\n".join([INTRO, *head, *rows, "", "## Reasons", "", *map(_section, TABLE)])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _section(quantity: Quantity) -> str:
    peers = [f"Elsewhere: {', '.join(quantity.peers)}.", ""] if quantity.peers else []
    cases = [
        f"- {_condition(case)}: **{_verdict(case)}**. {case.reason}" for case in quantity.cases
    ]
    if quantity.through_predictions:
        cases.append(f"- Where `{SPLIT}` fails, of the part through the predictions only.")
    return "\n".join([f"### {quantity.name}", "", *peers, *cases, ""])


def _condition(case: Case) -> str:
    facts = [f"`{s}`" for s in case.holds] + [f"not `{s}`" for s in case.fails]
    return ", ".join(facts) or "otherwise"


def _verdict(case: Case) -> str:
    return f"{OUTCOMES[case.outcome]}, *{case.name}*" if case.name else OUTCOMES[case.outcome]
