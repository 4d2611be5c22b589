"""The cost of a structure question, in plain training steps.

    python benchmarks/structure_cost.py              measures and prints the page
    python benchmarks/structure_cost.py --write      writes the page and results/capture.json
    python benchmarks/structure_cost.py --profile    prints where the first question spends its time

Process CPU time on one thread, in one process, all measurements of a round one after the other, the
median over rounds: other load on the machine affects all of them alike.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unbatch as ub
from lib.interleaved import facts
from unbatch.analysis.inference import infer_structure

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "benchmarks" / "structure.md"
RESULTS = ROOT / "benchmarks" / "results" / "capture.json"
ROUNDS = 7
TARGET = 10  # plain steps that capture plus analysis may take

Setting = tuple[nn.Module, Callable[[], ub.Problem], Callable[[], Tensor]]


# --- the two models -------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a projection where the shape changes."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.skip = nn.Sequential()
        if stride != 1 or narrow != wide:
            self.skip = nn.Sequential(
                nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


def resnet18(classes: int = 1000) -> nn.Module:
    """ResNet-18 for ImageNet: 11.7 million parameters, 20 batch norms."""
    stem = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    blocks, narrow = [], 64
    for wide, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(narrow, wide, stride), Block(wide, wide, 1)]
        narrow = wide
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes)
    )


def images() -> Setting:
    """ResNet-18 on 8 x 3 x 64 x 64 with cross entropy."""
    model = resnet18().train()
    X, y = torch.randn(8, 3, 64, 64), torch.randint(1000, (8,))
    return (
        model,
        lambda: ub.Problem(model, F.cross_entropy, (X, y)),
        lambda: F.cross_entropy(model(X), y),
    )


def sentences() -> Setting:
    """Two layers of BERT-base on 8 x 32 tokens, classifying; the model computes the loss."""
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, num_labels=2)).train()
    batch = {"input_ids": torch.randint(1000, 30000, (8, 32)), "labels": torch.randint(2, (8,))}
    return model, lambda: ub.Problem(model, batch=batch), lambda: model(**batch).loss


SETTINGS = {"ResNet-18, 8 x 3 x 64 x 64": images, "BERT-base with 2 layers, 8 x 32": sentences}


# --- measuring ------------------------------------------------------------------------------------


def training_step(
    model: nn.Module, loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer
) -> None:
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def static_analysis(problem: ub.Problem) -> None:
    """The walk over an existing recording: rules and labels alone, no witness, nothing is run."""
    kept = problem._recorded()
    infer_structure(kept.graph, problem.samples, problem._dims, problem._target_dims)


def moved_by_one(problem: ub.Problem) -> tuple[Any, Any]:
    """The batch with its samples rolled by one, in memory of its own."""
    roll = lambda x: x.roll(1, 0) if isinstance(x, Tensor) else x  # noqa: E731
    return torch.utils._pytree.tree_map(roll, (problem.inputs, problem.targets))


def one_round(setting: Setting, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Seconds of every measurement, each once. Every first question gets a problem of its own."""
    model, problem_of, loss = setting
    fresh, captured, asked = problem_of(), problem_of(), problem_of()
    other = moved_by_one(fresh)
    captured._recorded()
    _ = asked.structure
    # The step comes last: it changes the parameters, and what is kept between questions is gone.
    measurements: dict[str, Callable[[], object]] = {
        "first question": lambda: fresh.structure,
        "capture": lambda: problem_of()._recorded(),
        "static analysis": lambda: static_analysis(captured),
        "second question": lambda: asked.structure,
        "question on another batch": lambda: asked.with_batch(*other).structure,
        "plain step": lambda: training_step(model, loss, optimizer),
    }
    return {name: _seconds(measured) for name, measured in measurements.items()}


def _seconds(measured: Callable[[], object]) -> float:
    start = time.process_time()
    measured()
    return time.process_time() - start


def measure(make: Callable[[], Setting], rounds: int = ROUNDS) -> dict[str, float]:
    """Medians over `rounds` rounds, after one to warm up, in seconds."""
    torch.manual_seed(0)
    setting = make()
    optimizer = torch.optim.SGD(setting[0].parameters(), lr=1e-3)
    one_round(setting, optimizer)
    found = [one_round(setting, optimizer) for _ in range(rounds)]
    return {name: statistics.median(f[name] for f in found) for name in found[0]}


def profile(make: Callable[[], Setting], lines: int = 25) -> None:
    """Where the first question spends its time."""
    torch.manual_seed(0)
    _, problem_of, _ = make()
    _ = problem_of().structure
    problem, profiler = problem_of(), cProfile.Profile()
    profiler.runcall(lambda: problem.structure)
    pstats.Stats(profiler).strip_dirs().sort_stats("cumulative").print_stats(lines)


# --- the page -------------------------------------------------------------------------------------

HEADER = """\
# Structure, measured

<!-- Written by benchmarks/structure_cost.py; change that, not this. -->

The cost of the structure, as multiples of one plain training step (forward, backward, SGD) on the
same batch. The first question consists of capture, static analysis and experiments; capture and
static analysis are also measured alone, and the rest is the cost of the experiments: the recording
is compared with the model on a second batch, in values and in one gradient, and the model is run on
changed batches. Then the same question is asked again, and for another batch of the same shapes
through `with_batch`. In both, most is one forward pass of the model: the first few times that a
recording is used again it is held against the model, later for one percent of the time. The target is at most {target} plain steps for capture plus static analysis.

Process CPU time on one thread, all measurements in one process and interleaved, medians of {rounds}
rounds after one to warm up; torch {torch}. Both models are in train mode and in float32. Nothing
was measured on a GPU, where a step is shorter, but the time in Python is not. To measure again run
`python benchmarks/structure_cost.py`.
"""

COLUMNS = {
    "first question": "first question",
    "capture": "of it capture",
    "static analysis": "of it static analysis",
    "second question": "second question",
    "question on another batch": "`with_batch`",
}


def page(results: dict[str, dict[str, float]], rounds: int) -> str:
    """`docs/benchmarks/structure.md`."""
    head = HEADER.format(target=TARGET, rounds=rounds, torch=version("torch").partition("+")[0])
    lines = [("model", "plain step", *COLUMNS.values()), ["---"] * (2 + len(COLUMNS))]
    for name, seconds in results.items():
        step = seconds["plain step"]
        multiples = [f"{seconds[column] / step:.2g}" for column in COLUMNS]
        lines.append([name.replace(" x ", " × "), f"{1e3 * step:.0f} ms", *multiples])
    return head + "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def save(
    results: dict[str, dict[str, float]], rounds: int, docs: Path = DOCS, data: Path = RESULTS
) -> None:
    """Write the page and the seconds behind it."""
    data.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page(results, rounds))
    data.write_text(json.dumps(facts(rounds, {}) | {"seconds": results}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--profile", action="store_true", help="print a profile of the first question"
    )
    parser.add_argument(
        "--write", action="store_true", help="write the page and the seconds behind it"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.profile:
        for make in SETTINGS.values():
            profile(make)
        return
    results = {name: measure(make, options.rounds) for name, make in SETTINGS.items()}
    print(page(results, options.rounds))
    if options.write:
        save(results, options.rounds)


if __name__ == "__main__":
    main()
