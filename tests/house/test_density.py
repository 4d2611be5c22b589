"""One thought a line: what the package may ask of a reader, and that each excess is noticed."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from density import Density, measure, sources

PACKAGE = Path(__file__).parents[2] / "src" / "unbatch"

# Per 100 lines of code, measured beside lineax, equinox, autograd and curvlinops.
MOST = {"comprehensions": 3.0, "nested": 0.1, "conditionals": 1.5}
MOST_BRANCHES = 12
MOST_LINES = 60
LEAST_COMMENTS = 8.0


def excesses(density: Density) -> Iterator[str]:
    """What goes beyond the budget, in words."""
    for name, most in MOST.items():
        share = density.per_hundred(getattr(density, name))
        if share > most:
            yield f"{name}: {share:.2f} in 100 lines of code, where {most} are allowed"
    for function in density.functions:
        if function.branches > MOST_BRANCHES:
            yield f"{function.place} has {function.branches} branches, not at most {MOST_BRANCHES}"
        if function.body > MOST_LINES:
            yield f"{function.place} has {function.body} lines, not at most {MOST_LINES}"
    if density.long_lines:
        yield f"{density.long_lines} lines are longer than 100 columns"
    comments = density.per_hundred(density.comments)
    if comments < LEAST_COMMENTS:
        short = LEAST_COMMENTS * density.code / 100 - density.comments
        yield f"comments: {comments:.2f} for 100 lines of code: {short:.0f} lines more are due"


def test_the_package_stays_within_its_budget():
    density = measure(sources(PACKAGE))
    assert density.files > 100, "the package was not found, so nothing would be checked"
    assert not (found := list(excesses(density))), "\n".join(found)


CALM = "# why\nx = 1\n" * 10
BRANCHY = "def f(x):\n" + "".join(f"    if x == {n}:\n        return {n}\n" for n in range(13))
PLANTED = {
    "comprehensions": CALM + "y = [n for n in range(3)]\n",
    "nested": CALM * 10 + "y = [[n for n in m] for m in z]\n",
    "conditionals": CALM + "y = 1 if x else 2\n",
    "branches": CALM * 10 + BRANCHY,
    "lines": CALM * 10 + "def f(x):\n" + "    x += 1  # why\n" * 61,
    "columns": CALM + "x = " + "1" * 100 + "\n",
    "comments": "x = 1\n" * 10,
}


def test_a_calm_file_is_within_the_budget():
    assert list(excesses(measure([("calm.py", CALM)]))) == []


@pytest.mark.parametrize("name", PLANTED)
def test_an_excess_is_noticed(name):
    assert any(name in excess for excess in excesses(measure([("planted.py", PLANTED[name])])))
