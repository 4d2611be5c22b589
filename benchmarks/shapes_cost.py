"""The cost of squared norms on fifty batches of random sizes, beside batches of one size.

    python benchmarks/shapes_cost.py              measures and prints the page
    python benchmarks/shapes_cost.py --write      writes the page and results/shapes.json

Each batch goes through `with_batch` and is asked for squared norms, with a training step in
between. Process CPU time on one thread; the unit is a plain training step on a batch of the middle
size. To compare with another checkout, run it with that one's `src` in `PYTHONPATH`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unbatch as ub
from lib.interleaved import facts

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "shapes.md"
RESULTS = ROOT / "benchmarks" / "results" / "shapes.json"
BATCHES = 50

Batch = tuple[Tensor, Tensor]


# --- nets and batches -----------------------------------------------------------------------------


class Sentences(nn.Module):
    """Two encoder layers of width 64 on tokens, and a linear head on the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.words, self.head = nn.Embedding(1000, 64), nn.Linear(64, 10)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(x)).mean(1))


def normed() -> nn.Module:
    """An MLP with batch norm, 784-512-256-10."""
    layers: list[nn.Module] = []
    for narrow, wide in ((784, 512), (512, 256)):
        layers += [nn.Linear(narrow, wide), nn.BatchNorm1d(wide), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def plain() -> nn.Module:
    """An MLP, 784-512-256-10."""
    return nn.Sequential(
        *(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    )


def tokens(length: int) -> Batch:
    return torch.randint(1000, (16, length)), torch.randint(10, (16,))


def vectors(samples: int) -> Batch:
    return torch.randn(samples, 784), torch.randint(10, (samples,))


def lengths() -> Iterator[int]:
    """Random ones, each of 57 as likely."""
    rng = random.Random(0)
    while True:
        yield rng.randint(8, 64)


def epochs() -> Iterator[int]:
    """Epochs of eight batches, of which the last is smaller."""
    while True:
        yield from (32,) * 7
        yield 13


def poisson() -> Iterator[int]:
    """What each of 512 samples being drawn with probability 1/32 gives; never none."""
    rng = random.Random(0)
    while True:
        yield max(1, sum(rng.random() < 1 / 32 for _ in range(512)))


@dataclass(frozen=True)
class Setting:
    """``middle``: the size of a batch that all are compared with."""

    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    sizes: Callable[[], Iterator[int]]
    middle: int


SETTINGS = {
    "transformer, sentences of 8 to 64 words": Setting(Sentences, tokens, lengths, 36),
    "MLP with batch norm, every eighth batch smaller": Setting(normed, vectors, epochs, 32),
    "MLP, Poisson batches of 16": Setting(plain, vectors, poisson, 16),
}


# --- measuring ------------------------------------------------------------------------------------


def training_step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def _seconds(measured: Callable[[], object]) -> float:
    start = time.process_time()
    measured()
    return time.process_time() - start


def measure(setting: Setting, batches: int = BATCHES) -> dict[str, float]:
    """Medians in seconds, and the mean over batches of random sizes."""
    torch.manual_seed(0)
    model = setting.make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    problem = ub.Problem(model, F.cross_entropy, setting.batch(setting.middle))
    steps: list[float] = []

    def asked(size: int) -> float:
        nonlocal problem
        batch = setting.batch(size)
        problem = problem.with_batch(*batch)
        spent = _seconds(lambda: problem.compute(ub.SquaredNorms))
        training_step(model, batch, optimizer)
        return spent

    first = asked(setting.middle)
    fixed = [asked(setting.middle) for _ in range(batches)]
    for _ in range(batches):
        batch = setting.batch(setting.middle)
        steps.append(_seconds(lambda batch=batch: training_step(model, batch, optimizer)))
    sizes = setting.sizes()
    several = [asked(next(sizes)) for _ in range(batches)]
    return {
        "plain step": statistics.median(steps),
        "first": first,
        "fixed": statistics.median(fixed),
        "random": statistics.median(several),
        "mean": statistics.mean(several),
    }


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# New shapes, measured

<!-- Written by benchmarks/shapes_cost.py; change that, not this. -->

Squared norms on {batches} batches of random sizes, a training step after each, beside {batches} batches of one size; as
multiples of a plain training step (forward, backward, SGD). A batch of a size that was not seen before costs a
recording and the static analysis; what holds for all sizes is not tried again, and the recordings of 16 shapes are kept.
The first question records, analyses and tries.

Process CPU time on one thread; torch {torch}. To measure again run `python benchmarks/shapes_cost.py`.
"""

COLUMNS = {
    "first": "first question",
    "fixed": "one size, median",
    "random": "random sizes, median",
    "mean": "random sizes, mean",
}


def page(results: dict[str, dict[str, float]], batches: int) -> str:
    """`docs/benchmarks/shapes.md`."""
    head = HEADER.format(batches=batches, torch=version("torch").partition("+")[0])
    lines = [["batches", "plain step", *COLUMNS.values()], ["---"] * (2 + len(COLUMNS))]
    for name, seconds in results.items():
        step = seconds["plain step"]
        multiples = [f"{seconds[column] / step:.2g}" for column in COLUMNS]
        lines.append([name, f"{1e3 * step:.2g} ms", *multiples])
    return head + "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help="write the page and the seconds")
    parser.add_argument("--batches", type=int, default=BATCHES)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {name: measure(setting, options.batches) for name, setting in SETTINGS.items()}
    text = page(results, options.batches)
    print(text)
    if options.write:
        DOCS.write_text(text)
        data = facts(options.batches, {}) | {"seconds": results}
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
