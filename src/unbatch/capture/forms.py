"""Which forms of PyTorch's ops were known when the rules were written, with their arguments.

What is known of an op is kept by its name, and serves all its forms (``add.Tensor``,
``add.Scalar``). A form that a later PyTorch brings, or an argument that it adds to one, may mean
anything: such a form has a name of its own here, which no table knows.

``forms.txt`` has a line for each form. `python -m unbatch.capture.forms` adds those of the PyTorch
that is installed, and prints them, to be looked at: a line that stays says that the rules of this
name are right for it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("forms.txt")

ATEN = "aten::"


@cache
def known() -> frozenset[str]:
    """Return the lines of ``forms.txt``."""
    return frozenset(FILE.read_text(encoding="utf-8").splitlines())


@cache
def full_name(op: Any) -> str:
    """Return the name of an op without ``aten::``, and without its overload if the form is known.

    An op of a library has the same name in all its forms: nothing of ours is kept under it.
    """
    name: str = op._schema.name
    if not name.startswith(ATEN) or line(op._schema) in known():
        return name.removeprefix(ATEN)
    return f"{name}.{op._schema.overload_name or 'default'}"


def line(schema: Any) -> str:
    """Return what stands for a form: its name, and those of its arguments."""
    name = schema.name.removeprefix(ATEN)
    if schema.overload_name:
        name = f"{name}.{schema.overload_name}"
    return " ".join([name, *(argument.name for argument in schema.arguments)])


def installed() -> list[str]:
    """Return the forms that the installed PyTorch can run."""
    runs = set(torch._C._dispatch_get_all_op_names())
    lines = []
    for schema in torch._C._jit_get_all_schemas():
        form = line(schema)
        if schema.name.startswith(ATEN) and ATEN + form.split()[0] in runs:
            lines.append(form)
    return lines


def main() -> None:
    """Add the forms of the installed PyTorch to the file."""
    added = sorted({*installed()} - known())
    print("\n".join(added))  # noqa: T201
    FILE.write_text("\n".join(sorted(known().union(added))) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
