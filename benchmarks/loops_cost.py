"""What the structure of programs with loops costs: loops that Python ends, in the model or the loss.

    PYTHONPATH=tests python benchmarks/loops_cost.py              prints the page
    PYTHONPATH=tests python benchmarks/loops_cost.py --write      writes it, and results/loops.json

The programs are those of `tests/cases/loops.py`, and the unit is a plain step of each, a forward and
a backward pass. Process CPU time on one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import unbatch as ub
from cases.loops import LOOPS, VERDICTS
from lib.interleaved import facts

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "loops.md"
RESULTS = ROOT / "benchmarks" / "results" / "loops.json"
STEPS = 5  # of which the median is the unit


def _seconds(measured: Callable[[], object]) -> float:
    start = time.process_time()
    measured()
    return time.process_time() - start


def plain(problem: ub.Problem) -> None:
    program = problem.program
    program.loss(program.model(problem.inputs), problem.targets).backward()


def measure(name: str) -> dict[str, Any]:
    problem = LOOPS[name].problem()
    unit = statistics.median(_seconds(lambda: plain(problem)) for _ in range(STEPS))
    structure_seconds = _seconds(lambda: problem.structure)
    verify_seconds = _seconds(problem.verify)
    verdicts = {name: getattr(problem.structure, name).status for name in VERDICTS}
    return {
        "plain step": unit,
        "structure": structure_seconds,
        "verify": verify_seconds,
        "stopped": any("stopped" in note for note in problem.structure.notes),
        **verdicts,
    }


HEADER = """\
# Programs with loops, measured

<!-- Written by benchmarks/loops_cost.py; change that, not this. -->

A loop that ends by the numbers it computes may not end on other numbers, and experiments have those. So experiments
have a budget, of fifty plain steps or five seconds, whichever is more (`Problem(effort=50)`); what they were to find out
is unknown then. Below are {count} programs with loops in the model or in the loss, on {samples} samples: how long the
structure takes, and what it says. The same programs are tests, which hold verdicts against what is true, and count the
ops of the experiments.

Process CPU time on one thread; torch {torch}. `make bench-loops` repeats it.
"""


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """`docs/benchmarks/loops.md`."""
    torch_version = version("torch").partition("+")[0]
    samples = next(iter(LOOPS.values())).problem().samples
    head = HEADER.format(count=len(results), samples=samples, torch=torch_version)
    titles = [name.replace("_", " ") for name in VERDICTS]
    columns = ["program", "plain step", "structure", "in plain steps", "verify"]
    columns += [*titles, "experiments"]
    lines = [columns, ["---"] * len(columns)]
    for name, result in results.items():
        step, seconds = result["plain step"], result["structure"]
        cells = [name, f"{1e3 * step:.1f} ms", f"{seconds:.2f} s", f"{seconds / step:.0f}"]
        cells.append(f"{result['verify']:.2f} s")
        cells += [result[verdict] for verdict in VERDICTS]
        lines.append([*cells, "one stopped" if result["stopped"] else "all ended"])
    return head + "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help="write the page and the seconds")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results = {name: measure(name) for name in LOOPS}
    text = page(results)
    print(text)
    if options.write:
        DOCS.write_text(text)
        data = facts(STEPS, {}) | {"programs": results}
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
