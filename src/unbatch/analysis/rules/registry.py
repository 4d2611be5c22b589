"""Which rule an op follows: the registry, what a rule gets to see, and ops without a rule.

A rule is a function from a ``RuleContext`` to the ownership of its outputs; it speaks in the four
operations of ``domain/propagation.py``. The rules themselves live in the other files of this
folder. An op that has no rule is decomposed; one that cannot be decomposed is *unknown*, never
assumed harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbatch import errors
from unbatch.analysis.domain.ownership import (
    MIXED,
    Ownership,
    batched,
    code,
    collapse,
    digest,
    shared,
)
from unbatch.analysis.domain.propagation import Propagation
from unbatch.capture import ops
from unbatch.capture.ops import base_name
from unbatch.errors import InputError

Rule = Callable[["RuleContext"], Any]

# By the name of an ATen op, without overload and without a trailing underscore.
RULES: dict[str, Rule] = {}

# By op overload, registered from outside.
CUSTOM: dict[Any, Rule] = {}

# Ops declared to act on each sample alone.
ASSUMED: dict[Any, str] = {}

NO_RULE = "no rule"

EVERY = "*"  # all arguments of an op


@dataclass(frozen=True)
class Arguments:
    """Which arguments a rule takes account of itself; all others enter the keys of the results.

    ``counted``: they need not enter, since the rule says what they do to each element (as dims and
    shapes do). ``ignored``: tensors whose contents do not matter, even if they depend on the batch.
    ``apart``: by place of a result, tensors that have no part in that one.
    """

    counted: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    apart: Mapping[int, frozenset[str]] = field(default_factory=dict)

    def counts(self, name: str) -> bool:
        """Tell whether the rule takes account of an argument."""
        return name in self.counted or EVERY in self.counted

    def leaves_out(self, name: str, place: int) -> bool:
        """Tell whether a tensor has no part in a result, whatever it depends on."""
        named = self.ignored | self.apart.get(place, frozenset())
        return name in named or EVERY in named


# By rule; one that is not here has to be told of nothing.
ARGUMENTS: dict[Rule, Arguments] = {}


# --- what a rule sees -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Types:
    """The types of an op's tensors: numbers may pass between two of them changed.

    ``arguments``: by name, of the tensors there. ``results``: of each result.
    """

    arguments: Mapping[str, frozenset[torch.dtype]] = field(default_factory=dict)
    results: Sequence[torch.dtype] = ()


def family(dtype: torch.dtype) -> str:
    """Return the family of a type: floating-point types are one, each integer type is its own."""
    if dtype.is_floating_point:
        return "floating"
    if dtype.is_complex:
        return "complex"
    return str(dtype)


@cache
def rounds(dtype: torch.dtype, source: torch.dtype) -> bool:
    """Tell whether numbers of ``source`` are rounded, or overflow, in another type."""
    if not _is_rounded(dtype) or not _is_rounded(source):
        return False
    # Neither of bfloat16 and float16 holds the numbers of the other.
    there, here = torch.finfo(dtype), torch.finfo(source)
    return there.eps > here.eps or there.max < here.max


def _is_rounded(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


@dataclass
class RuleContext:
    """One op at work: its arguments by schema name and the shapes it returned.

    ``arguments``: with ownership in place of tensors. ``values[name]``: the concrete integers and
    booleans of an argument, where the recorder kept them. A rule that looks at them makes the
    result depend on them. ``look``: at a function of some values, and at no more of them.
    ``function``: the function of PyTorch that the program called, of which the op is a part.
    ``types``: of tensors.
    """

    algebra: Propagation
    op: Any
    arguments: dict[str, Any]
    shapes: list[tuple[int, ...]]
    values: Mapping[str, Any] = field(default_factory=dict)
    look: Callable[[str, Callable[[Any], Any]], Any] | None = None
    function: str = ""
    types: Types = field(default_factory=Types)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def occurs(self, name: str, number: int) -> bool:
        """Tell whether a number is among the values of an argument; True if they are not known."""

        def contains(values: Any) -> bool:
            # Not known means that it may occur.
            return values is None or bool((np.asarray(values) == number).any())

        return self.sees(name, contains)

    def sees(self, name: str, predicate: Callable[[Any], bool]) -> bool:
        """Tell whether a predicate holds of the values of an argument (of None if not known)."""
        if self.look is not None:
            return bool(self.look(name, predicate))
        return bool(predicate(self.values.get(name)))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first output."""
        return self.shapes[0]

    @property
    def name(self) -> str:
        """The name of the op, without overload and trailing underscore."""
        return base_name(self.op)

    @property
    def tensors(self) -> list[Ownership]:
        """The ownership of all tensor arguments, in order."""
        tensors: list[Ownership] = []
        for argument in self.arguments.values():
            if isinstance(argument, Ownership):
                tensors.append(argument)
            elif isinstance(argument, list | tuple):
                # Lists of indices have None for a dim without, and lists of sizes have numbers.
                tensors += [m for m in argument if isinstance(m, Ownership)]
        return tensors

    @property
    def depends_on_batch(self) -> bool:
        """Whether any tensor argument would be another in another batch."""
        return any(m.depends_on_batch for m in self.tensors)

    def named(self, *names: str) -> list[Ownership]:
        """Return the ownership of the arguments with these names, as far as they are tensors."""
        tensors = []
        for name in names:
            argument = self.arguments.get(name)
            if isinstance(argument, Ownership):
                tensors.append(argument)
        return tensors

    @property
    def constants(self) -> tuple[Any, ...]:
        """All other arguments; part of what function the op is."""
        # Printed, since arguments such as lists cannot be hashed.
        return tuple((k, repr(a)) for k, a in self.arguments.items() if not has_tensors(a))

    @property
    def title(self) -> tuple[Any, ...]:
        """The name of the function that the op is of its tensors."""
        return (self.name, self.constants)

    def dims(self, name: str = "dim", of: str = "self") -> list[int]:
        """Return a dim argument as a list of non-negative ints; all dims if absent or empty."""
        ndim = len(self[of].shape)
        dim = self[name]
        if dim is None or dim == []:
            return list(range(ndim))
        if not ndim:
            return []
        if isinstance(dim, int):
            return [dim % ndim]
        # In the order given: some ops (roll, permute) pair dims with something.
        return [d % ndim for d in dim]


