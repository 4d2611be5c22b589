"""The stages from inputs to loss: the ops of a recording, as few enough rows for one page.

Deep models are shown by their blocks, and blocks that look alike are shown once. Several groupings
are tried, from the most detailed on; the first that fits is the picture.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from unbatch.analysis.inference import AnalysisState
from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Culprit
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.diagram.mixing import GRAVITY, HERE_OR_THERE, SOMEWHERE, PathOp, path_ops
from unbatch.diagram.stage import (
    Stage,
    distinct_culprits,
    distinct_names,
    loss_stages,
)

MOST = 14  # stages between inputs and predictions that fit on a page


# Modules that compute nothing themselves: what they hold says more than their own name.
CONTAINERS = {"Sequential", "ModuleList", "ModuleDict"}


def stages(
    graph: Graph,
    findings: AnalysisState,
    structure: Structure,
    classes: Mapping[str, str],
    loss: str,
    most: int = MOST,
) -> tuple[Stage, ...]:
    """Return the stages from inputs to loss, with at most ``most`` between inputs and predictions.

    ``classes``: module path -> name of its class. ``loss``: what the loss is called. Where even the
    coarsest grouping has more stages than ``most``, all of them are returned.
    """
    shapes = ", ".join(str(list(shape)) for shape in structure.predictions)
    few = _few(path_ops(graph, findings, structure, classes), classes, most)
    return (
        Stage("inputs", "inputs", "separate"),
        *_doubts_joined(few),
        Stage("predictions", "predictions", "separate", note=shapes),
        *loss_stages(structure, loss),
    )


def _few(path: Sequence[PathOp], classes: Mapping[str, str], most: int) -> list[Stage]:
    """Return the most detailed grouping that fits on a page, or the coarsest where none does."""
    # What the coarsest grouping has too many of is shown all the same: a long picture is no error.
    grouping: list[Stage] = []
    for grouping in _groupings(path, classes):
        if len(grouping) <= most:
            break
    return grouping


def _groupings(path: Sequence[PathOp], classes: Mapping[str, str]) -> Iterator[list[Stage]]:
    """Yield groupings of the ops, each coarser than the one before.

    First less and less deep into the modules. Where that is not enough, separate stages in a row
    become one; after that, one band reaches from the first place where samples interact to the
    last.
    """
    leaves = {".".join(leaf) for leaf in _leaves(classes)}
    deepest = 1
    for op in path:
        deepest = max(deepest, len(op.path))
    cuts = []
    for depth in range(deepest, 0, -1):
        # Opened first, because to show what a container holds is more detailed.
        for opened in (True, False):
            blocks = _like_blocks_joined(_cut(path, classes, depth, opened), leaves)
            cuts.append(_reruns_joined(blocks))
    # All of a kind before the first of the next: a cut less deep keeps more of what is there than
    # one in which stages of different modules are thrown together.
    yield from cuts
    yield from map(_separate_joined, cuts)
    bands = list(map(_one_band, cuts))
    yield from bands
    yield from map(_separate_joined, bands)


# --- ops as stages --------------------------------------------------------------------------------


def _cut(
    path: Sequence[PathOp], classes: Mapping[str, str], depth: int, opened: bool
) -> list[Stage]:
    """Return one stage for each run of a module at ``depth``, and for like ops between modules.

    Ops between modules that only move things have no stage. ``opened``: what only holds other
    modules is shown by these.
    """
    leaves = _leaves(classes)

    def place(op: PathOp) -> tuple[tuple[str, ...], str]:
        to = depth
        if opened:
            to = _below_containers(op.path, classes, depth)
        if op.path not in leaves and len(op.path) < to:
            # Between modules: only like ops are one stage.
            return op.path[:to], op.kind
        return op.path[:to], ""

    runs = [(key, list(run)) for key, run in groupby(path, place)]
    # ``groupby`` joins neighbours only, so a module that is called twice has two runs.
    computing = []
    for key, run in runs:
        if key[1] != "separate" or not all(map(_only_moves, run)):
            computing.append((key, run))
    # What was set apart by ops that have no stage is one run again.
    stages_ = []
    for (module, _), same in groupby(computing or runs, lambda key_and_run: key_and_run[0]):
        members: list[PathOp] = []
        for _, run in same:
            members += run
        stages_.append(_stage(module, members, classes, leaves))
    return stages_


def _below_containers(path: tuple[str, ...], classes: Mapping[str, str], depth: int) -> int:
    """Return the depth of the first module of a path, from ``depth`` on, that is no container."""
    while depth < len(path) and classes.get(".".join(path[:depth])) in CONTAINERS:
        depth += 1
    return depth


def _leaves(classes: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Return the paths of modules without modules in them; ``classes``: path -> class."""
    paths: set[tuple[str, ...]] = set()
    parents: set[tuple[str, ...]] = set()
    for name in classes:
        # The root has the name "", and is no leaf even where it holds no modules.
        if name:
            path = tuple(name.split("."))
            paths.add(path)
            parents.add(path[:-1])
    return paths - parents


