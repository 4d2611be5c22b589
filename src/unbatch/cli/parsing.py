"""What is typed becomes tensors and models; what makes no sense, an error with the remedy.

Shapes are drawn at random. Losses and their targets are in ``losses.py``. Nothing about structure
is known here, and nothing is printed.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from unbatch.errors import InputError

MSG_TARGET = (
    "{what} {value!r} does not name anything: write package.module:name or path/to/file.py:name, "
    "e.g. mylib.nets:make_model."
)


MSG_NO_FILE = (
    "There is no file {path!r}, seen from the current directory, {folder}. Check the path."
)


MSG_NO_MODULE = (
    "There is no module {name!r} to import. The current directory ({folder}) and the installed "
    "packages were searched; for a file, write its path: path/to/file.py:name."
)


MSG_IMPORT = (
    "Importing {name!r} raised {error}. Run `python -c 'import ...'` on it to see the whole "
    "traceback."
)


MSG_NO_NAME = "{module!r} has no {name!r}. {hint}"


MSG_NOT_MODEL = (
    "{value!r} must be a torch.nn.Module, a class of them, or a function without arguments that "
    "returns one; it is {kind}. Wrap it: `def make_model(): return ...`."
)


MSG_FACTORY = "Calling {value!r} without arguments raised {error}. Name a function that needs none."


MSG_SHAPE = (
    "{option} {value!r} is no shape. Write positive sizes with commas, and after a colon a dtype "
    "where it is not float32: 8,3,32,32 or 8,128:int64 or, for integers from 0 to 49, "
    "'8,128:int64<50'."
)


MSG_DTYPE = "{option} {value!r} has the dtype {dtype!r}, which torch does not have. {hint}"


MSG_BOUND = (
    "{option} {value!r} bounds values of dtype {dtype}; only integers take a bound, e.g. "
    "'8,128:int64<50'."
)


MSG_NAMES = (
    "--input {values} mixes named inputs with unnamed ones. Name all of them (name=SHAPE) or none."
)


MSG_TWICE = "--input names {name!r} twice. Give every named input once."


# --- shapes ---------------------------------------------------------------------------------------


# "mask=8,128:int64<50", of which all but the sizes may be missing.
SHAPE_FORM = re.compile(
    r"""
    (?:(?P<name>[A-Za-z_]\w*)=)?
    (?P<sizes>\d+(?:,\d+)*),?
    (?: : (?P<dtype>\w+) (?:<(?P<bound>\d+))? )?
    """,
    re.VERBOSE,
)


DEFAULT_BOUND = 10  # of integers


@dataclass(frozen=True)
class Shape:
    """A tensor to be drawn: normal floats, integers from 0 below ``bound``, or booleans.

    ``dtype`` is None where none was typed, ``text`` is what was typed.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None
    bound: int = DEFAULT_BOUND
    name: str = ""
    text: str = ""

    @classmethod
    def parse(cls, text: str, option: str) -> Shape:
        """Return the shape that "8,128:int64<50" describes. Raises ``InputError``."""
        match = SHAPE_FORM.fullmatch(text.replace(" ", ""))
        if match is None:
            raise InputError(MSG_SHAPE.format(option=option, value=text))
        sizes = tuple(int(size) for size in match["sizes"].split(","))
        # The pattern lets zeros pass, which leave nothing to draw.
        bound = int(match["bound"] or DEFAULT_BOUND)
        if 0 in sizes or bound == 0:
            raise InputError(MSG_SHAPE.format(option=option, value=text))
        dtype = None
        if match["dtype"]:
            dtype = _dtype(match["dtype"], text, option)
        if match["bound"] and not _is_integral(dtype):
            raise InputError(MSG_BOUND.format(option=option, value=text, dtype=dtype))
        return cls(sizes, dtype, bound, match["name"] or "", text)

    def __str__(self) -> str:
        return self.text

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return a random tensor."""
        dtype = self.dtype or torch.get_default_dtype()
        if dtype == torch.bool:
            return torch.randint(2, self.sizes, generator=generator).bool()
        if _is_integral(dtype):
            return torch.randint(self.bound, self.sizes, generator=generator).to(dtype)
        return torch.randn(self.sizes, generator=generator).to(dtype)


def _is_integral(dtype: torch.dtype | None) -> bool:
    """Return whether a dtype has integers in it, other than booleans."""
    if dtype is None or dtype == torch.bool:
        return False
    return not (dtype.is_floating_point or dtype.is_complex)


def _dtype(name: str, text: str, option: str) -> torch.dtype:
    """Return the dtype of a name; raises ``InputError`` with names that look like it."""
    dtype = getattr(torch, name, None)
    if isinstance(dtype, torch.dtype):
        return dtype
    names = [n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)]
    hint = suggestion(name, names, "Try float64 or int64.")
    raise InputError(MSG_DTYPE.format(option=option, value=text, dtype=name, hint=hint))


def as_inputs(shapes: Sequence[Shape], generator: torch.Generator) -> Any:
    """Return one tensor, a tuple of them, or a dict where they have names.

    Raises ``InputError`` where only some have one, or two the same.
    """
    names = [shape.name for shape in shapes if shape.name]
    if not names:
        tensors = tuple(shape.draw(generator) for shape in shapes)
        if len(tensors) == 1:
            return tensors[0]
        return tensors
    if len(names) < len(shapes):
        raise InputError(MSG_NAMES.format(values=" ".join(map(str, shapes))))
    for name in names:
        if names.count(name) > 1:
            raise InputError(MSG_TWICE.format(name=name))
    return {shape.name: shape.draw(generator) for shape in shapes}


# --- models by name -------------------------------------------------------------------------------


def make_model(target: str, seed: int) -> nn.Module:
    """Return the model that TARGET names, or what it returns when called. Raises ``InputError``."""
    # Seeded for the import, which may make models, and again for the call, which may follow an
    # earlier import.
    torch.manual_seed(seed)
    value = named(target, "TARGET")
    torch.manual_seed(seed)
    if isinstance(value, nn.Module):
        return value
    if not callable(value):
        raise InputError(MSG_NOT_MODEL.format(value=target, kind=kind_of(value)))
    try:
        model = value()
    except Exception as error:
        raise InputError(MSG_FACTORY.format(value=target, error=_in_words(error))) from error
    if not isinstance(model, nn.Module):
        kind = f"a function that returned {kind_of(model)}"
        raise InputError(MSG_NOT_MODEL.format(value=target, kind=kind))
    return model


def named(target: str, what: str) -> Any:
    """Return what "package.module:name" or "path/to/file.py:name" names. Raises ``InputError``.

    ``what``: the argument in which it was typed.
    """
    # From the right, because a path may hold a colon itself, as on Windows.
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise InputError(MSG_TARGET.format(what=what, value=target))
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    # Dots reach into what the module defines, as in mylib:Nets.small.
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            names = [n for n in dir(value) if not n.startswith("_")]
            hint = suggestion(part, names, "Name something it defines.")
            raise InputError(MSG_NO_NAME.format(module=place, name=name, hint=hint))
        value = getattr(value, part)
    return value


def _load_file(path: Path) -> ModuleType:
    """Import a file by its path, once; what lies beside it can be imported, as when it is run."""
    if not path.is_file():
        raise InputError(MSG_NO_FILE.format(path=str(path), folder=Path.cwd()))
    # A name of our own: that of the file may be that of an installed package.
    name = f"unbatch_target:{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:  # never of a .py file, but the types allow it
        raise InputError(MSG_NO_FILE.format(path=str(path), folder=Path.cwd()))
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.resolve().parent)
    # Registered before it runs, as `import` does: dataclasses look their module up.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(MSG_IMPORT.format(name=str(path), error=_in_words(error))) from error
    return module


def _load_module(name: str) -> ModuleType:
    """Import a module by its name, from the current directory as well."""
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Missing itself, or one of its packages; otherwise it exists and imports what is missing.
        missing = error.name or ""
        if missing and f"{name}.".startswith(f"{missing}."):
            raise InputError(MSG_NO_MODULE.format(name=name, folder=Path.cwd())) from error
        raise InputError(MSG_IMPORT.format(name=name, error=_in_words(error))) from error
    except Exception as error:
        raise InputError(MSG_IMPORT.format(name=name, error=_in_words(error))) from error


def _make_importable(folder: Path) -> None:
    """Put a folder first where Python looks for modules."""
    # First, as when Python runs a file in that folder; once, however many files are loaded.
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


# --- words ----------------------------------------------------------------------------------------


def suggestion(word: str, names: Sequence[str], otherwise: str) -> str:
    """Return the names that look like a word, as a question, or ``otherwise``."""
    close = get_close_matches(word, names, n=3)
    if not close:
        return otherwise
    return f"Did you mean {' or '.join(close)}?"


def kind_of(value: Any) -> str:
    """Return the class of a value with its article."""
    name = type(value).__name__
    article = "an" if name[0] in "aeiouAEIOU" else "a"
    return f"{article} {name}"


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
