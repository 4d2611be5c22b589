"""The way of the samples from inputs to loss, as the few stages of a picture: frozen data, read off a recording.

Each stage says whether samples are separate in it, meet in a few numbers, change places, or mix (``meetings.py`` knows
where); a stage about which that is not established says so. Deep models are told by their blocks, and blocks that look
alike are told once, so that a picture stays on one page. How stages look is decided in ``diagram.py`` (text) and
``figure.py``.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from unbatch.analysis.inference import AnalysisState
from unbatch.analysis.structure import Culprit, Structure, Verdict
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.diagram.mixing import APART, GRAVITY, HERE_OR_THERE, SOMEWHERE, Part, parts

MOST = 14  # stages between inputs and predictions that fit on a page


NAMED = 3  # places that are named before the others are counted


CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}


WORDS = {
    "escape": "read by Python",
    "replay": "replayed on another batch",
}  # culprits that are no ops


@dataclass(frozen=True)
class Stage:
    """One row of the picture.

    ``role``: "inputs", "module", "predictions", "losses" or "loss". ``kind``: a key of ``meetings.KINDS``; of the loss
    itself "sum" (a weighted sum of the losses above it), "whole" (some other function) or "unknown". ``numbers``: how
    many statistics samples meet in, in all of the ``repeats`` blocks that the stage stands for, or in all of its
    ``runs``; ``group``: over how many samples each, where that is not the whole batch. ``path``: of the module that it
    is (of the last of the blocks), "" where it is none.
    """

    role: str
    name: str
    kind: str
    numbers: int = 0
    group: int = 0
    repeats: int = 1
    runs: int = 1
    note: str = ""
    culprits: tuple[Culprit, ...] = ()
    path: str = ""

    @property
    def apart(self) -> bool:
        """Every sample has a column of its own here."""
        return self.kind in APART

    @property
    def said(self) -> str:
        """What there is to say about the stage beside its name."""
        of_group = f", in each group of {self.group} samples" if self.group else ""
        told = {
            "uneven": "depends on the place in the batch",
            "statistics": f"samples meet in {self.numbers} number{'s' * (self.numbers != 1)}{of_group}",
            "moved": "samples change places",
            "mixed": "samples mix",
            "unknown": "" if self.role == "module" and self.note else "not established",
        }
        blocks = f"{self.repeats} blocks" if self.repeats > 1 else ""
        runs = f"run {self.runs} times" if self.runs > 1 else ""
        kind = told.get(self.kind, "") if self.role != "loss" else ""
        return ", ".join(filter(None, (blocks, runs, kind, self.note)))

    @property
    def blamed(self) -> str:
        """Where the user's program does it: op, file and line; or in which modules, if in several of them."""
        places = list(
            dict.fromkeys(
                (self._inside(c.module), WORDS.get(c.op, c.op), c.short) for c in self.culprits
            )
        )
        modules, ops, lines = (
            (_each(names) for names in zip(*places, strict=True)) if places else ([], [], [])
        )
        if len(modules) < 2:
            more = f", and {len(places) - 1} more" if len(places) > 1 else ""
            return ", ".join([*ops[:1], *lines[:1]]) + more
        return ", ".join([f"{_listed(ops)} in {_listed(modules)}", *lines[: len(lines) == 1]])

    def _inside(self, module: str) -> str:
        """A module by its name in the stage, which is the same in all blocks; a number alone would be no name."""
        depth = self.path.count(".") + 1 if self.path else 0
        name = ".".join(module.split(".")[depth:])
        above = "" if self.repeats > 1 else self.path
        return f"{above}.{name}" if depth and name[:1].isdigit() else name

    @property
    def remark(self) -> str:
        """Both in one line."""
        return " · ".join(filter(None, (self.said, self.blamed)))


def _each(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, names)))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def shown(samples: int) -> list[str]:
    """The samples that get a column: a few from both ends, and an ellipsis for all others."""
    every = [str(n) for n in range(1, samples + 1)]
    return every if samples <= 5 else [*every[:2], "⋯", "N−1", "N"]


def stages(
    graph: Graph,
    findings: AnalysisState,
    structure: Structure,
    classes: Mapping[str, str],
    loss: str,
    most: int = MOST,
) -> tuple[Stage, ...]:
    """From inputs to loss. ``classes``: module path -> name of its class; ``loss``: what the loss is called."""
    shapes = ", ".join(str(list(p)) for p in structure.predictions)
    middle = _doubts_joined(_few(parts(graph, findings, structure, classes), classes, most))
    first, last = (
        Stage("inputs", "inputs", "separate"),
        Stage("predictions", "predictions", "separate", note=shapes),
    )
    return (first, *middle, last, *_loss(structure, loss))


