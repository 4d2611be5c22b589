"""Numbers that a program keeps and goes on with, and what it asks of them.

A ``Counter`` stands for such a number while the program runs once. Arithmetic is followed, and each
use of what comes out (a comparison, an index, a value handed to PyTorch) is noted as a function of
the numbers with its outcome. With other numbers the program does the same as long as every function
has the same outcome: ``step % 100 == 0`` was false, and is. Only printing is not followed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from unbatch.capture.holders import alike

Compute = Callable[[Sequence[Any]], Any]

# Comparing with one of these is asking something of a number, and nothing else.
COMPARED = (int, float, str, type(None))


class Uses:
    """What a program has asked of numbers: functions of them, each with its outcome.

    ``printed``: whether any was made a text.
    """

    def __init__(self) -> None:
        self.outcomes: list[tuple[Compute, Any]] = []
        self.printed = False

    def counters(self, numbers: Sequence[Any]) -> list[Counter]:
        """Return what stands for the numbers."""
        return [Counter(itemgetter(i), number, self) for i, number in enumerate(numbers)]

    def agree(self, numbers: Sequence[Any]) -> bool:
        """Return whether other numbers would have had the same outcomes."""
        try:
            return all(alike(compute(numbers), outcome) for compute, outcome in self.outcomes)
        except (ArithmeticError, ValueError, TypeError):
            return False


class Counter:
    """Stands for a number, ``value``, which ``compute`` makes of those that the program keeps."""

    def __init__(self, compute: Compute, value: Any, uses: Uses) -> None:
        self.compute, self.value, self.uses = compute, value, uses

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The class of the number, for programs that ask whether it is one."""
        return type(self.value)

    def used(self, function: Callable[[Any], Any] = lambda value: value) -> Any:
        """Return a function of the value, and note that it is used."""
        outcome, compute = function(self.value), self.compute
        self.uses.outcomes.append((lambda numbers: function(compute(numbers)), outcome))
        return outcome

    def combined(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Return a function of numbers as a counter; with anything else, of the bare values."""
        if not all(map(_is_number, operands)):
            return function(*map(_bare, operands))
        try:
            value = function(*map(_value, operands))
        except ArithmeticError:
            self.used()
            raise

        def compute(numbers: Sequence[Any]) -> Any:
            return function(*[_at(operand, numbers) for operand in operands])

        result = Counter(compute, value, self.uses)
        if function in PARTIAL:
            result.used(lambda value: True)  # it can be computed
        return result

    def compared(self, function: Callable[..., Any], other: Any) -> Any:
        """Return the outcome of a comparison, and note it."""
        if not _is_number(other) and not isinstance(other, COMPARED):
            return function(self.used(), other)
        outcome = Counter(
            lambda numbers: function(_at(self, numbers), _at(other, numbers)),
            function(self.value, _value(other)),
            self.uses,
        )
        return outcome.used()

    def printed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a text, and note that there is one."""
        self.uses.printed = True
        return function(self.value, *arguments)

    def __repr__(self) -> str:
        return str(self.printed(repr))

    def __str__(self) -> str:
        return str(self.printed(str))

    def __format__(self, spec: str) -> str:
        return str(self.printed(format, spec))

    def __bool__(self) -> bool:
        return bool(self.used(bool))

    def __int__(self) -> int:
        return int(self.used(int))

    def __float__(self) -> float:
        return float(self.used(float))

    def __index__(self) -> int:
        return operator.index(self.used())

    def __hash__(self) -> int:
        return hash(self.used())

    def __round__(self, digits: Any = None) -> Any:
        return self.combined(round, self, *([] if digits is None else [digits]))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self


def _is_number(x: Any) -> bool:
    return type(x) in (Counter, int, float, bool)


def _value(x: Any) -> Any:
    return x.value if type(x) is Counter else x


def _bare(x: Any) -> Any:
    return x.used() if type(x) is Counter else x


def _at(x: Any, numbers: Sequence[Any]) -> Any:
    """Return what stands in place of ``x`` with other numbers."""
    return x.compute(numbers) if type(x) is Counter else x


# --- the methods of numbers -----------------------------------------------------------------------

ARITHMETIC = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv")},
    **{name: getattr(operator, name) for name in ("mod", "pow", "lshift", "rshift", "xor")},
    "and": operator.and_,
    "or": operator.or_,
}

# Those that have no result for some numbers.
PARTIAL = (operator.truediv, operator.floordiv, operator.mod, operator.pow, operator.lshift)

OF_ONE = {
    **{name: getattr(operator, name) for name in ("neg", "pos", "abs", "invert")},
    **{name: getattr(math, name) for name in ("floor", "ceil", "trunc")},
}


def _arithmetic(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    """Return a method; reflected, it gets its operands the other way."""

    def method(self: Counter, other: Any) -> Any:
        if reflected:
            return self.combined(function, other, self)
        return self.combined(function, self, other)

    return method


def _of_one(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: self.combined(function, self)


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.compared(function, other)


for _name, _function in ARITHMETIC.items():
    setattr(Counter, f"__{_name}__", _arithmetic(_function, False))
    setattr(Counter, f"__r{_name}__", _arithmetic(_function, True))

for _name, _function in OF_ONE.items():
    setattr(Counter, f"__{_name}__", _of_one(_function))

for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Counter, f"__{_name}__", _comparison(getattr(operator, _name)))
