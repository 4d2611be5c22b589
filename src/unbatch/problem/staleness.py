"""Whether what was made of a recording earlier is still about the program as it is.

Other numbers in what the recording has read make it stale. A change elsewhere, in a place that the
program can reach, may be one that nothing depends on: a log that a script keeps beside what the
program reads. Then the program is recorded once more: where that is the same computation, with the
same results and gradients, nothing is stale.
"""

from __future__ import annotations

from typing import Any

import torch

from unbatch.autodiff.autograd import gradients
from unbatch.capture.graph import Graph
from unbatch.capture.isolation import (
    generators_in,
    random_state,
    set_random_state,
    storage_of,
)
from unbatch.capture.same_form import Form, Sizes
from unbatch.linalg.precision import largest
from unbatch.problem.recording import Recording, numbers_of, state_of
from unbatch.problem.session import Session
from unbatch.problem.spot_check import close, derivatives_agree


def is_stale(session: Session) -> bool:
    """Return whether the program, the numbers it has read, or the data have changed since."""
    recording = session.recording
    guard, batch = recording.guard, recording.batch
    if numbers_of(guard, batch) != recording.numbers:
        return True
    state = state_of(guard, batch)
    if state == recording.state:
        return False
    return not (_differs_in_places(state, recording.state) and _records_the_same(session))


def _differs_in_places(state: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Return whether states differ in places that the program can reach, and in nothing else."""
    (_, *of_tensors), *others = state
    (_, *of_tensors_before), *others_before = before
    return of_tensors == of_tensors_before and others == others_before


def _records_the_same(session: Session) -> bool:
    """Return whether the program, recorded once more, does what it did; then watch it from here."""
    recording, rng = session.recording, session.graph.rng
    if not session.is_judged or session.analysis.replay_difference:
        return False  # answers are made by the program itself, which may be another one
    before = random_state(generators_in(rng))
    try:
        set_random_state(rng)  # for the same noise
        again = Recording.of(recording.program, recording.batch, recording.where, "")
    except Exception:
        return False
    finally:
        set_random_state(before)
    if not (_is_same(session, again) and derivatives_agree(session) and _gradients_agree(session)):
        return False
    session.watched_by(again)
    return True


def _is_same(session: Session, again: Recording) -> bool:
    """Return whether a recording has the same steps, on the same tensors, and the same results."""
    recording = session.recording
    if not Form.of(recording.graph).is_like(Form.of(again.graph), Sizes()):
        return False
    if recording.connected != again.connected or not _begin_alike(recording.graph, again.graph):
        return False
    expected = session.outcome()
    if expected is None or again.outcome is None or len(expected) != len(again.outcome):
        return False
    return all(map(close, again.outcome, expected))


def _begin_alike(one: Graph, other: Graph) -> bool:
    """Return whether two recordings begin with the same tensors, or equal ones."""
    for value, its in zip(one.values, other.values, strict=True):
        mine, theirs = value.concrete, its.concrete
        if value.kind == "step" or mine is None or theirs is None:
            continue
        if storage_of(mine) == storage_of(theirs) and value.offset == its.offset:
            continue
        if mine.layout != torch.strided or not torch.equal(mine, theirs):
            return False
    return True


def _gradients_agree(session: Session) -> bool:
    """Return whether the gradient of the loss is that of its recording, hooks and all."""
    recording, context = session.recording, session.analysis.context
    program, batch, graph = recording.program, recording.batch, session.graph
    trained = {name: p for name, p in program.parameters.items() if p.requires_grad}
    fresh = {name: p.detach().clone().requires_grad_() for name, p in trained.items()}
    feed = context.data | context.constants
    for i, value in enumerate(graph.values):
        if value.kind == "parameters" and value.name in fresh:
            feed[i] = fresh[value.name]
    try:
        with program.untouched(graph.rng), torch.enable_grad():
            loss = program.loss_of(program.predict(batch.inputs), batch.targets)
            expected = gradients([loss], trained, retain=graph.has_history)
        with torch.enable_grad():
            assert graph.loss is not None
            values = graph.run(feed, [graph.loss.index])
            replayed = gradients(values, fresh, retain=graph.has_history)
    except Exception:
        return False
    size = largest(expected.values())
    error = largest(expected[name] - replayed[name] for name in expected)
    return error <= context.rounding * size  # false for what is not a number
