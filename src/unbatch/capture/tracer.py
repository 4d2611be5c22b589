"""Recording of a running program: a dispatch mode that writes each op into a graph.

What Python reads of tensor values is followed or noted here. Which program is recorded stands in ``program.py``.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.capture import ops
from unbatch.capture.device_ops import (
    FUSED_DROPOUT,
    READS_LENGTHS,
    argued,
    drops,
    same_as,
    without_buffer,
)
from unbatch.capture.distributed import check_alone
from unbatch.capture.graph import Graph, HostRead, ModuleCall, Ref, Step, Value, flat, is_ref
from unbatch.capture.isolation import SKIPS_COMPILER, mutated, storage_of
from unbatch.errors import HERE

aten = torch.ops.aten


P = ParamSpec("P")


T = TypeVar("T")


LIBRARY = (os.path.dirname(torch.__file__) + os.sep, HERE)


USER = os.path.join(HERE, "cli", "demo.py")  # reads as a user's program does


ENTRIES: set[CodeType] = (
    set()
)  # code of the functions that start a recording: no user's frame lies above them


# The tensor gets another memory.
MOVES_MEMORY = frozenset([aten.set_.source_Storage, aten.set_.source_Storage_storage_offset])


class Recorder(TorchDispatchMode):
    """Writes every op into a ``Graph``. Use inside ``untouched``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPS_COMPILER

    def __init__(self, names: Mapping[int, str], answers: Sequence[bool] = ()) -> None:
        super().__init__()
        self.graph = Graph()
        self.answers, self.asked = answers, 0
        self.in_loss = False
        self.names = names  # id(module) -> qualified name
        self.modules: list[str] = []
        self.known: dict[
            int, tuple[weakref.ref[Tensor], Ref]
        ] = {}  # by id, which another tensor may come to have
        self.storages: dict[int, int] = {}
        self.kept: list[
            Any
        ] = []  # keeps the names of storages from being given again, and not what is in them
        self.latest: dict[
            int, tuple[tuple[Any, ...], Ref]
        ] = {}  # the newest value in a memory: its geometry
        self.off = 0
        self.checks = 0  # inside a function that reads values only to validate them
        self.foreign: list[int] = []  # tensors met in the middle of the run
        self.dynamic: set[int] = set()  # values whose shape depends on what is in other values

    # -- values --

    def declare(self, tensor: Tensor, kind: str, name: str) -> Ref:
        return self._add(tensor, kind=kind, name=name, concrete=tensor.detach())

    def _add(self, tensor: Tensor, **extra: Any) -> Ref:
        storage = storage_of(tensor)
        number = self.storages.setdefault(storage, len(self.storages))
        strided = tensor.layout == torch.strided and not tensor.is_nested
        value = Value(
            tuple(tensor.shape), tensor.dtype, number, tuple(tensor.stride()) if strided else (),
            int(tensor.storage_offset()) if strided else 0, requires_grad=tensor.requires_grad, **extra,
        )  # fmt: skip
        ref = Ref(len(self.graph.values))
        self.graph.values.append(value)
        self.known[id(tensor)] = weakref.ref(tensor), ref
        self.kept.append(StorageWeakRef(tensor.untyped_storage()) if strided else tensor)
        self.latest[number] = _geometry(tensor) if strided else (), ref
        return ref

    def find(self, tensor: Any) -> Ref | None:
        """The value that this very tensor stands for."""
        same, ref = self.known.get(id(tensor), (None, None))
        return ref if same is not None and same() is tensor else None

    def ref(self, tensor: Tensor) -> Ref:
        found = self.find(tensor)
        if found is not None and self._unmoved(tensor, self.graph.values[found.index]):
            return found
        if tensor.layout == torch.strided and storage_of(tensor) in self.storages:
            number = self.storages[storage_of(tensor)]
            geometry, base_ref = self.latest[number]
            if geometry == _geometry(tensor):
                return self._step(aten.detach.default, (base_ref,), {}, tensor)
            args = (base_ref, list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
            if self.graph.values[base_ref.index].dtype == tensor.dtype:
                return self._step(aten.as_strided.default, args, {}, tensor)
        self.foreign.append(len(self.graph.values))
        return self.declare(tensor, "constants", "")

    def _unmoved(self, tensor: Tensor, value: Value) -> bool:
        """The tensor still is what it was (``x.data = y`` gives it another memory)."""
        if tensor.layout != torch.strided:
            return True
        here = (
            self.storages.get(storage_of(tensor)),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.storage_offset(),
        )
        return here == (value.storage, value.shape, value.stride, value.offset)

    def _step(
        self,
        op: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        writes: Sequence[Tensor] = (),
        olds: Sequence[Ref] = (),
    ) -> Any:
        index = len(self.graph.steps)
        noise = ops.draws(op) and drops(op, args, kwargs)
        where = self._where()
        step = Step(
            index,
            op,
            args,
            kwargs,
            (),
            (),
            torch.is_grad_enabled(),
            self.modules[-1] if self.modules else "",
            where,
            noise,
        )
        self.graph.steps.append(step)
        new = {}
        for tensor in writes:
            new[id(tensor)] = self._add(tensor, step=index, concrete=_concrete(tensor, noise))
        outs: list[Ref | None] = []
        for o in flat(out):
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
        return users_line()

    def _place(self) -> str:
        module, where = self.modules[-1] if self.modules else "", self._where()
        return "".join(f" {word} {name}" for word, name in (("in", module), ("at", where)) if name)

    # -- what happens while the model runs --

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        check_alone(func, types, self._place)
        if func is aten._local_scalar_dense.default:
            return self.branch(
                args[0], "read by Python (bool(), int(), float() or if)", func(*args, **kwargs)
            )
        with torch._C.DisableTorchFunction():
            return self._observe(func, args, kwargs)

    def _observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in MOVES_MEMORY:
            return func(*args, **kwargs)  # ``ref`` sees that the tensor lies elsewhere
        if ops.full_name(func) in FUSED_DROPOUT and drops(func, args, kwargs):
            return self._dropout(func, args, kwargs)
        plain = same_as(func, args, kwargs)
        if plain is not None:
            return self._note_as(plain.op, self._in_one_place(plain.args), func(*args, **kwargs))
        return self._note(func, without_buffer(func, args), kwargs)

    def _note_as(self, op: Any, args: Any, out: Any) -> Any:
        """A GPU library's form of an op, written down as that op: only the first result is the same in both."""
        refs = tree_map(lambda a: self.ref(a) if isinstance(a, Tensor) else a, args)
        self._step(op, refs, {}, flat(out)[:1])
        return out

    def _in_one_place(self, args: Any) -> Any:
        """Labels that a library wants on the CPU, on the device of the first argument."""
        device = args[0].device
        moved = []
        for a in args:
            if isinstance(a, Tensor) and a.device != device:
                a = self._note(aten._to_copy.default, (a,), {"device": device})
            moved.append(a)
        return tuple(moved)

    def _dropout(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Dropout in one op, written down as what was drawn and a product with it.

        What is drawn belongs to the samples and has to be kept, or permuted with them; a derivative of the fused op
        would draw anew.
        """
        x, *more = args
        ones = self._note(aten.ones_like.default, (x,), {})
        kept, mask = self._note(func, (ones, *more), kwargs)
        return self._note(aten.mul.Tensor, (x, kept), {}), mask

    def _note(self, func: Any, args: Any, kwargs: Any) -> Any:
        refs, named = tree_map(
            lambda a: self.ref(a) if isinstance(a, Tensor) else a, (args, kwargs)
        )
        if (
            func is aten.lift_fresh.default and refs[0].index in self.foreign
        ):  # numpy may write to this memory again
            self.graph.values[refs[0].index].concrete = args[0].detach().clone()
        writes = list({id(t): t for t in mutated(func, args, kwargs)}.values())
        olds = [self.ref(t) for t in writes]
        try:
            out = func(*args, **kwargs)
        except Exception:
            self._read(args, kwargs, "whether an op raises")
            raise
        told = f"the result of {ops.full_name(func)}"
        if isinstance(
            out, bool
        ):  # an op that answers a question (torch.equal), which is a value like others
            if ops.full_name(func) in READS_LENGTHS:
                self._read(argued(func, args, kwargs), {}, told)
                return out
            answer = torch.tensor(out)
            self._step(func, refs, named, answer, writes, olds)
            return self.branch(answer, told, out)
        if any(not isinstance(o, Tensor) and o is not None for o in flat(out)):
            self._read(argued(func, args, kwargs), {}, told)
        self._step(func, refs, named, out, writes, olds)
        return out

    def _read(self, args: Any, kwargs: Any, how: str) -> None:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.escape(tensor, how)

    def escape(self, tensor: Tensor, how: str, answer: bool | None = None) -> None:
        if not self.off and not self.checks:
            module = self.modules[-1] if self.modules else ""
            self.graph.escapes.append(
                HostRead(
                    self.ref(tensor),
                    how,
                    len(self.graph.steps),
                    module,
                    self._where(),
                    answer,
                    self.in_loss,
                )
            )

    def branch(self, tensor: Tensor, how: str, value: Any) -> Any:
        """A value read by Python; to booleans other answers may be given, to see what the other branch does."""
        if self.off or self.checks:
            return value
        if tensor.dtype != torch.bool:
            self.escape(tensor, how)
            return value
        answer = self.answers[self.asked] if self.asked < len(self.answers) else bool(value)
        self.asked += 1
        self.escape(tensor, how, answer)
        return answer

    def shape_read(self, tensor: Any) -> None:
        ref = self.find(tensor)
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
                tuple(
                    r
                    for t in tree_leaves(x)
                    if isinstance(t, Tensor) and (r := self.find(t)) is not None
                )
                for x in (inputs, output)
            ]
            self.graph.calls.append(
                ModuleCall(self.modules.pop(), starts.pop(), len(self.graph.steps), *refs)
            )

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", ".*when there are global hooks on modules"
                )  # of compiled ones
                yield
        finally:
            before.remove()
            after.remove()


def users_line() -> str:
    """File and line of the innermost frame that belongs to neither PyTorch nor this package, inside a recording."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in ENTRIES:
            return ""
        file = frame.f_code.co_filename
        if (not file.startswith(LIBRARY) and not file.startswith("<frozen")) or file == USER:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def entry(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that starts a recording, where the search for the user's line ends."""
    ENTRIES.add(function.__code__)
    return function


def _sizes_itself(op: Any, args: Any, graph: Graph) -> bool:
    """The shape of the result depends on values."""
    if torch.Tag.dynamic_output_shape in op.tags:
        if ops.full_name(op) not in ("index", "repeat_interleave"):
            return True
        return any(
            graph.values[r.index].dtype in (torch.bool, torch.uint8)
            for r in tree_leaves(args[1:], is_leaf=is_ref)
            if isinstance(r, Ref)
        )
    return False


def _geometry(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), tuple(t.stride()), t.storage_offset(), t.dtype


def _concrete(tensor: Tensor, noise: bool) -> Tensor | None:
    exact = (
        not tensor.is_floating_point() and not tensor.is_complex() and tensor.device.type != "meta"
    )
    return tensor.detach().clone() if noise or exact else None
