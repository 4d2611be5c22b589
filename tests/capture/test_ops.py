"""The table of what is true of ops, against PyTorch itself.

Each check takes rows as data, ``{base name: traits}``, so that a planted wrong row can be fed to
it.
"""

from __future__ import annotations

import pytest
import torch

from unbatch.capture import ops
from unbatch.capture.ops import BatchNorm, Dropout, HiddenWrites, Moves, Recurrence, Traits
from unbatch.capture.steps import Step

aten = torch.ops.aten


def overloads(name):
    """The overloads of an op, in place or not, but for those that write into an ``out``."""
    out = []
    space, _, plain = name.rpartition("::")
    library = getattr(torch.ops, space or "aten")
    for spelled in (plain, f"{plain}_"):
        packet = getattr(library, spelled, None)
        for overload in packet.overloads() if packet is not None else ():
            op = getattr(packet, overload)
            if not any(a.is_out for a in op._schema.arguments):
                out.append(op)
    return out


def of_tensors(op):
    """Not an op of TorchScript on its own lists and strings."""
    return str(op._schema.arguments[0].type) == "Tensor"


def shares_memory(op):
    return any(r.alias_info is not None for r in op._schema.returns)


def argument_names(op):
    return {a.name for a in op._schema.arguments}


# --- the checks -----------------------------------------------------------------------------------


def unknown_names(rows):
    """A row for an op that PyTorch does not have says nothing."""
    return [f"{name}: there is no such op" for name in rows if not overloads(name)]


def wrong_moves(rows):
    """What an op returns is in its operand, as often as the row says; rounded, or not."""
    complaints = []
    for name, row in rows.items():
        if row.moves is not None and name in CALLS:
            kind = what_moves(name)
            if kind != row.moves:
                complaints.append(f"{name}: {kind} and not {row.moves}")
    return complaints


def untried_moves(rows):
    return [
        f"{name}: not in CALLS" for name, row in rows.items() if row.moves and name not in CALLS
    ]


CALLS = {
    "alias": (),
    "clone": (),
    "contiguous": (),
    "lift_fresh": (),
    "positive": (),
    "detach": (),
    "_to_copy": (),
    "view": ([2, 6],),
    "_unsafe_view": ([2, 6],),
    "reshape": ([2, 6],),
    "_reshape_alias": ([2, 6], [6, 1]),
    "unsqueeze": (0,),
    "squeeze": (),
    "flatten": (),
    "t": (),
    "transpose": (0, 1),
    "permute": ([2, 1, 0],),
    "movedim": ([0], [2]),
    "slice": (0, 1),
    "select": (0, 1),
    "narrow": (0, 1, 2),
    "split": (2,),
    "split_with_sizes": ([1, 2],),
    "unbind": (),
    "chunk": (2,),
    "expand": ([3, 4, 2],),
    "repeat": ([2, 1, 1],),
}


def what_moves(name):
    """The kind of movement, as a call of the op shows it."""
    x = torch.arange(12.0).reshape(3, 4, 1)
    if name == "t":
        x = x.reshape(3, 4)
    y = getattr(aten, name)(x, *CALLS[name])
    if isinstance(y, (tuple, list)):
        y = y[0]
    entries = y.flatten().tolist()
    if len(entries) > 12:
        return Moves.REPEATED
    if len(entries) < 12:
        return Moves.PART
    if sorted(entries) != entries:
        return Moves.PERMUTED
    return Moves.SAME if y.shape == x.shape else Moves.RESHAPED


def wrong_shapes(rows):
    """Whether the shape of a result is an argument is said by the arguments."""
    complaints = []
    for name, row in rows.items():
        moving = row.moves is Moves.RESHAPED
        for op in overloads(name) if moving else ():
            told = bool({"size", "shape"} & argument_names(op))
            if told != row.takes_shape and op is not aten.view.dtype:
                complaints.append(f"{op}: its shape is an argument, or not?")
    return complaints


