"""Whether the arguments of a call fit together. No model runs here.

``check_*`` raise or return nothing; ``parse_*`` raise or return the argument in the form that the
rest of the package takes. Every refusal shows the value and the remedy.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from unbatch import errors
from unbatch.capture.data import holds_data
from unbatch.capture.opened import open_packed
from unbatch.capture.program import Program
from unbatch.capture.ragged_rows import of_data
from unbatch.capture.sample_axes import Fold, SampleAxes
from unbatch.capture.stacked_views import StackedViews, has_views
from unbatch.capture.trees import tensors_in
from unbatch.errors import InputError
from unbatch.gradients.quantities import Quantity
from unbatch.problem.parameters import select

# --- model, loss and data -------------------------------------------------------------------------


def check_callable(what: str, function: Any) -> None:
    """Raise ``InputError`` for what cannot be called, or is a class of modules."""
    if not callable(function):
        raise InputError(
            f"The {what} is not callable: got {type(function).__name__}. "
            "Pass a module or a function."
        )
    if isinstance(function, type) and issubclass(function, nn.Module):
        name = function.__name__
        raise InputError(f"The {what} is the class {name}; pass a module made from it, {name}(..).")


def parse_data(data: Any, batch: Any) -> tuple[Any, Any]:
    """Return inputs and targets as they were passed; no targets where a model has its own loss."""
    if (data is None) == (batch is None):
        raise InputError(
            "Pass either data=(X, y) together with a loss, "
            "or batch=inputs for a model that returns its own loss."
        )
    if data is None:
        return batch, None
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise InputError(
            f"data is a pair (X, y); got {type(data).__name__}. "
            "For a model with its own loss use batch=inputs."
        )
    inputs, targets = data
    return inputs, targets


def parse_tree(tree: Any) -> Any:
    """Return a dict for a mapping that pytrees take for a leaf, such as what tokenizers return."""
    if not isinstance(tree, Mapping):
        return tree
    leaves = tree_leaves(tree)
    is_leaf = len(leaves) == 1 and leaves[0] is tree
    return dict(tree) if is_leaf else tree


def check_devices(program: Program, inputs: Any, targets: Any) -> None:
    """Raise ``InputError`` where data and parameters are on different devices."""
    devices = {p.device for p in program.parameters.values()}
    if len(devices) != 1:
        return  # a model on several devices moves its data itself
    (device,) = devices
    for what, tree in (("X", inputs), ("y", targets)):
        for leaf in tree_leaves(tree):
            # A number on the CPU takes part in computations on any device.
            if isinstance(leaf, Tensor) and leaf.device != device and leaf.ndim:
                text = errors.MSG_DEVICE.format(what=what, device=leaf.device, model=str(device))
                raise InputError(text)


def check_values(inputs: Any, dims: Sequence[int | None]) -> None:
    """Raise ``InputError`` where inputs hold NaN, and say in which sample."""
    for i, (leaf, axis) in enumerate(zip(tree_leaves(inputs), dims, strict=True)):
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            continue
        bad = torch.isnan(leaf)
        if not bool(bad.any()):
            continue
        sample = -1  # of no sample
        if axis is not None:
            sample = int(torch.nonzero(bad)[0, axis])
        text = errors.MSG_NAN.format(what=f"X[{i}]", count=int(bad.sum()), sample=sample)
        raise InputError(text)


# --- the axes of the samples ----------------------------------------------------------------------


def parse_sample_axes(
    dims: Any, in_dims: tuple[Any, Any], out_dims: Any, inputs: Any, targets: Any
) -> Fold | None:
    """Return what brings samples to the first axis; None where they lie along one axis each.

    ``dims``: several axes that together tell samples apart; ``in_dims``: those of X and of y.
    """
    views = out_dims is not None or has_views(in_dims)
    if dims is None and not views:
        return None
    if dims is None:
        return StackedViews.of(in_dims, out_dims, inputs, targets)
    # Both say where the samples lie.
    if views:
        raise InputError(errors.MSG_VIEWS_BOTH.format(dims=dims))
    if in_dims != (0, 0):
        raise InputError(errors.MSG_FOLD_BOTH.format(dims=dims, in_dims=in_dims[0]))
    return SampleAxes.of(dims, inputs, targets)


def parse_dims(what: str, tree: Any, dims: Any) -> list[int | None]:
    """Return the axis of the samples for each leaf, counted from the front.

    None for a leaf that has none: it is no tensor, or is not per-sample. Raises ``InputError`` for
    an object with data in it that nobody could exchange.
    """
    leaves, spec = tree_flatten(open_packed(tree))
    for d in tree_leaves(dims, is_leaf=_is_none):
        if d is not None and not isinstance(d, int):
            raise InputError(
                f"in_dims for {what} is {dims!r}; it takes an int, None, "
                f"or a nesting of them like that of {what}, {spec}."
            )
    axes: list[int | None]
    if isinstance(dims, int) or dims is None:
        axes = [dims] * len(leaves)
    else:
        axes = _broadcast_dims(what, dims, spec)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            continue
        if axes[i] is not None and holds_data(leaf):
            text = errors.MSG_CLOSED_DATA.format(what=f"{what}[{i}]", value=type(leaf).__name__)
            raise InputError(text)
        axes[i] = None  # a number among tensors has no axes, whatever its neighbours have
    axes = of_data(axes, tree)
    check_dims(what, tree, axes)
    for i, (axis, leaf) in enumerate(zip(axes, leaves, strict=True)):
        if axis is not None:
            axes[i] = axis % leaf.ndim
    return axes


def _is_none(d: Any) -> bool:
    return d is None


def _broadcast_dims(what: str, dims: Any, spec: Any) -> list[int | None]:
    """Return one axis for each leaf, from a tree of axes that may end above the leaves."""
    # As torch.func.vmap does with in_dims: an axis above a subtree holds for all of its leaves.
    axes = torch.utils._pytree._broadcast_to_and_flatten(dims, spec, is_leaf=_is_none)
    if axes is None:
        raise InputError(
            f"in_dims for {what} is {dims!r}, which does not fit its structure {spec}. "
            "Use an int, None, or the same nesting; for X and y of their own, a pair of these: "
            "in_dims=(for X, for y)."
        )
    return list(axes)


def check_dims(what: str, tree: Any, dims: Sequence[int | None]) -> None:
    """Raise ``InputError`` where a tree has other leaves than ``dims``, or lacks an axis."""
    # Targets may be anything that the loss takes, inputs have to have samples.
    leaves = tree_leaves(tree)
    if what == "X" and not any(isinstance(leaf, Tensor) for leaf in leaves):
        if isinstance(tree, tuple) and all(isinstance(leaf, int) for leaf in leaves):
            raise InputError(errors.MSG_NO_INPUT.format(value=tree))
        raise InputError(errors.MSG_NOT_TENSOR.format(what=what, value=type(tree).__name__))
    if len(leaves) != len(dims):
        raise InputError(
            f"{what} has {len(leaves)} entries where there were {len(dims)}; with_batch takes data "
            "of the same structure, X and y one after the other: with_batch(X, y)."
        )
    for leaf, d in zip(leaves, dims, strict=True):
        if d is None:
            continue
        if not isinstance(leaf, Tensor):
            raise InputError(errors.MSG_NOT_TENSOR.format(what=what, value=type(leaf).__name__))
        if not -leaf.ndim <= d < leaf.ndim:
            raise InputError(errors.MSG_NO_AXIS.format(what=what, shape=tuple(leaf.shape), axis=d))


def count_samples(
    inputs: Any,
    dims: Sequence[int | None],
    targets: Any,
    target_dims: Sequence[int | None],
    may_be_empty: bool = False,
) -> int:
    """Return N. Raises ``InputError`` where leaves differ in it, or there are no samples."""
    # Of targets alone there is no batch to predict on.
    sized = _sized("X", inputs, dims)
    if not sized:
        raise InputError(errors.MSG_NO_BATCH)
    sized += _sized("y", targets, target_dims)
    # All are compared with the first input, which the message shows beside the one that differs.
    first, leaf, axis = sized[0]
    n = leaf.shape[axis]
    for name, other, d in sized[1:]:
        if other.shape[d] != n:
            text = errors.MSG_SIZES.format(
                first=first, n=n, axis=axis, other=name, m=other.shape[d], other_axis=d
            )
            raise InputError(text)
    if n == 0 and not may_be_empty:
        raise InputError(errors.MSG_EMPTY.format(what=first, shape=tuple(leaf.shape)))
    return int(n)


def _sized(what: str, tree: Any, dims: Sequence[int | None]) -> list[tuple[str, Any, int]]:
    """Return name, tensor and axis of every leaf that has samples."""
    for leaf in tensors_in(tree):
        if leaf.is_nested and leaf.layout == torch.strided:
            raise InputError(errors.MSG_NESTED.format(what=what))
    sized = []
    for i, (leaf, d) in enumerate(zip(tree_leaves(tree), dims, strict=True)):
        if d is None:
            continue
        if leaf.is_nested:
            raise InputError(errors.MSG_NESTED.format(what=what))
        if leaf.layout != torch.strided:
            raise InputError(errors.MSG_SPARSE.format(what=f"{what}[{i}]", layout=leaf.layout))
        sized.append((f"{what}[{i}]", leaf, d))
    return sized


# --- what a question is about ---------------------------------------------------------------------


def check_count(what: str, value: Any) -> None:
    """Raise ``InputError`` for what is no whole number above zero."""
    if not isinstance(value, int) or value < 1:
        raise InputError(errors.MSG_DRAWS.format(what=what, least=1, value=value))


def check_by(by: str) -> None:
    """Raise ``InputError`` for what is no decomposition of the gradient."""
    if by not in ("component", "copy", "frozen"):
        raise InputError(errors.MSG_BY.format(value=by))


def check_by_of_columns(by: str) -> None:
    """Raise ``InputError`` for a decomposition that the Gauss-Newton matrix does not have.

    It is made of derivatives of the predictions, and a copy of the parameters has none of its own.
    """
    if by not in ("component", "frozen"):
        raise InputError(errors.MSG_BY_OF_COLUMNS.format(value=by))


def check_real(parameters: Mapping[str, Tensor]) -> None:
    """Raise ``InputError`` for complex parameters: the Gauss-Newton matrix is a real one."""
    for name, p in parameters.items():
        if p.is_complex():
            raise InputError(errors.MSG_COMPLEX.format(name=name, dtype=p.dtype))


def parse_quantities(quantities: Sequence[Any]) -> list[Quantity]:
    """Return quantities; one that takes no arguments may be given by its class.

    Raises ``InputError`` for none at all, or for the first argument that is none.
    """
    if not quantities:
        raise InputError(errors.MSG_QUANTITY.format(value=None))
    return [_parse_quantity(quantity) for quantity in quantities]


def _parse_quantity(value: Any) -> Quantity:
    if isinstance(value, Quantity):
        return value
    hint = ""
    if isinstance(value, list | tuple):
        hint = " Write them one after the other, without a list."
    elif isinstance(value, type) and issubclass(value, Quantity):
        try:
            return value()
        except TypeError:
            hint = f" {value.__name__} takes arguments."
    raise InputError(errors.MSG_QUANTITY.format(value=value) + hint)


def parse_draws(mc_samples: int | None, seed: int) -> tuple[int, int] | None:
    """Return how many columns are drawn for each sample, and the seed; None for none."""
    if mc_samples is not None:
        _check_count("mc_samples", mc_samples, 1)
    _check_count("seed", seed, 0)
    return None if mc_samples is None else (mc_samples, seed)


def _check_count(what: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:  # True is an int
        raise InputError(errors.MSG_DRAWS.format(what=what, least=least, value=value))


def parse_samples(indices: Any, samples: int) -> Tensor | None:
    """Return the numbers of some samples as a tensor; None for all of them."""
    if indices is None:
        return None
    index = torch.as_tensor(indices)
    if not _are_distinct_samples(index, samples):
        raise InputError(errors.MSG_SAMPLES.format(last=samples - 1, value=indices))
    return index.long()


def _are_distinct_samples(index: Tensor, samples: int) -> bool:
    if index.ndim != 1 or not len(index):
        return False
    if index.is_floating_point() or index.dtype == torch.bool:
        return False  # a mask would be taken for the numbers 0 and 1
    if int(index.min()) < 0 or int(index.max()) >= samples:
        return False
    return len(index.unique()) == len(index)


def parse_blocks(blocks: Any, parameters: Mapping[str, Tensor]) -> list[list[str]] | None:
    """Return the names of the parameters of every block; None for no blocks."""
    if blocks is None:
        return None
    # Blocks are not to overlap, and to leave no parameter out: their diagonal is that of G.
    if blocks == "parameter":
        return [[name] for name in parameters]
    if blocks == "module":
        return _by_module(parameters)
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise InputError(errors.MSG_BLOCKS.format(value=blocks))
    # A group may be a name, a glob or a tensor, as for ``parameters``.
    groups = [list(select(parameters, group)) for group in blocks]
    if sorted(itertools.chain(*groups)) != sorted(parameters):
        raise InputError(errors.MSG_BLOCKS.format(value=blocks))
    return groups


def _by_module(names: Iterable[str]) -> list[list[str]]:
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, _ = name.rpartition(".")
        modules.setdefault(module, []).append(name)
    return list(modules.values())


# --- memory ---------------------------------------------------------------------------------------


def parse_effort(effort: float) -> float:
    """Return how many plain steps experiments may take; raise ``InputError`` for no number."""
    if isinstance(effort, bool) or not isinstance(effort, int | float) or not effort > 0:
        raise InputError(errors.MSG_EFFORT.format(value=effort))
    return float(effort)


def parse_memory(memory: int | None, device: torch.device) -> int:
    """Return a budget in bytes, by default what ``available_memory`` says."""
    if memory is None:
        return available_memory(device)
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not memory > 0:
        raise InputError(errors.MSG_MEMORY.format(value=memory))
    return int(min(memory, sys.maxsize))  # infinity is a budget, too


def parse_seconds(seconds: float) -> float:
    """Return a budget of time; raise ``InputError`` for no number greater than zero."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise InputError(errors.MSG_SECONDS.format(value=seconds))
    return float(seconds)


