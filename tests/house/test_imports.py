"""The house rules that can be read off the source: who may import whom, and who may touch what.

The checks take sources as data, `{module name: source text}`, so that a planted bug can be fed to
them. They read imports anywhere in a file: inside functions and under `TYPE_CHECKING` as well.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import unbatch

PACKAGE = "unbatch"

# What each wing may import: the wings named here, and whatever those may import. A line is a wing,
# a part of one, or a file beside the wings. Inside a line the house is flat, but for circles.
WINGS = {
    # the ground
    "errors": "",
    "versions": "errors",
    "rendering": "",
    "running": "errors",
    "reference": "",
    "linalg": "errors running",
    "capture": "linalg rendering",
    # the floors
    "analysis.domain": "capture",
    "analysis.rules": "analysis.domain",
    "analysis": "analysis.rules",
    "verification": "analysis linalg",
    "diagram": "analysis",
    "autodiff.contractions": "analysis linalg",
    "autodiff": "autodiff.contractions",
    "gradients": "autodiff",
    "curvature": "gradients",
    "problem": "curvature verification diagram",
    "report": "problem",
    "monitoring": "problem",
    # the doors
    "public": "report monitoring",
    "spectra": "linalg",
    "plot": "report",
    "extend": "problem",
    "integrations": "monitoring",
    "__init__": "versions running public spectra plot extend integrations",
    "cli": "report __init__",
    "__main__": "cli",
}

# Whatever starts with the key is known to these modules only.
OWNERS = {
    "torch.utils._python_dispatch": (
        "capture.tracer",
        "capture.isolation",
        "capture.switches",
        "verification.ranks",
    ),
    "torch.overrides": (
        "capture.python_values",
        "capture.hooks",
        "capture.switches",
        "autodiff.eager",
        "reference.isolated_samples",
    ),
    "torch.fx": ("capture",),
    "torch.export": ("capture",),
    "torch.distributed": ("capture.distributed",),
    "matplotlib": ("diagram.figure", "report.plot", "report.curvature_plot", "report.style"),
    "jinja2": ("report.page",),
    "scipy": ("linalg.operators",),
    "curvlinops": ("integrations.curvlinops",),
    "laplace": ("integrations.laplace",),
    "opacus": ("integrations.opacus",),
    "lightning": ("integrations.lightning",),
    "transformers": ("integrations.transformers",),
    "pytorch_lightning": ("integrations.lightning",),
    "tensorboard": ("monitoring.log",),
    "torch.utils.tensorboard": ("monitoring.log",),
}

Sources = Mapping[str, str]


def sources() -> Sources:
    folder = Path(__file__).parents[2] / "src" / PACKAGE
    paths = {
        path.relative_to(folder).with_suffix(""): path for path in sorted(folder.rglob("*.py"))
    }
    names = {".".join(short.parts).removesuffix(".__init__"): path for short, path in paths.items()}
    return {name: path.read_text(encoding="utf-8") for name, path in names.items()}


def wing(module: str) -> str | None:
    """The line of ``WINGS`` that a module belongs to: the longest that its name begins with."""
    while module and module not in WINGS:
        module = module.rpartition(".")[0]
    return module or None


def may_import(name: str) -> set[str]:
    """The wings that one may import, the wing itself included."""
    allowed = {name}
    for other in WINGS[name].split():
        allowed |= may_import(other)
    return allowed


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of an attribute chain that starts at a plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = dotted(node.value)
        return prefix and f"{prefix}.{node.attr}"
    return None


def imports(source: str) -> Iterator[str]:
    """Absolute dotted names of what is imported; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE] * bool(node.level) + [node.module] * bool(node.module)
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def mentions(source: str) -> Iterator[str]:
    """What is imported, and what is reached through attributes:
    `torch.fx.Graph` needs no import.
    """
    yield from imports(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            yield name


def is_inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def import_graph(files: Sources) -> dict[str, set[str]]:
    """For each module the modules of the package that it imports. A name that is no module of its
    own, as in `from unbatch import Problem`, is an import of `__init__`."""
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        names = (
            name.removeprefix(PACKAGE).removeprefix(".")
            for name in imports(source)
            if is_inside(name, PACKAGE)
        )
        graph[module] = {_module(name, files) for name in names}
    return graph


def _module(name: str, files: Sources) -> str:
    """The file that `a.b.c` comes from: as much of the name as is one."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or "__init__"


def unlisted(files: Sources) -> list[str]:
    return [
        f"{module}.py is in no wing: add a line to WINGS in tests/house/test_imports.py"
        for module in files
        if wing(module) is None
    ]


def upward_imports(files: Sources) -> list[str]:
    complaints = []
    for importer, targets in import_graph(files).items():
        own = wing(importer)
        for imported in sorted(targets):
            its = wing(imported)
            if own is not None and its is not None and its not in may_import(own):
                complaints.append(
                    f"{importer}.py imports {imported}.py, and {own} may not import {its}"
                )
    return complaints


def cycles(files: Sources) -> list[str]:
    try:
        TopologicalSorter(import_graph(files)).prepare()
    except CycleError as error:
        # graphlib lists each module before the one that imports it
        return ["circular import: " + " -> ".join(reversed(error.args[1]))]
    return []


def trespasses(files: Sources) -> list[str]:
    return [
        f"{module}.py uses {prefix}, which only {' and '.join(owners)} may know"
        for module, source in files.items()
        for prefix, owners in OWNERS.items()
        if not any(is_inside(module, owner) for owner in owners)
        if any(is_inside(name, prefix) for name in mentions(source))
    ]


def without_docstring(files: Sources) -> list[str]:
    return [
        f"{module}.py does not begin with a docstring that says what lives there"
        for module, source in files.items()
        if ast.get_docstring(ast.parse(source)) is None
    ]


CHECKS = [unlisted, upward_imports, cycles, trespasses, without_docstring]


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_obeys(check):
    files = sources()
    assert "__init__" in files, "the package was not found, so nothing would be checked"
    assert not (complaints := check(files)), "\n".join(complaints)


PLANTED = {
    "module without a wing": (unlisted, {"helpers": ""}),
    "import from above": (
        upward_imports,
        {
            "capture.graph": "from unbatch.analysis.structure import Verdict",
            "analysis.structure": "",
        },
    ),
    "import from above, inside a wing": (
        upward_imports,
        {
            "analysis.domain.ownership": "from unbatch.analysis.rules import views",
            "analysis.rules.views": "",
        },
    ),
    "import from above, relative": (
        upward_imports,
        {"errors": "from . import capture", "capture": ""},
    ),
    "import from above, late": (
        upward_imports,
        {"capture.ops": "def f():\n    import unbatch.cli.demo", "cli.demo": ""},
    ),
    "import of a neighbour": (
        upward_imports,
        {"linalg.rows": "from unbatch.capture import graph", "capture.graph": ""},
    ),
    "import of an integration": (
        upward_imports,
        {"curvature.ggn": "import unbatch.integrations.laplace", "integrations.laplace": ""},
    ),
    "import of the whole package": (
        upward_imports,
        {"capture.ops": "import unbatch as ub", "__init__": ""},
    ),
    "circle within a wing": (
        cycles,
        {
            "capture.ops": "from unbatch.capture.graph import Graph",
            "capture.graph": "from unbatch.capture.ops import base_name",
        },
    ),
    "circle through the package": (
        cycles,
        {"report": "from unbatch import Problem", "__init__": "from .report import text"},
    ),
    "dispatch mode": (
        trespasses,
        {"analysis.rules.views": "from torch.utils._python_dispatch import TorchDispatchMode"},
    ),
    "dispatch mode, by its parent": (
        trespasses,
        {"capture.ops": "from torch.utils import _python_dispatch"},
    ),
    "graph without an import": (
        trespasses,
        {"analysis.inference": "import torch\ng = torch.fx.Graph()"},
    ),
    "another's tool": (trespasses, {"curvature.ggn": "def f():\n    import laplace"}),
    "late plot": (trespasses, {"report.tables": "def f():\n    import matplotlib.pyplot as plt"}),
    "no docstring": (without_docstring, {"analysis": "# analysis\nx = 1"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name):
    check, files = PLANTED[name]
    assert len(check(files)) == 1


def test_an_honest_package_passes():
    files = {
        "errors": '"""Errors."""',
        "capture.graph": '"""Graphs."""\nimport torch.fx\nfrom unbatch.errors import Refusal',
        "analysis.rules.views": '"""Views."""\nfrom unbatch.capture.graph import Graph',
        "report.plot": '"""Pictures."""\ndef draw():\n    import matplotlib.pyplot as plt',
        "plot": '"""Pictures, for a user."""\nfrom unbatch.report.plot import draw',
        "__init__": '"""The package."""\nfrom unbatch.plot import draw',
        "cli.demo": '"""The tour."""\nimport unbatch as ub',
    }
    assert [complaint for check in CHECKS for complaint in check(files)] == []


def test_the_package_comes_without_torch():
    """And every public name with it; what Python looks for in a module is
    no reason to fetch them.
    """
    quiet = "import sys, unbatch; hasattr(unbatch, '__wrapped__'); early = 'torch' in sys.modules"
    listed = "set(unbatch.__all__) <= {*globals(), *dir(unbatch)}"
    code = f"{quiet}; from unbatch import *; print(early, {listed})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
    assert all(hasattr(unbatch, name) for name in (*unbatch.__all__, "plot", "spectra", "errors"))
    with pytest.raises(AttributeError, match="has no attribute 'Prblem'"):
        unbatch.Prblem  # noqa: B018


@pytest.mark.parametrize(
    "module", ["report.page", "problem.problem", "integrations.backpack", "cli.commands"]
)
def test_any_module_can_be_the_first(module):
    """A name that is looked up while its module is on its way must not fetch all others."""
    subprocess.run([sys.executable, "-c", f"import unbatch.{module}"], check=True)


def test_integrations_are_there_without_an_import_of_their_own():
    """And what they need is imported when they are asked for, not with the package."""
    early = "import sys, unbatch as ub; early = 'unbatch.integrations.backpack' in sys.modules"
    asked = f"{early}; ub.integrations.backpack"
    names = ("matplotlib", "laplace", "transformers", "lightning", "sklearn")
    heavy = f"[m for m in {names} if m in sys.modules]"
    run = [sys.executable, "-c", f"{asked}.attach; print(early, {heavy})"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False []\n"
    with pytest.raises(AttributeError, match="there are backpack"):
        unbatch.integrations.tensorflow  # noqa: B018
