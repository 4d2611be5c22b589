"""What is typed becomes tensors, a model, a loss and targets; what makes no sense, an error with the remedy.

Shapes are drawn at random. Nothing about structure is known here, and nothing is printed.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.errors import InputError
from unbatch.problem.problem import Problem

MSG_TARGET = (
    "{what} {value!r} does not name anything: write package.module:name or path/to/file.py:name, "
    "e.g. mylib.nets:make_model."
)


MSG_NO_FILE = "There is no file {path!r}. It is looked for from the current directory, {folder}."


MSG_NO_MODULE = (
    "There is no module {name!r} to import. The current directory ({folder}) and the installed packages were "
    "searched; for a file, write its path: path/to/file.py:name."
)


MSG_IMPORT = "Importing {name!r} raised {error}. Run `python -c 'import ...'` on it to see the whole traceback."


MSG_NO_NAME = "{module!r} has no {name!r}. {hint}"


MSG_NOT_MODEL = (
    "{value!r} must be a torch.nn.Module, a class of them, or a function without arguments that returns one; "
    "it is {kind}. Wrap it: `def make_model(): return ...`."
)


MSG_FACTORY = "Calling {value!r} without arguments raised {error}. Name a function that needs none."


MSG_SHAPE = (
    "{option} {value!r} is no shape. Write positive sizes with commas, and after a colon a dtype where it is "
    "not float32: 8,3,32,32 or 8,128:int64 or, for integers from 0 to 49, '8,128:int64<50'."
)


MSG_DTYPE = "{option} {value!r} asks for the dtype {dtype!r}, which torch does not have. {hint}"


MSG_BOUND = "{option} {value!r} bounds values of dtype {dtype}; only integers take a bound, e.g. '8,128:int64<50'."


MSG_NAMES = (
    "--input {values} mixes named inputs with unnamed ones. Name all of them (name=SHAPE) or none."
)


MSG_TWICE = "--input names {name!r} twice. Every named input is given once."


MSG_LOSS = (
    "There is no loss {value!r}. {hint} Built in are {names}; a loss of your own is "
    "path/to/file.py:function or package.module:function, called as function(predictions, targets)."
)


MSG_NOT_LOSS = "The loss {value!r} must be callable as loss(predictions, targets); it is {kind}."


MSG_DRAW = "No targets can be drawn for {loss} and predictions {shape}: {why}. Say what they look like: --targets SHAPE:DTYPE."


def as_inputs(shapes: Sequence[Shape], generator: torch.Generator) -> Any:
    """One tensor, a tuple of them, or a dict where they have names."""
    if not any(s.name for s in shapes):
        tensors = tuple(s.draw(generator) for s in shapes)
        return tensors if len(tensors) > 1 else tensors[0]
    if not all(s.name for s in shapes):
        raise InputError(MSG_NAMES.format(values=" ".join(map(str, shapes))))
    names = [s.name for s in shapes]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(MSG_TWICE.format(name=repeated[0]))
    return {s.name: s.draw(generator) for s in shapes}


@dataclass(frozen=True)
class Shape:
    """A tensor to be drawn: normal floats, integers from 0 below ``bound``, or booleans.

    ``dtype`` is None where none was typed, ``text`` is what was typed.
    """

    sizes: tuple[int, ...]
    dtype: torch.dtype | None = None
    bound: int = 10
    name: str = ""
    text: str = ""

    FORM = re.compile(
        r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(?:,\d+)*),?(?::(?P<dtype>\w+)(?:<(?P<bound>\d+))?)?"
    )

    @classmethod
    def parse(cls, text: str, option: str) -> Shape:
        """Read "8,128:int64<50". Raises ``InputError``."""
        match = cls.FORM.fullmatch(text.replace(" ", ""))
        if (
            match is None
            or 0 in (sizes := tuple(map(int, match["sizes"].split(","))))
            or match["bound"] == "0"
        ):
            raise InputError(MSG_SHAPE.format(option=option, value=text))
        dtype = _dtype(match["dtype"], text, option) if match["dtype"] else None
        if match["bound"] and not _integral(dtype):
            raise InputError(MSG_BOUND.format(option=option, value=text, dtype=dtype))
        return cls(sizes, dtype, int(match["bound"] or 10), match["name"] or "", text)

    def __str__(self) -> str:
        return self.text

    def draw(self, generator: torch.Generator) -> Tensor:
        """A random tensor."""
        dtype = self.dtype or torch.get_default_dtype()
        if dtype == torch.bool:
            return torch.randint(2, self.sizes, generator=generator).bool()
        if _integral(dtype):
            return torch.randint(self.bound, self.sizes, generator=generator).to(dtype)
        return torch.randn(self.sizes, generator=generator).to(dtype)


def _integral(dtype: torch.dtype | None) -> bool:
    return (
        dtype is not None
        and dtype != torch.bool
        and not (dtype.is_floating_point or dtype.is_complex)
    )


def _dtype(name: str, text: str, option: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        known = [n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)]
        raise InputError(
            MSG_DTYPE.format(
                option=option,
                value=text,
                dtype=name,
                hint=_hint(name, known, "Try float64 or int64."),
            )
        )
    return dtype


# --- models and losses by name --------------------------------------------------------------------


def make_model(target: str, seed: int) -> nn.Module:
    """The model that TARGET names, or that what it names returns. Raises ``InputError``.

    Seeded for the import, which may make models, and again for the call, which may follow an earlier import.
    """
    torch.manual_seed(seed)
    found = _named(target, "TARGET")
    torch.manual_seed(seed)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise InputError(MSG_NOT_MODEL.format(value=target, kind=_kind(found)))
    try:
        model = found()
    except Exception as error:
        raise InputError(MSG_FACTORY.format(value=target, error=_words(error))) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            MSG_NOT_MODEL.format(value=target, kind=f"a function that returned {_kind(model)}")
        )
    return model


def _named(target: str, what: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise InputError(MSG_TARGET.format(what=what, value=target))
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            hint = _hint(
                part, [n for n in dir(value) if not n.startswith("_")], "Name something it defines."
            )
            raise InputError(MSG_NO_NAME.format(module=place, name=name, hint=hint))
        value = getattr(value, part)
    return value


def _load_file(path: Path) -> ModuleType:
    """Import a file by its path; what lies beside it can be imported from it, as when it is run."""
    if not path.is_file():
        raise InputError(MSG_NO_FILE.format(path=str(path), folder=Path.cwd()))
    name = f"unbatch_target:{path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _make_importable(path.resolve().parent)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(MSG_IMPORT.format(name=str(path), error=_words(error))) from error
    return module


def _load_module(name: str) -> ModuleType:
    _make_importable(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise InputError(MSG_NO_MODULE.format(name=name, folder=Path.cwd())) from error
        raise InputError(MSG_IMPORT.format(name=name, error=_words(error))) from error
    except Exception as error:
        raise InputError(MSG_IMPORT.format(name=name, error=_words(error))) from error


def _make_importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@dataclass(frozen=True)
class Loss:
    """A loss, how the report calls it, and which kind of targets it takes ("" where that is not known)."""

    function: Callable[..., Any]
    words: str
    kind: str = ""


# Losses of torch.nn.functional with two arguments, by the targets that they take.
KINDS = {
    "cross_entropy": "classes",
    "nll_loss": "classes",
    "multi_margin_loss": "classes",
    "mse_loss": "floats",
    "l1_loss": "floats",
    "smooth_l1_loss": "floats",
    "huber_loss": "floats",
    "poisson_nll_loss": "counts",
    "binary_cross_entropy": "coins",
    "binary_cross_entropy_with_logits": "coins",
    "multilabel_soft_margin_loss": "coins",
    "soft_margin_loss": "signs",
    "kl_div": "probabilities",
}


ALIASES = {
    "bce": "binary_cross_entropy",
    "bce_with_logits": "binary_cross_entropy_with_logits",
    "ce": "cross_entropy",
}


DEFAULTS = {
    "kl_div": {"reduction": "batchmean"}
}  # its own default divides by classes too, and warns about that


def find_loss(value: str) -> Loss:
    """A loss of ``torch.nn.functional``, or one of the user's by its place. Raises ``InputError``."""
    if ":" in value:
        function = _named(value, "--loss")
        function = (
            function()
            if isinstance(function, type) and issubclass(function, nn.Module)
            else function
        )
        if not callable(function):
            raise InputError(MSG_NOT_LOSS.format(value=value, kind=_kind(function)))
        return Loss(function, value)
    stem = value.removesuffix("_loss")
    name = next((n for n in (ALIASES.get(stem, stem), f"{stem}_loss") if n in KINDS), None)
    if name is None:
        names = [n.removesuffix("_loss") for n in KINDS]
        raise InputError(
            MSG_LOSS.format(
                value=value, hint=_hint(value, [*names, *ALIASES], ""), names=", ".join(names)
            )
        )
    extra = DEFAULTS.get(name, {})
    function = functools.partial(getattr(F, name), **extra) if extra else getattr(F, name)
    words = "".join(f", {k}={v!r}" for k, v in extra.items())
    return Loss(function, f"torch.nn.functional.{name}{words}", KINDS[name])


