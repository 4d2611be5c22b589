"""The sweep over PyTorch's table of ops: no rule is wrong, and the page says what came of it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from op_sweep import line_of, lines_of_page, names_of_sweeps, row_of, statuses_in

from cases.ops.chains import chains, links
from cases.ops.claims import RAISED, WRONG, judge
from cases.ops.collisions import collision

EVERY = 32  # of the ops of the table, one in so many is quick
INSTALLED = names_of_sweeps()
LINES = {name: line for name, line in lines_of_page().items() if name in INSTALLED}


@pytest.mark.parametrize("name", list(LINES)[::EVERY])
def test_some_ops(name):
    row = row_of(name)
    assert not row.faulty, row.findings[0]


@pytest.mark.parametrize("name", list(LINES))
def test_every_op_is_as_the_page_says(name):
    row = row_of(name)
    assert not row.faulty, row.findings[0]
    assert statuses_in(line_of(row)) == statuses_in(LINES[name]), "the page is out of date"


def test_the_table_of_ops_leaves_settings_as_they_were():
    """Other tests of this process, and libraries that they try, may set flags of backends."""
    assert INSTALLED
    assert not torch.backends.flags_frozen()


def test_the_page_leaves_no_op_out():
    page = Path(__file__).parents[2] / "docs" / "reference" / "ops.md"
    named = page.read_text(encoding="utf-8")
    missing = [n for n in INSTALLED if f"`{n}`" not in named]
    assert not missing


@pytest.mark.parametrize("seed", range(10))
def test_chains_of_two_ops(seed):
    for trial in chains(300, seed):
        outcome = judge(trial)
        assert outcome.status not in (WRONG, RAISED), f"{trial.what}: {outcome.why}"


@pytest.mark.parametrize("seed", range(4))
def test_chains_of_four_ops(seed):
    for trial in chains(100, seed, 4):
        outcome = judge(trial)
        assert outcome.status not in (WRONG, RAISED), f"{trial.what}: {outcome.why}"


def test_links_are_many():
    assert len(links()) > 150


@pytest.mark.parametrize("kind", ["float", "int", "complex"])
@pytest.mark.parametrize("shapes", [[(4, 4)], [(4,), (4,)], [(2, 4, 4), (4,)]], ids=str)
def test_ops_do_not_share_keys(kind, shapes):
    found, count = collision(shapes, kind)
    assert count > 50
    assert not found
