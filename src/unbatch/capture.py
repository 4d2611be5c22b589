"""From a model, a loss and a batch to a recorded computation that can be inspected and replayed.

The recorder runs the model once, eagerly, and writes down every ATen op with the module and the source line it came
from, together with what leaves the tensor world (``.item()``, ``bool(tensor)``, numpy). This is the only file that
touches PyTorch's dispatch and function modes. Nothing here knows about samples.

Asking changes nothing: tensors that existed before are copied when the program first writes to them and put back at
the end, also after an exception; so are module attributes, gradients, flags and random states.
"""

from __future__ import annotations

import linecache
import operator
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Ops that write to arguments without saying so in their schema: positions, given that the flag argument is true.
HIDDEN_WRITES = {"native_batch_norm": (3, 4, 5), "cudnn_batch_norm": (3, 4, 5), "miopen_batch_norm": (3, 4, 5)}
LIBRARY = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(os.path.abspath(__file__)) + os.sep)
CONSTRUCTORS = {"tensor", "as_tensor", "asarray", "new_tensor"}
ESCAPES = {"numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage", "cpu_numpy"}


@dataclass(frozen=True)
class Ref:
    """The ``index``-th value of a graph."""

    index: int


@dataclass
class Value:
    """One version of a tensor. ``storage``, ``stride``, ``offset`` say which memory it is a window on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    stride: tuple[int, ...]
    offset: int
    kind: str = "step"  # or "inputs", "targets", "parameters", "buffers", "constants"
    name: str = ""
    step: int = -1
    requires_grad: bool = False
    concrete: Tensor | None = None  # integers and booleans, constants and noise: the values seen at capture


@dataclass
class Step:
    """One op of the computation. ``args`` hold ``Ref``s in place of tensors."""

    index: int
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Ref | None, ...]
    writes: tuple[tuple[Ref, Ref], ...]
    grad: bool
    module: str
    where: str
    noise: bool = False

    @property
    def name(self) -> str:
        return self.op._schema.name.removeprefix("aten::")

    def refs(self) -> list[Ref]:
        return [a for a in tree_leaves((self.args, self.kwargs), is_leaf=_is_ref) if isinstance(a, Ref)]


@dataclass(frozen=True)
class Escape:
    """A tensor whose value was read by Python in a way that cannot be followed, before step ``step``."""

    ref: Ref
    how: str
    step: int
    module: str
    where: str
    order: int = -1  # the how-manieth branch on a boolean it was, if it was one
    in_loss: bool = False
    blind: bool = False  # what it tells is not known: it may tell anything


@dataclass(frozen=True)
class ModuleCall:
    """One run of a module: steps ``start`` to ``stop``, what went in and what came out."""

    module: str
    start: int
    stop: int
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]


@dataclass
class Graph:
    """A recorded computation: values, steps in order, escapes, and the parts of it that have a meaning."""

    values: list[Value] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    escapes: list[Escape] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: list[Ref | None] = field(default_factory=list)
    targets: list[Ref | None] = field(default_factory=list)
    predictions: list[Ref] = field(default_factory=list)
    loss: Ref | None = None
    after_cut: frozenset[int] = frozenset()  # the steps that belong to the loss; all others belong to the model
    model_steps: int = 0  # how many steps were recorded when the model returned
    rng: tuple[Any, ...] = ()
    dynamic: frozenset[int] = frozenset()  # values whose shape depends on what is in other values
    foreign: tuple[int, ...] = ()  # constants met in the middle of the run

    @property
    def forward_steps(self) -> list[Step]:
        return [s for s in self.steps if s.index not in self.after_cut]

    @property
    def loss_steps(self) -> list[Step]:
        return [s for s in self.steps if s.index in self.after_cut]

    def rebased(self, inputs: Sequence[Any], targets: Sequence[Any]) -> Graph:
        """The same computation on other data, with the integers it computes from them."""
        values = [replace(v) for v in self.values]
        other = replace(self, values=values)
        for refs, leaves in ((self.inputs, inputs), (self.targets, targets)):
            for ref, leaf in zip(refs, leaves, strict=True):
                if ref is not None:
                    values[ref.index].concrete = leaf.detach()

        def keep(i: int, tensor: Tensor) -> None:
            if values[i].concrete is not None and not tensor.is_floating_point():
                values[i].concrete = tensor.detach().clone()

        with torch.no_grad():
            wanted = [self.loss] if self.loss else self.predictions
            other.run({}, [w.index for w in wanted], visit=keep)
        return other

    def signature(self) -> tuple[Any, ...]:
        """What is computed, without the data: equal for two runs that do the same."""
        steps = tuple((str(s.op), repr(s.args), repr(s.kwargs)) for s in self.steps)
        outside = tuple((v.kind, v.name) for v in self.values if v.kind != "step")
        return steps, outside, self.loss or tuple(self.predictions), self.model_steps

    def run(
        self,
        feed: Mapping[int, Tensor],
        wanted: Sequence[int],
        keep: Mapping[int, Tensor] | None = None,
        visit: Callable[[int, Tensor], None] | None = None,
        instead: Mapping[int, Callable[..., Any]] | None = None,
        steps: Sequence[Step] | None = None,
    ) -> list[Tensor]:
        """Replay (``steps``, by default the model or, where a loss is wanted, everything) with the values in ``feed`` replaced.

        ``keep``: values pinned to given tensors (frozen statistics); ``instead``: other functions for some steps;
        ``visit`` sees every value. Noise is drawn from the random state of the capture, so it is what it was then.
        """
        before = _random_state()
        try:
            if self.rng:
                _set_random_state(self.rng)
            if steps is None:
                inside = all(self.values[w].step not in self.after_cut for w in wanted)
                steps = self.forward_steps if inside else self.steps
            return self._run(feed, wanted, keep or {}, visit, instead or {}, steps)
        finally:
            _set_random_state(before)

    def _run(
        self,
        feed: Mapping[int, Tensor],
        wanted: Sequence[int],
        keep: Mapping[int, Tensor],
        visit: Callable[[int, Tensor], None] | None,
        instead: Mapping[int, Callable[..., Any]],
        steps: Sequence[Step],
    ) -> list[Tensor]:
        env: dict[int, Tensor] = {}
        last = self._last_uses(wanted)
        written = {old.index for s in self.steps for old, _ in s.writes}

        def get(ref: Any) -> Any:
            if not isinstance(ref, Ref):
                return ref
            if ref.index not in env:
                value = feed.get(ref.index, self.values[ref.index].concrete)
                assert value is not None, f"value {ref.index} ({self.values[ref.index]}) was not computed"
                env[ref.index] = value.clone() if ref.index in written else value
            return env[ref.index]

        for step in steps:
            args, kwargs = tree_map(get, (step.args, step.kwargs), is_leaf=_is_ref)
            with torch.set_grad_enabled(step.grad and torch.is_grad_enabled()):
                outs = _flat(instead.get(step.index, step.op)(*args, **kwargs))
            for ref, out in zip(step.outs, outs, strict=False):
                if ref is not None and isinstance(out, Tensor):
                    env[ref.index] = keep.get(ref.index, out)
                    if visit:
                        visit(ref.index, env[ref.index])
            for old, new in step.writes:
                if new.index in keep:
                    env[old.index].copy_(keep[new.index])
                env[new.index] = env[old.index]
            for dead in last.get(step.index, ()):
                env.pop(dead, None)
        return [get(Ref(w)) for w in wanted]

    def _last_uses(self, wanted: Sequence[int]) -> dict[int, list[int]]:
        last: dict[int, int] = {}
        for step in self.steps:
            for ref in [*step.refs(), *(r for r in step.outs if r)]:
                last[ref.index] = step.index
        out: dict[int, list[int]] = {}
        for value, step_index in last.items():
            if value not in wanted and self.values[value].kind == "step":
                out.setdefault(step_index, []).append(value)
        return out


def _is_ref(x: Any) -> bool:
    return isinstance(x, Ref)


def _flat(out: Any) -> list[Any]:
    return [x for o in out for x in _flat(o)] if isinstance(out, tuple | list) else [out]


# --- leaving no trace ------------------------------------------------------------------------------------------------


@contextmanager
def untouched(modules: Sequence[nn.Module], seed: tuple[Any, ...] | None = None) -> Iterator[tuple[Any, ...]]:
    """Whatever happens inside, modules and random states are afterwards as they were.

    Yields the random state; with ``seed`` the inside starts from that one instead.
    """
    before = _random_state()
    every = list({id(m): m for module in modules for m in module.modules()}.values())
    dicts = [(m, dict(m.__dict__), [(d, _copy(d)) for d in m.__dict__.values() if isinstance(d, dict | list | set)]) for m in every]
    flags = [(p, p.requires_grad, p.grad) for m in every for p in m._parameters.values() if p is not None]
    writes = _Writes()
    try:
        if seed is not None:
            _set_random_state(seed)
        with writes:
            yield seed or before
    finally:
        writes.undo()
        for m, attributes, containers in dicts:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, content in containers:
                _refill(container, content)
        for p, requires_grad, grad in flags:
            p.requires_grad_(requires_grad)
            p.grad = grad
        _set_random_state(before)


def _copy(container: Any) -> Any:
    return container.copy()


def _refill(container: Any, content: Any) -> None:
    if container == content if not isinstance(container, dict | list) else _same(container, content):
        return
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def _same(a: Any, b: Any) -> bool:
    if len(a) != len(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(a[k] is b[k] for k in a)
    return all(x is y for x, y in zip(a, b, strict=True))


def _random_state() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


def _mutated(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    schema = op._schema
    out = [
        leaf
        for i, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
        for leaf in tree_leaves(args[i] if i < len(args) else kwargs.get(a.name))
        if isinstance(leaf, Tensor)
    ]
    hidden = HIDDEN_WRITES.get(schema.name.removeprefix("aten::"))
    if hidden and len(args) > hidden[-1] and args[hidden[-1]]:
        out += [args[i] for i in hidden[:-1] if isinstance(args[i], Tensor)]
    return out


class _Writes(TorchDispatchMode):
    """Copies a tensor from outside before the first write to it."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, tuple[Tensor, Tensor, int]] = {}
        self.own: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable or func._schema.name.removeprefix("aten::") in HIDDEN_WRITES:
            for tensor in _mutated(func, args, kwargs):
                if tensor.layout != torch.strided or tensor.is_nested:
                    continue
                storage = tensor.untyped_storage()
                if storage._cdata not in self.own and storage._cdata not in self.saved:
                    whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
                    self.saved[storage._cdata] = (whole, whole.clone(), tensor._version)
        out = func(*args, **kwargs)
        if not func._schema.is_mutable:
            given = {id(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            shared = {_storage(a) for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
            for o in _flat(out):
                if isinstance(o, Tensor) and id(o) not in given and _storage(o) not in shared and o.layout == torch.strided and not o.is_nested:
                    self.own[o.untyped_storage()._cdata] = o.untyped_storage()
        return out

    def undo(self) -> None:
        with torch.no_grad():
            for whole, content, version in self.saved.values():
                whole.copy_(content)
                torch._C._autograd._unsafe_set_version_counter((whole,), (version,))
        self.saved.clear()
        self.own.clear()


# --- scalars that left the tensor world and are still followed ---------------------------------------------------------


class Number:
    """What ``tensor.item()`` returns during capture: a Python number that remembers the tensor it came from.

    Arithmetic keeps following it; anything that needs the bare value (``if``, ``int()``, ``math.sqrt``) is reported
    as an escape.
    """

    def __init__(self, tensor: Tensor, recorder: Recorder) -> None:
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
        return result if tensors or not isinstance(result, Tensor) else Number(result, self.recorder)

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
        return round(self.bare("round()"), digits) if digits is not None else round(self.bare("round()"))

    def item(self) -> Number:
        return self


def _number_method(name: str, function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: Number, *others: Any) -> Any:
        return self._map(function, *others, self) if reflected else self._map(function, self, *others)

    method.__name__ = name
    return method


for _name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow"]:
    setattr(Number, f"__{_name}__", _number_method(_name, getattr(operator, _name), False))
    setattr(Number, f"__r{_name}__", _number_method(_name, getattr(operator, _name), True))
for _name in ["lt", "le", "gt", "ge", "eq", "ne", "neg", "abs"]:
    setattr(Number, f"__{_name}__", _number_method(_name, getattr(operator, _name), False))


class _Functions(TorchFunctionMode):
    """Sees reads of tensor contents that never reach the dispatcher, and hands out ``Number``s."""

    def __init__(self, recorder: Recorder, follow: bool) -> None:
        super().__init__()
        self.recorder, self.follow = recorder, follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist") and self.follow and isinstance(args[0], Tensor):
            self.recorder.shape_read(args[0])
            tensor = args[0].detach()
            wide = torch.float64 if tensor.is_floating_point() else torch.int64
            tensor = tensor.to(wide) if tensor.dtype != torch.bool and not tensor.is_complex() else tensor
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
        tensors = tree_map(lambda a: a.tensor if _is_number(a) else a, (args, kwargs), is_leaf=_is_number)
        try:
            return func(*tensors[0], **tensors[1])
        except TypeError:
            bare = tree_map(lambda a: a.bare(f"argument of {name}") if _is_number(a) else a, (args, kwargs), is_leaf=_is_number)
            return func(*bare[0], **bare[1])

    def _assemble(self, data: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """A tensor from a nested list of numbers and tensors, kept connected to them."""
        leaves = tree_leaves(data, is_leaf=_is_number)
        if not any(_is_number(a) or isinstance(a, Tensor) for a in leaves):
            return None
        if _is_number(data) or not isinstance(data, list | tuple):
            single = data.tensor if _is_number(data) else data
            default = torch.get_default_dtype() if single.is_floating_point() else single.dtype
            return single.detach().to(kwargs.get("dtype") or (default if _is_number(data) else single.dtype)).clone()
        parts = [self._assemble(a, kwargs) if not isinstance(a, int | float) else torch.tensor(a) for a in data]
        dtype = kwargs.get("dtype") or torch.stack([torch.zeros((), dtype=p.dtype) for p in parts if p is not None]).dtype
        return torch.stack([p.to(dtype) for p in parts if p is not None])

    def _unpack(self, tensor: Tensor) -> Any:
        return Number(tensor, self.recorder) if tensor.ndim == 0 else [self._unpack(t) for t in tensor.unbind(0)]


def _is_number(x: Any) -> bool:
    return isinstance(x, Number)


# --- the recorder --------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Writes every op into a ``Graph``. Use inside ``untouched``."""

    def __init__(self, names: Mapping[int, str], flip: int = -1) -> None:
        super().__init__()
        self.graph = Graph()
        self.flip, self.branches = flip, 0
        self.in_loss = False
        self.names = names  # id(module) -> qualified name
        self.modules: list[str] = []
        self.known: dict[int, Ref] = {}
        self.alive: list[Any] = []  # keeps ids valid
        self.storages: dict[int, int] = {}
        self.latest: dict[int, list[tuple[Tensor, Ref]]] = {}
        self.off = 0
        self.checks = 0  # inside a function that reads values only to validate them
        self.foreign: list[int] = []  # tensors met in the middle of the run
        self.dynamic: set[int] = set()  # values whose shape depends on what is in other values

    # -- values --

    def declare(self, tensor: Tensor, kind: str, name: str) -> Ref:
        return self._add(tensor, kind=kind, name=name, concrete=tensor.detach())

    def _add(self, tensor: Tensor, **extra: Any) -> Ref:
        storage = _storage(tensor)
        number = self.storages.setdefault(storage, len(self.storages))
        strided = tensor.layout == torch.strided and not tensor.is_nested
        value = Value(
            tuple(tensor.shape), tensor.dtype, number, tuple(tensor.stride()) if strided else (),
            int(tensor.storage_offset()) if strided else 0, requires_grad=tensor.requires_grad, **extra,
        )  # fmt: skip
        ref = Ref(len(self.graph.values))
        self.graph.values.append(value)
        self.known[id(tensor)] = ref
        self.alive.append((tensor, tensor.untyped_storage() if strided else None))
        self.latest.setdefault(number, []).append((tensor, ref))
        return ref

    def ref(self, tensor: Tensor) -> Ref:
        if id(tensor) in self.known and self._unmoved(tensor, self.graph.values[self.known[id(tensor)].index]):
            return self.known[id(tensor)]
        if tensor.layout == torch.strided and _storage(tensor) in self.storages:
            number = self.storages[_storage(tensor)]
            base, base_ref = self.latest[number][-1]
            if _geometry(base) == _geometry(tensor):
                return self._step(aten.detach.default, (base_ref,), {}, tensor)
            args = (base_ref, list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
            if base.dtype == tensor.dtype:
                return self._step(aten.as_strided.default, args, {}, tensor)
        self.foreign.append(len(self.graph.values))
        return self.declare(tensor, "constants", "")

    def _unmoved(self, tensor: Tensor, value: Value) -> bool:
        """The tensor still is what it was (``x.data = y`` gives it another memory)."""
        if tensor.layout != torch.strided:
            return True
        here = (self.storages.get(_storage(tensor)), tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset())
        return here == (value.storage, value.shape, value.stride, value.offset)

    def _step(self, op: Any, args: Any, kwargs: Any, out: Any, writes: Sequence[Tensor] = (), olds: Sequence[Ref] = ()) -> Any:
        index = len(self.graph.steps)
        noise = torch.Tag.nondeterministic_seeded in op.tags and not _sure(op, args, kwargs)
        where = self._where()
        step = Step(index, op, args, kwargs, (), (), torch.is_grad_enabled(), self.modules[-1] if self.modules else "", where, noise)
        self.graph.steps.append(step)
        new = {}
        for tensor in writes:
            new[id(tensor)] = self._add(tensor, step=index, concrete=_concrete(tensor, noise))
        outs = []
        for o in _flat(out):
            if not isinstance(o, Tensor):
                outs.append(None)
            elif id(o) in new:
                outs.append(new[id(o)])
            else:
                outs.append(self._add(o, step=index, concrete=_concrete(o, noise)))
        step.outs = tuple(outs)
        if any(r.index in self.dynamic for r in step.refs()) or _sizes_itself(op, args, self.graph):
            self.dynamic |= {r.index for r in [*outs, *new.values()] if r is not None}
        step.writes = tuple(zip(olds, new.values(), strict=True))
        return outs[0] if outs else None

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(LIBRARY) and not file.startswith("<"):
                return f"{file}:{frame.f_lineno}"
            if frame.f_code is record.__code__:
                return ""
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    # -- what happens while the model runs --

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.branch(args[0], "read by Python (bool(), int(), float() or if)", func(*args, **kwargs))
        with torch._C.DisableTorchFunction():
            return self._observe(func, args, kwargs)

    def _observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        recorded = tree_map(lambda a: self.ref(a) if isinstance(a, Tensor) else a, (args, kwargs))
        writes = list({id(t): t for t in _mutated(func, args, kwargs)}.values())
        olds = [self.ref(t) for t in writes]
        try:
            out = func(*args, **kwargs)
        except Exception:
            self._read(args, kwargs, "whether an op raises")
            raise
        if any(not isinstance(o, Tensor) and o is not None for o in _flat(out)):
            self._read(args, kwargs, f"the result of {func._schema.name.removeprefix('aten::')}")
        self._step(func, *recorded, out, writes, olds)
        return out

    def _read(self, args: Any, kwargs: Any, how: str) -> None:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.escape(tensor, how)

    def escape(self, tensor: Tensor, how: str, order: int = -1) -> None:
        if not self.off and not self.checks:
            module = self.modules[-1] if self.modules else ""
            self.graph.escapes.append(Escape(self.ref(tensor), how, len(self.graph.steps), module, self._where(), order, self.in_loss))

    def branch(self, tensor: Tensor, how: str, value: Any) -> Any:
        """A value read by Python; a boolean may be answered the other way, to see what the other branch does."""
        if self.off or self.checks:
            return value
        if tensor.dtype != torch.bool:
            self.escape(tensor, how)
            return value
        self.branches += 1
        self.escape(tensor, how, self.branches - 1)
        return not value if self.flip == self.branches - 1 else value

    def shape_read(self, tensor: Any) -> None:
        ref = self.known.get(id(tensor))
        if ref is not None and ref.index in self.dynamic:
            self.escape(tensor, "its size read by Python, which depends on data")

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.off += 1
        try:
            yield
        finally:
            self.off -= 1

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Know which module is running."""

        starts: list[int] = []

        def enter(module: nn.Module, _: Any) -> None:
            self.modules.append(self.names.get(id(module), type(module).__name__))
            starts.append(len(self.graph.steps))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            refs = [
                tuple(self.known[id(t)] for t in tree_leaves(x) if isinstance(t, Tensor) and id(t) in self.known)
                for x in (inputs, output)
            ]
            self.graph.calls.append(ModuleCall(self.modules.pop(), starts.pop(), len(self.graph.steps), *refs))

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()


def _sure(op: Any, args: Any, kwargs: Any) -> bool:
    """A random op whose probability of dropping is zero."""
    names = [a.name for a in op._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return "dropout_p" in names and not given.get("dropout_p")


def _sizes_itself(op: Any, args: Any, graph: Graph) -> bool:
    """The shape of the result depends on values."""
    if torch.Tag.dynamic_output_shape in op.tags:
        if op._schema.name not in ("aten::index", "aten::repeat_interleave"):
            return True
        return any(graph.values[r.index].dtype in (torch.bool, torch.uint8) for r in tree_leaves(args[1:], is_leaf=_is_ref) if isinstance(r, Ref))
    return False


def _storage(tensor: Tensor) -> int:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return tensor.untyped_storage()._cdata if strided else -id(tensor)


def _geometry(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), tuple(t.stride()), t.storage_offset(), t.dtype


def _concrete(tensor: Tensor, noise: bool) -> Tensor | None:
    exact = not tensor.is_floating_point() and not tensor.is_complex() and tensor.device.type != "meta"
    return tensor.detach().clone() if noise or exact else None


# --- the entry ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What there is to run: a model, a loss, and the parameters and modules they come with."""

    model: Callable[..., Any]
    loss: Callable[..., Any] | None
    parameters: Mapping[str, Tensor]
    functional: bool = False  # the model is called as model(parameters, inputs)

    @property
    def modules(self) -> list[nn.Module]:
        return [m for m in (self.model, self.loss) if isinstance(m, nn.Module)]

    def predict(self, inputs: Any, parameters: Mapping[str, Tensor] | None = None) -> Any:
        if self.functional:
            return self.model(dict(parameters or self.parameters), inputs)
        if isinstance(inputs, tuple):
            return self.model(*inputs)
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(inputs)


def record(program: Program, inputs: Any, targets: Any) -> tuple[Graph, Any]:
    """Run the program once, recording it. Returns the graph, and the model's output together with the loss."""
    follow = True
    try:
        graph, output = _record(program, inputs, targets, follow)
    except Exception:
        follow = False
        graph, output = _record(program, inputs, targets, follow)
    if graph.foreign:
        graph.escapes += _newborn(graph, _record(program, inputs, targets, follow)[0])
    return graph, output


def _newborn(graph: Graph, again: Graph) -> list[Escape]:
    """Constants that another run meets in another memory: they were made during the run, out of sight."""
    out = []
    for i, j in zip(graph.foreign, again.foreign, strict=False):
        first, second = graph.values[i].concrete, again.values[j].concrete
        if first is not None and second is not None and _storage(first) != _storage(second):
            user = next((s for s in graph.steps if any(r.index == i for r in s.refs())), None)
            module, where = (user.module, user.where) if user else ("", "")
            in_loss = user is not None and user.index in graph.after_cut
            out.append(Escape(Ref(i), "a tensor made where it cannot be seen", user.index if user else 0, module, where, -1, in_loss, True))
    return out


def _made_from_numbers(graph: Graph, value: int) -> bool:
    """``torch.tensor(2.0)``: what Python knew, it knew without looking at tensors, or there is an escape."""
    users = [s for s in graph.steps if any(r.index == value for r in s.refs())]
    return bool(users) and users[0].name in ("lift_fresh", "lift")


def harmless(program: Program, inputs: Any, targets: Any, graph: Graph, escape: Escape) -> bool:
    """Whether a branch on a boolean changes nothing: the other way raises (an assertion) or computes the same."""
    if escape.order < 0:
        return False
    try:
        other, _ = _record(program, inputs, targets, True, escape.order)
    except Exception as error:
        return _raised_by_program(error)
    return other.signature() == graph.signature()


def _raised_by_program(error: Exception) -> bool:
    """The program itself raised, by a ``raise`` or ``assert`` of its own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and not trace.tb_frame.f_code.co_filename.startswith(LIBRARY[1]) and _is_raise(trace)


def _is_raise(trace: Any) -> bool:
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return line.startswith(("raise ", "assert ", "raise(", "assert("))


def _record(program: Program, inputs: Any, targets: Any, follow: bool, flip: int = -1) -> tuple[Graph, Any]:
    names = {id(m): name or type(m).__name__ for module in program.modules for name, m in module.named_modules()}
    recorder = Recorder(names, flip)
    graph = recorder.graph
    with untouched(program.modules) as state, torch.enable_grad(), recorder.tracked():
        graph.rng = state
        inputs, targets = tree_map(_alias, (inputs, targets))
        declare = recorder.declare
        graph.inputs = [declare(x, "inputs", str(i)) if _is_tensor(x) else None for i, x in enumerate(tree_leaves(inputs))]
        graph.targets = [declare(y, "targets", str(i)) if _is_tensor(y) else None for i, y in enumerate(tree_leaves(targets))]
        for name, p in program.parameters.items():
            declare(p, "parameters", name)
        for module in program.modules:
            for name, b in module.named_buffers():
                declare(b, "buffers", name)
        with recorder, _Functions(recorder, follow):
            output = program.predict(inputs)
            graph.model_steps, recorder.in_loss = len(graph.steps), True
            with recorder.paused():
                scalar = None
                leaves = [t for t in tree_leaves(output) if _is_tensor(t)]
            if program.loss is not None:
                scalar = program.loss(output, targets) if targets is not None else program.loss(output)
        if program.loss is not None:
            graph.predictions = [recorder.ref(t) for t in leaves]
            graph.loss = recorder.ref(scalar) if isinstance(scalar, Tensor) else None
            graph.after_cut = frozenset(range(graph.model_steps, len(graph.steps)))
        else:
            own = own_loss(output)
            graph.predictions = [recorder.ref(t) for t in leaves if t is not own]
            graph.loss = recorder.ref(own) if own is not None else None
        graph.dynamic = frozenset(recorder.dynamic)
        graph.foreign = tuple(v for v in recorder.foreign if not _made_from_numbers(graph, v))
        output = (output, scalar)
    return graph, output


def own_loss(output: Any) -> Tensor | None:
    """The loss in the output of a model that computes its own."""
    if isinstance(output, Tensor):
        return output if output.numel() == 1 else None
    candidate = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if candidate is None and isinstance(output, tuple | list) and output:
        candidate = output[0]
    return candidate if isinstance(candidate, Tensor) and candidate.numel() == 1 else None


def _alias(x: Any) -> Any:
    return x.detach() if _is_tensor(x) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
