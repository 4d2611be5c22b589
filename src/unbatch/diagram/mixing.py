"""At which ops on the way from inputs to predictions samples meet: read off a recording, and held against the verdicts.

What is said of an op is what the verdicts say, no more and no less. How ops become the stages of a picture is in
``stages.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from unbatch.analysis.domain.sample_layout import holds_its_place, in_order
from unbatch.analysis.explanations import culprit
from unbatch.analysis.inference import AnalysisState
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.policy import Mixed, Policy
from unbatch.analysis.rules.registry import NO_RULE
from unbatch.analysis.structure import Culprit, Structure
from unbatch.capture import ops
from unbatch.capture.graph import Graph, HostRead, Ref, Step

# What an op or a stage can be, the gravest last: that of a stage is the gravest of its ops.
KINDS = {
    "separate": "each sample on its own",
    "uneven": "each sample on its own, but what is done depends on its place in the batch",
    "statistics": "samples meet, in a few numbers",
    "moved": "samples change places: slice n belongs to another sample than n",
    "unknown": "not established",
    "mixed": "samples mix",
}


GRAVITY = list(KINDS)


APART = ("separate", "uneven")


ONE_SAMPLE = "one sample: nothing to tell apart; give a batch of several"


SOMEWHERE = "samples mix somewhere here: shown by a witness"


HERE_OR_THERE = "samples mix here or at another “?”: shown by a witness"


STRAYED = "not established: the recording is not all of the model"


@dataclass(frozen=True)
class Part:
    """One op on the way of the samples. ``kind``: a key of ``KINDS``; ``note``: what to say in place of "not
    established"; ``numbers`` and ``group`` as in ``Stage``."""

    path: tuple[str, ...]
    op: str
    kind: str = "separate"
    numbers: int = 0
    group: int = 0
    culprits: tuple[Culprit, ...] = ()
    note: str = ""

    @property
    def apart(self) -> bool:
        return self.kind in APART

    def unsettled(self, note: str, culprits: tuple[Culprit, ...] = ()) -> Part:
        return Part(self.path, self.op, "unknown", culprits=culprits, note=note)


def parts(
    graph: Graph, findings: AnalysisState, structure: Structure, classes: Mapping[str, str]
) -> list[Part]:
    """The ops that samples go through, in order. ``classes``: module path -> name of its class."""
    return _held(_found(graph, findings, structure, classes), structure)


# --- what the recording shows ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Meeting:
    """What is known against one step."""

    kind: str = "separate"
    numbers: int = 0
    group: int = 0
    escapes: tuple[HostRead, ...] = ()

    def __or__(self, other: _Meeting) -> _Meeting:
        grave = max(self.kind, other.kind, key=GRAVITY.index)
        numbers, group = self.numbers + other.numbers, max(self.group, other.group)
        return _Meeting(grave, numbers, group, self.escapes + other.escapes)


Meetings = dict[int, _Meeting]  # by step


def _found(
    graph: Graph, findings: AnalysisState, structure: Structure, classes: Mapping[str, str]
) -> list[Part]:
    forward = findings.forward
    steps = forward.ancestors(graph.used_predictions) - graph.after_cut
    carrying = {
        s
        for s in steps
        if any(forward[r].depends_on_batch for r in graph.steps[s].outs if _known(r, forward))
    }
    met = _meetings(graph, findings, steps, carrying)
    verdicts = (
        structure.independent_forward,
        structure.simd_forward,
        structure.simd_given_statistics,
    )
    culprits = tuple(dict.fromkeys(c for v in verdicts for c in v.culprits))
    out = []
    for step in (graph.steps[s] for s in sorted(carrying | met.keys())):
        here = met.get(step.index, _Meeting())
        mine = tuple(
            c for c in culprits if here.kind not in ("separate", "moved") and _at(c, step, here)
        )
        mine = mine or _own_culprit(step, here, step.index in forward.unknown)
        path = tuple(step.module.split(".")) if step.module in classes and step.module else ()
        out.append(Part(path, step.name, here.kind, here.numbers, here.group, mine))
    return out


def _known(ref: Ref | None, forward: Interpretation) -> TypeGuard[Ref]:
    return ref is not None and ref.index in forward.marks


def _own_culprit(step: Step, here: _Meeting, no_rule: bool) -> tuple[Culprit, ...]:
    """For a step that the verdicts do not name: theirs are where samples meet first, and where predictions end."""
    kinds = {
        "moved": "place",
        "mixed": "joined",
        "statistics": "group" if here.group else "statistic",
    }
    why = kinds.get(here.kind, NO_RULE if no_rule else "")
    return (culprit(step, why, size=here.numbers, samples=here.group),) if why else ()


def _at(culprit: Culprit, step: Step, here: _Meeting) -> bool:
    """A culprit without a line of its own points to where the problem was made."""
    if culprit.op == "escape":
        return any(
            (e.module, e.where or culprit.where) == (culprit.module, culprit.where)
            for e in here.escapes
        )
    same = culprit.module == step.module and culprit.where == (step.where or culprit.where)
    return same and culprit.op == step.name


def _meetings(
    graph: Graph, findings: AnalysisState, steps: set[int], carrying: set[int]
) -> Meetings:
    """The steps at which samples are not simply separate."""
    forward, predictions = (
        findings.forward,
        [r for r in graph.used_predictions if _known(r, findings.forward)],
    )
    found: Meetings = {}
    mixers = (
        frozenset().union(*(forward[r].mixers for r in predictions)) & forward.algebra.births.keys()
    )
    for more in (
        _listening(forward, steps),
        dict.fromkeys(
            steps & (mixers - forward.unknown.keys() | _entering(forward, predictions)),
            _Meeting("mixed"),
        ),
        dict.fromkeys(steps & forward.unknown.keys(), _Meeting("unknown")),
        _after(findings.escapes, sorted(carrying) or sorted(steps)),
        dict.fromkeys(
            steps & _displacing(graph, forward, predictions, findings.leading), _Meeting("moved")
        ),
        _after_mixing(graph, forward, steps),
    ):
        for step, meeting in more.items():
            found[step] = found.get(step, _Meeting()) | meeting
    return found


