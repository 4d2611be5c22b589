"""The notebooks run from top to bottom in a kernel of their own, and
print what is stored in them.
"""

import copy
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from cases.pages import words

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LARGEST = 30_000  # bytes; pictures belong elsewhere


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """The text of every cell of code."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(out.get("text", "") for out in cell.outputs) for cell in cells]


def check(stored: nbformat.NotebookNode, folder: Path) -> None:
    """Raises ``AssertionError`` where a cell prints something else, ``CellExecutionError`` where
    one does not run.
    """
    ran = copy.deepcopy(stored)
    NotebookClient(
        ran, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for shown, found in zip(printed(stored), printed(ran), strict=True):
        assert words(shown) == words(found), f"stored:\n{shown}\nprinted:\n{found}"


@pytest.fixture(autouse=True)
def _as_here(monkeypatch, tmp_path):
    """The kernel takes the package from where this process has it, and keeps its files out of the
    way.
    """
    import unbatch

    folders = [str(Path(unbatch.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert any(printed(notebook))
    check(notebook, tmp_path)


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


def test_planted_lies_are_found(tmp_path):
    stream = nbformat.v4.new_output("stream", name="stdout", text="2\n")
    other = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print(1)", outputs=[stream])]
    )
    with pytest.raises(AssertionError, match=r"stored:\s+2"):
        check(other, tmp_path)
    raising = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(CellExecutionError):
        check(raising, tmp_path)
