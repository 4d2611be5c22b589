"""A program recorded on a batch, what was found out about it, and for how long that is valid.

Other numbers in parameters, buffers and data leave a recording valid where nothing that Python or a rule has looked at
is among them; it is then moved to the new numbers, with its structure and its plans, and nothing is recorded again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from unbatch import branches, capture, errors, rules
from unbatch.capture import Program
from unbatch.errors import CaptureError, InputError, StructureError, UnbatchError
from unbatch.graph import Escape, Graph
from unbatch.guard import Guard, identity, signature
from unbatch.labels import Marks
from unbatch.oracle import Oracle
from unbatch.purity import random_state, untouched
from unbatch.setting import Setting
from unbatch.starts import forward_marks
from unbatch.structure import Findings, judge
from unbatch.verdicts import Structure
from unbatch.verify import settle
from unbatch.witness import unfaithful

MOST_NAMED = 4  # places in a message
ASSUMED_MODULES: dict[int, nn.Module] = {}


def assume_independent(what: Any) -> None:
    """Declare that a module, or an op, acts on each sample alone.

    ``what``: an ``nn.Module`` inside a model, or an op such as ``torch.ops.my.op.default``. Verdicts that rest on the
    declaration say so: their ``basis`` is "assumed", and ``structure.assumptions`` lists it. Raises ``InputError`` for
    anything else.
    """
    if isinstance(what, nn.Module):
        ASSUMED_MODULES[id(what)] = what
    elif isinstance(what, torch._ops.OpOverload):
        rules.ASSUMED[what] = str(what)
    else:
        raise InputError(
            f"assume_independent takes an nn.Module or an op such as torch.ops.my.op.default; got {what!r}."
        )


@dataclass(frozen=True)
class Batch:
    """Inputs and targets with the axes of their samples, one for every leaf."""

    inputs: Any
    targets: Any
    dims: Sequence[int | None]
    target_dims: Sequence[int | None]
    samples: int

    @property
    def signature(self) -> tuple[Any, ...]:
        return signature(self.inputs, self.targets)

    @property
    def identity(self) -> tuple[Any, ...]:
        return identity(self.inputs, self.targets)


@dataclass
class Recording:
    """What is kept between questions. ``skeleton``: what the model returned, with references in place of tensors."""

    program: Program
    batch: Batch
    guard: Guard
    state: tuple[Any, ...]
    numbers: tuple[Any, ...]
    graph: Graph
    skeleton: Any
    where: str  # the line of the user to whom verdicts belong
    connected: bool  # the loss, with what requires a gradient
    unregistered: str  # tensors whose gradients are overlooked, in words
    output: Any = None  # what the model returned
    _structure: Structure | None = None
    _findings: Findings | None = None
    _oracle: Oracle | None = None
    _replays: str = ""
    _setting: Setting | None = None

    # -- whether it is valid --

    @staticmethod
    def of(program: Program, batch: Batch, where: str, call: str) -> Recording:
        """Run the program once. ``call``: how it is called, for the error message."""
        guard = Guard.of(program)
        try:
            graph, (output, scalar) = capture.record(program, batch.inputs, batch.targets)
        except UnbatchError:
            raise
        except Exception as error:
            said = str(error).rstrip().removesuffix(".")
            message = errors.MSG_MODEL_FAILED.format(kind=type(error).__name__, value=said, call=call)
            swapped = [errors.MSG_SWAPPED] if _looks_swapped(program) else []
            raise CaptureError(" ".join([message, *getattr(error, "__notes__", ()), *swapped])) from error
        _check_scalar(program, graph, output, scalar)
        guard.watch(graph)
        refs = iter(graph.predictions)
        own = capture.own_loss(output) if program.loss is None else None
        named = lambda t: next(refs) if isinstance(t, Tensor) and t is not own else t  # noqa: E731
        skeleton = tree_map(named, output)
        state, loss = _state(guard, batch), scalar if own is None else own
        return Recording(
            program,
            batch,
            guard,
            state,
            _numbers(guard, batch),
            graph,
            skeleton,
            where,
            loss.requires_grad,
            _unregistered(graph, where),
            _cut(output),
        )

    def at(self, program: Program, batch: Batch) -> Recording | None:
        """This recording, or the same moved to other numbers; None where the program has to be recorded again."""
        self.guard.program = program
        if _state(self.guard, batch) != self.state:
            return None
        numbers = _numbers(self.guard, batch)
        return self if numbers == self.numbers else self._moved(program, batch, numbers)

    def is_stale(self) -> bool:
        """The program, its numbers or the data are not what they were."""
        return _state(self.guard, self.batch) != self.state or _numbers(self.guard, self.batch) != self.numbers

    def _moved(self, program: Program, batch: Batch, numbers: tuple[Any, ...]) -> Recording | None:
        if self.graph.escapes or self.graph.dynamic:
            return None
        rng = random_state() if any(s.noise for s in self.graph.steps) else self.graph.rng
        graph = capture.moved(self.graph, program, batch.inputs, batch.targets, rng)
        other = replace(self, program=program, batch=batch, numbers=numbers, graph=graph, output=None, _oracle=None)
        if self._findings is None or self._structure is None:
            return other
        walks = [self._findings.forward, *([self._findings.loss] if self._findings.loss else [])]
        facts = [f for w in walks for f in w.facts] + (self._setting.facts if self._setting else [])
        if not all(f.holds(graph) for f in facts):
            return replace(other, _structure=None, _findings=None, _setting=None)
        if self._setting is not None:
            data = {"inputs": batch.inputs, "targets": batch.targets}
            other._setting = replace(self._setting, program=program, graph=graph, **data)
        return other

    # -- what is known about it --

    def check_connected(self) -> None:
        """Raises ``StructureError`` where autograd does not reach from the loss to anything."""
        if not self.connected:
            cuts = [s for s in self.graph.steps if s.where and (s.name == "detach" or not s.grad)]
            place = f", such as at {os.path.basename(cuts[-1].where)}" if cuts else ""
            raise StructureError(errors.MSG_DETACHED.format(place=place))

    @property
    def structure(self) -> Structure:
        if self._structure is None:
            self._judge()
        assert self._structure is not None
        return self._structure

    @property
    def findings(self) -> Findings:
        """The walks behind the structure."""
        assert self.structure.samples
        assert self._findings is not None
        return self._findings

    @property
    def replays(self) -> str:
        """Why the recording cannot stand for the model's derivatives, if it cannot."""
        return self._replays if self.structure else ""

    @property
    def marks_in_loss(self) -> Mapping[int, Marks]:
        """What is known about the values in the loss, where there is one to judge."""
        assert self.structure.reduction
        assert self._findings is not None
        return self._findings.loss.marks if self._findings.loss is not None else {}

    @property
    def oracle(self) -> Oracle:
        if self._oracle is None:
            if self._findings is None:
                self._judge()
            else:
                self._oracle = self._asked(self._findings)
        assert self._oracle is not None
        return self._oracle

    def _asked(self, findings: Findings) -> Oracle:
        batch = self.batch
        return Oracle(self.program, self.graph, batch.inputs, batch.targets, batch.dims, batch.samples, findings)

    def _judge(self) -> None:
        program, batch, graph = self.program, self.batch, self.graph
        names = program.module_names
        assumed = [names[i] for i in ASSUMED_MODULES if i in names]
        general = functools.cache(lambda: branches.stands_for_all(program, batch.inputs, batch.targets, graph))

        def harmless(escape: Escape) -> bool:
            return escape.answer is not None and general() is not None

        def judged(graph: Graph) -> tuple[Structure, Findings]:
            return judge(graph, batch.samples, batch.dims, batch.target_dims, assumed, harmless, program.fold)

        structure, findings = judged(graph)
        other = general() if general.cache_info().currsize else None  # where it mattered
        if other is not None and other is not graph:
            structure = structure.no_more_than(judged(other)[0])
        self.graph, self._findings = findings.forward.graph, findings
        self._oracle = self._asked(findings)
        values, gradients = unfaithful(self._oracle)
        structure = settle(structure, self._oracle, self.predictions, "" if structure.assumptions else values)
        notes = structure.notes
        self._replays = gradients
        if values:  # something steers it: the recording may still be what ran on this batch
            self._replays = next(filter(None, unfaithful(self._oracle, here=True)), "")
        if self.unregistered:
            notes += (self.unregistered,)
        if gradients:
            notes += (
                f"the recorded computation has other derivatives than the model ({gradients}): "
                "derivatives are taken by running the model",
            )
        self._structure = replace(structure, notes=notes).located(self.where)

    @property
    def predictions(self) -> Any:
        """What the model returns, with the noise of the recording."""
        if self.output is None:
            with untouched(self.program.modules, self.graph.rng), torch.enable_grad():
                self.output = _cut(self.program.predict(self.batch.inputs))
        return self.output

    @property
    def at_the_cut(self) -> Any:
        """What the loss of a model that brings its own is cut at."""
        found = list(self.setting.numbers(list(self.setting.axes)).values())
        return found[0] if len(found) == 1 else tuple(found)

    @property
    def setting(self) -> Setting:
        if self._setting is None:
            structure, findings, batch = self.structure, self._findings, self.batch
            assert findings is not None
            self._setting = Setting(
                self.program, self.graph, findings.forward, forward_marks(self.graph, batch.dims), batch.samples,
                findings.leading, batch.inputs, batch.targets, self.skeleton, not self._replays,
                bool(structure.canonical_split),
            )  # fmt: skip
        return self._setting


