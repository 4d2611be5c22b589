"""The program on other batches: what the tests of the verdicts look at.

An experiment replaces, permutes or rescales samples and runs the model itself or, where the loss
lies inside the model, the recording of it. Every run starts from the random state of the
recording, so that noise is the same wherever the size of the batch is the same. Nothing here knows
verdicts, or what a change of the predictions means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from unbatch.analysis.domain.sample_layout import contiguous_blocks, prediction_dim
from unbatch.analysis.inference import AnalysisState
from unbatch.capture.after_run import AfterRun
from unbatch.capture.graph import Graph
from unbatch.capture.program import Program, own_loss
from unbatch.capture.trees import cloned, dense
from unbatch.linalg.precision import FORWARD, FORWARD_IN_DOUBLE, in_double, tolerance
from unbatch.verification.draw import ALL, Draw
from unbatch.verification.noise import draws, recorded_noise, stream_depends_on_data
from unbatch.verification.variants import variant_of

# A change of the predictions counts where it exceeds this many times what rounding the inputs does.
ROUNDINGS = 30

OfLeaf = Callable[[Tensor, int | None], Tensor]  # of an input and its sample axis


class Untestable(Exception):
    """A test that does not apply to this program."""


@dataclass(frozen=True, eq=False)
class Experiment:
    """A program with its batch, and how to run it on other ones.

    ``dims``: the sample axis of each leaf of ``inputs``; ``target_dims``: of each target, None
    where they are not known. ``output``: what the model returned in the recording, if it is kept.
    ``originals``: the modules of which ``program`` runs copies; a hook on a copy may reach them, so
    they are restored as well. ``by_replay``: the recording is run in place of the model.
    ``least_tolerance`` bounds the tolerance from below, ``fixed_tolerance`` takes its place.
    ``noise_owners``: whose the noise is, once that has been asked (``noise_owners.py``). ``draw``:
    how much is tried.
    """

    program: Program
    graph: Graph
    inputs: Any
    targets: Any
    dims: Sequence[int | None]
    samples: int
    findings: AnalysisState
    target_dims: Sequence[int | None] | None = None
    output: Any = None
    originals: tuple[nn.Module, ...] = ()
    by_replay: bool = False
    least_tolerance: float = 0.0
    fixed_tolerance: float | None = None
    # One for all experiments that are made of this one: they have the same steps.
    noise_owners: dict[str, Any] = field(default_factory=dict)
    draw: Draw = ALL

    # -- where the samples lie in the predictions --

    @cached_property
    def places(self) -> list[int]:
        """The predictions that the loss reads, by their index among all of them."""
        # A model may return more than the loss reads (features, a cache): that is not compared.
        used = self.graph.used_predictions
        return [i for i, ref in enumerate(self.graph.predictions) if ref in used]

    @cached_property
    def out_dims(self) -> list[int | None]:
        """The sample axis of each prediction, None where it has none."""
        dims = []
        for i in self.places:
            ownership = self.findings.forward[self.graph.predictions[i]]
            dims.append(prediction_dim(ownership, self.samples, self.findings.leading))
        return dims

    @cached_property
    def blocks(self) -> list[bool]:
        """For each prediction, whether samples are equal blocks along its first axis instead."""
        in_blocks = []
        for i, dim in zip(self.places, self.out_dims, strict=True):
            ownership = self.findings.forward[self.graph.predictions[i]]
            blocks = contiguous_blocks(ownership, self.samples)
            in_blocks.append(dim is None and blocks is not None)
        return in_blocks

    @property
    def samples_are_alike(self) -> bool:
        """Whether the data of one sample may stand in the place of another's."""
        fold = self.program.fold
        return fold is None or not fold.is_ragged

    @property
    def cut_inside_model(self) -> bool:
        """Whether the model computes its own loss, so that its predictions are not its output."""
        return self.program.loss is None and bool(self.graph.after_cut)

    # -- running --

    @cached_property
    def base(self) -> list[Tensor]:
        """The predictions for the batch itself, detached."""
        return self.predict(self.inputs)

    @cached_property
    def runs(self) -> bool:
        """Whether the program takes this batch, and returns as many predictions as recorded."""
        try:
            predictions = self.base
        except Exception:
            return False
        return len(predictions) == len(self.places)

    def predict(self, inputs: Any) -> list[Tensor]:
        """Return the predictions for other inputs, detached."""
        return [t.detach().clone() for t in self.forward(inputs)]

    def forward(self, inputs: Any, after: AfterRun | None = None) -> list[Tensor]:
        """Return the predictions, connected to ``inputs`` and to the parameters.

        ``after``: notes what the run leaves, for ``backward``.
        """
        if self.by_replay or self._noise_would_change:
            # The noise of the recording by its values: drawn anew, it would be another one.
            return self.replayed(inputs, self._noise)
        if self.cut_inside_model:
            return self.replay(inputs)
        return self.eager(inputs, after)

    @cached_property
    def _noise_would_change(self) -> bool:
        """Whether other samples get other noise because one of them is replaced."""
        return stream_depends_on_data(self.graph)

    @cached_property
    def _noise(self) -> dict[int, Tensor]:
        return recorded_noise(self.graph)

    def eager(self, inputs: Any, after: AfterRun | None = None) -> list[Tensor]:
        """Return what the model itself computes: predictions, or the loss where it computes one."""
        with self._isolated(self.graph.rng, after), torch.enable_grad():
            # The model may write to its inputs, and that has to last for the derivatives.
            output = self.program.forward(tree_map(cloned, inputs))
            if not self.cut_inside_model:
                leaves = tensor_leaves(output)
                return [leaves[i] for i in self.places if i < len(leaves)]
            loss = own_loss(output)
            if loss is None:
                return []
            return [loss]

    def replay(self, inputs: Any, parameters: Mapping[int, Tensor] | None = None) -> list[Tensor]:
        """Return the predictions by the recorded graph; ``parameters`` by their values in it."""
        # What is not fed keeps the value that it had in the recording.
        feed = self.feed(inputs) | dict(parameters or {})
        return self.graph.run(feed, self.prediction_refs)

    def replayed(self, inputs: Any, values: Mapping[int, Tensor]) -> list[Tensor]:
        """Return the predictions by the recorded graph, some ``values`` of it held."""
        return self.graph.run(self.feed(inputs), self.prediction_refs, keep=values)

    @property
    def prediction_refs(self) -> list[int]:
        """The values of the graph that are the predictions."""
        return [self.graph.predictions[i].index for i in self.places]

    def feed(self, inputs: Any) -> dict[int, Tensor]:
        """Return the leaves of other inputs by the values of the graph that they stand for."""
        values = {}
        for ref, leaf in zip(self.graph.inputs, tree_leaves(inputs), strict=True):
            # Inputs that no step reads, and what is no tensor, have no value.
            if ref is not None:
                values[ref.index] = leaf
        return values

    def backward(self, after: AfterRun) -> AbstractContextManager[Any]:
        """Return a context for backward passes through the model: hooks in it may do anything."""
        return self._isolated(after=after)

    def _isolated(
        self, seed: tuple[Any, ...] | None = None, after: AfterRun | None = None
    ) -> AbstractContextManager[Any]:
        """Return a context that leaves nothing changed; ``seed``: the random state inside."""
        return self.program.untouched(seed, self.originals, after)

    def rows(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return predictions as ``[N, entries]`` in float64 (complex128).

        Leaves in which the samples have no place of their own are left out.
        """
        rows = []
        # In double, so that differences of predictions are not rounded once more.
        for p, dim, in_blocks in zip(predictions, self.out_dims, self.blocks, strict=True):
            t = dense(p)
            if dim is not None:
                rows.append(self._in_double_rows(t.movedim(dim, 0)))
            elif in_blocks:
                rows.append(self._in_double_rows(t))
        if not rows:
            return torch.zeros(self.samples, 0, dtype=torch.float64)
        return torch.cat(rows, 1)

    def _in_double_rows(self, t: Tensor) -> Tensor:
        """Return ``[N, entries]`` of a tensor whose first axis has the samples, one or several."""
        t = t.reshape(self.samples, -1)
        columns = self.draw.columns(t.shape[1], self.samples)
        if columns is not None:
            t = t[:, columns.to(t.device)]
        return t.to(torch.promote_types(t.dtype, torch.float64))

    @property
    def size(self) -> int:
        """How many entries the recorded predictions have together."""
        values = self.graph.values
        return sum(values[i].entries for i in self.prediction_refs)

    # -- changed batches --

    def changed(self, keep: Tensor, variant: str, seed: int = 0) -> Any:
        """Return the batch with every sample outside ``keep`` replaced by another one.

        ``keep``: ``[N]``, boolean. ``variant``: one of ``VARIANTS``.
        """
        generator = torch.Generator().manual_seed(seed)
        # By at least one place and less than N, so that no sample is replaced by itself.
        shift = 1 + seed % max(self.samples - 1, 1)
        order = torch.arange(self.samples).roll(shift)

        def replaced(x: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                # The same for all samples.
                return x
            rows = x.detach().movedim(dim, 0)
            new = variant_of(rows, rows[order.to(x.device)], variant, generator)
            mask = keep.to(x.device).reshape(-1, *[1] * (rows.ndim - 1))
            return torch.where(mask, rows, new).movedim(0, dim).contiguous()

        return self.with_leaves(replaced)

    def permuted(self, order: Tensor) -> Any:
        """Return the batch with sample ``order[n]`` in the place of sample n."""

        def reordered(x: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return x.detach()
            return x.detach().index_select(dim, order.to(x.device))

        return self.with_leaves(reordered)

    def shuffled(self, order: Tensor, keep: Tensor, variant: str, seed: int) -> Any:
        """Return the batch with samples outside ``keep`` replaced, and then permuted."""
        return self.on(self.changed(keep, variant, seed)).permuted(order)

    def on(self, inputs: Any) -> Experiment:
        """Return the same on other inputs of these shapes."""
        return replace(self, inputs=inputs, output=None)

    def with_leaves(self, function: OfLeaf) -> Any:
        """Return the inputs with every tensor replaced by ``function(tensor, its sample axis)``."""
        leaves, spec = tree_flatten(self.inputs)
        for i, dim in enumerate(self.dims):
            if isinstance(leaves[i], Tensor):
                leaves[i] = function(leaves[i], dim)
        return tree_unflatten(leaves, spec)

    # -- other experiments --

    def stretched(self, factor: float) -> Experiment:
        """Return the same on inputs times ``factor``; itself where the program refuses them."""

        def scaled(x: Tensor, dim: int | None) -> Tensor:
            if dim is None or not x.is_floating_point():
                return x
            return x.detach() * factor

        # A larger batch is not rounded less: it keeps at least the tolerance of this one.
        other = replace(
            self,
            inputs=self.with_leaves(scaled),
            output=None,
            least_tolerance=self.tolerance,
            fixed_tolerance=None,
        )
        if other.runs:
            return other
        return self

    @cached_property
    def wide(self) -> Experiment | None:
        """The same in float64; None where the program cannot be run so."""
        try:
            wide = self._in_double()
        except Exception:
            return None
        if not wide.runs:
            return None
        for t in wide.base:
            # A cast inside the model takes the digits away again.
            if t.is_floating_point() and t.dtype != torch.float64:
                return None
        return wide

    @cached_property
    def wide_replay(self) -> Experiment | None:
        """The recording in float64, in place of the model; None where it cannot be run so."""
        inputs = self.with_leaves(lambda x, _: in_double(x.detach()))
        graph = self.graph.in_double()
        wide = replace(
            self,
            inputs=inputs,
            graph=graph,
            output=None,
            by_replay=True,
            fixed_tolerance=FORWARD_IN_DOUBLE,
        )
        return wide if wide.runs else None

    def _in_double(self) -> Experiment:
        """Return the same in float64, whether the program takes it or not."""
        inputs = self.with_leaves(lambda x, _: in_double(x.detach()))
        other = replace(self, inputs=inputs, output=None, fixed_tolerance=FORWARD_IN_DOUBLE)
        # Only the recording can tell what predictions inside a model are, and only there is the
        # noise what it was: numbers of another type are drawn in another way.
        if self.cut_inside_model or draws(self.graph):
            return replace(other, graph=self.graph.in_double(), by_replay=True)
        originals = (*self.originals, *self.program.modules)
        return replace(other, program=self.program.in_double(), originals=originals)

    # -- how much is rounding --

    @cached_property
    def tolerance(self) -> float:
        """The relative change of a prediction that rounding explains.

        By the coarsest floating-point type on the way, and not below what rounding the inputs does.
        """
        if self.fixed_tolerance is not None:
            return self.fixed_tolerance
        return max(self.least_tolerance, self.by_type, ROUNDINGS * self._rounding())

    @cached_property
    def by_type(self) -> float:
        """The relative change below which nothing is looked at, by the coarsest type on the way."""
        if self.fixed_tolerance is not None:
            return self.fixed_tolerance
        values = self.graph.values
        dtypes = set()
        for step in self.graph.forward_steps:
            # A cast in the middle of a model rounds all that follows.
            dtypes |= {values[ref.index].dtype for ref in step.outs if ref is not None}
        return tolerance(dtypes, FORWARD)

    def _rounding(self) -> float:
        """Return the largest relative change of a prediction when inputs move by one rounding."""
        generator = torch.Generator().manual_seed(0)

        def nudged(x: Tensor, dim: int | None) -> Tensor:
            if not x.is_floating_point():
                return x
            # Every entry by an amount of its own, as rounding does.
            offset = torch.rand(x.shape, generator=generator).to(x) - 0.5
            return x.detach() * (1 + 2 * torch.finfo(x.dtype).eps * offset)

        try:
            new = self.rows(self.predict(self.with_leaves(nudged)))
        except Exception:
            return 0.0
        base = self.rows(self.base)
        if base.shape != new.shape or not base.shape[1]:
            return 0.0
        return float(relative_change(base, new).max())

    def roundings(self, inputs: Any) -> Tensor:
        """Return by how much predictions move when every value on the way is rounded anew.

        ``[N]``, relative to the predictions for the batch itself. A change of the inputs alone does
        not show what is lost on the way: where a small number is added to a large one and that is
        subtracted again, say. By replays; zero where the recording cannot be run on these inputs.
        """
        graph = self.graph
        if self.fixed_tolerance is not None:
            # In float64 only the inputs and the copy of the model are.
            graph = graph.in_double()
        generator = torch.Generator().manual_seed(0)
        ownership = self.findings.forward.ownership
        noise = self._noise

        def rounded(i: int, t: Tensor) -> None:
            marks = ownership.get(i)
            if i in noise or marks is None or not (t.is_floating_point() or t.is_complex()):
                return
            # What is the same for all samples may be a parameter, which is not to be written to,
            # and its rounding is that of all batches.
            if not marks.depends_on_batch or 0 in t.stride():
                return
            # By up to two roundings up or down, of numbers that are cheap to draw.
            offset = torch.empty(t.shape).uniform_(-2, 2, generator=generator).to(t)
            # Counts, places and masks are whole numbers, and exact.
            offset.masked_fill_((t == t.real.round()) & (t.abs() < 2**20), 0)
            t.addcmul_(t, offset, value=torch.finfo(t.dtype).eps)

        feed = {i: t.detach().clone() for i, t in self.feed(inputs).items()}
        refs = self.prediction_refs
        try:
            with torch.no_grad():
                plain = graph.run(feed, refs, keep=noise)
                moved = graph.run(feed, refs, keep=noise, visit=rounded)
        except Exception:
            return torch.zeros(self.samples, dtype=torch.float64)
        base = self.rows(self.base)
        return relative_change(base, base + self.rows(moved) - self.rows(plain))

    @cached_property
    def repeatable(self) -> bool:
        """Whether the same batch gives the same predictions; if not, a change proves nothing."""
        if self._noise_of_hidden_size():
            return False
        try:
            # The recording was a first run already.
            if self._equals_base(self._recorded):
                return True
            return self._equals_base(self.predict(self.inputs))
        except Exception:
            return False

    @property
    def _recorded(self) -> list[Tensor]:
        """The predictions that the model returned in the recording, if these are kept."""
        if self.output is None or self.cut_inside_model:
            return []
        leaves = tensor_leaves(self.output)
        return [leaves[i] for i in self.places]

    def _equals_base(self, predictions: Sequence[Tensor]) -> bool:
        """Return whether predictions are those of the batch, in every bit."""
        if len(predictions) != len(self.base):
            return False
        for first, second in zip(self.base, predictions, strict=True):
            # Of different shapes, too. What is not a number is the same twice.
            if not torch.equal(first.nan_to_num(), second.nan_to_num()):
                return False
        return True

    def _noise_of_hidden_size(self) -> bool:
        """Return whether the data decide how much noise is drawn: other data would get another."""
        for step in self.graph.forward_steps:
            if not step.noise:
                continue
            for ref in step.outs:
                if ref is not None and ref.index in self.graph.dynamic:
                    return True
        return False


def relative_change(base: Tensor, new: Tensor) -> Tensor:
    """Return by how much each row changed, relative to its size: ``[N]``.

    Entries that are not finite any more do not count.
    """
    if not base.shape[1]:
        return torch.zeros(len(base), dtype=torch.float64)
    finite = torch.isfinite(new.abs())
    change = torch.where(finite, (new - base).abs(), 0.0)
    # Nor do they in the size: an infinite entry would hide all others.
    size = base.abs().nan_to_num(0, 0, 0)
    # A row that is zero by cancellation is measured by the largest of all rows.
    return change.amax(1) / (size.amax(1) + 1e-6 * size.amax() + 1e-37)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """Return the tensors in a tree: what else a model returns is no prediction."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
