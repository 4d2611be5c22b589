"""Arguments, data and results as trees: what is in them, in order."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of a tree."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


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