# --- few of them ----------------------------------------------------------------------------------


def _few(found: Sequence[Part], classes: Mapping[str, str], most: int) -> list[Stage]:
    """As deep into the modules as fits on a page; where nothing fits, separate stages in a row become one.

    Where that is not enough, one band reaches from the first place where samples meet to the last.
    """
    deepest = max((len(p.path) for p in found), default=0)
    depths = range(max(deepest, 1), 0, -1)
    leaves = {".".join(path) for path in _leaves(classes)}
    cuts = [
        _rerun(_alike(_cut(found, classes, depth, opened), leaves))
        for depth in depths
        for opened in (True, False)
    ]
    bands = [_one_band(c) for c in cuts]
    told = [*cuts, *map(_together, cuts), *bands, *map(_together, bands)]
    return next((few for few in told if len(few) <= most), told[-1])


def _cut(
    found: Sequence[Part], classes: Mapping[str, str], depth: int, opened: bool
) -> list[Stage]:
    """One stage for each run of a module at ``depth``, or of like ops between modules that do more than move things.

    ``opened``: what only holds other modules is told by these.
    """
    leaves = _leaves(classes)

    def key(part: Part) -> tuple[tuple[str, ...], str]:
        to = depth
        while (
            opened
            and to
            and classes.get(".".join(part.path[:to])) in CONTAINERS
            and to < len(part.path)
        ):
            to += 1
        between = part.path not in leaves and len(part.path) < to
        return part.path[:to], part.kind if between else ""

    runs = [(key_, list(run)) for key_, run in groupby(found, key)]
    telling = [
        (key_, run) for key_, run in runs if not (key_[1] == "separate" and _only_moves(run))
    ] or runs
    return [
        _stage(path, [part for _, run in same for part in run], classes)
        for (path, _), same in groupby(telling, lambda key_and_run: key_and_run[0])
    ]


def _only_moves(run: Sequence[Part]) -> bool:
    return all(_moves(p) for p in run)


def _moves(part: Part) -> bool:
    return ops.by_name(part.op).moves is not None


