"""The overhead of a monitor in training: the demo's net on its digits, with and without, by turns.

    python benchmarks/monitor_overhead.py            measures and prints the table
    python benchmarks/monitor_overhead.py --write    writes results/monitor.json as well

By CPU time of the process, on one thread. Beside the ratio of the two stands what the monitor
itself says; both runs start from the same seed and have to end with the same weights, bit by bit.
Short runs are repeated, and the median counts: a monitor asks at the first call, and what that
costs does not depend on how long the training will be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import overview
import unbatch as ub
from lib.interleaved import facts
from unbatch.cli import demo

RESULTS = Path(__file__).resolve().parent / "results" / "monitor.json"
TURN = 44  # steps of one run before it is the other's turn: an epoch
LONG, DEMO, SHORT = (
    4400,
    264,
    50,
)  # steps: a hundred epochs, as many as the demo trains, and hardly any
REPEATS = {LONG: 1, DEMO: 5, SHORT: 9}
ROWS_ONLY = ("squared_norms", "noise_scale")
AUTO = "every='auto' (the default)"
CASES: list[tuple[str, int, dict[str, Any]]] = [
    (AUTO, LONG, {}),
    (AUTO, DEMO, {}),
    (AUTO, SHORT, {}),
    ("every='auto', share=0.02", LONG, {"share": 0.02}),
    ("every='auto', squared norms and noise scale", LONG, {"quantities": ROWS_ONLY}),
    ("every='auto', squared norms and noise scale", SHORT, {"quantities": ROWS_ONLY}),
    ("every=2500", LONG, {"every": 2500}),
    ("every=100", LONG, {"every": 100}),
]


@dataclass
class Training:
    """One run; ``seconds``: its CPU time so far, which is also the clock of its monitor.

    Between two calls of the monitor there may be a turn of the other run, which is none of its
    training.
    """

    net: demo.Net
    optimizer: torch.optim.Optimizer
    batches: Iterator[tuple[Tensor, Tensor]]
    monitor: ub.Monitor | None = None
    seconds: float = 0.0
    started: float = 0.0

    @staticmethod
    def of(digits: demo.Digits, options: dict[str, Any] | None) -> Training:
        torch.manual_seed(0)
        net = demo.Net()
        run = Training(
            net, torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), batches(digits)
        )
        if options is not None:
            run.monitor = ub.Monitor(net, F.cross_entropy, clock=run.clock, **options)
        return run

    def clock(self) -> float:
        return self.seconds + time.process_time() - self.started

    def turn(self, steps: int) -> None:
        self.started = time.process_time()
        for _ in range(steps):
            X, y = next(self.batches)
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(X), y).backward()
            self.optimizer.step()
            if self.monitor is not None:
                self.monitor.step(X, y)
        self.seconds += time.process_time() - self.started


def batches(digits: demo.Digits) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.Generator().manual_seed(1)
    while True:
        for batch in torch.randperm(len(digits.y), generator=order).split(demo.BATCH)[:-1]:
            yield digits.X[batch], digits.y[batch]


def measured(options: dict[str, Any], digits: demo.Digits, steps: int) -> dict[str, float]:
    """Run one pair: seconds of training and of the first question, shares, and number of lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        without, within = Training.of(digits, None), Training.of(digits, {"path": path} | options)
        for i, done in enumerate(range(0, steps, TURN)):
            for run in (without, within) if i % 2 else (within, without):
                run.turn(min(TURN, steps - done))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
    pairs = zip(without.net.state_dict().values(), within.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the monitor has changed the run"
    assert within.monitor is not None
    assert within.monitor.overhead is not None
    added = within.seconds / without.seconds - 1
    first, own = lines[0]["seconds"], within.monitor.overhead
    return {
        "training": without.seconds,
        "first": first,
        "added": added,
        "own": own,
        "lines": len(lines),
    }


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(run[what] for run in runs) for what in runs[0]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write", action="store_true", help="write the figures that the table is made of"
    )
    write = parser.parse_args(arguments).write
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ub.MixedSamplesWarning)  # the net has batch norm
    digits = demo.load()
    Training.of(digits, {}).turn(TURN)  # what is loaded and compiled once belongs to no run
    cases = []
    for setting, steps, options in CASES:
        found = medians([measured(options, digits, steps) for _ in range(REPEATS[steps])])
        cases.append({"setting": setting, "steps": steps} | found)
    data = facts(1, {}) | {"repeats": REPEATS, "cases": cases}
    print(overview.monitor(data))
    if write:
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
