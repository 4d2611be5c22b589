"""What a program can reach: one walk of its objects, flattened into places that can be looked at.

The walk begins at the model and the loss, and follows attributes, items, closures, defaults, and
the globals and attributes that code of the user names. Code that is installed is not read, but its
objects are: the padding of a convolution is an attribute like any other. It serves two purposes:
a recording is valid while these places are what they were (``guards.py``), and a question puts back
what the program changed in them (``isolation.py``).
"""

from __future__ import annotations

import abc
import array
import concurrent.futures
import functools
import gc
import importlib
import logging
import mmap
import operator
import os
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import repeat
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.distributions import kl

from unbatch.capture.code_names import (
    DYNAMIC,
    NAMESPACES,
    THREADS,
    Reads,
    is_installed,
    is_installed_class,
    is_installed_module,
    lies_in,
    names_in,
)
from unbatch.capture.foreign import (
    CDATA,
    FOREIGN,
    Cache,
    Environment,
    Level,
    Loggers,
    Memory,
    Namespace,
    Referent,
    Registered,
    Scripted,
    referent,
)
from unbatch.capture.histories import Kept, Weights
from unbatch.capture.holders import (
    PLAIN_TYPES,
    VALUE_TYPES,
    WHOLE,
    Absent,
    Array,
    Attributes,
    Bytes,
    Cell,
    Classes,
    Elements,
    Empty,
    Entries,
    Holder,
    Hooks,
    Items,
    Members,
    Names,
    OfTensors,
    Patchable,
    Slots,
    attributes_of,
    methods_of,
    spread,
)
from unbatch.capture.iterators import BOUND, COPIED, Position, holds_iterator, is_iterator

# Objects of these packages are watched as what they are, and not looked into: they change while a
# program runs and do not decide what it computes.
CLOSED_BOOKS = (
    "logging",
    "threading",
    "_thread",
    "multiprocessing",
    "concurrent",
    "asyncio",
    "unbatch",
    "lightning",
    "pytorch_lightning",
    "wandb",
    "torch.optim",
    "torch.utils.data.dataloader",
    "torch.utils.data.datapipes",
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

# Attributes of objects of these packages that code may read all the same; and those that decide
# something where code names them.
OPEN_PAGES = ("_flag", "_value", "_obj", "_mmap")
NAMED_PAGES = ("param_groups", "defaults", "base_lrs", "last_epoch", "_last_lr")
PAGES_OF_METHODS = {"get_last_lr": "_last_lr"}

# How many objects of installed classes may lie inside one another, but those that are mere data.
DEEPEST = 3
DATA_MODULES = ("builtins", "types", "argparse", "collections")
LAWS = ("torch.distributions",)  # made of one another
DATA_KINDS = (dict, list, tuple, set, deque, Tensor, np.ndarray)

# Values of modules of Python's own that are followed: by them, others are looked up.
LOOKED_UP = (sys.modules, sys.argv, os.environ, os.getenv, importlib.import_module)

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
        "data_ptr",
        "frombuffer",
        "from_dlpack",
        "getattr",
        "np",
        "numpy",
        "storage",
        "untyped_storage",
    }
)

# Code that names one of these may set up loggers that it does not hold.
LOGGING = frozenset(["getLogger", "logger", "logging", "log"])

# Methods that make, copy or print objects: a program that runs does not call them unnamed.
NOT_CALLED = ("__repr__", "__str__", "__format__", "__reduce__", "__deepcopy__")
MAKING = ("__init__", "__post_init__")

METHODS = (types.FunctionType, types.MethodType)

GENERATORS = (
    torch.Generator,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    np.random.SeedSequence,
)

# What runs something in other threads.
WORKERS = (threading.Thread, concurrent.futures.Executor)

# There is nothing in these. By exact type: an object of a class derived from one is looked into.
LEAVES = PLAIN_TYPES | VALUE_TYPES | {types.CodeType, type(...), type(NotImplemented)}

# Of these, one is as good as another: code is not.
NUMBERS = LEAVES - {types.CodeType}

# What of a function can be exchanged.
FUNCTION_PARTS = ("__code__", "__defaults__", "__kwdefaults__", "__name__", "__qualname__")

# A list or a dict inside any object of C but these is its own, and nobody else may write to it.
TRANSPARENT = (
    types.MappingProxyType,
    *map(type, ({}.keys(), {}.values(), {}.items())),
    *map(type, map(iter, ([], {}, set(), deque()))),
    type(reversed([])),
    CDATA,
)
PRIVATE = (dict, list, set)

