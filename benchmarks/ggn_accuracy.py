"""How exact a Gauss-Newton diagonal is for what it costs, under batch norm in train mode.

    python benchmarks/ggn_accuracy.py                    measures and prints the table
    python benchmarks/ggn_accuracy.py --write            writes the page, its picture and results/accuracy.json

Two nets on scikit-learn's handwritten digits, trained briefly: a small convolutional net, and
ResNet-20 on the digits enlarged to 32 x 32. For each: the exact diagonal; compressed to several
tolerances; random signs, with and without the frozen diagonal as a control variate; Monte Carlo
columns. The error is relative, in the Frobenius norm, the median over seeds; costs are counted in
forward passes, jvps (pushes) and vjps (pullbacks) of the batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import unbatch as ub
from lib.workloads import resnet20

ROOT = Path(__file__).resolve().parent.parent
DOCS, PICTURE = (
    ROOT / "docs" / "benchmarks" / "accuracy.md",
    ROOT / "docs" / "benchmarks" / "accuracy.svg",
)
RESULTS = ROOT / "benchmarks" / "results" / "accuracy.json"
SAMPLES = 64
SEEDS = 5
TOLERANCES = (0.3, 0.1, 0.03, 0.01)
DRAWS = (8, 32, 128)


@dataclass
class Point:
    """One way of having the diagonal: passes of each kind, the true error, and the stated one where
    there is one.
    """

    net: str
    way: str
    setting: str
    forward: int
    pushes: int
    pullbacks: int
    error: float
    stated: float | None = None

    @property
    def passes(self) -> int:
        return self.forward + self.pushes + self.pullbacks


def digits(size: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    X = torch.tensor(data.images)[:, None].float() / 16
    X = (
        X
        if size == 8
        else F.interpolate(X, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    )
    return X, torch.tensor(data.target)


def small() -> nn.Module:
    def block(i: int, o: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    body = [*block(1, 16), *block(16, 16), *block(16, 32, 2), *block(32, 32)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def resnet() -> nn.Module:
    return resnet20(frozen=False)


def trained(model: nn.Module, X: Tensor, y: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(X), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(X[chosen]), y[chosen]).backward()
        optimizer.step()
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "small net": (small, 8),
    "ResNet-20": (resnet, 32),
}


def problem_of(name: str) -> ub.Problem:
    """64 digits, and a net that has been trained on batches as large for 100 steps."""
    make, size = NETS[name]
    torch.manual_seed(0)
    X, y = digits(size)
    return ub.Problem(trained(make(), X, y, 100), F.cross_entropy, (X[:SAMPLES], y[:SAMPLES]))


def measured(name: str, problem: ub.Problem) -> Iterator[Point]:
    G = problem.ggn()
    columns = G.root.layout[1]
    exact, told = G.diag(info=True)
    size = exact.double().norm()
    off = lambda d: float((d.double() - exact.double()).norm() / size)  # noqa: E731
    way = (f"{told.rank} statistics", 3) if told.rank else ("column by column", 1)
    yield Point(name, "exact", *way, 0, told.pullbacks + columns, 0.0)
    control = problem.ggn(by="frozen")
    yield Point(name, "frozen instead", "another matrix", 1, 0, columns, off(control.diag()))
    for rtol in TOLERANCES:
        runs = [G.diag(rtol=rtol, seed=seed, info=True) for seed in range(SEEDS)]
        cost = statistics.median(t.pullbacks for _, t in runs)
        stated = statistics.median(t.estimate for _, t in runs)
        error, rank = (
            statistics.median(off(d) for d, _ in runs),
            statistics.median(t.rank for _, t in runs),
        )
        setting = f"rtol {rtol}: rank {rank} of {runs[0][1].statistics}"
        yield Point(
            name, "compressed", setting, 3, runs[0][1].pushes, int(cost) + columns, error, stated
        )
    for draws in DRAWS:
        plain = [G.estimate_diag(draws, seed=seed) for seed in range(SEEDS)]
        yield Point(
            name,
            "random signs",
            f"{draws} draws",
            1,
            0,
            draws,
            statistics.median(off(e.values) for e in plain),
        )
        with_control = [G.estimate_diag(draws, seed=seed, control=control) for seed in range(SEEDS)]
        gain = statistics.median(e.gain for e in with_control)
        error = statistics.median(off(e.values) for e in with_control)
        setting = f"{draws} draws, variance / {gain:.1f}"
        yield Point(name, "signs, frozen control", setting, 2, 0, with_control[0].pullbacks, error)
    for count in (1, 4):
        drawn = [problem.ggn(mc_samples=count, seed=seed).diag(info=True) for seed in range(SEEDS)]
        cost, error = drawn[0][1].pullbacks + count, statistics.median(off(d) for d, _ in drawn)
        yield Point(name, "Monte Carlo", f"{count} a sample", 1, 0, cost, error)


def honest(problem: ub.Problem, runs: int = 100) -> int:
    """In how many of the runs the true error is below twice the stated one."""
    G = problem.ggn()
    exact = G.diag()
    found = [G.diag(rtol=0.1, seed=seed, info=True) for seed in range(runs)]
    return sum(float((d - exact).norm() / exact.norm()) <= 2 * told.estimate for d, told in found)


# --- writing --------------------------------------------------------------------------------------


def table(points: list[Point]) -> str:
    lines = [
        "| way | | forward | pushes | pullbacks | error | stated |",
        "|---|---|---|---|---|---|---|",
    ]
    for p in points:
        stated = "" if p.stated is None else f"{p.stated:.2%}"
        cells = (p.way, p.setting, p.forward, p.pushes, p.pullbacks, f"{p.error:.2%}", stated)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(points: list[Point], names: list[str]) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "unbatch"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), sharey=True)
    for ax, name in zip(axes, names, strict=True):
        for way in ("compressed", "random signs", "signs, frozen control", "Monte Carlo"):
            here = [p for p in points if p.net == name and p.way == way and p.error > 0]
            ax.loglog([p.passes for p in here], [p.error for p in here], "o-", label=way)
        exact = next(p for p in points if p.net == name and p.way == "exact")
        ax.axvline(exact.passes, color="grey", linestyle=":", label="exact")
        ax.set(title=name, xlabel="passes of the batch")
    axes[0].set_ylabel("relative error of the diagonal")
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(PICTURE, metadata={"Date": None})


TEXT = """# Accuracy for cost of the Gauss-Newton diagonal

