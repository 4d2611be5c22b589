"""Asking changes nothing.

Tensors that existed before are copied when a program first writes to them and put back at the end,
also after an exception; so are module attributes, gradients, hooks, flags and random states. Other
processes are not kept waiting.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from unbatch.capture import ops
from unbatch.capture.distributed import check_alone
from unbatch.capture.trees import tensors_in

C = TypeVar("C")

# PyTorch wraps what a dispatch mode does to keep the compiler out of it, and loads the compiler for
# that, which takes a second and 70 MiB. Nobody compiles what runs in a mode of ours.
SKIPS_COMPILER = False

# How deep the containers in the attributes of a module are looked at.
DEPTH = 6


@contextmanager
def untouched(
    modules: Sequence[nn.Module], seed: tuple[Any, ...] | None = None
) -> Iterator[tuple[Any, ...]]:
    """Leave modules and random states as they were, whatever happens inside.

    Yields the random state; with ``seed`` the inside starts from that one instead.
    """
    before = random_state()
    states = _states_of(modules)
    writes = _Writes()
    try:
        if seed is not None:
            set_random_state(seed)
        with writes:
            yield seed or before
    finally:
        # Contents first, while tensors still lie where they were written to.
        writes.undo()
        for state in states:
            state.restore()
        set_random_state(before)


# --- modules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ModuleState:
    """The attributes of a module, and the containers among them with what they held."""

    module: nn.Module
    attributes: dict[str, Any]
    containers: list[tuple[Any, Any]]

    @staticmethod
    def of(module: nn.Module) -> _ModuleState:
        attributes = module.__dict__
        return _ModuleState(module, dict(attributes), _containers(attributes, DEPTH))

    def restore(self) -> None:
        """Put attributes back, and into each container what it held."""
        # ``setattr`` would do more than that: register parameters, call setters of the user.
        self.module.__dict__.clear()
        self.module.__dict__.update(self.attributes)
        for container, content in self.containers:
            _refill(container, content)


@dataclass(frozen=True)
class _TensorState:
    """What a parameter or buffer has besides its contents."""

    tensor: Tensor
    requires_grad: bool
    grad: Tensor | None
    data: Tensor
    hooks: dict[int, Any]

    @staticmethod
    def of(t: Tensor) -> _TensorState:
        grad = t.grad if t.is_leaf else None
        return _TensorState(t, t.requires_grad, grad, t.data, dict(t._backward_hooks or {}))

    def restore(self) -> None:
        """Put all of it back; only what has changed is written to, which others may see."""
        t = self.tensor
        if t.data_ptr() != self.data.data_ptr() or t.shape != self.data.shape:
            t.data = self.data
        if t.is_leaf:
            t.requires_grad_(self.requires_grad)
            if t.grad is not self.grad:
                t.grad = self.grad
        if t._backward_hooks is not None and dict(t._backward_hooks) != self.hooks:
            t._backward_hooks.clear()
            t._backward_hooks.update(self.hooks)


def _states_of(modules: Sequence[nn.Module]) -> list[_ModuleState | _TensorState]:
    """Return the states of modules and what is inside them, each module once, then of tensors."""
    every: dict[int, nn.Module] = {}
    for top in modules:
        for module in top.modules():
            every[id(module)] = module
    states: list[_ModuleState | _TensorState] = [_ModuleState.of(m) for m in every.values()]
    for module in every.values():
        tensors = (*module._parameters.values(), *module._buffers.values())
        states.extend(_TensorState.of(t) for t in tensors if t is not None)
    return states


def _containers(container: Any, depth: int) -> list[tuple[Any, Any]]:
    """Return containers inside a container, at any depth, with copies of what they hold."""
    # By their own ``copy``, as a container may be of a class of its own (hooks are ordered dicts).
    entries = container
    if isinstance(container, dict):
        entries = container.values()
    out: list[tuple[Any, Any]] = []
    for entry in entries:
        if isinstance(entry, dict | list | set):
            out.append((entry, entry.copy()))
            if depth:
                out += _containers(entry, depth - 1)
    return out


def _refill(container: Any, content: Any) -> None:
    if _holds(container, content):
        return  # a container of a class of its own may notice that it is written to
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _holds(container: Any, content: Any) -> bool:
    """Tell whether a container holds these very objects, in the same order."""
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return bool(container == content)
    if isinstance(container, dict):
        if list(container) != list(content):
            return False
        container, content = container.values(), content.values()
    return all(x is y for x, y in zip(container, content, strict=True))


# --- random states --------------------------------------------------------------------------------


def random_state() -> tuple[Any, ...]:
    """Return the states of all generators: PyTorch's on CPU and GPU, numpy's and Python's."""
    # Asking a GPU that nobody has used yet would start it.
    cuda = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set the states of all generators to those that ``random_state`` returned."""
    cpu, cuda, numpys, pythons = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(numpys)
    random.setstate(pythons)


# --- inference mode -------------------------------------------------------------------------------


def outside_inference_mode(*others: str) -> Callable[[type[C]], type[C]]:
    """Let a class leave inference mode in its public methods and properties, and ``others``.

    Autograd keeps nothing there, and derivatives would come out as zero. Tensors that were made
    there cannot take part in derivatives; those among the arguments are copied.
    """

    def decorate(cls: type[C]) -> type[C]:
        for name, member in list(vars(cls).items()):
            if name.startswith("_") and name not in others:
                continue
            if isinstance(member, FunctionType):
                setattr(cls, name, _outside(member))
            elif isinstance(member, property) and member.fget is not None:
                setattr(cls, name, property(_outside(member.fget), member.fset, member.fdel))
            elif isinstance(member, functools.cached_property):
                member.func = _outside(member.func)
        return cls

    return decorate


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that leaves inference mode, and copies arguments made there."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False):
            return function(*tree_map(_ordinary, args), **kwargs)

    return run


def _ordinary(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_inference():
        return x.clone()
    return x


# --- writes ---------------------------------------------------------------------------------------


def mutated(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an op writes to."""
    if not ops.may_write(op):
        return []
    arguments = ops.by_argument(op, args, kwargs)
    places = [arguments.get(name) for name in ops.written(op, arguments)]
    return tensors_in(places)