# Containers of Python's own.
KINDS = (dict, list, deque, tuple, set, frozenset)

# What looks up attributes by names that it was made with.
GETTERS = (operator.attrgetter, operator.methodcaller)

GLOBAL_HOOKS = [
    hooks
    for name, hooks in vars(nn.modules.module).items()
    if name.startswith("_global_") and isinstance(hooks, dict)
]


class Reachable:
    """What can be reached from some objects, at the moment of the walk.

    ``holders``: places; ``tensors``: also those that are neither parameters nor buffers;
    ``generators``: of random numbers, beside those of the process; ``iterators``: with the holder
    and the name of each; ``kept``: the same of tensors that may have a history; ``codes``: of
    functions of the user.
    """

    def __init__(self, roots: Sequence[Any]) -> None:
        self.roots = roots
        self.holders: list[Holder] = []
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self.generators: list[Any] = []
        self.iterators: list[tuple[Holder, Hashable, Any]] = []
        self.kept: list[Kept] = []
        self.logs: list[Level | Loggers] = []
        # What the program itself was seen to change: the number of the holder, and names in it;
        # and whether it drew random numbers that are not PyTorch's.
        self.written: dict[int, set[Hashable]] = {}
        self.draws = False
        # ``exports``: whether code may hand out the memory of tensors. ``threads``: whether other
        # threads may write to them.
        # Code that is reached names more attributes, behind which there may be more code.
        names = Reads()
        while True:
            walk = _Walk(self, names)
            walk.run()
            if not names.add(walk.found):
                break
        self.marks = [holder.mark() for holder in self.holders]
        self.exports = not EXPORTING.isdisjoint(names.attributes | names.globals)
        self.threads = walk.has_workers
        self.threads |= not THREADS.isdisjoint(names.attributes | names.globals)

    @property
    def leaves_traces(self) -> bool:
        """Return whether the program was seen to change anything, or to draw numbers in Python."""
        return bool(self.written) or self.draws or any(log.logged for log in self.logs)

    def is_of(self, roots: Sequence[Any]) -> bool:
        """Return whether the walk began at these very objects."""
        return len(roots) == len(self.roots) and all(map(is_, roots, self.roots))

    def is_current(self) -> bool:
        """Return whether another walk would come to the same places."""
        for i, holder in enumerate(self.holders):
            if holder.same(self.marks[i]):
                continue
            if not all(type(v) in NUMBERS for v in _values_at(holder, self.marks[i])):
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
            yield name  # a key of a dict may be an object
        elif name is WHOLE and now:
            yield from now.values()
        elif isinstance(holder, Empty | Classes | Absent):
            yield holder  # there is something new in it


