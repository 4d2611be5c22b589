"""Numerical witnesses: run the model itself on changed batches and watch the predictions.

A witness can prove that a structure *fails* (sample m moved prediction n), never that it holds. ``settle`` turns open
verdicts into failures where there is one; ``verify`` tests every verdict, also the proved ones, and says what it saw.
Runs start from the random state of the capture, so noise is the same wherever the batch size is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_unflatten

from unbatch.capture import Graph, Program, own_loss, untouched
from unbatch.structure import Findings, contiguous_blocks, used_predictions
from unbatch.verdicts import REMEDY, WHY, Culprit, Structure, Verdict
from unbatch.walk import prediction_dim

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
VARIANTS = ("rolled", "noisy", "large", "tiny", "zero", "huge")
GAIN = {"large": 1e2, "huge": 1e4}


class Untestable(Exception):
    """A test that does not apply."""


@dataclass(frozen=True)
class Witness:
    """Sample ``moved_by`` was changed and prediction ``moved`` changed by ``amount`` (relative to its size)."""

    test: str
    amount: float
    moved: int = -1
    moved_by: int = -1

    def __str__(self) -> str:
        if self.moved < 0:
            return f"{self.test}: off by {self.amount:.2g} relative"
        return f"replacing sample {self.moved_by} moved prediction {self.moved} by {self.amount:.2g} of its size"


@dataclass(frozen=True)
class Check:
    """One verdict put to the test: ``passed`` is None where no test applies, with the reason in ``detail``."""

    name: str
    status: str
    test: str
    passed: bool | None
    detail: str
    witness: Witness | None = None


@dataclass(frozen=True)
class Verification:
    """The checks of all verdicts. True in a boolean context when none of them contradicts its verdict."""

    checks: tuple[Check, ...]

    def __bool__(self) -> bool:
        return all(c.passed is not False for c in self.checks)


@dataclass
class Oracle:
    """The program and its batch, and how to run them on another one."""

    program: Program
    graph: Graph
    inputs: Any
    targets: Any
    dims: Sequence[int | None]
    samples: int
    findings: Findings
    base: list[Tensor] = field(default_factory=list)
    out_dims: list[int | None] = field(default_factory=list)
    blocks: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        used = {r.index for r in used_predictions(self.graph)}
        self.places = [i for i, r in enumerate(self.graph.predictions) if r.index in used]
        marks = [self.findings.forward[self.graph.predictions[i]] for i in self.places]
        self.out_dims = [prediction_dim(m, self.samples, self.findings.leading) for m in marks]
        self.blocks = [d is None and contiguous_blocks(m, self.samples) is not None for m, d in zip(marks, self.out_dims, strict=True)]
        self.base = self.predict(self.inputs)

    # -- running --

    def predict(self, inputs: Any) -> list[Tensor]:
        """The predictions the model makes on other inputs; replayed where they lie inside the model."""
        return [t.detach().clone() for t in self.forward(inputs)]

    def forward(self, inputs: Any) -> list[Tensor]:
        """The predictions, connected to ``inputs`` and to the parameters."""
        return self.replay(inputs) if self.program.loss is None and self.graph.after_cut else self.eager(inputs)

    def eager(self, inputs: Any) -> list[Tensor]:
        """What the model itself returns: its predictions, or its loss where it computes one."""
        with untouched(self.program.modules, self.graph.rng), torch.enable_grad():
            output = self.program.predict(tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs))
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            own = own_loss(output) if self.program.loss is None else None
            if self.program.loss is None and self.graph.after_cut:
                return [own] if own is not None else []
            return [leaves[i] for i in self.places if i < len(leaves)]

    def replay(self, inputs: Any, parameters: Mapping[int, Tensor] | None = None, keep: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        feed = {r.index: x for r, x in zip(self.graph.inputs, tree_leaves(inputs), strict=True) if r is not None}
        return self.graph.run(feed | dict(parameters or {}), [self.graph.predictions[i].index for i in self.places], keep=keep)

    def predict_permuted(self, order: Tensor) -> list[Tensor]:
        """Predictions for the permuted batch, with the noise of every sample permuted along."""
        inputs = self.permuted(order)
        noisy = [s for s in self.graph.forward_steps if s.noise]
        if not noisy:
            return self.predict(inputs)
        owners = noise_owners(self.graph, self.findings.forward)
        if owners is None:
            raise Untestable("noise is used in a way in which it cannot be permuted with its samples")
        keep = {}
        for ref, owner in owners.items():
            value = self.graph.values[ref].concrete
            assert value is not None
            moved = permute_owned(value, owner, order)
            if moved is None:
                raise Untestable("samples use different amounts of noise")
            keep[ref] = moved
        return self.replay(inputs, keep=keep)

    def rows(self, predictions: Sequence[Tensor]) -> Tensor:
        """``[N, entries]`` in float64; leaves without a sample axis are split in blocks or left out."""
        out = []
        for t, dim, blocks in zip(predictions, self.out_dims, self.blocks, strict=True):
            if dim is not None:
                out.append(t.movedim(dim, 0).reshape(self.samples, -1))
            elif blocks:
                out.append(t.reshape(self.samples, -1))
        wide = [o.to(torch.complex128 if o.is_complex() else torch.float64) for o in out]
        return torch.cat(wide, 1) if wide else torch.zeros(self.samples, 0, dtype=torch.float64)

    # -- changed batches --

    def changed(self, keep: Tensor, variant: str, seed: int = 0) -> Any:
        """The batch with every sample outside ``keep`` replaced by something else of the same kind."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.arange(self.samples).roll(1 + seed % max(self.samples - 1, 1))

        def replaced(x: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return x
            rows = x.detach().movedim(dim, 0)
            new = _variant(rows, rows[order.to(x.device)], variant, generator)
            keep_ = keep.to(x.device).reshape(-1, *[1] * (rows.ndim - 1))
            return torch.where(keep_, rows, new).movedim(0, dim).contiguous()

        return self._map(replaced)

    def stretched(self, factor: float) -> Oracle:
        """The same program on inputs multiplied by ``factor``; itself where that cannot be run."""
        inputs = self._map(lambda x, dim: x.detach() * factor if dim is not None and x.is_floating_point() else x)
        try:
            return replace(self, inputs=inputs)
        except Exception:
            return self

    def permuted(self, order: Tensor) -> Any:
        return self._map(lambda x, dim: x.detach() if dim is None else x.detach().index_select(dim, order.to(x.device)))

    def _map(self, function: Callable[[Tensor, int | None], Tensor]) -> Any:
        leaves, spec = torch.utils._pytree.tree_flatten(self.inputs)
        return tree_unflatten([function(x, d) if isinstance(x, Tensor) else x for x, d in zip(leaves, self.dims, strict=True)], spec)

    @property
    def tolerance(self) -> float:
        kinds = [t.dtype for t in self.base if t.is_floating_point()]
        return max((TOLERANCE.get(k, 1e-4) for k in kinds), default=1e-9)


def _variant(rows: Tensor, others: Tensor, variant: str, generator: torch.Generator) -> Tensor:
    if not rows.is_floating_point():
        return others if variant in ("rolled", "noisy") or rows.dtype == torch.bool else torch.where(others == others, others.roll(1, 0), others)
    if variant == "rolled":
        return others
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
    spread = rows.abs().mean() + 1e-3
    return {
        "noisy": others + 0.5 * spread * noise,
        "large": 30 * others + 30 * spread * noise,
        "tiny": 1e-3 * others,
        "zero": torch.zeros_like(others),
        "huge": -1e4 * others + 1e4 * spread * noise,
    }[variant]


# --- independence --------------------------------------------------------------------------------------------------------------------


def partitions(samples: int) -> Iterator[Tensor]:
    """Few sets of samples such that every ordered pair is told apart by one of them."""
    index = torch.arange(samples)
    for bit in range(max(1, math.ceil(math.log2(max(samples, 2))))):
        for side in (0, 1):
            keep = (index >> bit) & 1 == side
            if keep.any() and not keep.all():
                yield keep


def listening(oracle: Oracle) -> Witness | None:
    """A sample whose prediction moves when others are replaced; also on a batch that is far out itself."""
    found = _listening(oracle)
    return found if found is not None else _listening(oracle.stretched(100.0))


def _listening(oracle: Oracle) -> Witness | None:
    for variant in VARIANTS:
        sets = list(partitions(oracle.samples))
        for seed, keep in enumerate(sets if variant in ("rolled", "noisy") else sets[:2]):
            inputs = oracle.changed(keep, variant, seed)
            found = _moved(oracle, inputs, keep, oracle.tolerance * GAIN.get(variant, 1.0))
            if found is not None:
                return _narrow(oracle, variant, seed, keep, *found)
    return None


def _moved(oracle: Oracle, inputs: Any, keep: Tensor, tolerance: float) -> tuple[int, float] | None:
    try:
        new = oracle.rows(oracle.predict(inputs))
    except Exception:
        return None
    base = oracle.rows(oracle.base)
    if new.shape != base.shape:
        return None
    finite = torch.isfinite(torch.view_as_real(new).sum(-1) if new.is_complex() else new)
    change = torch.where(finite, (new - base).abs(), torch.zeros((), dtype=torch.float64))
    scale = base.abs().nan_to_num(0, 0, 0).amax(1) + 1e-6 * base.abs().nan_to_num(0, 0, 0).amax() + 1e-30
    amount = torch.where(keep, change.amax(1) / scale, torch.zeros((), dtype=torch.float64)) if change.shape[1] else torch.zeros(oracle.samples)
    worst = int(amount.argmax())
    return (worst, float(amount[worst])) if amount[worst] > tolerance else None


def _narrow(oracle: Oracle, variant: str, seed: int, keep: Tensor, moved: int, amount: float) -> Witness:
    """Find one sample whose replacement alone moves the prediction."""
    for m in [int(i) for i in torch.nonzero(~keep)][:16]:
        only = torch.arange(oracle.samples) != m
        found = _moved(oracle, oracle.changed(only, variant, seed), torch.arange(oracle.samples) == moved, oracle.tolerance * GAIN.get(variant, 1.0))
        if found is not None:
            return Witness("replacing other samples", found[1], moved, m)
    return Witness("replacing other samples", amount, moved, int(torch.nonzero(~keep)[0]))


# --- uniformity ------------------------------------------------------------------------------------------------------------------------


def uneven(oracle: Oracle) -> Witness | None:
    """Permuting the samples does not just permute the predictions."""
    base = oracle.rows(oracle.base)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(oracle.samples).roll(1), torch.arange(oracle.samples).flip(0), torch.randperm(oracle.samples, generator=generator)]
    for order in orders:
        try:
            new = oracle.rows(oracle.predict_permuted(order))
        except Exception:  # noqa: S112
            continue
        if new.shape != base.shape or not new.shape[1]:
            continue
        scale = base.abs().nan_to_num(0, 0, 0).amax() + 1e-30
        off = ((new - base[order]).abs().nan_to_num(0, 0, 0).amax() / scale).item()
        if off > 10 * oracle.tolerance:
            return Witness("permuting the samples", off)
    return None