def _listening(forward: Interpretation, steps: set[int]) -> Meetings:
    """Where statistics are made that samples listen to, and where it matters which place a sample has."""
    algebra = forward.algebra
    found: Meetings = dict.fromkeys(algebra.uneven & steps, _Meeting("uneven"))
    for use in algebra.uses.values():
        if any(algebra.roots[r].step in steps for r in use.roots):
            root = algebra.roots[max(use.roots)]
            kind, group = "mixed" if use.long else "statistics", root.samples if root.groups else 0
            found[root.step] = found.get(root.step, _Meeting()) | _Meeting(kind, use.size, group)
    return found


def _entering(forward: Interpretation, predictions: list[Ref]) -> set[int]:
    """Where totals over samples are made that predictions contain as they are, and that nothing else listens to."""
    heard = frozenset().union(*(use.roots for use in forward.algebra.uses.values()))
    given = frozenset().union(*(forward[r].given for r in predictions))
    return {forward.algebra.roots[r].step for r in given - heard}


def _after(escapes: Sequence[HostRead], steps: list[int]) -> Meetings:
    """What Python has read may tell in the first step after it that samples go through."""
    found: Meetings = {}
    for escape in escapes:
        for step in [s for s in steps if s >= escape.step][:1] or steps[-1:]:
            found[step] = found.get(step, _Meeting()) | _Meeting("unknown", escapes=(escape,))
    return found


def _displacing(
    graph: Graph, forward: Interpretation, predictions: list[Ref], leading: bool
) -> set[int]:
    """The steps at which samples lose their places for good: what these read is in order still."""
    samples = forward.algebra.samples
    waiting = [
        r
        for r in predictions
        if forward[r].separate and not holds_its_place(forward[r], samples, leading)
    ]
    seen, found = set[int](), set[int]()
    while waiting:
        ref = waiting.pop()
        if ref.index in seen or ref.index not in graph.makers:
            continue
        seen.add(ref.index)
        maker = graph.makers[ref.index]
        step = _written_by(graph, ref, maker) or maker
        known = [r for r in step.refs() if _known(r, forward) and r.index not in seen]
        before = [r for r in known if forward[r].separate and not in_order(forward[r], samples)]
        waiting += before
        found |= set() if before else {step.index}
    return found


def _written_by(graph: Graph, ref: Ref, maker: Step) -> Step | None:
    """The last write through another view to the memory of a value, after it was made."""
    memory = graph.values[ref.index].storage
    later = graph.steps[maker.index + 1 :] if graph.written(ref.index) else []
    writes = [
        s
        for s in later
        if any(graph.values[o.index].storage == memory and o != ref for o, _ in s.writes)
    ]
    return writes[-1] if writes else None


def _after_mixing(graph: Graph, forward: Interpretation, steps: set[int]) -> Meetings:
    """Where samples that have mixed meet again, as if each slice were the sample's own from there on."""
    mixed = {
        s
        for s in steps
        if any(_known(r, forward) and forward[r].mixed for r in graph.steps[s].refs())
    }
    if not mixed:
        return {}
    given = {i: m for i, m in forward.marks.items() if graph.values[i].kind != "step"}
    again = interpret(
        graph,
        forward.algebra.samples,
        given,
        graph.forward_steps,
        sorted(forward.assumed),
        policy=Policy(Mixed.AFRESH),
    )
    # Elementwise ops only bring in what has mixed before.
    mixing = {
        s for s in mixed & again.algebra.births.keys() if not ops.is_pointwise(graph.steps[s].op)
    }
    listening = {
        s: m for s, m in _listening(again, steps).items() if s in mixed and m.kind != "uneven"
    }
    return listening | dict.fromkeys(mixing - forward.unknown.keys(), _Meeting("mixed"))


# --- what the verdicts say ------------------------------------------------------------------------


def _held(found: list[Part], structure: Structure) -> list[Part]:
    """As much of it as the verdict on the forward pass says."""
    verdict = structure.independent_forward
    if verdict:
        return [p if p.kind == "uneven" else Part(p.path, p.op) for p in found]
    if structure.samples == 1:
        return [p.unsettled(ONE_SAMPLE) for p in found]
    unseen = not any(
        p.kind == "unknown" for p in found
    )  # what is known to be unknown may well be why it strays
    strayed = tuple(c for c in verdict.culprits if c.op == "replay" and unseen)
    if all(p.apart for p in found):
        note = SOMEWHERE if verdict.status == "fails" else STRAYED if strayed else ""
        return [p.unsettled(note, verdict.culprits) for p in found]
    if verdict.status == "fails":
        found = _witnessed(found)
    else:
        found = [p if p.apart else replace(p, kind="unknown") for p in found]
    return [p.unsettled(STRAYED, strayed) if strayed and p.apart else p for p in found]


def _witnessed(found: list[Part]) -> list[Part]:
    """Samples were seen to meet. Where they can do so in one place only, that is where."""
    suspects = [p for p in found if not p.apart]
    if any(p.kind != "unknown" for p in suspects):
        return found
    places = {p.culprits for p in suspects}
    if len(suspects) == 1 or (len(places) == 1 and () not in places):
        return [replace(p, kind="mixed") if not p.apart else p for p in found]
    return [p if p.apart else replace(p, note=SOMEWHERE) for p in found]
