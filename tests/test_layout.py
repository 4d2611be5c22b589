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

# A module imports from its own level or from below. `__init__` stands where the facade stands:
# what shows the package to a user may import it whole, what the package is made of may not.
LEVELS = {
    # vocabulary
    "errors": 0,
    "ops": 0,
    "labels": 0,
    "purity": 0,
    "processes": 0,
    "scalars": 0,
    "precision": 0,
    "rows": 0,
    "probes": 0,
    "consequences": 0,
    "lockstep": 0,
    "reference": 0,
    "algebra": 1,
    "device_ops": 1,
    "graph": 1,
    "aliasing": 1,
    "sample_layout": 1,
    "tree": 1,
    "operator": 2,
    # what an op does, and what the program did
    "rules": 2,
    "families": 2,
    "layers": 2,
    "recurrences": 2,
    "loss_rules": 2,
    "moves": 2,
    "indexing": 2,
    "arranged": 2,
    "unwrapped": 1,
    "folds": 1,
    "terms": 2,
    "reading": 2,
    "capture": 2,
    "branches": 2,
    "contractions": 2,
    "products": 2,
    "broadcasts": 2,
    "lookups": 2,
    "convolutions": 2,
    "mixing": 2,
    "kinds": 2,
    "parts": 2,
    "derivatives": 2,
    "substitutes": 2,
    # what follows from both
    "walk": 3,
    "starts": 3,
    "split": 3,
    "verdicts": 3,
    "structure": 4,
    # gradients taken apart
    "weights": 2,
    "plan": 4,
    "results": 1,
    "sites": 5,
    "operands": 5,
    "route": 5,
    "sweep": 5,
    "setting": 5,
    "guard": 3,
    "cotangents": 6,
    "roots": 3,
    "loss": 6,
    "compositions": 2,
    "tangents": 2,
    "live": 6,
    "linearised": 6,
    "sources": 6,
    "trust": 6,
    "request": 6,
    "quantities": 6,
    "diagnostics": 6,
    "statistics": 6,
    "compression": 6,
    "curvature": 6,
    "columns": 6,
    "gradients": 6,
    "solvers": 2,
    "estimates": 2,
    "spectra": 2,
    "spectrum": 2,
    "ggn": 6,
    "blocks": 6,
    # numerical witnesses
    "oracle": 5,
    "witness": 5,
    "loss_witness": 5,
    "crosstalk": 5,
    "verify": 6,
    # what a user touches
    "recording": 6,
    "checks": 6,
    "meetings": 5,
    "stages": 5,
    "figure": 5,
    "diagram": 6,
    "question": 6,
    "problem": 7,
    "report": 8,
    "arguments": 8,
    "plot": 8,
    "answers": 8,
    "journal": 8,
    "monitor": 8,
    "page": 8,
    "public": 8,
    "__init__": 8,
    "integrations": 9,  # and all files in there
    "demo": 9,
    "cli": 9,
    "__main__": 9,
}
EXEMPT = {"__init__", "__main__"}  # may import from any level, but not in a circle

# Whatever starts with the key is known to these modules only.
OWNERS = {
    "torch.utils._python_dispatch": ("capture", "purity"),
    "torch.overrides": ("scalars", "lockstep", "live"),
    "torch.fx": ("capture",),
    "torch.export": ("capture",),
    "torch.distributed": ("processes",),
    "matplotlib": ("figure", "plot"),
    "jinja2": ("page",),
    "scipy": ("operator",),
    "curvlinops": ("integrations.curvlinops",),
    "laplace": ("integrations.laplace",),
    "opacus": ("integrations.opacus",),
    "lightning": ("integrations.lightning",),
    "transformers": ("integrations.transformers",),
    "pytorch_lightning": ("integrations.lightning",),
    "tensorboard": ("monitor",),
    "torch.utils.tensorboard": ("monitor",),
}

Sources = Mapping[str, str]


def sources() -> Sources:
    folder = Path(__file__).parent.parent / "src" / PACKAGE
    paths = {path.relative_to(folder).with_suffix(""): path for path in sorted(folder.rglob("*.py"))}
    names = {".".join(short.parts).removesuffix(".__init__"): path for short, path in paths.items()}
    return {name: path.read_text(encoding="utf-8") for name, path in names.items()}


def level(module: str) -> int | None:
    return LEVELS.get(module.partition(".")[0])


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
    """What is imported, and what is reached through attributes: `torch.fx.Graph` needs no import."""
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
        names = (name.removeprefix(PACKAGE).removeprefix(".") for name in imports(source) if is_inside(name, PACKAGE))
        graph[module] = {_module(name, files) for name in names}
    return graph


