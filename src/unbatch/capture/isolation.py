"""Asking changes nothing.

Tensors that existed before are copied when a program first writes to them and put back at the end,
also after an exception; so is all else that it can reach (``reachable.py``), with settings of the
process and random states. Other processes are not kept waiting; other threads are, as settings
belong to all of them.
"""

from __future__ import annotations

import functools
import pickle
import random
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from unbatch.capture import ops
from unbatch.capture.after_run import AfterRun
from unbatch.capture.distributed import check_alone
from unbatch.capture.effort import spend
from unbatch.capture.histories import WithHistory, put_back_histories, replace_histories
from unbatch.capture.holders import contents, restore
from unbatch.capture.iterators import Replaced, put_back_iterators, replace_iterators
from unbatch.capture.missing_derivatives import refused_if_missing
from unbatch.capture.python_values import Exports
from unbatch.capture.reachable import Reachable
from unbatch.capture.switches import all_settings, set_back
from unbatch.capture.tensor_states import Saved, TensorState, put_content, set_version
from unbatch.capture.trees import is_strided, parts_of, tensors_in, version_of
from unbatch.errors import MSG_LAYOUT, MSG_NOT_PUT_BACK, CaptureError
from unbatch.running.interrupts import Held, stop_if_asked

C = TypeVar("C")

# PyTorch wraps what a dispatch mode does to keep the compiler out of it, and loads the compiler for
# that, which takes a second and 70 MiB. Nobody compiles what runs in a mode of ours.
SKIPS_COMPILER = False

# Questions take turns: random states, settings and hooks of all modules belong to the process.
TURN = threading.RLock()


@contextmanager
def untouched(
    where: Reachable | Sequence[Any],
    seed: tuple[Any, ...] | None = None,
    after: AfterRun | None = None,
) -> Iterator[tuple[Any, ...]]:
    """Leave as it was all that can be reached, and random states, whatever happens inside.

    ``where``: what is reached, or objects to begin a walk at. Yields the random state; with
    ``seed`` the inside starts from that one instead. ``after``: notes what the inside leaves, if
    it is new; else that is in place inside.
    """
    reached = where
    if not isinstance(reached, Reachable):
        reached = Reachable(reached)
    before, settings = random_state(reached.generators), all_settings()
    kept = contents(reached.holders)
    is_asked_for = after is not None and not after.noted
    after = after or AfterRun()
    tensors = [TensorState.of(t) for t in (*reached.tensors, *after.changed)]
    writes = _Writes()
    replaced: list[Replaced] = []
    histories: list[WithHistory] = []
    try:
        if seed is not None:
            set_random_state(seed)
        if reached.threads:
            # A mode is a thread's own: what another one writes, it does not see.
            for tensor in reached.tensors:
                writes.save(tensor)
        replace_iterators(reached.iterators, replaced)
        replace_histories(reached.kept, histories)
        _put_all_back(lambda failures: after.put_in_place(writes.save, failures))
        # Not always: PyTorch takes no fast path (of transformers, say) where such a mode is on.
        exports = Exports(writes.save_unseen) if reached.exports else nullcontext()
        with writes, exports:
            yield seed or before
        if is_asked_for:
            after.note(reached, kept, writes.saved.values(), tensors)
    finally:
        _put_all_back(
            # Contents first, while tensors still lie where they were written to.
            lambda _: writes.undo(),
            lambda _: set_back(settings),
            lambda _: put_back_iterators(replaced),
            lambda _: put_back_histories(histories),
            lambda failures: _put_places_back(reached, kept, failures),
            lambda _: _put_tensors_back(tensors),
            lambda _: _put_random_state_back(reached, before, seed or before),
        )


@contextmanager
def contents_untouched() -> Iterator[None]:
    """Leave the contents of all tensors as they were, and nothing else."""
    writes = _Writes()
    try:
        with writes, Exports(writes.save_unseen):
            yield
    finally:
        _put_all_back(lambda _: writes.undo())


def _put_all_back(*acts: Callable[[list[Exception]], None]) -> None:
    """Put all back, and only then raise ``CaptureError`` where some of it cannot be.

    An act raises, or notes among the failures that it is given, what went wrong.
    """
    failures: list[Exception] = []
    # A second Ctrl-C, which does not wait for long elsewhere, waits here.
    with Held(sealed=True):
        for act in acts:
            try:
                act(failures)
            except Exception as error:
                failures.append(error)
    if not failures:
        return
    first = failures[0]
    if isinstance(first, CaptureError):
        raise first  # says already what it is about
    message = MSG_NOT_PUT_BACK.format(kind=type(first).__name__, value=first)
    raise CaptureError(message) from first


