"""From a model, a loss and a batch to a recorded computation.

The recorder runs the model once, eagerly, and writes down every ATen op with the module and the source line it came
from, together with what leaves the tensor world. Nothing here knows about samples.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from unbatch import ops
from unbatch.device_ops import FUSED_DROPOUT, READS_LENGTHS, argued, drops, same_as, without_buffer
from unbatch.errors import HERE
from unbatch.folds import Fold
from unbatch.graph import Escape, Graph, ModuleCall, Ref, Step, Value, flat, is_ref
from unbatch.processes import check_alone
from unbatch.purity import SKIPS_COMPILER, mutated, storage_of, untouched
from unbatch.scalars import Functions
from unbatch.unwrapped import inside, plainly

aten = torch.ops.aten

P = ParamSpec("P")
T = TypeVar("T")
LIBRARY = (os.path.dirname(torch.__file__) + os.sep, HERE)
USER = os.path.join(HERE, "demo.py")  # reads as a user's program does
ENTRIES: set[CodeType] = set()  # code of the functions that start a recording: no user's frame lies above them


# The tensor gets another memory.
MOVES_MEMORY = frozenset([aten.set_.source_Storage, aten.set_.source_Storage_storage_offset])


# --- the recorder ---------------------------------------------------------------------------------


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
        self.known: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}  # by id, which another tensor may come to have
        self.storages: dict[int, int] = {}
        self.kept: list[Any] = []  # keeps the names of storages from being given again, and not what is in them
        self.latest: dict[int, tuple[tuple[Any, ...], Ref]] = {}  # the newest value in a memory: its geometry
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
            return self.branch(args[0], "read by Python (bool(), int(), float() or if)", func(*args, **kwargs))
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
        refs, named = tree_map(lambda a: self.ref(a) if isinstance(a, Tensor) else a, (args, kwargs))
        if func is aten.lift_fresh.default and refs[0].index in self.foreign:  # numpy may write to this memory again
            self.graph.values[refs[0].index].concrete = args[0].detach().clone()
        writes = list({id(t): t for t in mutated(func, args, kwargs)}.values())
        olds = [self.ref(t) for t in writes]
        try:
            out = func(*args, **kwargs)
        except Exception:
            self._read(args, kwargs, "whether an op raises")
            raise
        told = f"the result of {ops.full_name(func)}"
        if isinstance(out, bool):  # an op that answers a question (torch.equal), which is a value like others
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
                Escape(self.ref(tensor), how, len(self.graph.steps), module, self._where(), answer, self.in_loss)
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
                tuple(r for t in tree_leaves(x) if isinstance(t, Tensor) and (r := self.find(t)) is not None)
                for x in (inputs, output)
            ]
            self.graph.calls.append(ModuleCall(self.modules.pop(), starts.pop(), len(self.graph.steps), *refs))

        before = nn.modules.module.register_module_forward_pre_hook(enter)
        after = nn.modules.module.register_module_forward_hook(leave, always_call=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*when there are global hooks on modules")  # of compiled ones
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
    exact = not tensor.is_floating_point() and not tensor.is_complex() and tensor.device.type != "meta"
    return tensor.detach().clone() if noise or exact else None


# --- the entry ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What there is to run: a model, a loss, and the parameters and modules they come with."""

    model: Callable[..., Any]
    loss: Callable[..., Any] | None
    parameters: Mapping[str, Tensor]
    functional: bool = False  # the model is called as model(parameters, inputs)
    fold: Fold | None = None  # where samples lie along several axes

    @property
    def modules(self) -> list[nn.Module]:
        return [m for m in (self.inside, self.loss) if isinstance(m, nn.Module)]

    @property
    def inside(self) -> Callable[..., Any]:
        """The model without what is wrapped around it for training."""
        return inside(self.model)

    @property
    def names(self) -> tuple[str, str]:
        """What the model and the loss are called."""
        loss = "its own loss" if self.loss is None else name_of(self.loss)
        return name_of(self.model), loss

    @property
    def module_names(self) -> dict[int, str]:
        """The modules of model and loss: ``id(module)`` -> its path, or its class at the top."""
        names = {}
        for top in self.modules:
            for path, module in top.named_modules():
                names[id(module)] = path or type(module).__name__
        return names

    def in_double(self) -> Program:
        """The same program with a copy of its model in float64; what is no module stays as it is."""
        model = self.inside
        if not isinstance(model, nn.Module):
            return self
        return replace(self, model=copy.deepcopy(model).double())

    def on_copies(self) -> Program:
        """The same program on copies of its parameters (connected to them) and buffers.

        What the model writes to them then stays as it is until derivatives have been taken.
        """
        copies = {n: p.clone() for n, p in self.parameters.items()}
        model = self.inside
        if self.functional or not isinstance(model, nn.Module):
            return replace(self, parameters=copies)
        own = {n: p.clone() for n, p in model.named_parameters()} | {n: b.clone() for n, b in model.named_buffers()}

        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, own, args, kwargs)

        return replace(self, model=run)

    def predict(self, inputs: Any) -> Any:
        if self.fold is None:
            return self._called(inputs)
        output = self._called(self.fold.unfolded(inputs, self.fold.inputs))
        return output if self.loss is None else self.fold.returned(output)  # a loss of its own is cut further up

    def _called(self, inputs: Any) -> Any:
        with plainly():
            if self.functional:
                return self.model(dict(self.parameters), inputs)
            if isinstance(inputs, tuple):
                return self.inside(*inputs)
            if isinstance(inputs, Mapping):
                return self.inside(**inputs)
            return self.inside(inputs)

    def evaluate(self, output: Any, targets: Any) -> Any:
        """The loss at what the model returned."""
        assert self.loss is not None
        if self.fold is not None:
            output = self.fold.unfolded(output, self.fold.outputs)
            targets = self.fold.unfolded(targets, self.fold.targets)
        with plainly():
            try:
                return self.loss(output, targets) if targets is not None else self.loss(output)
            except Exception as error:
                error.add_note(f"It was the loss, called with predictions {shown(output)} and y {shown(targets)}.")
                raise


