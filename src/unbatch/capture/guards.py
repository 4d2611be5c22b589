"""What a recording depends on besides its arguments, and whether that is still what it was.

The *state* of a program decides what is computed: flags and attributes of modules, hooks, types and
devices, and what functions of the user read from outside, as far as names tell. Its *numbers* are
the contents of parameters and buffers: other ones leave a recording valid, but not what was
computed with it.
"""

from __future__ import annotations

import functools
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unbatch.capture.graph import Graph
from unbatch.capture.isolation import storage_of
from unbatch.capture.program import Program
from unbatch.capture.tracer import LIBRARY

PLAIN = (int, float, bool, str, bytes, type(None))

FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)

# Code from here is no user's, and is not read.
INSTALLED = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], *LIBRARY)

# The attributes that every module has.
OWN_ATTRIBUTES = set(nn.Module().__dict__)

# How many entries of a tensor, or items of a container, are looked at.
FEW = 8

# A namespace (attributes, globals, a closure) or container, and a name or an index in it.
Place = tuple[Any, Any]


@dataclass
class Guard:
    """Where to look; ``state`` and ``numbers`` are to be compared with what they were.

    ``reads``: the places that functions of the user read. ``constants``: attributes that hold
    tensors which the recording took for constants.
    """

    program: Program
    modules: list[nn.Module] = field(default_factory=list)
    reads: list[Place] = field(default_factory=list)
    constants: list[Place] = field(default_factory=list)
    # Views of a few entries, and the tensors that they were made for.
    _views: tuple[Any, list[Tensor]] = (None, [])

    @staticmethod
    def of(program: Program) -> Guard:
        """Return the guard of a program, from what its model and its loss read."""
        guard, visited = Guard(program), set[int]()
        guard._follow_all((program.model, program.loss), visited)
        return guard

    def watch(self, graph: Graph) -> None:
        """Watch the tensors, in attributes of modules, that a recording took for constants."""
        constants = {v.storage for v in graph.values if v.kind == "constants"}
        memories = set()
        for value in graph.values:
            # Not the constant alone: the program may have made a view of it.
            if value.storage in constants and value.concrete is not None:
                memories.add(storage_of(value.concrete))
        self.constants = []
        for module in self.modules:
            for name, attribute in module.__dict__.items():
                if isinstance(attribute, Tensor) and storage_of(attribute) in memories:
                    self.constants.append((module.__dict__, name))

    # -- where to look --

    def _follow_all(self, values: Iterable[Any], visited: set[int]) -> None:
        """Follow several values. ``visited``: by id, as programs refer to themselves."""
        for value in values:
            self._follow(value, visited)

    def _follow(self, value: Any, visited: set[int]) -> None:
        """Follow what the user wrote to the names that it reads, and to what they stand for."""
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, nn.Module):
            self._follow_module(value, visited)
        elif isinstance(value, functools.partial):
            self._follow_all((value.func, *value.args, *value.keywords.values()), visited)
        elif isinstance(value, types.MethodType):
            self._follow_all((value.__self__, value.__func__), visited)
        elif isinstance(value, dict):
            self._follow_places(_places(value, list(value)[:FEW]), visited)
        elif isinstance(value, list | tuple):
            self._follow_places(_places(value, range(min(len(value), FEW))), visited)
        elif isinstance(value, types.FunctionType):
            # What is installed does not change while a program runs.
            if not value.__code__.co_filename.startswith(INSTALLED):
                self._follow_places(list(_names(value)), visited)
        elif _is_callable_object(value):
            self._follow_all(_methods(type(value)), visited)
            self._follow_places(_places(value.__dict__, value.__dict__), visited)

    def _follow_places(self, places: list[Place], visited: set[int]) -> None:
        """Note places that are read, and follow what is in them."""
        self.reads += places
        self._follow_all(map(_look, places), visited)

    def _follow_module(self, top: nn.Module, visited: set[int]) -> None:
        """Note a module and what is inside it, and follow its methods and containers."""
        # Each class once: a network has many modules of few classes.
        known = {id(module) for module in self.modules}
        fresh = [module for module in top.modules() if id(module) not in known]
        self.modules += fresh
        methods: dict[int, Any] = {}
        for module in fresh:
            for method in _methods(type(module)):
                methods[id(method)] = method
        self._follow_all(methods.values(), visited)
        for module in fresh:
            for name, attribute in module.__dict__.items():
                if name not in OWN_ATTRIBUTES and isinstance(attribute, list | dict):
                    self._follow(attribute, visited)

    # -- what there is --

    def state(self) -> tuple[Any, ...]:
        """Return what stays equal as long as the same is computed."""
        modules = [list(_decisive(module)) for module in self.modules]
        tensors = list(map(_kind_of, self._tensors()))
        reads = [_identity_of(_look(place)) for place in self.reads]
        constants = [id(_look(place)) for place in self.constants]
        return modules, tensors, reads, constants

    def numbers(self) -> tuple[Any, ...]:
        """Return what stays equal as long as nothing writes to parameters, buffers or constants."""
        tensors = self._tensors()
        versions, addresses = [], []
        for t in tensors:
            versions.append(t._version)
            addresses.append(t.data_ptr())
        constants = [_look(place)._version for place in self.constants]
        return versions, addresses, self._few_entries(tensors, addresses), constants

    def _tensors(self) -> list[Tensor]:
        """Return parameters and buffers; those that are sparse have no address to look at."""
        tensors = list(self.program.parameters.values())
        for module in self.modules:
            tensors.extend(b for b in module._buffers.values() if b is not None)
        return [t for t in tensors if t.layout == torch.strided]

    def _few_entries(self, tensors: list[Tensor], addresses: list[int]) -> list[Any]:
        """Return a few entries of each tensor.

        They show changes that leave no trace in the version (``.data.mul_(2)``).
        """
        places = list(zip(map(id, tensors), addresses, strict=True))
        # Views are made once, and show later contents until a tensor gets another memory.
        if self._views[0] != places:
            views = [_few(t) for t in tensors if t.numel() and t.device.type != "meta"]
            self._views = places, views
        # One read for all of a kind: each read of a GPU waits for what runs there.
        by_kind: dict[Any, list[Tensor]] = {}
        for view in self._views[1]:
            by_kind.setdefault((view.dtype, view.device), []).append(view)
        return [_bits(torch.cat(views)) for views in by_kind.values()]


