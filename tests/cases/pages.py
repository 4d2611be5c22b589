"""The code on a page, and how it is run."""

import contextlib
import io
import re

import torch
from torch import nn

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