def _leaves(classes: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Modules without modules in them."""
    paths = {tuple(name.split(".")) for name in classes if name}
    return paths - {path[:-1] for path in paths} - {()}


def _stage(path: tuple[str, ...], run: Sequence[Part], classes: Mapping[str, str]) -> Stage:
    inside = any(p.path[: len(path)] == path and p.path != path for p in run) or path in _leaves(
        classes
    )
    module = ".".join(path) if inside else ""
    return _summary(run, f"{module} {classes[module]}" if module else _ops(run), module)


def _summary(some: Sequence[Part] | Sequence[Stage], name: str, path: str = "") -> Stage:
    """Ops or stages as one stage. Samples that meet, with something unknown beside that, are samples that mix."""
    kinds = {s.kind for s in some}
    unbounded = "unknown" in kinds and kinds & {"statistics", "moved"}
    kind = "mixed" if unbounded else max(kinds, key=GRAVITY.index)
    return Stage(
        "module",
        name,
        kind,
        sum(s.numbers for s in some),
        max(s.group for s in some),
        note=", ".join(_each(s.note for s in some)),
        culprits=_distinct(c for s in some for c in s.culprits),
        path=path,
    )


def _ops(run: Sequence[Part]) -> str:
    """What is done, in the names of the ops; what only moves things is left out where more is done."""
    computing = [p for p in run if not _moves(p)] or run
    doing = _each(p.op.strip("_") for p in computing)
    return ", ".join(doing[:3]) + (", …" if len(doing) > 3 else "")


def _alike(found: Sequence[Stage], leaves: Container[str]) -> list[Stage]:
    """Blocks of a numbered series that follow on each other and look alike, as one; ``leaves`` are no blocks."""
    out: list[Stage] = []
    for stage in found:
        if out and stage.path not in leaves and _follows(out[-1], stage):
            first = out[-1].name.partition(" ")[0].partition("–")[0]
            (_, number), class_ = _numbered(stage.path), stage.name.partition(" ")[2]
            both = _summary([out[-1], stage], f"{first}–{number} {class_}", stage.path)
            out[-1] = replace(both, repeats=out[-1].repeats + 1)
        else:
            out.append(stage)
    return out


def _numbered(path: str) -> tuple[str, str]:
    """``layer1.unit0`` as ``layer1.unit`` and ``0``."""
    series = re.sub(r"\d+$", "", path)
    return series, path[len(series) :]


def _follows(last: Stage, stage: Stage) -> bool:
    (series, number), (next_series, next_number) = _numbered(last.path), _numbered(stage.path)
    counted = bool(number and next_number) and int(next_number) == int(number) + 1
    same = (series, last.name.partition(" ")[2]) == (next_series, stage.name.partition(" ")[2])
    looks = (last.kind, last.group, last.note, last.numbers / last.repeats)
    return counted and same and looks == (stage.kind, stage.group, stage.note, stage.numbers)


def _rerun(found: Sequence[Stage]) -> list[Stage]:
    """Stages that are run again, in a row and in the same order, told once."""
    out: list[Stage] = []
    at = 0
    while at < len(found):
        size, times = _cycle(found[at:])
        out += [replace(s, runs=times, numbers=s.numbers * times) for s in found[at : at + size]]
        at += size * times
    return out


def _cycle(found: Sequence[Stage]) -> tuple[int, int]:
    """How many stages, from the first on, are repeated how often."""
    for size in range(1, min(len(found) // 2, MOST) + 1):
        times = 1
        while found[times * size : (times + 1) * size] == found[:size]:
            times += 1
        if times > 1:
            return size, times
    return 1, 1


def _together(found: Sequence[Stage]) -> list[Stage]:
    """Separate stages in a row become one."""
    out: list[Stage] = []
    for kind, run in groupby(found, lambda s: s.kind):
        some = list(run)
        out += some if kind != "separate" or len(some) == 1 else [_summary(some, _from_to(some))]
    return out


def _one_band(found: Sequence[Stage]) -> list[Stage]:
    """Everything from the first to the last stage in which samples are not separate becomes one."""
    met = [i for i, s in enumerate(found) if not s.apart]
    if len(met) < 2:
        return list(found)
    band = found[met[0] : met[-1] + 1]
    return [*found[: met[0]], _summary(band, _from_to(band)), *found[met[-1] + 1 :]]


def _doubts_joined(found: Sequence[Stage]) -> list[Stage]:
    """Stages in a row that are in doubt for the same reason become one."""
    out: list[Stage] = []
    for (unknown, *_), run in groupby(found, lambda s: (s.kind == "unknown", s.note, s.culprits)):
        some = list(run)
        out += [_summary(some, _from_to(some))] if unknown and len(some) > 1 else some
    several = sum(s.note == SOMEWHERE for s in out) > 1
    return [replace(s, note=HERE_OR_THERE) if several and s.note == SOMEWHERE else s for s in out]


def _from_to(some: Sequence[Stage]) -> str:
    """From the first to the last: of the modules among them, if there are several."""
    modules = [s.name for s in some if s.path]
    names = modules if len(set(modules)) > 1 else [s.name for s in some]
    return f"{names[0]} … {names[-1]}" if names[0] != names[-1] else names[0]


# --- the loss -------------------------------------------------------------------------------------


def _loss(structure: Structure, name: str) -> Iterator[Stage]:
    apart, summed, split = structure.simd_loss, structure.reduction, structure.canonical_split
    enters = {"holds": "", "fails": "parameters enter beside the predictions"}
    note = enters.get(split.status, "whether parameters enter is not established")
    kinds = {"holds": "separate", "fails": "mixed", "unknown": "unknown"}
    blamed = _distinct((*apart.culprits, *split.culprits))
    name = name.replace("<lambda>", "loss")
    called = (
        "loss function" if name == "loss" and not apart else name
    )  # its value is what is called loss there
    yield Stage("losses", called, kinds[apart.status], note=note, culprits=blamed)
    yield _reduction(summed, apart)


def _reduction(summed: Verdict, apart: Verdict) -> Stage:
    if not apart:  # the stage above is already no loss of single samples
        return Stage("loss", "loss", "whole")
    if summed:
        depends = " and ".join(sorted(summed.weights_depend_on))
        return Stage(
            "loss", "reduction", "sum", note=f"weights depend on {depends}" if depends else ""
        )
    note = (
        "no sum over samples"
        if summed.status == "fails"
        else "whether it is a sum is not established"
    )
    kind = "whole" if summed.status == "fails" else "unknown"
    return Stage("loss", "reduction", kind, note=note, culprits=_distinct(summed.culprits))


def _distinct(culprits: Iterable[Culprit]) -> tuple[Culprit, ...]:
    return tuple(dict.fromkeys(culprits))
