"""Interleaved timing of several tools, and the layout of the page about it.

The unit is one forward and backward pass of the same batch. In every round each tool and the unit
run one after the other, in process CPU time, and a figure is the median over the rounds of the
ratio within a round. The tools and the reference results are defined in the scripts.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unbatch as ub

ROUNDS = 5
SPENT, AT_MOST = (
    0.1,
    5,
)  # a turn repeats what is short: until so many seconds are spent, at most so often
CONTROLS = 15  # repetitions of the control
TOLERANCE = 1e-3  # relative, in float32 against float64

Ask = Callable[[], Any]
Offer = dict[str, Ask]  # what a contestant answers, by quantity
Key = TypeVar("Key")


# --- contestants ----------------------------------------------------------------------------------


class Incomplete(Exception):
    """The tool has no result for some of the parameters, and raised no error."""


def plain(model: nn.Module, X: Tensor, y: Tensor) -> Ask:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(X), y), parameters)


def asked_anew(model: nn.Module, X: Tensor, y: Tensor) -> Callable[[], ub.Problem]:
    """Return a function that gives the problem as in training: on another batch, with changed
    parameters.

    The recording survives that.
    """
    known = [ub.Problem(model, F.cross_entropy, (X, y))]
    batches = itertools.cycle([(X, y), (X.clone(), y.clone())])

    def problem() -> ub.Problem:
        for p in model.parameters():
            p.detach().view(-1)[:1].add_(0)
        known[0] = known[0].with_batch(*next(batches))
        return known[0]

    return problem


def harvest(model: nn.Module, attribute: str) -> dict[str, Tensor]:
    """Remove and return the results that a tool stored in an attribute of the parameters."""
    found = {name: getattr(p, attribute, None) for name, p in model.named_parameters()}
    for p in model.parameters():
        setattr(p, attribute, None)
        p.grad = None
    if left_out := [name for name, value in found.items() if value is None]:
        raise Incomplete(f"nothing for {', '.join(left_out)}")
    return found


EXCUSES: dict[type[Exception], str] = {
    Incomplete: "leaves out parameters",
    ModuleNotFoundError: "not installed",
    NotImplementedError: "refuses",
    ub.UnbatchError: "refuses",
}


def excuse(error: Exception) -> str:
    for kind, word in EXCUSES.items():
        if isinstance(error, kind):
            return word
    return f"raises {type(error).__name__}"


def complaining(error: Exception) -> Ask:
    """Return a question that raises ``error``, for a tool whose setup failed."""

    def complain() -> None:
        raise error

    return complain


# --- answers --------------------------------------------------------------------------------------


def single(found: Any) -> Any:
    return (
        found.float()
        if isinstance(found, Tensor)
        else {name: t.float() for name, t in found.items()}
    )


def distance(found: Any, truth: Any) -> float:
    """Return the relative error over all parameters together."""
    if isinstance(truth, Tensor):
        found, truth = {"": found}, {"": truth}
    off = sum(float((found[name] - t).norm()) ** 2 for name, t in truth.items())
    return (off / sum(float(t.norm()) ** 2 for t in truth.values())) ** 0.5


@dataclass
class Entry:
    """The result of one tool for one quantity. `status`: "ok", "wrong", "estimated", or the reason
    for none.
    """

    status: str
    ratio: float | None = None  # to the plain step, median over rounds
    first: float | None = None  # the same of the very first call, all preparation included
    error: float | None = None  # relative, against float64


def judged(ask: Ask | None, truth: Any, unit: float) -> Entry:
    """Time the first call, and compare its result with the reference."""
    if ask is None:
        return Entry("not offered")
    start = time.process_time()
    try:
        found = ask()
    except Exception as error:
        return Entry(excuse(error))
    first = (time.process_time() - start) / unit
    error = distance(found, truth)
    return Entry("ok" if error <= TOLERANCE else "wrong", first=first, error=error)


# --- time -----------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Make the C library keep freed memory, so that no tool pays for fresh pages."""
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4
        library = ctypes.CDLL(None)
        library.mallopt(trim_threshold, -1)
        library.mallopt(mmap_max, 0)


def seconds(ask: Ask) -> float:
    start = time.process_time()
    ask()
    return time.process_time() - start


def turn(ask: Ask) -> float:
    """Return the seconds of one call, or of the median call if calls are short."""
    spent = [seconds(ask)]
    while sum(spent) < SPENT and len(spent) < AT_MOST:
        spent.append(seconds(ask))
    return statistics.median(spent)