class _Writes(TorchDispatchMode):
    """Copies a tensor from outside before the first write to it.

    ``saved``: by memory, a tensor there, the whole memory, a copy of it, and the version that the
    tensor had. ``own``: the memories that were made inside; weak references to them, so that their
    addresses are not given again.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPS_COMPILER

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, tuple[Tensor, Tensor, Tensor, int]] = {}
        self.own: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check_alone(func, types)
        # Before it runs: afterwards the old contents are gone.
        for tensor in mutated(func, args, kwargs):
            self._save(tensor)
        out = func(*args, **kwargs)
        # What an op in place returns is what it was given.
        if not func._schema.is_mutable:
            self._note_new(out, (args, kwargs))
        return out

    def _save(self, tensor: Tensor) -> None:
        """Copy the memory of a tensor from outside, unless it has been copied."""
        if not is_strided(tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.own or storage._cdata in self.saved:
            return
        # All of the memory: other tensors may be windows on it, and the next write through them.
        entries = storage.nbytes() // tensor.element_size()
        whole = tensor.detach().as_strided((entries,), (1,), 0)
        self.saved[storage._cdata] = (tensor, whole, whole.clone(), tensor._version)

    def _note_new(self, out: Any, arguments: Any) -> None:
        """Note the memories of results that are not those of arguments: views are not new."""
        memories = set(map(storage_of, tensors_in(arguments)))
        for result in tensors_in(out):
            if not is_strided(result):
                continue
            storage = result.untyped_storage()
            if storage._cdata not in memories:
                self.own[storage._cdata] = StorageWeakRef(storage)

    def undo(self) -> None:
        """Put the contents back, with the versions that tell autograd of no write."""
        with torch.no_grad():
            for tensor, whole, content, version in self.saved.values():
                whole.copy_(content)
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        self.saved.clear()
        self.own.clear()


def is_strided(tensor: Tensor) -> bool:
    """Tell whether a tensor is a window on one memory: neither sparse nor nested."""
    return tensor.layout == torch.strided and not tensor.is_nested


def storage_of(tensor: Tensor) -> int:
    """Return a number for the memory of a tensor, or for the tensor itself if it is not strided."""
    if is_strided(tensor):
        return tensor.untyped_storage()._cdata
    return -id(tensor)
