"""What came of the tests under each version of PyTorch, and the page that says so.

`pytest --record` writes the counts of a run to ``versions.json`` beside the tests;
`PYTHONPATH=tests python -m cases.versions` writes ``docs/reference/versions.md`` from them, and
`make versions TORCH=2.14.1` does both. A test holds the page to the counts, and both to the
versions that the package says it was tested with.
"""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from unbatch.versions import minor

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "versions.md"
COUNTS = ROOT / "tests" / "versions.json"

TIERS = ("quick", "rest")

# What answers differ in, by what brings it about.
DIFFERENCES = {
    "second derivatives of `cdist` and `pdist`": "PyTorch 2.13 has none; from 2.14 on, losses on "
    "such distances have a Gauss-Newton matrix.",
    "attention without an axis of heads": "from PyTorch 2.14 on a fused kernel computes it, which "
    "has no second derivative; models that differentiate it are refused, and told of the remedy.",
    "third derivatives of batch norm": "PyTorch 2.13 has wrong ones, later versions raise (those "
    "of layer norm are wrong in all); gradients that need them are refused under each.",
}

HEAD = """# Versions of PyTorch

The package takes PyTorch {oldest} or newer. These versions were tested, on a CPU, with all tests but the sweeps over
PyTorch's own list of operations. *Quick* is what `make test` runs, *rest* what `make test-rest` runs. Warnings are errors in
these runs.
"""

TAIL = """
`import unbatch` warns once under a minor version that is not listed. What is known of an operation holds for the forms of it
(overloads, with their arguments) that were looked at. One that a later version brings is *unknown*, and never taken for
another.

`make test TORCH={newest}` builds an environment of its own for a version, `.venv-{newest}`, and runs the tests there; a CUDA
build takes some 6 GB. `make versions TORCH={newest}` runs both tiers, and writes this page.
"""


def read() -> dict[str, Any]:
    """Return the counts by version, the oldest version first."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))
    return {version: counts[version] for version in sorted(counts, key=_numbers)}


def record(tier: str, stats: Mapping[str, Sequence[Any]]) -> None:
    """Write what came of a tier under the version that is running."""
    counts = read() if COUNTS.exists() else {}
    failed = [report.nodeid for name in ("failed", "error") for report in stats.get(name, ())]
    of_version = counts.setdefault(torch.__version__.split("+")[0], {})
    of_version["build"] = str(torch.__version__)
    of_version["python"] = platform.python_version()
    of_version[tier] = {
        "date": datetime.date.today().isoformat(),
        "passed": len(stats.get("passed", ())),
        "skipped": len(stats.get("skipped", ())),
        "failed": sorted(failed),
    }
    COUNTS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def minors() -> list[str]:
    """Return the minor versions that there are counts of."""
    return list(dict.fromkeys(minor(version) for version in read()))


def page() -> str:
    counts = read()
    versions = list(counts)
    lines = [
        HEAD.format(oldest=minor(versions[0])),
        "| PyTorch | Python | quick tier | rest | failures |",
        "|---|---|---|---|---|",
    ]
    for of_version in counts.values():
        lines.append(_row(of_version))
    lines += ["", "What differs between them:", ""]
    for what, how in DIFFERENCES.items():
        lines.append(f"- {what}: {how}")
    lines.append(TAIL.format(newest=versions[-1]))
    return "\n".join(lines)


def _row(of_version: Mapping[str, Any]) -> str:
    cells = [_cell(of_version.get(tier)) for tier in TIERS]
    failed = []
    for tier in TIERS:
        failed += of_version.get(tier, {}).get("failed", [])
    names = ", ".join(f"`{name}`" for name in failed)
    if not failed and any(tier in of_version for tier in TIERS):
        names = "none"
    return f"| {of_version['build']} | {of_version['python']} | {' | '.join(cells)} | {names} |"


def _cell(run: Mapping[str, Any] | None) -> str:
    if run is None:
        return "not run"
    return f"{run['passed']:,} passed, {run['skipped']} skipped ({run['date']})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