# They return a tensor of its own, or a view, as it comes.
MAY_COPY = {"clone", "_to_copy", "repeat", "_unsafe_view"}


def wrong_views(rows):
    """What only moves entries says in its schema that it shows the memory of its operand, or
    copies.
    """
    complaints = []
    for name, row in rows.items():
        if row.moves is None or name in MAY_COPY:
            continue
        wrong = [op for op in overloads(name) if of_tensors(op) and not shares_memory(op)]
        complaints += [f"{op}: its schema shares no memory" for op in wrong]
    return complaints


def wrong_overwrites(rows):
    """What overwrites its operand has a form that writes, and says so."""
    complaints = []
    for name, row in rows.items():
        written = [op for op in overloads(name) if ops.declared_writes(op)]
        if row.overwrites and not written:
            complaints.append(f"{name}: no form of it writes")
    return complaints


def wrong_hidden_writes(rows):
    """Hidden writes are to arguments that there are, and hidden: the schema
    does not declare them.
    """
    complaints = []
    for name, row in rows.items():
        hidden = row.hidden_writes
        for op in overloads(name) if hidden is not None else ():
            missing = {*hidden.arguments, *([hidden.when] if hidden.when else [])} - argument_names(
                op
            )
            if missing:
                complaints.append(f"{op}: has no {missing}")
            declared = set(hidden.arguments) & set(ops.declared_writes(op))
            if declared:
                complaints.append(f"{op}: declares that it writes {declared}")
    return complaints


def untold_shapes(rows):
    """Every op that makes a tensor like another has a row, and no other op says that it does."""
    like = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space == "aten" and (name.endswith("_like") or name.startswith("new_")):
            like.add(name)
    listed = {name for name, row in rows.items() if row.reads_shape_only}
    return [f"{name}: reads only shapes, or not?" for name in sorted(like ^ listed)]


def useless_pointwise(rows):
    """A tag of PyTorch is not repeated."""
    complaints = []
    for name, row in rows.items():
        tagged = any(torch.Tag.pointwise in op.tags for op in overloads(name))
        if row.pointwise and tagged:
            complaints.append(f"{name}: PyTorch tags it as pointwise")
    return complaints


def wrong_losses(rows):
    complaints = []
    for name, row in rows.items():
        losses = overloads(name) if row.entrywise_loss else []
        wrong = [op for op in losses if "reduction" not in argument_names(op)]
        complaints += [f"{op}: has no argument `reduction`" for op in wrong]
    return complaints


def wrong_batch_norms(rows):
    """The arguments and outputs are where a row says that they are."""
    complaints = []
    for name, row in rows.items():
        for op in overloads(name) if row.batch_norm is not None else ():
            complaints += [f"{op}: {why}" for why in faults_of(op, row.batch_norm)]
    return complaints


def faults_of(op, norm):
    names, returns = argument_names(op), op._schema.returns
    missing = {"input", "weight", "bias", norm.eps} - names
    if missing:
        yield f"has no {missing}"
    if (norm.training is None) != ("training" in names):
        yield "is told, or not, whether to train"
    for place in (norm.mean, norm.invstd, *norm.running):
        if place is not None and place >= len(returns):
            yield f"has no output {place}"
    outputs = {place for place, r in enumerate(returns) if (r.name or "").startswith("running_")}
    if outputs != set(norm.running):
        yield f"returns running statistics as {outputs}"


def wrong_argument_names(rows):
    """What a row says of dropout, recurrences, attention and answers is about arguments that there
    are.
    """
    complaints = []
    for name, row in rows.items():
        for op in overloads(name):
            missing = named_arguments(row) - argument_names(op)
            if missing:
                complaints.append(f"{op}: has no {missing}")
    return complaints


