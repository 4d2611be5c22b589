"""Values that Python reads, and how they are still followed.

``.item()`` hands out a ``Number`` that remembers its tensor. Reads that never reach the dispatcher
(numpy, ``tolist``, sizes that depend on data) are reported to the recorder.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.capture import recurrences
from unbatch.capture.hooks import REGISTERS

# Functions that make a tensor of numbers, by name: they would read each ``Number``.
CONSTRUCTORS = {"tensor", "as_tensor", "asarray", "new", "new_tensor"}

# Those of a tensor, whose type theirs has; the first takes sizes as well.
OF_ITS_KIND = {"new", "new_tensor"}

# Methods that read a tensor as a number. Old constructors call them out of sight of the recorder.
READS = {"__index__", "__int__", "__float__", "__bool__", "__complex__"}

# Functions whose result has the size of another tensor.
AS_ANOTHER = {"expand_as", "view_as", "reshape_as", "resize_as_", "resize_as_sparse_"}

# Methods that hand out the memory of a tensor: what is read there, nobody sees.
ESCAPES = {
    "numpy",
    "__array__",
    "__dlpack__",
    "data_ptr",
    "storage",
    "untyped_storage",
    "_typed_storage",
}

# Those whose memory other code may write to without PyTorch seeing it.
EXPORTS = frozenset(
    [
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.data_ptr,
        Tensor.storage,
        Tensor.untyped_storage,
        Tensor._typed_storage,
    ]
)

# Methods that read a tensor to print it.
PRINTS = {"__repr__", "__str__", "__format__"}


class Listener(Protocol):
    """What reads of values are reported to: the recorder.

    ``dynamic``: the values with a size that depends on data. ``checks`` is above zero inside
    functions that read values only to validate them. ``function``: the function of PyTorch that
    the program has called, by name, while it runs. ``reads``: how many reads were reported.
    """

    dynamic: set[int]
    checks: int

    @property
    def reads(self) -> int: ...

    function: str

    def escape(self, tensor: Tensor, how: str, answer: bool | None = None) -> None: ...
    def sizing(self, tensor: Tensor, how: str) -> None: ...
    def branch(self, tensor: Tensor, how: str, value: Any) -> Any: ...
    def shape_read(self, tensor: Any) -> None: ...
    def depends_on_data(self, tensor: Tensor) -> bool: ...
    def catches(self) -> bool: ...
    def hooked(self, hook: Any) -> None: ...
    def paused(self) -> Any: ...


class Exports(TorchFunctionMode):
    """Shows a tensor to ``save`` before its memory is handed to what writes without PyTorch."""

    def __init__(self, save: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.save = save

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in EXPORTS:
            self.save(args[0])
        return func(*args, **(kwargs or {}))


class Number:
    """What ``tensor.item()`` returns during recording: a Python number that remembers its tensor.

    Arithmetic keeps following it; anything that needs the bare value (``if``, ``int()``,
    ``math.sqrt``) is reported as an escape.
    """

    def __init__(self, tensor: Tensor, recorder: Listener) -> None:
        self.tensor, self.recorder = tensor, recorder

    def bare(self, how: str) -> Any:
        """Return the bare value, and report that it was read."""
        # ``item`` dispatches a read that would be reported as one of the program's own.
        with self.recorder.paused():
            value = self.tensor.item()
        return self.recorder.branch(self.tensor, how, value)

    def _map(self, function: Callable[..., Any], *operands: Any) -> Any:
        """Return a function of numbers as a ``Number``; of tensors too, as a tensor."""
        raw = [_tensor_of(operand) for operand in operands]
        # Python then asks the other operand, and raises if that does not know either.
        if not all(isinstance(x, int | float | Tensor) for x in raw):
            return NotImplemented
        result = function(*raw)
        if not isinstance(result, Tensor) or _holds(Tensor, operands):
            return result
        return Number(result, self.recorder)

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
        return round(self.bare("round()"), digits)

    def item(self) -> Number:
        """Return itself, as numbers of numpy do."""
        return self


def _tensor_of(x: Any) -> Any:
    """Return the tensor of a ``Number``, and anything else as it is."""
    return x.tensor if isinstance(x, Number) else x


def _number_method(name: str, function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    """Return the method ``name`` of ``Number``; reflected, it gets its operands the other way."""

    def method(self: Number, *others: Any) -> Any:
        if reflected:
            return self._map(function, *others, self)
        return self._map(function, self, *others)

    method.__name__ = name
    return method


for _name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]:
    setattr(Number, f"__{_name}__", _number_method(_name, getattr(operator, _name), False))
    setattr(Number, f"__r{_name}__", _number_method(_name, getattr(operator, _name), True))


for _name in ["lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"]:
    setattr(Number, f"__{_name}__", _number_method(_name, getattr(operator, _name), False))


class Functions(TorchFunctionMode):
    """Sees reads of tensor contents that never reach the dispatcher, and hands out ``Number``s.

    ``follow``: whether it does the latter; else a read of a value is an escape at once.
    """

    def __init__(self, recorder: Listener, follow: bool) -> None:
        super().__init__()
        self.recorder, self.follow = recorder, follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        reads_values = name in ("item", "tolist")
        if reads_values and self.follow and isinstance(args[0], Tensor):
            return self._followed(args[0], name)
        if name in ESCAPES and args and isinstance(args[0], Tensor):
            self.recorder.escape(args[0], f".{name}()")
        if name in REGISTERS:
            self.recorder.hooked(args[-1])
        if name in PRINTS or (name == "tolist" and not self.follow):
            self.recorder.escape(args[0], f"{name.strip('_')}()")
            with self.recorder.paused():
                return func(*args, **kwargs)
        # Before the call: what it makes itself is for the next one to read.
        sized_by_data = bool(self.recorder.dynamic)
        outer, self.recorder.function = self.recorder.function, name
        try:
            out = self._watched(func, name, args, kwargs)
        finally:
            self.recorder.function = outer
        if sized_by_data and name != "__set__":
            self._report_sizes(out, args, kwargs)
        return out

    def _watched(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function of PyTorch, and report a number that it reads where nobody sees that."""
        seen = self.recorder.reads
        out = self._called(func, name, args, kwargs)
        if name not in READS or self.recorder.reads > seen:
            return out
        how = "read by Python (bool(), int(), float() or if)"
        return type(out)(self.recorder.branch(args[0], how, out))

    def _followed(self, tensor: Tensor, name: str) -> Any:
        """Return the result of ``item`` or ``tolist`` with a ``Number`` in place of each number."""
        self.recorder.shape_read(tensor)
        tensor = tensor.detach()
        # Python's numbers are wide: arithmetic with them does not round to the tensor's type.
        if tensor.is_floating_point():
            tensor = tensor.to(torch.float64)
        elif tensor.dtype != torch.bool and not tensor.is_complex():
            tensor = tensor.to(torch.int64)
        if name == "item":
            tensor = tensor.reshape(())
        return self._unpack(tensor)

    def _unpack(self, tensor: Tensor) -> Any:
        """Return nested lists of numbers, one for each axis."""
        if tensor.ndim == 0:
            return Number(tensor, self.recorder)
        return [self._unpack(t) for t in tensor.unbind(0)]

    def _report_sizes(self, out: Any, args: Any, kwargs: Any) -> None:
        """Report that Python learns something of tensors, if it is given anything but a tensor.

        Some have a size that depends on data, and that is what it may be about.
        """
        if out is None or isinstance(out, Tensor):
            return
        for tensor in tree_leaves((args, kwargs)):
            self.recorder.shape_read(tensor)

    def _called(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function of PyTorch with tensors in place of numbers, if it takes them."""
        if name == "one_hot" and _has_classes(*args, **kwargs) and not self.recorder.catches():
            return self._unchecked(func, args, kwargs)
        self._note_reads(name, args[1:], kwargs)
        if name == "__deepcopy__":
            return _deep_copy(*args, **kwargs)
        layers = recurrences.layers_of(func, args, kwargs)
        if layers is not None:
            return self._recurrent(layers)
        if name in CONSTRUCTORS:
            assembled = self._constructed(name, args, kwargs)
            if assembled is not None:
                return assembled
            if name == "new" and _holds(Number, (args, kwargs)):
                sizes, named = self._bare(name, (args, kwargs))
                return func(*sizes, **named)
        if not _holds(Number, (args, kwargs)):
            return func(*args, **kwargs)
        tensors, named = tree_map(_tensor_of, (args, kwargs), is_leaf=_is_number)
        try:
            return func(*tensors, **named)
        except TypeError:  # it takes a number, and no tensor
            bare, named = self._bare(name, (args, kwargs))
            return func(*bare, **named)

    def _note_reads(self, name: str, others: Any, kwargs: Any) -> None:
        """Note what a function reads of its other arguments that dispatches nothing."""
        # The size of what comes out is that of another tensor, which is no operand of any op.
        if name in AS_ANOTHER:
            for tensor in tree_leaves((others, kwargs)):
                self.recorder.shape_read(tensor)
        # PyTorch reads in memory where to split.
        if name == "tensor_split":
            for place in tree_leaves((others, kwargs)):
                if isinstance(place, Tensor):
                    self.recorder.escape(place, "read as places to split at")

    def _recurrent(self, layers: recurrences.Layers) -> Any:
        """Run the layers of a recurrence by ops that are taken apart."""
        # PyTorch reads in memory how many sequences run at each step, which dispatches nothing.
        sizes, how = layers.batch_sizes, "read as sizes of the steps of a recurrence"
        if sizes is not None and self.recorder.depends_on_data(sizes):
            self.recorder.escape(sizes, how)
        elif sizes is not None:
            self.recorder.sizing(sizes, how)
        return recurrences.run(layers)

    def _unchecked(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a function that reads values only to validate them, and report none of that."""
        self.recorder.checks += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.recorder.checks -= 1

    def _bare(self, name: str, arguments: Any) -> Any:
        """Return arguments with bare values in place of numbers, whose reads are reported."""

        def bare(a: Any) -> Any:
            return a.bare(f"argument of {name}") if isinstance(a, Number) else a

        return tree_map(bare, arguments, is_leaf=_is_number)

    # -- tensors of numbers --

    def _constructed(self, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """Return what a constructor makes of numbers and tensors, kept connected to them.

        None if there are none among its data.
        """
        # Those of a tensor have it in front.
        data = kwargs.get("data", args[-1] if args else None)
        if isinstance(data, Tensor | int | float):
            return None
        if name == "new" and (len(args) != 2 or not isinstance(data, list | tuple)):
            return None
        if name in OF_ITS_KIND:
            kwargs = {"dtype": args[0].dtype, **kwargs}
        return self._assemble(data, kwargs)

    def _assemble(self, data: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return a tensor from nested lists of numbers and tensors; None if there are none."""
        if not _holds((Number, Tensor), data):
            return None
        if isinstance(data, list | tuple):
            return self._stacked(data, kwargs)
        return self._single(data, kwargs)

    def _single(self, data: Number | Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        dtype = kwargs.get("dtype")
        if isinstance(data, Number):
            tensor = data.tensor
            if dtype is None and tensor.is_floating_point():
                dtype = torch.get_default_dtype()  # as of a tensor made of a Python float
        else:
            tensor = data
        return tensor.detach().to(dtype or tensor.dtype).clone()

    def _stacked(self, data: Any, kwargs: Mapping[str, Any]) -> Tensor:
        parts = []
        for a in data:
            part = torch.tensor(a) if isinstance(a, int | float) else self._assemble(a, kwargs)
            if part is not None:
                parts.append(part)
        dtype = kwargs.get("dtype")
        if dtype is None:
            # The type that PyTorch gives them together.
            dtype = torch.stack([torch.zeros((), dtype=p.dtype) for p in parts]).dtype
        return torch.stack([p.to(dtype) for p in parts])


def _deep_copy(tensor: Tensor, memo: dict[int, Any]) -> Any:
    """Return what ``copy.deepcopy`` does of a tensor, by an op that is seen."""
    if id(tensor) not in memo:
        copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        if isinstance(tensor, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, tensor.requires_grad)
        memo[id(tensor)] = copied
    return memo[id(tensor)]


def _holds(kinds: type | tuple[type, ...], tree: Any) -> bool:
    return any(isinstance(leaf, kinds) for leaf in tree_leaves(tree, is_leaf=_is_number))


def _has_classes(_labels: Any, num_classes: Any = -1) -> bool:
    """Return whether ``one_hot`` reads its labels only to check them, and not to count classes."""
    return isinstance(num_classes, int) and num_classes >= 0


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)
