"""What a program can reach: one walk of its objects, flattened into places that can be looked at.

The walk begins at the model and the loss, and follows attributes, items, closures, defaults, and
the globals and attributes that code of the user names. Code that is installed is not read, but its
objects are: the padding of a convolution is an attribute like any other. It serves two purposes:
a recording is valid while these places are what they were (``guards.py``), and a question puts back
what the program changed in them (``isolation.py``).
"""

from __future__ import annotations

import array
import dis
import enum
import functools
import io
import random
import sys
import sysconfig
import types
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbatch.capture.holders import (
    MANY,
    PLAIN,
    VALUES,
    WHOLE,
    Array,
    Attributes,
    Bytes,
    Cell,
    Classes,
    Elements,
    Empty,
    Entries,
    File,
    Holder,
    Items,
    Members,
    Names,
    Slots,
    spread,
)
from unbatch.errors import HERE

# Code from here is no user's, and is not read.
INSTALLED: tuple[str, ...] = (
    sysconfig.get_paths()["purelib"],
    sysconfig.get_paths()["stdlib"],
    HERE,
)
INSTALLED += (torch.__path__[0],)

# Objects of these packages are watched as what they are, and not looked into: they change while a
# program runs and do not decide what it computes.
CLOSED_BOOKS = (
    "logging",
    "threading",
    "_thread",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "weakref",
    "unbatch",
    "lightning",
    "pytorch_lightning",
    "wandb",
    "torch.optim",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "torch.distributed",
    "torch._dynamo",
    "torch._C",
    "torch._ops",
    "torch.jit",
    "torch.fx",
    "torch.autograd",
    "torch.utils.hooks",
)

# How many objects of installed classes may lie inside one another.
DEEPEST = 3

# Bases whose code reads no attribute but those that every module has.
PLAIN_BASES = {"builtins", "abc", "typing", "enum", "torch.nn.modules.module"}

# The attributes that every module has.
OWN_ATTRIBUTES = frozenset(nn.Module().__dict__)

# Code that names one of these may hand the memory of a tensor to numpy, or to others.
EXPORTING = frozenset(
    {
        "__array__",
        "__dlpack__",
        "array",
        "asarray",
        "ascontiguousarray",
        "copyto",
        "frombuffer",
        "from_dlpack",
        "getattr",
        "np",
        "numpy",
    }
)

# Code that names one of these may read any attribute.
DYNAMIC = frozenset(
    [
        "vars",
        "__dict__",
        "getattr",
        "setattr",
        "asdict",
        "astuple",
        "fields",
        "attrgetter",
        "deepcopy",
    ]
)

# Methods that make, copy or print objects: a program that runs does not call them unnamed.
NOT_CALLED = ("__init__", "__post_init__", "__repr__", "__str__", "__reduce__", "__deepcopy__")

GLOBAL_NAMES = frozenset(["LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL", "LOAD_NAME"])

GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)

LEAVES = (*PLAIN, *VALUES, torch.Size, types.BuiltinFunctionType, types.CodeType, enum.Enum)

GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]


