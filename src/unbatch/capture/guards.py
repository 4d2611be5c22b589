"""What a recording depends on beside its arguments, and whether that is still what it was.

The *state* of a program decides what is computed: flags and attributes of modules, hooks, types and devices, and what
functions of the user read from outside, as far as names tell. Its *numbers* are the contents of parameters and
buffers: other ones leave a recording valid, but not what was computed with it.
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


INSTALLED = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], *LIBRARY)


BOOKS = set(nn.Module().__dict__)  # what every module has


FEW = 8  # entries of a tensor, or items of a container, that are looked at


Place = tuple[
    Any, Any
]  # a namespace (attributes, globals, a closure) and a name, or a number, in it


@dataclass
class Guard:
    """Where to look; ``state`` and ``numbers`` are to be compared with what they were."""

    program: Program
    modules: list[nn.Module] = field(default_factory=list)
    reads: list[Place] = field(default_factory=list)
    constants: list[Place] = field(
        default_factory=list
    )  # attributes that hold tensors which a recording has used
    _views: tuple[Any, list[Tensor]] = ((), [])

    @staticmethod
    def of(program: Program) -> Guard:
        guard, seen = Guard(program), set[int]()
        for function in (program.model, program.loss):
            guard._read(function, seen)
        return guard

    def watch(self, graph: Graph) -> None:
        """Look at the tensors, kept as attributes of modules, that the recording took for constants."""
        used = {v.storage for v in graph.values if v.kind == "constants" and v.concrete is not None}
        used = {
            storage_of(v.concrete)
            for v in graph.values
            if v.concrete is not None and v.storage in used
        }
        places = [
            (m.__dict__, k)
            for m in self.modules
            for k, v in m.__dict__.items()
            if isinstance(v, Tensor)
        ]
        self.constants = [(space, k) for space, k in places if storage_of(space[k]) in used]

    # -- where to look --

    def _read(self, value: Any, seen: set[int]) -> None:
        """Follow what the user wrote to the names that it reads, and to functions and modules among these."""
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Module):
            fresh = [m for m in value.modules() if all(m is not known for known in self.modules)]
            self.modules += fresh
            own = {id(f): f for m in fresh for f in _methods(type(m))}
            kept = [
                v
                for m in fresh
                for k, v in m.__dict__.items()
                if isinstance(v, list | dict) and k not in BOOKS
            ]
            self._read_all([*own.values(), *kept], seen)
        elif isinstance(value, functools.partial):
            self._read_all((value.func, *value.args, *value.keywords.values()), seen)
        elif isinstance(value, types.MethodType):
            self._read_all((value.__self__, value.__func__), seen)
        elif isinstance(value, list | tuple | dict):
            places = [
                (value, k)
                for k in list(value if isinstance(value, dict) else range(len(value)))[:FEW]
            ]
            self.reads += places
            self._read_all([_look(place) for place in places], seen)
        elif isinstance(value, types.FunctionType):
            places = [] if value.__code__.co_filename.startswith(INSTALLED) else list(_names(value))
            self.reads += places
            self._read_all([_look(place) for place in places], seen)
        elif (
            callable(value)
            and hasattr(value, "__dict__")
            and not isinstance(value, type | types.ModuleType)
        ):
            self.reads += [(value.__dict__, name) for name in value.__dict__]
            self._read_all([*_methods(type(value)), *value.__dict__.values()], seen)

    def _read_all(self, values: Iterable[Any], seen: set[int]) -> None:
        for value in values:
            self._read(value, seen)

    # -- what there is --

    def state(self) -> tuple[Any, ...]:
        """Equal as long as the same is computed."""
        modules = self.modules
        attributes = [tuple(_decisive(m)) for m in modules]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        kinds = [(id(t), t.requires_grad, t.dtype, t.device, t.shape) for t in self._tensors()]
        reads = [_what(_look(place)) for place in self.reads]
        return (
            tuple(attributes),
            tuple(hooks),
            tuple(kinds),
            tuple(reads),
            tuple(id(_look(p)) for p in self.constants),
        )

    def numbers(self) -> tuple[Any, ...]:
        """Equal as long as nothing was written to parameters, buffers and constants, in whatever way."""
        tensors = self._tensors()
        marks = tuple((t._version, t.data_ptr()) for t in tensors)
        return (
            marks,
            self._few_entries(tensors, marks),
            tuple(_look(p)._version for p in self.constants),
        )

    def _tensors(self) -> list[Tensor]:
        buffers = [b for m in self.modules for b in m._buffers.values() if b is not None]
        return [
            t for t in (*self.program.parameters.values(), *buffers) if t.layout == torch.strided
        ]

    def _few_entries(self, tensors: list[Tensor], marks: tuple[Any, ...]) -> tuple[Any, ...]:
        """A few entries of each, to notice changes that leave no trace in the version (``.data.mul_(2)``)."""
        places = tuple((id(t), pointer) for t, (_, pointer) in zip(tensors, marks, strict=True))
        if self._views[0] != places:
            self._views = (
                places,
                [_few(t) for t in tensors if t.numel() and t.device.type != "meta"],
            )
        by_kind: dict[Any, list[Tensor]] = {}
        for view in self._views[1]:
            by_kind.setdefault((view.dtype, view.device), []).append(view)
        return tuple(_bits(torch.cat(views)) for views in by_kind.values())


class Seen:
    """A tensor at a moment: equal to another as long as both are of the same tensor, and nothing was written to it.

    The tensor may be gone, and its number and memory be another's by then: that is another tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.mark = weakref.ref(tensor), (tensor._version, storage_of(tensor))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Seen)
            and self.mark == other.mark
            and self.tensor() is other.tensor() is not None
        )

    __hash__ = None  # type: ignore[assignment]


