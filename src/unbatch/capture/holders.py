"""Places where a program keeps something: attributes, items, cells, arrays, classes.

A holder can say what is in its place (``content``), put that back (``restore``), and tell whether
the place is as it was (``mark``, ``same``). Which places a program reaches is found out in
``reachable.py``; what they are needed for, in ``guards.py`` and ``isolation.py``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from operator import attrgetter, is_
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unbatch import errors
from unbatch.errors import CaptureError

PLAIN = (int, float, bool, complex, str, bytes, type(None), np.generic)

# The same as exact types: an object of a class derived from them may have attributes.
PLAIN_TYPES = frozenset([*PLAIN[:-1], *np.sctypeDict.values()])

# Equal ones are interchangeable, as numbers are; there may be several objects of one value.
VALUE_TYPES = frozenset(
    [torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, slice, range]
)

# A name under which there is nothing, and the name for the order of a dict or for all of a holder.
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "nothing"})()
ORDER: Any = "(order)"
WHOLE: Any = "(content)"

# What Python keeps in a class, of which an object is copied or saved for the first time.
OF_COPIES = "__slotnames__"

# Items of a container of which all are looked at; of more, so many.
MANY = 2**14

# Bytes of an array of which all are looked at; of more, some entries.
SMALL_ARRAY = 2**22

# Arrays up to so many bytes are put back; for a program to write to a larger one is an error.
LARGEST_ARRAY = 2**30

# Containers of Python's own, from the most special one.
CONTAINERS = (OrderedDict, dict, list, deque, set)


class Holder:
    """One place; ``content`` is what ``restore`` takes, ``mark`` is what ``same`` is asked about.

    A mark is no more than the content, and may be less.
    """

    def content(self) -> Any:
        """Return what is there now."""
        raise NotImplementedError

    def mark(self) -> Any:
        """Return what to recognise the content by."""
        return self.content()

    def mark_of(self, content: Any) -> Any:
        """Return the mark that belongs to a content."""
        return content

    def same(self, mark: Any) -> bool:
        """Return whether the content is what it was, object by object; cheap."""
        raise NotImplementedError

    def changed(self, mark: Any) -> Iterator[Hashable]:
        """Yield the names of what has another value than it had."""
        if not self.same(mark):
            yield WHOLE

    def restore(self, content: Any) -> None:
        """Put the content back; only where it differs is anything written."""
        raise NotImplementedError

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        """Return names and objects, as far as others can be reached from there."""
        return ()

    def put(self, name: Any, value: Any) -> None:
        """Put an object in place of the one under a name of ``values``."""
        raise NotImplementedError


# --- names and what they stand for ----------------------------------------------------------------


class Entries(Holder):
    """A dict with all its entries, in their order.

    ``methods``: the class whose methods are called on it.
    """

    methods: Any = dict

    def __init__(self, space: dict[Any, Any]) -> None:
        self.space = space
        if type(space) is not dict:
            self.methods = methods_of(space)

    def content(self) -> dict[Any, Any]:
        return dict(self.methods.items(self.space))

    def same(self, mark: dict[Any, Any]) -> bool:
        space, methods = self.space, self.methods
        if methods.__len__(space) != len(mark):
            return False
        if len(mark) > MANY:
            return all(methods.get(space, key, MISSING) is mark[key] for key in spread(mark))
        if not all(map(is_, methods.values(space), mark.values())):
            return False
        return same_keys(methods.keys(space), mark.keys())

    def changed(self, mark: dict[Any, Any]) -> Iterator[Hashable]:
        if self.same(mark):
            return
        space = self.content()
        for key in {**mark, **space}:
            if not alike(mark.get(key, MISSING), space.get(key, MISSING)):
                yield key
        common = [key for key in space if key in mark]
        if not same_keys(common, [key for key in mark if key in space]):
            yield ORDER

    def restore(self, content: dict[Any, Any]) -> None:
        now = self.content()
        unchanged = len(now) == len(content) and all(map(is_, now.values(), content.values()))
        if unchanged and same_keys(now, content):
            return  # a container of a class of its own may notice that it is written to
        self.methods.clear(self.space)
        for key, value in content.items():
            self.put(key, value)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(islice(self.methods.items(self.space), MANY))

    def put(self, name: Any, value: Any) -> None:
        self.methods.__setitem__(self.space, name, value)


class Empty(Holder):
    """Dicts that are empty, as most of those that a module has are: one look for all."""

    def __init__(self, spaces: list[dict[Any, Any]]) -> None:
        self.spaces = spaces

    def content(self) -> None:
        return None

    def same(self, mark: None) -> bool:
        return not any(self.spaces)

    def changed(self, mark: None) -> Iterator[Hashable]:
        for i, space in enumerate(self.spaces):
            if space:
                yield i

    def restore(self, content: None) -> None:
        for space in filter(None, self.spaces):
            space.clear()


class OfTensors(Holder):
    """The attributes of tensors, of which most have none: those that code names are looked at.

    Libraries leave their own results there. ``names``: None for all.
    """

    def __init__(self, spaces: list[dict[str, Any]], names: Collection[str] | None) -> None:
        self.spaces = spaces
        self.names = names

    def content(self) -> dict[int, dict[str, Any]]:
        if not any(self.spaces):
            return {}
        return {i: dict(space) for i, space in enumerate(self.spaces) if space}

    def mark(self) -> dict[Any, Any]:
        return self.mark_of(self.content())

    def mark_of(self, content: dict[int, dict[str, Any]]) -> dict[Any, Any]:
        mark = {}
        for i, space in content.items():
            for name, value in space.items():
                if self.names is None or name in self.names:
                    mark[i, name] = value
        return mark

    def same(self, mark: dict[Any, Any]) -> bool:
        if not any(self.spaces):
            return not mark
        return Entries(self.mark()).same(mark)

    def changed(self, mark: dict[Any, Any]) -> Iterator[Hashable]:
        if self.same(mark):
            return iter(())
        return Entries(self.mark()).changed(mark)

    def restore(self, content: dict[int, dict[str, Any]]) -> None:
        if not content and not any(self.spaces):
            return
        for i, space in enumerate(self.spaces):
            Entries(space).restore(content.get(i, {}))

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(self.mark().items())

    def put(self, name: Any, value: Any) -> None:
        i, name = name
        self.spaces[i][name] = value


class Hooks(Holder):
    """What is called with the gradients of tensors; ``TensorState`` puts it back.

    Few tensors have any: one look for all.
    """

    tables = staticmethod(attrgetter("_backward_hooks", "_post_accumulate_grad_hooks"))

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def content(self) -> dict[Hashable, Any]:
        hooks: dict[Hashable, Any] = {}
        if not self._has_any():
            return hooks
        for i, tables in enumerate(map(self.tables, self.tensors)):
            for which, table in enumerate(tables):
                for key, hook in (table or {}).items():
                    hooks[i, which, key] = hook
        return hooks

    def same(self, mark: dict[Hashable, Any]) -> bool:
        if not self._has_any():
            return not mark
        return Entries(self.content()).same(mark)

    def _has_any(self) -> bool:
        return any(map(any, map(self.tables, self.tensors)))

    def changed(self, mark: dict[Hashable, Any]) -> Iterator[Hashable]:
        return Entries(self.content()).changed(mark)

    def restore(self, content: dict[Hashable, Any]) -> None:
        return

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(self.content().items())


class Names(Holder):
    """Some names of a namespace, which need not be there."""

    def __init__(self, space: Any, names: Iterable[str]) -> None:
        self.space = space
        self.names = tuple(names)

    def content(self) -> list[Any]:
        return list(map(self.look_up(), self.names, repeat(MISSING)))

    def same(self, mark: list[Any]) -> bool:
        return all(map(is_, map(self.look_up(), self.names, repeat(MISSING)), mark))

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        for name, before, now in zip(self.names, mark, self.content(), strict=True):
            if not alike(before, now):
                yield name

    def restore(self, content: list[Any]) -> None:
        for name, before, now in zip(self.names, content, self.content(), strict=True):
            if before is now:
                continue
            if before is MISSING:
                self.remove(name)
            else:
                self.put(name, before)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        pairs = zip(self.names, self.content(), strict=True)
        return [(name, value) for name, value in pairs if value is not MISSING]

    def look_up(self) -> Callable[[str, Any], Any]:
        """Return a function of a name and a default."""
        look_up: Callable[[str, Any], Any] = self.space.get
        return look_up

    def put(self, name: Any, value: Any) -> None:
        self.space[name] = value

    def remove(self, name: str) -> None:
        del self.space[name]


class Attributes(Names):
    """The attributes of an object: some are looked at, all are put back, and a new one is noticed.

    Code may ask for an attribute that is not there yet, and no text need name it.
    """

    def content(self) -> Any:
        return dict(self.space)

    def mark(self) -> list[Any]:
        return self.mark_of(self.space)

    def mark_of(self, content: Any) -> list[Any]:
        return [*map(content.get, self.names, repeat(MISSING)), list(content)]

    def same(self, mark: list[Any]) -> bool:
        if len(self.space) != len(mark[-1]):
            return False
        return all(map(is_, map(self.space.get, self.names, repeat(MISSING)), mark))

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        for name, before in zip(self.names, mark, strict=False):
            if not alike(before, self.space.get(name, MISSING)):
                yield name
        if len(self.space) != len(mark[-1]):
            yield from set(self.space).symmetric_difference(mark[-1]).difference(self.names)

    def restore(self, content: Any) -> None:
        Entries(self.space).restore(content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return [(name, self.space[name]) for name in self.names if name in self.space]


class Members(Names):
    """Some names of a class."""

    def look_up(self) -> Callable[[str, Any], Any]:
        return vars(self.space).get

    def put(self, name: Any, value: Any) -> None:
        setattr(self.space, name, value)

    def remove(self, name: str) -> None:
        delattr(self.space, name)


class Absent(Holder):
    """Names that a class or a module does not have, and may come to have."""

    def __init__(self, owner: Any, names: Iterable[str]) -> None:
        self.owner = owner
        self.names = frozenset(names).difference(vars(owner))

    def content(self) -> dict[str, Any]:
        space = vars(self.owner)
        return {name: space[name] for name in self.names.intersection(space)}

    def same(self, mark: dict[str, Any]) -> bool:
        if self.names.isdisjoint(vars(self.owner)):
            return not mark
        return not any(self.changed(mark))

    def changed(self, mark: dict[str, Any]) -> Iterator[str]:
        now = self.content()
        for name in {**mark, **now}:
            if mark.get(name, MISSING) is not now.get(name, MISSING):
                yield name

    def restore(self, content: dict[str, Any]) -> None:
        for name in set(self.changed(content)):
            if name in content:
                self.put(name, content[name])
            else:
                delattr(self.owner, name)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(self.content().items())

    def put(self, name: Any, value: Any) -> None:
        setattr(self.owner, name, value)


class Patchable(Holder):
    """All names of an installed class or module, in which others may exchange functions."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def content(self) -> dict[str, Any]:
        return vars(self.owner).copy()

    def mark(self) -> tuple[list[Any], dict[str, Any]]:
        return self.mark_of(self.content())

    def mark_of(self, content: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        return list(content.values()), content

    def same(self, mark: tuple[list[Any], dict[str, Any]]) -> bool:
        # One comparison of two lists: there are hundreds of names, and each question looks.
        with contextlib.suppress(Exception):
            return list(vars(self.owner).values()) == mark[0]
        return False

    def changed(self, mark: tuple[list[Any], dict[str, Any]]) -> Iterator[str]:
        before, now = mark[1], vars(self.owner)
        if self.same(mark):
            return
        for name in {**before, **now}:
            if name == OF_COPIES:
                continue
            if not alike(before.get(name, MISSING), now.get(name, MISSING)):
                yield name

    def restore(self, content: dict[str, Any]) -> None:
        for name in list(self.changed(self.mark_of(content))):
            if name in content:
                self.put(name, content[name])
            else:
                delattr(self.owner, name)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        names = vars(self.owner).items()
        return [(name, value) for name, value in names if isinstance(value, FunctionType)]

    def put(self, name: Any, value: Any) -> None:
        setattr(self.owner, name, value)


class Slots(Names):
    """The slots of an object: what their descriptors say, and no ``__getattr__`` of its class."""

    def __init__(self, space: Any, names: Iterable[str]) -> None:
        super().__init__(space, names)
        self.slots = slots_of(type(space))

    def look_up(self) -> Callable[[str, Any], Any]:
        def look_up(name: str, default: Any) -> Any:
            try:
                return self.slots[name].__get__(self.space)
            except AttributeError:  # nothing has been assigned yet
                return default

        return look_up

    def put(self, name: Any, value: Any) -> None:
        object.__setattr__(self.space, name, value)  # frozen ones, too

    def remove(self, name: str) -> None:
        object.__delattr__(self.space, name)


class Cell(Names):
    """A variable of a function that another function defined inside it has to itself."""

    def __init__(self, space: CellType) -> None:
        super().__init__(space, ("cell_contents",))

    def look_up(self) -> Callable[[str, Any], Any]:
        def look_up(name: str, default: Any) -> Any:
            try:
                return self.space.cell_contents
            except ValueError:  # nothing has been assigned yet
                return default

        return look_up

    def put(self, name: Any, value: Any) -> None:
        self.space.cell_contents = value

    def remove(self, name: str) -> None:
        del self.space.cell_contents


class Classes(Holder):
    """The classes of objects, and what these are derived from."""

    def __init__(self, objects: list[Any]) -> None:
        self.objects = objects

    def content(self) -> list[type]:
        return list(map(type, self.objects))

    def mark(self) -> tuple[list[type], dict[type, tuple[type, ...]]]:
        return self.mark_of(self.content())

    def mark_of(self, content: list[type]) -> tuple[list[type], dict[type, tuple[type, ...]]]:
        return content, {kind: kind.__mro__ for kind in content}

    def same(self, mark: tuple[list[type], dict[type, tuple[type, ...]]]) -> bool:
        kinds, bases = mark
        if not all(map(is_, map(type, self.objects), kinds)):
            return False
        return all(kind.__mro__ is order for kind, order in bases.items())

    def restore(self, content: list[type]) -> None:
        for value, kind in zip(self.objects, content, strict=True):
            if type(value) is not kind:
                value.__class__ = kind


# --- containers without names ---------------------------------------------------------------------


class Items(Holder):
    """A list or a deque. ``methods``: the class whose methods are called on it."""

    def __init__(self, space: list[Any] | deque[Any]) -> None:
        self.space = space
        self.methods = methods_of(space)

    def content(self) -> list[Any]:
        return list(self.methods.__iter__(self.space))

    def same(self, mark: list[Any]) -> bool:
        space, methods = self.space, self.methods
        if methods.__len__(space) != len(mark):
            return False
        if len(mark) > MANY:
            item = methods.__getitem__
            return all(item(space, i) is mark[i] for i in spread(range(len(mark))))
        return all(map(is_, methods.__iter__(space), mark))

    def changed(self, mark: list[Any]) -> Iterator[Hashable]:
        if self.same(mark):
            return
        items = self.content()
        if len(items) != len(mark):
            yield WHOLE
            return
        for i, (before, now) in enumerate(zip(mark, items, strict=True)):
            if not alike(before, now):
                yield i

    def restore(self, content: list[Any]) -> None:
        now = self.content()
        if len(now) == len(content) and all(map(is_, now, content)):
            return
        self.methods.clear(self.space)
        self.methods.extend(self.space, content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        return list(enumerate(islice(self.methods.__iter__(self.space), MANY)))

    def put(self, name: Any, value: Any) -> None:
        self.methods.__setitem__(self.space, name, value)


class Elements(Holder):
    """A set."""

    def __init__(self, space: set[Any]) -> None:
        self.space = space

    def content(self) -> set[Any]:
        return set(set.__iter__(self.space))

    def same(self, mark: set[Any]) -> bool:
        return set.__eq__(self.space, mark)

    def restore(self, content: set[Any]) -> None:
        if not self.same(content):
            set.clear(self.space)
            set.update(self.space, content)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        elements = list(islice(set.__iter__(self.space), MANY))
        return list(zip(elements, elements, strict=True))

    def put(self, name: Any, value: Any) -> None:
        set.discard(self.space, name)
        set.add(self.space, value)


class Bytes(Holder):
    """Numbers in a ``bytearray`` or an ``array.array``."""

    def __init__(self, space: Any) -> None:
        self.space = space

    def content(self) -> Any:
        return self.space[:]

    def same(self, mark: Any) -> bool:
        return bool(self.space == mark)

    def restore(self, content: Any) -> None:
        if self.space != content:
            self.space[:] = content


class Array(Holder):
    """An array of numpy; of a large one, some entries are looked at.

    The content is a copy that is as locked as the array is; none of what is too large to copy.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def content(self) -> np.ndarray[Any, Any] | tuple[Any, ...]:
        if self.array.nbytes > LARGEST_ARRAY:
            return self.mark()
        copy = self.array.copy()
        copy.flags.writeable = self.array.flags.writeable
        return copy

    def mark(self) -> tuple[Any, ...]:
        return self.mark_of(self.array)

    def mark_of(self, content: np.ndarray[Any, Any] | tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(content, tuple):
            return content
        entries: Any = content
        if content.nbytes > SMALL_ARRAY:
            entries = content.flat[:: max(1, content.size // MANY)]
        # The bytes, as not-a-numbers are not equal to themselves.
        values: Any = entries.tobytes()
        if content.dtype.hasobject:
            values = tuple(map(id, entries.flat))
        return content.shape, content.dtype, values

    def same(self, mark: tuple[Any, ...]) -> bool:
        return self.mark() == mark

    def restore(self, content: np.ndarray[Any, Any] | tuple[Any, ...]) -> None:
        if isinstance(content, tuple):
            if not self.same(content):
                raise CaptureError(errors.MSG_LARGE_ARRAY.format(size=self.array.nbytes))
            return
        array = self.array
        with contextlib.suppress(ValueError):  # of locked memory of others
            if not _has_bytes_of(array, content):
                if not array.flags.writeable:
                    array.setflags(write=True)
                _reshape(array, content)
                array[...] = content
            if array.flags.writeable != content.flags.writeable:
                array.setflags(write=content.flags.writeable)

    def values(self) -> Iterable[tuple[Hashable, Any]]:
        if not self.array.dtype.hasobject:
            return ()
        return list(enumerate(islice(self.array.flat, MANY)))


def _has_bytes_of(array: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> bool:
    if array.shape != content.shape or array.dtype != content.dtype:
        return False
    return array.tobytes() == content.tobytes()


def _reshape(array: np.ndarray[Any, Any], content: np.ndarray[Any, Any]) -> None:
    """Give an array the type and the shape of another, as far as its memory stays where it is."""
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if array.dtype != content.dtype:
            array.dtype = content.dtype  # type: ignore[misc]
        if array.shape != content.shape:
            array.resize(content.shape, refcheck=False)


# --- looking without calling code of the user -----------------------------------------------------


def methods_of(space: Any) -> Any:
    """Return the class of Python's own that a container is of: one derived from it may do more."""
    for kind in type(space).__mro__:
        if kind in CONTAINERS:
            return kind
    return type(space)


def attributes_of(value: Any) -> Any:
    """Return the dict with the attributes of an object; None if it has none."""
    try:
        return object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None


def slots_of(kind: type) -> dict[str, Any]:
    """Return the slots of a class by their names."""
    slots: dict[str, Any] = {}
    for base in kind.__mro__:
        for name, member in vars(base).items():
            if isinstance(member, MemberDescriptorType):
                slots.setdefault(name, member)
    return slots


# --- comparing ------------------------------------------------------------------------------------


def same_keys(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Return whether keys, of which there are equally many, are the same ones in one order."""
    # Tensors, say, do not compare to one truth.
    return all(map(is_, a, b)) or all(map(alike, a, b))


def spread(items: Any) -> Iterator[Any]:
    """Yield some of many items, evenly spread."""
    return islice(items, 0, None, max(1, len(items) // MANY))


def alike(a: Any, b: Any) -> bool:
    """Return whether two objects are one, or values that nothing can tell apart."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b):
        return False
    if kind in PLAIN_TYPES:
        return repr(a) == repr(b)  # tells zeros of either sign apart, and nan is nan
    if kind in VALUE_TYPES:
        return bool(a == b)
    if _is_plain_tuple(a):
        return _alike_inside(a, b)
    if isinstance(a, MethodType):
        return a.__func__ is b.__func__ and a.__self__ is b.__self__
    return False


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and not hasattr(value, "__dict__")


def _alike_inside(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Return whether tuples have the same in them, however deep they lie in one another."""
    pairs: list[tuple[Any, Any]] = [(a, b)]
    while pairs:
        first, second = pairs.pop()
        if first is second:
            continue
        if _is_plain_tuple(first) and type(first) is type(second):
            if len(first) != len(second):
                return False
            pairs.extend(zip(first, second, strict=True))
        elif not alike(first, second):
            return False
    return True


def contents(holders: Sequence[Holder]) -> list[Any]:
    """Return the content of each holder."""
    return [holder.content() for holder in holders]


def restore(
    holders: Sequence[Holder], before: Sequence[Any], failures: list[Exception]
) -> dict[int, set[Hashable]]:
    """Put contents back, and return the names of what was changed, by the number of the holder.

    What cannot be put back keeps nothing else from it: it is noted among the ``failures``.
    """
    written: dict[int, set[Hashable]] = {}
    for i, (holder, content) in enumerate(zip(holders, before, strict=True)):
        try:
            names = set(holder.changed(holder.mark_of(content)))
            if names:
                written[i] = names
            holder.restore(content)
        except Exception as error:
            failures.append(error)
    return written