def _only_moves(op: PathOp) -> bool:
    """Tell whether an op moves entries without computing anything, as a reshape does."""
    return ops.by_name(op.op).moves is not None


def _stage(
    path: tuple[str, ...],
    run: Sequence[PathOp],
    classes: Mapping[str, str],
    leaves: Container[tuple[str, ...]],
) -> Stage:
    """Return a run of ops as a stage: as the module that they are in, or else as the ops.

    ``path``: of the module that the run was cut at; ``leaves``: modules without modules in them.
    """
    module = ".".join(path)
    # Ops that a module does itself, between those of its own modules, are not the whole module.
    if not module or not (path in leaves or _enters_below(path, run)):
        return _summary(run, _op_names(run))
    return _summary(run, f"{module} {classes[module]}", module)


def _enters_below(path: tuple[str, ...], run: Sequence[PathOp]) -> bool:
    """Tell whether an op of the run is in a module below that path."""
    return any(op.path != path and op.path[: len(path)] == path for op in run)


def _summary(some: Sequence[PathOp] | Sequence[Stage], name: str, path: str = "") -> Stage:
    """Return ops or stages as one stage.

    Samples that interact, with something unknown beside that, are samples that mix: no number
    bounds what passes between them.
    """
    kinds: set[str] = set()
    notes: list[str] = []
    culprits: list[Culprit] = []
    numbers, group = 0, 0
    for stage in some:
        kinds.add(stage.kind)
        notes.append(stage.note)
        culprits += stage.culprits
        # Numbers add up; of groups, the largest bounds how far a number reaches.
        numbers += stage.numbers
        group = max(group, stage.group)
    kind = max(kinds, key=GRAVITY.index)
    if "unknown" in kinds and kinds & {"statistics", "moved"}:
        kind = "mixed"
    return Stage(
        "module",
        name,
        kind,
        numbers,
        group,
        note=", ".join(distinct_names(notes)),
        culprits=distinct_culprits(culprits),
        path=path,
    )


def _op_names(run: Sequence[PathOp]) -> str:
    """Return what is done, in the names of the ops.

    What only moves things is left out where more is done.
    """
    computing = [op for op in run if not _only_moves(op)] or run
    # In place or not, internal or not: ``add_`` and ``_softmax`` are called add and softmax.
    names = distinct_names(op.op.strip("_") for op in computing)
    # Three names fit beside the picture.
    text = ", ".join(names[:3])
    if len(names) > 3:
        text += ", …"
    return text


# --- stages that look alike -----------------------------------------------------------------------


def _like_blocks_joined(stages_: Sequence[Stage], leaves: Container[str]) -> list[Stage]:
    """Return blocks of a numbered series that follow on each other and look alike as one.

    ``leaves``: paths of modules without modules in them, which are no blocks.
    """
    joined: list[Stage] = []
    for stage in stages_:
        if joined and stage.path not in leaves and _follows(joined[-1], stage):
            joined[-1] = _one_more_block(joined[-1], stage)
        else:
            joined.append(stage)
    return joined


def _one_more_block(blocks: Stage, block: Stage) -> Stage:
    """Return a stage of some blocks with the next one; its name has the first and the last."""
    first = blocks.name.partition(" ")[0].partition("–")[0]
    _, number = _numbered(block.path)
    _, _, class_ = block.name.partition(" ")
    both = _summary([blocks, block], f"{first}–{number} {class_}", block.path)
    return replace(both, repeats=blocks.repeats + 1)


