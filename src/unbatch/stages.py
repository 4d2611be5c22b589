"""The way of the samples from inputs to loss, as the few stages of a picture: frozen data, read off a recording.

Each stage says whether samples are separate in it, meet in a few numbers, or mix; a stage about which that is not
established says so. Deep models are told by their blocks, and blocks that look alike are told once, so that a picture
stays on one page. How stages look is decided in ``diagram.py`` (text) and ``figure.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeGuard

from unbatch.graph import Graph, Ref, Step
from unbatch.structure import Findings, used_predictions
from unbatch.verdicts import Culprit, Structure, Verdict
from unbatch.walk import Walk

MOST = 14  # stages between inputs and predictions that fit on a page

# What a stage can be, the gravest last: that of a stage is the gravest of its parts.
KINDS = {
    "separate": "each sample on its own",
    "uneven": "each sample on its own, but what is done depends on its place in the batch",
    "statistics": "samples meet, in a few numbers",
    "mixed": "samples mix",
    "unknown": "not established",
}
GRAVITY = list(KINDS)
CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}
MOVES = {"view", "t", "transpose", "permute", "expand", "clone", "unsqueeze", "squeeze", "slice", "select", "alias"}
MOVES |= {"_unsafe_view", "_to_copy", "split", "unbind", "reshape", "contiguous"}


@dataclass(frozen=True)
class Stage:
    """One row of the picture.

    ``role``: "inputs", "module", "predictions", "losses" or "loss". ``kind``: a key of ``KINDS``; of the loss itself
    "sum" (a weighted sum of the losses above it), "whole" (some other function) or "unknown". ``numbers``: how
    many statistics samples meet in, in all of the ``repeats`` blocks that the stage stands for; ``group``: over how
    many samples each, where that is not the whole batch.
    """

    role: str
    name: str
    kind: str
    numbers: int = 0
    group: int = 0
    repeats: int = 1
    note: str = ""
    culprits: tuple[Culprit, ...] = ()

    @property
    def apart(self) -> bool:
        """Every sample has a column of its own here."""
        return self.kind in ("separate", "uneven")

    @property
    def said(self) -> str:
        """What there is to say about the stage beside its name."""
        of_group = f", in each group of {self.group} samples" if self.group else ""
        told = {
            "uneven": "depends on the place in the batch",
            "statistics": f"samples meet in {self.numbers} number{'s' * (self.numbers != 1)}{of_group}",
            "mixed": "samples mix",
            "unknown": "not established",
        }
        blocks = f"{self.repeats} blocks" if self.repeats > 1 else ""
        kind = told.get(self.kind, "") if self.role != "loss" else ""
        return ", ".join(filter(None, (blocks, kind, self.note)))

    @property
    def blamed(self) -> str:
        """Where the user's program does it: op, file and line."""
        if not self.culprits:
            return ""
        more = f", and {len(self.culprits) - 1} more" if len(self.culprits) > 1 else ""
        return ", ".join(filter(None, (self.culprits[0].op, self.culprits[0].short))) + more

    @property
    def remark(self) -> str:
        """Both in one line."""
        return " · ".join(filter(None, (self.said, self.blamed)))


def shown(samples: int) -> list[str]:
    """The samples that get a column: a few from both ends, and an ellipsis for all others."""
    every = [str(n) for n in range(1, samples + 1)]
    return every if samples <= 5 else [*every[:2], "⋯", "N−1", "N"]


@dataclass(frozen=True)
class _Part:
    """One op on the way of the samples."""

    path: tuple[str, ...]
    op: str
    kind: str
    numbers: int = 0
    group: int = 0
    culprits: tuple[Culprit, ...] = ()


def stages(
    graph: Graph, findings: Findings, structure: Structure, classes: Mapping[str, str], loss: str, most: int = MOST
) -> tuple[Stage, ...]:
    """From inputs to loss. ``classes``: module path -> name of its class; ``loss``: what the loss is called."""
    shapes = ", ".join(str(list(p)) for p in structure.predictions)
    middle = _few(_doubted(_parts(graph, findings, structure, classes), structure), classes, most)
    first, last = Stage("inputs", "inputs", "separate"), Stage("predictions", "predictions", "separate", note=shapes)
    return (first, *middle, last, *_loss(structure, loss))


# --- the parts ------------------------------------------------------------------------------------


