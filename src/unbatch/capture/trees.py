"""Arguments, data and results as trees: what is in them, in order."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def handed_out(tree: Any) -> Any:
    """Return data for a program that may change it: containers of their own, aliases of tensors.

    What the program writes into the memory of the tensors is put back elsewhere, as are objects.
    """
    return tree_map(_alias, tree)


def _alias(leaf: Any) -> Any:
    """Return another tensor on the same memory, without history."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_inference():
        return leaf.clone()  # autograd keeps none that was made there
    return leaf.detach()


def copied(leaf: Any) -> Any:
    """Return a tensor as one of its own, cut off from its derivatives; anything else as it is."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


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
