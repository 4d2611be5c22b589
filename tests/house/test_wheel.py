"""What a user installs: the wheel, in an environment of its own, away from the source tree.

The environment borrows torch and the other requirements from the one that runs the tests; nothing
is downloaded.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import unbatch

ROOT = Path(__file__).parents[2]
FIVE_LINES = """
import torch, unbatch as ub
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
X, y = torch.randn(16, 4), torch.randint(3, (16,))
problem = ub.Problem(model, torch.nn.functional.cross_entropy, (X, y))
print(problem.structure)
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints. Raises ``AssertionError`` where it fails."""
    clean = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=clean | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def missing(wheel: Path, files: set[str]) -> set[str]:
    """The files that are not in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return files - set(archive.namelist())


def of_the_package() -> set[str]:
    folder = ROOT / "src"
    paths = [*folder.rglob("*.py"), *folder.rglob("*.txt"), *folder.rglob("py.typed")]
    return {path.relative_to(folder).as_posix() for path in paths}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT, cwd=folder)
    (found,) = folder.glob("unbatch-*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of an environment in which the wheel is all that was installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    pip("--python", folder, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    borrowed = sysconfig.get_path(
        "purelib"
    )  # its own .pth files, those of editable installs, are not followed
    (packages / "borrowed.pth").write_text(f"{borrowed}\n", encoding="utf-8")
    return folder


def test_the_wheel_has_every_file_and_the_marker_of_types(wheel):
    wanted = of_the_package()
    assert {"unbatch/__init__.py", "unbatch/py.typed"} <= wanted
    assert missing(wheel, wanted) == set()


def test_a_file_that_is_not_in_the_wheel_is_found(wheel):
    assert missing(wheel, {"unbatch/py.typed", "unbatch/forgotten.py"}) == {"unbatch/forgotten.py"}


def test_five_lines(installed, tmp_path):
    said = run(installed / "bin/python", "-c", FIVE_LINES + "print(ub.__file__)", cwd=tmp_path)
    assert "independent forward    ✗ fails" in said
    assert Path(said.splitlines()[-1]).is_relative_to(installed), (
        "it is the source tree that was imported"
    )


@pytest.mark.parametrize("command", [("bin/python", "-m", "unbatch"), ("bin/unbatch",)])
def test_version(installed, tmp_path, command):
    executable, *words = command
    said = run(installed / executable, *words, "--version", cwd=tmp_path)
    assert said == f"unbatch {unbatch.__version__}\n"


def test_completion(installed, tmp_path):
    assert "--install-completion" in run(installed / "bin/unbatch", "--help", cwd=tmp_path)


def test_the_demo_runs(installed, tmp_path):
    pytest.importorskip("sklearn")
    said = run(installed / "bin/unbatch", "demo", "--quick", "-o", "folder/page.html", cwd=tmp_path)
    assert "independent forward" in said
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()] == [
        "folder/page.html"
    ]
