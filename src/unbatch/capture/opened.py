"""Records that a model returns and PyTorch does not open, taken apart on the way to the loss.

A dataclass that is not registered is a leaf to PyTorch, and nobody would know which of its tensors
are predictions. The loss gets one of the same class again. Nothing is registered for it: what the
process knows of other people's classes stays as it is.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree
from torch.utils._pytree import tree_map


class Opened:
    """The attributes of a record, in order, with the class that they belong to."""

    def __init__(self, kind: type, attributes: dict[str, Any]) -> None:
        self.kind, self.attributes = kind, attributes


def _parts(record: Opened) -> tuple[list[Any], Any]:
    return list(record.attributes.values()), (record.kind, tuple(record.attributes))


def _put_together(parts: Any, context: Any) -> Opened:
    kind, names = context
    return Opened(kind, dict(zip(names, parts, strict=True)))


_pytree.register_pytree_node(
    Opened, _parts, _put_together, serialized_type_name="unbatch.capture.opened.Opened"
)


def opened(output: Any) -> Any:
    """Return an output with its records taken apart, those inside of others as well."""

    def open_leaf(leaf: Any) -> Any:
        if not _is_record(leaf):
            return leaf
        return Opened(type(leaf), {name: opened(part) for name, part in vars(leaf).items()})

    return tree_map(open_leaf, open_packed(output))


def open_packed(tree: Any) -> Any:
    """Return a tree with its packed sequences taken apart, which consist of tensors alone."""

    def open_part(part: Any) -> Any:
        if not isinstance(part, PackedSequence):
            return part
        return Opened(PackedSequence, part._asdict())

    return tree_map(open_part, tree, is_leaf=is_packed)


def is_packed(part: Any) -> bool:
    """Tell whether a part of a tree is a packed sequence, taken apart or not."""
    if isinstance(part, Opened):
        return part.kind is PackedSequence
    return isinstance(part, PackedSequence)


def closed(output: Any) -> Any:
    """Return an output with its records as they were, of the parts that are there now."""

    def close(part: Any) -> Any:
        if not isinstance(part, Opened):
            return part
        kind: Any = part.kind
        if kind is PackedSequence:
            return tuple.__new__(kind, part.attributes.values())
        record = kind.__new__(kind)
        for name, value in part.attributes.items():
            object.__setattr__(record, name, closed(value))  # it may be frozen
        return record

    return tree_map(close, output, is_leaf=lambda part: isinstance(part, Opened))


def _is_record(leaf: Any) -> bool:
    if isinstance(leaf, type) or not hasattr(leaf, "__dict__"):
        return False
    return dataclasses.is_dataclass(leaf) or type(leaf) is SimpleNamespace