def noise_owners(graph: Graph, forward: Any) -> dict[int, Any] | None:
    """For noise that samples consume elementwise, the owner of each element; None where some noise is used otherwise."""
    out = {}
    for step in (s for s in graph.forward_steps if s.noise):
        for ref in {r.index for r in [*step.outs, *(new for _, new in step.writes)] if r is not None}:
            owner = _claimed(graph, forward, ref)
            if isinstance(owner, str) or graph.values[ref].concrete is None:
                return None
            if owner is not None:
                out[ref] = owner
    return out


def _claimed(graph: Graph, forward: Any, ref: int) -> Any:
    """Owners of the elements of a noise value; None if it stays shared, a string if it is used in another shape."""
    carrying = {ref}
    shape = graph.values[ref].shape
    if not graph.values[ref].dtype.is_floating_point:
        return None  # a drawn order or label: the same for the whole batch
    for step in (s for s in graph.forward_steps if s.index > graph.values[ref].step):
        if not carrying & {r.index for r in step.refs()}:
            continue
        for out in [*(r for r in step.outs if r), *(new for _, new in step.writes)]:
            marks = forward.marks[out.index]
            if not marks.depends_on_batch:
                carrying.add(out.index)
            elif marks.mixed or marks.shape != shape or out.index not in {r.index for r in step.outs if r}:
                return _shared_by_samples(marks, shape)
            elif (dim := marks.sample_dim()) is not None:
                return np.broadcast_to(np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))]), shape)
            else:
                return np.broadcast_to(marks.owner, shape)
    return None


