"""What ownership claims about numbers, and whether numbers agree.

The claim is one, however it comes about. An element with the key ``k`` is a function of its
context: of the sample that owns it, and of the samples whose statistics it uses, in no order. So
two elements with equal keys and equal contexts have equal numbers, at whatever place, in whichever
batch. Batches are drawn from candidates for samples, which are known by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases.ops.warned import quietly
from unbatch import errors
from unbatch.analysis.domain.ownership import (
    MIXED,
    SHARED,
    Ownership,
    code,
    group_number,
    is_group,
    mix,
    shared,
    spell_out,
)
from unbatch.analysis.initial import initial_ownership
from unbatch.analysis.interpreter import Interpretation, interpret
from unbatch.analysis.number_facts import alike
from unbatch.capture.graph import Graph
from unbatch.capture.program import Program, moved, record
from unbatch.capture.trees import tensors_in

RIGHT, MIXING, IMPRECISE, UNKNOWN, REFUSED = "right", "mixed", "imprecise", "unknown", "refused"
WRONG, RAISED, INVALID = "wrong", "raised", "invalid"

# Ops that draw more numbers for some values than for others: noise cannot be held fixed.
DRAWS_BY_VALUE = ("poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "rrelu_with_noise")

# Ops whose results are determined up to signs (of vectors), which rounding may turn.
UP_TO_SIGN = ("linalg_eig", "_linalg_eigh", "_linalg_svd", "linalg_qr", "geqrf", "linalg_lstsq")


@dataclass(frozen=True)
class Trial:
    """A program on some tensors, of which some depend on samples.

    ``draws``: the tensors, several times, with other numbers. ``dims``: the axis of each along
    which samples lie, or None. ``samples``: how many there are.
    """

    what: str
    function: Callable[..., Any]
    draws: Sequence[Sequence[Tensor]]
    dims: Sequence[int | None]
    samples: int

    def tensors(self, batch: Sequence[int]) -> list[Tensor]:
        """Return the arguments for a batch of candidates; number n of draw k is ``k N + n``."""
        tensors = []
        for i, dim in enumerate(self.dims):
            first = self.draws[0][i]
            if dim is None:
                tensors.append(first.clone())
                continue
            slices = []
            for candidate in batch:
                draw, n = divmod(candidate, self.samples)
                slices.append(self.draws[draw][i].select(dim, n))
            tensors.append(torch.stack(slices, dim))
        return tensors

    def batches(self) -> list[list[int]]:
        """Return the batch itself, orders of it, and batches in which samples are replaced."""
        n, base = self.samples, list(range(self.samples))
        batches = [base, base[::-1], base[1:] + base[:1]]
        for place in (0, n - 1):
            one = list(base)
            one[place] = n + place
            batches.append(one)
        others = [n + m for m in base]
        others[n // 2] = n // 2
        batches.append(others)
        return [list(batch) for batch in dict.fromkeys(map(tuple, batches))]


@dataclass
class Outcome:
    """What came of a trial: a status, why, and the ops that were seen."""

    status: str
    why: str = ""
    ops: frozenset[str] = frozenset()
    raised: str = ""


@dataclass
class Recorded:
    """A recording that several trials share, and what the program returned there."""

    program: Program
    graph: Graph
    outputs: list[Tensor]

    @property
    def ops(self) -> frozenset[str]:
        return frozenset(step.name for step in self.graph.steps)

    @property
    def noisy(self) -> bool:
        return any(step.noise for step in self.graph.steps)


def recorded(function: Callable[..., Any], tensors: Sequence[Tensor]) -> Recorded:
    """Record a program; raises what the program raises."""
    # With a loss, as a single number would be taken for one.
    program = Program(function, lambda output: torch.zeros(()), {})
    with quietly():
        seed(0)
        graph, (output, _) = record(program, tuple(tensors), None)
    return Recorded(program, graph, tensors_in(output))


def seed(number: int) -> None:
    """Set the random state; PyTorch's own function takes milliseconds."""
    torch.default_generator.manual_seed(number)


# --- marks ----------------------------------------------------------------------------------------


def start_of(graph: Graph, dims: Sequence[int | None]) -> dict[int, Ownership]:
    """Return what an interpretation starts from: what no sample owns is a constant."""
    marks = initial_ownership(graph, dims)
    for ref, dim in zip(graph.inputs, dims, strict=True):
        if ref is not None and dim is None:
            value = graph.values[ref.index]
            name = ("constants", ref.index)
            marks[ref.index] = shared(value.shape, name, (), alike(value.concrete))
    return marks


