"""A program as it ran once on a batch: the graph, and what decides whether it is still valid.

What is found out about a recording, and how long it is kept, is in ``session.py``; recording itself
is done by ``capture/program.py``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from unbatch import errors
from unbatch.analysis.rules import registry
from unbatch.capture import program as capture
from unbatch.capture.graph import Graph
from unbatch.capture.guards import Guard, identity, signature
from unbatch.capture.hooks import hooks_of
from unbatch.capture.missing_derivatives import without_kernel
from unbatch.capture.opened import open_packed
from unbatch.capture.own_nodes import own_nodes
from unbatch.capture.own_writes import idle
from unbatch.capture.program import Program
from unbatch.capture.steps import Step
from unbatch.capture.third_order import norm_without_gradient
from unbatch.capture.trees import tensors_in
from unbatch.errors import CaptureError, InputError, UnbatchError
from unbatch.problem.validation import parse_tree

MOST_NAMED = 4  # places in a message

# Words of autograd's errors about a tensor by which a derivative is asked that does not have it.
DIFFERENTIATED = "differentiated Tensor"


@dataclass(frozen=True)
class Batch:
    """Inputs and targets with the axes of their samples, one for every leaf.

    ``given``: both as the user has them, in containers that may change.
    """

    given: tuple[Any, Any]
    inputs: Any
    targets: Any
    dims: Sequence[int | None]
    target_dims: Sequence[int | None]
    samples: int

    @property
    def signature(self) -> tuple[Any, ...]:
        """Return what decides which computation runs: structure, shapes, types, devices."""
        return signature(*self.read())

    def read(self) -> list[Any]:
        """Return inputs and targets as the user has them at this moment."""
        return list(map(parse_tree, self.given))


@dataclass(frozen=True)
class Recording:
    """A program as it ran on a batch.

    ``guard``, ``state``, ``numbers``: what is compared to decide whether the recording is still
    valid; ``contents``: the same where something of the numbers themselves was kept. ``skeleton``:
    what the model returned, with references in place of tensors.
    """

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
    own_backward: bool  # code that PyTorch did not write takes part in backward passes
    contents: bytes | None = None  # None where nothing was kept
    output: Any = None  # what the model returned, where it has run on these numbers
    outcome: list[Tensor] | None = None  # its tensors, and the loss; or a loss of its own alone

    @staticmethod
    def of(program: Program, batch: Batch, where: str, call: str) -> Recording:
        """Run the program once. ``call``: how it is called, for the error message.

        Raises ``CaptureError`` where the program raises, ``InputError`` where it returns no scalar.
        """
        guard = Guard.of(program)
        try:
            graph, (output, scalar) = capture.record(program, batch.inputs, batch.targets)
        except UnbatchError:
            raise  # says already what is wrong, and what to do
        except Exception as error:
            _raise_failure(program, error, call)
        _check_scalar(program, graph, output, scalar)
        # The guard watches constants of the graph, so its state is read only after that.
        own_backward = _has_own_backward(program, graph, output, scalar)
        guard.watch(graph, own_backward)
        guard.idle = idle(program, batch.inputs, batch.targets, graph.rng)
        own_loss: Tensor | None = None
        loss: Any = scalar
        if program.loss is None:
            own_loss = loss = capture.own_loss(output)
        if not batch.samples:
            _check_sum(loss)
        return Recording(
            program=program,
            batch=batch,
            guard=guard,
            state=state_of(guard, batch),
            numbers=numbers_of(guard, batch),
            graph=graph,
            skeleton=_skeleton(graph, output, own_loss),
            where=where,
            connected=loss.requires_grad,
            unregistered=_unregistered(graph, where),
            own_backward=own_backward,
            contents=contents_of(guard, batch),
            output=_detached(output),
            outcome=_outcome(output, own_loss, scalar),
        )

    @cached_property
    def norm_without_gradient(self) -> Step | None:
        """The norm whose third derivative the gradient would be; None without one."""
        return norm_without_gradient(self.graph)

    @property
    def predictions(self) -> Any:
        """What the model returns, with the noise of the recording."""
        if self.output is not None and self.has_its_contents():
            return self.output
        # Moved to other numbers, a recording has no output of its own.
        with self.program.untouched(self.graph.rng), torch.enable_grad():
            return _detached(self.program.predict(self.batch.inputs))

    def has_its_contents(self) -> bool:
        """Return whether every entry of what was read is what it was."""
        return self.contents is None or self.contents == contents_of(self.guard, self.batch)


# --- what decides whether a recording is valid ----------------------------------------------------


def state_of(guard: Guard, batch: Batch) -> tuple[Any, ...]:
    """Return what decides which computation runs; with another state it is recorded again."""
    return *state_of_program(guard), batch.signature


def state_of_program(guard: Guard) -> tuple[Any, ...]:
    """Return the same of the program alone, whatever the batch."""
    # Rules and assumptions of the user change the verdicts, although the program is the same.
    declared = (
        tuple(sorted(registry.ASSUMED_MODULES)),
        tuple((op, id(rule)) for op, rule in registry.CUSTOM.items()),
        tuple(registry.ASSUMED),
    )
    # A wrapper that has got a hook does more than it passes on.
    return guard.state(), id(guard.program.inside), declared


def numbers_of(guard: Guard, batch: Batch) -> tuple[Any, ...]:
    """Return what identifies the values of parameters, buffers and data."""
    data = batch.read()
    return guard.numbers(tensors_in(data)), identity(*data)


def contents_of(guard: Guard, batch: Batch) -> bytes:
    """Return what identifies them down to the last entry of a large tensor."""
    return guard.contents(tensors_in(batch.read()))


# --- recording ------------------------------------------------------------------------------------


def _skeleton(graph: Graph, output: Any, own_loss: Tensor | None) -> Any:
    """Return the output with references to values of the graph in place of its tensors."""
    # The graph lists its predictions in the order in which pytrees visit them.
    refs = iter(graph.predictions)

    def reference(leaf: Any) -> Any:
        # The loss that a model returns is no prediction, so the graph has no reference for it.
        if not isinstance(leaf, Tensor) or leaf is own_loss:
            return leaf
        return next(refs)

    return tree_map(reference, open_packed(output))


def _outcome(output: Any, own_loss: Tensor | None, scalar: Any) -> list[Tensor]:
    """Return what another run of the program is compared with."""
    outcome: list[Tensor] = tensors_in(_detached((output, scalar)))
    if own_loss is not None:
        outcome = [own_loss.detach()]
    return outcome


def _has_own_backward(program: Program, graph: Graph, output: Any, scalar: Any) -> bool:
    """Return whether code that PyTorch did not write takes part in backward passes."""
    if graph.hooks or hooks_of(program.modules, program.parameters.values()):
        return True
    return bool(own_nodes(tensors_in((output, scalar))))


def _detached(output: Any) -> Any:
    """Return the output without its autograd graph, which is as large as the activations."""

    def detached(leaf: Any) -> Any:
        return leaf.detach() if isinstance(leaf, Tensor) else leaf

    return tree_map(detached, output)


def _check_scalar(program: Program, graph: Graph, output: Any, scalar: Any) -> None:
    """Raise ``InputError`` where the loss is no tensor with one entry."""
    # A model with its own loss was searched for it; a loss that was passed has to return it.
    if program.loss is None:
        if graph.loss is None:
            raise InputError(errors.MSG_NO_LOSS.format(value=type(output).__name__))
        return
    if not isinstance(scalar, Tensor):
        raise InputError(errors.MSG_NOT_SCALAR.format(value=repr(scalar)))
    if scalar.numel() != 1:
        value = f"a tensor of shape {tuple(scalar.shape)}"
        raise InputError(errors.MSG_NOT_SCALAR.format(value=value))


def _check_sum(loss: Tensor) -> None:
    """Raise ``InputError`` where the loss of no samples is no number."""
    value = float(loss.detach().real)
    if not math.isfinite(value):
        raise InputError(errors.MSG_EMPTY_NO_SUM.format(value=value))


def _raise_failure(program: Program, error: Exception, call: str) -> NoReturn:
    """Raise what the program raised as a ``CaptureError``, with the call and a likely cause."""
    text = without_kernel(str(error)) or str(error)
    message = errors.MSG_MODEL_FAILED.format(
        kind=type(error).__name__, value=text.rstrip().removesuffix("."), call=call
    )
    # Notes were added where the exception passed: by which call, with what.
    sentences = [message, *getattr(error, "__notes__", ())]
    if DIFFERENTIATED in text:
        sentences.append(errors.MSG_INNER_DERIVATIVE)
    if _looks_swapped(program):
        sentences.append(errors.MSG_SWAPPED)
    raise CaptureError(" ".join(sentences)) from error


def _looks_swapped(program: Program) -> bool:
    """Return whether the loss has parameters and the model has none."""
    if program.functional:
        return False
    return _has_parameters(program.loss) and not _has_parameters(program.model)


def _has_parameters(function: Any) -> bool:
    return isinstance(function, nn.Module) and next(function.parameters(), None) is not None


def _unregistered(graph: Graph, where: str) -> str:
    """Return in words which tensors have gradients that are overlooked; empty for none."""
    tensors = graph.unregistered
    if not tensors:
        return ""
    # Several tensors may be made at one line, with one shape: that place is listed once.
    places: list[str] = []
    for value, step in tensors:
        place = f"{list(value.shape)} ({os.path.basename(step.where or where)})"
        if place not in places:
            places.append(place)
    listed = ", ".join(places[:MOST_NAMED])
    if len(places) > MOST_NAMED:
        listed += ", .."
    count = f"{len(tensors)} tensor{'s' * (len(tensors) != 1)}"
    return errors.MSG_UNREGISTERED.format(count=count, places=listed)
