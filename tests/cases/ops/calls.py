"""An op as calls: its sample inputs, its forms, and arguments that are no tensors.

The forms: plain, in place, with ``out=``, backward (once and twice), and in inference mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from cases.ops.roles import LONGEST, Call, axes
from cases.ops.warned import quietly

DRAWS = 3
ENTRIES = 700  # the largest tensor of a call
LOOKED_AT = 120  # sample inputs of an op
SHORT = 4  # what is left of long axes


@dataclass(frozen=True)
class Sample:
    """One way to call an op: leaves of its arguments, and how they are nested."""

    leaves: tuple[Any, ...]
    spec: Any

    @staticmethod
    def of(sample: Any) -> Sample:
        leaves, spec = tree_flatten(((sample.input, *sample.args), dict(sample.kwargs)))
        return Sample(tuple(leaves), spec)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def constants(self) -> tuple[str, ...]:
        return tuple(repr(leaf) for leaf in self.leaves if not isinstance(leaf, Tensor))

    @property
    def signature(self) -> tuple[Any, ...]:
        """What tells apart the tensors of one sample from those of another, but for numbers."""
        tensors = tuple((tuple(t.shape), t.dtype) for t in self.tensors)
        places = tuple(isinstance(leaf, Tensor) for leaf in self.leaves)
        return str(self.spec), tensors, places

    @property
    def usable(self) -> bool:
        """Tell whether all tensors are dense and small, and one of them may hold samples."""
        fits = False
        for t in self.tensors:
            if t.layout != torch.strided or t.is_nested or t.numel() > ENTRIES or not t.numel():
                return False
            fits = fits or bool(axes(t))
        return fits

    def shortened(self) -> Sample:
        """Return the same call on the first few entries along axes that are long."""
        leaves = []
        for leaf in self.leaves:
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                for d, size in enumerate(leaf.shape):
                    leaf = leaf.narrow(d, 0, min(size, SHORT)) if size > LONGEST else leaf
            leaves.append(leaf)
        return replace(self, leaves=tuple(leaves))

    def filled(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        """Return the arguments with other tensors in the places of tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return tree_unflatten(leaves, self.spec)

    def with_leaf(self, place: int, leaf: Any) -> Sample:
        leaves = list(self.leaves)
        leaves[place] = leaf
        return replace(self, leaves=tuple(leaves))


def seeded(seed: int) -> None:
    # Tensors by the seed; what decides about shapes and other arguments is always the same.
    torch.default_generator.manual_seed(seed)
    np.random.seed(0)
    random.seed(0)


def samples_of(op: Any, dtype: torch.dtype, seed: int) -> list[Sample]:
    """Return sample inputs of an op, without what is not usable here."""
    seeded(seed)
    samples = []
    with quietly():
        for number, sample in enumerate(op.sample_inputs("cpu", dtype, set_seed=False)):
            if number == LOOKED_AT:
                break
            samples.append(Sample.of(sample))
    return samples


def drawn(op: Any, dtype: torch.dtype) -> list[list[Sample]]:
    """Return sample inputs of an op, each as a list of draws of its tensors."""
    draws = [samples_of(op, dtype, seed) for seed in range(DRAWS)]
    if not any(sample.usable for sample in draws[0]):
        draws = [[sample.shortened() for sample in samples] for samples in draws]
    drawn = []
    for number, first in enumerate(draws[0]):
        if not first.usable:
            continue
        alike = [first]
        for others in draws[1:]:
            if number < len(others) and _same(first, others[number]):
                alike.append(others[number])
        while len(alike) < DRAWS:
            alike.append(_shuffled(first, len(alike)))
        drawn.append(alike)
    return drawn


def _same(a: Sample, b: Sample) -> bool:
    return a.signature == b.signature and a.constants == b.constants


def _shuffled(sample: Sample, seed: int) -> Sample:
    """The same call with the numbers of each tensor turned along its first axis, and blended."""
    leaves = list(sample.leaves)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.ndim:
            turned = leaf.detach().roll(seed, 0)
            if leaf.is_floating_point() or leaf.is_complex():
                turned = 0.37 * turned + 0.63 * leaf.detach()
            leaves[i] = turned
    return replace(sample, leaves=tuple(leaves))


# --- forms ----------------------------------------------------------------------------------------