def _shared_by_samples(marks: Any, shape: tuple[int, ...]) -> Any:
    """Noise broadcast along the samples is the same for all of them."""
    dim = marks.sample_dim()
    at = None if dim is None else dim - len(marks.shape) + len(shape)
    return None if at is not None and (at < 0 or shape[at] == 1) else "otherwise"


def permute_owned(value: Tensor, owner: Any, order: Tensor) -> Tensor | None:
    """Give sample n the elements of sample ``order[n]``, in the order in which they lie."""
    flat, owners = value.reshape(-1), owner.reshape(-1)
    places = [torch.from_numpy(np.flatnonzero(owners == n)) for n in range(len(order))]
    out = flat.clone()
    for n, m in enumerate(order.tolist()):
        if len(places[n]) != len(places[m]):
            return None
        out[places[n]] = flat[places[m]]
    return out.reshape(value.shape)


# --- the loss ----------------------------------------------------------------------------------------------------------------------------


@dataclass
class LossOracle:
    """The loss as a function of the rows of the predictions, in float64."""

    oracle: Oracle
    output: Any

    def __post_init__(self) -> None:
        self.boundary: dict[int, Tensor] = {}
        if self.oracle.program.loss is None:
            self._open_up()
            return
        leaves, self.spec = torch.utils._pytree.tree_flatten(self.output)
        at = [i for i, t in enumerate(leaves) if isinstance(t, Tensor)]
        self.leaves = leaves
        self.at = [at[i] for i in self.oracle.places]
        self.wide = self._works_in(torch.float64)

    def _open_up(self) -> None:
        """The loss lies inside the model: run its steps alone, from the values they read."""
        graph = self.oracle.graph
        read = {r.index for s in graph.loss_steps for r in s.refs()}
        assert graph.loss is not None
        graph.run({}, [graph.loss.index], visit=lambda i, t: self.boundary.__setitem__(i, t.detach().clone()) if i in read else None)
        self.leaves = [self.boundary[graph.predictions[i].index] for i in self.oracle.places]
        self.at = list(range(len(self.leaves)))
        self.wide = all(t.dtype == torch.float64 for t in self.leaves)

    def _works_in(self, dtype: torch.dtype) -> bool:
        try:
            self.__dict__["wide"] = True
            return bool(torch.isfinite(self.value([self.leaves[i] for i in self.at])))
        except Exception:
            return False

    def _cast(self, t: Any) -> Any:
        return t.detach().to(torch.float64) if isinstance(t, Tensor) and t.is_floating_point() and self.wide else t

    def value(self, predictions: Sequence[Tensor]) -> Tensor:
        graph = self.oracle.graph
        if self.oracle.program.loss is None:
            assert graph.loss is not None
            places = (graph.predictions[i].index for i in self.oracle.places)
            feed = self.boundary | dict(zip(places, predictions, strict=True))
            return graph.run(feed, [graph.loss.index], steps=graph.loss_steps)[0]
        leaves = [self._cast(t) for t in self.leaves]
        for i, p in zip(self.at, predictions, strict=True):
            leaves[i] = p.to(torch.float64) if self.wide and p.is_floating_point() else p
        output = tree_unflatten(leaves, self.spec)
        targets = tree_map(self._cast, self.oracle.targets)
        loss = self.oracle.program.loss
        assert loss is not None
        modules = self.oracle.program.modules
        with untouched(modules, self.oracle.graph.rng), torch.enable_grad():
            return loss(output, targets) if targets is not None else loss(output)

    def swapped(self, rows: dict[int, int | Tensor]) -> list[Tensor]:
        """The predictions with the rows of some samples taken from other samples."""
        out = []
        for i, dim in zip(self.at, self.oracle.out_dims, strict=True):
            t = self._cast(self.leaves[i]).detach().clone(memory_format=torch.contiguous_format)
            if dim is not None:
                source = t.clone()
                for n, m in rows.items():
                    t.select(dim, n).copy_(source.select(dim, m) if isinstance(m, int) else 0.5 * (source.select(dim, n) + source.select(dim, int(m))))
            out.append(t)
        return out

    def scaled(self, rows: Sequence[int], factor: float) -> list[Tensor]:
        """The predictions with some rows multiplied by ``factor``."""
        out = self.swapped({})
        for t, dim in zip(out, self.oracle.out_dims, strict=True):
            for n in rows if dim is not None and t.is_floating_point() else ():
                t.select(dim, n).mul_(factor)
        return out

    def slope(self, predictions: Sequence[Tensor], n: int, entries: int = 6) -> Tensor:
        """The first entries of the gradient by prediction n, by central differences: sees through ``detach``."""
        out = []
        for i, dim in enumerate(self.oracle.out_dims):
            if dim is None or not predictions[i].is_floating_point():
                continue
            for c in range(min(entries, predictions[i].select(dim, n).numel())):
                pair = []
                for sign in (1, -1):
                    moved = [p.clone() for p in predictions]
                    row = moved[i].select(dim, n)
                    row.view(-1)[c] += sign * 1e-5 if row.is_contiguous() else 0.0
                    pair.append(self.value(moved).detach())
                out.append((pair[0] - pair[1]) / 2e-5)
        return torch.stack(out).to(torch.float64) if out else torch.zeros(0, dtype=torch.float64)

    def gradient(self, predictions: Sequence[Tensor]) -> Tensor:
        leaves = [p.detach().clone().requires_grad_() if p.is_floating_point() else p for p in predictions]
        value = self.value(leaves)
        wanted = [p for p in leaves if p.requires_grad]
        grads = torch.autograd.grad(value, wanted, allow_unused=True) if value.requires_grad else [None] * len(wanted)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)]
        dims = [d for p, d in zip(leaves, self.oracle.out_dims, strict=True) if p.requires_grad]
        rows = [g.movedim(d, 0).reshape(self.oracle.samples, -1) for g, d in zip(filled, dims, strict=True) if d is not None]
        return torch.cat(rows, 1) if rows else torch.zeros(self.oracle.samples, 0)


