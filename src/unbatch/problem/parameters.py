"""Which parameters a problem has, and which of them a question is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbatch import errors
from unbatch.errors import InputError
from unbatch.linalg.space import names_of

Selection = str | Tensor | Iterable[str | Tensor] | None


def parameters_of(model: Any, loss: Any, passed: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the parameters by name: those ``passed``, or those of the model; and of the loss.

    Raises ``InputError`` where a parameter or a buffer is on the meta device.
    """
    parameters: dict[str, Tensor] = dict(passed or {})
    # Passed parameters are all that a function has, even where it is a module.
    if passed is None and isinstance(model, nn.Module):
        parameters |= dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        parameters |= _parameters_of_loss(loss, parameters)
    _check_values_exist("Parameter", parameters)
    # Without values nothing runs, and PyTorch would say so in terms of its own.
    for function in (model, loss):
        if isinstance(function, nn.Module):
            _check_values_exist("Buffer", dict(function.named_buffers()))
    return parameters


def _parameters_of_loss(loss: nn.Module, others: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return those that the loss does not share with the model, which has named them already."""
    shared = {id(p) for p in others.values()}
    named: dict[str, Tensor] = {}
    for name, p in loss.named_parameters():
        if id(p) not in shared:
            named[f"loss.{name}"] = p
    return named


def _check_values_exist(what: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise InputError(errors.MSG_LAZY.format(what=what, name=name))
        if tensor.device.type == "meta":
            raise InputError(errors.MSG_META.format(what=what, name=name))


def select(parameters: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """Return the parameters meant by names, globs (``"layers.*.weight"``) or tensors.

    In the order of ``parameters``; by default all that require gradients. Raises ``InputError`` for
    what is no parameter or does not require a gradient.
    """
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trained:
        raise InputError(errors.MSG_NO_PARAMETERS if parameters else errors.MSG_NO_PARAMETERS_KNOWN)
    if selection is None:
        return trained
    # Collected first: globs may overlap, and the order is that of the model.
    names: set[str] = set()
    for item in _items(selection, parameters):
        names.update(_matches(item, parameters))
    # Named and fixed is a mistake, where by default the fixed ones are left out in silence.
    for name in parameters:
        if name in names and name not in trained:
            raise InputError(errors.MSG_FIXED_PARAMETER.format(name=name))
    return {name: p for name, p in trained.items() if name in names}


def _items(selection: Selection, parameters: Mapping[str, Tensor]) -> Sequence[str | Tensor]:
    """Return the parts of a selection; raise ``InputError`` where it has none."""
    if isinstance(selection, str | Tensor):
        return [selection]
    items = list(selection) if isinstance(selection, Iterable) else []
    if not items or not all(isinstance(item, str | Tensor) for item in items):
        text = errors.MSG_NO_SELECTION.format(value=selection, names=names_of(parameters))
        raise InputError(text)
    return items


def _matches(item: str | Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names that one part of a selection means; raise ``InputError`` for none."""
    if isinstance(item, Tensor):
        matches = [name for name, p in parameters.items() if p is item]
        shown = f"a tensor of shape {tuple(item.shape)}"
    else:
        # A name may hold characters that mean something in a glob, so it is compared as well.
        matches = [name for name in parameters if name == item or fnmatchcase(name, item)]
        shown = repr(item)
    if not matches:
        text = errors.MSG_NO_SUCH_PARAMETER.format(value=shown, names=names_of(parameters))
        raise InputError(text + _hint(item, parameters))
    return matches


def _hint(item: str | Tensor, parameters: Mapping[str, Tensor]) -> str:
    """Return a question with the names that are spelled almost alike; empty for none."""
    if not isinstance(item, str):
        return ""
    close = get_close_matches(item, parameters, 3)
    if not close:
        return ""
    return f" Did you mean {' or '.join(map(repr, close))}?"
