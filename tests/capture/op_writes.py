"""`python tests/capture/op_writes.py` writes the table ``tests/cases/ops/writes.md``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases.ops.apart import RAISED
from cases.ops.writes import CHANGED, page, row_of, writing_ops

PAGE = Path(__file__).parents[1] / "cases" / "ops" / "writes.md"

if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = []
    for name in writing_ops():
        status, why = row_of(name)
        rows.append((name, status))
        if status in (CHANGED, RAISED):
            sys.stdout.write(f"{name} | {status} | {why}\n")
    PAGE.write_text(page(rows), encoding="utf-8")