@contextmanager
def lenient() -> Iterator[None]:
    """Let a rule that raises count as none, as it does for users."""
    before, errors.STRICT = errors.STRICT, False
    try:
        yield
    finally:
        errors.STRICT = before


def interpreted(run: Recorded, trial: Trial) -> Interpretation:
    """Return the interpretation of a recording in which samples lie along the axes of a trial."""
    graph = run.graph
    with lenient():
        return interpret(graph, trial.samples, start_of(graph, trial.dims), graph.forward_steps)


@dataclass
class Claim:
    """Owners and keys of all elements of one output, in order, and the statistics they use."""

    owner: np.ndarray
    key: np.ndarray
    whole: bool  # a statistic of the whole batch
    groups: tuple[np.ndarray, ...]  # members of the sets whose statistics are used
    sets: np.ndarray

    @staticmethod
    def of(marks: Ownership, interpretation: Interpretation) -> Claim:
        full = spell_out(marks)
        owner, key = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint64)
        if 0 not in marks.shape:
            owner = np.broadcast_to(full.owner, marks.shape).reshape(-1)
            key = np.broadcast_to(full.key, marks.shape).reshape(-1)
        record, sets = interpretation.algebra.record, interpretation.algebra.sets
        whole = False
        groups = []
        for number in sorted(marks.statistics):
            definition = record.definitions[number]
            # It may have entries over sets and over the whole batch, and does not say so.
            parts = [sets.members(group) for group in sorted(definition.groups)]
            whole = whole or not (np.sum(parts, axis=0) == 1).all()
            for members in parts:
                if not any((members == known).all() for known in groups):
                    groups.append(members)
        return Claim(owner, key, whole, tuple(groups), sets.membership)

    def context(self, owner: int, batch: Sequence[int]) -> tuple[Any, ...]:
        """Return what an element with this owner may depend on, in a batch of candidates."""
        candidates = np.asarray(batch)
        everything: tuple[Any, ...] = ()
        if self.whole or (owner == SHARED and self.groups):
            everything = tuple(sorted(batch))
        if owner == SHARED:
            return (everything,)
        if is_group(owner):
            members = self.sets[int(group_number(owner))]
            return everything, "group", tuple(sorted(candidates[members]))
        used = []
        for members in self.groups:
            if members[owner]:
                used.append(tuple(sorted(candidates[members].tolist())))
        return everything, batch[owner], tuple(used)

    def overlaps(self, owner: int) -> bool:
        """Tell whether a sample uses statistics of several sets: a key does not say of which."""
        return owner >= 0 and sum(bool(members[owner]) for members in self.groups) > 1


# --- numbers --------------------------------------------------------------------------------------


@dataclass
class Numbers:
    """The outputs of a program for one batch, each as a flat array."""

    batch: list[int]
    outputs: list[np.ndarray]
    shapes: list[tuple[int, ...]]


def numbers_of(trial: Trial, batch: list[int], noisy: bool, signed: bool) -> Numbers | None:
    """Run the program on a batch; None where it does not accept that one."""
    if noisy:
        seed(0)
    try:
        with quietly(), torch.enable_grad():
            tensors = tensors_in(trial.function(*trial.tensors(batch)))
    except Exception:
        return None
    if any(t.layout != torch.strided or t.is_quantized for t in tensors):
        return None
    outputs = []
    shapes = []
    for t in tensors:
        numbers = flat_numbers(t)
        outputs.append(numbers if signed else np.abs(numbers).astype(np.complex128))
        shapes.append(tuple(t.shape))
    return Numbers(batch, outputs, shapes)


def flat_numbers(t: Tensor) -> np.ndarray:
    """Return the numbers of a tensor in double precision."""
    t = t.detach().resolve_conj().resolve_neg()
    if t._is_zerotensor():
        t = torch.zeros(t.shape, dtype=t.dtype)
    dtype = torch.complex128 if t.is_complex() else torch.float64
    return t.to(dtype).reshape(-1).numpy().astype(np.complex128)


def tolerance(t: Tensor) -> float:
    """Return the scale against which differences of an output count."""
    values = np.abs(flat_numbers(t))
    finite = values[np.isfinite(values)]
    size = float(finite.max(initial=1.0))
    # Single precision and below has fewer digits, and reductions in it add up in another order.
    if t.is_floating_point() or t.is_complex():
        size *= max(1.0, torch.finfo(t.dtype).eps / 1e-12)
    return min(size, 1e12)