class Reachable:
    """What can be reached from some objects, at the moment of the walk.

    ``holders``: places; ``tensors``: also those that are neither parameters nor buffers;
    ``generators``: of random numbers, beside those of the process; ``iterators``: with the holder
    and the name of each; ``codes``: of functions of the user.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self.roots = roots
        self.holders: list[Holder] = []
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.iterators: list[tuple[Holder, Hashable, Any]] = []
        # What the program itself was seen to change: the number of the holder, and names in it;
        # and whether it drew random numbers that are not PyTorch's.
        self.written: dict[int, set[Hashable]] = {}
        self.draws = False
        # ``exports``: whether code may hand out the memory of tensors.
        # Code that is reached names more attributes, behind which there may be more code.
        names = Reads()
        while True:
            walk = _Walk(self, names)
            walk.run()
            if not names.add(walk.found):
                break
        self.marks = [holder.mark() for holder in self.holders]
        self.exports = not EXPORTING.isdisjoint(names.attributes | names.globals)

    @property
    def leaves_traces(self) -> bool:
        """Return whether the program was seen to change anything, or to draw numbers in Python."""
        return bool(self.written) or self.draws

    def is_of(self, roots: Sequence[Any]) -> bool:
        """Return whether the walk began at these very objects."""
        return len(roots) == len(self.roots) and all(map(is_, roots, self.roots))

    def is_current(self) -> bool:
        """Return whether another walk would come to the same places."""
        for i, holder in enumerate(self.holders):
            if holder.same(self.marks[i]):
                continue
            if not all(isinstance(v, LEAVES) for v in _values_at(holder, self.marks[i])):
                return False
            # Numbers alone differ, where nothing lies behind.
            self.marks[i] = holder.mark()
        return True


def _values_at(holder: Holder, mark: Any) -> Iterator[Any]:
    """Yield the objects that stand where something has changed."""
    now = dict(holder.values())
    for name in holder.changed(mark):
        if name in now:
            yield now[name]
        elif name is WHOLE and now:
            yield from now.values()
        elif isinstance(holder, Empty | Classes):
            yield holder  # there is something new in it


class _Walk:
    """One walk. ``names``: what code was found to name before; ``found``: the same, this time."""

    def __init__(self, reached: Reachable, names: Reads) -> None:
        self.reached = reached
        self.names = names
        self.any_name = not DYNAMIC.isdisjoint(names.attributes)
        self.found = Reads()
        # By id, with the object, so that no other one gets the id.
        self.visited: dict[int, Any] = {}
        # Objects to follow, and how deep inside objects of installed classes they lie.
        self.queue: deque[tuple[Any, int]] = deque()
        # The names that functions read in each namespace, by its id.
        self.globals: dict[int, tuple[Any, dict[str, None]]] = {}
        self.empty: list[dict[Any, Any]] = []
        self.objects: list[Any] = []

    def run(self) -> None:
        """Fill the lists of what is reached afresh."""
        reached = self.reached
        reached.holders, reached.tensors, reached.modules = [], [], []
        reached.generators, reached.iterators = [], []
        for hooks in GLOBAL_HOOKS:
            self.follow(hooks)
        for root in reached.roots:
            self.follow(root)
        while True:
            while self.queue:
                value, depth = self.queue.popleft()
                self.look_into(value, depth)
            if not self.follow_globals():
                break
        reached.holders.append(Empty(self.empty))
        reached.holders.append(Classes(self.objects))

    # -- one object --

    def follow(self, value: Any, depth: int = 0) -> None:
        """Look into an object later, if there may be something in it."""
        if isinstance(value, LEAVES) or id(value) in self.visited:
            return
        self.visited[id(value)] = value
        self.queue.append((value, depth))

    def follow_all(self, values: Iterable[Any], depth: int = 0) -> None:
        for value in values:
            self.follow(value, depth)

    def hold(self, holder: Holder, depth: int = 0) -> None:
        """Note a place, and follow what is in it."""
        self.reached.holders.append(holder)
        for name, value in holder.values():
            if _is_iterator(value):
                self.reached.iterators.append((holder, name, value))
            else:
                self.follow(value, depth)

    def look_into(self, value: Any, depth: int) -> None:
        """Note the places in an object, by what kind of object it is."""
        if isinstance(value, Tensor):
            self.reached.tensors.append(value)
        elif isinstance(value, nn.Module):
            self.module(value)
        elif isinstance(value, GENERATORS):
            self.reached.generators.append(value)
        elif isinstance(value, type):
            self.user_class(value)
        elif isinstance(value, types.ModuleType):
            pass  # by the names that functions read of it
        elif not self.function(value, depth) and not self.container(value, depth):
            self.plain_object(value, depth)

    def container(self, value: Any, depth: int) -> bool:
        """Look into a container; return whether it is one."""
        if isinstance(value, dict):
            self.dictionary(value, depth)
        elif isinstance(value, list | deque):
            self.hold(Items(value), depth)
        elif isinstance(value, tuple | frozenset):
            self.follow_all(spread(value), depth)
        elif isinstance(value, set):
            self.hold(Elements(value), depth)
        elif isinstance(value, bytearray | array.array):
            self.hold(Bytes(value))
        elif isinstance(value, np.ndarray):
            self.hold(Array(value), depth)
        elif isinstance(value, types.MappingProxyType):
            self.follow_all(list(value.values())[:MANY], depth)
        elif isinstance(value, io.IOBase):
            self.reached.holders.append(File(value))
        elif not isinstance(value, types.CellType):
            return False
        else:
            self.hold(Cell(value), depth)
        # A container of a class of its own may have attributes as well.
        if type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
            self.plain_object(value, depth)
        return True

    def dictionary(self, value: dict[Any, Any], depth: int) -> None:
        if value:
            self.hold(Entries(value), depth)
        else:
            self.empty.append(value)

    # -- code --

    def function(self, value: Any, depth: int) -> bool:
        """Look into a function, or what is made of one; return whether it is that."""
        if isinstance(value, types.FunctionType):
            self.user_function(value)
        elif isinstance(value, types.MethodType):
            self.follow_all((value.__self__, value.__func__))
        elif isinstance(value, staticmethod | classmethod):
            self.follow(value.__func__)
        elif isinstance(value, property):
            self.follow_all(filter(None, (value.fget, value.fset)))
        elif isinstance(value, functools.cached_property):
            self.follow(value.func)
        elif isinstance(value, functools.partial):
            self.follow_all((value.func, *value.args, *value.keywords.values()))
        elif isinstance(value, functools._lru_cache_wrapper):
            self.follow(value.__wrapped__)
        else:
            return False
        return True

    def user_function(self, function: types.FunctionType) -> None:
        """Follow what a function of the user reads from outside."""
        if is_installed(function.__code__.co_filename):
            self.closure_of_installed(function)
            return
        self.reached.holders.append(Names(_Code(function), ("__code__", "__defaults__")))
        self.follow_all(function.__defaults__ or ())
        self.follow_all((function.__kwdefaults__ or {},))
        self.follow_all(function.__closure__ or ())
        self.dictionary(function.__dict__, 0)
        reads = names_in(function.__code__)
        self.found.add(reads)
        space = function.__globals__
        _, names = self.globals.setdefault(id(space), (space, {}))
        names.update(dict.fromkeys(reads.globals))

    def closure_of_installed(self, function: types.FunctionType) -> None:
        """Follow what an installed decorator holds: the function of the user inside it."""
        for cell in function.__closure__ or ():
            self.follow(cell)

    def follow_globals(self) -> bool:
        """Follow globals that functions name; return whether there was anything new."""
        spaces, self.globals = self.globals, {}
        for space, names in spaces.values():
            known = self.visited.setdefault(-id(space), (space, set()))[1]
            fresh = [name for name in names if name not in known]
            known.update(fresh)
            if not fresh:
                continue
            holder = Names(space, fresh)
            self.hold(holder)
            for _, value in holder.values():
                if isinstance(value, type) and not is_installed_class(value):
                    self.follow(vars(value).get("__init__"))  # objects of it may be made
        # Attributes of Python modules are read by name, and any of the code may do so.
        modules = [m for m in self.visited.values() if isinstance(m, types.ModuleType)]
        for module in modules:
            self.python_module(module)
        return bool(self.queue or self.globals)

    def python_module(self, module: types.ModuleType) -> None:
        """Note the names in a Python module that code reads."""
        if module.__name__.startswith("unbatch"):
            return
        space = vars(module)
        known = self.visited.setdefault(-id(space), (space, set()))[1]
        named = self.found.attributes | self.found.stored
        fresh = [name for name in named if name in space and name not in known]
        known.update(fresh)
        if not fresh:
            return
        holder = Names(space, fresh)
        if not _is_installed_module(module):
            self.hold(holder)
            return
        # Functions of a library are watched, as they may be exchanged; they are not read.
        self.reached.holders.append(holder)
        for _, value in holder.values():
            if isinstance(value, types.ModuleType):
                self.follow(value)

    # -- objects --

    def module(self, module: nn.Module) -> None:
        """Note a module: all that its class may read, and its parts."""
        self.reached.modules.append(module)
        self.follow(type(module))
        self.attributes(module, (*OWN_ATTRIBUTES, "forward"), 0)

    def plain_object(self, value: Any, depth: int) -> None:
        """Note the attributes of an object."""
        kind = type(value)
        if kind.__module__.startswith(CLOSED_BOOKS):
            return
        if is_installed_class(kind):
            depth += 1
        else:
            self.follow(kind)
        if depth <= DEEPEST:
            self.attributes(value, (), depth)

    def attributes(self, value: Any, always: Iterable[str], depth: int) -> None:
        """Note the attributes that code may read; ``always``: names of some that it does."""
        kind = type(value)
        self.objects.append(value)
        everything = self.any_name or self.reads_all(kind)
        space = getattr(value, "__dict__", None)
        if isinstance(space, dict):
            if everything:
                self.dictionary(space, depth)
            else:
                names = [n for n in self.names.attributes if self.may_have(kind, space, n)]
                self.hold(Attributes(space, dict.fromkeys((*always, *names))), depth)
        slots = [n for n in _slots(kind) if everything or self.is_named(n)]
        if slots:
            self.hold(Slots(value, slots), depth)

    def may_have(self, kind: type, space: dict[str, Any], name: str) -> bool:
        """Return whether an object has an attribute, or may come to have it."""
        if name in space or name in self.names.stored or name in self.names.words:
            return True
        # An attribute of the object hides that of its class.
        bases = kind.__mro__
        return any(name in vars(b) and not is_installed_class(b) for b in bases)

    def is_named(self, name: str) -> bool:
        """Return whether code names an attribute, to read it or to write it."""
        return name in self.names.attributes or name in self.names.stored

    def user_class(self, kind: type) -> None:
        """Note what a class has that is the user's, as far as code names it."""
        for base in kind.__mro__:
            if not is_installed_class(base):
                self.hold(Members(base, [n for n in vars(base) if self.is_asked_for(kind, n)]))
            elif issubclass(base, nn.Module) and base is not nn.Module:
                self.reached.holders.append(Members(base, ["forward"]))

    def is_asked_for(self, kind: type, name: str) -> bool:
        """Return whether anybody may ask a class for this."""
        if name.startswith("__"):
            return name not in NOT_CALLED and isinstance(getattr(kind, name), types.FunctionType)
        if self.any_name or self.is_named(name):
            return True
        # A method in place of one of a library's is called from there.
        return any(name in vars(base) for base in kind.__mro__ if is_installed_class(base))

    def reads_all(self, kind: type) -> bool:
        """Return whether code that is not read, of a library, may read any attribute."""
        for base in kind.__mro__:
            if is_installed_class(base) and base.__module__ not in PLAIN_BASES:
                return True
        return False


