"""Other numbers for a recording: batches on which a pass can be tried where its own is not finite.

What is tested against plain autograd is a property of the recorded graph, and not of its numbers.
But a sum over samples says nothing of the others where one of them is not finite: it is then tested
with others in the place of those. Also: a batch with one and the same sample in every place, by
which a sample that is independent of the others is had without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from unbatch.analysis.domain.sample_layout import Layout, layout_of
from unbatch.autodiff.context import Context
from unbatch.linalg.probes import gaussian_like, seeded

OfLeaf = Callable[[Tensor, Layout], Tensor]


def is_finite(tensors: Mapping[Any, Tensor]) -> bool:
    """Tell whether no entry of any tensor is infinite or not a number."""
    return all(bool(t.isfinite().all()) for t in tensors.values())


def finite_batches(context: Context, predictions: Mapping[int, Tensor]) -> Iterator[Context]:
    """Yield the same recording on batches that are more and more likely to be finite.

    First without the samples whose inputs are not, then without those whose ``predictions`` are
    not, and at last on random numbers.
    """
    bad = torch.zeros(context.samples, dtype=torch.bool)
    leaves, _ = tree_flatten(context.inputs)
    for ref, leaf in zip(context.graph.inputs, leaves, strict=True):
        if ref is not None:
            bad |= _not_finite(leaf, _layout(context, ref.index))
    if bad.any() and not bad.all():
        yield _without(context, bad)
    before = bad.clone()
    for i, t in predictions.items():
        if i in context.axes:
            bad |= _not_finite(t, Layout(context.axes[i], context.samples))
    if not bad.all() and not bad.equal(before):
        yield _without(context, bad)
    yield _with_noise(context)


def filled_with(context: Context, n: int) -> Context | None:
    """Return the same with sample n in every place.

    None where it is not known where samples lie in an input.
    """
    graph = context.graph
    for ref in graph.inputs:
        if ref is not None and context.owners[ref.index].owned and not _layout(context, ref.index):
            return None
    order = torch.full((context.samples,), n)
    return _mapped(context, lambda t, layout: _taken(t, layout, order))


def _without(context: Context, bad: Tensor) -> Context:
    """Return the same with other samples, in turn, in the place of some."""
    order = torch.arange(context.samples)
    good = (~bad).nonzero()[:, 0]
    turns = torch.arange(int(bad.sum())) % len(good)
    order[bad] = good[turns]
    return _mapped(context, lambda t, layout: _taken(t, layout, order))


def _with_noise(context: Context) -> Context:
    """Return the same with random numbers for all floating-point inputs."""
    generator = seeded(0)

    def noise(t: Tensor, layout: Layout) -> Tensor:
        if t.is_floating_point() or t.is_complex():
            return gaussian_like(t, generator)
        return t

    return _mapped(context, noise)


def _taken(t: Tensor, layout: Layout, order: Tensor) -> Tensor:
    return layout.join(layout.split(t.detach())[order.to(t.device)])


def _mapped(context: Context, function: OfLeaf) -> Context:
    """Return the same with every input that holds samples replaced by a function of it."""
    leaves, spec = tree_flatten(context.inputs)
    for at, ref in enumerate(context.graph.inputs):
        if ref is None:
            continue
        layout = _layout(context, ref.index)
        if layout is not None:
            leaves[at] = function(leaves[at], layout)
    return replace(context, inputs=tree_unflatten(leaves, spec), buffer=None)


def _layout(context: Context, value: int) -> Layout | None:
    """Return where the samples lie in an input, None where in none or in no even pattern."""
    return layout_of(context.owners[value], context.samples)


def _not_finite(t: Tensor, layout: Layout | None) -> Tensor:
    """Return of which samples an entry is not finite, ``[N]``; none where they have no place."""
    if layout is None or not (t.is_floating_point() or t.is_complex()):
        return torch.zeros((), dtype=torch.bool)
    rows = layout.split(t.detach())
    return (~rows.isfinite()).flatten(1).any(1).cpu()
