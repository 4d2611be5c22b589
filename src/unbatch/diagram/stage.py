"""A stage between inputs and loss, as a picture shows it: frozen data.

Each stage says whether samples are separate in it, interact through a few numbers, change places,
or mix (``mixing.py`` finds where); a stage about which that is not established says so. How many
stages there are is decided in ``stages.py``, how they look in ``diagram.py`` (text) and
``figure.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from unbatch.analysis.structure import Structure
from unbatch.analysis.verdict import Culprit, Verdict
from unbatch.diagram.mixing import APART

NAMED = 3  # places that are named before the others are counted


# Culprits that are no ops, in words: their names are those of the package, not of torch.
WORDS = {
    "escape": "read by Python",
    "replay": "replayed on another batch",
}


@dataclass(frozen=True)
class Stage:
    """One row of the picture.

    ``role``: "inputs", "module", "predictions", "losses" or "loss". ``kind``: a key of
    ``mixing.KINDS``; of the loss itself "sum" (a weighted sum of the losses above it), "whole"
    (some other function) or "unknown". ``numbers``: how many statistics samples interact through,
    in all of the ``repeats`` blocks that the stage stands for, or in all of its ``runs``;
    ``group``: over how many samples each, where that is not the whole batch. ``path``: of the
    module that it is (of the last of the blocks), "" where it is none.
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
        """Whether every sample has a column of its own here."""
        return self.kind in APART

    @property
    def summary(self) -> str:
        """What there is to say about the stage beside its name."""
        phrases = []
        # Repetitions first: what follows is about all of them.
        if self.repeats > 1:
            phrases.append(f"{self.repeats} blocks")
        if self.runs > 1:
            phrases.append(f"run {self.runs} times")
        phrases += [self._kind_in_words(), self.note]
        return ", ".join(filter(None, phrases))

    def _kind_in_words(self) -> str:
        """Return what the samples do to each other, and nothing where they are separate."""
        if self.role == "loss":
            # The picture of it says whether it is a sum.
            return ""
        if self.kind == "statistics":
            words = f"samples share {self.numbers} numbers"
            if self.numbers == 1:
                words = "samples share 1 number"
            if self.group:
                words += f", in each group of {self.group} samples"
            return words
        if self.kind == "unknown" and self.role == "module" and self.note:
            return ""  # the note says what is not established
        words_of_kind = {
            "uneven": "depends on the place in the batch",
            "moved": "samples change places",
            "mixed": "samples mix",
            "unknown": "not established",
        }
        return words_of_kind.get(self.kind, "")

    @property
    def places(self) -> str:
        """Where the user's program does it: op, file and line; the modules, if in several."""
        # A dict for a set in order: blocks that look alike have the same places, once each.
        places: dict[tuple[str, str, str], None] = {}
        for culprit in self.culprits:
            op = WORDS.get(culprit.op, culprit.op)
            places[self._inside(culprit.module), op, culprit.short] = None
        if not places:
            return ""
        modules, ops, lines = map(distinct_names, zip(*places, strict=True))
        if len(modules) < 2:
            # One op is named with its line, and others are counted: a remark is one short line.
            text = ", ".join([*ops[:1], *lines[:1]])
            if len(places) > 1:
                text += f", and {len(places) - 1} more"
            return text
        text = f"{_listed(ops)} in {_listed(modules)}"
        if len(lines) == 1:
            text += f", {lines[0]}"
        return text

    def _inside(self, module: str) -> str:
        """Return the name of a module inside of the stage, which is the same in all blocks.

        A number alone would be no name: there the path of the stage stands in front.
        """
        if not self.path:
            return module
        depth = self.path.count(".") + 1
        name = ".".join(module.split(".")[depth:])
        if not name[:1].isdigit():
            return name
        if self.repeats > 1:
            # The path would be that of one block of several; the dot shows that something is above.
            return f".{name}"
        return f"{self.path}.{name}"

    @property
    def remark(self) -> str:
        """What there is to say, and where it is done, in one line."""
        return " · ".join(filter(None, (self.summary, self.places)))


def distinct_names(names: Iterable[str]) -> list[str]:
    """Return the names that are not empty, each once, in their order."""
    return list(dict.fromkeys(filter(None, names)))


def _listed(names: Sequence[str]) -> str:
    """Return the first few names with commas, and how many more there are."""
    text = ", ".join(names[:NAMED])
    if len(names) > NAMED:
        text += f" and {len(names) - NAMED} more"
    return text


def shown(samples: int) -> list[str]:
    """Return the labels of the samples that get a column.

    A few from both ends do, with an ellipsis for all others.
    """
    # Up to five are no wider than these, so nothing is gained by leaving one out.
    if samples > 5:
        return ["1", "2", "⋯", "N−1", "N"]
    return [str(n) for n in range(1, samples + 1)]


# --- the loss -------------------------------------------------------------------------------------


def loss_stages(structure: Structure, name: str) -> tuple[Stage, Stage]:
    """Return the stage of the losses and that of the loss; ``name``: what the loss is called."""
    simd, split = structure.simd_loss, structure.canonical_split
    notes = {"holds": "", "fails": "parameters enter beside the predictions"}
    kinds = {"holds": "separate", "fails": "mixed", "unknown": "unknown"}
    kind = kinds[simd.status]
    # A sum with one term for each sample keeps them apart, whatever these terms are.
    if structure.reduction and not simd:
        kind = "uneven"
    # What Python calls an anonymous function says nothing to a reader.
    name = name.replace("<lambda>", "loss")
    if name == "loss" and not simd:
        # Its value is what is called loss below.
        name = "loss function"
    # The canonical split is noted here, because it is in the loss that parameters would enter.
    losses = Stage(
        "losses",
        name,
        kind,
        note=notes.get(split.status, "whether parameters enter is not established"),
        culprits=distinct_culprits((*simd.culprits, *split.culprits)),
    )
    return losses, _reduction(structure.reduction, simd)


def _reduction(reduction: Verdict, simd: Verdict) -> Stage:
    """Return the stage at which the losses of the samples become one number.

    It says no more than the two verdicts: a sum only where the terms are those of single samples.
    """
    if not simd and not reduction:
        # The stage above has no losses of single samples that this one could sum.
        return Stage("loss", "loss", "whole")
    if reduction:
        # Weights of samples by their targets, as with class weights, keep it a sum.
        note = ""
        if reduction.weights_depend_on:
            note = f"weights depend on {' and '.join(sorted(reduction.weights_depend_on))}"
        return Stage("loss", "reduction", "sum", note=note)
    culprits = distinct_culprits(reduction.culprits)
    if reduction.status == "fails":
        return Stage("loss", "reduction", "whole", note="no sum over samples", culprits=culprits)
    note = "whether it is a sum is not established"
    return Stage("loss", "reduction", "unknown", note=note, culprits=culprits)


def distinct_culprits(culprits: Iterable[Culprit]) -> tuple[Culprit, ...]:
    """Return each culprit once, in their order."""
    return tuple(dict.fromkeys(culprits))
