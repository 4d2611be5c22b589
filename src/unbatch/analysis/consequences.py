"""Which quantities survive the loss of a structure, and why: functions over one table.

Here live the reader of the table (`follows`, `consequence`), its checker (`check`) and its
rendering (`render_markdown`). No tensors, no networks, and no verdicts: those come in as words.

A *world* is the set of facts that hold; a quantity's cases are tried in order and the first one
that matches the world is its answer. An unknown structure means several worlds: where all of them
give the same answer it stands, otherwise it is `"unknown"`, together with the fewest facts that
would settle it.

Legend: `F_n` prediction and `ℓ_n` loss of sample n, `L` the loss, `w_n` its weights, `J = ∂F/∂θ`,
`H = ∇²_F L` with blocks `H_n`, `G = JᵀHJ = VΣVᵀ` the GGN, `N·C` the number of predicted entries.

Sources: Dangel, "Structural implications of batch normalization" (2021), for the structures and
what rests on them; Dangel, Kunstner, Hennig, "BackPACK" (2020), and Dangel, Tatzel, Hennig, "ViViT"
(2021), for the quantities of these packages; Schneider, Dangel, Hennig, "Cockpit" (2021), for the
statistics of gradients; Chen et al., "BDA-PCH" (2018), for the positive-curvature Hessian.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from itertools import combinations

from unbatch.analysis.consequence_facts import (
    FACTS,
    INDEPENDENT,
    OWN_WEIGHTS,
    PART,
    SIMD_FORWARD,
    SPLIT,
    STATISTICS,
    STATUSES,
    STRUCTURES,
    Case,
    Consequence,
    Outcome,
    Quantity,
    World,
)
from unbatch.analysis.consequence_rules import REST
from unbatch.analysis.consequence_table import (
    OF_PARTS,
    OF_WHOLE_BATCH,
    OUTCOMES,
    SITUATIONS,
    TABLE,
)

Answer = tuple[Outcome, str]  # what becomes of a quantity, and its name then


# --- the reader -----------------------------------------------------------------------------------


def follows(statuses: Mapping[str, str]) -> tuple[Consequence, ...]:
    """Return what follows for every quantity, in the order of the table.

    `statuses` maps each of `STRUCTURES` to `"holds"`, `"fails"` or `"unknown"`. The entry
    `"own_weights"` may be left out and then counts as holding: pass it where the weights depend on
    targets or inputs. Raises `ValueError` for missing or strange entries, and for verdicts that
    contradict each other.
    """
    worlds, unknown = _completions(statuses), _unknown_facts(statuses)
    return tuple(_conclude(quantity, worlds, unknown) for quantity in TABLE)


def consequence(quantity: str, statuses: Mapping[str, str]) -> Consequence:
    """Return what follows for one quantity; `statuses` as in `follows`.

    Raises `KeyError` for an unknown name.
    """
    for entry in TABLE:
        if entry.name == quantity:
            return _conclude(entry, _completions(statuses), _unknown_facts(statuses))
    names = [entry.name for entry in TABLE]
    close = get_close_matches(quantity, names) or names
    raise KeyError(f"no quantity is called {quantity!r}; do you mean one of: {', '.join(close)}?")


def beside_joined_outputs(entry: Consequence, outputs: str, rows_exist: bool) -> Consequence:
    """Return what follows where ``outputs`` (in words) have no axis of samples.

    ``rows_exist``: some other output has one.
    """
    if entry.quantity in OF_WHOLE_BATCH or entry.outcome in ("none", "unknown"):
        return entry
    if not rows_exist:
        reason = f"No output belongs to samples: {outputs} has no sample axis."
        return replace(entry, outcome="none", name="", reason=reason)
    if entry.quantity in OF_PARTS:
        reason = f"{entry.reason} So where the loss is linear in {outputs}, without a sample axis."
        depends_on = (f"linear in {outputs}",)
        return replace(entry, outcome="unknown", name="", reason=reason, depends_on=depends_on)
    if entry.name.endswith(PART):
        return entry
    outcome: Outcome = "renamed" if entry.outcome == "exact" else entry.outcome
    reason = f"{entry.reason} {outputs} has no sample axis, and its part is carried as `rest`."
    return replace(entry, outcome=outcome, name=entry.name + PART, reason=reason)


def _unknown_facts(statuses: Mapping[str, str]) -> list[str]:
    # In the order of FACTS, which decides which of two smallest settling sets is named.
    return _facts_with(statuses, "unknown")


def _facts_with(statuses: Mapping[str, str], status: str) -> list[str]:
    """Return the facts of this status, in the order of ``FACTS``."""
    return [fact for fact in FACTS if statuses.get(fact) == status]


@cache
def _worlds() -> tuple[World, ...]:
    """Return all sets of facts that can hold together.

    A SIMD forward is independent, and SIMD given no statistics. The converse is not used, as
    statistics may be those of groups, and groups may differ.
    """
    worlds = []
    for subset in _subsets(FACTS):
        world = frozenset(subset)
        if SIMD_FORWARD not in world or {INDEPENDENT, STATISTICS} <= world:
            worlds.append(world)
    return tuple(worlds)


def _subsets(facts: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield all subsets, small ones first."""
    for size in range(len(facts) + 1):
        yield from combinations(facts, size)


