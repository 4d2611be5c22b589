"""The operations through which samples depend on each other, each split in two.

    statistic = S(x_1, .., x_N)        a function of the inputs of all samples
    y_n       = f(x_n, statistic)      what sample n makes of it

For a reduction over samples the output is the statistic; for batch norm the statistic is mean and
variance. An operation is read off the call of a torch function, and crosses samples only if the
axis that it combines is the one that is cut by samples. What is not in the tables of this file is
taken for an operation on each sample alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Axes = list[int | None]  # per input, the axis that is cut by samples


@dataclass(frozen=True)
class Coupling:
    """How samples are combined.

    ``statistic(*inputs of all samples)`` and ``finish(*inputs of one sample, statistic)``. A
    statistic is ``bounded`` if its size does not grow with the number of samples.
    """

    statistic: Callable[..., Any]
    finish: Callable[..., Any]
    bounded: bool = True


@dataclass(frozen=True)
class Operation:
    """A call that may combine samples, or that draws noise.

    ``coupling(axes)`` is None where the call combines no samples. ``drop_probability`` is that of a
    dropout, whose noise differs between samples.
    """

    name: str
    inputs: list[Tensor]
    coupling: Callable[[Axes], Coupling | None]
    drop_probability: float = 0.0


# --- the tables -----------------------------------------------------------------------------------


def _functions(names: str, *owners: Any) -> list[Any]:
    functions = []
    for owner in owners:
        for name in names.split():
            function = getattr(owner, name, None)
            if function is not None:
                functions.append(function)
    return functions


REDUCTIONS = _functions(
    "mean sum var std var_mean std_mean amax amin prod logsumexp", torch, Tensor
)
NORMS = [*_functions("norm", torch, Tensor), torch.linalg.vector_norm]
SOFTMAX = _functions("softmax log_softmax", torch, Tensor, F)
PRODUCTS = _functions("matmul mm __matmul__", torch, Tensor)


def operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """Return the operation behind a call; None if it combines no samples, whatever the axes."""
    if func is F.batch_norm:
        return _batch_norm(args, kwargs)
    if func is F.dropout:
        return _dropout(args, kwargs)
    if func in REDUCTIONS:
        return _reduction(func, args, kwargs, dim_position=1)
    if func in NORMS:
        # ``norm(x, p, dim)``
        return _reduction(func, args, kwargs, dim_position=2)
    if func in SOFTMAX:
        return _softmax(func, args, kwargs)
    if func in PRODUCTS:
        return _product(func, args)
    if func is torch.einsum:
        return _einsum(args)
    return None


# --- along an axis --------------------------------------------------------------------------------


def _if_along(
    over: Collection[int], statistic: Callable[..., Any], finish: Callable[..., Any]
) -> Callable[[Axes], Coupling | None]:
    """Return a coupling for the case that the input is cut along one of some axes."""

    def coupling(axes: Axes) -> Coupling | None:
        if axes[0] in over:
            return Coupling(statistic, finish)
        return None

    return coupling


def _reduction(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dim_position: int
) -> Operation:
    x, *others = args
    over = _reduced_axes(_dim_argument(args, kwargs, dim_position), x.ndim)

    def statistic(x: Tensor) -> Any:
        return func(x, *others, **kwargs)

    def finish(x: Tensor, reduced: Any) -> Any:
        return reduced

    return Operation(func.__name__, [x], _if_along(over, statistic, finish))


def _dim_argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> Any:
    # PyTorch takes the name of numpy as well.
    for name in ("dim", "axis"):
        if name in kwargs:
            return kwargs[name]
    if len(args) > position:
        return args[position]
    return None


def _reduced_axes(dim: Any, ndim: int) -> set[int]:
    """Return the axes that a reduction runs over; all of them where none is named."""
    if dim is None or isinstance(dim, bool) or dim == ():
        return set(range(ndim))
    if isinstance(dim, int):
        return {dim % ndim}
    return {d % ndim for d in dim}


def _softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    """``exp(x - log Σ exp x)``, or its logarithm."""
    x = args[0]
    dim = _dim_argument(args, kwargs, 1)

    def statistic(x: Tensor) -> Tensor:
        return x.logsumexp(dim, keepdim=True)

    def finish(x: Tensor, log_total: Tensor) -> Tensor:
        log_softmax = x - log_total
        if "log" in func.__name__:
            return log_softmax
        return log_softmax.exp()

    return Operation(func.__name__, [x], _if_along({dim % x.ndim}, statistic, finish))


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """``(x - mean) / √(var + eps) · weight + bias``; moments over all axes but the channels'."""
    arguments = _bound(F.batch_norm, args, kwargs)
    if not arguments["training"]:
        return None
    x, eps = arguments["input"], arguments["eps"]
    weight, bias = arguments["weight"], arguments["bias"]
    over = [d for d in range(x.ndim) if d != 1]
    channels = [1, -1] + [1] * (x.ndim - 2)
    # Running statistics are not updated: they do not enter the result.

    def statistic(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(over, keepdim=True), x.var(over, unbiased=False, keepdim=True)

    def finish(x: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
        mean, var = moments
        y = (x - mean) / (var + eps).sqrt()
        if weight is not None:
            y = y * weight.reshape(channels)
        if bias is not None:
            y = y + bias.reshape(channels)
        return y

    return Operation("batch_norm", [x], _if_along(over, statistic, finish))


# --- products -------------------------------------------------------------------------------------


def _product(func: Any, args: tuple[Any, ...]) -> Operation | None:
    """``a @ b``: a sum over samples, a product for each sample, or all pairs of samples."""
    a, b = args
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None

    def coupling(axes: Axes) -> Coupling | None:
        if None in axes:
            # One side is the same for all samples.
            return None
        if a.ndim == b.ndim > 2 and axes == [0, 0]:
            # A batch of products, one for each sample.
            return None
        if axes == [a.ndim - 1, max(b.ndim - 2, 0)]:
            # The axis that is summed over.
            return Coupling(func, lambda a, b, total: total)
        # Every sample is multiplied with the ``b`` of all others.
        return Coupling(lambda a, b: b, lambda a, b, all_b: func(a, all_b), bounded=False)

    return Operation(func.__name__, [a, b], coupling)


def _einsum(args: tuple[Any, ...]) -> Operation:
    """A sum over samples where their letter is not in the output.

    Where it is in the output, the letter stands for one sample at a time.
    """
    equation, *operands = args
    inputs, output = equation.replace(" ", "").split("->")

    def statistic(*xs: Tensor) -> Tensor:
        return torch.einsum(equation, *xs)

    def finish(*xs_and_total: Tensor) -> Tensor:
        return xs_and_total[-1]

    def coupling(axes: Axes) -> Coupling | None:
        if None in axes:
            return None
        # The letters that are cut by samples.
        letters = set()
        for term, axis in zip(inputs.split(","), axes, strict=True):
            letters.add(term[axis])
        if letters <= set(output):
            return None
        return Coupling(statistic, finish)

    return Operation("einsum", operands, coupling)


# --- noise ----------------------------------------------------------------------------------------


def _dropout(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    arguments = _bound(F.dropout, args, kwargs)
    if not arguments["training"] or not arguments["p"]:
        return None

    def no_coupling(axes: Axes) -> None:
        return None

    return Operation("dropout", [arguments["input"]], no_coupling, arguments["p"])


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name, defaults included."""
    call = inspect.signature(func).bind(*args, **kwargs)
    call.apply_defaults()
    return call.arguments