class _Walk:
    """One walk. ``names``: what code was found to name before; ``found``: the same, this time."""

    def __init__(self, reached: Reachable, names: Reads) -> None:
        self.reached = reached
        self.names = names
        self.any_name = not DYNAMIC.isdisjoint(names.attributes)
        self.named = None if self.any_name else names.attributes | names.stored
        self.found = Reads()
        # By id, with the object, so that no other one gets the id.
        self.visited: dict[int, Any] = {}
        # Objects to follow, and how deep inside objects of installed classes they lie.
        self.queue: deque[tuple[Any, int]] = deque()
        # The names that functions read in each namespace, by its id.
        self.globals: dict[int, tuple[Any, dict[str, None]]] = {}
        self.empty: list[dict[Any, Any]] = []
        self.of_tensors: list[dict[str, Any]] = []
        self.objects: list[Any] = []
        # Weak references, and what is reached by them alone: but for tensors, it does not live on.
        self.weak: list[Any] = []
        self.weakly: set[int] = set()
        # Modules of Python of which any name may be read, by the number of their namespace.
        self.spaces: dict[int, dict[str, Any]] = {}
        # Those of the functions that were read, and whether they are looked up by their names.
        self.whole: set[int] = set()
        self.own_spaces: dict[int, dict[str, Any]] = {}
        self.by_table = False
        self.has_workers = False
        # Classes that were looked into, and installed ones that methods may be given to.
        self.kinds: dict[int, type] = {}
        self.patchable: dict[int, type] = {}

    def run(self) -> None:
        """Fill the lists of what is reached afresh."""
        reached = self.reached
        reached.holders, reached.tensors, reached.modules = [], [], []
        reached.generators, reached.iterators, reached.kept = [], [], []
        reached.logs = []
        for hooks in GLOBAL_HOOKS:
            self.follow(hooks)
        self.hold(Weights())
        if not LOGGING.isdisjoint(self.names.attributes | self.names.globals):
            self.hold(Loggers())
        self.functions_of(nn.functional)
        for root in reached.roots:
            self.follow(root)
        while True:
            while self.queue:
                value, depth = self.queue.popleft()
                self.look_into(value, depth)
            if not (self.follow_globals() or self.follow_spaces() or self.follow_weak()):
                break
        self.hold(OfTensors(self.of_tensors, self.named))
        reached.holders.append(Hooks(reached.tensors))
        self.watch_missing_names()
        reached.holders.append(Empty(self.empty))
        reached.holders.append(Classes(self.objects))

    # -- one object --

    def follow(self, value: Any, depth: int = 0) -> None:
        """Look into an object later, if there may be something in it."""
        if type(value) in LEAVES or id(value) in self.visited:
            return
        self.visited[id(value)] = value
        self.queue.append((value, depth))

    def follow_all(self, values: Iterable[Any], depth: int = 0) -> None:
        for value in values:
            self.follow(value, depth)

    def hold(self, holder: Holder, depth: int = 0) -> None:
        """Note a place, and follow what is in it."""
        self.reached.holders.append(holder)
        if isinstance(holder, Level | Loggers):
            self.reached.logs.append(holder)
        for name, value in holder.values():
            if type(value) in LEAVES:
                continue
            if holds_iterator(value):
                self.reached.iterators.append((holder, name, value))
            elif isinstance(value, Tensor) and type(value) is not nn.Parameter:
                self.keep(holder, name, value)
            self.follow(value, depth)

    def keep(self, holder: Holder, name: Hashable, value: Tensor) -> None:
        """Note a tensor that may have a history, where another one can be put in its place."""
        if type(holder).put is not Holder.put:
            self.reached.kept.append((holder, name, value))

    def look_into(self, value: Any, depth: int) -> None:
        """Note the places in an object, by what kind of object it is."""
        if type(value) is dict:
            self.dictionary(value, depth)  # most are
        elif isinstance(value, weakref.ReferenceType) or type(value) in weakref.ProxyTypes:
            self.weak.append(value)
        elif isinstance(value, Tensor):
            self.tensor(value, depth)
        elif isinstance(value, nn.Module):
            self.module(value)
        elif isinstance(value, GENERATORS):
            self.generator(value, depth)
        elif isinstance(value, type):
            self.user_class(value)
            self.making(value)
        elif isinstance(value, types.ModuleType):
            pass  # by the names that functions read of it
        elif is_iterator(value):
            self.iterator(value, depth)
        elif not self.function(value, depth) and not self.real_container(value, depth):
            self.plain_object(value, depth)

    def generator(self, value: Any, depth: int) -> None:
        """Note a generator of random numbers, and its attributes if its class is the user's."""
        if not isinstance(value, random.SystemRandom):
            self.reached.generators.append(value)
        if not is_installed_class(type(value)):
            self.plain_object(value, depth)

    def iterator(self, value: Any, depth: int) -> None:
        """Note how far an iterator is, and what it yields."""
        if isinstance(value, COPIED):
            self.reached.holders.append(Position(value))
        if not isinstance(value, types.GeneratorType):
            self.referents(value, depth)

    def follow_weak(self) -> bool:
        """Follow what is reached by weak references alone; return whether there was anything."""
        references, self.weak = self.weak, []
        for reference in references:
            self.reached.holders.append(Referent(reference))
            value = referent(reference)
            if value is not None and id(value) not in self.visited:
                self.weakly.add(id(value))
                self.follow(value)
        return bool(self.queue)

    # -- containers --

    def real_container(self, value: Any, depth: int) -> bool:
        """Look into a container, and not what only says so, as what is made when needed does."""
        if isinstance(value, KINDS) and not issubclass(type(value), KINDS):
            return False
        return self.container(value, depth)

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
        elif isinstance(value, np.ndarray):
            self.hold(Array(value), depth)
        elif isinstance(value, types.CellType):
            self.hold(Cell(value), depth)
        elif isinstance(value, type(os.environ)):
            self.hold(Environment())
            return True
        elif not self.memory(value, depth) and not self.foreign(value, depth):
            return False
        # A container of a class of its own may have methods and attributes as well.
        if not is_installed_class(type(value)):
            self.user_class(type(value))
        if type(value).__module__ != "builtins" and _has_attributes(value):
            self.plain_object(value, depth)
        return True

    def memory(self, value: Any, depth: int) -> bool:
        """Look into what bytes are written to; return whether it is that."""
        if isinstance(value, bytearray | array.array):
            self.hold(Bytes(value))
        elif isinstance(value, memoryview):
            self.follow(value.obj)
        elif isinstance(value, CDATA):
            self.hold(Memory(value))
            self.referents(value, depth)
        elif isinstance(value, mmap.mmap):
            self.hold(Memory(value))
        else:
            return False
        return True

    def foreign(self, value: Any, depth: int) -> bool:
        """Look into an object that has a holder of its own kind; return whether it is one."""
        for kind, holder in FOREIGN:
            if isinstance(value, kind):
                self.hold(holder(value), depth)
                if isinstance(value, logging.Logger):
                    self.follow(value.handlers)
                return True
        return False

    def referents(self, value: Any, depth: int) -> None:
        """Follow what an object of C refers to: the collector of garbage knows."""
        for part in gc.get_referents(value):
            if isinstance(value, TRANSPARENT):
                self.follow(part, depth)
            elif type(part) in PRIVATE:
                self.follow_all(_inside(part), depth)
            else:
                self.follow(part, depth)

    def dictionary(self, value: dict[Any, Any], depth: int) -> None:
        if isinstance(value, defaultdict):
            self.hold(Slots(value, ("default_factory",)))
        if type(value) in (dict, OrderedDict) and not value:
            self.empty.append(value)
        elif value is sys.modules:
            self.by_table = True
        else:
            self.hold(Entries(value), depth)
            for key in methods_of(value).keys(value):
                if type(key) is not str:
                    self.follow(key, depth)

    # -- code --

    def function(self, value: Any, depth: int) -> bool:
        """Look into a function, or what is made of one; return whether it is that."""
        if isinstance(value, types.FunctionType):
            self.user_function(value)
        elif isinstance(value, types.MethodType):
            self.follow_all((value.__self__, value.__func__))
        elif isinstance(value, BOUND):
            if not isinstance(value.__self__, types.ModuleType):
                self.follow(value.__self__, depth)
        elif isinstance(value, staticmethod | classmethod):
            self.follow(value.__func__)
        elif isinstance(value, property):
            self.follow_all(filter(None, (value.fget, value.fset)))
        elif isinstance(value, functools.cached_property):
            self.follow(value.func)
        elif isinstance(value, functools.partial):
            self.follow_all((value.func, value.args, value.keywords))
        elif isinstance(value, functools._lru_cache_wrapper):
            self.cache(value)
        elif isinstance(value, GETTERS):
            self.found.attributes.add("attrgetter")
        else:
            return False
        return True

    def cache(self, value: Any) -> None:
        """Look into a function of the user that keeps its results."""
        self.follow(value.__wrapped__)
        code = getattr(value.__wrapped__, "__code__", None)
        if code is None or not is_installed(code.co_filename):
            holder = Cache(value)
            self.hold(holder)
            self.follow_all(holder.results())

    def user_function(self, function: types.FunctionType) -> None:
        """Follow what a function of the user reads from outside."""
        if is_installed(function.__code__.co_filename):
            self.by_table |= function is importlib.import_module
            if function is os.getenv:
                self.follow(os.environ)
            self.closure_of_installed(function)
            return
        self.hold(Names(_Code(function), FUNCTION_PARTS))
        self.follow_all(function.__closure__ or ())
        self.dictionary(function.__dict__, 0)
        reads = names_in(function.__code__)
        self.found.add(reads)
        space = function.__globals__
        _, names = self.globals.setdefault(id(space), (space, {}))
        names.update(dict.fromkeys(reads.globals))
        if not NAMESPACES.isdisjoint(reads.globals):
            self.spaces[id(space)] = space
        self.own_spaces[id(space)] = space
        for name in reads.imported:
            self.follow_all(_imported(name, space))

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
            self.hold(Names(space, fresh))
        if self.by_table:
            for space in self.own_spaces.values():
                self.follow(sys.modules.get(space.get("__name__", "")))
        if "ops" in self.found.attributes:
            self.own_ops()
        if "kl_divergence" in self.found.attributes | self.found.globals:
            self.follow_all(kl._KL_REGISTRY.values())
        # Attributes of Python modules are read by name, and any of the code may do so.
        modules = [m for m in self.visited.values() if isinstance(m, types.ModuleType)]
        for module in modules:
            self.python_module(module)
        return bool(self.queue or self.globals)

    def own_ops(self) -> None:
        """Follow the bodies of the ops that the user has registered and that code names."""
        for name, op in list(OPDEFS.items()):
            if self.found.attributes.issuperset(name.split("::")):
                self.follow(op)

    def follow_spaces(self) -> bool:
        """Follow all names of modules where any may be read; return whether there was any new."""
        for space in self.spaces.values():
            if -id(space) not in self.whole:
                self.whole.add(-id(space))
                self.hold(Namespace(space))
        return bool(self.queue)

    def watch_missing_names(self) -> None:
        """Note the names that code reads and that classes and the user's modules do not have."""
        owners: dict[int, Any] = {}
        for value in self.visited.values():
            if isinstance(value, types.ModuleType) and not is_installed_module(value):
                owners[id(value)] = value
        for kind in self.kinds.values():
            bases = [base for base in kind.__mro__ if not is_installed_class(base)]
            owners.update(zip(map(id, bases), bases, strict=True))
        named = self.names.attributes | self.names.stored
        self.reached.holders += [Absent(owner, named) for owner in owners.values()]

    def python_module(self, module: types.ModuleType) -> None:
        """Note the names in a Python module that code reads."""
        if lies_in(module.__name__, ("unbatch",)):
            return
        space = vars(module)
        if self.any_name and not is_installed_module(module):
            self.any_name_of(space)
        if not is_installed_module(module):
            self.follow(space.get("__getattr__"))
        known = self.visited.setdefault(-id(space), (space, set()))[1]
        # What code writes need not be there yet.
        named = self.found.attributes.intersection(space) | self.found.stored
        fresh = [name for name in named if name not in known]
        known.update(fresh)
        if not fresh:
            return
        holder = Names(space, fresh)
        if not is_installed_module(module):
            self.hold(holder)
        else:
            self.names_of_library(holder)

    def names_of_library(self, holder: Names) -> None:
        """Note names of an installed module: functions may be exchanged, and are not read."""
        self.reached.holders.append(holder)
        for _, value in holder.values():
            if isinstance(value, types.ModuleType) or any(map(is_, LOOKED_UP, repeat(value))):
                self.follow(value)
            elif isinstance(value, type) and issubclass(value, nn.Module):
                self.user_class(value)  # the program may make one
            elif isinstance(value, types.FunctionType) and self.found.stored:
                self.reached.holders.append(Attributes(vars(value), ()))

    def any_name_of(self, space: dict[str, Any]) -> None:
        """Note all names of a module of the user's, and follow those that stand for data."""
        if -id(space) in self.whole:
            return
        self.whole.add(-id(space))
        holder = Namespace(space)
        self.reached.holders.append(holder)
        for _, value in holder.values():
            if isinstance(value, DATA_KINDS) or type(value).__module__ in DATA_MODULES:
                self.follow(value)

    # -- objects --

    def tensor(self, value: Tensor, depth: int) -> None:
        """Note a tensor, its hooks, and its attributes where it has any."""
        self.reached.tensors.append(value)
        self.user_class(type(value))
        for hooks in filter(None, Hooks.tables(value)):
            self.follow_all(hooks.values(), depth)
        space = attributes_of(value)
        if space is None:
            return
        self.of_tensors.append(space)
        for name, attribute in space.items():
            if self.named is None or name in self.named:
                self.follow(attribute, depth)

    def module(self, module: nn.Module) -> None:
        """Note a module: all that its class may read, and its parts."""
        if id(module) not in self.weakly:
            self.reached.modules.append(module)
        self.user_class(type(module))
        if isinstance(module, torch.jit.ScriptModule):
            self.reached.holders.append(Scripted(module))
        self.attributes(module, (*OWN_ATTRIBUTES, "forward"), 0)

    def plain_object(self, value: Any, depth: int) -> None:
        """Note the attributes of an object."""
        kind = type(value)
        if kind is OrderedDict:
            self.dictionary(attributes_of(value), depth)
            return
        if _is_closed(kind.__module__):
            self.has_workers |= isinstance(value, WORKERS)
            self.closed_book(value)
            return
        if not is_installed_class(kind):
            self.user_class(kind)
        elif kind.__module__ not in DATA_MODULES and not lies_in(kind.__module__, LAWS):
            depth += 1
        if depth <= DEEPEST:
            self.attributes(value, (), depth)
            if attributes_of(value) is None:
                self.referents(value, depth)

    def closed_book(self, value: Any) -> None:
        """Note the few attributes that decide something."""
        space = attributes_of(value) or {}
        open_pages = {*OPEN_PAGES, *filter(self.is_named, NAMED_PAGES)}
        open_pages.update(PAGES_OF_METHODS[n] for n in PAGES_OF_METHODS if self.is_named(n))
        names = [name for name in sorted(open_pages) if name in space]
        if names:
            self.hold(Names(space, names))

    def attributes(self, value: Any, always: Iterable[str], depth: int) -> None:
        """Note the attributes that code may read; ``always``: names of some that it does."""
        kind = type(value)
        if id(value) not in self.weakly:
            self.objects.append(value)  # else it would live as long as this does
        everything = self.any_name or self.reads_all(kind)
        space = attributes_of(value)
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
        if id(kind) in self.kinds:
            return
        self.kinds[id(kind)] = kind
        self.has_workers |= issubclass(kind, WORKERS)
        self.follow(type(kind))
        for base in kind.__mro__:
            if not is_installed_class(base):
                self.hold(Members(base, [n for n in vars(base) if self.is_asked_for(kind, n)]))
                if isinstance(base, abc.ABCMeta):
                    self.reached.holders.append(Registered(base))
                if self.is_named("__match_args__"):
                    self.found.add_words(vars(base).get("__match_args__", ()))
            elif id(base) not in self.patchable and issubclass(base, (nn.Module, Tensor)):
                self.patchable[id(base)] = base
                self.functions_of(base)

    def making(self, kind: type) -> None:
        """Note what is called where an object of a class is made, as whoever has it may do."""
        for base in kind.__mro__:
            if not is_installed_class(base):
                self.hold(Members(base, [name for name in MAKING if name in vars(base)]))

    def functions_of(self, owner: Any) -> None:
        """Note the functions of an installed class or module, and read those that are the user's.

        They may be exchanged, as patches of libraries are.
        """
        holder = Patchable(owner)
        self.reached.holders.append(holder)
        for _, function in holder.values():
            if not is_installed(function.__code__.co_filename):
                self.follow(function)

    def is_asked_for(self, kind: type, name: str) -> bool:
        """Return whether anybody may ask a class for this."""
        if name.startswith("__"):
            if name in MAKING or (name in NOT_CALLED and name not in self.names.attributes):
                return False
            return isinstance(getattr(kind, name), METHODS)
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


