"""From a model, a loss and a batch to a recorded computation.

The program is run once, eagerly, under the recorder (``tracer.py``), and nothing is left changed
(``isolation.py``). Nothing here knows about samples.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves

from unbatch.capture.after_run import AfterRun
from unbatch.capture.code_names import is_installed, is_installed_class
from unbatch.capture.data import closed_in, handed_out, repacked, with_tracking
from unbatch.capture.effort import PLAIN_STEPS
from unbatch.capture.graph import Graph, HostRead
from unbatch.capture.isolation import storage_of, untouched
from unbatch.capture.opened import closed, opened
from unbatch.capture.python_values import Functions
from unbatch.capture.reachable import Reachable
from unbatch.capture.sample_axes import Fold
from unbatch.capture.steps import Ref, Step
from unbatch.capture.tracer import Recorder, entry
from unbatch.capture.trees import apart, tensors_in
from unbatch.capture.wrappers import inside, plainly


@dataclass(frozen=True)
class Program:
    """What there is to run: a model, a loss, and the parameters that they come with.

    ``functional``: the model is called as ``model(parameters, inputs)``. ``fold``: the axes of the
    samples if there are several. ``data``: the objects among the data that are no tensors.
    ``effort``: how many plain steps the experiments of a question may take. ``tracked``: what
    autograd knows of each tensor among the inputs.
    """

    model: Callable[..., Any]
    loss: Callable[..., Any] | None
    parameters: Mapping[str, Tensor]
    functional: bool = False
    fold: Fold | None = None
    data: Sequence[Any] = ()
    effort: float = PLAIN_STEPS
    tracked: Sequence[str] = ()
    # The last walks from here, by how many objects each began at: kept, as a look whether one is
    # still right costs less than another.
    _walks: dict[int, Reachable] = field(default_factory=dict, repr=False, compare=False)

    @property
    def modules(self) -> list[nn.Module]:
        """The model and the loss, as far as they are modules."""
        return [m for m in (self.inside, self.loss) if isinstance(m, nn.Module)]

    @property
    def inside(self) -> Callable[..., Any]:
        """The model without what is wrapped around it for training."""
        return inside(self.model)

    @property
    def loss_is_of_library(self) -> bool:
        """Whether no code of the loss is the user's."""
        if isinstance(self.loss, types.FunctionType):
            return is_installed(self.loss.__code__.co_filename)
        return isinstance(self.loss, nn.Module) and is_installed_class(type(self.loss))

    @property
    def reachable(self) -> Reachable:
        """What the program can reach at this moment."""
        return self._reached()

    def _reached(self, others: Sequence[nn.Module] = ()) -> Reachable:
        """Return what the program and others can reach at this moment."""
        roots: list[Any] = [self.inside, self.loss]
        if self.functional:
            roots += self.parameters.values()
        if self.data:
            roots.append(self.data)
        roots += others
        last = self._walks.get(len(roots))
        if last is None or not last.is_of(roots) or not last.is_current():
            last = self._walks[len(roots)] = Reachable(roots)
        return last

    def untouched(
        self,
        seed: tuple[Any, ...] | None = None,
        others: Sequence[nn.Module] = (),
        after: AfterRun | None = None,
    ) -> AbstractContextManager[tuple[Any, ...]]:
        """Return a context that leaves all as it was that the program can reach.

        ``seed``: the random state inside. ``others``: modules that it reaches in other ways.
        ``after``: what a run has left, for its backward passes; a new one for the run itself.
        """
        return untouched(self._reached(others), seed, after)

    @property
    def names(self) -> tuple[str, str]:
        """The names of the model and of the loss."""
        if self.loss is None:
            return name_of(self.model), "its own loss"
        return name_of(self.model), name_of(self.loss)

    @property
    def module_names(self) -> dict[int, str]:
        """The modules of model and loss: ``id(module)`` -> its path, or its class at the top."""
        names = {}
        for top in self.modules:
            for path, module in top.named_modules():
                names[id(module)] = path or type(module).__name__
        return names

    def in_double(self) -> Program:
        """Return the same program with a copy of its model in float64.

        What is no module stays as it is, also what modules have: objects may not be copied
        without a trace.
        """
        # Without what is wrapped around it, which runs this very model and no copy.
        model = self.inside
        if not isinstance(model, nn.Module):
            return self
        return replace(self, model=copy.deepcopy(model, _as_they_are(model)).double(), _walks={})

    def predict(self, inputs: Any) -> Any:
        """Return what the model returns on data of the user, with the samples along one axis."""
        return self.forward(handed_out(inputs))

    def forward(self, inputs: Any) -> Any:
        """Return the same on tensors that are our own: the model may change them."""
        inputs = with_tracking(repacked(inputs), self.tracked)
        if self.fold is not None:
            inputs = self.fold.unfolded(inputs, self.fold.inputs)
        output = self._called(inputs)
        if self.loss is None:
            # A loss of its own is cut further up, and folded there.
            return apart(output) if self.fold is None else output
        output = apart(opened(output))
        return output if self.fold is None else self.fold.returned(output)

    def _called(self, inputs: Any) -> Any:
        # A tuple holds positional arguments, a mapping those by name; all else is one argument,
        # packed sequences too, though they are a tuple.
        with plainly():
            if self.functional:
                return self.model(dict(self.parameters), inputs)
            if isinstance(inputs, tuple) and not isinstance(inputs, PackedSequence):
                return self.inside(*inputs)
            if isinstance(inputs, Mapping):
                return self.inside(**inputs)
            return self.inside(inputs)

    def evaluate(self, output: Any, targets: Any) -> Any:
        """Return the loss of what the model returned and of targets of the user."""
        return self.loss_at(output, handed_out(targets))

    def loss_of(self, output: Any, targets: Any) -> Any:
        """Return the loss of what the model returned: its own, or that of targets of the user."""
        if self.loss is None:
            return own_loss(output)
        return self.evaluate(output, targets)

    def loss_at(self, output: Any, targets: Any) -> Any:
        """Return the same for tensors that are our own: the loss may change them."""
        if self.loss is None:
            raise ValueError(f"{name_of(self.model)} computes its own loss: there is no other one")
        targets = repacked(targets)
        # The loss gets the axes that the model returned, and y as the user has it.
        if self.fold is not None:
            output = self.fold.unfolded(output, self.fold.outputs)
            targets = self.fold.unfolded(targets, self.fold.targets)
        output = closed(output)
        with plainly():
            try:
                if targets is None:
                    return self.loss(output)
                return self.loss(output, targets)
            except Exception as error:
                error.add_note(
                    f"It was the loss, called with predictions {shown(output)} "
                    f"and y {shown(targets)}."
                )
                raise


