"""Losses by name, and random targets that fit them.

Which targets a loss of ``torch.nn.functional`` takes is a table; for the loss of a user they are
typed, or floats in the shape of the predictions. How shapes are typed is in ``parsing.py``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.cli.parsing import Shape, kind_of, named, suggestion
from unbatch.errors import InputError
from unbatch.problem.problem import Problem

MSG_LOSS = (
    "There is no loss {value!r}. {hint} Built in are {names}; a loss of your own is "
    "path/to/file.py:function or package.module:function, called as function(predictions, targets)."
)


MSG_NOT_LOSS = "The loss {value!r} must be callable as loss(predictions, targets); it is {kind}."


MSG_DRAW = (
    "No targets can be drawn for {loss} and predictions {shape}: {why}. Say what they look like: "
    "--targets SHAPE:DTYPE."
)


# --- losses ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss, its name for the report, and the kind of targets it takes ("" if not known)."""

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


# Short names in common use, without "_loss".
ALIASES = {
    "bce": "binary_cross_entropy",
    "bce_with_logits": "binary_cross_entropy_with_logits",
    "ce": "cross_entropy",
}


# The default of kl_div divides by the classes as well, and warns about that.
ARGUMENTS = {"kl_div": {"reduction": "batchmean"}}


def find_loss(value: str) -> Loss:
    """Return a loss of ``torch.nn.functional``, or one of the user's by its place.

    Raises ``InputError`` for what is neither.
    """
    # No name in torch has a colon.
    if ":" in value:
        return _loss_at(value)
    name = _full_name(value)
    if name not in KINDS:
        # Without the suffix, as they are usually typed.
        names = [n.removesuffix("_loss") for n in KINDS]
        hint = suggestion(value, [*names, *ALIASES], "")
        raise InputError(MSG_LOSS.format(value=value, hint=hint, names=", ".join(names)))
    function = getattr(F, name)
    words = f"torch.nn.functional.{name}"
    arguments = ARGUMENTS.get(name, {})
    if arguments:
        function = functools.partial(function, **arguments)
    for argument, choice in arguments.items():
        words += f", {argument}={choice!r}"
    return Loss(function, words, KINDS[name])


def _loss_at(place: str) -> Loss:
    """Return the function at a place; a class of modules is called without arguments."""
    function = named(place, "--loss")
    if isinstance(function, type) and issubclass(function, nn.Module):
        function = function()
    if not callable(function):
        raise InputError(MSG_NOT_LOSS.format(value=place, kind=kind_of(function)))
    return Loss(function, place)


def _full_name(value: str) -> str:
    """Return the name in torch of "ce", "mse" or "mse_loss"."""
    stem = value.removesuffix("_loss")
    name = ALIASES.get(stem, stem)
    if name in KINDS:
        return name
    return f"{stem}_loss"


# --- targets --------------------------------------------------------------------------------------


def draw_targets(
    loss: Loss, shape: Shape | None, model: nn.Module, X: Any, generator: torch.Generator
) -> tuple[Tensor | None, str]:
    """Return random targets and how they were drawn, in words.

    ``shape``: as typed; without a dtype it gives the sizes only. Raises ``InputError`` where the
    predictions do not determine which targets fit, ``CaptureError`` where the model raises.
    """
    # For a loss of the table sizes alone do not say what to draw: labels have to be in range.
    if shape is not None and (shape.dtype is not None or not loss.kind):
        return shape.draw(generator), f"{shape}, drawn at random"
    if not loss.kind and _takes_one(loss.function):
        return None, "none, the loss takes predictions only"
    # By a problem, which leaves running statistics and random states of the model as they were.
    predictions = Problem(model, _zero, (X, None)).predictions()
    if not isinstance(predictions, Tensor):
        kind = kind_of(predictions)
        text = MSG_DRAW.format(loss=loss.words, shape=kind, why="they are not one tensor")
        raise InputError(text)
    sizes = None
    remark = "; say --targets for others"
    if shape is not None:
        sizes, remark = shape.sizes, ""
    if loss.kind == "classes":
        y, words = _classes(loss, predictions, sizes, generator)
    else:
        draw = DRAWS[loss.kind or "floats"]
        y, words = draw(sizes or tuple(predictions.shape), predictions, generator)
    return y, f"{words} of shape {list(y.shape)}, drawn to fit the loss{remark}"


def _zero(predictions: Any) -> Tensor:
    """A loss with which the model can be run before there are targets."""
    return torch.zeros(())


def _takes_one(function: Callable[..., Any]) -> bool:
    """Return whether a loss takes predictions and nothing else, as far as its signature shows."""
    if isinstance(function, nn.Module):
        function = function.forward
    # Binding counts the arguments, and calls nothing.
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return True
    except ValueError:  # not written in Python
        return False
    return False


def _classes(
    loss: Loss, predictions: Tensor, sizes: tuple[int, ...] | None, generator: torch.Generator
) -> tuple[Tensor, str]:
    """Return one class label per row of class scores; classes lie along axis 1, as torch has it."""
    if predictions.ndim < 2:
        why = "class labels need a class axis, [N, C, ...]"
        raise InputError(MSG_DRAW.format(loss=loss.words, shape=list(predictions.shape), why=why))
    classes = predictions.shape[1]
    sizes = sizes or (predictions.shape[0], *predictions.shape[2:])
    labels = torch.randint(classes, sizes, generator=generator)
    return labels, f"random labels of {classes} classes"


# Each returns targets of some sizes, in the dtype of the predictions, and what they are.

Drawn = tuple[Tensor, str]


def _floats(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Drawn:
    return torch.randn(sizes, generator=generator).to(like.dtype), "random normal numbers"


def _coins(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Drawn:
    return torch.randint(2, sizes, generator=generator).to(like.dtype), "random zeros and ones"


def _signs(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Drawn:
    coins = torch.randint(2, sizes, generator=generator)
    return (2 * coins - 1).to(like.dtype), "random signs"


def _counts(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Drawn:
    return torch.randint(5, sizes, generator=generator).to(like.dtype), "random counts from 0 to 4"


def _probabilities(sizes: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Drawn:
    # A softmax sums to one along the classes, as kl_div takes its targets.
    scores = torch.randn(sizes, generator=generator).to(like.dtype)
    class_axis = min(1, len(sizes) - 1)
    return scores.softmax(class_axis), "random probabilities along the class axis"


DRAWS: dict[str, Callable[[tuple[int, ...], Tensor, torch.Generator], Drawn]] = {
    "floats": _floats,
    "coins": _coins,
    "signs": _signs,
    "counts": _counts,
    "probabilities": _probabilities,
}