def _parts(graph: Graph, findings: Findings, structure: Structure, classes: Mapping[str, str]) -> list[_Part]:
    forward = findings.forward
    steps = forward.ancestors(used_predictions(graph)) - graph.after_cut
    blamed = _blamed(graph, findings, steps)
    carried = {s for s in steps if any(forward[r].depends_on_batch for r in graph.steps[s].outs if _known(r, forward))}
    verdicts = (structure.independent_forward, structure.simd_forward, structure.simd_given_statistics)
    culprits = tuple(dict.fromkeys(c for v in verdicts for c in v.culprits))
    parts = []
    for step in (graph.steps[s] for s in sorted(carried | blamed.keys())):
        kind, numbers, group = blamed.get(step.index, ("separate", 0, 0))
        mine = tuple(c for c in culprits if kind != "separate" and _at(c, step))
        path = tuple(step.module.split(".")) if step.module in classes and step.module else ()
        parts.append(_Part(path, step.name, kind, numbers, group, mine))
    return parts


def _known(ref: Ref | None, walk: Walk) -> TypeGuard[Ref]:
    return ref is not None and ref.index in walk.marks


def _at(culprit: Culprit, step: Step) -> bool:
    """A culprit without a line of its own points to where the problem was made."""
    same = culprit.module == step.module and culprit.where == (step.where or culprit.where)
    return same and culprit.op in (step.name, "escape")


def _blamed(graph: Graph, findings: Findings, steps: set[int]) -> dict[int, tuple[str, int, int]]:
    """Step -> kind, numbers and size of a group, of the steps at which samples are not simply separate."""
    forward, algebra = findings.forward, findings.forward.algebra
    found: dict[int, tuple[str, int, int]] = {}

    def blame(step: int, kind: str, numbers: int = 0, group: int = 0) -> None:
        before = found.get(step, ("separate", 0, 0))
        grave = max(before[0], kind, key=GRAVITY.index)
        found[step] = grave, before[1] + numbers, max(before[2], group)

    for s in algebra.uneven & steps:
        blame(s, "uneven")
    for use in algebra.uses.values():
        if any(algebra.roots[r].step in steps for r in use.roots):
            root = algebra.roots[max(use.roots)]
            blame(root.step, "mixed" if use.long else "statistics", use.size, root.samples if root.groups else 0)
    mixers = frozenset().union(*(forward[r].mixers for r in used_predictions(graph) if _known(r, forward)))
    for s in mixers & steps & algebra.births.keys():
        blame(s, "mixed")
    for s in forward.unknown.keys() & steps:
        blame(s, "unknown")
    for escape in findings.escapes:
        after = [s for s in sorted(steps) if s >= escape.step] or sorted(steps)[-1:]
        for s in after[:1]:
            blame(s, "unknown")
    return found


def _doubted(parts: Sequence[_Part], structure: Structure) -> list[_Part]:
    """The picture says what the verdict says: no more, and no less."""
    verdict = structure.independent_forward
    if verdict:
        return [p if p.kind == "uneven" else replace(p, kind="separate", numbers=0, group=0) for p in parts]
    if structure.samples == 1 or all(p.kind in ("separate", "uneven") for p in parts):
        return [replace(p, kind="unknown", numbers=0, group=0) for p in parts]
    if verdict.status == "unknown":
        return [p if p.kind in ("separate", "uneven") else replace(p, kind="unknown") for p in parts]
    suspects = [p for p in parts if p.kind not in ("separate", "uneven")]
    if len(suspects) == 1 and suspects[0].kind == "unknown":  # a witness saw samples meet, and nowhere else they can
        return [replace(p, kind="mixed") if p is suspects[0] else p for p in parts]
    return list(parts)


# --- few of them ----------------------------------------------------------------------------------


def _few(parts: Sequence[_Part], classes: Mapping[str, str], most: int) -> list[Stage]:
    """As deep into the modules as fits on a page; where nothing fits, separate stages in a row become one."""
    deepest = max((len(p.path) for p in parts), default=0)
    depths = range(max(deepest, 1), 0, -1)
    cuts = [_alike(_cut(parts, classes, depth, opened)) for depth in depths for opened in (True, False)]
    told = [*cuts, *map(_together, cuts), _cut(parts, classes, 0, False)]
    return next((found for found in told if len(found) <= most), told[-1])


def _cut(parts: Sequence[_Part], classes: Mapping[str, str], depth: int, opened: bool) -> list[Stage]:
    """One stage for each run of a module at ``depth``, or of like ops between modules.

    ``opened``: what only holds other modules is told by these.
    """
    leaves = _leaves(classes)

    def key(part: _Part) -> tuple[tuple[str, ...], str]:
        to = depth
        while opened and to and classes.get(".".join(part.path[:to])) in CONTAINERS and to < len(part.path):
            to += 1
        between = part.path not in leaves and len(part.path) < to
        return part.path[:to], part.kind if between else ""

    return [_stage(path, list(run), classes) for (path, _), run in groupby(parts, key)]