def _completions(statuses: Mapping[str, str]) -> list[World]:
    """Return the worlds that agree with what is known."""
    known = {OWN_WEIGHTS: "holds", **statuses}
    if set(known) != set(FACTS) or not set(known.values()) <= set(STATUSES):
        raise ValueError(f"need one of {STATUSES} for each of {STRUCTURES}, got {dict(statuses)}")
    holding = _facts_with(known, "holds")
    failing = _facts_with(known, "fails")
    # Of two unknown facts one may exclude the other: not every completion is a world.
    worlds = [w for w in _worlds() if w.issuperset(holding) and w.isdisjoint(failing)]
    # No world is left where the verdicts contradict each other. No answer is better than one of
    # them: the fault is in who judged.
    if not worlds:
        raise ValueError(
            f"a SIMD forward is independent and SIMD given statistics, but got {dict(statuses)}"
        )
    return worlds


def _decide(quantity: Quantity, world: World) -> Case:
    """Return the first case that matches.

    Where the split fails it is about the part through the predictions only.
    """
    case = _first_match(quantity, world)
    # What does not exist has no part through the predictions either. What sees all parameters
    # loses nothing where the split fails.
    if SPLIT in world or not quantity.through_predictions or case.outcome == "none":
        return case
    outcome: Outcome = "renamed" if case.outcome == "exact" else case.outcome
    return Case(outcome, f"{case.reason} {REST}", (case.name or quantity.name) + PART)


def _first_match(quantity: Quantity, world: World) -> Case:
    for case in quantity.cases:
        if case.matches(world):
            return case
    raise AssertionError(f"no case of {quantity.name} for {sorted(world)}: see `check`")


def _conclude(quantity: Quantity, worlds: Sequence[World], unknown: Sequence[str]) -> Consequence:
    """Return the answer that all worlds share, or which facts would settle it."""
    answers: dict[World, Answer] = {}
    reasons: dict[str, None] = {}
    for world in worlds:
        case = _decide(quantity, world)
        answers[world] = (case.outcome, _label(quantity, case))
        reasons[case.reason] = None
    # Two worlds may have one answer for different reasons: it stands, with all of these.
    settling = _settling(answers, unknown)
    if settling:
        return _undecided(quantity, sorted(set(answers.values())), settling)
    outcome, name = answers[worlds[0]]
    reason = " Or: ".join(reasons)
    return Consequence(quantity.name, outcome, name, reason, quantity.peers, quantity.available)


def _undecided(
    quantity: Quantity, answers: Sequence[Answer], settling: tuple[str, ...]
) -> Consequence:
    """Return that the answer is unknown, and which answers are possible."""
    outcomes: dict[str, None] = {}
    for outcome, _ in answers:
        outcomes[OUTCOMES[outcome]] = None
    return Consequence(
        quantity=quantity.name,
        outcome="unknown",
        name="",
        reason=f"Depends on {', '.join(settling)}: {' or '.join(outcomes)}.",
        peers=quantity.peers,
        available=quantity.available,
        depends_on=settling,
    )


def _label(quantity: Quantity, case: Case) -> str:
    if case.outcome == "none":
        return ""
    return case.name or quantity.name


def _settling(answers: Mapping[World, Answer], unknown: Sequence[str]) -> tuple[str, ...]:
    """Return the fewest of the unknown facts of which the answer is a function.

    None of them if the answer is the same in all worlds.
    """
    # An example: of a clipped sum, with only ``reduction`` and ``simd_loss`` unknown, both are
    # named, since the answer is exact if both hold and carries one of two other names otherwise.
    for subset in _subsets(unknown):
        if _settles(subset, answers):
            return subset
    raise AssertionError("all unknown facts together always settle the answer")


def _settles(facts: Sequence[str], answers: Mapping[World, Answer]) -> bool:
    """Tell whether worlds that agree in these facts agree in the answer."""
    by_facts: dict[World, Answer] = {}
    for world, answer in answers.items():
        if by_facts.setdefault(world.intersection(facts), answer) != answer:
            return False
    return True


