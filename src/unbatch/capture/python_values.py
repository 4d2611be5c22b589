"""Values that Python reads, and how they are still followed.

``.item()`` hands out a ``Number`` that remembers its tensor; reads that never reach the dispatcher (numpy, ``tolist``,
sizes that depend on data) are reported to the recorder.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CONSTRUCTORS = {"tensor", "as_tensor", "asarray", "new_tensor"}


ESCAPES = {
    "numpy",
    "__array__",
    "__dlpack__",
    "data_ptr",
    "storage",
    "untyped_storage",
    "_typed_storage",
}


class Listener(Protocol):
    """What a recorder wants to be told."""

    dynamic: set[int]
    checks: int

    def escape(self, tensor: Tensor, how: str, answer: bool | None = None) -> None: ...
    def branch(self, tensor: Tensor, how: str, value: Any) -> Any: ...
    def shape_read(self, tensor: Any) -> None: ...
    def paused(self) -> Any: ...


class Number:
    """What ``tensor.item()`` returns during capture: a Python number that remembers the tensor it came from.

    Arithmetic keeps following it; anything that needs the bare value (``if``, ``int()``, ``math.sqrt``) is reported
    as an escape.
    """

    def __init__(self, tensor: Tensor, recorder: Listener) -> None:
        self.tensor, self.recorder = tensor, recorder

    def bare(self, how: str) -> Any:
        with self.recorder.paused():
            value = self.tensor.item()
        return self.recorder.branch(self.tensor, how, value)

    def _map(self, function: Callable[..., Any], *others: Any) -> Any:
        raw = [o.tensor if isinstance(o, Number) else o for o in others]
        if not all(isinstance(o, int | float | Tensor) for o in raw):
            return NotImplemented
        result = function(*raw)
        tensors = [o for o in others if isinstance(o, Tensor)]
        return (
            result if tensors or not isinstance(result, Tensor) else Number(result, self.recorder)
        )

    def __float__(self) -> float:
        return float(self.bare("float()"))

    def __int__(self) -> int:
        return int(self.bare("int()"))

    def __index__(self) -> int:
        return operator.index(self.bare("use as an index"))

    def __bool__(self) -> bool:
        return bool(self.bare("if on a value"))

    def __repr__(self) -> str:
        return repr(self.bare("printing"))

    def __format__(self, spec: str) -> str:
        return format(self.bare("printing"), spec)

    def __hash__(self) -> int:
        return hash(self.bare("hashing"))

    def __round__(self, digits: int | None = None) -> Any:
        return (
            round(self.bare("round()"), digits)
            if digits is not None
            else round(self.bare("round()"))
        )

    def item(self) -> Number:
        return self


def _number_method(name: str, function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: Number, *others: Any) -> Any:
        return (
            self._map(function, *others, self) if reflected else self._map(function, self, *others)
        )

    method.__name__ = name
    return method


for _name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]:
    setattr(Number, f"__{_name}__", _number_method(_name, getattr(operator, _name), False))
    setattr(Number, f"__r{_name}__", _number_method(_name, getattr(operator, _name), True))


for _name in ["lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"]:
    setattr(Number, f"__{_name}__", _number_method(_name, getattr(operator, _name), False))


class Functions(TorchFunctionMode):
    """Sees reads of tensor contents that never reach the dispatcher, and hands out ``Number``s."""

    def __init__(self, recorder: Listener, follow: bool) -> None:
        super().__init__()
        self.recorder, self.follow = recorder, follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist") and self.follow and isinstance(args[0], Tensor):
            self.recorder.shape_read(args[0])
            tensor = args[0].detach()
            wide = torch.float64 if tensor.is_floating_point() else torch.int64
            tensor = (
                tensor.to(wide)
                if tensor.dtype != torch.bool and not tensor.is_complex()
                else tensor
            )
            return self._unpack(tensor.reshape(()) if name == "item" else tensor)
        if name in ESCAPES and args and isinstance(args[0], Tensor):
            self.recorder.escape(args[0], f".{name}()")
        if name in ("__repr__", "__str__", "__format__") or (name == "tolist" and not self.follow):
            self.recorder.escape(args[0], f"{name.strip('_')}()")
            with self.recorder.paused():
                return func(*args, **kwargs)
        if self.recorder.dynamic:
            return self._watched(func, name, args, kwargs)
        return self._called(func, name, args, kwargs)

    def _watched(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Some values have a size that depends on data: Python must not learn it unseen."""
        out = self._called(func, name, args, kwargs)
        if not isinstance(out, Tensor) and name != "__set__" and out is not None:
            for tensor in tree_leaves((args, kwargs)):
                self.recorder.shape_read(tensor)
        return out

    def _called(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name == "one_hot" and len(args) + len(kwargs) > 1:
            self.recorder.checks += 1
            try:
                return func(*args, **kwargs)
            finally:
                self.recorder.checks -= 1
        data = kwargs.get("data", args[-1] if args else None)
        if name in CONSTRUCTORS and not isinstance(data, Tensor | int | float):
            followed = self._assemble(data, kwargs)
            if followed is not None:
                return followed
        numbers = [a for a in tree_leaves((args, kwargs), is_leaf=_is_number) if _is_number(a)]
        if not numbers:
            return func(*args, **kwargs)
        tensors = tree_map(
            lambda a: a.tensor if _is_number(a) else a, (args, kwargs), is_leaf=_is_number
        )
        try:
            return func(*tensors[0], **tensors[1])
        except TypeError:
            bare = tree_map(
                lambda a: a.bare(f"argument of {name}") if _is_number(a) else a,
                (args, kwargs),
                is_leaf=_is_number,
            )
            return func(*bare[0], **bare[1])

    def _assemble(self, data: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """A tensor from a nested list of numbers and tensors, kept connected to them."""
        leaves = tree_leaves(data, is_leaf=_is_number)
        if not any(_is_number(a) or isinstance(a, Tensor) for a in leaves):
            return None
        if _is_number(data) or not isinstance(data, list | tuple):
            single = data.tensor if _is_number(data) else data
            default = torch.get_default_dtype() if single.is_floating_point() else single.dtype
            return (
                single.detach()
                .to(kwargs.get("dtype") or (default if _is_number(data) else single.dtype))
                .clone()
            )
        parts = [
            self._assemble(a, kwargs) if not isinstance(a, int | float) else torch.tensor(a)
            for a in data
        ]
        dtype = (
            kwargs.get("dtype")
            or torch.stack([torch.zeros((), dtype=p.dtype) for p in parts if p is not None]).dtype
        )
        return torch.stack([p.to(dtype) for p in parts if p is not None])

    def _unpack(self, tensor: Tensor) -> Any:
        return (
            Number(tensor, self.recorder)
            if tensor.ndim == 0
            else [self._unpack(t) for t in tensor.unbind(0)]
        )


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)