def _put_places_back(reached: Reachable, kept: list[Any], failures: list[Exception]) -> None:
    """Put places back, and note what the program itself changes in them.

    Whether it reads that, too, is another question.
    """
    for i, names in restore(reached.holders, kept, failures).items():
        reached.written.setdefault(i, set()).update(names)


def _put_tensors_back(tensors: list[TensorState]) -> None:
    for state in tensors:
        state.restore()


def _put_random_state_back(reached: Reachable, before: Any, start: Any) -> None:
    """Put random states back; note whether the program drew numbers in Python."""
    reached.draws |= _draws_in_python(start, random_state(reached.generators))
    set_random_state(before)


# --- random states --------------------------------------------------------------------------------


def random_state(own: Iterable[Any] = ()) -> tuple[Any, ...]:
    """Return the states of all generators: PyTorch's on CPU and GPU, numpy's and Python's.

    ``own``: generators of the program's own.
    """
    # Asking a GPU that nobody has used yet would start it.
    cuda = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        cuda = torch.cuda.get_rng_state_all()
    states = []
    for generator in own:
        states.append((generator, _state_of_generator(generator)))
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate(), states


def set_random_state(state: tuple[Any, ...]) -> None:
    """Set the states of all generators to those that ``random_state`` returned."""
    cpu, cuda, numpys, pythons, own = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(numpys)
    random.setstate(pythons)
    for generator, its_state in own:
        _set_generator(generator, its_state)


