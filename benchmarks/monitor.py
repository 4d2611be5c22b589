"""What a monitor adds to training: the demo's net on its digits, with and without, an epoch of each in turn.

By CPU time of the process, on one thread. Beside the ratio of the two stands what the monitor itself says; both runs
start from the same seed and have to end with the same weights, bit by bit. Run with `python benchmarks/monitor.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import unbatch as ub
from unbatch import demo

EPOCHS = 100
ROWS_ONLY = ("norms", "noise_scale")
SETTINGS: dict[str, dict[str, Any]] = {
    "every='auto' (the default)": {},
    "every='auto', share=0.02": {"share": 0.02},
    "every='auto', norms and noise scale": {"quantities": ROWS_ONLY},
    "every=2500": {"every": 2500},
    "every=100": {"every": 100},
}


@dataclass
class Training:
    """One run; ``seconds``: of CPU time in its epochs so far, which is the time that its monitor goes by.

    Between two calls of the monitor there may be an epoch of the other run, which is none of its training.
    """

    net: demo.Net
    optimizer: torch.optim.Optimizer
    monitor: ub.Monitor | None = None
    order: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))
    seconds: float = 0.0
    started: float = 0.0

    @staticmethod
    def of(options: dict[str, Any] | None) -> Training:
        torch.manual_seed(0)
        net = demo.Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        run = Training(net, optimizer)
        if options is not None:
            run.monitor = ub.Monitor(net, F.cross_entropy, clock=run.clock, **options)
        return run

    def clock(self) -> float:
        return self.seconds + time.process_time() - self.started

    def epoch(self, digits: demo.Digits) -> None:
        self.started = time.process_time()
        for batch in torch.randperm(len(digits.y), generator=self.order).split(demo.BATCH)[:-1]:
            X, y = digits.X[batch], digits.y[batch]
            self.optimizer.zero_grad()
            F.cross_entropy(self.net(X), y).backward()
            self.optimizer.step()
            if self.monitor is not None:
                self.monitor.step(X, y)
        self.seconds += time.process_time() - self.started


def measured(options: dict[str, Any], digits: demo.Digits, epochs: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        without, within = Training.of(None), Training.of({"path": path} | options)
        for i in range(epochs):
            for run in (without, within) if i % 2 else (within, without):
                run.epoch(digits)
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    pairs = zip(without.net.state_dict().values(), within.net.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "the monitor has changed the run"
    assert within.monitor is not None
    added = within.seconds / without.seconds - 1
    last = f"{len(steps)} (the last at step {steps[-1]})"
    return [f"{without.seconds:.2f} s", f"{added:.1%}", f"{within.monitor.overhead:.1%}", last]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    epochs = parser.parse_args(arguments).epochs
    torch.set_num_threads(1)
    digits = demo.load()
    Training.of({}).epoch(digits)  # what is loaded and compiled once belongs to no run
    print("| setting | training | added | by its own account | lines |\n| --- | --- | --- | --- | --- |")
    for name, options in SETTINGS.items():
        print("| " + " | ".join([name, *measured(options, digits, epochs)]) + " |", flush=True)


if __name__ == "__main__":
    main()