class _Code(dict[str, Any]):
    """What of a function can be exchanged, as a namespace."""

    def __init__(self, function: types.FunctionType) -> None:
        super().__init__()
        self.function = function

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.function, name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.function, name, value)


# --- code -----------------------------------------------------------------------------------------


class Reads:
    """The names in some code.

    ``globals``: read or written; ``attributes``: read, also in ``words``, as for ``getattr``;
    ``stored``: attributes that are written.
    """

    def __init__(self) -> None:
        self.globals: set[str] = set()
        self.attributes: set[str] = set()
        self.words: set[str] = set()
        self.stored: set[str] = set()

    def add(self, other: Reads) -> bool:
        """Add other names; return whether there were any new ones among them."""
        fresh = False
        for kind, names in vars(other).items():
            mine = getattr(self, kind)
            fresh |= not names <= mine
            mine |= names
        return fresh


_READS: weakref.WeakKeyDictionary[types.CodeType, Reads] = weakref.WeakKeyDictionary()


def names_in(code: types.CodeType) -> Reads:
    """Return the names in code, and in that of the functions defined inside it."""
    if code in _READS:
        return _READS[code]
    reads = Reads()
    for part in codes_in(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname in GLOBAL_NAMES:
                reads.globals.add(instruction.argval)
            elif instruction.opname == "STORE_ATTR":
                reads.stored.add(instruction.argval)
            elif instruction.opcode in dis.hasname:
                reads.attributes.add(instruction.argval)
        for constant in part.co_consts:
            if isinstance(constant, str) and constant.isidentifier():
                reads.words.add(constant)
    # What looks attributes up by other means is a global function.
    reads.attributes |= reads.words | (reads.globals & DYNAMIC)
    _READS[code] = reads
    return reads


def codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of all functions that are defined inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_in(constant)


# --- what is whose --------------------------------------------------------------------------------


def is_installed(file: str | None) -> bool:
    """Return whether code in a file is no user's."""
    return file is None or file.startswith((*INSTALLED, "<frozen"))


@functools.cache
def _module_is_installed(name: str) -> bool:
    if name == "__main__":
        return False
    module = sys.modules.get(name)
    if module is None:
        return False  # made while the program runs
    return _is_installed_module(module)


def _is_installed_module(module: types.ModuleType) -> bool:
    return is_installed(getattr(module, "__file__", None)) and module.__name__ != "__main__"


def is_installed_class(kind: type) -> bool:
    """Return whether a class is no user's."""
    return _module_is_installed(kind.__module__)


def _slots(kind: type) -> list[str]:
    """Return the names of the slots of a class of the user's."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        if isinstance(slots, str):
            slots = (slots,)
        names += [n for n in slots if isinstance(vars(base).get(n), types.MemberDescriptorType)]
    return names


def _is_iterator(value: Any) -> bool:
    """Return whether a value is used up as it is read, and has no attributes that could be seen."""
    # A weak proxy has every method in its type, whatever it stands for.
    if isinstance(value, (io.IOBase, *weakref.ProxyTypes)):
        return False
    if not hasattr(type(value), "__next__"):
        return False
    return isinstance(value, types.GeneratorType) or is_installed_class(type(value))
