"""What is true of an operation, whoever asks: a row for each, and what PyTorch says of the others.

Here stands that an op moves entries, writes, reads only shapes, draws random numbers or is a batch
norm, and under which names a GPU runs it. What follows from that for samples, derivatives or
pictures stands where it is needed.

A row is looked up by the base name of an op: ``aten::add_`` and ``aten::add.Tensor`` are both
"add", if ``forms.txt`` has them. Where a schema or a tag says it, it is read from there, and there
is no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch

from unbatch.capture.forms import full_name as full_name

# Arguments that say where and how a result is kept, and nothing about its numbers.
PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "non_blocking")

# Ops that draw until a number is accepted, or a slope for each number below zero: how often depends
# on their arguments.
REJECTION = ("poisson", "_standard_gamma", "_sample_dirichlet", "binomial", "rrelu_with_noise")


class Moves(Enum):
    """Which entries of its operand an op that computes nothing returns, and in which order."""

    SAME = "all of them, in the same shape"
    RESHAPED = "all of them, in the same order, in another shape"
    PERMUTED = "all of them, in another order"
    PART = "some of them"
    REPEATED = "all of them, several times"


@dataclass(frozen=True)
class HiddenWrites:
    """Arguments that an op writes to although its schema does not say so.

    Only if the argument ``when`` is true.
    """

    arguments: tuple[str, ...]
    when: str = ""  # always

    def happen(self, arguments: Mapping[str, Any]) -> bool:
        """Tell whether a call with these ``arguments``, by name, writes."""
        return not self.when or bool(arguments.get(self.when))


@dataclass(frozen=True)
class BatchNorm:
    """Where a batch norm has what, by the names of its arguments and the numbers of its outputs.

    All forms call their tensors ``input``, ``weight``, ``bias``, ``running_mean``, ``running_var``.
    """

    training: bool | None = None  # None: its argument ``training`` says so
    eps: str = "eps"
    mean: int | None = 1  # of the batch, in training
    invstd: int | None = 2  # ``1/σ`` of the batch, in training
    running: tuple[int, ...] = ()  # the running statistics afterwards, where they are returned


@dataclass(frozen=True)
class Dropout:
    """The dropout in an op, by the names of the arguments that say whether it drops anything.

    It does not if the argument ``when`` is False, or the argument ``probability`` zero.
    """

    when: str = ""  # whatever the mode
    probability: str = ""  # whatever the probability
    alone: bool = False  # the op is nothing but dropout, and returns its mask, too

    def happens(self, arguments: Mapping[str, Any]) -> bool:
        """Tell whether entries may be dropped. ``arguments``: by name, with the defaults."""
        if self.when and arguments[self.when] is False:
            return False
        if not self.probability:
            return True
        return bool(arguments[self.probability])


@dataclass(frozen=True)
class Recurrence:
    """A recurrent network in one op, with the names of its arguments.

    ``packed``: an argument that shows again what is in the weights, as one block of memory.
    """

    weights: str = "weight"
    training: str = "train"
    dropout: str = "dropout"
    packed: str = ""


@dataclass(frozen=True)
class Traits:
    """What is true of an op beyond what its schema and its tags say."""

    moves: Moves | None = None
    # The shape of the result is an argument.
    takes_shape: bool = False
    # It moves entries to another type.
    rounds: bool = False
    pointwise: bool = False
    # Its derivative is zero, or cut off.
    cuts: bool = False
    # Of a tensor it reads the shape, and no number in it matters.
    reads_shape_only: bool = False
    # It makes its axes itself: all entries along them are alike.
    fills_shape: bool = False
    # In place, whatever was there before.
    overwrites: bool = False
    # One number for each entry, added up as its argument ``reduction`` says.
    entrywise_loss: bool = False
    # softmax(q kᵀ + mask) v by a fused kernel; its schema says what it drops (``dropout_p``).
    attention: bool = False
    # The arguments whose entries decide the numbers and booleans among its results; None: any.
    answers_from: tuple[str, ...] | None = None
    hidden_writes: HiddenWrites | None = None
    batch_norm: BatchNorm | None = None
    dropout: Dropout | None = None
    recurrence: Recurrence | None = None
    # PyTorch runs it step by step along the first axis of this argument.
    time: str = ""


PLAIN = Traits()

TRAITS: dict[str, Traits] = {}


def register(names: str, traits: Traits) -> None:
    """Enter ops, by their base names (space-separated). A second row for the same op is refused."""
    for name in names.split():
        if name in TRAITS:
            raise ValueError(f"{name!r} has a row already, {TRAITS[name]}: change that one")
        TRAITS[name] = traits


# --- the table ------------------------------------------------------------------------------------

register("alias clone contiguous lift_fresh positive", Traits(Moves.SAME))

register("detach", Traits(Moves.SAME, cuts=True))

register("_to_copy", Traits(Moves.SAME, rounds=True))

register("view _unsafe_view reshape _reshape_alias", Traits(Moves.RESHAPED, takes_shape=True))

register("unsqueeze squeeze flatten", Traits(Moves.RESHAPED))

register("t transpose permute movedim", Traits(Moves.PERMUTED))

register("slice select narrow split split_with_sizes unbind chunk", Traits(Moves.PART))

register("expand repeat", Traits(Moves.REPEATED, fills_shape=True))

register("zeros ones full empty", Traits(fills_shape=True))

register(
    "new_zeros new_ones new_full new_empty new_empty_strided "
    "zeros_like ones_like full_like empty_like",
    Traits(reads_shape_only=True, fills_shape=True),
)

register("rand_like randn_like randint_like", Traits(reads_shape_only=True))

register("sign round floor ceil", Traits(cuts=True))

register("floor_divide _prelu_kernel", Traits(pointwise=True))  # which lack the tag

# What forward mode takes functions apart into.
register("prims::add prims::sub prims::mul prims::div prims::neg", Traits(pointwise=True))

register(
    "fill copy normal uniform exponential random geometric cauchy log_normal",
    Traits(overwrites=True),
)

register("zero bernoulli", Traits(overwrites=True, cuts=True))

register(
    "mse_loss smooth_l1_loss huber_loss soft_margin_loss "
    "binary_cross_entropy binary_cross_entropy_with_logits",
    Traits(entrywise_loss=True),
)


RUNNING = ("running_mean", "running_var")

IN_TRAINING = HiddenWrites(RUNNING, "training")


# Batch norm. ``batch_norm`` itself is seen in inference mode only, which does not take it apart.
register("native_batch_norm", Traits(batch_norm=BatchNorm(), hidden_writes=IN_TRAINING))

register("_batch_norm_impl_index", Traits(batch_norm=BatchNorm(), hidden_writes=IN_TRAINING))

register(
    "batch_norm", Traits(batch_norm=BatchNorm(mean=None, invstd=None), hidden_writes=IN_TRAINING)
)

register(
    "cudnn_batch_norm miopen_batch_norm",
    Traits(batch_norm=BatchNorm(eps="epsilon"), hidden_writes=IN_TRAINING),
)

register("_native_batch_norm_legit", Traits(batch_norm=BatchNorm()))

register("_native_batch_norm_legit_functional", Traits(batch_norm=BatchNorm(running=(3, 4))))

register("_batch_norm_with_update", Traits(batch_norm=BatchNorm(training=True)))

register(
    "_batch_norm_with_update_functional",
    Traits(batch_norm=BatchNorm(training=True, running=(4, 5))),
)

register(
    "_native_batch_norm_legit_no_training _batch_norm_no_update",
    Traits(batch_norm=BatchNorm(training=False)),
)


# What it does in parts when several processes share their statistics, and its relatives.
register(
    "batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_update_stats",
    Traits(hidden_writes=HiddenWrites(RUNNING)),
)

register("instance_norm", Traits(hidden_writes=HiddenWrites(RUNNING, "use_input_stats")))

# What a GPU runs in one op.
register("native_dropout", Traits(dropout=Dropout(when="train", alone=True)))

register("_fused_dropout", Traits(dropout=Dropout(alone=True)))

IN_LAYERS = Dropout(when="train", probability="dropout")

register("_cudnn_rnn", Traits(dropout=IN_LAYERS, recurrence=Recurrence(packed="weight_buf")))

register("miopen_rnn", Traits(dropout=IN_LAYERS, recurrence=Recurrence()))

# What recurrences are recorded as (``recurrent_ops.py``).
register("unbatch::recurrent_states", Traits(cuts=True, time="x"))

# The kernels of attention that PyTorch may pick, which compute the same up to rounding.
register(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention",
    Traits(attention=True),
)

# The numbers among their results are about shapes, types and the backend.
register(
    "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable",
    Traits(attention=True, answers_from=()),
)

register(
    "_cudnn_attention_forward _efficient_attention_forward _fused_sdp_choice",
    Traits(answers_from=()),
)

# Of tensors whose sizes fit each other, as forward mode asks of a tangent.
register("is_same_size _has_same_storage_numel", Traits(answers_from=()))

register(
    "_use_cudnn_ctc_loss _use_miopen_ctc_loss",
    Traits(answers_from=("input_lengths", "target_lengths")),
)


# --- names ----------------------------------------------------------------------------------------


def stripped(name: str) -> str:
    """Return the name of an op without the underscore of in place (not so ``__and__``)."""
    if name.startswith("__"):
        return name
    return name.rstrip("_") or name


@cache
def base_name(op: Any) -> str:
    """Return the name under which everything that is known of an op is kept.

    That of a form that was not known when the tables were written is in none of them.
    """
    return stripped(full_name(op))


def names(has: Callable[[Traits], Any]) -> list[str]:
    """Return the base names of the ops whose row ``has`` a trait."""
    return [name for name, row in TRAITS.items() if has(row)]


# --- arguments ------------------------------------------------------------------------------------


@cache
def argument_names(op: Any) -> tuple[str, ...]:
    """Return the names of an op's arguments, in order."""
    return tuple(a.name for a in op._schema.arguments)