Written by `make bench-accuracy`. {doc}

![Error of the diagonal against passes of the batch](accuracy.svg)

{tables}

The compressed diagonal takes r directions of the batch statistics (r pullbacks), and C columns per
sample with the statistics held constant; the stated error is estimated with random signs. On the
small net the true error was below twice the stated one in {honest} of 100 runs at `rtol=0.1`.
{ratios}
"""


def ratios(points: list[Point], names: list[str]) -> str:
    """The error of random signs at the cost of each compressed diagonal, by their 1/√draws, over
    its error.
    """
    out = []
    for name in names:
        most = [p for p in points if p.net == name and p.way == "random signs"][-1]
        for p in [p for p in points if p.net == name and p.way == "compressed" and p.error > 0]:
            signs = most.error * (most.pullbacks / p.passes) ** 0.5
            out.append(
                f"- {name}, {p.setting}: {signs / p.error:.1f} times more accurate than signs at equal cost."
            )
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--nets", default="small net,ResNet-20")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ub.MixedSamplesWarning)
    points, names, good = [], [], 0
    for name in options.nets.split(","):
        names.append(name)
        problem = problem_of(name)
        for point in measured(name, problem):
            points.append(point)
            print(point, flush=True)
        good = honest(problem) if name == "small net" else good
    print("honest", good)
    print(ratios(points, names))
    if options.write:
        tables = "\n\n".join(f"## {n}\n\n{table([p for p in points if p.net == n])}" for n in names)
        about = (__doc__ or "").split("\n\n")[-1].strip()
        DOCS.write_text(
            TEXT.format(doc=about, tables=tables, honest=good, ratios="\n" + ratios(points, names))
        )
        RESULTS.write_text(
            json.dumps({"honest": good, "points": [asdict(p) for p in points]}, indent=1) + "\n"
        )
        draw(points, names)


if __name__ == "__main__":
    main()