def _draws_in_python(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Return whether a generator that is not PyTorch's has moved on."""
    if _bare(before[2:4]) != _bare(after[2:4]):
        return True
    for (generator, old), (_, new) in zip(before[4], after[4], strict=False):
        if not isinstance(generator, torch.Generator) and _bare(old) != _bare(new):
            return True
    return False


def _bare(state: Any) -> bytes:
    """Return a state as bytes: arrays of numpy do not compare to one truth."""
    return pickle.dumps(state)


def generators_in(state: tuple[Any, ...]) -> list[Any]:
    """Return the generators of the program's own whose states are there."""
    return [generator for generator, _ in state[4]]


def _state_of_generator(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        # A class derived from it may do more.
        return random.Random.getstate(generator)
    if isinstance(generator, np.random.RandomState):
        return generator.get_state()
    if isinstance(generator, np.random.SeedSequence):
        return generator.__reduce__()[2]  # the only way to how many children it has
    if isinstance(generator, np.random.BitGenerator):
        return generator.state, _state_of_seeds(generator)
    return _state_of_generator(generator.bit_generator)


def _state_of_seeds(bits: np.random.BitGenerator) -> Any:
    """Return the state of the seeds of a generator, by which it makes others."""
    if isinstance(bits.seed_seq, np.random.SeedSequence):
        return _state_of_generator(bits.seed_seq)
    return None


def _set_generator(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        random.Random.setstate(generator, state)
    elif isinstance(generator, np.random.SeedSequence):
        generator.__setstate__(state)  # type: ignore[attr-defined]
    elif isinstance(generator, np.random.BitGenerator):
        generator.state, of_seeds = state
        if of_seeds is not None:
            _set_generator(generator.seed_seq, of_seeds)
    else:
        _set_generator(generator.bit_generator, state)


# --- inference mode -------------------------------------------------------------------------------


def outside_inference_mode(*others: str) -> Callable[[type[C]], type[C]]:
    """Let a class leave inference mode in its public methods and properties, and ``others``.

    Autograd keeps nothing there, and derivatives would come out as zero. Tensors that were made
    there cannot take part in derivatives; those among the arguments are copied. What needs a
    derivative that PyTorch does not have is refused.
    """

    def decorate(cls: type[C]) -> type[C]:
        for name, member in list(vars(cls).items()):
            if name.startswith("_") and name not in others:
                continue
            if isinstance(member, FunctionType):
                setattr(cls, name, _outside(member))
            elif isinstance(member, property) and member.fget is not None:
                setattr(cls, name, property(_outside(member.fget), member.fset, member.fdel))
            elif isinstance(member, functools.cached_property):
                member.func = _outside(member.func)
        return cls

    return decorate


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that leaves inference mode, and copies arguments made there.

    Ctrl-C waits inside for the next pass.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with TURN, Held(), torch.inference_mode(False), refused_if_missing():
            return function(*tree_map(_ordinary, args), **kwargs)

    return run


def _ordinary(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_inference():
        return x.clone()
    return x


# --- writes ---------------------------------------------------------------------------------------


def mutated(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an op writes to."""
    if not ops.may_write(op):
        return []
    arguments = ops.by_argument(op, args, kwargs)
    places = [arguments.get(name) for name in ops.written(op, arguments)]
    return tensors_in(places)


class _Writes(TorchDispatchMode):
    """Copies a tensor from outside before the first write to it.

    ``saved``: by memory, a tensor there, the whole memory, a copy of it, and the version that the
    tensor had. ``own``: the memories that were made inside; weak references to them, so that their
    addresses are not given again.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return SKIPS_COMPILER

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, Saved] = {}
        self.own: dict[int, StorageWeakRef | weakref.ref[Tensor]] = {}
        self.count = 0  # of ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        check_alone(func, types)
        self.count += 1
        spend(1, self.count)
        stop_if_asked()
        # Before it runs: afterwards the old contents are gone.
        for tensor in mutated(func, args, kwargs):
            self.save(tensor)
        out = func(*args, **kwargs)
        # What an op in place returns is what it was given.
        if not ops.is_mutable(func):
            self._note_new(out, args, kwargs)
        return out

    def save_unseen(self, tensor: Tensor) -> None:
        """Copy the memory of a tensor as no part of what is running."""
        with _disable_current_modes():
            self.save(tensor)

    def save(self, tensor: Tensor) -> None:
        """Copy the memory of a tensor from outside, unless it has been copied."""
        if not is_strided(tensor):
            self._save_parts(tensor)
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self.own or storage._cdata in self.saved:
            return
        # All of the memory: other tensors may be windows on it, and the next write through them.
        entries = storage.nbytes() // tensor.element_size()
        whole = tensor.detach().as_strided((entries,), (1,), 0)
        self.saved[storage._cdata] = (tensor, whole, whole.clone(), version_of(tensor))

    def _save_parts(self, tensor: Tensor) -> None:
        """Copy the memories of a tensor that has several, as a sparse one."""
        if -id(tensor) in self.own:
            return
        parts = parts_of(tensor)
        if not parts:
            raise CaptureError(MSG_LAYOUT.format(layout=tensor.layout))
        for part in parts:
            self.save(part)

    def _note_new(self, out: Any, args: Any, kwargs: Any) -> None:
        """Note the memories of results that are not those of arguments: views are not new."""
        # By hand, as each op of a program comes here: trees are slow for what holds no other one.
        memories: set[int] = set()
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tensor):
                memories.update(_memories(argument))
            elif isinstance(argument, list | tuple | dict):
                for part in tensors_in(argument):
                    memories.update(_memories(part))
        results = [out] if isinstance(out, Tensor) else tensors_in(out)
        for result in results:
            if not is_strided(result):
                if memories.isdisjoint(_memories(result)):
                    self.own[-id(result)] = weakref.ref(result)
                continue
            storage = result.untyped_storage()
            if storage._cdata not in memories:
                self.own[storage._cdata] = StorageWeakRef(storage)

    def undo(self) -> None:
        """Put the contents back, with the versions that tell autograd of no write."""
        with torch.no_grad():
            # The last first: two may be one memory, as another library hands it out.
            for tensor, whole, content, version in reversed(self.saved.values()):
                put_content(whole, content)
                set_version(tensor, version)
        self.saved.clear()
        self.own.clear()


def _memories(tensor: Tensor) -> list[int]:
    """Return a number for each memory that a tensor lies in, or one for the tensor itself."""
    if is_strided(tensor):
        return [tensor.untyped_storage()._cdata]
    return [part.untyped_storage()._cdata for part in parts_of(tensor)] or [-id(tensor)]


def storage_of(tensor: Tensor) -> int:
    """Return a number for the memory of a tensor, or for the tensor itself if it is not strided."""
    if is_strided(tensor):
        return tensor.untyped_storage()._cdata
    return -id(tensor)
