"""Asking changes nothing.

Tensors that existed before are copied when a program first writes to them and put back at the end, also after an
exception; so are module attributes, gradients, hooks, flags and random states. Other processes are not kept waiting.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.capture import ops
from unbatch.capture.distributed import check_alone

C = TypeVar("C")


# PyTorch wraps what a dispatch mode does to keep the compiler out of it, and loads the compiler for that, which takes a
# second and 70 MiB. Nobody compiles what runs in a mode of ours.
SKIPS_COMPILER = False


@contextmanager
def untouched(
    modules: Sequence[nn.Module], seed: tuple[Any, ...] | None = None
) -> Iterator[tuple[Any, ...]]:
    """Whatever happens inside, modules and random states are afterwards as they were.

    Yields the random state; with ``seed`` the inside starts from that one instead.
    """
    before = random_state()
    every = list({id(m): m for module in modules for m in module.modules()}.values())
    dicts = [(m, dict(m.__dict__), _books(m.__dict__)) for m in every]
    tensors = [
        t for m in every for t in (*m._parameters.values(), *m._buffers.values()) if t is not None
    ]
    flags = [
        (t, t.requires_grad, t.grad if t.is_leaf else None, t.data, dict(t._backward_hooks or {}))
        for t in tensors
    ]
    writes = _Writes()
    try:
        if seed is not None:
            set_random_state(seed)
        with writes:
            yield seed or before
    finally:
        writes.undo()
        for m, attributes, containers in dicts:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, content in containers:
                _refill(container, content)
        for t, requires_grad, grad, data, hooks in flags:
            _restore(t, requires_grad, grad, data, hooks)
        set_random_state(before)


def outside_inference_mode(*others: str) -> Callable[[type[C]], type[C]]:
    """For a class of questions: its public methods and properties, and ``others`` by name, leave inference mode.

    Autograd keeps nothing there, and derivatives would come out as zero. Tensors that were made there cannot take part
    in derivatives; those among the arguments are copied.
    """

    def decorate(cls: type[C]) -> type[C]:
        for name, member in list(vars(cls).items()):
            if name.startswith("_") and name not in others:
                continue
            if isinstance(member, FunctionType):
                setattr(cls, name, _left(member))
            elif isinstance(member, property) and member.fget is not None:
                setattr(cls, name, property(_left(member.fget), member.fset, member.fdel))
            elif isinstance(member, functools.cached_property):
                member.func = _left(member.func)
        return cls

    return decorate


def _left(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def asked(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False):
            return function(*tree_map(_ordinary, args), **kwargs)

    return asked


def _ordinary(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _books(container: Any, depth: int = 6) -> list[tuple[Any, Any]]:
    """Containers inside a container, at any depth, with copies of what they hold."""
    out = []
    for inner in container.values() if isinstance(container, dict) else container:
        if isinstance(inner, dict | list | set):
            out.append((inner, inner.copy()))
            out += _books(inner, depth - 1) if depth else []
    return out


def _refill(container: Any, content: Any) -> None:
    if _same(container, content):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def _restore(
    t: Tensor, requires_grad: bool, grad: Any, data: Tensor, hooks: dict[int, Any]
) -> None:
    if t.data_ptr() != data.data_ptr() or t.shape != data.shape:
        t.data = data
    if t.is_leaf:
        t.requires_grad_(requires_grad)
        if t.grad is not grad:
            t.grad = grad
    if t._backward_hooks is not None and dict(t._backward_hooks) != hooks:
        t._backward_hooks.clear()
        t._backward_hooks.update(hooks)


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    if isinstance(a, set):
        return bool(a == b)
    return all(x is y for x, y in zip(a, b, strict=True))


def random_state() -> tuple[Any, ...]:
    cuda = (
        torch.cuda.get_rng_state_all()
        if torch.cuda.is_available() and torch.cuda.is_initialized()
        else []
    )
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


def mutated(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an op writes to."""
    if not ops.may_write(op):
        return []
    names = [a.name for a in op._schema.arguments]
    arguments = dict(zip(names, args, strict=False)) | dict(kwargs)
    places = [arguments.get(name) for name in ops.written(op, arguments)]
    return [t for t in tree_leaves(places) if isinstance(t, Tensor)]


class _Writes(TorchDispatchMode):
    """Copies a tensor from outside before the first write to it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPS_COMPILER

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, tuple[Tensor, Tensor, Tensor, int]] = {}
        self.own: dict[
            int, StorageWeakRef
        ] = {}  # keeps the names of storages from being given again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check_alone(func, types)
        for tensor in mutated(func, args, kwargs):
            if tensor.layout != torch.strided or tensor.is_nested:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and storage._cdata not in self.saved:
                whole = tensor.detach().as_strided(
                    (storage.nbytes() // tensor.element_size(),), (1,), 0
                )
                self.saved[storage._cdata] = (tensor, whole, whole.clone(), tensor._version)
        out = func(*args, **kwargs)
        if not func._schema.is_mutable:
            given = {id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            shared = {storage_of(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            for o in tree_leaves(out):
                if (
                    isinstance(o, Tensor)
                    and id(o) not in given
                    and storage_of(o) not in shared
                    and o.layout == torch.strided
                    and not o.is_nested
                ):
                    self.own[o.untyped_storage()._cdata] = StorageWeakRef(o.untyped_storage())
        return out

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, whole, content, version in self.saved.values():
                whole.copy_(content)
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        self.saved.clear()
        self.own.clear()


def storage_of(tensor: Tensor) -> int:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if strided else -id(tensor)