# --- the checker ----------------------------------------------------------------------------------


def check(table: Sequence[Quantity]) -> None:
    """Raise `ValueError` listing every flaw.

    Flaws are names given twice, and malformed, hidden and missing cases.
    """
    flaws: list[str] = []
    names: set[str] = set()
    for quantity in table:
        # By its name a quantity is asked for, so that a second one would never be reached.
        if quantity.name in names:
            flaws.append(f"{quantity.name}: named twice")
        names.add(quantity.name)
        flaws += [f"{quantity.name}: {flaw}" for flaw in _flaws(quantity)]
    if flaws:
        raise ValueError("the table of consequences is flawed:\n" + "\n".join(flaws))


def _flaws(quantity: Quantity) -> Iterator[str]:
    for i, case in enumerate(quantity.cases):
        if case.outcome not in OUTCOMES or case.outcome == "unknown":
            yield f"case {i} has outcome {case.outcome!r}"
        # What is exact bears the quantity's own name, and what does not exist bears none. Only an
        # estimate may do either: it may estimate another quantity.
        if case.outcome != "estimate" and bool(case.name) != (case.outcome == "renamed"):
            yield f"case {i} is {case.outcome!r} and named {case.name!r}"
        strange = {*case.holds, *case.fails}.difference(FACTS)
        if strange:
            yield f"case {i} speaks of {sorted(strange)}"
    reached: set[int | None] = set()
    missing: list[World] = []
    for world in _worlds():
        first = _index_of_match(quantity, world)
        reached.add(first)
        if first is None:
            missing.append(world)
    # A case behind a wider one is dead text, however true.
    for i in range(len(quantity.cases)):
        if i not in reached:
            yield f"case {i} is never reached"
    if missing:
        yield f"no case for {sorted(missing[0])}"


def _index_of_match(quantity: Quantity, world: World) -> int | None:
    for i, case in enumerate(quantity.cases):
        if case.matches(world):
            return i
    return None


# --- the rendering --------------------------------------------------------------------------------


INTRO = """# What follows from which structure

Generated from the table in `unbatch.analysis.consequence_table`.

- **exact**: the quantity exists and is computed as it is defined.
- **renamed**: exact, but the number is another quantity and carries its name.
- **estimate**: only an estimate can be had, or the quantity is an estimate by definition.
- **none**: does not exist, and is refused.

*Parameters in the loss*: a weight decay or a temperature, say. *Weights set by other samples*
(`own_weights` fails): a mean over class weights or unmasked entries, whose denominator the other
targets set. A star marks what this release computes. Of several cases below the first that matches
counts.
"""


def situation(name: str) -> dict[str, str]:
    """Return the statuses of one of the `SITUATIONS`, by its name."""
    statuses = dict.fromkeys(FACTS, "holds")
    for fact in SITUATIONS[name]:
        statuses[fact] = "fails"
    return statuses


def render_markdown() -> str:
    """Return the documentation page.

    Quantities against typical situations, and all cases with their reasons.
    """
    by_situation = [follows(situation(name)) for name in SITUATIONS]
    lines = [INTRO, _row("quantity", *SITUATIONS), _row(*["---"] * (len(SITUATIONS) + 1))]
    for answers in zip(*by_situation, strict=True):
        star = " \\*" * answers[0].available
        outcomes = [answer.outcome for answer in answers]
        lines.append(_row(answers[0].quantity + star, *outcomes))
    return "\n".join([*lines, "", "## Reasons", "", *map(_section, TABLE)])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _section(quantity: Quantity) -> str:
    lines = [f"### {quantity.name}", ""]
    if quantity.peers:
        lines += [f"Elsewhere: {', '.join(quantity.peers)}.", ""]
    for case in quantity.cases:
        condition, outcome = _condition(case), _outcome_in_words(case)
        lines.append(f"- {condition}: **{outcome}**. {case.reason}")
    if quantity.through_predictions:
        lines.append(f"- Where `{SPLIT}` fails, of the part through the predictions only.")
    return "\n".join([*lines, ""])


def _condition(case: Case) -> str:
    facts = [f"`{fact}`" for fact in case.holds]
    facts += [f"not `{fact}`" for fact in case.fails]
    return ", ".join(facts) or "otherwise"


def _outcome_in_words(case: Case) -> str:
    words = OUTCOMES[case.outcome]
    if case.name:
        words += f", *{case.name}*"
    return words


if __name__ == "__main__":
    sys.stdout.write(render_markdown())