class TensorMark:
    """A tensor at a moment: equal to another mark of the same tensor with no write in between.

    The tensor may be gone, and its number and memory be another's by then: that is another tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.mark = weakref.ref(tensor), (tensor._version, storage_of(tensor))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorMark) or self.mark != other.mark:
            return False
        return self.tensor() is other.tensor() is not None

    __hash__ = None  # type: ignore[assignment]


def identity(*trees: Any) -> tuple[Any, ...]:
    """Return what stays equal as long as data is the same tensors, and nothing writes to them."""
    marks: list[Any] = []
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            marks.append(TensorMark(leaf))
        elif isinstance(leaf, int | float | str):
            marks.append(leaf)
    return tuple(marks)


def signature(*trees: Any) -> tuple[Any, ...]:
    """Return what is equal for data of the same shapes and types, and equal in all else."""
    kinds: list[Any] = []
    for leaf in tree_leaves(trees):
        if isinstance(leaf, Tensor):
            kinds.append((leaf.shape, leaf.dtype, leaf.device))
        else:
            kinds.append(_identity_of(leaf))
    return tuple(kinds)


# --- tensors --------------------------------------------------------------------------------------


def _kind_of(t: Tensor) -> tuple[Any, ...]:
    """Return what decides what is computed with a tensor, but its contents."""
    return id(t), t.requires_grad, t.dtype, t.device, t.shape


def _few(t: Tensor) -> Tensor:
    """Return a view of a few entries, spread evenly if they lie in order."""
    t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t)
    if t.is_contiguous():
        return t.view(-1)[:: max(1, t.numel() // FEW)]
    sizes = list(t.shape)
    longest = sizes.index(max(sizes))
    along = t.as_strided((sizes[longest],), (t.stride(longest),), t.storage_offset())
    return along[: FEW + 1]


def _bits(t: Tensor) -> Any:
    """Return the entries so that equal ones compare equal, NaN included where it is cheap."""
    if t.dtype in (torch.float32, torch.float64) and not t.is_cuda:
        return t.numpy().tobytes()
    return t.tolist()


# --- what the user wrote --------------------------------------------------------------------------


def _is_callable_object(value: Any) -> bool:
    """Tell whether a value is an object with ``__call__`` and attributes; no class or module."""
    if isinstance(value, type | types.ModuleType):
        return False
    return callable(value) and hasattr(value, "__dict__")


def _methods(kind: type) -> list[types.FunctionType]:
    """Return the functions of a class and its bases."""
    functions: list[types.FunctionType] = []
    for base in kind.__mro__:
        members = vars(base).values()
        functions.extend(m for m in members if isinstance(m, types.FunctionType))
    return functions


def _names(function: types.FunctionType) -> Iterator[Place]:
    """Yield what a function reads from outside: its closure, its defaults, and globals.

    Globals also as far as functions inside it read them.
    """
    for cells in (function.__closure__, function.__defaults__):
        for i in range(len(cells or ())):
            yield cells, i
    names: dict[str, None] = {}
    for code in _codes(function.__code__):
        names.update(dict.fromkeys(code.co_names))
    for name in names:
        if name in function.__globals__:
            yield function.__globals__, name


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield the code of a function and of all functions that are defined inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _decisive(module: nn.Module) -> Iterator[Place]:
    """Yield flags, functions that the module was given (``act=F.relu``), parts, and hooks.

    With their names. The objects and not their ids: another could get the id of one that is gone.
    """
    yield "hooks", len(module._forward_hooks) + len(module._forward_pre_hooks)
    for name, value in module.__dict__.items():
        if isinstance(value, PLAIN + FUNCTIONS):
            yield name, value
    yield from module._modules.items()


def _places(space: Any, names: Iterable[Any]) -> list[Place]:
    return [(space, name) for name in names]


def _look(place: Place) -> Any:
    """Return what is in a place; None if it has been taken away, or a cell is empty."""
    space, name = place
    try:
        value = space[name]
        if isinstance(value, types.CellType):
            return value.cell_contents
    except (KeyError, IndexError, ValueError):
        return None
    return value


def _identity_of(value: Any) -> Any:
    """Return numbers and words as they are, and of anything else which object it is."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple) and len(value) <= FEW:
        return tuple(map(_identity_of, value))
    return id(value)
