"""The recorder: a dispatch mode that writes each op of a running program into a graph.

What Python reads of tensor values is followed or noted here (see ``python_values.py``, too). Which
program is recorded, from which data, is the business of ``program.py``.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unbatch.capture import ops
from unbatch.capture.catching import errors_are_caught
from unbatch.capture.device_ops import (
    composed,
    decisive_arguments,
    decisive_for_errors,
    is_composed,
    without_packed_weights,
)
from unbatch.capture.distributed import check_alone
from unbatch.capture.foreach import parts_of
from unbatch.capture.graph import SIZE_READ, Graph, HostRead, ModuleCall
from unbatch.capture.hooks import place_of
from unbatch.capture.isolation import SKIPS_COMPILER, mutated, storage_of
from unbatch.capture.steps import Ref, Step, Value, filled, indices, is_ref
from unbatch.capture.substitutes import laid_out
from unbatch.capture.trees import flat, is_plain, is_strided, tensors_in
from unbatch.errors import HERE, MSG_COMPOSITION, MSG_NESTED_INSIDE, CaptureError

aten = torch.ops.aten

P = ParamSpec("P")

T = TypeVar("T")

LIBRARY = (os.path.dirname(torch.__file__) + os.sep, HERE)

# No user's frames.
INTERNAL = (*LIBRARY, "<frozen")

# Reads as a user's program does.
USER = os.path.join(HERE, "cli", "demo.py")

# Code of the functions that start a recording: no user's frame of the recording lies above them.
ENTRIES: set[CodeType] = set()

# The tensor gets another memory.
MOVES_MEMORY = frozenset([aten.set_.source_Storage, aten.set_.source_Storage_storage_offset])

# Tagged as having a shape that depends on values, which it does only if they say so by their type.
SIZED_BY_MASKS = ("index", "repeat_interleave")

# Of ops so tagged, the argument whose values say how large the result is; of others all of them.
SIZING_ARGUMENT = {"index": "indices", "masked_select": "mask", "repeat_interleave": "repeats"}

# Their argument that says how large the result is, as no tag says: by its numbers.
SIZED_BY = {"_pack_padded_sequence": "lengths", "_pad_packed_sequence": "batch_sizes"}

# Of one time step of a recurrence, about.
OPS_OF_A_CELL = 16

# Of a tensor that Python reads so many entries are kept.
MOST_KEPT = 4096

# How many entries they keep depends on values, as no tag says.
SPARSE = (
    "_to_sparse",
    "_to_sparse_csr",
    "_to_sparse_csc",
    "_to_sparse_bsr",
    "_to_sparse_bsc",
    "_coalesce",
    "_sparse_sparse_matmul",
)


class Recorder(TorchDispatchMode):
    """Writes every op into a ``Graph``. Use inside ``untouched``.

    ``names``: the modules of the program, ``id(module)`` -> path. ``answers``: given in place of
    the first booleans that Python reads, to see what the other path does.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPS_COMPILER

    def __init__(self, names: Mapping[int, str], answers: Sequence[bool] = ()) -> None:
        super().__init__()
        self.graph = Graph()
        self.names = names
        self.answers, self.booleans_read = answers, 0
        self.in_loss = False
        # The modules that are running, the innermost last.
        self.modules: list[str] = []
        # Tensor -> value, by id, which another tensor may come to have later.
        self.refs: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}
        # Memories get numbers by address, which PyTorch may give again once a memory is gone: weak
        # references keep the addresses from that, and not what is in the memory from being freed.
        self.storages: dict[int, int] = {}
        self.addresses: list[Any] = []
        # The newest value in each memory, with its geometry.
        self.latest: dict[int, tuple[tuple[Any, ...], Ref]] = {}
        # Above zero: nothing is recorded (``off``), or a function only validates (``checks``).
        self.off = 0
        self.checks = 0
        # Inside an op of a GPU, which is recorded as the plain ops that it is the same as.
        self.inside_fused_op = False
        self.function = ""
        # Tensors that came up in the middle of the run, and values whose shape depends on others.
        self.foreign: list[int] = []
        # What the model hooked into backward passes.
        self.hooks: list[str] = []
        self.dynamic: set[int] = set()

    # -- values --

    def declare(self, tensor: Tensor, kind: str, name: str) -> Ref:
        """Enter a tensor that no step makes, and return its value."""
        return self._add(tensor, kind=kind, name=name, concrete=tensor.detach())

    def _made(self, tensor: Tensor, step: int, noise: bool) -> Ref:
        """Enter what a step makes, with its numbers if they are noise or exact.

        Integers are labels, masks and indices: which samples depend on each other depends on them.
        """
        concrete = None
        if noise or _is_exact(tensor):
            concrete = tensor.detach().clone()
        return self._add(tensor, step=step, concrete=concrete)

    def _add(self, tensor: Tensor, **extra: Any) -> Ref:
        """Enter a tensor as the newest value in its memory."""
        number = self.storages.setdefault(storage_of(tensor), len(self.storages))
        shape, stride, offset, dtype = geometry = _geometry(tensor)
        grad = tensor.requires_grad
        value = Value(shape, dtype, number, stride, offset, requires_grad=grad, **extra)
        ref = Ref(len(self.graph.values))
        self.graph.values.append(value)
        self.refs[id(tensor)] = weakref.ref(tensor), ref
        self.latest[number] = geometry, ref
        if is_strided(tensor):
            self.addresses.append(StorageWeakRef(tensor.untyped_storage()))
        else:
            self.addresses.append(tensor)
        return ref

    def find(self, tensor: Any) -> Ref | None:
        """Return the value of this very tensor, if it has one."""
        same, ref = self.refs.get(id(tensor), (None, None))
        if same is None or same() is not tensor:
            return None
        return ref

    def ref(self, tensor: Tensor) -> Ref:
        """Return the value of a tensor.

        One that was never seen is a view of a memory that was, made by a function that does not
        dispatch (``x.data``), or else a constant.
        """
        ref = self.find(tensor)
        if ref is not None and self._is_current(tensor, self.graph.values[ref.index]):
            return ref
        view = self._view_of_known_memory(tensor)
        if view is not None:
            return view
        self.foreign.append(len(self.graph.values))
        return self.declare(tensor, "constants", "")

    def _is_current(self, tensor: Tensor, value: Value) -> bool:
        """Tell whether a tensor still is what it was: ``x.data = y`` gives it another memory."""
        if tensor.layout != torch.strided:
            return True
        here = self.storages.get(storage_of(tensor)), *_window(tensor)
        return here == (value.storage, value.shape, value.stride, value.offset)

    def _view_of_known_memory(self, tensor: Tensor) -> Ref | None:
        """Enter a tensor as a view of the newest value in its memory; None if there is none."""
        if tensor.layout != torch.strided or storage_of(tensor) not in self.storages:
            return None
        geometry, base = self.latest[self.storages[storage_of(tensor)]]
        # Without a derivative, as nothing dispatched: that is what ``x.data`` means.
        if geometry == _geometry(tensor):
            return self._step(aten.detach.default, (base,), {}, tensor)
        # Strides count entries, so that other types have no window on it.
        if self.graph.values[base.index].dtype != tensor.dtype:
            return None
        args = (base, list(tensor.shape), list(tensor.stride()), tensor.storage_offset())
        return self._step(aten.as_strided.default, args, {}, tensor)

    # -- steps --

    def _step(
        self,
        op: Any,
        args: Any,
        kwargs: Any,
        out: Any,
        writes: Sequence[Tensor] = (),
        olds: Sequence[Ref] = (),
    ) -> Any:
        """Enter a step, and return its first result.

        ``out``: what it returned; ``writes``: the tensors that it wrote to, which were the values
        ``olds`` before.
        """
        index = len(self.graph.steps)
        # An op with dropout that drops nothing is the same each time.
        noise = ops.draws(op) and ops.drops(op, args, kwargs)
        news = {id(tensor): self._made(tensor, index, noise) for tensor in writes}
        outs: list[Ref | None] = []
        for result in flat(out):
            if not isinstance(result, Tensor):
                outs.append(None)
            elif id(result) in news:
                outs.append(news[id(result)])
            else:
                outs.append(self._made(result, index, noise))
        step = Step(
            index,
            op,
            args,
            kwargs,
            outs=tuple(outs),
            writes=tuple(zip(olds, news.values(), strict=True)),
            grad=torch.is_grad_enabled(),
            module=self._module(),
            where=users_line(),
            noise=noise,
            function=self.function,
            ops=self._ops_of(op, args, kwargs),
        )
        self.graph.steps.append(step)
        if sizes_itself(op, args, self.graph) or self._reads_dynamic(step):
            self.dynamic.update(indices(step.made()))
        return outs[0] if outs else None

    def _ops_of(self, op: Any, args: Any, kwargs: Any) -> int:
        """Return how many ops PyTorch may run for a step."""
        time = ops.traits(op).time
        if not time:
            return 1
        arguments = ops.by_argument(op, args, kwargs)
        steps = len(arguments["sizes"]) or self.graph.values[arguments[time].index].shape[0]
        return OPS_OF_A_CELL * steps

    def _reads_dynamic(self, step: Step) -> bool:
        return not self.dynamic.isdisjoint(indices(step.refs()))

    def _module(self) -> str:
        """Return the innermost module that is running."""
        return self.modules[-1] if self.modules else ""

    def _place(self) -> str:
        """Return module, file and line as a phrase that ends a sentence."""
        place = ""
        if self._module():
            place += f" in {self._module()}"
        where = users_line()
        if where:
            place += f" at {where}"
        return place

    # -- while the program runs --

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.off:
            return func(*args, **kwargs)
        check_alone(func, types, self._place)
        # What ``bool(x)``, ``int(x)`` and ``float(x)`` come down to.
        if func is aten._local_scalar_dense.default:
            how = "read by Python (bool(), int(), float() or if)"
            return self.branch(args[0], how, func(*args, **kwargs))
        # What is called in here (``detach``, ``clone``) is no call of the program's own.
        with torch._C.DisableTorchFunction():
            return self._observe(func, args, kwargs)

    def _observe(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in MOVES_MEMORY:
            return func(*args, **kwargs)  # ``ref`` sees that the tensor lies elsewhere
        if ops.is_dropout(func) and ops.drops(func, args, kwargs):
            return self._note_dropout(func, args, kwargs)
        if is_composed(func):
            out = self._note_composed(func, args, kwargs)
            if out is not NotImplemented:
                return out
        # Below autograd, where PyTorch takes nothing apart by itself.
        if self.inside_fused_op and ops.is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        parts = parts_of(func, args, kwargs)
        if parts is not None:
            results = [self._note(*part) for part in parts]
            return results if func._schema.returns else None
        return self._note(func, without_packed_weights(func, args), kwargs)

    def _note(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op, enter it, and return its result."""
        refs, named = filled((args, kwargs), self.ref, Tensor)
        if func is aten.lift_fresh.default and refs[0].index in self.foreign:
            self._copy_constant(refs[0], args[0])
        # Before it runs: afterwards they are other versions. Each once, however often it is given.
        writes = list({id(t): t for t in mutated(func, args, kwargs)}.values())
        olds = [self.ref(t) for t in writes]
        self._note_chance_of_error(func, args, kwargs)
        self._note_sizing(func, args, kwargs)
        try:
            out = func(*args, **kwargs)
        except Exception:  # which a ``try`` of the program may turn into another path
            self._read(args, kwargs, "whether an op raises")
            raise
        how = f"the result of {ops.full_name(func)}"
        if isinstance(out, bool) and ops.traits(func).answers_from is None:
            # An op that answers a question (``torch.equal``): its result is a value like others.
            answer = torch.tensor(out)
            self._step(func, refs, named, answer, writes, olds)
            return self.branch(answer, how, out)
        if _holds_numbers(out):
            self._read(decisive_arguments(func, args, kwargs), {}, how)
        if not isinstance(out, bool):
            self._step(func, refs, named, out, writes, olds)
        return out

    def _note_sizing(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what an op takes the size of its result from, where no tag says that it does."""
        name = ops.full_name(func)
        if name in SIZED_BY:
            self.sizing(ops.by_argument(func, args, kwargs)[SIZED_BY[name]], f"sizes of {name}")

    def _note_chance_of_error(self, func: Any, args: Any, kwargs: Any) -> None:
        """Note what decides whether an op raises, where the program would catch that and go on."""
        tensors = decisive_for_errors(func, args, kwargs)
        # Sizes have to fit each other, in any op.
        if (tensors or self.dynamic) and self.catches():
            self._read(tensors, {}, "whether an op raises")
            for tensor in tensors_in((args, kwargs)):
                self.shape_read(tensor)

    def catches(self) -> bool:
        """Tell whether the program would catch an error and go on."""
        return errors_are_caught(_is_users, ENTRIES)

    def _copy_constant(self, ref: Ref, tensor: Tensor) -> None:
        """Keep a copy of the numbers: the memory is numpy's, which may write to it again."""
        value = self.graph.values[ref.index]
        self.graph.values[ref.index] = replace(value, concrete=tensor.detach().clone())

    def _note_composed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op of a GPU, and enter the plain ops that it is the same as.

        Returns their results. Where they have none it is the op's own, which counts as made out of
        sight, and as read by Python if it is a number.
        """
        with self._inside_fused_op():
            plain = composed(func, args, kwargs)
            if plain is NotImplemented:
                return plain
            with self.paused():
                out = func(*args, **kwargs)
            own, plain = flat(out), flat(plain)
            results = self._in_place_of(own, plain, tensors_in((args, kwargs)))
        plain += [None] * (len(own) - len(plain))
        left_out = [result for result, ours in zip(own, plain, strict=True) if ours is None]
        if _holds_numbers(left_out):
            how = f"the result of {ops.full_name(func)}"
            self._read(decisive_arguments(func, args, kwargs), {}, how)
        return results[0] if isinstance(out, Tensor) else tuple(results)

    def _in_place_of(
        self, own: Sequence[Any], plain: Sequence[Any], operands: Sequence[Tensor]
    ) -> list[Any]:
        """Return plain results, each in a memory of its own, as the op would lay it out."""
        results = list(own)
        memories = {storage_of(t) for t in operands}
        for i, result in enumerate(plain):
            if isinstance(result, Tensor):
                if result.shape != own[i].shape:
                    shapes = {"ours": list(result.shape), "own": list(own[i].shape)}
                    raise ValueError(MSG_COMPOSITION.format(**shapes))
                if storage_of(result) in memories:
                    result = result.clone()
                memories.add(storage_of(result))
                results[i] = laid_out(result.to(own[i].dtype), own[i].stride())
            elif result is not None:
                results[i] = result
        return results

    @contextmanager
    def _inside_fused_op(self) -> Iterator[None]:
        """Record what runs inside, taken apart."""
        before, self.inside_fused_op = self.inside_fused_op, True
        try:
            with self:
                yield
        finally:
            self.inside_fused_op = before

    def _note_dropout(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run dropout in one op, and enter it as what was drawn and a product with it.

        What is drawn belongs to the samples and has to be kept, or permuted with them; a derivative
        of the fused op would draw anew.
        """
        x, *more = args
        ones = self._note(aten.ones_like.default, (x,), {})
        scaled_mask, mask = self._note(func, (ones, *more), kwargs)
        return self._note(aten.mul.Tensor, (x, scaled_mask), {}), mask

    # -- what Python reads --

    def _read(self, args: Any, kwargs: Any, how: str) -> None:
        for tensor in tensors_in((args, kwargs)):
            self.escape(tensor, how)

    @property
    def reads(self) -> int:
        """How often Python has read a value."""
        return len(self.graph.host_reads)

    def escape(self, tensor: Tensor, how: str, answer: bool | None = None) -> None:
        """Note that Python read a value in a way that cannot be followed."""
        if self.off or self.checks:
            return
        self.graph.host_reads.append(self._read_of(tensor, how, answer))

    def sizing(self, tensor: Tensor, how: str) -> None:
        """Note that an op takes sizes from the numbers of a tensor, and nothing else."""
        if not self.off:
            self.graph.sizings.append(self._read_of(tensor, how))

    def _read_of(self, tensor: Tensor, how: str, answer: bool | None = None) -> HostRead:
        # Also called outside of the dispatcher, where entering a tensor would be recorded.
        with self.paused():
            ref, seen = self.ref(tensor), _kept(tensor)
        step, module, where = len(self.graph.steps), self._module(), users_line()
        return HostRead(ref, how, step, module, where, answer, self.in_loss, seen=seen)

    def branch(self, tensor: Tensor, how: str, value: Any) -> Any:
        """Note that Python read ``value`` of a tensor, and return what to give it.

        That is the value, except for booleans while there are other ``answers``.
        """
        if self.off or self.checks:
            return value
        if tensor.dtype != torch.bool:
            self.escape(tensor, how)
            return value
        answer = bool(value)
        if self.booleans_read < len(self.answers):
            answer = self.answers[self.booleans_read]
        self.booleans_read += 1
        self.escape(tensor, how, answer)
        return answer

    def depends_on_data(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is made of data or parameters, and not of constants alone."""
        ref = self.find(tensor)
        if ref is None:
            return False
        queue, visited = [ref.index], set[int]()
        while queue:
            index = queue.pop()
            value = self.graph.values[index]
            if value.kind in ("inputs", "targets", "parameters") or index in self.dynamic:
                return True
            if index in visited or value.kind != "step":
                continue
            visited.add(index)
            step = self.graph.steps[value.step]
            read = step.refs()
            # How many sequences run at each step follows from their lengths alone.
            if step.name == "_pack_padded_sequence":
                read = [step.named["lengths"]]
            queue += indices(read)
        return False

    def shape_read(self, tensor: Any) -> None:
        """Note that Python read the size of a tensor, if that depends on data."""
        ref = self.find(tensor)
        if ref is not None and ref.index in self.dynamic:
            self.escape(tensor, SIZE_READ)

    def hooked(self, hook: Any) -> None:
        """Note that the model or the loss has hooked into backward passes."""
        if self.in_loss:
            self.graph.hooks_loss = True
        else:
            self.hooks.append(place_of(hook, users_line()))

    # -- around the run --

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside."""
        self.off += 1
        try:
            yield
        finally:
            self.off -= 1

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """Keep track of the modules that run inside."""
        starts: list[int] = []

        def enter(module: nn.Module, _: Any) -> None:
            self.modules.append(self.names.get(id(module), type(module).__name__))
            starts.append(len(self.graph.steps))

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            name, start, stop = self.modules.pop(), starts.pop(), len(self.graph.steps)
            call = ModuleCall(name, start, stop, self._recorded(inputs), self._recorded(output))
            self.graph.calls.append(call)

        # Global hooks: those of a module would be seen by whoever looks at it.
        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        try:
            with warnings.catch_warnings():
                # Compiled modules warn of hooks like these.
                warnings.filterwarnings("ignore", ".*when there are global hooks on modules")
                yield
        finally:
            before.remove()
            after.remove()

    def _recorded(self, tree: Any) -> tuple[Ref, ...]:
        """Return the values of those tensors of a tree that have one."""
        refs = []
        for tensor in tensors_in(tree):
            ref = self.find(tensor)
            if ref is not None:
                refs.append(ref)
        return tuple(refs)


def users_line() -> str:
    """Return file and line of the innermost frame that is neither PyTorch's nor this package's.

    Above a function that starts a recording nobody looks: "" if there is none below.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in ENTRIES:
            return ""
        if _is_users(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _is_users(frame: FrameType) -> bool:
    """Tell whether a function that is running is neither PyTorch's nor this package's."""
    file = frame.f_code.co_filename
    return file == USER or not file.startswith(INTERNAL)


def entry(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that starts a recording, where the search for the user's line ends."""
    ENTRIES.add(function.__code__)
    return function


def sizes_itself(op: Any, args: Any, graph: Graph) -> bool:
    """Tell whether the shape of an op's result depends on values."""
    if ops.full_name(op) in SPARSE:
        return True
    if torch.Tag.dynamic_output_shape not in op.tags:
        return False
    if ops.full_name(op) not in SIZED_BY_MASKS:
        return True
    for ref in tree_leaves(args[1:], is_leaf=is_ref):
        if isinstance(ref, Ref) and graph.values[ref.index].dtype in (torch.bool, torch.uint8):
            return True
    return False


def _holds_numbers(out: Any) -> bool:
    """Tell whether anything but tensors is among the results of an op."""
    return any(r is not None and not isinstance(r, Tensor) for r in flat(out))


def _window(t: Tensor) -> tuple[Any, ...]:
    """Return shape, strides and offset of a tensor."""
    return tuple(t.shape), tuple(t.stride()), int(t.storage_offset())


def _geometry(t: Tensor) -> tuple[Any, ...]:
    """Return which entries of its memory a tensor shows, and their type; no window if sparse."""
    if t.is_nested and t.layout == torch.strided:
        raise CaptureError(MSG_NESTED_INSIDE)
    if not is_strided(t):
        return tuple(t.shape), (), 0, t.dtype
    return *_window(t), t.dtype


def _kept(tensor: Tensor) -> Tensor | None:
    """Return a copy of a tensor, to compare it with what is read later.

    None of a large one, and of one whose memory has been freed.
    """
    if not is_plain(tensor) or tensor.device.type == "meta" or tensor.numel() > MOST_KEPT:
        return None
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return None
    return tensor.detach().clone()


def _is_exact(tensor: Tensor) -> bool:
    """Tell whether a tensor holds integers or booleans."""
    if tensor.is_floating_point() or tensor.is_complex():
        return False
    return tensor.device.type != "meta"