def _quadruples(n: int) -> list[tuple[int, int, int, int]]:
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b][:12]
    return [(a, b, (a + 1) % n if (a + 1) % n != a else a, (b + 1) % n) for a, b in pairs]


def not_a_sum(loss: LossOracle) -> Witness | None:
    """A second difference over two samples that does not vanish."""
    n = loss.oracle.samples
    worst = 0.0
    for a, b, c, d in _quadruples(n) if n > 1 else []:
        terms = [loss.value(loss.swapped(rows)).detach() for rows in ({}, {a: c}, {b: d}, {a: c, b: d})]
        if not all(torch.isfinite(t) for t in terms):
            continue
        second = (terms[0] - terms[1] - terms[2] + terms[3]).abs()
        scale = max(float(t.abs()) for t in terms) + 1e-300
        worst = max(worst, float(second) / scale)
    worst = max(worst, _stretched(loss)) if n > 1 else worst
    tolerance = 1e-10 if loss.wide else 1e-4
    return Witness("second difference over two samples", worst) if worst > tolerance else None


def _stretched(loss: LossOracle) -> float:
    """The same with rows far from where they are, for branches that rarely fire."""
    worst = 0.0
    for factor in (30.0, -1e3):
        try:
            terms = [loss.value(loss.scaled(rows, factor)).detach() for rows in ((), (0,), (1,), (0, 1))]
        except Exception:
            return worst
        if all(torch.isfinite(t) for t in terms):
            second = float((terms[0] - terms[1] - terms[2] + terms[3]).abs())
            worst = max(worst, second / (max(float(t.abs()) for t in terms) + 1e-300))
    return worst


