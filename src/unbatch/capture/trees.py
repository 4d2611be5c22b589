"""Arguments, data and results as trees: what is in them, in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def parts_of(tensor: Any) -> list[Tensor]:
    """Return the tensors, each on one memory, that a tensor is made of; none where nobody knows.

    That is the tensor itself unless it is sparse or nested.
    """
    if tensor.is_nested:
        return [tensor.values(), tensor.offsets()] if tensor.layout == torch.jagged else []
    layout = tensor.layout
    if layout == torch.strided:
        return [tensor]
    if layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []


def is_strided(tensor: Tensor) -> bool:
    """Tell whether a tensor is a window on one memory: neither sparse nor nested."""
    return tensor.layout == torch.strided and not tensor.is_nested


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is a window on one memory, of a class that does no op by itself."""
    if not is_strided(tensor):
        return False
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor with all its entries, of which a sparse one leaves out zeros."""
    if tensor.layout == torch.strided or tensor.is_nested:
        return tensor
    return tensor.to_dense()


def version_of(tensor: Tensor) -> int:
    """Return how often PyTorch saw a tensor written to; it does not count in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def copied(leaf: Any) -> Any:
    """Return a tensor as one of its own, cut off from its derivatives; anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def cloned(leaf: Any) -> Any:
    """Return a tensor as one of its own, connected to it; anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def apart(output: Any) -> Any:
    """Return an output with a value of its own in place of every parameter that it holds.

    A loss may read a parameter as an output of the model, and also by itself.
    """
    # What is asked of the output here, the program has not asked.
    with torch._C.DisableTorchFunction():
        holds_parameters = any(map(_is_parameter, tree_leaves(output)))
    if not holds_parameters:
        return output
    return tree_map(lambda leaf: leaf.view_as(leaf) if _is_parameter(leaf) else leaf, output)


def _is_parameter(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    return isinstance(leaf, torch.nn.Parameter) or (leaf.is_leaf and leaf.requires_grad)


def flat(out: Any) -> list[Any]:
    """Return the results of an op as one list, however they are nested.

    Lists and tuples only, as ops return no others; every step of a replay comes here.
    """
    if not isinstance(out, tuple | list):
        return [out]
    results: list[Any] = []
    for part in out:
        results.extend(flat(part))
    return results
