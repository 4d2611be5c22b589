"""What one checkout of unbatch costs beside another: the same questions, asked in turns in one run.

    python benchmarks/versions.py --base ../other-checkout
    python benchmarks/versions.py --base ../other-checkout --workloads W1,W6 --rounds 9

One process for each checkout, on one thread. In every round both answer the same question one after
the other, in alternating order, and the figure is the median over the rounds of the ratio of their
CPU times. "first" makes a new problem on a new copy of the model, records, judges and answers; a
"loop" trains a copy for some steps and asks for squared norms at each, on a batch of its own; all
others are asked again of the same problem.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
QUANTITIES = (
    "first structure",
    "first rows",
    "rows",
    "copy",
    "norms",
    "squares",
    "variance",
    "diagonal",
    "product",
    "spectrum",
    "loop",
    "copy loop",
)
STEPS = 10  # of a training loop
SMALL = {"W6": 16, "W5": 8, "W1": 64, "W2": 32, "W3": 32, "W4": 32, "W7": 8}  # samples


def questions(workload: Any, samples: int) -> dict[str, Callable[[], Any]]:
    """What is asked of the checkout that this process has imported."""
    import torch
    import torch.nn.functional as F

    import unbatch as ub

    model, X, y = workload.build(samples)
    problem = ub.Problem(model, F.cross_entropy, (X, y))
    G = problem.ggn()
    v = torch.ones(G.shape[1])
    squared_norms = getattr(ub, "SquaredNorms", None) or ub.Norms  # its name before 0.2

    def fresh() -> ub.Problem:
        return ub.Problem(copy.deepcopy(model), F.cross_entropy, (X, y))

    return {
        "first structure": lambda: fresh().structure,
        "first rows": lambda: fresh().gradients(),
        "rows": problem.gradients,
        "copy": lambda: problem.gradients(by="copy"),
        "norms": lambda: problem.compute(squared_norms()),
        "squares": lambda: problem.compute(ub.SumOfSquares()),
        "variance": lambda: problem.compute(ub.Variance()),
        "diagonal": lambda: problem.compute(ub.DiagGGN()),
        "product": lambda: G @ v,
        "spectrum": lambda: problem.ggn().eigvalsh(),
        "loop": training(workload, samples, squared_norms()),
        "copy loop": training(workload, samples, squared_norms(), by="copy"),
    }


def training(workload: Any, samples: int, norms: Any, **how: str) -> Callable[[], None]:
    """Return what trains a model for some steps and asks for squared norms at each."""
    import torch
    import torch.nn.functional as F

    import unbatch as ub

    model, X, y = workload.build(samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    problem = ub.Problem(model, F.cross_entropy, (X, y))
    problem.compute(norms, **how)

    def train() -> None:
        for step in range(STEPS):
            batch = X.roll(step, 0), y.roll(step, 0)
            problem.with_batch(*batch).compute(norms, **how)
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()

    return train


def work() -> None:
    """Answer the questions that come in, a line each, with seconds of CPU time."""
    import warnings

    from lib.interleaved import keep_memory
    from lib.workloads import WORKLOADS

    warnings.simplefilter("ignore")
    keep_memory()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # both on the same core
    asked: dict[tuple[str, int], dict[str, Callable[[], Any]]] = {}
    for line in sys.stdin:
        name, samples, quantity = line.rstrip("\n").split("\t")
        key = (name, int(samples))
        if key not in asked:
            asked = {key: questions(WORKLOADS[name], int(samples))}
        start = time.process_time()
        asked[key][quantity]()
        print(time.process_time() - start, flush=True)


class Worker:
    """A process that has imported the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        paths = [str(checkout / "src"), str(ROOT / "benchmarks")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--work"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True)

    def seconds(self, *question: object) -> float:
        """CPU time of one answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\t".join(map(str, question)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process of a checkout ended at the question {question}.")
        return float(answer)


def ratio(
    here: Worker, base: Worker, question: Sequence[object], rounds: int
) -> tuple[float, float]:
    """Median of this checkout's time by the other's, and this one's seconds."""
    pair = (here, base)
    for worker in pair:
        worker.seconds(*question)  # buffers and caches
    ratios, own = [], []
    for _ in range(rounds):
        # Who answers second is some per cent slower, so that a round asks in both orders.
        times: dict[Worker, float] = dict.fromkeys(pair, 1.0)
        for worker in (*pair, *pair[::-1]):
            times[worker] *= worker.seconds(*question)
        ratios.append((times[here] / times[base]) ** 0.5)
        own.append(times[here] ** 0.5)
    return statistics.median(ratios), statistics.median(own)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a line for each question."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", type=Path, help="the other checkout")
    parser.add_argument("--workloads", default=",".join(SMALL))
    parser.add_argument("--quantities", default=",".join(QUANTITIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=4, help="of processes")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work()
        return
    if options.base is None or not (options.base / "src" / "unbatch").is_dir():
        parser.error(f"--base takes a checkout that holds src/unbatch; got {options.base}")
    print("| workload | question | seconds | by the other's | by pair |\n|---|---|---|---|---|")
    for name in options.workloads.split(","):
        found: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.pairs):
            # The process that is started second is some per cent faster: they take turns.
            if number % 2:
                base = Worker(options.base.resolve())
                here = Worker(ROOT)
            else:
                here = Worker(ROOT)
                base = Worker(options.base.resolve())
            for quantity in options.quantities.split(","):
                measured = ratio(here, base, (name, SMALL[name], quantity), options.rounds)
                found.setdefault(quantity, []).append(measured)
            here.process.terminate()
            base.process.terminate()
        for quantity, pairs in found.items():
            ratios = [by for by, _ in pairs]
            own = statistics.median(seconds for _, seconds in pairs)
            listed = " ".join(f"{by:.2f}" for by in ratios)
            middle = statistics.median(ratios)
            print(f"| {name} | {quantity} | {own:.4f} | {middle:.3f} | {listed} |", flush=True)


if __name__ == "__main__":
    main()