def available_memory(device: torch.device) -> int:
    """Return a quarter of the memory that is free, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 4)
    # Free pages, which Linux tells; elsewhere a gigabyte.
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    return 2**30


# --- buffers for results --------------------------------------------------------------------------


def parse_out(
    out: Mapping[str, Tensor] | None, parameters: Mapping[str, Tensor], samples: int
) -> dict[str, Tensor]:
    """Return a buffer ``[N, *param]`` for each parameter; no buffers for None.

    Raises ``InputError`` where one is missing, does not fit, or shares memory with another.
    """
    if out is None:
        return {}
    if not isinstance(out, Mapping):
        raise InputError(errors.MSG_OUT.format(what=f"it is a {type(out).__name__}"))
    buffers: dict[str, Tensor] = {}
    for name, p in parameters.items():
        misfit = _misfit(name, out.get(name), p, samples)
        if misfit:
            raise InputError(errors.MSG_OUT.format(what=misfit))
        buffers[name] = out[name]
    _check_memory_of([buffer for buffer in buffers.values() if buffer.numel()])
    return buffers


def _misfit(name: str, buffer: Any, p: Tensor, samples: int) -> str:
    """Return in words why a buffer cannot hold the rows of ``p``; empty where it can."""
    if buffer is None:
        return f"there is nothing for {name!r}"
    if not isinstance(buffer, Tensor):
        return f"{name!r} is a {type(buffer).__name__}"
    shape = (samples, *p.shape)
    if (tuple(buffer.shape), buffer.dtype, buffer.device) == (shape, p.dtype, p.device):
        return ""
    value = f"{name!r} is {tuple(buffer.shape)} {buffer.dtype} on {buffer.device}"
    return f"{value} where {shape} {p.dtype} on {p.device} is needed"


def _check_memory_of(buffers: Sequence[Tensor]) -> None:
    """Raise ``InputError`` where writing one row would change another."""
    spans, dense = [], True
    for buffer in buffers:
        if _is_expanded(buffer):
            what = "a buffer is expanded, so its rows share memory"
            raise InputError(errors.MSG_OUT.format(what=what))
        dense = dense and _is_dense(buffer)
        start = buffer.data_ptr()
        spans.append((start, start + _extent(buffer)))
    if not dense:
        return  # the memory of buffers with gaps may interlace without any entry being shared
    # In the order of their addresses, each has to end before the next begins.
    for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
        if end > start:
            raise InputError(errors.MSG_OUT.format(what="buffers overlap in memory"))


def _is_expanded(t: Tensor) -> bool:
    """Return whether several entries are one number in memory."""
    if t.is_contiguous():
        return False
    return any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True))


def _extent(t: Tensor) -> int:
    """Return the bytes from the first entry to the end of the last."""
    if t.is_contiguous():
        return t.numel() * t.element_size()
    last = 0
    for size, step in zip(t.shape, t.stride(), strict=True):
        last += (size - 1) * step
    return (last + 1) * t.element_size()


def _is_dense(t: Tensor) -> bool:
    return _extent(t) == t.numel() * t.element_size()


# --- pictures and reports -------------------------------------------------------------------------


def check_shown(fits: bool, value: Any, call: str, takes: str, arguments: str = "problem") -> None:
    """Raise ``InputError`` where no picture or report can be made of something.

    ``takes`` says of what it can.
    """
    if fits:
        return
    text = errors.MSG_GIVEN.format(call=call, takes=takes, value=_kind(value), arguments=arguments)
    raise InputError(text)


def _kind(value: Any) -> str:
    """Return in words what an argument is."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a tensor of shape {list(value.shape)} and dtype {dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return type(value).__name__