def entangled(loss: LossOracle) -> Witness | None:
    """The direction in which a prediction enters the loss depends on other predictions (or on the index)."""
    n = loss.oracle.samples
    base = loss.gradient(loss.swapped({}))
    if base.shape[1] < 2 or n < 2:
        return _entangled_scalars(loss) if base.shape[1] == 1 else None
    worst, which = 0.0, 0
    floor = 1e-9 * float(base.norm(dim=1).max()) + 1e-300
    for shift in (1, 2):
        for keep in range(n):
            other = loss.gradient(loss.swapped({m: (m + shift) % n for m in range(n) if m != keep}))[keep]
            worst, which = max((worst, which), (_sine(base[keep], other, floor), keep))
    tolerance = 1e-6 if loss.wide else 1e-2
    if worst <= tolerance and loss.wide:
        worst, which, tolerance = *_entangled_values(loss), 1e-4
    return Witness("direction of the gradient by one prediction when the others change", worst, -1, which) if worst > tolerance else None


def _entangled_values(loss: LossOracle) -> tuple[float, int]:
    n = loss.oracle.samples
    worst = 0.0
    for shift in (1, 2):
        here, there = (loss.slope(loss.swapped(rows), 0) for rows in ({}, {m: (m + shift) % n for m in range(1, n)}))
        worst = max(worst, _sine(here, there, 1e-6))
    return worst, 0


