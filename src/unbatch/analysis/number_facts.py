"""What an interpretation relies on in the numbers of a value: another batch is held to it.

An index or a mask may decide which sample an element belongs to. The interpretation then looks at
the integers or booleans that were recorded, and what it saw becomes a ``Fact``: where another batch
has the same facts, it has the same ownership. Nothing here knows about rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch.capture.aliasing import known_at
from unbatch.capture.graph import Graph
from unbatch.capture.steps import Ref, is_ref
from unbatch.capture.trees import is_plain


@dataclass(frozen=True)
class Fact:
    """``look`` at the numbers of ``value`` (None where they are not known) returned ``seen``.

    ``step``: the one before which they were looked at, as views of the value may be written to.
    """

    value: int
    look: Callable[[Tensor | None], Any]
    seen: Any
    step: int = -1

    def holds(self, graph: Graph) -> bool:
        """Tell whether the numbers in another graph show the same."""
        return _equal(self.look(known_at(graph, self.value, self.step)), self.seen)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    # By type too: 1 == True, and None means "not known".
    return type(a) is type(b) and bool(a == b)


class Numbers(Mapping[str, Any]):
    """The integers and booleans of the tensor arguments of a step; to look at one is to rely on it.

    ``rely``: takes the number of a value and a function of its numbers, and returns the result.
    """

    def __init__(
        self,
        rely: Callable[[int, Callable[[Any], Any]], Any],
        arguments: Mapping[str, Any],
    ) -> None:
        self.rely = rely
        self.arguments = arguments

    def __getitem__(self, name: str) -> Any:
        # The most that can be relied on: another batch has to have the very same numbers.
        return self.look(name, lambda numbers: numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.arguments)

    def __len__(self) -> int:
        return len(self.arguments)

    def look(self, name: str, function: Callable[[Any], Any]) -> Any:
        """Return a function of the numbers of an argument, and rely on no more than its result.

        An argument that is a list of tensors gives a list; what is no tensor gives None.
        """

        def result(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return self.rely(leaf.index, function)
            return None

        return tree_map(result, self.arguments.get(name), is_leaf=is_ref)


def exact_numbers(t: Tensor | None) -> Any:
    """Return integers and booleans as an array; None for other numbers, or where not known."""
    # An index or a mask decides whose an element is, and both are integers or booleans.
    if t is None or t.device.type == "meta" or not is_plain(t):
        return None
    if t.is_floating_point() or t.is_complex():
        return None
    return t.detach().cpu().numpy()


def alike(t: Tensor | None) -> tuple[int, ...]:
    """Return the dims along which all entries are equal; none where the numbers are not known."""
    # Nobody looks into tensors of other kinds.
    if t is None or t.device.type == "meta" or not is_plain(t) or not t.numel():
        return ()
    dims = []
    for dim, size in enumerate(t.shape):
        # Along a dim of one entry there is nothing to be alike.
        if size > 1 and bool((t == t.narrow(dim, 0, 1)).all()):
            dims.append(dim)
    return tuple(dims)