def names_of(sample: Sample) -> list[str]:
    """Return what the tensors of a call are called: by number, or by name."""
    return [f"arg{i}" for i in range(len(sample.tensors))]


def plain(function: Callable[..., Any], draws: Sequence[Sample]) -> Call:
    first = draws[0]

    def run(*tensors: Tensor) -> Any:
        args, kwargs = first.filled(tensors)
        return function(*args, **kwargs)

    tensors = [[t.detach() for t in sample.tensors] for sample in draws]
    return Call(run, tensors, names_of(first))


def in_place(function: Callable[..., Any], call: Call, draws: Sequence[Sample]) -> Call:
    """The in-place variant on a copy of the first argument, which is returned."""
    first = draws[0]

    def run(*tensors: Tensor) -> Any:
        args, kwargs = first.filled(tensors)
        target = args[0].clone()
        function(target, *args[1:], **kwargs)
        return target

    return replace(call, function=run)


def into_buffer(function: Callable[..., Any], draws: Sequence[Sample], out: Tensor) -> Call:
    """With ``out=``, into a buffer that is an argument as well."""
    first = draws[0]

    def run(buffer: Tensor, *tensors: Tensor) -> Any:
        args, kwargs = first.filled(tensors)
        target = buffer.clone()
        function(*args, **kwargs, out=target)
        return target

    tensors = []
    for number, sample in enumerate(draws):
        buffer = torch.full_like(out.detach(), number)
        tensors.append([buffer, *(t.detach() for t in sample.tensors)])
    return Call(run, tensors, ["out", *names_of(first)])


def into_fresh(function: Callable[..., Any], call: Call, draws: Sequence[Sample]) -> Call:
    first = draws[0]

    def run(*tensors: Tensor) -> Any:
        args, kwargs = first.filled(tensors)
        out = function(*args, **kwargs)
        fresh = torch.empty_like(out)
        return function(*args, **kwargs, out=fresh)

    return replace(call, function=run)


def inference(call: Call) -> Call:
    """Inside of inference mode, where composite ops are seen whole."""

    def run(*tensors: Tensor) -> Any:
        with torch.inference_mode():
            return call.function(*tensors)

    return replace(call, function=run)


def differentiable(t: Any) -> bool:
    return isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())


def outputs_of(value: Any) -> list[Tensor]:
    """Return the outputs through which a derivative can be taken."""
    leaves, _ = tree_flatten(value)
    return [t for t in leaves if differentiable(t) and t.requires_grad]


def backward(call: Call, shapes: Sequence[Tensor], order: int = 1) -> Call:
    """The gradients of the outputs by all inputs; cotangents are arguments, too."""
    count = len(shapes)

    def run(*tensors: Tensor) -> Any:
        cotangents, inputs = tensors[:count], list(tensors[count:])
        variables = []
        for i, t in enumerate(inputs):
            if differentiable(t):
                inputs[i] = t.detach().requires_grad_()
                variables.append(inputs[i])
        with torch.enable_grad():
            outputs = outputs_of(call.function(*inputs))
            gradients = _gradients(outputs, variables, cotangents, order == 2)
            if order == 2:
                again = [g for g in gradients if g.requires_grad]
                ones = [torch.ones_like(g) for g in again]
                gradients = _gradients(again, variables, ones, False)
        return gradients

    tensors = []
    for number, inputs in enumerate(call.draws):
        chance = torch.Generator().manual_seed(100 + number)
        cotangents = [torch.randn(t.shape, dtype=t.dtype, generator=chance) for t in shapes]
        tensors.append([*cotangents, *inputs])
    return Call(run, tensors, [*(f"cotangent{i}" for i in range(count)), *call.names])


def _gradients(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], graph: bool
) -> list[Tensor]:
    found = torch.autograd.grad(
        list(outputs), list(inputs), list(cotangents), create_graph=graph, allow_unused=True
    )
    return [g for g in found if g is not None]


def differentiated(call: Call) -> list[Tensor]:
    """Return the outputs of a call through which a derivative can be taken; none if it fails."""
    inputs = [t.clone().requires_grad_() if differentiable(t) else t for t in call.tensors]
    try:
        with quietly(), torch.enable_grad():
            return outputs_of(call.function(*inputs))
    except Exception:
        return []


# --- arguments that are no tensors ----------------------------------------------------------------


