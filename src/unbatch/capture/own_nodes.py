"""Nodes of an autograd graph that PyTorch did not write: their names, and where they stand.

What is done about them is for others, as for ``autodiff/own_backward.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Kernels that work out the gradient with the value: PyTorch takes it for a constant.
WITHOUT_GRAPH = ("CudnnCtcLossBackward", "MiopenCtcLossBackward")


def own_derivatives(value: Tensor) -> list[str]:
    """Return the functions behind a value whose derivative may have none itself.

    They were written in Python, or by a library.
    """
    return [_name(node) for node in own_nodes([value])]


def own_nodes(values: Iterable[Tensor]) -> list[Any]:
    """Return the nodes behind some values that PyTorch did not write, or that leave no graph."""
    visited, queue, nodes = set[Any](), [value.grad_fn for value in values], list[Any]()
    while queue:
        node: Any = queue.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        for before, _ in node.next_functions:
            queue.append(before)
        numbered = type(node).__name__.rstrip("0123456789")
        is_own = isinstance(node, torch.autograd.function.BackwardCFunction)
        if is_own or numbered in WITHOUT_GRAPH or not _is_of_torch(node):
            nodes.append(node)
    return nodes


def _is_of_torch(node: Any) -> bool:
    """Tell whether a node is one of PyTorch's own, and not of an extension in C++."""
    return hasattr(torch._C._functions, type(node).__name__)


def _name(node: Any) -> str:
    name = type(node).__name__
    numbered = name.rstrip("0123456789")
    if numbered in WITHOUT_GRAPH:
        return numbered.removesuffix("Backward")
    return name.removeprefix("GeneratedBackwardFor_").removesuffix("Backward")


def with_place(node: Any) -> str:
    """Return the name of a function, with file and line of its backward pass where it has one."""
    backward = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    if code is None or code.co_filename.startswith(os.path.dirname(torch.__file__)):
        return _name(node)
    return f"{_name(node)} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"
