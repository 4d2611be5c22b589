"""Which rule an op follows: the registry, what a rule gets to see, and how ops without one are treated.

A rule is a function from a ``Call`` to the marks of its outputs; it speaks in the operations of ``algebra.py``. The
rules themselves live in ``families.py``, ``layers.py`` and ``loss_rules.py`` (values are computed), ``moves.py`` and
``indexing.py`` (values change place). An op that has no rule is decomposed; one that cannot be decomposed is
*unknown*, never assumed harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbatch import errors
from unbatch.analysis.domain.ownership import MIXED, Ownership, code, shared, total
from unbatch.analysis.domain.propagation import Propagation
from unbatch.capture import ops
from unbatch.capture.ops import base_name
from unbatch.errors import InputError

Rule = Callable[["RuleContext"], Any]


RULES: dict[
    str, Rule
] = {}  # by the name of an ATen op, without overload and without a trailing underscore


CUSTOM: dict[Any, Rule] = {}  # by op overload, registered from outside


ASSUMED: dict[Any, str] = {}  # ops declared to act on each sample alone


NO_RULE = "no rule"


@dataclass
class RuleContext:
    """One op at work: its arguments by schema name (marks in place of tensors) and the shapes it returned.

    ``values[name]`` holds the concrete integers and booleans of an argument, where the recorder kept them. A rule that
    looks at them makes the result depend on them; ``occurs`` looks at less.
    """

    algebra: Propagation
    op: Any
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]
    values: Mapping[str, Any] = field(default_factory=dict)
    look: Callable[[str, Callable[[Any], Any]], Any] | None = (
        None  # at a function of some values, and no more of them
    )

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def occurs(self, name: str, number: int) -> bool:
        """Whether a number is among the values of an argument; True where they are not known."""

        return self.sees(
            name, lambda values: values is None or bool((np.asarray(values) == number).any())
        )

    def sees(self, name: str, what: Callable[[Any], bool]) -> bool:
        """What a function finds in the values of an argument; it gets None where they are not known."""
        return bool(self.look(name, what) if self.look is not None else what(self.values.get(name)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def name(self) -> str:
        return base_name(self.op)

    @property
    def marks(self) -> list[Ownership]:
        """All tensor arguments, in order."""
        return [
            m
            for a in self.arguments.values()
            for m in (a if isinstance(a, list | tuple) else [a])
            if isinstance(m, Ownership)
        ]

    @property
    def constants(self) -> tuple[Any, ...]:
        """All other arguments; part of what function the op is."""
        return tuple((k, repr(a)) for k, a in self.arguments.items() if not _has_marks(a))

    @property
    def title(self) -> tuple[Any, ...]:
        return (self.name, self.constants)

    def dims(self, name: str = "dim", of: str = "self") -> list[int]:
        """A dim argument as a list of non-negative ints; all dims where it is absent or empty."""
        ndim = len(self[of].shape)
        dim = self[name]
        if dim is None or dim == []:
            return list(range(ndim))
        return [d % ndim if ndim else 0 for d in (dim if isinstance(dim, list | tuple) else [dim])][
            : max(ndim, 0)
        ]


def _has_marks(a: Any) -> bool:
    return isinstance(a, Ownership) or (
        isinstance(a, list | tuple) and any(isinstance(m, Ownership) for m in a)
    )


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops, named in words; a second rule for the same name is refused."""

    def register(function: Rule) -> Rule:
        for name in " ".join(names).split():
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def register_rule(op: Any, function: Rule, *, replace: bool = False) -> None:
    """Teach the analyser an op of your own.

    ``op``: a ``torch._ops.OpOverload`` such as ``torch.ops.mylib.op.default``. ``function`` gets a ``Call`` and returns
    the marks of the output (a list for several outputs), made with ``call.algebra``: ``pointwise(name, *marks)``,
    ``reduce(name, marks, dims, keepdim)``, ``scan(name, marks, dims)``, ``contract(...)``. The structures that rest on
    it list it. Raises ``InputError`` for something that is not an op, or has a rule already.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise errors.InputError(errors.MSG_UNKNOWN_RULE.format(value=op))
    if not replace and (op in CUSTOM or (op.namespace == "aten" and base_name(op) in RULES)):
        raise errors.InputError(errors.MSG_RULE_TAKEN.format(value=op))
    CUSTOM[op] = function


def lookup(op: Any) -> Rule | None:
    if op in CUSTOM:
        return CUSTOM[op]
    if op in ASSUMED:
        return independent
    name = base_name(op)
    if name in RULES:
        return RULES[name]
    if ops.is_pointwise(op):
        return pointwise
    return unknown if answers(op) else None


def answers(op: Any) -> bool:
    """The op tells Python a boolean about its operands (``torch.equal``), and that is all it does."""
    return [str(r.type) for r in op._schema.returns] == ["bool"]


@rule("floor_divide")  # which lacks the tag
def pointwise(call: RuleContext) -> Any:
    out = (
        call.algebra.pointwise(call.title, *call.marks)
        if call.marks
        else shared(call.shape, call.title, (), range(len(call.shape)))
    )
    return numbered([out] * len(call.shapes))


def numbered(outputs: Sequence[Ownership]) -> list[Ownership]:
    """The outputs of one op are different functions, also where they have the same owners."""
    return [m.with_key(("output", i)) if i else m for i, m in enumerate(outputs)]


def unknown(call: RuleContext) -> list[Ownership]:
    """No rule: shared where all it reads is shared, and otherwise samples may have met in any way."""
    if not any(m.depends_on_batch for m in call.marks):
        sources = frozenset().union(*(m.sources for m in call.marks))
        return [
            shared(
                s, (call.title, [int(total(m.key.reshape(-1), 0)) for m in call.marks], i), sources
            )
            for i, s in enumerate(call.shapes)
        ]
    return [mixed(call, s, NO_RULE) for s in call.shapes]


def mixed(call: RuleContext, shape: Sequence[int], how: str) -> Ownership:
    """A value about whose elements nothing is known."""
    ones = np.ones([1] * len(shape), dtype=np.int32)
    key = np.broadcast_to(code(call.title), ones.shape)
    return call.algebra.result(shape, ones * MIXED, key, call.marks, how)


def independent(call: RuleContext) -> list[Ownership]:
    """Declared by the user: slice n of every output with a sample axis depends on slice n of the inputs only."""
    return [assumed(call.algebra, call.marks, s, call.title) for s in call.shapes]


def assumed(
    algebra: Propagation, inputs: Sequence[Ownership], shape: Sequence[int], title: object
) -> Ownership:
    """The marks of an output under the assumption of independence, or mixed where it has no sample axis."""
    dims = [m.sample_dim() for m in inputs if m.owned]
    dim = next(
        (d for d in dims if d is not None and d < len(shape) and shape[d] == algebra.samples), None
    )
    joint = [m for m in inputs if not m.mixed]
    view = [1] * len(shape)
    if dim is None:
        return algebra.result(
            shape,
            np.full(view, MIXED, dtype=np.int32),
            np.broadcast_to(code(title), view),
            inputs,
            "assumed",
        )
    view[dim] = algebra.samples
    owner = np.arange(algebra.samples, dtype=np.int32).reshape(view)
    return algebra.result(
        shape, owner, np.broadcast_to(code("assumed", title), view), joint, "assumed"
    )


# --- ops without a rule are taken apart -----------------------------------------------------------


def decomposition(op: Any) -> Callable[..., Any] | None:
    """PyTorch's own definition of an op in terms of simpler ones."""
    from torch._decomp import decomposition_table

    if op in decomposition_table:
        return decomposition_table[op]
    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"):
        return op.decompose
    return None


def stand_in(meta: Any) -> Tensor:
    """A tensor without contents of the same shape, dtype and strides."""
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")


ASSUMED_MODULES: dict[int, nn.Module] = {}


def assume_independent(what: Any) -> None:
    """Declare that a module, or an op, acts on each sample alone.

    ``what``: an ``nn.Module`` inside a model, or an op such as ``torch.ops.my.op.default``. Verdicts that rest on the
    declaration say so: their ``basis`` is "assumed", and ``structure.assumptions`` lists it. Raises ``InputError`` for
    anything else.
    """
    if isinstance(what, nn.Module):
        ASSUMED_MODULES[id(what)] = what
    elif isinstance(what, torch._ops.OpOverload):
        ASSUMED[what] = str(what)
    else:
        raise InputError(
            f"assume_independent takes an nn.Module or an op such as torch.ops.my.op.default; got {what!r}."
        )
