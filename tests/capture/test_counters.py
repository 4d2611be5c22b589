"""A number that a program keeps: what is asked of it is noted, and has the same outcome or not."""

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch

from unbatch.capture.counters import ARITHMETIC, OF_ONE, Counter, Uses

ASKED: dict[str, Callable[[Any], Any]] = {
    "every third": lambda n: n % 3 == 0,
    "a warm-up": lambda n: n < 10,
    "a fall": lambda n: 0.9**n < 0.5,
    "a ring": lambda n: (n + 1) % 5 == 4,
    "the other way round": lambda n: 2 * n + 1 < 7,
    "one of some": lambda n: n in (3, 4),
    "one of a set": lambda n: n in {3, 4},
    "an index": lambda n: [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6][n],
    "a flag": lambda n: bool(n & 4),
    "the least": lambda n: min(n, 5) > 4,
    "a range": lambda n: len(range(n)),
    "rounded": lambda n: round(n / 4),
    "whole": lambda n: math.floor(n / 3) == 1,
    "a square root": lambda n: math.sqrt(n),
    "a part": lambda n: divmod(n, 4)[1] > 2,
    "a division": lambda n: 1 / (n - 5) > 0 if n != 5 else None,
    "a number of PyTorch": lambda n: float(torch.ones(1) * n),
    "its size": lambda n: abs(3 - n) > 1,
    "nothing": lambda n: n + 1 and None,
    "two of them": lambda n: (n * n - n) % 4 == 0,
}

NUMBERS = range(12)


def outcome(name: str, number: Any) -> Any:
    """What a program does with the answer."""
    answer = ASKED[name](number)
    return answer.used() if type(answer) is Counter else answer


@pytest.mark.parametrize("name", ASKED)
def test_numbers_agree_only_where_the_outcome_is_the_same(name):
    for start in NUMBERS:
        uses = Uses()
        (counter,) = uses.counters([start])
        first = outcome(name, counter)
        assert first == outcome(name, start)
        assert uses.agree([start])
        for number in NUMBERS:
            if uses.agree([number]):
                assert outcome(name, number) == first, (start, number)


@pytest.mark.parametrize("name", ["every third", "a warm-up", "a ring", "rounded", "nothing"])
def test_what_does_not_matter_is_not_asked(name):
    """Another number with the same outcome does agree."""
    uses = Uses()
    (counter,) = uses.counters([1])
    first = outcome(name, counter)
    same = [n for n in NUMBERS if ASKED[name](n) == first]
    assert len(same) > 1
    assert all(uses.agree([n]) for n in same)


@pytest.mark.parametrize("name", [*ARITHMETIC, *OF_ONE])
def test_arithmetic_is_that_of_numbers(name):
    function = {**ARITHMETIC, **OF_ONE}[name]
    operands = (5, 3) if name in ARITHMETIC else (5,)
    for place in range(len(operands)):
        uses = Uses()
        mixed: list[Any] = list(operands)
        (mixed[place],) = uses.counters([operands[place]])
        result = function(*mixed)
        assert type(result) is Counter
        assert result.value == function(*operands)
        moved = list(operands)
        moved[place] += 1
        assert result.compute([moved[place]]) == function(*moved)


def test_two_numbers_are_told_apart():
    uses = Uses()
    a, b = uses.counters([3, 5])
    assert a < b
    assert uses.agree([4, 5])
    assert not uses.agree([5, 5])


def test_a_number_that_has_no_result_any_more_does_not_agree():
    uses = Uses()
    (n,) = uses.counters([3])
    _ = 1 / (n - 5)
    assert uses.agree([4])
    assert not uses.agree([5])


def test_a_text_is_no_use_but_is_known():
    uses = Uses()
    (n,) = uses.counters([3])
    assert (f"{n} of 5", str(n), repr(n)) == ("3 of 5", "3", "3")
    assert uses.printed
    assert uses.agree([4])


def test_it_says_that_it_is_a_number():
    (n,) = Uses().counters([3])
    assert isinstance(n, int)
    assert not isinstance(n, float)


def test_a_comparison_that_is_not_noted_is_caught(monkeypatch):
    def compared(self: Counter, function: Any, other: Any) -> Any:
        return function(self.value, other)

    monkeypatch.setattr(Counter, "compared", compared)
    with pytest.raises(AssertionError):
        test_numbers_agree_only_where_the_outcome_is_the_same("every third")


def test_a_use_that_is_not_noted_is_caught(monkeypatch):
    monkeypatch.setattr(Counter, "used", lambda self, function=int: function(self.value))
    with pytest.raises(AssertionError):
        test_numbers_agree_only_where_the_outcome_is_the_same("a number of PyTorch")


def test_arithmetic_that_goes_astray_is_caught(monkeypatch):
    monkeypatch.setattr(
        Counter, "__add__", lambda self, other: self.combined(operator.sub, self, other)
    )
    with pytest.raises(AssertionError):
        test_numbers_agree_only_where_the_outcome_is_the_same("a ring")