# --- targets --------------------------------------------------------------------------------------


def draw_targets(
    loss: Loss, wanted: Shape | None, model: nn.Module, X: Any, generator: torch.Generator
) -> tuple[Tensor | None, str]:
    """Random targets and how they were drawn, in words.

    Raises ``InputError`` where the predictions do not tell what targets fit, ``CaptureError`` where the model
    raises.
    """
    if wanted is not None and (wanted.dtype is not None or not loss.kind):
        return wanted.draw(generator), f"{wanted}, drawn at random"
    if not loss.kind and _takes_one(loss.function):
        return None, "none, the loss takes predictions only"
    F_ = Problem(model, _nothing, (X, None)).predictions()
    if not isinstance(F_, Tensor):
        raise InputError(
            MSG_DRAW.format(loss=loss.words, shape=_kind(F_), why="they are not one tensor")
        )
    sizes = wanted.sizes if wanted is not None else None
    if loss.kind == "classes":
        y, words = _classes(loss, F_, sizes, generator)
    else:
        y, words = FITTING[loss.kind or "floats"](sizes or tuple(F_.shape), F_, generator)
    given = "" if wanted is not None else "; say --targets for others"
    return y, f"{words} of shape {list(y.shape)}, drawn to fit the loss{given}"


def _classes(
    loss: Loss, predictions: Tensor, sizes: tuple[int, ...] | None, generator: torch.Generator
) -> tuple[Tensor, str]:
    """One class label per row of class scores; the classes lie along axis 1, as torch has it."""
    if predictions.ndim < 2:
        why = "class labels need a class axis, [N, C, ...]"
        raise InputError(MSG_DRAW.format(loss=loss.words, shape=list(predictions.shape), why=why))
    classes = predictions.shape[1]
    labels = sizes or (predictions.shape[0], *predictions.shape[2:])
    return torch.randint(
        classes, labels, generator=generator
    ), f"random labels of {classes} classes"