def named_arguments(row):
    names = set(row.answers_from or ())
    if row.dropout is not None:
        names |= {row.dropout.when, row.dropout.probability}
    if row.recurrence is not None:
        recurrence = row.recurrence
        names |= {recurrence.weights, recurrence.training, recurrence.dropout, recurrence.packed}
    if row.attention:
        names |= {"query", "key", "value", "dropout_p", "is_causal", "scale"}
    if row.cell is not None:
        names |= {"input_gates", "hidden_gates", "cx" if row.cell == "LSTM" else "hx"}
    return names - {""}


def wrong_dropouts(rows):
    """What is nothing but dropout returns what it drew as well, and PyTorch knows that it draws."""
    complaints = []
    for name, row in rows.items():
        if row.dropout is None:
            continue
        for op in overloads(name):
            if row.dropout.alone and len(op._schema.returns) != 2:
                complaints.append(f"{op}: returns no mask")
            if not ops.draws(op):
                complaints.append(f"{op}: draws nothing")
    return complaints


def useless_answers(rows):
    """An op of which Python reads numbers returns some."""
    complaints = []
    for name, row in rows.items():
        for op in overloads(name) if row.answers_from is not None else ():
            useless = all(str(r.type) == "Tensor" for r in op._schema.returns)
            complaints += [f"{op}: returns tensors only"] * useless
    return complaints


def unlisted_recurrences(rows):
    """Every op of a library that takes the weights of a recurrence as a list is in the table."""
    complaints = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        names = {a.name for a in schema.arguments}
        recurrence = {"weight", "weight_stride0", "dropout"} <= names and "backward" not in name
        if space == "aten" and recurrence and (name not in rows or rows[name].recurrence is None):
            complaints.add(f"{name}: a recurrence without a row")
    return sorted(complaints)


def unlisted_attention(rows):
    """Every kernel of attention that PyTorch may pick is in the table; its plain form is none."""
    complaints = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        forward = name.startswith("_scaled_dot_product_") and "backward" not in name
        kernel = forward and "_attention_math" not in name
        if space == "aten" and kernel and (name not in rows or not rows[name].attention):
            complaints.add(f"{name}: attention without a row")
    return sorted(complaints)


def unlisted_batch_norms(rows):
    """Every op with a batch norm's arguments is in the table."""
    complaints = set()
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        names = {a.name for a in schema.arguments}
        forward = {"input", "weight", "bias", "running_mean"} <= names and "batch_norm" in name
        if space == "aten" and forward and (name not in rows or rows[name].batch_norm is None):
            complaints.add(f"{name}: a batch norm without a row")
    return sorted(complaints)


