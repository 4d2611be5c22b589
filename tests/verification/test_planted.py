"""Planted bugs: each makes the analyser wrong about a small program, and the checkers have to say
so.

Three checkers are held to it: `Problem.verify()`, the checker of the case tables, and the oracle of
the property tests.
"""

import pytest

from cases.planted import CHECKERS, PLANTED
from unbatch.verification import verify


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("planted", [pytest.param(p, id=p.name) for p in PLANTED])
def test_caught(planted, checker, monkeypatch):
    # The trial of what is proved would find it before (test_trial.py): each checker on its own.
    monkeypatch.setattr(verify, "tried", lambda structure, *_: structure)
    planted.plant(monkeypatch)
    problem = planted.problem()
    assert getattr(problem.structure, planted.verdict).status == "holds", "the bug does nothing"
    with pytest.raises(AssertionError):
        CHECKERS[checker](planted, problem)


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("planted", [pytest.param(p, id=p.name) for p in PLANTED])
def test_content_without_the_bug(planted, checker):
    problem = planted.problem()
    assert getattr(problem.structure, planted.verdict).status == "fails"
    CHECKERS[checker](planted, problem)