def name_of(called: Callable[..., Any]) -> str:
    """A function by its name, a module by its class, and a partial by what it is of."""
    if isinstance(called, functools.partial):
        return name_of(called.func)
    return str(getattr(called, "__name__", type(called).__name__))


def shown(tree: Any) -> str:
    """Tensors by type and shape: ``float32 [8, 3]``; anything else by its type."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {list(tree.shape)}"
    if isinstance(tree, list | tuple):
        return f"({', '.join(map(shown, tree))})"
    if isinstance(tree, Mapping):
        return f"{{{', '.join(f'{k}: {shown(v)}' for k, v in tree.items())}}}"
    return "None" if tree is None else type(tree).__name__


def outside(program: Program) -> Iterator[tuple[str, str, Tensor]]:
    """What a recording starts from beside the data, in its order: kind, name and tensor."""
    yield from (("parameters", name, p) for name, p in program.parameters.items())
    yield from (("buffers", name, b) for module in program.modules for name, b in module.named_buffers())


def moved(graph: Graph, program: Program, inputs: Any, targets: Any, rng: tuple[Any, ...]) -> Graph:
    """The recording on other data, and on the parameters and buffers of this moment."""
    data = [x.detach() for x in tree_leaves((inputs, targets)) if _is_tensor(x)]
    return graph.moved(dict(enumerate([*data, *(t for _, _, t in outside(program))])), rng)


@entry
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
        if first is not None and second is not None and storage_of(first) != storage_of(second):
            user = next((s for s in graph.steps if any(r.index == i for r in s.refs())), None)
            module, where = (user.module, user.where) if user else ("", "")
            in_loss = user is not None and user.index in graph.after_cut
            out.append(
                Escape(
                    Ref(i),
                    "a tensor made where it cannot be seen",
                    user.index if user else 0,
                    module,
                    where,
                    None,
                    in_loss,
                    True,
                )
            )
    return out


def _made_from_numbers(graph: Graph, value: int) -> bool:
    """``torch.tensor(2.0)``: what Python knew, it knew without looking at tensors, or there is an escape."""
    users = [s for s in graph.steps if any(r.index == value for r in s.refs())]
    return bool(users) and users[0].name in ("lift_fresh", "lift")


@entry
def record_answered(program: Program, inputs: Any, targets: Any, answers: Sequence[bool]) -> Graph:
    """A recording on which the first booleans that Python asks for are answered as given; as far as the program got."""
    recorder = Recorder(program.module_names, answers)
    try:
        return _run(recorder, program, inputs, targets, True)[0]
    except Exception as error:
        recorder.graph.stopped = error
        return recorder.graph


def _record(program: Program, inputs: Any, targets: Any, follow: bool) -> tuple[Graph, Any]:
    return _run(Recorder(program.module_names), program, inputs, targets, follow)


def _run(recorder: Recorder, program: Program, inputs: Any, targets: Any, follow: bool) -> tuple[Graph, Any]:
    graph = recorder.graph
    with untouched(program.modules) as state, torch.enable_grad(), recorder.tracked():
        graph.rng = state
        inputs, targets = tree_map(_alias, (inputs, targets))
        declare = recorder.declare
        graph.inputs = [
            declare(x, "inputs", str(i)) if _is_tensor(x) else None for i, x in enumerate(tree_leaves(inputs))
        ]
        graph.targets = [
            declare(y, "targets", str(i)) if _is_tensor(y) else None for i, y in enumerate(tree_leaves(targets))
        ]
        for kind, name, tensor in outside(program):
            declare(tensor, kind, name)
        with recorder, Functions(recorder, follow):
            output = program.predict(inputs)
            graph.model_steps, recorder.in_loss = len(graph.steps), True
            with recorder.paused():
                scalar = None
                leaves = [t for t in tree_leaves(output) if _is_tensor(t)]
                graph.predictions = [recorder.ref(t) for t in leaves] if program.loss is not None else []
            if program.loss is not None:
                scalar = program.evaluate(output, targets)
        if program.loss is not None:
            graph.loss = recorder.ref(scalar) if isinstance(scalar, Tensor) else None
            graph.after_cut = frozenset(range(graph.model_steps, len(graph.steps)))
        else:
            own = own_loss(output)
            graph.predictions = [recorder.ref(t) for t in leaves if t is not own]
            graph.loss, graph.own_loss = recorder.ref(own) if own is not None else None, own is not None
        graph.dynamic = frozenset(recorder.dynamic)
        graph.foreign = tuple(v for v in recorder.foreign if not _made_from_numbers(graph, v))
        output = (output, scalar)
    return graph, output


def own_loss(output: Any) -> Tensor | None:
    """The loss in the output of a model that computes its own: what is called so, the first or the only number."""
    if isinstance(output, Tensor):
        return output if output.numel() == 1 else None
    candidate = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if candidate is None and isinstance(output, tuple | list) and output:
        numbers = [t for t in output if _is_tensor(t) and t.numel() == 1]
        candidate = numbers[0] if len(numbers) == 1 else output[0]
    return candidate if isinstance(candidate, Tensor) and candidate.numel() == 1 else None


def _alias(x: Any) -> Any:
    return x.detach() if _is_tensor(x) else x


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)