def neighbours(leaf: Any) -> list[Any]:
    """Return other values of an argument that is no tensor."""
    if isinstance(leaf, bool):
        return [not leaf]
    if isinstance(leaf, int):
        return [leaf + 1, leaf - 1]
    if isinstance(leaf, float):
        return [leaf + 1.0, leaf * 0.5]
    if isinstance(leaf, complex):
        return [leaf + 1.0]
    if isinstance(leaf, torch.dtype):
        return [torch.float64, torch.float32, torch.int64, torch.complex128]
    if isinstance(leaf, str):
        return ["mean", "sum", "none", "amax", "prod", "reflect", "replicate"]
    return []


def variants(group: Sequence[Sample], integers: bool, most: int = 24) -> list[Sample]:
    """Return calls that differ in arguments that are no tensors: those of a group of samples with
    tensors of the same shapes, and such with one argument changed.
    """
    found = {sample.constants: sample for sample in group[:most]}
    for sample in group[:3]:
        for place, leaf in enumerate(sample.leaves):
            if not integers and isinstance(leaf, int) and not isinstance(leaf, bool):
                continue
            for other in neighbours(leaf):
                changed = sample.with_leaf(place, other)
                found.setdefault(changed.constants, changed)
    return list(found.values())[: 2 * most]


def several(function: Callable[..., Any], samples: Sequence[Sample], draws: Sequence[Any]) -> Call:
    """One program that makes several calls on the same tensors, and returns all results."""

    def run(*tensors: Tensor) -> Any:
        results = []
        for sample in samples:
            args, kwargs = sample.filled(tensors)
            results.append(function(*args, **kwargs))
        return results

    tensors = [[t.detach() for t in sample.tensors] for sample in draws]
    return Call(run, tensors, names_of(draws[0]))


# --- other sizes ----------------------------------------------------------------------------------


def narrowed(t: Tensor, dims: Sequence[int], cut: int) -> Tensor:
    """Return a tensor without its last entries along some dims."""
    for d in dims:
        t = t.narrow(d, 0, t.shape[d] - cut)
    return t


def windows_of(tensors: Sequence[Tensor], most: int = 8) -> list[list[list[int]]]:
    """Return which dims of each tensor are to be one shorter: all of one size, or one."""
    found = [[[] for _ in tensors]]
    for size in sorted({size for t in tensors for size in t.shape if size > 2}):
        found.append([[d for d, s in enumerate(t.shape) if s == size] for t in tensors])
    # Of several tensors one alone does not fit the others, which not every op checks.
    if len(tensors) == 1:
        for d, size in enumerate(tensors[0].shape):
            if size > 2:
                found.append([[d]])
    different = []
    for dims in found:
        if dims not in different:
            different.append(dims)
    return different[:most]


def of_many_sizes(call: Call) -> Call | None:
    """One program that makes the same call on its tensors and on windows of them, as far as the op
    accepts these; None if it accepts none.
    """
    kept = []
    # Two windows of each kind: a whole value has another name than a part of it anyway.
    for dims, cut in product(windows_of(call.tensors), (1, 2)):
        tensors = [narrowed(t, d, cut) for t, d in zip(call.tensors, dims, strict=True)]
        try:
            with quietly():
                call.function(*[t.clone() for t in tensors])
        except Exception:
            continue
        kept.append((dims, cut))

    def run(*tensors: Tensor) -> Any:
        results = []
        for dims, cut in kept:
            windows = [narrowed(t, d, cut) for t, d in zip(tensors, dims, strict=True)]
            results.append(call.function(*windows))
        return results

    return replace(call, function=run) if len(kept) > 1 else None


def accepted(function: Callable[..., Any], samples: Sequence[Sample], draws: Any) -> list[Sample]:
    """Return those calls that run on the tensors given."""
    kept = []
    for sample in samples:
        args, kwargs = sample.filled([t.detach().clone() for t in draws[0].tensors])
        try:
            with quietly():
                function(*args, **kwargs)
        except Exception:
            continue
        kept.append(sample)
    return kept


def by_signature(drawn: Sequence[list[Sample]]) -> Iterator[list[list[Sample]]]:
    """Group sample inputs by the shapes of their tensors."""
    groups: dict[Any, list[list[Sample]]] = {}
    for draws in drawn:
        groups.setdefault(draws[0].signature, []).append(draws)
    yield from groups.values()