def _as_they_are(model: nn.Module) -> dict[int, Any]:
    """Return what a copy of a model shares with it: all but modules, tensors and containers."""
    shared: dict[int, Any] = {}
    seen: set[int] = set()
    parts: list[Any] = []
    for module in model.modules():
        parts.extend(vars(module).values())
    while parts:
        part = parts.pop()
        if id(part) in seen or isinstance(part, nn.Module | Tensor):
            continue
        seen.add(id(part))
        if type(part) in (dict, OrderedDict):
            parts.extend(part.values())
        elif type(part) in (list, tuple, set, deque):
            parts.extend(part)
        elif not isinstance(part, types.MethodType):
            shared[id(part)] = part  # a method is bound to the copy instead
    return shared


def name_of(called: Callable[..., Any]) -> str:
    """Return the name of a function (of a partial: of what it calls), or the class of a module."""
    if isinstance(called, functools.partial):
        return name_of(called.func)
    return str(getattr(called, "__name__", type(called).__name__))


def shown(tree: Any) -> str:
    """Return tensors by type and shape, ``float32 [8, 3]``, and anything else by its type."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')} {list(tree.shape)}"
    if isinstance(tree, list | tuple):
        return f"({', '.join(map(shown, tree))})"
    if isinstance(tree, Mapping):
        entries = [f"{name}: {shown(value)}" for name, value in tree.items()]
        return f"{{{', '.join(entries)}}}"
    if tree is None:
        return "None"
    return type(tree).__name__


# Kinds of values, and the order in which ``_run`` declares them: inputs, targets, then these.
def outside(program: Program) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what a recording starts from besides the data, in its order: kind, name and tensor."""
    for name, parameter in program.parameters.items():
        yield "parameters", name, parameter
    for module in program.modules:
        for name, buffer in module.named_buffers():
            yield "buffers", name, buffer


