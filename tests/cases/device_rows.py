"""Ops of a GPU by families: the kernels that a CPU lends them, and their rows in
``docs/reference/device_ops.md``.

The kernels stand in ``device_kernels.py`` and ``device_kernels_other.py``, each with the row of its
op; the rows of ops without a kernel, and the page, are in ``device_ops_table.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

RULE, PLAIN, APART, REFUSED, UNKNOWN, BELOW, BACKWARD, NOT_FORWARD = (
    "rule",
    "written down as",
    "taken apart",
    "refused by name",
    "unknown",
    "below",
    "backward",
    "no forward pass",
)

Kernel = Callable[..., Any]
Decorator = Callable[[Kernel], Kernel]


@dataclass(frozen=True)
class Row:
    """An op. ``tests``: prefixes of cases of ``tests/gradients/test_device_ops.py``, or names of
    tests there.
    """

    op: str
    arises: str
    decision: str
    tests: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Family:
    """Ops that stand beside each other on the page.

    ``rows``: of what runs in a forward pass, in the order in which it is registered; ``backward``:
    of the ops that derivatives of these lead to.
    """

    kernels: dict[str, Kernel] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    backward_rows: list[Row] = field(default_factory=list)

    def kernel(
        self,
        op: str,
        arises: str,
        decision: str = RULE,
        tests: tuple[str, ...] | None = None,
        note: str = "",
    ) -> Decorator:
        """Register a function as the CPU's kernel of an op, and the op's row.

        Without ``tests`` they are the cases whose names begin with the op's.
        """
        self.rows.append(Row(op, arises, decision, (op,) if tests is None else tests, note))
        return self.unlisted(op)

    def backward(self, op: str, note: str = "", arises: str = "") -> Decorator:
        """Register the kernel of an op that runs in backward passes only, and the op's row."""
        self.backward_rows.append(Row(op, arises, BACKWARD, (), note))
        return self.unlisted(op)

    def unlisted(self, op: str) -> Decorator:
        """Register a kernel without a row: of another overload, or of no op of GPUs alone."""

        def register(function: Kernel) -> Kernel:
            assert op not in self.kernels, f"two kernels for {op}"
            self.kernels[op] = function
            return function

        return register


@contextmanager
def lent(*families: Family) -> Iterator[None]:
    """Inside, a CPU has the ops of these families."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for family in families:
            for op, function in family.kernels.items():
                library.impl(op, function, "CPU")
        yield