# --- claims against numbers -----------------------------------------------------------------------


@dataclass
class Entries:
    """Numbers of many elements: the function (key and context) of each, and where it was seen."""

    functions: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    places: list[tuple[Any, ...]] = field(default_factory=list)
    scales: list[np.ndarray] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)

    def conflict(self) -> str:
        """Return two places where one function has different numbers, in words; "" if none."""
        if self.shapes:
            return self.shapes[0]
        if not self.functions:
            return ""
        functions, values = np.concatenate(self.functions), np.concatenate(self.values)
        _, first, inverse = np.unique(functions, return_index=True, return_inverse=True)
        before = values[first[inverse]]
        apart = ~agree(before, values, np.concatenate(self.scales))
        if not apart.any():
            return ""
        second = int(np.flatnonzero(apart)[0])
        return self._in_words(int(first[inverse[second]]), second, values)

    def _in_words(self, first: int, second: int, values: np.ndarray) -> str:
        left, right = self._place(first), self._place(second)
        kind = "owner or statistic" if left[1:] == right[1:] else "key"
        shown = []
        for number, place in ((first, left), (second, right)):
            shown.append(f"{values[number]:.6g} in batch {place[0]} at {place[1:]}")
        return f"{kind}: {' but '.join(shown)}"

    def _place(self, entry: int) -> tuple[Any, ...]:
        for functions, place in zip(self.functions, self.places, strict=True):
            if entry < len(functions):
                return (*place, entry)
            entry -= len(functions)
        raise IndexError(entry)