def has_tensors(argument: Any) -> bool:
    """Tell whether an argument is a tensor, or a list with one."""
    if isinstance(argument, list | tuple):
        return any(isinstance(m, Ownership) for m in argument)
    return isinstance(argument, Ownership)


# --- the registry ---------------------------------------------------------------------------------


def rule(
    *names: str, counted: str = "", ignored: str = "", apart: Mapping[int, str] | None = None
) -> Callable[[Rule], Rule]:
    """Register a rule for ATen ops, named in words; a second rule for the same name is refused.

    ``counted``, ``ignored``, ``apart``: names of arguments, in words, see ``Arguments``.
    """
    results = {place: frozenset(words.split()) for place, words in (apart or {}).items()}
    arguments = Arguments(frozenset(counted.split()), frozenset(ignored.split()), results)

    def register(function: Rule) -> Rule:
        ARGUMENTS[function] = arguments
        for name in " ".join(names).split():
            assert name not in RULES, f"two rules for {name}"
            RULES[name] = function
        return function

    return register


def register_rule(op: Any, function: Rule, *, replace: bool = False) -> None:
    """Teach the analyser an op of your own.

    ``op``: a ``torch._ops.OpOverload`` such as ``torch.ops.mylib.op.default``. ``function`` takes a
    ``RuleContext`` and returns the ownership of the output (a list for several outputs), made with
    ``call.algebra``: ``pointwise(name, *arguments)``, ``reduce(name, argument, dims, keepdim)``,
    ``scan(name, argument, dims)``, ``contract(...)``. The structures that rest on it list it.
    Raises ``InputError`` for something that is not an op, or has a rule already.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise errors.InputError(errors.MSG_UNKNOWN_RULE.format(value=op))
    # By its base name, as a rule of ours serves all overloads of an op, and its in-place variants.
    has_rule = op in CUSTOM or base_name(op) in RULES
    if has_rule and not replace:
        raise errors.InputError(errors.MSG_RULE_TAKEN.format(value=op))
    CUSTOM[op] = function


def lookup(op: Any) -> Rule | None:
    """Return the rule of an op; None if it has none and is to be decomposed."""
    # From what the user says to what PyTorch says: a rule of the user's, a declaration, a rule of
    # ours, the tag "pointwise". What gives Python a boolean has no elements to own.
    if op in CUSTOM:
        return CUSTOM[op]  # before all else, so that a rule can be replaced
    if op in ASSUMED:
        return independent
    name = base_name(op)
    if name in RULES:
        return RULES[name]
    if ops.is_pointwise(op):
        return pointwise
    if answers(op):
        return unknown
    return None


def answers(op: Any) -> bool:
    """Tell whether the op does nothing but give Python a boolean (``torch.equal``)."""
    returns = op._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "bool"


# --- words that many rules use --------------------------------------------------------------------


@rule("floor_divide", counted=EVERY)  # which lacks the tag
def pointwise(call: RuleContext) -> Any:
    """Every output is one function of the elements at its place."""
    # An op of numbers alone makes elements that are all alike.
    if call.tensors:
        out = call.algebra.pointwise(call.title, *call.tensors)
    else:
        out = filled(call.shape, call.title)
    return numbered([out] * len(call.shapes))


def filled(shape: Sequence[int], name: object, sources: Iterable[str] = ()) -> Ownership:
    """Return a shared value whose elements are all equal (or, for noise, equally distributed)."""
    return shared(shape, name, sources, range(len(shape)))


def summary(
    call: RuleContext,
    name: object,
    x: Ownership,
    dims: Iterable[int],
    keepdim: bool = False,
    how: str = "ordered",
) -> Ownership:
    """Return one entry in place of ``dims``, which depends on all that lies along them."""
    # A scan makes the entries along ``dims`` alike but for their index, so one can stand for all.
    dims = list(dims)
    out = collapse(call.algebra.scan(name, x, dims, how), dims, keepdim)
    return standing_for(out, x)


def standing_for(out: Ownership, x: Ownership) -> Ownership:
    """Return ``out`` as what stands for ``x``: who uses it uses all numbers of ``x``."""
    if not x.statistics:
        return out
    return replace(out, stands_for=x.stands_for or x)


def unused(call: RuleContext) -> list[Ownership]:
    """Return all outputs but the first as memory of a kernel, which says nothing of samples."""
    return shared_outputs(call, "unused")[1:]


def shared_outputs(call: RuleContext, name: object) -> list[Ownership]:
    """Return all outputs as constants of one name."""
    return [shared(shape, name) for shape in call.shapes]


def stack(algebra: Propagation, scalars: Sequence[Ownership]) -> Ownership:
    """Return a vector of scalars."""
    owners = []
    keys = []
    for s in scalars:
        owners.append(s.owner)
        keys.append(s.key)
    return algebra.result((len(scalars),), np.stack(owners), np.stack(keys), scalars, "joined")


def numbered(outputs: Sequence[Ownership]) -> list[Ownership]:
    """Return the outputs of one op as different functions, also where they have the same owners."""
    # The first keeps its key: an op with one output is the same function as one that returns more
    # beside it.
    named = list(outputs)
    for i in range(1, len(named)):
        named[i] = named[i].with_key(("output", i))
    return named


def known_for_every_batch(x: Ownership) -> bool:
    """Tell whether a value, and with it its numbers, is the same for every batch."""
    return not x.depends_on_batch and not x.sources & {"inputs", "targets"}


def unknown(call: RuleContext) -> list[Ownership]:
    """No rule: shared if all it reads is shared; otherwise samples may be mixed in any way."""
    # The one thing that is sure of any op: made of what no sample enters, its results have no
    # sample in them either.
    if call.depends_on_batch:
        return all_mixed(call, NO_RULE)
    return all_shared(call)


def all_shared(call: RuleContext) -> list[Ownership]:
    """Return outputs about which is known that no sample enters, and what they are made from."""
    sources: frozenset[str] = frozenset()
    keys = []
    for m in call.tensors:
        sources |= m.sources
        keys.append(digest(m))
    return [shared(s, (call.title, keys, i), sources) for i, s in enumerate(call.shapes)]


def all_mixed(call: RuleContext, how: str) -> list[Ownership]:
    """Return outputs about whose elements nothing is known."""
    return [mixed(call, shape, how) for shape in call.shapes]


def mixed(call: RuleContext, shape: Sequence[int], how: str) -> Ownership:
    """Return a value about whose elements nothing is known; ``how`` samples became mixed."""
    # One entry for all elements: which of them depends on which samples is not known anyway.
    ones = np.ones([1] * len(shape), dtype=np.int32)
    key = np.broadcast_to(code(call.title), ones.shape)
    return call.algebra.result(shape, ones * MIXED, key, call.tensors, how)


# --- what the user declares -----------------------------------------------------------------------


# By identity; the module is kept, so that no other one gets its number.
ASSUMED_MODULES: dict[int, nn.Module] = {}


def independent(call: RuleContext) -> list[Ownership]:
    """Slice n of every output with a sample axis depends on slice n of the inputs only."""
    return [assumed(call.algebra, call.tensors, shape, call.title) for shape in call.shapes]


def assumed(
    algebra: Propagation, inputs: Sequence[Ownership], shape: Sequence[int], title: object
) -> Ownership:
    """Return an output under the assumption of independence; mixed if it has no sample axis."""
    dim = _declared_dim(algebra, inputs, shape)
    if dim is None:
        view = [1] * len(shape)
        owner = np.full(view, MIXED, dtype=np.int32)
        key = np.broadcast_to(code(title), view)
        return algebra.result(shape, owner, key, inputs, "assumed")
    # One key for all samples: declared is also that slices are the same function of their samples.
    out = batched(shape, dim, title)
    key = np.broadcast_to(code("assumed", title), out.owner.shape)
    # What was mixed among the inputs is separate by declaration, and is not handed on.
    separate = [m for m in inputs if not m.mixed]
    return algebra.result(shape, out.owner, key, separate, "assumed")


def _declared_dim(
    algebra: Propagation, inputs: Sequence[Ownership], shape: Sequence[int]
) -> int | None:
    """The first sample axis of an input that an output can have as well."""
    for m in inputs:
        if not m.owned:
            continue
        dim = m.sample_dim()
        if dim is not None and dim < len(shape) and shape[dim] == algebra.samples:
            return dim
    return None


def assume_independent(what: Any) -> None:
    """Declare that a module, or an op, acts on each sample alone.

    ``what``: an ``nn.Module`` inside a model, or an op such as ``torch.ops.my.op.default``.
    Verdicts that rest on the declaration say so: their ``basis`` is "assumed", and
    ``structure.assumptions`` lists it. Raises ``InputError`` for anything else.
    """
    if isinstance(what, nn.Module):
        ASSUMED_MODULES[id(what)] = what
    elif isinstance(what, torch._ops.OpOverload):
        ASSUMED[what] = str(what)
    else:
        raise InputError(
            "assume_independent takes an nn.Module or an op such as torch.ops.my.op.default; "
            f"got {what!r}."
        )


# --- ops without a rule are decomposed ------------------------------------------------------------


def decomposition(op: Any) -> Callable[..., Any] | None:
    """Return PyTorch's own definition of an op in terms of simpler ones, if there is one."""
    # Imported late: the table is large, and most programs consist of ops with rules.
    from torch._decomp import decomposition_table

    if op in decomposition_table:
        return decomposition_table[op]
    if ops.is_composite(op):
        return op.decompose
    return None


def is_declared(op: Any) -> bool:
    """Tell whether the user says what an op does, by a rule or by a declaration."""
    return op in CUSTOM or op in ASSUMED


def stand_in(meta: Any) -> Tensor:
    """Return a tensor without contents of the same shape, dtype and strides."""
    return torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device="meta")