def control() -> float:
    """Return the milliseconds of a fixed piece of plain PyTorch: three layers, 256 samples, forward
    and backward.

    It asks whether this machine is slow today. Nothing of this library takes part, so a figure that
    changes between two runs while the control does not is a change of the code; where both change,
    it is the machine.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator)
    weights = [
        torch.randn(512, 512, generator=generator).div_(512**0.5).requires_grad_() for _ in range(3)
    ]

    def step() -> None:
        y = x
        for weight in weights:
            y = torch.relu(y @ weight)
        torch.autograd.grad(y.sum(), weights)

    step()
    return 1e3 * statistics.median(seconds(step) for _ in range(CONTROLS))


def one_round(step: Ask, asks: Mapping[Key, Ask]) -> dict[Key, float]:
    unit = turn(step)
    return {key: turn(ask) / unit for key, ask in asks.items()}


def medians(step: Ask, asks: Mapping[Key, Ask], rounds: int) -> dict[Key, float]:
    """Return the median time of each question in plain steps, measured by turns."""
    found = [one_round(step, asks) for _ in range(rounds)]
    return {key: statistics.median(ratios[key] for ratios in found) for key in asks}


def contest(
    step: Ask, unit: float, offered: Mapping[str, Offer], truths: Mapping[str, Any], rounds: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """Ask every contestant for every quantity, by turns; the entries by quantity and contestant."""
    asks = {(q, c): offer.get(q) for q in truths for c, offer in offered.items()}
    entries = {(q, c): judged(ask, truths[q], unit) for (q, c), ask in asks.items()}
    running: dict[tuple[str, str], Ask] = {}
    for key, ask in asks.items():
        if ask is not None and entries[key].first is not None:
            running[key] = ask
    for key, ratio in medians(step, running, rounds).items():
        entries[key].ratio = ratio
    return {q: {c: asdict(entries[q, c]) for c in offered} for q in truths}


# --- the page -------------------------------------------------------------------------------------


def table(lines: Sequence[Sequence[object]]) -> str:
    head, *body = lines
    return (
        "\n".join(
            "| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *body)
        )
        + "\n"
    )


def cell(entry: Mapping[str, Any]) -> str:
    if entry["ratio"] is None:
        return "–" if entry["status"] == "not offered" else entry["status"]
    figure = f"{entry['ratio']:.3g}"
    if entry["status"] == "estimated":
        return f"≈ {figure}"
    return (
        figure
        if entry["status"] == "ok"
        else f"**wrong** by {100 * entry['error']:.0f} % ({figure})"
    )


def tools(packages: Mapping[str, str]) -> dict[str, str]:
    """Return the installed versions of the other tools."""
    found = {}
    for tool, package in packages.items():
        try:
            found[tool] = version(package)
        except PackageNotFoundError:
            found[tool] = "not installed"
    return found


def device() -> str:
    return f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"


def facts(rounds: int, packages: Mapping[str, str]) -> dict[str, Any]:
    """Return the conditions of a run, which the page refers to by name, and its control."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device(),
        "python": platform.python_version(),
        "torch": version("torch").partition("+")[0],
        "control_ms": control(),
        "tools": tools(packages),
        "rounds": rounds,
    }


def header(text: str, data: Mapping[str, Any]) -> str:
    """Return the text above the tables, with the conditions filled in."""
    named = ", ".join(f"{tool} {number}" for tool, number in data["tools"].items())
    return text.format(**(dict(data) | {"tools": named, "tolerance": TOLERANCE}))


def save(page: str, data: Mapping[str, Any], docs: Path, results: Path) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    docs.write_text(page)
    results.write_text(json.dumps(data, indent=1) + "\n")


# --- the command line -----------------------------------------------------------------------------


def parser(
    about: str | None, workloads: Iterable[str], quantities: Iterable[str]
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=about, formatter_class=raw)
    made.add_argument("--workloads", default=",".join(workloads), help="comma-separated")
    made.add_argument("--quantities", default=",".join(quantities), help="comma-separated")
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument(
        "--write", action="store_true", help="write the page and the figures behind it"
    )
    return made


def parsed(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options. The defaults of workloads and quantities are the only valid names."""
    options = made.parse_args(arguments)
    for name in ("workloads", "quantities"):
        known, chosen = made.get_default(name).split(","), getattr(options, name).split(",")
        if unknown := [c for c in chosen if c not in known]:
            made.error(f"--{name} knows {', '.join(known)}; got {', '.join(unknown)}")
        setattr(options, name, chosen)
    return options
