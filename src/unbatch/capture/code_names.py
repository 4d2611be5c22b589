"""The names in the code of a program, and whose code it is: the user's is read, other code is not.

What the names stand for is looked up in ``reachable.py``.
"""

from __future__ import annotations

import dis
import functools
import os
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator

import torch

from unbatch.errors import HERE

# Code from here is no user's, and is not read.
INSTALLED: tuple[str, ...] = (
    sysconfig.get_paths()["purelib"],
    sysconfig.get_paths()["stdlib"],
    HERE,
)
INSTALLED += (torch.__path__[0],)

# Code that names one of these may read any attribute.
DYNAMIC = frozenset(
    [
        "vars",
        "__dict__",
        "__getattribute__",
        "__getstate__",
        "__reduce__",
        "__reduce_ex__",
        "dumps",
        "getattr",
        "getmembers",
        "hash",
        "model_dump",
        "setattr",
        "to_dict",
        "to_json",
        "asdict",
        "astuple",
        "fields",
        "attrgetter",
        "deepcopy",
        "eval",
        "exec",
    ]
)

# Code that names one of these may read any name of its module.
NAMESPACES = frozenset(["globals", "eval", "exec"])

# What makes a text of any object that it is given, and the methods that are asked for it.
PRINTING = frozenset(["FORMAT_VALUE", "FORMAT_SIMPLE", "FORMAT_WITH_SPEC", "CONVERT_VALUE"])
PRINTERS = frozenset(["str", "repr", "format", "print", "join"])
PRINTED = frozenset(["__str__", "__repr__", "__format__"])

# What ``print`` calls of a file that it is given.
OF_FILES = frozenset(["write", "flush"])

GLOBAL_NAMES = frozenset(["LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"])

# --- code -----------------------------------------------------------------------------------------


class Reads:
    """The names in some code.

    ``globals``: read or written; ``attributes``: read, also in ``words``, as for ``getattr``;
    ``stored``: attributes that are written; ``imported``: modules, while it runs.
    """

    def __init__(self) -> None:
        self.globals: set[str] = set()
        self.attributes: set[str] = set()
        self.words: set[str] = set()
        self.stored: set[str] = set()
        self.imported: set[str] = set()

    def add(self, other: Reads) -> bool:
        """Add other names; return whether there were any new ones among them."""
        fresh = False
        for kind, names in vars(other).items():
            mine = getattr(self, kind)
            fresh |= not names <= mine
            mine |= names
        return fresh

    def add_words(self, words: Iterable[str]) -> None:
        """Add attributes that are named in texts."""
        self.words.update(words)
        self.attributes.update(words)


_READS: weakref.WeakKeyDictionary[types.CodeType, Reads] = weakref.WeakKeyDictionary()


def names_in(code: types.CodeType) -> Reads:
    """Return the names in code, and in that of the functions defined inside it."""
    if code in _READS:
        return _READS[code]
    reads = Reads()
    for part in codes_in(code):
        has_patterns = False
        for instruction in dis.get_instructions(part):
            _read_instruction(instruction, reads)
            has_patterns |= instruction.opname == "MATCH_CLASS"
        for constant in part.co_consts:
            if isinstance(constant, str):
                _read_text(constant, reads)
            elif isinstance(constant, tuple) and has_patterns:
                reads.words.update(name for name in constant if isinstance(name, str))
    # What looks attributes up by other means is a global function.
    reads.attributes |= reads.words | (reads.globals & DYNAMIC)
    if not PRINTERS.isdisjoint(reads.globals | reads.attributes):
        reads.attributes |= PRINTED
    if "print" in reads.globals:
        reads.attributes |= OF_FILES
    _READS[code] = reads
    return reads


def _read_instruction(instruction: dis.Instruction, reads: Reads) -> None:
    if instruction.opname in GLOBAL_NAMES:
        reads.globals.add(instruction.argval)
    elif instruction.opname == "STORE_ATTR":
        reads.stored.add(instruction.argval)
    elif instruction.opname == "IMPORT_NAME":
        reads.imported.add(instruction.argval)
    elif instruction.opname == "MATCH_CLASS":
        reads.attributes.add("__match_args__")
    elif instruction.opname in PRINTING:
        reads.attributes |= PRINTED
    elif instruction.opcode in dis.hasname:
        reads.attributes.add(instruction.argval)


def _read_text(text: str, reads: Reads) -> None:
    """Note a text as the name that it may be, or the names of attributes in a format."""
    if text.isidentifier():
        reads.words.add(text)
    elif "{" in text:
        reads.words.update(IN_FORMAT.findall(text))


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of all functions that are defined inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


# The attributes that a format names: ``scale`` in ``"{0.scale}"``.
IN_FORMAT = re.compile(r"\{\w*\.(\w+)")

# Code that names one of these may run in other threads.
THREADS = frozenset(
    [
        "Thread",
        "ThreadPool",
        "ThreadPoolExecutor",
        "Timer",
        "parallel_apply",
        "run_in_executor",
        "start_new_thread",
        "to_thread",
    ]
)

# --- what is whose --------------------------------------------------------------------------------


def is_installed(file: str | None) -> bool:
    """Return whether code in a file is no user's."""
    return file is None or file.startswith((*INSTALLED, "<frozen"))


def lies_in(module: str, packages: tuple[str, ...]) -> bool:
    """Return whether a module is one of some packages, or lies in one of them."""
    return any(module == name or module.startswith(name + ".") for name in packages)


@functools.cache
def _module_is_installed(name: str) -> bool:
    if name == "__main__":
        return False
    module = sys.modules.get(name)
    if module is None:
        return False  # made while the program runs
    return is_installed_module(module)


def is_installed_module(module: types.ModuleType) -> bool:
    """Return whether a module is no user's."""
    if module.__name__ == "__main__":
        return False
    file = getattr(module, "__file__", None)
    # One without a file is Python's own, unless somebody has made it by hand.
    if file is None:
        return getattr(module, "__spec__", None) is not None
    # Some modules of libraries are no files, and only have a name for one.
    return is_installed(file) or not os.path.isabs(file)


def is_installed_class(kind: type) -> bool:
    """Return whether a class is no user's."""
    return _module_is_installed(kind.__module__)