def _leaves(classes: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Modules without modules in them."""
    paths = {tuple(name.split(".")) for name in classes if name}
    return paths - {path[:-1] for path in paths} - {()}


def _stage(path: tuple[str, ...], run: Sequence[_Part], classes: Mapping[str, str]) -> Stage:
    inside = any(p.path[: len(path)] == path and p.path != path for p in run) or path in _leaves(classes)
    name = f"{'.'.join(path)} {classes['.'.join(path)]}" if path and inside else _ops(run)
    culprits = tuple(dict.fromkeys(c for p in run for c in p.culprits))
    kind = max((p.kind for p in run), key=GRAVITY.index)
    return Stage("module", name, kind, sum(p.numbers for p in run), max(p.group for p in run), culprits=culprits)


def _ops(run: Sequence[_Part]) -> str:
    """What is done, in the names of the ops; what only moves things is left out where more is done."""
    names = list(dict.fromkeys(p.op.strip("_") for p in run))
    doing = [n for n in names if n not in MOVES] or names
    return ", ".join(doing[:3]) + (", …" if len(doing) > 3 else "")


def _alike(found: Sequence[Stage]) -> list[Stage]:
    """Blocks of a numbered series that follow on each other and look alike, as one."""
    out: list[Stage] = []
    first: list[str] = []  # the number with which the series of each began
    for stage in found:
        if out and _follows(out[-1], stage):
            series, number, class_ = _split(stage.name)
            begun = first[-1] if out[-1].repeats > 1 else _split(out[-1].name)[1]
            first[-1] = begun
            name = f"{series}{begun}–{number} {class_}"
            culprits = tuple(dict.fromkeys(out[-1].culprits + stage.culprits))
            numbers, repeats = out[-1].numbers + stage.numbers, out[-1].repeats + 1
            out[-1] = replace(out[-1], name=name, numbers=numbers, repeats=repeats, culprits=culprits)
        else:
            out.append(stage)
            first.append("")
    return out


def _split(name: str) -> tuple[str, str, str]:
    """``layer1.0 Block`` as ``layer1.``, ``0`` and ``Block``."""
    path, _, class_ = name.partition(" ")
    series, dot, number = path.rpartition(".")
    return series + dot, number.rpartition("–")[2], class_


def _follows(last: Stage, stage: Stage) -> bool:
    (series, number, class_), (next_series, next_number, next_class) = _split(last.name), _split(stage.name)
    numbered = number.isdigit() and next_number.isdigit() and int(next_number) == int(number) + 1
    alike = (last.kind, last.group, last.numbers / last.repeats) == (stage.kind, stage.group, stage.numbers)
    return bool(class_) and numbered and alike and (series, class_) == (next_series, next_class)


def _together(found: Sequence[Stage]) -> list[Stage]:
    """Separate stages in a row become one."""
    out: list[Stage] = []
    for kind, run in groupby(found, lambda s: s.kind):
        some = list(run)
        names = [s.name for s in some]
        name = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
        out += some if kind != "separate" else [replace(some[0], name=name, repeats=1)]
    return out


# --- the loss -------------------------------------------------------------------------------------


def _loss(structure: Structure, name: str) -> Iterator[Stage]:
    apart, summed, split = structure.simd_loss, structure.reduction, structure.canonical_split
    enters = {"holds": "", "fails": "parameters enter beside the predictions"}
    note = enters.get(split.status, "whether parameters enter is not established")
    kinds = {"holds": "separate", "fails": "mixed", "unknown": "unknown"}
    blamed = _distinct((*apart.culprits, *split.culprits))
    yield Stage("losses", name.replace("<lambda>", "loss"), kinds[apart.status], note=note, culprits=blamed)
    yield _reduction(summed, apart)


def _reduction(summed: Verdict, apart: Verdict) -> Stage:
    if not apart:  # the stage above is already no loss of single samples
        return Stage("loss", "loss", "whole")
    if summed:
        depends = " and ".join(sorted(summed.weights_depend_on))
        return Stage("loss", "reduction", "sum", note=f"weights depend on {depends}" if depends else "")
    note = "no sum over samples" if summed.status == "fails" else "whether it is a sum is not established"
    kind = "whole" if summed.status == "fails" else "unknown"
    return Stage("loss", "reduction", kind, note=note, culprits=_distinct(summed.culprits))


def _distinct(culprits: Iterable[Culprit]) -> tuple[Culprit, ...]:
    return tuple(dict.fromkeys(culprits))
