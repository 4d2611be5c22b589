"""Every op of PyTorch whose schema writes: asking a net around it changes nothing."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from op_writes import PAGE

from cases.ops.apart import CRASHED
from cases.ops.writes import REFUSED, RIGHT, UNREACHED, row_of, writing_ops
from unbatch.capture import isolation

EVERY = 48
NAMES = list(writing_ops())
ALLOWED = (RIGHT, REFUSED, UNREACHED, CRASHED)

# Ops that write to other arguments than the first, or to several.
OTHERS = ["_fused_moving_avg_obs_fq_helper.default", "embedding_renorm_.default"]


@pytest.mark.parametrize("name", [*NAMES[::EVERY], *OTHERS])
def test_some_ops_that_write(name):
    status, why = row_of(name)
    assert status in ALLOWED, why


@pytest.mark.parametrize("name", NAMES)
def test_every_op_that_writes_is_as_the_table_says(name):
    status, why = row_of(name)
    assert status in ALLOWED, why
    assert status == STATUSES.get(name, RIGHT), "the table is out of date"


def statuses_of_page():
    found = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        status = re.match(r"\*(.*?)\*: ", line)
        if status:
            for name in re.findall("`(.*?)`", line):
                found[name] = status[1]
    return found


STATUSES = statuses_of_page()


def test_a_write_that_is_not_undone_is_caught(monkeypatch):
    monkeypatch.setattr(isolation, "mutated", lambda op, args, kwargs: [])
    assert row_of("add_.Tensor")[0] == "changed"