def _module(name: str, files: Sources) -> str:
    """The file that `a.b.c` comes from: as much of the name as is one."""
    while name and name not in files:
        name = name.rpartition(".")[0]
    return name or "__init__"


def unlisted(files: Sources) -> list[str]:
    return [
        f"{module}.py has no level: add it to LEVELS in tests/test_layout.py"
        for module in files
        if level(module) is None
    ]


def upward_imports(files: Sources) -> list[str]:
    return [
        f"{importer}.py (level {own}) imports {imported}.py (level {its})"
        for importer, targets in import_graph(files).items()
        for imported in sorted(targets)
        if importer not in EXEMPT
        if (own := level(importer)) is not None and (its := level(imported)) is not None and its > own
    ]


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
        if module not in owners and any(is_inside(name, prefix) for name in mentions(source))
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
    "module without a level": (unlisted, {"helpers": ""}),
    "import from above": (upward_imports, {"labels": "from unbatch.rules import RULES", "rules": ""}),
    "import from above, relative": (upward_imports, {"labels": "from . import rules", "rules": ""}),
    "import from above, late": (upward_imports, {"labels": "def f():\n    import unbatch.cli", "cli": ""}),
    "import of an integration": (
        upward_imports,
        {"ggn": "import unbatch.integrations.laplace", "integrations.laplace": ""},
    ),
    "import of the whole package": (upward_imports, {"rules": "import unbatch as ub", "__init__": ""}),
    "circle within a level": (
        cycles,
        {"capture": "from .rules import RULES", "rules": "from .capture import Graph"},
    ),
    "circle through the package": (
        cycles,
        {"report": "from unbatch import Problem", "__init__": "from .report import text"},
    ),
    "dispatch mode": (trespasses, {"rules": "from torch.utils._python_dispatch import TorchDispatchMode"}),
    "dispatch mode, by its parent": (trespasses, {"rules": "from torch.utils import _python_dispatch"}),
    "graph without an import": (trespasses, {"structure": "import torch\ng = torch.fx.Graph()"}),
    "another's tool": (trespasses, {"ggn": "def f():\n    import laplace"}),
    "late plot": (trespasses, {"report": "def f():\n    import matplotlib.pyplot as plt"}),
    "no docstring": (without_docstring, {"labels": "# labels\nx = 1"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name):
    check, files = PLANTED[name]
    assert len(check(files)) == 1


def test_an_honest_package_passes():
    files = {
        "errors": '"""Errors."""',
        "labels": '"""Labels."""\nfrom .errors import Refusal',
        "capture": '"""Graphs."""\nimport torch\nimport torch.fx\nfrom unbatch.errors import Refusal',
        "plot": '"""Pictures."""\ndef draw():\n    import matplotlib.pyplot as plt',
        "__init__": '"""The package."""\nfrom unbatch.plot import draw',
        "demo": '"""The tour."""\nimport unbatch as ub',
    }
    assert [complaint for check in CHECKS for complaint in check(files)] == []


def test_the_package_comes_without_torch():
    """And every public name with it; what Python looks for in a module is no reason to fetch them."""
    quiet = "import sys, unbatch; hasattr(unbatch, '__wrapped__'); early = 'torch' in sys.modules"
    code = f"{quiet}; from unbatch import *; print(early, set(unbatch.__all__) <= {{*globals(), *dir(unbatch)}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
    assert all(hasattr(unbatch, name) for name in (*unbatch.__all__, "plot", "spectra", "errors"))
    with pytest.raises(AttributeError, match="has no attribute 'Prblem'"):
        unbatch.Prblem  # noqa: B018


@pytest.mark.parametrize("module", ["page", "problem", "integrations.backpack", "cli"])
def test_any_module_can_be_the_first(module):
    """A name that is looked up while its module is on its way must not fetch all others."""
    subprocess.run([sys.executable, "-c", f"import unbatch.{module}"], check=True)


def test_integrations_are_there_without_an_import_of_their_own():
    """And what they need is imported when they are asked for, not with the package."""
    asked = (
        "import sys, unbatch as ub; early = 'unbatch.integrations.backpack' in sys.modules; ub.integrations.backpack"
    )
    heavy = "[m for m in ('matplotlib', 'laplace', 'transformers', 'lightning', 'sklearn') if m in sys.modules]"
    run = [sys.executable, "-c", f"{asked}.attach; print(early, {heavy})"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "False []\n"
    with pytest.raises(AttributeError, match="there are backpack"):
        unbatch.integrations.tensorflow  # noqa: B018