def agree(a: np.ndarray, b: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Tell where numbers are equal but for rounding, or equally none."""
    with np.errstate(all="ignore"):
        close = np.abs(a - b) <= 1e-6 * np.minimum(np.abs(a), np.abs(b)) + 1e-9 * scale
    none = ~np.isfinite(a) & ~np.isfinite(b)
    infinite = np.isinf(a.real) & np.isinf(b.real) & (np.sign(a.real) != np.sign(b.real))
    return np.where(none, ~infinite, close)


def enter(
    entries: Entries,
    claims: Sequence[Claim],
    runs: Sequence[Numbers],
    scales: Sequence[float],
    by_place: bool = False,
    title: str = "",
) -> Entries:
    """Enter all outputs of all batches. ``by_place``: noise, which is another at each place."""
    for run in runs:
        for leaf, (claim, values) in enumerate(zip(claims, run.outputs, strict=True)):
            known = claim.owner != MIXED
            if len(values) != len(claim.owner):
                if known.any():
                    entries.shapes.append(f"shape: output {leaf} has another size in {run.batch}")
                continue
            context = np.zeros(len(values), dtype=np.uint64)
            for owner in np.unique(claim.owner[known]).tolist():
                context[claim.owner == owner] = code(claim.context(owner, run.batch))
            functions = mix(claim.key, context)
            at_place = mix(mix(functions, np.arange(len(values), dtype=np.uint64)), code(leaf))
            apart = np.full(len(values), by_place)
            for owner in np.unique(claim.owner[known]).tolist():
                apart[claim.owner == owner] |= claim.overlaps(owner)
            functions = np.where(apart, at_place, functions)
            entries.functions.append(functions[known])
            entries.values.append(values[known])
            entries.scales.append(np.full(int(known.sum()), scales[leaf]))
            entries.places.append((tuple(run.batch), leaf, title))
    return entries


def with_same_facts(run: Recorded, found: Interpretation, trial: Trial, batch: list[int]) -> bool:
    """Tell whether what the interpretation saw in numbers holds in another batch, too."""
    tensors = tuple(trial.tensors(batch))
    with quietly():
        graph = moved(run.graph, run.program, tensors, None, run.graph.rng)
        return all(fact.holds(graph) for fact in found.facts)


def mixes(claims: Sequence[Claim], runs: Sequence[Numbers], samples: int) -> bool:
    """Tell whether some element that counts as mixed is moved by more than one sample."""
    base = runs[0]
    moved_by: list[set[int]] = []
    for leaf, claim in enumerate(claims):
        at = claim.owner == MIXED
        counts = np.zeros(int(at.sum()), dtype=int)
        for run in runs[1:]:
            changed = [n for n in range(samples) if run.batch[n] != n]
            if len(run.outputs[leaf]) != len(at):
                return True
            differ = ~np.isclose(run.outputs[leaf][at], base.outputs[leaf][at], equal_nan=True)
            if len(changed) == 1:
                counts += differ
        moved_by.append(set(counts.tolist()))
    return any(max(counts, default=0) > 1 for counts in moved_by)


def judge(trial: Trial, run: Recorded | None = None) -> Outcome:
    """Run a trial, and say what came of it."""
    if run is None:
        attempt = recording_of(trial)
        if isinstance(attempt, Outcome):
            return attempt
        run = attempt
    if run.ops & set(DRAWS_BY_VALUE):
        return Outcome(INVALID, "how many numbers are drawn depends on values", run.ops)
    found = interpreted(run, trial)
    raised = "; ".join(text for text in found.unknown.values() if "(its rule" in text)
    if misshapen(run, found):
        return Outcome(RAISED, misshapen(run, found), run.ops)
    for read, marks in found.host_reads.items():
        if marks.depends_on_batch:
            return Outcome(UNKNOWN, f"host read: {read.how}", run.ops, raised)
    runs = runs_of(trial, run)
    if len(runs) < 3:  # a mask that nothing passes, a matrix with no inverse, a sparse result
        return Outcome(INVALID, "other samples are not accepted", run.ops, raised)
    wrong = conflict_of(trial, run, found, runs)
    if wrong:
        return Outcome(WRONG, wrong, run.ops, raised)
    return _settled(trial, run, found, runs, raised)


def recording_of(trial: Trial) -> Recorded | Outcome:
    """Return the recording of a trial, or what came of it instead."""
    try:
        return recorded(trial.function, trial.tensors(range(trial.samples)))
    except errors.UnbatchError as error:
        return Outcome(REFUSED, str(error))
    except Exception as error:
        return Outcome(INVALID, f"{type(error).__name__}: {error}")


def runs_of(trial: Trial, run: Recorded) -> list[Numbers]:
    """Return the numbers of all batches that the program accepts; none if not the first one."""
    batches = trial.batches()
    signed = not run.ops & set(UP_TO_SIGN)
    if run.noisy:
        # In another order the samples get the noise of others.
        base = batches[0]
        batches = [b for b in batches if b == base or sorted(b) != base]
    runs = [numbers_of(trial, batch, run.noisy, signed) for batch in batches]
    if runs[0] is None:
        return []
    return [numbers for numbers in runs if numbers is not None]


def misshapen(run: Recorded, found: Interpretation) -> str:
    """Return in words which output has owners that do not fit its shape; "" if all do."""
    for ref in run.graph.predictions:
        marks = found[ref]
        for size, stored in zip(marks.shape, marks.key.shape, strict=True):
            if stored not in (1, size):
                return f"owners of shape {marks.key.shape} for a value of shape {marks.shape}"
    return ""


def claims_of(run: Recorded, found: Interpretation) -> list[Claim]:
    return [Claim.of(found[ref], found) for ref in run.graph.predictions]


def conflict_of(trial: Trial, run: Recorded, found: Interpretation, runs: Sequence[Numbers]) -> str:
    """Return in words how numbers contradict the claims; "" if they do not."""
    claims, scales = claims_of(run, found), [tolerance(t) for t in run.outputs]
    wrong = enter(Entries(), claims, runs, scales, run.noisy).conflict()
    if wrong:
        # The claims are about batches in which the integers say what they said in the recording.
        same = [r for r in runs if with_same_facts(run, found, trial, r.batch)]
        wrong = enter(Entries(), claims, same, scales, run.noisy).conflict()
    return wrong


def _settled(
    trial: Trial, run: Recorded, found: Interpretation, runs: Sequence[Numbers], raised: str
) -> Outcome:
    if raised:
        return Outcome(RAISED, raised, run.ops, raised)
    if found.unknown:
        return Outcome(UNKNOWN, "; ".join(found.unknown.values()), run.ops)
    claims = claims_of(run, found)
    if any((claim.owner == MIXED).any() for claim in claims):
        # An argument that counts as mixed is none, and stands for one.
        on_purpose = "@mixed" in trial.what or mixes(claims, runs, trial.samples)
        status = MIXING if on_purpose else IMPRECISE
        return Outcome(status, "", run.ops)
    return Outcome(RIGHT, "", run.ops)
