"""The facade: one model, one loss, one mini-batch, and the questions one can ask about them.

Nothing is computed here. Arguments are parsed (``validation.py``), the recording is brought up to
date (``session.py``), and the question is handed on (``question.py``, ``verification/``).
"""

from __future__ import annotations

import copy
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import Any, TypedDict, Unpack, cast, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch import errors
from unbatch.analysis.structure import Structure
from unbatch.autodiff.autograd import gradients
from unbatch.capture import program as capture
from unbatch.capture import tracer
from unbatch.capture.data import objects_in, tracked_in
from unbatch.capture.effort import PLAIN_STEPS, metered
from unbatch.capture.guards import signature
from unbatch.capture.isolation import outside_inference_mode
from unbatch.capture.opened import closed
from unbatch.capture.program import Program
from unbatch.capture.sample_axes import Fold
from unbatch.capture.stacked_views import without_views
from unbatch.capture.trees import copied
from unbatch.curvature.block_ggn import BlockGGN
from unbatch.curvature.ggn import GGN
from unbatch.curvature.ggn_quantities import ColumnQuantity
from unbatch.diagram.diagram import Diagram
from unbatch.diagram.stages import stages
from unbatch.errors import UnregisteredParameterWarning
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import Gradients, Quantity
from unbatch.gradients.request import HOUR
from unbatch.gradients.results import Rows
from unbatch.problem.parameters import Selection, parameters_of, select
from unbatch.problem.question import Question
from unbatch.problem.recording import Batch, Recording
from unbatch.problem.recordings import MOST, Recordings
from unbatch.problem.session import Session
from unbatch.problem.spot_check import SpotChecks, may_be_moved
from unbatch.problem.validation import (
    check_by,
    check_by_of_columns,
    check_callable,
    check_count,
    check_devices,
    check_dims,
    check_real,
    check_values,
    count_samples,
    parse_blocks,
    parse_data,
    parse_dims,
    parse_draws,
    parse_effort,
    parse_memory,
    parse_out,
    parse_quantities,
    parse_sample_axes,
    parse_samples,
    parse_seconds,
    parse_tree,
)
from unbatch.running.tasks import task
from unbatch.verification.crosstalk import Crosstalk, crosstalk
from unbatch.verification.verify import Verification, verify


class MatrixOptions(TypedDict, total=False):
    """The keyword arguments of ``Problem.ggn``, which are the same with and without blocks."""

    by: str
    mc_samples: int | None
    seed: int
    samples: Sequence[int] | Tensor | None
    memory: int | None
    seconds: float