def _numbered(path: str) -> tuple[str, str]:
    """Return ``layer1.unit0`` as ``layer1.unit`` and ``0``."""
    series = re.sub(r"\d+$", "", path)
    return series, path[len(series) :]


def _follows(last: Stage, stage: Stage) -> bool:
    """Tell whether a stage is the next block of the series that ``last`` is, and looks like it."""
    series, number = _numbered(last.path)
    next_series, next_number = _numbered(stage.path)
    if not number or not next_number or int(next_number) != int(number) + 1:
        return False
    # Equal looks are necessary: a block that mixes must not vanish among those that do not.
    last_class, class_ = last.name.partition(" ")[2], stage.name.partition(" ")[2]
    if (series, last_class) != (next_series, class_):
        return False
    # ``last`` may stand for several blocks already, and its numbers are those of all of them.
    looks = (last.kind, last.group, last.note, last.numbers / last.repeats)
    return looks == (stage.kind, stage.group, stage.note, stage.numbers)


def _reruns_joined(stages_: Sequence[Stage]) -> list[Stage]:
    """Return stages that are run again, in a row and in the same order, once.

    As a recurrent net does, whose cell is called at every step.
    """
    joined: list[Stage] = []
    start = 0
    while start < len(stages_):
        size, times = _cycle(stages_[start:])
        for stage in stages_[start : start + size]:
            numbers = stage.numbers * times
            joined.append(replace(stage, runs=times, numbers=numbers))
        start += size * times
    return joined


def _cycle(stages_: Sequence[Stage]) -> tuple[int, int]:
    """Return how many stages, from the first on, are repeated how often; 1 and 1 where none are."""
    # The shortest first: what is repeated four times is not two things repeated twice.
    for size in range(1, min(len(stages_) // 2, MOST) + 1):
        times = 1
        while stages_[times * size : (times + 1) * size] == stages_[:size]:
            times += 1
        if times > 1:
            return size, times
    return 1, 1


# --- stages in a row ------------------------------------------------------------------------------


def _separate_joined(stages_: Sequence[Stage]) -> list[Stage]:
    """Return the stages with separate ones in a row as one."""
    joined: list[Stage] = []
    for kind, group in groupby(stages_, lambda stage: stage.kind):
        run = list(group)
        if kind == "separate":
            run = _as_one(run)
        joined += run
    return joined


def _as_one(run: Sequence[Stage]) -> list[Stage]:
    """Return stages in a row as one, which is named by the first and the last of them."""
    if len(run) == 1:
        return list(run)
    return [_summary(run, _from_to(run))]


def _one_band(stages_: Sequence[Stage]) -> list[Stage]:
    """Return the stages from the first to the last in which samples are not separate as one."""
    places = [i for i, stage in enumerate(stages_) if not stage.apart]
    if not places:
        return list(stages_)
    first, end = places[0], places[-1] + 1
    return [*stages_[:first], *_as_one(stages_[first:end]), *stages_[end:]]


def _doubts_joined(stages_: Sequence[Stage]) -> list[Stage]:
    """Return the stages with those in a row that are in doubt for the same reason as one.

    Where samples mix in one of several such places, each says that it may be another.
    """
    joined: list[Stage] = []
    for reason, group in groupby(stages_, _doubt):
        run = list(group)
        if reason[0]:
            run = _as_one(run)
        joined += run
    suspects = [i for i, stage in enumerate(joined) if stage.note == SOMEWHERE]
    if len(suspects) > 1:
        for i in suspects:
            joined[i] = replace(joined[i], note=HERE_OR_THERE)
    return joined


def _doubt(stage: Stage) -> tuple[bool, str, tuple[Culprit, ...]]:
    """Return whether a stage is in doubt, and why."""
    return stage.kind == "unknown", stage.note, stage.culprits


def _from_to(run: Sequence[Stage]) -> str:
    """Return the names of the first and the last stage; of modules, if there are several."""
    names = [stage.name for stage in run if stage.path]
    if len(set(names)) < 2:
        names = [stage.name for stage in run]
    if names[0] == names[-1]:
        return names[0]
    return f"{names[0]} … {names[-1]}"