CHECKS = [
    unknown_names,
    wrong_moves,
    untried_moves,
    wrong_shapes,
    wrong_views,
    wrong_overwrites,
    wrong_hidden_writes,
    untold_shapes,
    useless_pointwise,
    wrong_losses,
    wrong_batch_norms,
    wrong_argument_names,
    wrong_dropouts,
    useless_answers,
    unlisted_attention,
    unlisted_batch_norms,
    unlisted_recurrences,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_table_holds(check):
    assert check(ops.TRAITS) == []


PLANTED = {
    "no such op": (unknown_names, {"veiw": Traits(Moves.RESHAPED)}),
    "another order": (wrong_moves, {"permute": Traits(Moves.RESHAPED)}),
    "only some": (wrong_moves, {"select": Traits(Moves.SAME)}),
    "another shape": (wrong_moves, {"unsqueeze": Traits(Moves.SAME)}),
    "shape untold": (wrong_shapes, {"reshape": Traits(Moves.RESHAPED)}),
    "no shape": (wrong_shapes, {"flatten": Traits(Moves.RESHAPED, takes_shape=True)}),
    "never tried": (untried_moves, {"diagonal": Traits(Moves.PART)}),
    "no view": (wrong_views, {"neg": Traits(Moves.SAME)}),
    "writes nothing": (
        wrong_overwrites,
        {"relu6": Traits(), "tril_indices": Traits(overwrites=True)},
    ),
    "no such argument": (
        wrong_hidden_writes,
        {"cumsum": Traits(hidden_writes=HiddenWrites(("mean",)))},
    ),
    "declared": (
        wrong_hidden_writes,
        {"_batch_norm_with_update": Traits(hidden_writes=HiddenWrites(ops.RUNNING))},
    ),
    "tagged": (useless_pointwise, {"sigmoid": Traits(pointwise=True)}),
    "no reduction": (wrong_losses, {"dist": Traits(entrywise_loss=True)}),
    "epsilon": (wrong_batch_norms, {"cudnn_batch_norm": Traits(batch_norm=BatchNorm())}),
    "no moments": (wrong_batch_norms, {"batch_norm": Traits(batch_norm=BatchNorm(invstd=None))}),
    "not told": (wrong_batch_norms, {"_batch_norm_no_update": Traits(batch_norm=BatchNorm())}),
    "running statistics": (
        wrong_batch_norms,
        {"_native_batch_norm_legit_functional": Traits(batch_norm=BatchNorm())},
    ),
    "no such probability": (
        wrong_argument_names,
        {"native_dropout": Traits(dropout=Dropout(probability="dropout"))},
    ),
    "no packed weights": (
        wrong_argument_names,
        {"miopen_rnn": Traits(recurrence=Recurrence(packed="weight_buf"))},
    ),
    "no lengths": (wrong_argument_names, {"_ctc_loss": Traits(answers_from=("lengths",))}),
    "no mask": (wrong_dropouts, {"bernoulli": Traits(dropout=Dropout(alone=True))}),
    "no query": (wrong_argument_names, {"_native_multi_head_attention": Traits(attention=True)}),
    "no cell": (wrong_argument_names, {"_thnn_fused_gru_cell": Traits(cell="LSTM")}),
    "no draws": (wrong_dropouts, {"frexp": Traits(dropout=Dropout(alone=True))}),
    "no answers": (useless_answers, {"relu": Traits(answers_from=())}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wrong_row_is_caught(name):
    check, rows = PLANTED[name]
    assert check(rows)


@pytest.mark.parametrize(
    "check", [untold_shapes, unlisted_attention, unlisted_batch_norms, unlisted_recurrences]
)
def test_a_missing_row_is_caught(check):
    rows = dict(ops.TRAITS)
    del rows["zeros_like"], rows["miopen_batch_norm"], rows["miopen_rnn"]
    del rows["_scaled_dot_product_cudnn_attention"]
    assert len(check(rows)) == 1


def test_a_second_row_is_refused():
    before = dict(ops.TRAITS)
    with pytest.raises(ValueError, match="'view' has a row already"):
        ops.register("view", Traits(Moves.PERMUTED))
    assert before == ops.TRAITS


# --- names, and questions that are asked of an op -------------------------------------------------


@pytest.mark.parametrize(
    ("op", "full", "base"),
    [
        (aten.add.Tensor, "add", "add"),
        (aten.add_.Tensor, "add_", "add"),
        (aten._to_copy.default, "_to_copy", "_to_copy"),
        (aten.__and__.Tensor, "__and__", "__and__"),
        (aten.__iand__.Tensor, "__iand__", "__iand__"),
        (torch.ops.prims.mul.default, "prims::mul", "prims::mul"),
    ],
)
def test_names(op, full, base):
    assert ops.full_name(op) == full
    assert ops.base_name(op) == base


def test_a_view_as_another_type_moves_nothing():
    assert ops.moves(aten.view.default) is Moves.RESHAPED
    assert ops.moves(aten.view.dtype) is None


def test_an_op_of_another_library_has_no_row_of_aten():
    with torch.library._scoped_library("unbatch_test", "DEF") as library:
        library.define("scale_like(Tensor x) -> Tensor")
        library.define("view(Tensor x) -> Tensor")
        space = torch.ops.unbatch_test
        assert not ops.reads_shape_only(space.scale_like.default)
        assert ops.moves(space.view.default) is None


def step(op, *args):
    return Step(0, op, args, {}, (), (), True, "", "")


@pytest.mark.parametrize(
    ("op", "args", "trains"),
    [
        (aten.native_batch_norm.default, (0, 0, 0, 0, 0, True, 0.1, 1e-5), True),
        (aten.native_batch_norm.default, (0, 0, 0, 0, 0, False, 0.1, 1e-5), False),
        (aten.native_batch_norm.default, (0, 0, 0, None, None, False, 0.1, 1e-5), True),
        (aten._native_batch_norm_legit.no_stats, (0, 0, 0, True, 0.1, 1e-5), True),
        (aten._batch_norm_with_update.default, (0, 0, 0, 0, 0, 0.1, 1e-5), True),
        (aten._batch_norm_no_update.default, (0, 0, 0, 0, 0, 0.1, 1e-5), False),
        (aten.native_layer_norm.default, (0, [3], 0, 0, 1e-5), False),
    ],
)
def test_training(op, args, trains):
    assert ops.is_training_batch_norm(step(op, *args)) == trains


def test_arguments_of_a_batch_norm_have_one_name():
    call = step(aten.cudnn_batch_norm.default, "x", "w", "b", "m", "v", True, 0.1, 1e-3)
    norm = ops.batch_norm_arguments(call.op, call.named)
    assert (norm.input, norm.bias, norm.running_var, norm.eps, norm.training) == (
        "x",
        "b",
        "v",
        1e-3,
        True,
    )
    with pytest.raises(ValueError, match=r"relu.default is no batch norm .* native_batch_norm"):
        ops.batch_norm_arguments(aten.relu.default, {})


@pytest.mark.parametrize(
    ("op", "arguments", "names"),
    [
        (aten.add_.Tensor, {}, ("self",)),
        (aten.add.Tensor, {}, ()),
        (aten.native_batch_norm.default, {"training": True}, ops.RUNNING),
        (aten.native_batch_norm.default, {"training": False}, ()),
        (aten._native_batch_norm_legit.default, {"training": True}, ops.RUNNING),
        (aten._native_batch_norm_legit.no_stats, {"training": True}, ()),
        (aten.batch_norm_gather_stats.default, {}, ops.RUNNING),
    ],
)
def test_writes(op, arguments, names):
    assert ops.written(op, arguments) == names
    assert ops.may_write(op) or not names
    assert ops.writes_results(op) == ops.writes_in_place(op) == (names == ("self",))


@pytest.mark.parametrize(
    ("op", "arguments", "dropped"),
    [
        (aten.native_dropout.default, {"input": 0, "p": 0.5, "train": True}, True),
        (aten.native_dropout.default, {"input": 0, "p": 0.5, "train": None}, True),
        (aten.native_dropout.default, {"input": 0, "p": 0.5, "train": False}, False),
        (aten._fused_dropout.default, {"self": 0, "p": 0.5}, True),
        (aten._cudnn_rnn.default, {"dropout": 0.5, "train": True}, True),
        (aten._cudnn_rnn.default, {"dropout": 0.0, "train": True}, False),
        (aten.miopen_rnn.default, {"dropout": 0.5, "train": False}, False),
        (aten.bernoulli.default, {"self": 0}, True),
    ],
)
def test_whether_a_call_drops(op, arguments, dropped):
    assert ops.drops(op, (), arguments) == dropped


def test_what_drops_nothing_draws_nothing():
    attention = aten._scaled_dot_product_efficient_attention.default
    dropout = [a.name for a in attention._schema.arguments if a.name == "dropout_p"]
    assert dropout == ["dropout_p"]
    for op in (attention, aten.scaled_dot_product_attention.default):
        tagged = torch.Tag.nondeterministic_seeded in op.tags
        assert ops.draws(op) == tagged
        assert not (ops.draws(op) and ops.drops(op, (), {"dropout_p": 0.0}))
        assert ops.drops(op, (), {"dropout_p": 0.5})
    assert ops.draws(aten.rand.default)
    assert not ops.draws(aten.relu.default)
