"""The code on a page, and how it is run."""

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


WITNESS = re.compile(r"replacing sample \d+ moved prediction \d+ by \S+ of its size")


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall(page)


def words(text: str) -> str:
    return WITNESS.sub("WITNESS", " ".join(text.split()))


def run_python(code: str, namespace: dict) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "example.py", "exec"), namespace)
    return out.getvalue()


def granted() -> dict:
    """The names that a page may take for granted, as in ``Problem(model, loss, (X, y))``."""
    model, loss = nn.Linear(4, 3), nn.CrossEntropyLoss()
    return {
        "__name__": "page",
        "model": model,
        "loss": loss,
        "X": torch.randn(8, 4),
        "y": torch.randint(3, (8,)),
    }


def load(path: str):
    """A file that is no part of the package, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