def moved(graph: Graph, program: Program, inputs: Any, targets: Any, rng: tuple[Any, ...]) -> Graph:
    """Return the recording on other data, and on the parameters and buffers of this moment."""
    tensors = tensors_in((inputs, targets))
    for _, _, tensor in outside(program):
        tensors.append(tensor)
    # The first values of a graph are data, parameters and buffers, in the order of ``_run``.
    return graph.moved(dict(enumerate(tensors)), rng)


# --- recording ------------------------------------------------------------------------------------


@entry
def record(program: Program, inputs: Any, targets: Any) -> tuple[Graph, Any]:
    """Run the program once, recording it.

    Returns the graph, and a pair: what the model returned, and the loss (None if it is its own).
    """
    follow = True
    try:
        graph, output = _record(program, inputs, targets, follow)
    except Exception:
        # A number that is followed may be none to the program (``isinstance``, say): once more,
        # with the numbers as they are. Errors of the program's own come again.
        follow = False
        graph, output = _record(program, inputs, targets, follow)
    # A second run tells tensors that the program keeps from those that it makes out of sight.
    if graph.foreign:
        again, _ = _record(program, inputs, targets, follow)
        graph.host_reads += _made_out_of_sight(graph, again)
    return graph, output


@entry
def record_answered(program: Program, inputs: Any, targets: Any, answers: Sequence[bool]) -> Graph:
    """Record with ``answers`` to the first booleans that Python reads, whatever they are.

    If the program raises, the recording ends there, and ``stopped`` has the error.
    """
    recorder = Recorder(program.module_names, answers)
    try:
        graph, _ = _run(recorder, program, inputs, targets, follow=True)
    except Exception as error:
        recorder.graph.stopped = error
        return recorder.graph
    return graph


def _record(program: Program, inputs: Any, targets: Any, follow: bool) -> tuple[Graph, Any]:
    return _run(Recorder(program.module_names), program, inputs, targets, follow)


def _run(
    recorder: Recorder, program: Program, inputs: Any, targets: Any, follow: bool
) -> tuple[Graph, Any]:
    graph = recorder.graph
    loss = None
    with program.untouched() as state, torch.enable_grad(), recorder.tracked():
        graph.rng = state
        # What the program does to containers and tensors themselves ends with the recording.
        inputs, targets = handed_out((inputs, targets))
        inputs = with_tracking(inputs, program.tracked)
        graph.inputs = _declared(recorder, inputs, "inputs")
        graph.targets = _declared(recorder, targets, "targets")
        for kind, name, tensor in outside(program):
            recorder.declare(tensor, kind, name)
        # The function mode sees calls of Python, and the recorder the ops that they dispatch.
        with recorder, Functions(recorder, follow):
            output = program.forward(inputs)
            if program.loss is not None:
                # Before the loss runs, which may write to what the model returned. A tensor that
                # was given another memory (``x.data = y``) enters as a step, which is the model's.
                with recorder.paused():
                    graph.predictions = _refs(recorder, output, None)
                graph.closed = closed_in(output)
            graph.model_steps, recorder.in_loss = len(graph.steps), True
            if program.loss is not None:
                loss = program.loss_at(output, targets)
        # Where a loss of the model's own begins, the analysis finds (``loss_boundary.py``).
        if program.loss is None:
            own = own_loss(output)
            graph.predictions = _refs(recorder, output, own)
            graph.own_loss = own is not None
            graph.loss = _ref(recorder, own)
        else:
            graph.loss = _ref(recorder, loss)
            graph.after_cut = frozenset(range(graph.model_steps, len(graph.steps)))
        graph.dynamic = frozenset(recorder.dynamic)
        graph.foreign = tuple(v for v in recorder.foreign if not _made_from_numbers(graph, v))
    graph.hooks = tuple(dict.fromkeys(recorder.hooks))
    graph.keeps = bool(program.reachable.written)
    return graph, (output, loss)