@functools.cache
def _is_closed(module: str) -> bool:
    return lies_in(module, CLOSED_BOOKS)


class _Code(dict[str, Any]):
    """What of a function can be exchanged, as a namespace."""

    def __init__(self, function: types.FunctionType) -> None:
        super().__init__()
        self.function = function

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.function, name, default)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self.function, name, value)


def _slots(kind: type) -> list[str]:
    """Return the names of the slots of a class of the user's."""
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        if isinstance(slots, str):
            slots = (slots,)
        mangled = [_mangled(name, base) for name in slots]
        names += [n for n in mangled if isinstance(vars(base).get(n), types.MemberDescriptorType)]
    return names


def _mangled(name: str, kind: type) -> str:
    """Return the name that Python gives to a private attribute of a class."""
    if name.startswith("__") and not name.endswith("__"):
        return f"_{kind.__name__.lstrip('_')}{name}"
    return name


def _has_attributes(value: Any) -> bool:
    return attributes_of(value) is not None or bool(_slots(type(value)))


def _inside(container: Any) -> list[Any]:
    """Return what is in a dict, a list or a set."""
    if isinstance(container, dict):
        return list(container.values())
    return list(container)


def _imported(name: str, space: dict[str, Any]) -> list[types.ModuleType]:
    """Return the modules that a function imports by a name while it runs, with their packages."""
    package = space.get("__package__") or ""
    names = (name, name.partition(".")[0], f"{package}.{name}".strip("."))
    return [sys.modules[name] for name in names if name in sys.modules]
