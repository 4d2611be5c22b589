"""How the ops that PyTorch picks on a GPU are recorded and replayed.

A GPU runs one fused op where a CPU runs several. Here stands which plain ops a fused one is the
same as: it is recorded as those, so that whatever is known of them holds for it. Those that are
recorded as they are have rows in ``ops.py``, and rules with those of other ops. Beside that: which
of their arguments matter, and which of them cannot be run again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unbatch.capture import ops
from unbatch.capture.recurrent_ops import GRU, LSTM, cell
from unbatch.capture.steps import Step
from unbatch.capture.trees import tensors_in
from unbatch.errors import MSG_RECURRENT_DROPOUT, MSG_RECURRENT_EVAL, StructureError

aten = torch.ops.aten


def decisive_arguments(op: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Return the arguments whose entries decide the numbers and booleans that an op returns.

    Python reads those numbers, so that it reads the entries behind them.
    """
    # None: nothing is known of the op, and all of them may matter.
    names = ops.traits(op).answers_from
    if names is None:
        return args, kwargs
    arguments = ops.bound(op, args, kwargs)
    return tuple(arguments[name] for name in names)


def decisive_for_errors(op: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors by whose numbers an op may raise an error."""
    names = ops.raises_by(op)
    if not names:
        return []
    arguments = ops.by_argument(op, args, kwargs)
    tensors = tensors_in([arguments.get(name) for name in names])
    if ops.base_name(op) in ops.DIVIDES:
        return [t for t in tensors if not (t.is_floating_point() or t.is_complex())]
    return list(tensors)


def without_packed_weights(op: Any, args: Any) -> Any:
    """Return the arguments of a recurrence without the block of memory that holds all its weights.

    It shows again what is in the weights. On a replay those are others, and it still shows the old.
    """
    recurrence = ops.traits(op).recurrence
    if recurrence is None or not recurrence.packed:
        return args
    place = ops.argument_names(op).index(recurrence.packed)
    if place >= len(args):
        return args
    return (*args[:place], None, *args[place + 1 :])


def check_recurrences(steps: Iterable[Step], trained: Callable[[Any], bool]) -> None:
    """Raise ``StructureError`` for recurrences of a GPU that cannot be run again, or pulled back.

    The random state of a dropout inside one cannot be set, and in eval mode the libraries have no
    backward pass. ``trained``: whether a gradient is taken by a value.
    """
    for step in steps:
        recurrence = ops.traits(step.op).recurrence
        if recurrence is None:
            continue
        arguments = step.named
        place = f"{step.module or 'The model'}, {step.name}"
        if step.where:
            place = f"{place}, {step.where},"
        # The library keeps the random state to itself: another run would drop other entries.
        if step.noise:
            dropout = arguments[recurrence.dropout]
            raise StructureError(MSG_RECURRENT_DROPOUT.format(place=place, dropout=dropout))
        # In training it also returns what its backward pass needs; in eval mode it does not.
        if arguments[recurrence.training]:
            continue
        if any(map(trained, arguments[recurrence.weights])):
            raise StructureError(MSG_RECURRENT_EVAL.format(place=place))


# --- what an op of a GPU is the same as -----------------------------------------------------------


@dataclass(frozen=True)
class Composition:
    """A function of plain PyTorch that computes what an op does.

    ``taken``: the arguments of the op that it takes, by their names in the op's schema.
    ``ignored``: those on which no number depends.
    """

    function: Callable[..., Any]
    taken: frozenset[str]
    ignored: frozenset[str]


SAME_AS: dict[str, Composition] = {}


def same_as(names: str, ignored: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as what ops (space-separated, without ``aten::``) are the same as.

    It names its arguments as the op does, and returns the op's results in order, tensors and
    numbers; it leaves out the last ones, or returns None for one, where they are a library's own
    notes. It may return ``NotImplemented`` for a call that it is not the same as, before it runs
    anything.

    An argument that it does not take has to be None, or at its default, unless it is ``ignored``:
    otherwise the call is recorded as it is, and unknown.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        taken = frozenset(inspect.signature(function).parameters)
        composition = Composition(function, taken, frozenset(ignored.split()))
        for name in names.split():
            if name in SAME_AS:
                raise ValueError(f"{name!r} is the same as {SAME_AS[name].function} already")
            SAME_AS[name] = composition
        return function

    return register


def is_composed(op: Any) -> bool:
    """Tell whether an op is the same as a function of plain PyTorch."""
    return ops.full_name(op) in SAME_AS


def composed(op: Any, args: Any, kwargs: Any) -> Any:
    """Return what plain ops make of a call; ``NotImplemented`` where they are not the same."""
    composition, defaults = SAME_AS[ops.full_name(op)], ops.defaults(op)
    taken = {}
    for name, argument in ops.bound(op, args, kwargs).items():
        if name in composition.taken:
            taken[name] = argument
        elif name not in composition.ignored and not _left_out(argument, defaults.get(name)):
            return NotImplemented
    return composition.function(**taken)


def _left_out(argument: Any, default: Any) -> bool:
    if isinstance(argument, Tensor):
        return False
    return argument is None or argument == default


SETTINGS = "benchmark deterministic allow_tf32"  # of a library: how it computes, not what


@same_as("cudnn_convolution miopen_convolution miopen_depthwise_convolution", ignored=SETTINGS)
def _convolution(
    self: Tensor,
    weight: Tensor,
    padding: Any,
    stride: Any,
    dilation: Any,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    still = [0] * len(stride)
    return aten.convolution(self, weight, bias, stride, padding, dilation, False, still, groups)


@same_as("cudnn_convolution_transpose miopen_convolution_transpose", ignored=SETTINGS)
def _transposed_convolution(
    self: Tensor,
    weight: Tensor,
    padding: Any,
    output_padding: Any,
    stride: Any,
    dilation: Any,
    groups: int,
    bias: Tensor | None = None,
) -> Tensor:
    geometry = stride, padding, dilation, True, output_padding
    return aten.convolution(self, weight, bias, *geometry, groups)


@same_as("_cudnn_ctc_loss miopen_ctc_loss", ignored="deterministic")
def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    zero_infinity: bool,
) -> Tensor:
    """The loss whose second derivative is missing with an error.

    The library's is zero without saying so.
    """
    # The library may want labels on the CPU.
    labels, lengths = targets.to(log_probs.device), (input_lengths, target_lengths)
    if isinstance(input_lengths, Tensor):
        lengths = input_lengths.to(log_probs.device), target_lengths.to(log_probs.device)
    return aten._ctc_loss(log_probs, labels, *lengths, blank, zero_infinity)[0]


@same_as("cudnn_grid_sampler")
def _grid_sampler(self: Tensor, grid: Tensor) -> Tensor:
    # The library has one form, which other names fix: the one with these arguments.
    bilinear, zeros, corners_aligned = 0, 0, True
    return aten.grid_sampler_2d(self, grid, bilinear, zeros, corners_aligned)


@same_as("cudnn_affine_grid_generator")
def _affine_grid(theta: Tensor, N: int, C: int, H: int, W: int) -> Tensor:
    corners_aligned = True
    return aten.affine_grid_generator(theta, [N, C, H, W], corners_aligned)


# --- attention ------------------------------------------------------------------------------------


@same_as("_flash_attention_forward", ignored="max_q max_k return_debug_mask num_splits")
def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Any:
    """Attention of [n, t, head, d]; several heads of queries may share one of keys."""
    # It does not say what it drops, and counts from the last position where lengths differ.
    if dropout_p or (is_causal and query.shape[1] != key.shape[1]):
        return NotImplemented
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    how = None, 0.0, is_causal
    attended = aten._scaled_dot_product_attention_math(*heads, *how, scale=scale, enable_gqa=True)
    return attended[0].transpose(1, 2)


@same_as("_efficient_attention_forward", ignored="max_seqlen_q max_seqlen_k compute_log_sumexp")
def _efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    custom_mask_type: int,
    scale: float | None,
) -> Any:
    """Attention of [n, t, head, d]."""
    # Masks: none, and causal counted from the first or from the last position.
    longest = query.shape[1], key.shape[1]
    is_causal = custom_mask_type > 0
    if dropout_p or (custom_mask_type == 2 and longest[0] != longest[1]):
        return NotImplemented
    if bias is not None and is_causal:
        return NotImplemented
    heads = [x.transpose(1, 2) for x in (query, key, value)]
    attended = aten._scaled_dot_product_attention_math(*heads, bias, 0.0, is_causal, scale=scale)
    return attended[0].transpose(1, 2), None, None, None, *longest


# --- one step of a recurrence ---------------------------------------------------------------------


@same_as("_thnn_fused_lstm_cell")
def _lstm_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    cx: Tensor,
    input_bias: Tensor | None,
    hidden_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gates, recurrent = _biased(input_gates, input_bias), _biased(hidden_gates, hidden_bias)
    return cell(gates, recurrent, cx, cx, LSTM)


@same_as("_thnn_fused_gru_cell")
def _gru_cell(
    input_gates: Tensor,
    hidden_gates: Tensor,
    hx: Tensor,
    input_bias: Tensor | None,
    hidden_bias: Tensor | None,
) -> Tensor:
    gates, recurrent = _biased(input_gates, input_bias), _biased(hidden_gates, hidden_bias)
    return cell(gates, recurrent, hx, hx, GRU)[0]


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return gates
    return gates + bias