def _declared(recorder: Recorder, tree: Any, kind: str) -> list[Ref | None]:
    """Return a value for each leaf of the data, None for what is no tensor."""
    refs: list[Ref | None] = []
    for i, leaf in enumerate(tree_leaves(tree)):
        if isinstance(leaf, Tensor):
            refs.append(recorder.declare(leaf, kind, str(i)))
        else:
            refs.append(None)
    return refs


def _refs(recorder: Recorder, output: Any, but: Tensor | None) -> list[Ref]:
    """Return the values of the tensors that the model returned, without one of them."""
    return [recorder.ref(t) for t in tensors_in(output) if t is not but]


def _ref(recorder: Recorder, loss: Any) -> Ref | None:
    """Return the value of the loss; None if it is no tensor."""
    if not isinstance(loss, Tensor):
        return None
    return recorder.ref(loss)


def _first_user(graph: Graph, value: int) -> Step | None:
    """Return the first step that reads a value, or None."""
    for step in graph.steps:
        for ref in step.refs():
            if ref.index == value:
                return step
    return None


def _made_from_numbers(graph: Graph, value: int) -> bool:
    """Tell whether a constant is like ``torch.tensor(2.0)``, made of a number that Python has.

    Python has it without looking at tensors, or there is an escape.
    """
    user = _first_user(graph, value)
    return user is not None and user.name in ("lift_fresh", "lift")


def _made_out_of_sight(graph: Graph, again: Graph) -> list[HostRead]:
    """Return constants that lie in another memory in another run, as reads of anything.

    They were made during the run by what the recorder does not see, from whatever that reads.
    """
    reads = []
    for i, j in zip(graph.foreign, again.foreign, strict=False):
        first, second = graph.values[i].concrete, again.values[j].concrete
        if first is None or second is None or storage_of(first) == storage_of(second):
            continue
        read = HostRead(Ref(i), "a tensor made where it cannot be seen", 0, "", "", blind=True)
        user = _first_user(graph, i)
        if user is not None:
            in_loss = user.index in graph.after_cut
            read = replace(
                read, step=user.index, module=user.module, where=user.where, in_loss=in_loss
            )
        reads.append(read)
    return reads


# --- a loss of the model's own --------------------------------------------------------------------


def own_loss(output: Any) -> Tensor | None:
    """Return the loss in the output of a model that computes its own, or None.

    It is what is called ``loss``; in a tuple the only number, or else the first entry.
    """
    candidate: Any
    if isinstance(output, Tensor):
        candidate = output
    elif isinstance(output, Mapping):
        candidate = output.get("loss")
    else:
        candidate = getattr(output, "loss", None)
    if candidate is None and isinstance(output, tuple | list):
        candidate = _likely_loss(output)
    if _is_number(candidate):
        return candidate
    return None


def _likely_loss(output: Sequence[Any]) -> Any:
    numbers = [t for t in output if _is_number(t)]
    if len(numbers) == 1:
        return numbers[0]
    return next(iter(output), None)


def _is_number(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() == 1
