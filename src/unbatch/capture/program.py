"""From a model, a loss and a batch to a recorded computation.

The recorder runs the model once, eagerly, and writes down every ATen op with the module and the source line it came
from, together with what leaves the tensor world. Nothing here knows about samples.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from unbatch.capture.graph import Graph, HostRead, Ref
from unbatch.capture.isolation import storage_of, untouched
from unbatch.capture.python_values import Functions
from unbatch.capture.sample_axes import SampleAxes
from unbatch.capture.tracer import Recorder, entry
from unbatch.capture.wrappers import inside, plainly

# --- the recorder ---------------------------------------------------------------------------------
# --- the entry ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """What there is to run: a model, a loss, and the parameters and modules they come with."""

    model: Callable[..., Any]
    loss: Callable[..., Any] | None
    parameters: Mapping[str, Tensor]
    functional: bool = False  # the model is called as model(parameters, inputs)
    fold: SampleAxes | None = None  # where samples lie along several axes

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
        own = {n: p.clone() for n, p in model.named_parameters()} | {
            n: b.clone() for n, b in model.named_buffers()
        }

        def run(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, own, args, kwargs)

        return replace(self, model=run)

    def predict(self, inputs: Any) -> Any:
        if self.fold is None:
            return self._called(inputs)
        output = self._called(self.fold.unfolded(inputs, self.fold.inputs))
        return (
            output if self.loss is None else self.fold.returned(output)
        )  # a loss of its own is cut further up

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
                error.add_note(
                    f"It was the loss, called with predictions {shown(output)} and y {shown(targets)}."
                )
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
    yield from (
        ("buffers", name, b) for module in program.modules for name, b in module.named_buffers()
    )


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


def _newborn(graph: Graph, again: Graph) -> list[HostRead]:
    """Constants that another run meets in another memory: they were made during the run, out of sight."""
    out = []
    for i, j in zip(graph.foreign, again.foreign, strict=False):
        first, second = graph.values[i].concrete, again.values[j].concrete
        if first is not None and second is not None and storage_of(first) != storage_of(second):
            user = next((s for s in graph.steps if any(r.index == i for r in s.refs())), None)
            module, where = (user.module, user.where) if user else ("", "")
            in_loss = user is not None and user.index in graph.after_cut
            out.append(
                HostRead(
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


def _run(
    recorder: Recorder, program: Program, inputs: Any, targets: Any, follow: bool
) -> tuple[Graph, Any]:
    graph = recorder.graph
    with untouched(program.modules) as state, torch.enable_grad(), recorder.tracked():
        graph.rng = state
        inputs, targets = tree_map(_alias, (inputs, targets))
        declare = recorder.declare
        graph.inputs = [
            declare(x, "inputs", str(i)) if _is_tensor(x) else None
            for i, x in enumerate(tree_leaves(inputs))
        ]
        graph.targets = [
            declare(y, "targets", str(i)) if _is_tensor(y) else None
            for i, y in enumerate(tree_leaves(targets))
        ]
        for kind, name, tensor in outside(program):
            declare(tensor, kind, name)
        with recorder, Functions(recorder, follow):
            output = program.predict(inputs)
            graph.model_steps, recorder.in_loss = len(graph.steps), True
            with recorder.paused():
                scalar = None
                leaves = [t for t in tree_leaves(output) if _is_tensor(t)]
                graph.predictions = (
                    [recorder.ref(t) for t in leaves] if program.loss is not None else []
                )
            if program.loss is not None:
                scalar = program.evaluate(output, targets)
        if program.loss is not None:
            graph.loss = recorder.ref(scalar) if isinstance(scalar, Tensor) else None
            graph.after_cut = frozenset(range(graph.model_steps, len(graph.steps)))
        else:
            own = own_loss(output)
            graph.predictions = [recorder.ref(t) for t in leaves if t is not own]
            graph.loss, graph.own_loss = (
                recorder.ref(own) if own is not None else None,
                own is not None,
            )
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