def _unregistered(graph: Graph, where: str) -> str:
    """In words, the tensors whose gradients are overlooked; empty where there are none."""
    found = graph.unregistered
    places = dict.fromkeys(f"{list(v.shape)} ({os.path.basename(s.where or where)})" for v, s in found)
    listed = ", ".join([*places][:MOST_NAMED]) + (", .." if len(places) > MOST_NAMED else "")
    count = f"{len(found)} tensor{'s' * (len(found) != 1)}"
    return errors.MSG_UNREGISTERED.format(count=count, places=listed) if found else ""


def _looks_swapped(program: Program) -> bool:
    """The loss has parameters, and the model has none."""
    has = [isinstance(m, nn.Module) and any(True for _ in m.parameters()) for m in (program.model, program.loss)]
    return not program.functional and has == [False, True]


def _cut(output: Any) -> Any:
    """Without the graph that it hangs on, which is as large as the activations."""
    return tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, output)


def _state(guard: Guard, batch: Batch) -> tuple[Any, ...]:
    """What decides which computation it is."""
    declared = tuple(sorted(ASSUMED_MODULES)), tuple((k, id(v)) for k, v in rules.CUSTOM.items()), tuple(rules.ASSUMED)
    return guard.state(), batch.signature, declared


def _numbers(guard: Guard, batch: Batch) -> tuple[Any, ...]:
    return guard.numbers(), batch.identity


def _check_scalar(program: Program, graph: Graph, output: Any, scalar: Any) -> None:
    if program.loss is None:
        if graph.loss is None:
            raise InputError(errors.MSG_NO_LOSS.format(value=type(output).__name__))
    elif not isinstance(scalar, Tensor) or scalar.numel() != 1:
        value = f"a tensor of shape {tuple(scalar.shape)}" if isinstance(scalar, Tensor) else repr(scalar)
        raise InputError(errors.MSG_NOT_SCALAR.format(value=value))