def _floats(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    return torch.randn(sizes, generator=generator).to(like.dtype), "random normal numbers"


def _coins(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    return torch.randint(2, sizes, generator=generator).to(like.dtype), "random zeros and ones"


def _signs(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    return (2 * torch.randint(2, sizes, generator=generator) - 1).to(like.dtype), "random signs"


def _counts(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> tuple[Tensor, str]:
    return torch.randint(5, sizes, generator=generator).to(like.dtype), "random counts from 0 to 4"


def _probabilities(
    sizes: tuple[int, ...], like: Tensor, generator: torch.Generator
) -> tuple[Tensor, str]:
    scores = torch.randn(sizes, generator=generator).to(like.dtype)
    return scores.softmax(min(1, len(sizes) - 1)), "random probabilities along the class axis"


FITTING = {
    "floats": _floats,
    "coins": _coins,
    "signs": _signs,
    "counts": _counts,
    "probabilities": _probabilities,
}


def _nothing(predictions: Any) -> Tensor:
    """A loss that asks nothing of the predictions."""
    return torch.zeros(())


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(
            None, None
        )
    except TypeError:
        return True
    except ValueError:
        return False
    return False


# --- words ----------------------------------------------------------------------------------------


def _hint(word: str, known: Sequence[str], otherwise: str) -> str:
    close = get_close_matches(word, known, n=3)
    return f"Did you mean {' or '.join(close)}?" if close else otherwise


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