@cache
def defaults(op: Any) -> dict[str, Any]:
    """Return the default values of an op's arguments, by name."""
    return {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}


def by_argument(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, without those that were left out."""
    return {**dict(zip(argument_names(op), args, strict=False)), **kwargs}


def bound(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name, with the defaults of those that were left out."""
    return {**defaults(op), **by_argument(op, args, kwargs)}


# --- what an op does, whatever its arguments ------------------------------------------------------


def by_name(name: str) -> Traits:
    """Return the row of an op that is known by its name alone, without ``aten::``."""
    return TRAITS.get(stripped(name), PLAIN)


@cache
def traits(op: Any) -> Traits:
    """Return the row of an op; a plain one where it has none."""
    if op._schema.name == "aten::view" and op._schema.overload_name == "dtype":
        return PLAIN  # it reads the same bits as other numbers
    return TRAITS.get(base_name(op), PLAIN)


def moves(op: Any) -> Moves | None:
    """Return which entries of its operand an op returns; None if it computes others."""
    return traits(op).moves


def keeps_order(op: Any) -> bool:
    """Tell whether all entries of the operand come out, in the order in which they went in."""
    return traits(op).moves in (Moves.SAME, Moves.RESHAPED)


@cache
def is_view(op: Any) -> bool:
    """Tell whether the result shows the memory of the first argument, without writing to it."""
    if base_name(op) == "_unsafe_view":  # its schema promises that nobody will notice
        return True
    shows_memory = False
    for result in op._schema.returns:
        if result.alias_info is None:
            continue
        if result.alias_info.is_write:
            return False
        shows_memory = True
    return shows_memory


@cache
def is_composite(op: Any) -> bool:
    """Tell whether PyTorch itself takes an op apart where it is differentiated."""
    # Some have no kernel at all: what asks a tensor of another kind for its size.
    if not torch._C._dispatch_has_kernel(op.name()):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


def is_pointwise(op: Any) -> bool:
    """Tell whether an entry of the result depends on one entry of each (broadcast) operand."""
    # What gives Python a boolean has no entries, whatever its tags are (``torch.equal``).
    if torch.Tag.data_dependent_output in op.tags:
        return False
    return torch.Tag.pointwise in op.tags or traits(op).pointwise


def reads_shape_only(op: Any) -> bool:
    """Tell whether no number in the operand matters, but its shape and type."""
    return traits(op).reads_shape_only


# --- random numbers -------------------------------------------------------------------------------


def draws(op: Any) -> bool:
    """Tell whether an op may draw random numbers; with dropout switched off it does not."""
    return torch.Tag.nondeterministic_seeded in op.tags


def draws_by_rejection(op: Any) -> bool:
    """Tell whether an op's arguments decide how many random numbers it draws."""
    return base_name(op) in REJECTION


def is_dropout(op: Any) -> bool:
    """Tell whether an op is nothing but dropout, and returns its mask as well."""
    dropout = traits(op).dropout
    return dropout is not None and dropout.alone


def drops(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call drops entries, if its op can: an op of another kind counts as one."""
    arguments = bound(op, args, kwargs)
    dropout = traits(op).dropout
    if dropout is not None:
        return dropout.happens(arguments)
    return bool(arguments.get("dropout_p", True))


# Forms that are not in place of ops that write by an index or a mask.
WRITES_A_COPY = frozenset(
    {
        "_unsafe_index_put",
        "index_add",
        "index_copy",
        "index_fill",
        "index_put",
        "index_reduce",
        "masked_fill",
        "masked_scatter",
        "scatter",
        "scatter_add",
        "scatter_reduce",
    }
)

# --- what an op raises errors by ------------------------------------------------------------------


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Arguments whose numbers have to be in range, or in order.
IN_RANGE = _words(
    "index indices target targets lengths input_lengths target_lengths offsets batch_sizes "
    "pivots LU_pivots repeats info"
)

# Ops that raise errors by any of their numbers; so do those of linear algebra.
RAISES = _words(
    "cholesky cholesky_inverse lobpcg multinomial bernoulli normal poisson binomial "
    "_standard_gamma _sample_dirichlet bincount histc _histogramdd_bin_edges "
    "_histogramdd_from_bin_cts binary_cross_entropy _assert_async _functional_assert_async "
    "fake_quantize_per_channel_affine quantize_per_channel quantile nanquantile one_hot "
    "tensor_split segment_reduce masked_scatter"
)

# These divide, and whole numbers are not divided by zero.
DIVIDES = _words("div floor_divide remainder fmod true_divide gcd lcm pow")


@cache
def raises_by(op: Any) -> tuple[str, ...]:
    """Return the arguments by whose numbers an op may raise an error."""
    name, arguments = base_name(op), argument_names(op)
    if name.startswith(("linalg_", "_linalg_")) or name in RAISES:
        # What was there before an op writes noise over it does not matter.
        return arguments[1:] if writes_in_place(op) and traits(op).overwrites else arguments
    if name in DIVIDES:
        return ("other", "exponent")
    if traits(op).entrywise_loss:  # whatever the targets are
        return ()
    return tuple(a for a in arguments if a in IN_RANGE)


# --- what an op writes to -------------------------------------------------------------------------


@cache
def is_mutable(op: Any) -> bool:
    """Tell whether the schema of an op says that it writes."""
    return bool(op._schema.is_mutable)


@cache
def may_write(op: Any) -> bool:
    """Tell whether an op writes to an argument, for some arguments."""
    return is_mutable(op) or traits(op).hidden_writes is not None


@cache
def writes_in_place(op: Any) -> bool:
    """Tell whether an op returns its first argument, which it has written to."""
    first = argument_names(op)[:1]
    return bool(first) and first[0] in declared_writes(op)


@cache
def keeps_size(op: Any) -> bool:
    """Tell whether an op writes to its first argument or to a copy: the result has its size."""
    return writes_in_place(op) or base_name(op) in WRITES_A_COPY


@cache
def declared_writes(op: Any) -> tuple[str, ...]:
    """Return the arguments that an op writes to, as its schema says."""
    return tuple(
        a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    )


@cache
def results_given(op: Any) -> tuple[str, ...]:
    """Return the arguments into which a variant writes its results (``out=``)."""
    return tuple(
        a.name for a in op._schema.arguments if a.kwarg_only and a.name in declared_writes(op)
    )


def written(op: Any, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the arguments that an op writes to, when it is given ``arguments`` by name."""
    hidden = traits(op).hidden_writes
    if hidden is None or not hidden.happen(arguments):
        return declared_writes(op)
    return declared_writes(op) + hidden.arguments


def results(op: Any, arguments: Mapping[str, Any], out: Any) -> Any:
    """Return what an op has returned or, if it returns nothing, what it has written to."""
    if op._schema.returns:
        return out
    return [arguments[name] for name in declared_writes(op) if name in arguments]


@cache
def writes_results(op: Any) -> bool:
    """Tell whether derivatives go through what an op writes: not so running statistics."""
    return bool(set(declared_writes(op)) - set(RUNNING))


# --- what a backward pass does --------------------------------------------------------------------

# Arguments by which the derivative of an op, and not the op, takes all samples together: it divides
# by how often an index occurs in the batch.
JOINS_BACKWARD = ("scale_grad_by_freq",)


def joins_backward(op: Any, arguments: Mapping[str, Any]) -> bool:
    """Tell whether a sample's derivative depends on the others, though its result does not."""
    return any(arguments.get(name) for name in JOINS_BACKWARD)


# --- batch norm -----------------------------------------------------------------------------------


def is_batch_norm(op: Any) -> bool:
    """Tell whether an op is a batch norm, in training or not."""
    return traits(op).batch_norm is not None


def normalises_by_batch(op: Any, arguments: Mapping[str, Any]) -> bool:
    """Tell whether an op is a batch norm that takes the statistics of this batch.

    ``arguments``: what it is given, by name.
    """
    norm = traits(op).batch_norm
    if norm is None:
        return False
    if norm.training is not None:
        return norm.training
    return bool(arguments.get("training")) or arguments.get("running_mean") is None


def is_training_batch_norm(step: Any) -> bool:
    """Tell the same of a recorded step."""
    return normalises_by_batch(step.op, step.named)


def only_updated(op: Any, arguments: Mapping[str, Any], results: Sequence[int]) -> tuple[str, ...]:
    """Return the arguments that an op updates, and that none of these ``results`` depends on.

    The running statistics of a batch norm in training. ``arguments``: what it is given, by name.
    """
    norm = traits(op).batch_norm
    if norm is None or not normalises_by_batch(op, arguments):
        return ()
    if not set(norm.running).isdisjoint(results):
        return ()
    return RUNNING


class BatchNormArguments(NamedTuple):
    """The arguments of a batch norm, under the same names for all forms: tensors or labels."""

    input: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    eps: Any
    training: bool


def batch_norm_arguments(op: Any, arguments: Mapping[str, Any]) -> BatchNormArguments:
    """Return what a batch norm was given, from its ``arguments`` by name."""
    norm = _batch_norm(op)
    return BatchNormArguments(
        input=arguments["input"],
        weight=arguments.get("weight"),
        bias=arguments.get("bias"),
        running_mean=arguments.get("running_mean"),
        running_var=arguments.get("running_var"),
        eps=arguments[norm.eps],
        training=normalises_by_batch(op, arguments),
    )


def batch_moments(op: Any, outputs: Any) -> tuple[Any, Any] | None:
    """Return mean and ``1/σ`` of the batch among the outputs of a training batch norm.

    None where it does not return them.
    """
    norm = _batch_norm(op)
    if norm.mean is None or norm.invstd is None:
        return None
    return outputs[norm.mean], outputs[norm.invstd]


def _batch_norm(op: Any) -> BatchNorm:
    norm = traits(op).batch_norm
    if norm is None:
        listed = ", ".join(names(lambda row: row.batch_norm))
        raise ValueError(f"{op} is no batch norm in capture/ops.py; those are: {listed}")
    return norm
