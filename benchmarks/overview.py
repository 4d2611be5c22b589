"""One page of what was measured: each quantity beside the fastest other tool that got it right.

Made of `benchmarks/results/*.json` alone: `python benchmarks/overview.py` writes
`docs/benchmarks/overview.md`, and tests/documents/test_docs.py holds the page against the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks" / "overview.md"
OURS = "unbatch"
SCRIPTS = {
    "gradients": "`benchmarks/gradients_cost.py`",
    "ggn": "`benchmarks/ggn_cost.py`",
    "capture": "`benchmarks/structure_cost.py`",
    "monitor": "`benchmarks/monitor_overhead.py`",
}
RIGHT = ("ok", "estimated")

HEAD = """# Benchmarks at a glance

<!-- Written by benchmarks/overview.py from benchmarks/results; change these, not this. -->

All numbers are read from the committed results; the page of each section has the conditions, all
tools and the commands to measure again. Times are multiples of one plain forward and backward pass
of the same batch, by process CPU time, on one thread; ≈ marks estimates. *Best other* is the
fastest of the others whose answer was right: a tool, or hand-written PyTorch (*eigsh* is SciPy on
products of unbatch); a dash means that there is none. The faster of the two is bold. *Another
number* lists the tools whose result was different (BackPACK's rows under batch norm are copy rows),
*no answer* counts those that refuse or raise.
"""


def results() -> dict[str, Any]:
    """The committed results by name."""
    folder = ROOT / "benchmarks" / "results"
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def page(found: dict[str, Any]) -> str:
    """The whole page."""
    gradients, ggn = found["gradients"], found["ggn"]
    of_gradients = [{"workload": name, **r} for name, r in gradients["results"].items()]
    parts = [
        HEAD,
        _section("Gradients", "gradients.md", gradients, of_gradients),
        _section("The Gauss-Newton matrix", "ggn.md", ggn, ggn["results"]),
        _accuracy(found["accuracy"]),
        _structure(found["capture"], found["zoo"]["rows"]),
        monitor(found["monitor"]),
        _controls({name: found[name] for name in ("gradients", "ggn", "capture", "monitor")}),
    ]
    return "\n".join(parts)


def _section(title: str, link: str, run: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    tools = ", ".join(f"{name} {version}" for name, version in run["tools"].items())
    where = f"Measured on {run['date']}, {run['device']}, torch {run['torch']}, {tools}."
    head = f"## {title}\n\n{where} [Details]({link}).\n"
    workloads = _table(
        ["workload", "model", "N", "plain step"],
        [[r["workload"], r["title"], r["samples"], f"{r['plain_ms']:.1f} ms"] for r in measured],
    )
    columns = ["workload", "N", "quantity", OURS, "best other", "another number", "no answer"]
    return "\n".join(
        [head, workloads, _table(columns, [row for r in measured for row in _rows(r)])]
    )


def _rows(measured: dict[str, Any]) -> Iterator[list[Any]]:
    for quantity, answers in measured["quantities"].items():
        others = {n: a for n, a in answers.items() if n != OURS}
        right = {
            n: a["ratio"]
            for n, a in others.items()
            if a["status"] in RIGHT and a["ratio"] is not None
        }
        best = min(right, key=lambda name: right[name], default="")
        wrong = [
            f"{n} (off by {a['error']:.0%})" for n, a in others.items() if a["status"] == "wrong"
        ]
        silent = sum(
            a["status"] == "refuses" or a["status"].startswith("raises") for a in others.values()
        )
        first = min([OURS, best], key=lambda name: answers[name]["ratio"]) if best else OURS
        other = f"{_figure(answers[best], best == first)} {best}" if best else "–"
        figures = [_figure(answers[OURS], first == OURS), other]
        yield [
            measured["workload"],
            measured["samples"],
            quantity,
            *figures,
            ", ".join(wrong),
            silent or "",
        ]


def _figure(answer: dict[str, Any], first: bool) -> str:
    text = "≈ " * (answer["status"] == "estimated") + _ratio(answer["ratio"])
    return f"**{text}**" if first else text


def _accuracy(found: dict[str, Any]) -> str:
    rows = [
        [p["net"], p["setting"], p["pullbacks"], f"{p['error']:.2%}", f"{p['stated']:.2%}"]
        for p in found["points"]
        if p["way"] == "compressed"
    ]
    what = "The Gauss-Newton diagonal under batch norm, to a tolerance. [Details](accuracy.md)."
    head = f"## Accuracy for cost\n\n{what}\n"
    return "\n".join([head, _table(["net", "", "pullbacks", "error", "stated"], rows)])


def _structure(capture: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    costs = [
        [
            net,
            *(_ratio(s[what] / s["plain step"]) for what in ("first question", "second question")),
        ]
        for net, s in capture["seconds"].items()
    ]
    statuses = [status for r in rows for status in r["statuses"].values()]
    counts = {word: statuses.count(word) for word in ("holds", "fails", "unknown")}
    contradicted = sum(bool(r["contradictions"]) for r in rows)
    models = len({r["entry"] for r in rows})
    told = (
        f"In the [zoo](zoo.md), {models} models in {len(rows)} rows: verdicts that hold: {counts['holds']}, "
        f"that fail: {counts['fails']}, unknown: {counts['unknown']}; rows that an experiment contradicts: "
        f"{contradicted}.\n"
    )
    head = "## Structure\n\nThe cost in plain training steps. [Details](structure.md).\n"
    return "\n".join([head, _table(["model", "first question", "second question"], costs), told])


def monitor(run: dict[str, Any]) -> str:
    where = f"Measured on {run['date']}, {run['device']}, torch {run['torch']}."
    what = "What `ub.Monitor` adds to the training of the demo's net, by CPU time."
    head = f"## Monitoring\n\n{where} {what} [How it is bounded](../guides/monitor_training.md#what-it-costs).\n"
    columns = [
        "setting",
        "steps",
        "training",
        "first question",
        "added",
        "by its own account",
        "lines",
    ]
    return "\n".join([head, _table(columns, [_monitored(case) for case in run["cases"]])])


def _controls(runs: dict[str, dict[str, Any]]) -> str:
    what = (
        "A fixed piece of plain PyTorch (three layers of width 512, 256 samples, forward and backward), timed in the "
        "same run as the figures: it tells a slow machine from slow code. A dash means that none was timed."
    )
    rows = []
    for name, run in runs.items():
        measured = run.get("control_ms")
        milliseconds = "–" if measured is None else f"{measured:.3g} ms"
        rows.append([SCRIPTS[name], run.get("date", "–"), run["torch"], milliseconds])
    columns = ["measured by", "on", "torch", "control"]
    return "\n".join([f"## Control\n\n{what}\n", _table(columns, rows)])


def _monitored(case: dict[str, Any]) -> list[Any]:
    seconds = [f"{case[what]:.2g} s" for what in ("training", "first")]
    return [
        case["setting"],
        case["steps"],
        *seconds,
        share(case["added"]),
        share(case["own"]),
        f"{case['lines']:g}",
    ]


def share(value: float) -> str:
    return f"{value:.1%}" if value < 1 else f"{value:.0%}"


def _ratio(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _table(columns: list[str], rows: list[list[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(results()), encoding="utf-8")
