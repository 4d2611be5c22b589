"""Ops of a GPU by families: the kernels that a CPU lends them, and their rows in
``docs/reference/device_ops.md``.

The kernels stand in ``device_kernels_composed.py``, ``device_kernels_other.py`` and
``device_kernels.py``, each with the row of its op; the rows of other ops, and the page, are in
``device_ops_table.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops

# Sizes in the cases: samples, positions, features, and the states of a recurrence.
N, T, E, H = 5, 4, 3, 3

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

# From ``net``, ``x`` and the op, or a kernel of it, to the next value: see ``Family.case``.
Call = Callable[[Any, Tensor, Any], Tensor]


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


@dataclass(frozen=True)
class Case:
    """A call of an op, see ``Family.case``."""

    op: str
    call: Call


@dataclass
class Family:
    """Ops that stand beside each other on the page.

    ``rows``: of what runs in a forward pass, in the order in which it is registered; ``backward``:
    of the ops that derivatives of these lead to.
    """

    kernels: dict[str, Kernel] = field(default_factory=dict)
    cases: dict[str, Case] = field(default_factory=dict)
    mixing_cases: dict[str, Case] = field(default_factory=dict)
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

    def definition(self, op: str, arises: str, note: str, backward: str = "") -> Decorator:
        """Register a function of plain PyTorch as what an op computes, with the op's row.

        It names the arguments that it takes as the op's schema does, and returns the first results;
        others are zeros. ``backward``: the op that PyTorch's formula for the derivative names,
        which gets the derivative of the function. ``note``: what it is taken apart into.
        """
        self.rows.append(Row(op, arises, APART, (op,), note))

        def register(function: Kernel) -> Kernel:
            kernel = by_name(op, function)
            if backward:
                self.backward(backward)(derivative(op, backward, kernel))
            return self.unlisted(op)(kernel)

        return register

    def case(self, op: str, words: str = "") -> Callable[[Call], Call]:
        """Register a case in which samples are kept apart.

        ``call(net, x, op)`` calls the op on something made of ``x``, ``[N, T, E]``, and of the
        parameters of ``Net`` in ``device_nets.py``, and returns a tensor that begins with ``N``. It
        is run with the op, and with its kernel as plain PyTorch: all answers have to agree.
        """
        return self._call_of(self.cases, op, words)

    def mixing(self, op: str, words: str) -> Callable[[Call], Call]:
        """Register a case in which samples depend on each other: no verdict may deny it."""
        return self._call_of(self.mixing_cases, op, words)

    def _call_of(self, calls: dict[str, Case], op: str, words: str) -> Callable[[Call], Call]:
        assert op in self.kernels, f"no kernel for {op}"
        name = f"{op} {words}".strip()

        def register(call: Call) -> Call:
            assert name not in calls, f"two cases {name}"
            calls[name] = Case(op, call)
            return call

        return register

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


# --- kernels that follow from a definition --------------------------------------------------------


def by_name(op: str, function: Kernel) -> Kernel:
    """Return the kernel of an op that does what a function does: see ``Family.definition``."""
    schema = getattr(torch.ops.aten, op).default
    taken = inspect.signature(function).parameters

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = ops.bound(schema, args, kwargs)
        results = function(**{name: given[name] for name in taken})
        if isinstance(results, Tensor):
            results = (results,)
        missing = schema._schema.returns[len(results) :]
        notes = [0 if str(r.type) == "int" else torch.zeros(2) for r in missing]
        if len(schema._schema.returns) == 1:
            return results[0]
        return *results, *notes

    return kernel


AUTOGRAD_KEYS = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.ADInplaceOrView)


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Record operations inside of a kernel, which runs below autograd otherwise."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in AUTOGRAD_KEYS:
        excluded = excluded.remove(key)
    with (
        torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded),
        torch.enable_grad(),
    ):
        yield


def pulled_back(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Return the vjp of a composition of plain ops."""
    with autograd_inside():
        leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        if isinstance(outputs, Tensor):
            outputs = [outputs]
        pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=False) if g is not None]
        moving = [x for x in leaves if x is not None]
        grads = iter(
            torch.autograd.grad(
                [o for o, _ in pairs], moving, [g for _, g in pairs], allow_unused=True
            )
        )
    return [None if x is None else next(grads) for x in inputs]


def derivative(op: str, backward: str, kernel: Kernel) -> Kernel:
    """Return the kernel of a backward op: the vjp of the forward op's, by the names of arguments.

    It returns as many gradients as the backward op, by the forward op's first tensors. Cotangents
    are called ``grad``..
    """
    forward_op = getattr(torch.ops.aten, op).default
    backward_op = getattr(torch.ops.aten, backward).default
    moving = [a.name for a in forward_op._schema.arguments if "Tensor" in str(a.type)]
    moving = moving[: len(backward_op._schema.returns)]

    def pull_back(*args: Any, **kwargs: Any) -> Any:
        given = ops.bound(backward_op, args, kwargs)
        cotangents = [g for name, g in given.items() if name.startswith("grad")]
        fixed = {name: given.get(name) for name in ops.argument_names(forward_op)}

        def run(*tensors: Tensor) -> Any:
            return kernel(**fixed | dict(zip(moving, tensors, strict=True)))

        return tuple(pulled_back(run, [fixed[name] for name in moving], cotangents))

    return pull_back
