"""Writes ``tests/cases/ops/derivatives.md``: `python tests/gradients/op_derivatives.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cases.ops.apart import CRASHED, RAISED
from cases.ops.derivatives import CHANGED, WRONG, line_of, names_of_ops, outcomes_of, page

PAGE = Path(__file__).parents[1] / "cases" / "ops" / "derivatives.md"

if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = []
    for name in names_of_ops():
        outcomes = outcomes_of(name)
        lines.append(line_of(name, outcomes))
        for form, status, why in outcomes:
            if status in (WRONG, CHANGED, RAISED, CRASHED):
                sys.stdout.write(f"{name} {form} | {status} | {why}\n")
    PAGE.write_text(page(lines), encoding="utf-8")
