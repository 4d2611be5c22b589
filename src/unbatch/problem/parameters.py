"""Which parameters a question is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from unbatch import errors
from unbatch.errors import InputError
from unbatch.linalg.space import names_of


def parameters_of(model: Any, loss: Any, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    out: dict[str, Tensor] = dict(given or {})
    if given is None and isinstance(model, nn.Module):
        out |= dict(model.named_parameters())
    if isinstance(loss, nn.Module):
        out |= {
            f"loss.{n}": p
            for n, p in loss.named_parameters()
            if not any(p is q for q in out.values())
        }
    buffers = [
        named for m in (model, loss) if isinstance(m, nn.Module) for named in m.named_buffers()
    ]
    for what, named in (("Parameter", out.items()), ("Buffer", buffers)):
        for name, t in named:
            if t.device.type == "meta":
                raise InputError(errors.MSG_META.format(what=what, name=name))
    return out


Selection = str | Tensor | Iterable[str | Tensor] | None


def select(parameters: Mapping[str, Tensor], wanted: Selection) -> dict[str, Tensor]:
    """The parameters meant by names, globs (``"layers.*.weight"``) or tensors; all that require gradients by default.

    In the order of ``parameters``. Raises ``InputError`` for what is no parameter or does not require a gradient.
    """
    trained = {n: p for n, p in parameters.items() if p.requires_grad}
    if not trained:
        raise InputError(errors.MSG_NO_PARAMETERS if parameters else errors.MSG_NO_PARAMETERS_KNOWN)
    if wanted is None:
        return trained
    asked: Sequence[str | Tensor] = (
        [wanted] if isinstance(wanted, str | Tensor) else _listed(wanted, parameters)
    )
    chosen = {n for w in asked for n in _meant(w, parameters)}
    fixed = [n for n in parameters if n in chosen and n not in trained]
    if fixed:
        raise InputError(errors.MSG_FIXED_PARAMETER.format(name=fixed[0]))
    return {n: p for n, p in trained.items() if n in chosen}


def _listed(wanted: Iterable[str | Tensor], parameters: Mapping[str, Tensor]) -> list[str | Tensor]:
    asked = list(wanted) if isinstance(wanted, Iterable) else []
    if not asked or not all(isinstance(w, str | Tensor) for w in asked):
        raise InputError(errors.MSG_NO_SELECTION.format(value=wanted, names=names_of(parameters)))
    return asked


def _meant(wanted: str | Tensor, parameters: Mapping[str, Tensor]) -> list[str]:
    if isinstance(wanted, Tensor):
        found = [n for n, p in parameters.items() if p is wanted]
        what = f"a tensor of shape {tuple(wanted.shape)}"
    else:
        found = [n for n in parameters if n == wanted or fnmatchcase(n, wanted)]
        what = repr(wanted)
    if not found:
        close = get_close_matches(str(wanted), parameters, 3) if isinstance(wanted, str) else []
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(
            errors.MSG_NO_SUCH_PARAMETER.format(value=what, names=names_of(parameters)) + hint
        )
    return found
