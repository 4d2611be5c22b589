"""Whether the arguments of a call fit together; every refusal shows the value and the remedy. Nothing is computed."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from unbatch import errors
from unbatch.capture.program import Program
from unbatch.capture.sample_axes import SampleAxes
from unbatch.errors import InputError
from unbatch.problem.parameters import select


def check_callable(what: str, function: Any) -> None:
    if not callable(function):
        raise InputError(
            f"The {what} is not callable: got {type(function).__name__}. Pass a module or a function."
        )
    if isinstance(function, type) and issubclass(function, nn.Module):
        name = function.__name__
        raise InputError(f"The {what} is the class {name}; pass a module made from it, {name}(..).")


def opened(tree: Any) -> Any:
    """A mapping into which pytrees do not look, such as what tokenizers return, as a dict."""
    return (
        dict(tree)
        if isinstance(tree, Mapping) and any(leaf is tree for leaf in tree_leaves(tree))
        else tree
    )


def check_fold(dims: Any, in_dims: Any, inputs: Any, targets: Any) -> SampleAxes | None:
    """Several axes of samples, if there are."""
    if dims is None:
        return None
    if in_dims != 0:
        raise InputError(errors.MSG_FOLD_BOTH.format(dims=dims, in_dims=in_dims))
    return SampleAxes.of(dims, inputs, targets)


def flat_dims(what: str, tree: Any, dims: Any) -> list[int | None]:
    """One entry per leaf: the axis of the samples, or None where there is none (not a tensor, not per-sample)."""
    leaves, spec = tree_flatten(tree)
    if any(
        not isinstance(d, int) and d is not None
        for d in tree_leaves(dims, is_leaf=lambda d: d is None)
    ):
        raise InputError(
            f"in_dims for {what} is {dims!r}; it takes an int, None, or a nesting of them like that of {what}, {spec}."
        )
    if isinstance(dims, int) or dims is None:
        flat: list[Any] = [dims] * len(leaves)
    else:
        broadcast = torch.utils._pytree._broadcast_to_and_flatten(
            dims, spec, is_leaf=lambda d: d is None
        )
        if broadcast is None:
            raise InputError(
                f"in_dims for {what} is {dims!r}, which does not fit its structure {spec}. "
                "Use an int, None, or the same nesting."
            )
        flat = list(broadcast)
    flat = [d if isinstance(t, Tensor) else None for t, d in zip(leaves, flat, strict=True)]
    check_dims(what, tree, flat)
    return [d if d is None else d % leaf.ndim for d, leaf in zip(flat, leaves, strict=True)]


def check_dims(what: str, tree: Any, dims: list[int | None]) -> None:
    leaves = tree_leaves(tree)
    if what == "X" and not any(isinstance(t, Tensor) for t in leaves):
        raise InputError(errors.MSG_NOT_TENSOR.format(what=what, value=type(tree).__name__))
    if len(leaves) != len(dims):
        raise InputError(
            f"{what} has {len(leaves)} entries where there were {len(dims)}; with_batch takes data of the same "
            "structure, X and y one after the other: with_batch(X, y)."
        )
    for leaf, d in zip(leaves, dims, strict=True):
        if d is not None and isinstance(leaf, Tensor) and not -leaf.ndim <= d < leaf.ndim:
            raise InputError(errors.MSG_NO_AXIS.format(what=what, shape=tuple(leaf.shape), axis=d))


def check_memory(memory: int | None, device: torch.device) -> int:
    if memory is None:
        return available_memory(device)
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not memory > 0:
        raise InputError(errors.MSG_MEMORY.format(value=memory))
    return int(min(memory, sys.maxsize))


def check_by(by: str) -> None:
    if by not in ("component", "copy", "frozen"):
        raise InputError(errors.MSG_BY.format(value=by))


def check_by_of_columns(by: str) -> None:
    """The Gauss-Newton matrix is made of derivatives of the predictions, which no copy has for itself."""
    if by not in ("component", "frozen"):
        raise InputError(errors.MSG_BY_OF_COLUMNS.format(value=by))


def check_real(parameters: Mapping[str, Tensor]) -> None:
    """The Gauss-Newton matrix is that of real numbers."""
    for name, p in parameters.items():
        if p.is_complex():
            raise InputError(errors.MSG_COMPLEX.format(name=name, dtype=p.dtype))


def check_draws(mc_samples: int | None, seed: int) -> tuple[int, int] | None:
    """How many columns are drawn for each sample, and the seed; None for none."""
    for what, value, least in (("mc_samples", mc_samples, 1), ("seed", seed, 0)):
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not fits and not (what == "mc_samples" and value is None):
            raise InputError(errors.MSG_DRAWS.format(what=what, least=least, value=value))
    return None if mc_samples is None else (mc_samples, seed)


def check_samples(chosen: Any, samples: int) -> Tensor | None:
    if chosen is None:
        return None
    index = torch.as_tensor(chosen)
    bad = (
        index.ndim != 1 or not len(index) or index.is_floating_point() or index.dtype == torch.bool
    )
    if (
        bad
        or int(index.min()) < 0
        or int(index.max()) >= samples
        or len(index.unique()) < len(index)
    ):
        raise InputError(errors.MSG_SAMPLES.format(last=samples - 1, value=chosen))
    return index.long()


def check_blocks(blocks: Any, chosen: Mapping[str, Tensor]) -> list[list[str]] | None:
    """The names of the parameters of every block."""
    if blocks is None:
        return None
    if blocks == "parameter":
        return [[n] for n in chosen]
    if blocks == "module":
        modules: dict[str, list[str]] = {}
        for n in chosen:
            modules.setdefault(n.rpartition(".")[0], []).append(n)
        return list(modules.values())
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise InputError(errors.MSG_BLOCKS.format(value=blocks))
    groups = [list(select(chosen, group)) for group in blocks]
    if sorted(n for group in groups for n in group) != sorted(chosen):
        raise InputError(errors.MSG_BLOCKS.format(value=blocks))
    return groups


def check_out(
    out: Mapping[str, Tensor] | None, chosen: Mapping[str, Tensor], samples: int
) -> dict[str, Tensor]:
    if out is None:
        return {}
    if not isinstance(out, Mapping):
        raise InputError(errors.MSG_OUT.format(what=f"it is a {type(out).__name__}"))
    for name, p in chosen.items():
        given = out.get(name)
        want = ((samples, *p.shape), p.dtype, p.device)
        if not isinstance(given, Tensor) or (tuple(given.shape), given.dtype, given.device) != want:
            raise InputError(errors.MSG_OUT.format(what=_misfit(name, given, want[0], p)))
    given_ = [out[n] for n in chosen if out[n].numel()]
    if any(not t.is_contiguous() and 0 in t.stride() and _expanded(t) for t in given_):
        raise InputError(
            errors.MSG_OUT.format(what="a buffer is expanded, so its rows share memory")
        )
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)) for t in given_)
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)) and _all_dense(
        given_
    ):
        raise InputError(errors.MSG_OUT.format(what="buffers overlap in memory"))
    return {n: out[n] for n in chosen}


def _misfit(name: str, given: Any, want: tuple[int, ...], p: Tensor) -> str:
    if given is None:
        return f"there is nothing for {name!r}"
    if not isinstance(given, Tensor):
        return f"{name!r} is a {type(given).__name__}"
    found = f"{name!r} is {tuple(given.shape)} {given.dtype} on {given.device}"
    return f"{found} where {want} {p.dtype} on {p.device} is needed"


def _expanded(t: Tensor) -> bool:
    return any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True))


def _extent(t: Tensor) -> int:
    if t.is_contiguous():
        return t.numel() * t.element_size()
    return (
        sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True)) + 1
    ) * t.element_size()


def _all_dense(tensors: list[Tensor]) -> bool:
    return all(_extent(t) == t.numel() * t.element_size() for t in tensors)


def check_sizes(
    inputs: Any, dims: list[int | None], targets: Any, target_dims: list[int | None]
) -> int:
    sized = [(f"{what}[{i}]", leaf, d) for what, tree, ds in (("X", inputs, dims), ("y", targets, target_dims))
             for i, (leaf, d) in enumerate(zip(tree_leaves(tree), ds, strict=True)) if d is not None]  # fmt: skip
    if not any(name.startswith("X") for name, _, _ in sized):
        raise InputError(errors.MSG_NO_BATCH)
    first, leaf, axis = sized[0]
    n = leaf.shape[axis]
    for name, other, d in sized[1:]:
        if other.shape[d] != n:
            raise InputError(
                errors.MSG_SIZES.format(
                    first=first, n=n, axis=axis, other=name, m=other.shape[d], other_axis=d
                )
            )
    if n == 0:
        raise InputError(errors.MSG_EMPTY.format(what=first, shape=tuple(leaf.shape)))
    return n


def check_devices(program: Program, inputs: Any, targets: Any) -> None:
    devices = {p.device for p in program.parameters.values()}
    if len(devices) != 1:
        return
    (device,) = devices
    for what, tree in (("X", inputs), ("y", targets)):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.device != device and leaf.ndim:
                raise InputError(
                    errors.MSG_DEVICE.format(what=what, device=leaf.device, model=str(device))
                )


def check_values(inputs: Any, dims: list[int | None]) -> None:
    for i, (leaf, d) in enumerate(zip(tree_leaves(inputs), dims, strict=True)):
        if (
            isinstance(leaf, Tensor)
            and (leaf.is_floating_point() or leaf.is_complex())
            and bool(torch.isnan(leaf).any())
        ):
            bad = torch.isnan(leaf)
            sample = int(torch.nonzero(bad)[0, d]) if d is not None else -1
            raise InputError(
                errors.MSG_NAN.format(what=f"X[{i}]", count=int(bad.sum()), sample=sample)
            )


def check_given(fits: bool, given: Any, call: str, takes: str, arguments: str = "problem") -> None:
    """Whether a picture or a report can be made of something; ``takes`` says of what."""
    if not fits:
        raise InputError(
            errors.MSG_GIVEN.format(call=call, takes=takes, value=_kind(given), arguments=arguments)
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def available_memory(device: torch.device) -> int:
    """A quarter of the memory that is free, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 4)
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
    return 2**30
