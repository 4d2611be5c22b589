"""Versions of PyTorch: what is said under one that was not tested, and that the page is right.

How a version is found is tested on folders named `torch` that hold a version and nothing else.
"""

import os
import re
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch

from cases import versions as table
from unbatch import versions
from unbatch.versions import TESTED, minor

ROOT = Path(__file__).resolve().parents[2]

IMPORT = """
{before}
import unbatch
import unbatch as again
import unbatch.errors
print("torch" in sys.modules)
"""

FORWARD_MODE = """
import sys, torch, unbatch as ub
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(), torch.nn.Linear(8, 3))
problem = ub.Problem(
    model, torch.nn.functional.cross_entropy, (torch.randn(16, 4), torch.randint(3, (16,)))
)
problem.ggn().diag()
problem.ggn() @ {name: torch.ones_like(p) for name, p in model.named_parameters()}
assert "torch._decomp.decompositions_for_jvp" in sys.modules
"""


def python(code: str, *options: str, folder: Path | None = None, **environment: str):
    """Run code as a user does, in a process of its own."""
    path = f"import sys; sys.path.insert(0, {str(folder)!r})" if folder else "import sys"
    return subprocess.run(
        [sys.executable, *options, "-c", f"{path}\n{code}"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture
def torch_of(tmp_path):
    """`torch_of(version)`: a folder with a torch of that version, which cannot be imported."""

    def make(version: str) -> Path:
        package = tmp_path / "torch"
        package.mkdir()
        (package / "__init__.py").write_text("raise AssertionError('imported')\n")
        (package / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
        return tmp_path

    return make


# --- the warning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.99.0", "3.0.0a0+git1234", "2.1.3"])
def test_an_untested_version_warns_once(torch_of, version):
    done = python(IMPORT.format(before=""), folder=torch_of(version))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False\n", "torch was imported"
    assert done.stderr.count("UserWarning") == 1
    assert version in done.stderr
    assert f"pip install 'torch=={TESTED[-1]}.*'" in done.stderr
    assert "<string>:4: UserWarning" in done.stderr, "it names another line than the import"


@pytest.mark.parametrize("version", [*(f"{tested}.7+cu130" for tested in TESTED), "2.13.0a0"])
def test_a_tested_version_is_silent(torch_of, version):
    done = python(IMPORT.format(before=""), "-W", "error", folder=torch_of(version))
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_of_a_torch_that_is_imported_counts():
    before = "import types; sys.modules['torch'] = types.SimpleNamespace(__version__='2.99.0')"
    done = python(IMPORT.format(before=before))
    assert "PyTorch 2.99.0" in done.stderr


def test_the_warning_is_silenced_as_it_says(torch_of):
    (remedy,) = re.findall(r"warnings\.filterwarnings\(.*\)", versions.MSG_UNTESTED)
    before = f"import warnings; {remedy}"
    done = python(IMPORT.format(before=before), folder=torch_of("2.99.0"))
    assert done.stderr == ""


def test_a_shell_that_completes_words_sees_no_warning(torch_of):
    folder = torch_of("2.99.0")
    done = python(IMPORT.format(before=""), folder=folder, _UNBATCH_COMPLETE="complete_bash")
    assert done.stderr == ""


def test_where_no_version_is_found_nothing_is_said(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "torch")
    for spec in (None, util.spec_from_file_location("torch", tmp_path / "__init__.py")):
        monkeypatch.setattr(versions, "find_spec", lambda _, spec=spec: spec)
        assert versions.installed() is None
        versions.warn_of_untested()


def test_both_ways_find_the_version(monkeypatch):
    assert versions.installed() == torch.__version__
    monkeypatch.delitem(sys.modules, "torch")
    assert versions.installed() == torch.__version__


def test_forward_mode_warns_of_nothing():
    """PyTorch warns that it scripts what its own forward mode needs; a user cannot help it."""
    done = python(FORWARD_MODE, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture
def written(request):
    """The page and the counts, which are not written yet where a run is counted."""
    if request.config.getoption("--record"):
        pytest.skip("the page is written after this run")


def test_the_page_is_what_was_counted(written):
    assert table.PAGE.read_text(encoding="utf-8") == table.page()


def test_what_was_counted_is_what_the_package_says_was_tested(written):
    assert tuple(table.minors()) == TESTED


def test_the_oldest_version_is_what_the_package_requires():
    assert f'"torch>={TESTED[0]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_pinned_version_is_tested():
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert minor(pinned) in TESTED


def test_counts_are_kept_by_version_and_tier(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "COUNTS", tmp_path / "versions.json")
    report = type("Report", (), {"nodeid": "tests/test_m.py::test_f"})
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    table.record("quick", {"passed": [report, report], "skipped": [report], "failed": [report]})
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    table.record("rest", {"passed": [report], "error": [report]})
    assert list(table.read()) == ["2.9.0", "2.14.1"]
    page = table.page()
    assert "2 passed, 1 skipped" in page
    assert page.count("| not run |") == 2
    assert page.count(report.nodeid) == 2
