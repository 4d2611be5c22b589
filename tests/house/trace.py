"""Which rooms a question enters: functions, files and wings in the order of their first call.

Run as a script, it asks a small net with two batch norms for its structure, its gradients and a GGN
diagonal: ``python tests/house/trace.py``.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import unbatch as ub

PACKAGE = Path(ub.__file__).parent


@dataclass
class Trace:
    """What ran: files, functions, and calls that lead from one file into another."""

    files: dict[str, None] = field(default_factory=dict)
    functions: set[CodeType] = field(default_factory=set)
    crossings: Counter[tuple[str, str]] = field(default_factory=Counter)

    def seen(self, frame: FrameType, event: str, _: Any) -> None:
        """Count a call, for ``sys.setprofile``."""
        if event != "call":
            return
        name = file_of(frame)
        if name is None or frame.f_code.co_name.startswith("<"):
            return
        self.files[name] = None
        self.functions.add(frame.f_code)
        caller = frame.f_back
        while caller is not None and file_of(caller) is None:
            caller = caller.f_back
        origin = None if caller is None else file_of(caller)
        if origin is not None and origin != name:
            self.crossings[origin, name] += 1

    @property
    def wings(self) -> list[str]:
        """In the order of the first call."""
        return list(dict.fromkeys(wing(name) for name in self.files))

    @property
    def between_wings(self) -> int:
        """Crossings that lead from one wing into another."""
        total = 0
        for (origin, name), count in self.crossings.items():
            if wing(origin) != wing(name):
                total += count
        return total

    @property
    def both_ways(self) -> int:
        """Pairs of wings that call each other."""
        pairs = {(wing(origin), wing(name)) for origin, name in self.crossings}
        return sum((b, a) in pairs for a, b in pairs if a < b)


def file_of(frame: FrameType) -> str | None:
    """The file of the package that a frame runs in."""
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


def wing(name: str) -> str:
    """The folder of a file."""
    return name.partition("/")[0]


def traced(question: Callable[[], Any]) -> Trace:
    """Ask, and write down what ran."""
    trace = Trace()
    before = sys.getprofile()
    sys.setprofile(trace.seen)
    try:
        question()
    finally:
        sys.setprofile(before)
    return trace


def problem() -> ub.Problem:
    """Linear, batch norm, ReLU, twice, and a linear layer; 6 samples, cross-entropy."""
    torch.manual_seed(0)
    widths = (4, 5, 5)
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(5, 3))
    return ub.Problem(model, nn.functional.cross_entropy, (torch.randn(6, 4), torch.arange(6) % 3))


def main() -> None:
    """Print a line for each question."""
    asked = problem()
    questions: dict[str, Callable[[], Any]] = {
        "structure": lambda: asked.structure,
        "gradients() afterwards": asked.gradients,
        "ggn().diag() afterwards": lambda: asked.ggn().diag(),
    }
    print("| question | files | wings | functions | crossings | between wings | wings both ways |")
    print("|---|---|---|---|---|---|---|")
    for name, question in questions.items():
        trace = traced(question)
        cells = [len(trace.files), len(trace.wings), len(trace.functions)]
        cells += [sum(trace.crossings.values()), trace.between_wings, trace.both_ways]
        print(f"| {name} |", " | ".join(map(str, cells)), "|")
        print(f"  {' → '.join(trace.wings)}")


if __name__ == "__main__":
    main()
