"""The data of the user, as a program is given it, and what is in it besides tensors.

A program may take an entry out of a dict, give a tensor another axis, or ask for its gradient.
Every run gets containers and tensors of its own, so that all that ends with the run.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from unbatch.capture.histories import connected
from unbatch.capture.iterators import holds_iterator, with_copies
from unbatch.capture.reachable import LEAVES
from unbatch.capture.trees import tensors_in

# What requires a gradient: by itself, or made of others that do.
LEAF, MADE = "leaf", "made"

# How far inside of an object data is looked for.
DEPTH = 4


def handed_out(tree: Any) -> Any:
    """Return data with aliases of its tensors, in containers of its own.

    What is written into the memory of the tensors, or into objects, is put back elsewhere
    (``isolation.py``).
    """
    return tree_map(_alias, tree)


def repacked(tree: Any) -> Any:
    """Return the same tensors in containers of their own, with copies of iterators."""
    return tree_map(_copied, tree)


def _copied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) or not holds_iterator(leaf):
        return leaf
    return with_copies(leaf)


def _alias(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    # Of PyTorch's own class, whose ops are seen; unless it does all of its ops itself.
    is_derived = type(leaf) not in (Tensor, Parameter)
    if is_derived and type(leaf).__torch_dispatch__ is Tensor.__torch_dispatch__:
        leaf = leaf.as_subclass(Tensor)
    if leaf.is_inference():
        return leaf.clone()  # autograd keeps nothing that was made there
    return leaf.detach()


def tracked_in(tree: Any) -> tuple[str, ...]:
    """Return for each tensor of the inputs what autograd knows of it.

    Programs take derivatives by inputs that require a gradient, or skip what needs none.
    """
    kinds = []
    for t in tensors_in(tree):
        kind = ""
        if t.requires_grad:
            kind = LEAF if t.is_leaf else MADE
        kinds.append(kind)
    return tuple(kinds)


def with_tracking(tree: Any, tracked: Sequence[str]) -> Any:
    """Return inputs of our own of which autograd knows what it knows of the user's."""
    if not any(tracked):
        return tree
    leaves, spec = tree_flatten(tree)
    kinds = iter(tracked)
    # What is asked of the inputs here, the program has not asked.
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = _with_tracking(leaf, next(kinds, ""))
    return tree_unflatten(leaves, spec)


def _with_tracking(t: Tensor, kind: str) -> Tensor:
    if not kind or t.requires_grad:
        return t
    leaf = t.detach().requires_grad_()
    # Into what was made from others a program may write, into a leaf it may not.
    return connected(leaf) if kind == MADE else leaf


def holds_data(value: Any, depth: int = DEPTH) -> bool:
    """Tell whether an object is an array, or holds one, or a tensor, in what one can see of it.

    Modules and functions have parameters and settings, and no data.
    """
    if type(value) in LEAVES or isinstance(value, type | Module) or inspect.isroutine(value):
        return False
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return getattr(value, "shape", None) != ()  # a number is no data
    parts = _parts(value)
    return depth > 0 and any(holds_data(part, depth - 1) for part in parts)


def _parts(value: Any) -> list[Any]:
    """Return what is in a container, or in the attributes of an object."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return list(value)
    parts = list(getattr(value, "__dict__", {}).values())
    for owner in type(value).__mro__:
        slots = owner.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            parts.append(getattr(value, name, None))
    return parts


def closed_in(tree: Any) -> tuple[str, ...]:
    """Return the types of what may hold tensors in a tree, and is not opened for them."""
    types = []
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            is_closed = type(leaf).__torch_dispatch__ is not Tensor.__torch_dispatch__
        else:
            is_closed = type(leaf) not in LEAVES
        if is_closed:
            types.append(type(leaf).__name__)
    return tuple(dict.fromkeys(types))


def objects_in(tree: Any) -> list[Any]:
    """Return what there is in data besides tensors, numbers and words."""
    objects = []
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, Tensor) and type(leaf) not in LEAVES:
            objects.append(leaf)
    return objects