def identity(*trees: Any) -> tuple[Any, ...]:
    """Of data: equal as long as it is the same tensors, and nothing was written to them."""
    leaves = [t for t in tree_leaves(trees) if isinstance(t, Tensor | int | float | str)]
    return tuple(Seen(t) if isinstance(t, Tensor) else t for t in leaves)


def signature(*trees: Any) -> tuple[Any, ...]:
    """Of data: equal where shapes and types are, and all that is no tensor."""
    return tuple(
        (t.shape, t.dtype, t.device) if isinstance(t, Tensor) else _what(t)
        for t in tree_leaves(trees)
    )


def _few(t: Tensor) -> Tensor:
    """A view of a few entries, spread evenly where they lie in order."""
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    if t.is_contiguous():
        return t.view(-1)[:: max(1, t.numel() // FEW)]
    longest = max(range(t.ndim), key=lambda d: t.shape[d])
    return t.as_strided((t.shape[longest],), (t.stride(longest),), t.storage_offset())[: FEW + 1]


def _bits(t: Tensor) -> Any:
    return (
        t.numpy().tobytes()
        if t.dtype in (torch.float32, torch.float64) and not t.is_cuda
        else t.tolist()
    )


def _methods(kind: type) -> list[types.FunctionType]:
    """The functions that the user wrote for a class."""
    return [f for k in kind.__mro__ for f in vars(k).values() if isinstance(f, types.FunctionType)]


def _names(function: types.FunctionType) -> Iterator[Place]:
    """What a function reads from outside: its closure, its defaults, and globals, also those of functions inside it."""
    yield from ((function.__closure__, i) for i in range(len(function.__closure__ or ())))
    yield from ((function.__defaults__, i) for i in range(len(function.__defaults__ or ())))
    names = dict.fromkeys(name for code in _codes(function.__code__) for name in code.co_names)
    yield from ((function.__globals__, name) for name in names if name in function.__globals__)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _decisive(module: nn.Module) -> Iterator[Place]:
    """Flags, functions that the module was given (``act=F.relu``), and the modules it is made of.

    These are kept, not their numbers: another one could get the number of one that is gone.
    """
    yield from ((k, v) for k, v in module.__dict__.items() if isinstance(v, PLAIN + FUNCTIONS))
    yield from module._modules.items()


def _look(place: Place) -> Any:
    space, name = place
    try:
        value = space[name]
        return value.cell_contents if isinstance(value, types.CellType) else value
    except (KeyError, IndexError, ValueError):  # it has been taken away; a cell is empty
        return None


def _what(value: Any) -> Any:
    """Numbers and words by what they are, anything else by which it is."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple) and len(value) <= FEW:
        return tuple(_what(v) for v in value)
    return id(value)