@outside_inference_mode()
class Problem:
    """A model, a loss and a mini-batch.

    ``model``: an ``nn.Module`` (called as ``model(X)``, ``model(*X)`` for a tuple, ``model(**X)``
    for a dict), or a function ``f(params, X)`` together with ``parameters={name: tensor}``.
    ``loss`` is called as ``loss(predictions, y)``, or ``loss(predictions)`` where y is None, and
    returns a scalar. ``data`` is ``(X, y)``, each a pytree of tensors; a model that has its own
    loss takes ``batch=inputs`` in place of loss and data.

    ``in_dims`` says where the samples lie, as in ``torch.func.vmap``: an int, None (not
    per-sample), or a pair for X and y whose parts may be pytrees of them. ``out_dims`` says it of
    what the model returns: an int, None (the analysis finds it, the default), or a nesting like
    that of the output. Both also take ``Views(2)`` for an axis along which each sample has several
    entries: ``[2N, d]`` are N pairs then; and ``rows_of(index)`` for rows that an index gives to
    samples, as those of stacked graphs, packed sequences and boxes of images. What has no axis of
    samples belongs to the batch as a whole: ``ggn()`` joins such outputs, and rows of the gradient
    leave them to their ``rest``.

    ``sample_dims``: several axes that together tell samples apart, of X, y and the predictions,
    such as ``(0, 1)`` for the tokens of sentences or ``(0, 2, 3)`` for the pixels of images;
    samples are then counted in this order, ``N = B·T``. Of a model that has its own loss these, and
    ``out_dims``, are axes of the values that the loss is cut at, and the labels in it are
    constants: ``y_n`` is what the loss compares prediction n with.

    ``shapes``: recordings are kept of so many shapes of batches that ``with_batch`` was called
    with, the least recently used given up. Each holds its batch, its predictions and what it drew.

    Constructing computes nothing; questions do, with the parameters of that moment. No question
    changes anything: parameters, buffers, gradients, flags and random states are afterwards as they
    were.

    ``effort``: how many plain steps (a forward and a backward pass) the experiments of one question
    may take, or five seconds where that is more. What they were to find out is unknown then, and
    the report says so.

    Raises ``InputError`` where shapes, devices or the call do not fit together.
    """

    inputs: Any
    targets: Any
    samples: int

    def __init__(  # noqa: PLR0913  (by name, all but three)
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any] | None = None,
        data: tuple[Any, Any] | None = None,
        *,
        batch: Any = None,
        parameters: Mapping[str, Tensor] | None = None,
        in_dims: Any = 0,
        out_dims: Any = None,
        sample_dims: Sequence[int] | None = None,
        effort: float = PLAIN_STEPS,
        shapes: int = MOST,
    ) -> None:
        check_count("shapes", shapes)
        given = parse_data(data, batch)
        inputs, targets = map(parse_tree, given)
        check_callable("model", model)
        if loss is not None:
            check_callable("loss", loss)
        # A pair is one for X and one for y; of a model with its own loss it is one for X.
        x_dims, y_dims = in_dims, in_dims
        if data is not None and isinstance(in_dims, tuple) and len(in_dims) == 2:
            x_dims, y_dims = in_dims
        fold = parse_sample_axes(sample_dims, (x_dims, y_dims), out_dims, inputs, targets)
        named = parameters_of(model, loss, parameters)
        self.program = Program(
            model, loss, named, parameters is not None, fold, effort=parse_effort(effort)
        )
        # As they were passed: containers may have other entries when a question is asked.
        self._given, self._passed = given, parameters
        inputs, targets = _folded(fold, inputs, targets)
        # Where there are no targets, nothing is said of them.
        if targets is None:
            y_dims = None
        x_dims, y_dims = without_views(x_dims), without_views(y_dims)
        self._in_dims = x_dims, y_dims
        self._dims = parse_dims("X", inputs, x_dims)
        self._target_dims = parse_dims("y", targets, y_dims)
        self._may_be_empty = False
        self._use(inputs, targets)
        self._session: Session | None = None
        self._checks = SpotChecks()
        self._recordings = Recordings(shapes)
        self._compared: Session | None = None  # whose inputs were found free of NaN
        self._where = tracer.users_line()  # for verdicts that belong to no line of the model

    def _use(self, inputs: Any, targets: Any) -> None:
        """Ask questions about these data; raise ``InputError`` where they do not fit together."""
        self.samples = count_samples(
            inputs, self._dims, targets, self._target_dims, self._may_be_empty
        )
        check_devices(self.program, inputs, targets)
        self.inputs, self.targets = inputs, targets
        self._kind = signature(*map(parse_tree, self._given))
        objects, tracked = objects_in((inputs, targets)), tracked_in(inputs)
        if objects or self.program.data or tracked != self.program.tracked:
            self.program = replace(self.program, data=objects, tracked=tracked)

    def with_batch(self, inputs: Any, targets: Any = None) -> Problem:
        """Return the same problem on other data, without recording it again where that is possible.

        Where there is no recording for these shapes, or Python reads values of tensors, it records
        afresh when asked; what holds for all sizes is then not tried again. A batch may have one
        sample, or none where the loss is a sum over samples. Raises ``InputError`` where the data
        have another structure.
        """
        given = inputs, targets
        inputs, targets = map(parse_tree, given)
        other = copy.copy(self)  # with the recordings, one of which the first question may move
        inputs, targets = other._with_own_sizes(inputs, targets)
        other._given, other._session, other._compared = given, None, None
        other._may_be_empty = True
        check_dims("X", inputs, self._dims)
        check_dims("y", targets, self._target_dims)
        other._use(inputs, targets)
        return other

    def __repr__(self) -> str:
        model, loss = self.program.names
        return f"Problem({model}, {loss}, {self.samples} samples)"

    def _repr_html_(self) -> str:
        """Return the picture of its structure for a notebook, or the reason why there is none."""
        try:
            return self.diagram()._repr_html_()
        except Exception as error:
            # A notebook shows an object when nobody has asked a question: it never fails.
            return f"<pre>{html.escape(f'{self!r}: {error}')}</pre>"

    # -- structure --

    @property
    def structure(self) -> Structure:
        """The six verdicts, with culprits, statistics and consequences.

        Cost: a few forward passes, once.
        """
        return self._comparable().structure

    def diagram(self) -> Diagram:
        """Return the structure as a picture.

        Samples are columns, stages from inputs to loss are rows, cross-sample dependence is a band.
        Text when printed, a drawing in a notebook (with ``pip install 'unbatch[plot]'``), see
        ``unbatch.plot``. Cost: as for ``structure``, which holds all that it shows.
        """
        session = self._comparable()
        # Judged first: that is what cuts the graph into model and loss.
        structure = session.structure
        classes: dict[str, str] = {}
        for top in self.program.modules:
            for name, module in top.named_modules():
                classes[name] = type(module).__name__
        _, loss = self.program.names
        drawn = stages(session.graph, session.analysis.findings, structure, classes, loss)
        return Diagram.of(structure, drawn)

    def verify(self) -> Verification:
        """Test every verdict numerically, the proved ones too.

        Cost: some dozens of forward passes, no more than ``effort`` allows.
        """
        session = self._comparable()
        structure, predictions = session.structure, session.predictions
        with metered(session.graph.ops, self.program.effort) as meter:
            verification = verify(structure, session.experiment, predictions)
        return replace(verification, stopped=meter.stopped)

    def crosstalk(
        self, probes: int | None = None, *, samples: Sequence[int] | Tensor | None = None
    ) -> Crosstalk:
        """Return how strongly prediction n depends on sample m: ``[N, N]`` of ``‖∂F_n/∂x_m‖``.

        In the Frobenius norm; for integer inputs the change of ``F_n`` when sample m is replaced.
        Exact by one backward pass per entry of the predictions of a sample; with ``probes`` random
        directions an unbiased estimate of the squares. ``samples``: the rows of these predictions
        only, on the same batch. Raises ``InputError`` for samples that are not there.
        """
        index = parse_samples(samples, self.samples)
        rows: list[int] | None = None
        if index is not None:
            rows = index.tolist()
        return crosstalk(self._comparable().experiment, probes, rows)

    def predictions(self) -> Any:
        """Return ``F``, what the model predicts on the batch, with the noise of the recorded run.

        Of a model that computes its own loss, the values that the loss is cut at (see
        ``structure``): a tensor, or a tuple.
        """
        session = self._recorded()
        output = session.at_the_cut if self.program.loss is None else session.predictions
        # Copied: what the session keeps must not change when the user writes to the result.
        return closed(tree_map(copied, output))

    # -- gradients --

    def gradient(self) -> dict[str, Tensor]:
        """Return ``∇L`` by every parameter that requires a gradient; ``.grad`` is not touched.

        In the scale in which it enters the loss. Raises ``InputError`` when no parameter requires a
        gradient.
        """
        session, trained, _ = self._asked(None)
        # Plain autograd with the recorded noise, so that rows of a question sum to this.
        with self.program.untouched(session.graph.rng), torch.enable_grad():
            # That it is a scalar tensor was checked when the program was recorded.
            output = self.program.predict(self.inputs)
            loss: Tensor = self.program.loss_of(output, self.targets)
            return gradients([loss], trained, retain=session.graph.has_history)

    def gradients(
        self,
        by: str = "component",
        parameters: Selection = None,
        *,
        memory: int | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> Rows:
        """Return the gradient by samples: ``[N, *param]`` for each parameter.

        In the scale in which it enters the loss. ``by``: "component" (``(J_θ F_n)ᵀ ∂L/∂F_n``),
        "copy" (what sample n's own use of the parameters contributes) or "frozen" (components with
        batch statistics held constant). Without cross-sample dependence they are the same, called
        per-sample; ``.kind`` says what they are. Component and copy rows sum to ``∇L``, with
        ``.rest`` where parameters reach the loss bypassing the predictions.

        ``parameters``: names, globs or tensors. ``memory``: bytes for temporaries, by default a
        quarter of what is free. ``out``: tensors ``[N, *param]`` to write to, by name. Raises
        ``InputError`` for what does not fit, ``StructureError`` where the rows do not exist.
        """
        question = self._question(by, parameters, memory)
        buffers = parse_out(out, question.parameters, self.samples)
        (rows,) = question.answer([Gradients()], buffers)
        return cast(Rows, rows)

    def compute(
        self,
        *quantities: Quantity | type[Quantity],
        by: str = "component",
        parameters: Selection = None,
        memory: int | None = None,
    ) -> Any:
        """Return the result of a quantity, or a tuple of several in this order, from one sweep.

        Arguments as for ``gradients``. Statistics over samples (variance, noise scale, ..) are
        taken over the rows of ``by``; where samples depend on each other, or the loss is no sum
        over them, those are no samples of anything, and a ``MixedSamplesWarning`` says so. Raises
        as ``gradients`` does.
        """
        asked = parse_quantities(quantities)
        # Columns do not exist by copy, nor of complex parameters: refused before anything runs.
        of_columns = any(isinstance(quantity, ColumnQuantity) for quantity in asked)
        results = self._question(by, parameters, memory, of_columns).answer(asked)
        return results[0] if len(results) == 1 else tuple(results)

    def plan(
        self,
        *quantities: Quantity | type[Quantity],
        by: str = "component",
        parameters: Selection = None,
        memory: int | None = None,
    ) -> Plan:
        """Return what ``compute`` of the same arguments would do, and why; printable.

        By default of the rows themselves, as ``gradients``. Cost: two forward passes and some six
        more, of which the time is taken.
        """
        asked = parse_quantities(quantities or [Gradients()])
        return self._question(by, parameters, memory).plan(asked)

    # -- curvature --

    @overload
    def ggn(
        self,
        parameters: Selection = None,
        blocks: None = None,
        **options: Unpack[MatrixOptions],
    ) -> GGN: ...

    @overload
    def ggn(
        self,
        parameters: Selection = None,
        blocks: str | Sequence[Selection] = ...,
        **options: Unpack[MatrixOptions],
    ) -> BlockGGN: ...

    def ggn(
        self,
        parameters: Selection = None,
        blocks: str | Sequence[Selection] | None = None,
        *,
        by: str = "component",
        mc_samples: int | None = None,
        seed: int = 0,
        samples: Sequence[int] | Tensor | None = None,
        memory: int | None = None,
        seconds: float = HOUR,
    ) -> GGN | BlockGGN:
        """Return the generalized Gauss-Newton matrix ``G = Jᵀ (∇²_F L) J`` on this batch.

        An operator, ``[D, D]``. ``J`` goes through everything that samples share, batch statistics
        included (``by="frozen"``: with these held constant, which is another matrix); the loss is
        cut off at the predictions, as the structure says.

        ``blocks``: "parameter", "module", or groups of parameters, for the block diagonal.
        ``mc_samples``: with so many columns for each sample, drawn from the likelihood with
        ``seed``, instead of the second derivative. ``samples``: the components of these samples
        only, times N over their number. ``memory``: bytes for temporaries, by default a quarter of
        what is free; ``seconds``: for what can be counted beforehand, an hour by default. A
        question of which no exact way fits into both raises ``BudgetError``.

        Raises ``InputError`` for what does not fit, ``StructureError`` where the loss has no second
        derivative.
        """
        question = self._question(by, parameters, memory, of_columns=True)
        question = replace(question, seconds=parse_seconds(seconds))
        draws = parse_draws(mc_samples, seed)
        groups = parse_blocks(blocks, question.parameters)
        return question.ggn(groups, draws, parse_samples(samples, self.samples))

    # -- what questions share --

    def _question(
        self, by: str, parameters: Selection, memory: int | None, of_columns: bool = False
    ) -> Question:
        """Return a question with valid arguments; ``of_columns``: of the Gauss-Newton matrix."""
        # What is cheap to refuse comes before anything is recorded.
        if of_columns:
            check_by_of_columns(by)
        check_by(by)
        session, selected, budget = self._asked(parameters, of_columns, memory)
        return Question(session, selected, by, budget)

    def _asked(
        self, parameters: Selection, of_columns: bool = False, memory: int | None = None
    ) -> tuple[Session, dict[str, Tensor], int]:
        """Return the session, and the parameters and the bytes of a question about derivatives.

        Raises for a loss that has no gradient, and warns where part of it is left out.
        """
        # Selected from those of this moment: the model may have others than before.
        program = self._refreshed()
        selected = select(program.parameters, parameters)
        if of_columns:
            check_real(selected)
        budget = parse_memory(memory, next(iter(selected.values())).device)
        session = self._recorded(program)
        session.check_connected()
        session.check_third_derivatives()
        unregistered = session.recording.unregistered
        # A function takes other tensors than its parameters on purpose.
        if unregistered and not self.program.functional:
            errors.warn(unregistered, UnregisteredParameterWarning)
        return session, selected, budget

    def _recorded(self, program: Program | None = None) -> Session:
        """Return the session about the numbers of this moment, recorded anew only if it must be."""
        program = program or self._refreshed()
        batch = Batch(
            self._given, self.inputs, self.targets, self._dims, self._target_dims, self.samples
        )
        recordings, signature = self._recordings, batch.signature
        session = None
        last = self._session
        if last is None or last.batch.signature != signature:
            last = recordings.get(signature)
        if last is not None:
            session = last.at(program, batch)
        if session is not None and session is not last and not may_be_moved(session):
            session = None
        is_due = session is not None and self._checks.are_due(session)
        if session is not None and is_due and not self._checks.agrees(session):
            recordings.clear()  # something has changed that nobody watches
            session = None
        if session is None:  # never recorded on such a batch, or another computation than then
            if last is not None or not recordings:
                self._checks.begin()
            with task("Recording the model"):
                recording = Recording.of(program, batch, self._where, self._call_text())
            session = Session(recording, recordings.known)
        recordings.put(signature, session)
        self._session = session
        return session

    def _comparable(self) -> Session:
        """Return the session of a batch on which runs can be compared.

        Of rows and sums that is not asked: there, what is not a number stays with its sample.
        """
        session = self._recorded()
        if session is not self._compared:
            check_values(self.inputs, self._dims)  # these numbers have not been looked at before
            self._compared = session
        return session

    def _refreshed(self) -> Program:
        """Return the program with the parameters and the data that there are at this moment."""
        self._read_data()
        # Parameters may have been replaced by other tensors, added or renamed.
        named = parameters_of(self.program.model, self.program.loss, self._passed)
        old = self.program.parameters
        if list(named) != list(old) or not all(map(is_, named.values(), old.values())):
            self.program = replace(self.program, parameters=named)
        return self.program

    def _read_data(self) -> None:
        """Read the containers of the data again, which may have got other entries."""
        inputs, targets = map(parse_tree, self._given)
        fold = self.program.fold
        if signature(inputs, targets) == self._kind:
            if fold is not None:
                fold.check(inputs, targets)  # an index among them may have been written to
            self.inputs, self.targets = _folded(fold, inputs, targets)
            return
        inputs, targets = self._with_own_sizes(inputs, targets)
        x_dims, y_dims = self._in_dims
        self._dims = parse_dims("X", inputs, x_dims)
        self._target_dims = parse_dims("y", targets, y_dims)
        self._use(inputs, targets)

    def _with_own_sizes(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return data with several axes of samples as one; their sizes belong to the data."""
        fold = self.program.fold
        if fold is not None:
            fold = fold.renewed(inputs, targets)
            self.program = replace(self.program, fold=fold)
        return _folded(fold, inputs, targets)

    def _call_text(self) -> str:
        """Return the call of the model in words, with inputs as the user passed them."""
        (model, _), fold = self.program.names, self.program.fold
        inputs = self.inputs
        if fold is not None:
            inputs = fold.unfolded(inputs, fold.inputs)
        return f"{model} on inputs {capture.shown(inputs)}"


def _folded(fold: Fold | None, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return data with their several axes of samples as one in front."""
    if fold is None:
        return inputs, targets
    return fold.folded(inputs, fold.inputs), fold.folded(targets, fold.targets)