def _entangled_scalars(loss: LossOracle) -> Witness | None:
    """With one entry per sample: mixed second derivatives that are not of rank one off the diagonal."""
    n = loss.oracle.samples
    if n < 4 or not loss.wide:
        return None
    leaves = [p.requires_grad_() for p in loss.swapped({})]
    value = loss.value(leaves)
    if not value.requires_grad:
        return None
    (g,) = torch.autograd.grad(value, leaves, create_graph=True)
    g = g.reshape(-1)
    if not g.requires_grad:
        return None
    H = torch.stack([torch.autograd.grad(g[i], leaves, retain_graph=True)[0].reshape(-1) for i in range(n)])
    minors = [H[a, b] * H[c, d] - H[a, d] * H[c, b] for a, b, c, d in [(0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (n - 1, 0, n - 2, 1)]]
    scale = float(H.abs().max()) ** 2 + 1e-300
    worst = max(float(m.abs()) for m in minors) / scale
    return Witness("mixed second derivatives of the loss", worst) if worst > 1e-8 else None


# --- settling and verifying -------------------------------------------------------------------------------------------------------------


def settle(structure: Structure, oracle: Oracle, output: Any, faithful: str = "") -> Structure:
    """Open verdicts become "fails" where a witness is found; a replay that strays takes back what was proved."""
    if faithful:
        structure = _distrust(structure, faithful)
    if structure.samples > 1:
        structure = _settle_forward(structure, oracle)
    if oracle.graph.loss is not None and oracle.graph.after_cut:
        structure = _settle_loss(structure, LossOracle(oracle, output), oracle)
    return structure


def _distrust(structure: Structure, why: str) -> Structure:
    blame = Culprit("", "replay", "", WHY["unfaithful"] + f" ({why})", REMEDY["unfaithful"])
    names = ("independent_forward", "simd_forward", "simd_given_statistics")
    return structure.with_verdicts(*(Verdict(n, "unknown", culprits=(*getattr(structure, n).culprits, blame)) for n in names))


def _fails(verdict: Verdict, witness: Witness | None) -> Verdict:
    if witness is None or verdict.status == "holds":
        return verdict
    return replace(verdict, status="fails", basis="witness", note=str(witness))


def _settle_forward(structure: Structure, oracle: Oracle) -> Structure:
    independent, simd, given = structure.independent_forward, structure.simd_forward, structure.simd_given_statistics
    witness = listening(oracle) if not independent else None
    independent, simd = _fails(independent, witness), _fails(simd, witness)
    if not (simd.status == "fails" and given) and not (simd and given):
        bent = uneven(oracle)
        simd, given = _fails(simd, bent), _fails(given, bent)
        if not given and given.status == "unknown" and independent.status == "fails" and oracle.findings.bent and _all_known(structure, oracle):
            given = replace(given, status="fails", basis="proved", note="samples meet pairwise in a way no fixed number of statistics can carry")
    return structure.with_verdicts(independent, simd, given)


def _all_known(structure: Structure, oracle: Oracle) -> bool:
    """Nothing unknown stands behind the mixing: every culprit is an op whose rule says how it mixes."""
    vague = {"no rule", "data-dependent shape", "scattered", "resized", "position"}
    births = oracle.findings.forward.algebra.births.values()
    return not structure.unknown_ops and not oracle.findings.escapes and not vague & set(births)


def _settle_loss(structure: Structure, loss: LossOracle, oracle: Oracle) -> Structure:
    reduction, simd_loss = structure.reduction, structure.simd_loss
    try:
        if not reduction:
            reduction = _fails(reduction, not_a_sum(loss))
        if not simd_loss:
            simd_loss = _fails(simd_loss, entangled(loss))
            if simd_loss.status == "unknown" and oracle.program.loss is not None:
                simd_loss = _fails(simd_loss, index_matters(loss) or foreign_targets(loss))
    except Exception as error:
        note = f"the loss could not be tested: {type(error).__name__}: {error}"
        reduction, simd_loss = (v if v.status != "unknown" else replace(v, note=note) for v in (reduction, simd_loss))
    if simd_loss.status == "fails" and reduction.status != "fails":
        note = "a sum over samples, but not of one function of each sample's own prediction and target" if reduction else str(simd_loss.note)
        reduction = replace(reduction, status="fails", basis=simd_loss.basis, note=note, culprits=reduction.culprits or simd_loss.culprits)
    return structure.with_verdicts(reduction, simd_loss)


def index_matters(loss: LossOracle) -> Witness | None:
    """With equal predictions and targets for all samples, the gradient rows still differ by more than a factor."""
    oracle, n = loss.oracle, loss.oracle.samples
    if n < 2:
        return None
    kept = oracle.targets
    floor = 1e-9 * float(loss.gradient(loss.swapped({})).norm(dim=1).max()) + 1e-300

    def equal(t: Any) -> Any:
        return t[:1].expand(n, *t.shape[1:]).contiguous() if isinstance(t, Tensor) and t.ndim and t.shape[0] == n else t

    try:
        oracle.targets = tree_map(equal, kept)
        rows = [loss.gradient(loss.swapped({m: k for m in range(n)})) for k in range(min(n, 3))]
        return next((w for w in [*(_differ(r, floor) for r in rows), _ratios_differ(rows, floor)] if w is not None), None)
    finally:
        oracle.targets = kept


def foreign_targets(loss: LossOracle) -> Witness | None:
    """The direction in which a prediction enters the loss depends on the targets of other samples."""
    oracle, n = loss.oracle, loss.oracle.samples
    base = loss.gradient(loss.swapped({}))
    if base.shape[1] < 2 or n < 3:
        return None
    kept, worst, which = oracle.targets, 0.0, -1
    for keep in range(n):
        order = [m if m == keep else [k for k in range(n) if k != keep][([k for k in range(n) if k != keep].index(m) + 1) % (n - 1)] for m in range(n)]
        try:
            oracle.targets = tree_map(lambda t: t[order] if isinstance(t, Tensor) and t.ndim and t.shape[0] == n else t, kept)  # noqa: B023
            other = loss.gradient(loss.swapped({}))[keep]
        finally:
            oracle.targets = kept
        sine = _sine(base[keep], other, 1e-9 * float(base.norm(dim=1).max()) + 1e-300)
        worst, which = max((worst, which), (sine, keep))
    return Witness("direction of the gradient by one prediction when targets of others change", worst, -1, which) if worst > 1e-6 else None


def _sine(a: Tensor, b: Tensor, floor: float) -> float:
    """How far two gradients are from being multiples of each other; 0 where one of them vanishes."""
    if float(min(a.norm(), b.norm())) < floor or not torch.isfinite(b).all():
        return 0.0
    a, b = a / a.norm(), b / b.norm()
    return float((a - b * torch.sign((a * b).sum())).norm())


def _differ(rows: Tensor, floor: float) -> Witness | None:
    if rows.shape[1] < 2:
        return None
    norms = rows.norm(dim=1)
    if float(norms.min()) < floor:
        return None
    unit = rows / norms[:, None]
    unit = unit * torch.sign((unit * unit[:1]).sum(1, keepdim=True))
    worst = float((unit - unit[:1]).norm(dim=1).max())
    return Witness("gradient rows of equal samples", worst) if worst > 1e-6 else None


def _ratios_differ(rows: list[Tensor], floor: float) -> Witness | None:
    """Weights are constants: the ratio of two samples' rows must not depend on the (equal) predictions."""
    norms = [r.norm(dim=1) for r in rows]
    usable = [v / v[0] for v in norms if float(v.min()) > floor]
    if len(usable) < 2:
        return None
    worst = max(float((u - usable[0]).abs().max() / usable[0].abs().max()) for u in usable[1:])
    return Witness("ratio of gradient rows of equal samples", worst) if worst > 1e-6 else None


def verify(structure: Structure, oracle: Oracle, output: Any) -> Verification:
    """Put every verdict to a numerical test."""
    checks: list[Check] = []
    if structure.samples > 1:
        witness = listening(oracle)
        checks.append(_check(structure.independent_forward, "replace all other samples", witness))
        checks.append(_check(structure.simd_forward, "replace and permute samples", witness or uneven(oracle)))
        checks.append(_check_given(structure, oracle))
    if oracle.graph.loss is not None and oracle.graph.after_cut:
        loss = LossOracle(oracle, output)
        for verdict, test, run in (
            (structure.reduction, "second difference over two samples", not_a_sum),
            (structure.simd_loss, "direction of one row when the others change", entangled),
        ):
            try:
                checks.append(_check(verdict, test, run(loss)))
            except Exception as error:
                checks.append(Check(verdict.name, verdict.status, test, None, f"could not be run: {error}"))
    return Verification(tuple(checks))


def _check(verdict: Verdict, test: str, witness: Witness | None) -> Check:
    if verdict.status == "unknown":
        return Check(verdict.name, verdict.status, test, None, str(witness) if witness else "no witness against it", witness)
    if verdict.status == "holds":
        return Check(verdict.name, verdict.status, test, witness is None, str(witness or "no change beyond rounding"), witness)
    if witness is None:
        return Check(verdict.name, verdict.status, test, None, verdict.note or "no witness in this test")
    return Check(verdict.name, verdict.status, test, True, str(witness), witness)


def _check_given(structure: Structure, oracle: Oracle) -> Check:
    verdict = structure.simd_given_statistics
    test = "replace all other samples, statistics frozen"
    if verdict.status != "holds":
        return _check(verdict, "permute samples", uneven(oracle))
    if structure.simd_forward:
        return Check(verdict.name, verdict.status, test, True, "no statistics are needed")
    off = frozen_change(oracle)
    if isinstance(off, str):
        return Check(verdict.name, verdict.status, test, None, off)
    return Check(verdict.name, verdict.status, test, off == 0.0, "bitwise equal" if off == 0.0 else f"moved by {off:.2g}")


def frozen_change(oracle: Oracle) -> float | str:
    """How much predictions move when other samples are replaced and every batch statistic keeps its value."""
    graph, forward = oracle.graph, oracle.findings.forward
    if forward.algebra.overlapping() or graph.escapes:
        return "statistics leave the tensor world and cannot be frozen"
    pinned = [i for i, m in forward.marks.items() if graph.values[i].kind == "step" and m.given and not m.owned and not m.mixed]
    wanted = [graph.predictions[i].index for i in oracle.places]
    fused = {s.index: frozen_batch_norm for s in graph.forward_steps if s.name in FUSED and _trains(s)}
    if any(_hides(forward, s) for s in graph.forward_steps if s.index not in fused):
        return "an op keeps its statistic to itself and cannot be frozen"
    kept: dict[int, Tensor] = {}

    def note(i: int, t: Tensor) -> None:
        if i in set_pinned:
            kept[i] = t.clone()

    set_pinned = set(pinned)
    graph.run({}, wanted, visit=note)
    instead = {i: frozen_batch_norm(kept, graph.steps[i]) for i in fused}
    leaves = [x for x in tree_leaves(oracle.inputs)]
    base = oracle.rows(graph.run({}, wanted, keep=kept, instead=instead))
    worst = 0.0
    for seed, keep in enumerate(partitions(oracle.samples)):
        new_inputs = tree_leaves(oracle.changed(keep, "noisy", seed))
        feed = {r.index: x for r, x in zip(graph.inputs, new_inputs, strict=True) if r is not None}
        new = oracle.rows(graph.run(feed, wanted, keep=kept, instead=instead))
        if base.shape[1]:
            worst = max(worst, float((new - base).abs()[keep].nan_to_num(0, 0, 0).amax()))
    del leaves
    return worst


FUSED = ("native_batch_norm", "_native_batch_norm_legit")


def _trains(step: Any) -> bool:
    return bool(step.args[5] if len(step.args) > 5 else step.kwargs.get("training"))


def _hides(forward: Any, step: Any) -> bool:
    roots = [r for r in forward.algebra.roots if r.step == step.index]
    outs = [forward.marks[r.index] for r in step.outs if r is not None]
    return bool(roots) and any(m.owned for m in outs) and not any(m.given and not m.owned for m in outs)


def frozen_batch_norm(kept: dict[int, Tensor], step: Any) -> Callable[..., Any]:
    """Batch norm with the mean and inverse deviation of the original batch."""
    mean, invstd = (kept.get(r.index) if r else None for r in step.outs[1:3])

    def run(x: Tensor, weight: Any, bias: Any, *_: Any, **__: Any) -> Any:
        view = [1, -1, *[1] * (x.ndim - 2)]
        assert mean is not None and invstd is not None
        y = (x - mean.view(view)) * invstd.view(view)
        y = y * weight.view(view) if weight is not None else y
        return (y + bias.view(view) if bias is not None else y), mean, invstd

    return run


# --- replay ---------------------------------------------------------------------------------------------------------------------------------


def unfaithful(oracle: Oracle) -> tuple[str, str]:
    """Why the recorded computation cannot stand for the model on another batch: in values, in gradients (or "")."""
    inputs = oracle.changed(torch.zeros(oracle.samples, dtype=torch.bool), "noisy")
    graph, program = oracle.graph, oracle.program
    named = {v.name: i for i, v in enumerate(graph.values) if v.kind == "parameters"}
    fresh = {i: program.parameters[n].detach().clone().requires_grad_() for n, i in named.items() if program.parameters[n].requires_grad}
    wanted = [program.parameters[graph.values[i].name] for i in fresh]
    try:
        eager = oracle.eager(inputs)
    except Exception:
        return "", ""
    try:
        if program.loss is None and graph.after_cut:
            assert graph.loss is not None
            feed = {r.index: x for r, x in zip(graph.inputs, tree_leaves(inputs), strict=True) if r is not None}
            replayed = graph.run(feed | fresh, [graph.loss.index])
        else:
            replayed = oracle.replay(inputs, fresh)
    except Exception as error:
        return f"replay raised {type(error).__name__}: {error}"[:120], ""
    values = next((d for a, b in zip(eager, replayed, strict=True) if (d := _apart(a, b, oracle.tolerance))), "")
    return values, "" if values else _gradients_apart(eager, replayed, wanted, list(fresh.values()), oracle.tolerance)


def _apart(a: Tensor, b: Tensor, tolerance: float) -> str:
    if a.shape != b.shape:
        return f"shape {tuple(b.shape)} in place of {tuple(a.shape)}"
    if not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return "" if torch.equal(a, b) else "other integers"
    scale = float(a.detach().abs().nan_to_num(0, 0, 0).max()) + 1e-30
    off = float((a - b).detach().abs().nan_to_num(0, 0, 0).max()) / scale
    return f"off by {off:.2g} relative" if off > 10 * tolerance else ""


def _gradients_apart(eager: list[Tensor], replayed: list[Tensor], wanted: list[Tensor], fresh: list[Tensor], tolerance: float) -> str:
    """Compare gradients by the parameters, for one random cotangent."""
    pairs = [(a, b) for a, b in zip(eager, replayed, strict=True) if a.requires_grad and a.is_floating_point()]
    if not pairs or not wanted:
        return ""
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a) for a, _ in pairs]
    if not all(b.requires_grad for _, b in pairs):
        return "no gradient flows through the replay"
    try:
        true = torch.autograd.grad([a for a, _ in pairs], wanted, cotangents, allow_unused=True)
        mine = torch.autograd.grad([b for _, b in pairs], fresh, cotangents, allow_unused=True)
    except Exception as error:
        return f"backward raised {type(error).__name__}"
    zero = torch.zeros(())
    flat = [torch.cat([(zero if g is None else g).expand_as(p).reshape(-1).to(torch.float64) for g, p in zip(gs, wanted, strict=True)]) for gs in (true, mine)]
    return _apart(*flat, tolerance)
