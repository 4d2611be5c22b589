"""The program on other batches: what the witnesses watch.

Replaces, permutes or redraws samples and runs the model itself (or, where its loss lies inside, the recording of it)
from the random state of the capture, so noise is the same wherever the batch size is. Knows nothing about verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from unbatch.analysis.domain.sample_layout import contiguous_blocks, prediction_dim
from unbatch.analysis.inference import AnalysisState
from unbatch.capture import ops
from unbatch.capture.graph import Graph
from unbatch.capture.isolation import untouched
from unbatch.capture.program import Program, own_loss
from unbatch.linalg.precision import FORWARD, FORWARD_IN_DOUBLE, in_double, tolerance

VARIANTS = ("rolled", "noisy", "large", "tiny", "zero", "huge")


GAIN = {"large": 1e2, "huge": 1e4}


class Untestable(Exception):
    """A test that does not apply."""


@dataclass
class Experiment:
    """The program and its batch, and how to run them on another one."""

    program: Program
    graph: Graph
    inputs: Any
    targets: Any
    dims: Sequence[int | None]
    samples: int
    findings: AnalysisState
    base: list[Tensor] = field(default_factory=list)
    out_dims: list[int | None] = field(default_factory=list)
    blocks: list[bool] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    originals: list[nn.Module] = field(
        default_factory=list
    )  # of which it is a copy; hooks may reach them
    least_tolerance: float = 0.0
    known_tolerance: float | None = None  # in place of what the types say

    def __post_init__(self) -> None:
        used = {r.index for r in self.graph.used_predictions}
        self.places = [i for i, r in enumerate(self.graph.predictions) if r.index in used]
        marks = [self.findings.forward[self.graph.predictions[i]] for i in self.places]
        self.out_dims = [prediction_dim(m, self.samples, self.findings.leading) for m in marks]
        self.blocks = [
            d is None and contiguous_blocks(m, self.samples) is not None
            for m, d in zip(marks, self.out_dims, strict=True)
        ]
        self.base = self.predict(self.inputs)

    # -- running --

    def predict(self, inputs: Any) -> list[Tensor]:
        """The predictions the model makes on other inputs; replayed where they lie inside the model."""
        return [t.detach().clone() for t in self.forward(inputs)]

    def forward(self, inputs: Any) -> list[Tensor]:
        """The predictions, connected to ``inputs`` and to the parameters."""
        return (
            self.replay(inputs)
            if self.program.loss is None and self.graph.after_cut
            else self.eager(inputs)
        )

    def eager(self, inputs: Any) -> list[Tensor]:
        """What the model itself returns: its predictions, or its loss where it computes one."""
        with (
            untouched([*self.program.modules, *self.originals], self.graph.rng),
            torch.enable_grad(),
        ):
            output = self.program.predict(
                tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
            )
            leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
            own = own_loss(output) if self.program.loss is None else None
            if self.program.loss is None and self.graph.after_cut:
                return [own] if own is not None else []
            return [leaves[i] for i in self.places if i < len(leaves)]

    def feed(self, inputs: Any) -> dict[int, Tensor]:
        """Other inputs by the values of the recording that they stand for."""
        return {
            r.index: x
            for r, x in zip(self.graph.inputs, tree_leaves(inputs), strict=True)
            if r is not None
        }

    def replay(
        self,
        inputs: Any,
        parameters: Mapping[int, Tensor] | None = None,
        keep: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        feed = self.feed(inputs) | dict(parameters or {})
        return self.graph.run(
            feed, [self.graph.predictions[i].index for i in self.places], keep=keep
        )

    def predict_permuted(self, order: Tensor) -> list[Tensor]:
        """Predictions for the permuted batch, with the noise of every sample permuted along."""
        inputs = self.permuted(order)
        noisy = [s for s in self.graph.forward_steps if s.noise]
        if not noisy:
            return self.predict(inputs)
        owners = noise_owners(self.graph, self.findings.forward)
        if owners is None:
            raise Untestable(
                "noise is used in a way in which it cannot be permuted with its samples"
            )
        keep = {}
        for ref, owner in owners.items():
            value = self.graph.known(ref)
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

    def stretched(self, factor: float) -> Experiment:
        """The same program on inputs multiplied by ``factor``; itself where that cannot be run."""
        inputs = self._map(
            lambda x, dim: x.detach() * factor if dim is not None and x.is_floating_point() else x
        )
        try:
            # A larger batch is not rounded less: it keeps at least the tolerance of this one.
            return replace(
                self, inputs=inputs, least_tolerance=self.tolerance, known_tolerance=None
            )
        except Exception:
            return self

    def permuted(self, order: Tensor) -> Any:
        return self._map(
            lambda x, dim: (
                x.detach() if dim is None else x.detach().index_select(dim, order.to(x.device))
            )
        )

    def _map(self, function: Callable[[Tensor, int | None], Tensor]) -> Any:
        leaves, spec = tree_flatten(self.inputs)
        return tree_unflatten(
            [
                function(x, d) if isinstance(x, Tensor) else x
                for x, d in zip(leaves, self.dims, strict=True)
            ],
            spec,
        )

    def backward(self) -> AbstractContextManager[Any]:
        """For backward passes through the model itself: hooks in it may do anything."""
        return untouched([*self.program.modules, *self.originals])

    # -- how much is rounding --

    @cached_property
    def tolerance(self) -> float:
        """By the coarsest floating-point type on the way, and never below what one rounding of the inputs does."""
        if self.known_tolerance is not None:
            return self.known_tolerance
        kinds = {
            self.graph.values[r.index].dtype
            for s in self.graph.forward_steps
            for r in s.outs
            if r is not None
        }
        return max(self.least_tolerance, tolerance(kinds, FORWARD), 30 * self._rounding())

    def _rounding(self) -> float:
        generator = torch.Generator().manual_seed(0)

        def nudged(x: Tensor, dim: int | None) -> Tensor:
            if not x.is_floating_point():
                return x
            sign = torch.rand(x.shape, generator=generator).to(x) - 0.5
            return x.detach() * (1 + 2 * torch.finfo(x.dtype).eps * sign)

        try:
            new = self.rows(self.predict(self._map(nudged)))
        except Exception:
            return 0.0
        base = self.rows(self.base)
        return (
            float(relative_change(base, new).max())
            if base.shape == new.shape and base.shape[1]
            else 0.0
        )

    @cached_property
    def repeatable(self) -> bool:
        """The same batch gives the same predictions: without that, a change proves nothing."""
        hidden_size = any(
            r is not None and r.index in self.graph.dynamic
            for s in self.graph.forward_steps
            if s.noise
            for r in s.outs
        )
        try:
            again = self.predict(self.inputs)
        except Exception:
            return False
        same = all(
            torch.equal(a.nan_to_num(), b.nan_to_num())
            for a, b in zip(self.base, again, strict=True)
            if a.shape == b.shape
        )
        return same and not hidden_size

    def in_double(self) -> Experiment | None:
        """The same in float64, where the model can be run so."""
        wide = self._map(lambda x, _: in_double(x.detach()))
        try:
            if self.program.loss is None and self.graph.after_cut:  # predictions are replayed
                graph = self.graph.in_double()
                other = replace(self, graph=graph, inputs=wide, known_tolerance=FORWARD_IN_DOUBLE)
            else:
                originals = [*self.originals, *self.program.modules]
                program = self.program.in_double()
                other = replace(
                    self,
                    program=program,
                    inputs=wide,
                    originals=originals,
                    known_tolerance=FORWARD_IN_DOUBLE,
                )
        except Exception:
            return None
        return (
            other
            if all(t.dtype == torch.float64 for t in other.base if t.is_floating_point())
            else None
        )

    # -- another number of samples --

    def resized(self, samples: int, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
        """Predictions (``[samples, entries]``, float64) of redrawn samples, and the inputs they come from."""
        if self.program.loss is None and self.graph.after_cut:
            raise Untestable("the predictions lie inside the model")
        generator = torch.Generator().manual_seed(seed)
        moving: list[Tensor] = []

        def redrawn(x: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return x.double() if x.is_floating_point() else x
            pick = torch.randint(self.samples, (samples,), generator=generator)
            x = x.detach().cpu().index_select(dim, pick)
            if not x.is_floating_point():
                return x
            x = x.double()
            moving.append(
                (
                    x
                    + x.abs().mean()
                    * torch.randn(x.shape, generator=generator, dtype=torch.float64)
                ).requires_grad_()
            )
            return moving[-1]

        inputs = self._map(redrawn)
        program = self.program.in_double()
        with (
            untouched([*program.modules, *self.program.modules, *self.originals], self.graph.rng),
            torch.enable_grad(),
        ):
            leaves = [t for t in tree_leaves(program.predict(inputs)) if isinstance(t, Tensor)]
        rows = [
            leaves[i].movedim(d, 0).reshape(samples, -1)
            for i, d in zip(self.places, self.out_dims, strict=True)
            if d is not None
        ]
        return torch.cat([r for r in rows if r.is_floating_point()], 1), moving


def relative_change(base: Tensor, new: Tensor) -> Tensor:
    """By how much each row changed, relative to its size; entries that are not finite any more do not count."""
    if not base.shape[1]:
        return torch.zeros(len(base), dtype=torch.float64)
    finite = torch.isfinite(new.abs())
    change = torch.where(finite, (new - base).abs(), 0.0)
    size = base.abs().nan_to_num(0, 0, 0)
    return change.amax(1) / (size.amax(1) + 1e-6 * size.amax() + 1e-37)


def _variant(rows: Tensor, others: Tensor, variant: str, generator: torch.Generator) -> Tensor:
    if not rows.is_floating_point():
        return (
            others
            if variant in ("rolled", "noisy") or rows.dtype == torch.bool
            else torch.where(others == others, others.roll(1, 0), others)
        )
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


def noise_owners(graph: Graph, forward: Any) -> dict[int, Any] | None:
    """For noise that samples consume elementwise, the owner of each element; None if some is used otherwise."""
    out = {}
    for step in (s for s in graph.forward_steps if s.noise):
        for ref in {
            r.index for r in [*step.outs, *(new for _, new in step.writes)] if r is not None
        }:
            owner = _claimed(graph, forward, ref)
            if isinstance(owner, str) or graph.known(ref) is None:
                return None
            if owner is not None:
                out[ref] = owner
    return out


def _claimed(graph: Graph, forward: Any, ref: int) -> Any:
    """Owners of the elements of a noise value; None if it stays shared, a string if it cannot be said."""
    carrying, turned = {ref}, False
    shape = graph.values[ref].shape
    if not graph.values[ref].dtype.is_floating_point:
        return None  # a drawn order or label: the same for the whole batch
    for step in (s for s in graph.forward_steps if s.index > graph.values[ref].step):
        used = carrying & {r.index for r in step.refs()}
        if not used:
            continue
        for out in [*(r for r in step.outs if r), *(new for _, new in step.writes)]:
            marks = forward.marks[out.index]
            if not marks.depends_on_batch:
                carrying.add(out.index)
                turned = turned or (
                    not ops.keeps_order(step.op) and graph.values[out.index].shape != shape
                )
                continue
            held = graph.values[next(iter(used))].shape
            owner = (
                _owner_of(marks, held)
                if out.index in {r.index for r in step.outs if r}
                else "otherwise"
            )
            if isinstance(owner, np.ndarray) and held != shape:
                return "otherwise" if turned else owner.reshape(shape)
            return owner
    return None


def _owner_of(marks: Any, held: tuple[int, ...]) -> Any:
    """Whose the elements of noise of shape ``held`` are where it meets samples."""
    dim = None if marks.mixed else marks.sample_dim()
    if dim is None:
        return (
            np.broadcast_to(marks.owner, held)
            if not marks.mixed and marks.shape == held
            else "otherwise"
        )
    at = dim - len(marks.shape) + len(held)
    if at < 0 or held[at] == 1:
        return None  # broadcast along the samples: the same for all of them
    if held[at] != marks.shape[dim]:
        return "otherwise"
    return np.broadcast_to(
        np.arange(held[at]).reshape([-1 if d == at else 1 for d in range(len(held))]), held
    )


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
