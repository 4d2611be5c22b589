"""The facade: one model, one loss, one mini-batch, and the questions one can ask about them."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from unbatch import errors
from unbatch.analysis.structure import Structure
from unbatch.autodiff.autograd import gradients
from unbatch.capture import program as capture
from unbatch.capture import tracer
from unbatch.capture.isolation import outside_inference_mode, untouched
from unbatch.capture.program import Program
from unbatch.capture.sample_axes import SampleAxes
from unbatch.curvature.block_ggn import BlockGGN
from unbatch.curvature.ggn import GGN
from unbatch.curvature.ggn_quantities import ColumnQuantity
from unbatch.diagram.diagram import Diagram
from unbatch.diagram.stages import stages
from unbatch.errors import InputError, UnregisteredParameterWarning
from unbatch.gradients.plan import Plan
from unbatch.gradients.quantities import Gradients, Quantity
from unbatch.gradients.results import Rows
from unbatch.problem.parameters import Selection, parameters_of, select
from unbatch.problem.question import Question
from unbatch.problem.session import Batch, Recording, Session
from unbatch.problem.validation import (
    check_blocks,
    check_by,
    check_by_of_columns,
    check_callable,
    check_devices,
    check_dims,
    check_draws,
    check_fold,
    check_memory,
    check_out,
    check_real,
    check_samples,
    check_sizes,
    check_values,
    flat_dims,
    opened,
)
from unbatch.verification.crosstalk import Crosstalk, crosstalk
from unbatch.verification.verify import Verification, verify


@outside_inference_mode()
class Problem:
    """A model, a loss and a mini-batch.

    ``model``: an ``nn.Module`` (called as ``model(X)``, ``model(*X)`` for a tuple, ``model(**X)`` for a dict), or a
    function ``f(params, X)`` together with ``parameters={name: tensor}``. ``loss`` is called as
    ``loss(predictions, y)``, or ``loss(predictions)`` where y is None, and returns a scalar. ``data`` is ``(X, y)``,
    each a pytree of tensors; a model that has its own loss takes ``batch=inputs`` in place of loss and data.
    ``in_dims`` says where the samples lie, as in ``torch.func.vmap``: an int, None (not per-sample), or a pair for X
    and y whose parts may be pytrees of them. ``sample_dims``: several axes that together tell samples apart, of X, y
    and the predictions, such as ``(0, 1)`` for the tokens of sentences or ``(0, 2, 3)`` for the pixels of images;
    samples are then counted in this order, ``N = B·T``. Of a model that has its own loss these are axes of what the
    loss is cut at, and the labels in it are constants: ``y_n`` is what the loss sets beside prediction n.

    Constructing computes nothing; questions do, with the parameters of that moment. No question changes anything:
    parameters, buffers, gradients, flags and random states are afterwards as they were.

    Raises ``InputError`` where shapes, devices or the call do not fit together.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any] | None = None,
        data: tuple[Any, Any] | None = None,
        *,
        batch: Any = None,
        parameters: Mapping[str, Tensor] | None = None,
        in_dims: Any = 0,
        sample_dims: Sequence[int] | None = None,
    ) -> None:
        if (data is None) == (batch is None):
            raise InputError(
                "Pass either data=(X, y) together with a loss, or batch=inputs for a model that returns its own loss."
            )
        if data is not None and not (isinstance(data, tuple | list) and len(data) == 2):
            raise InputError(
                f"data is a pair (X, y); got {type(data).__name__}. For a model with its own loss use batch=inputs."
            )
        check_callable("model", model)
        if loss is not None:
            check_callable("loss", loss)
        self.inputs: Any
        self.targets: Any
        self.inputs, self.targets = map(opened, data if data is not None else (batch, None))
        fold = check_fold(sample_dims, in_dims, self.inputs, self.targets)
        if fold is not None:
            self.inputs, self.targets = (
                fold.folded(self.inputs, fold.inputs),
                fold.folded(self.targets, fold.targets),
            )
        self.program = Program(
            model, loss, parameters_of(model, loss, parameters), parameters is not None, fold
        )
        x_dims, y_dims = (
            in_dims
            if isinstance(in_dims, tuple) and data is not None and len(in_dims) == 2
            else (in_dims, in_dims)
        )
        self._dims = flat_dims("X", self.inputs, x_dims)
        self._target_dims = flat_dims("y", self.targets, y_dims)
        self.samples = check_sizes(self.inputs, self._dims, self.targets, self._target_dims)
        check_devices(self.program, self.inputs, self.targets)
        self._session: Session | None = None
        self._where = tracer.users_line()

    def __repr__(self) -> str:
        model, loss = self.program.names
        return f"Problem({model}, {loss}, {self.samples} samples)"

    def _repr_html_(self) -> str:
        """The picture of its structure, in a notebook; to be shown is no reason to fail."""
        try:
            return self.diagram()._repr_html_()
        except Exception as error:
            return f"<pre>{html.escape(f'{self!r}: {error}')}</pre>"

    # -- questions --

    @property
    def structure(self) -> Structure:
        """The six verdicts, with culprits, statistics and what follows. Cost: a few forward passes."""
        return self._recorded().structure

    def diagram(self) -> Diagram:
        """The structure as a picture: samples are columns, stages from inputs to loss are rows, mixing is a band.

        Text when printed, a drawing in a notebook (with ``pip install 'unbatch[plot]'``), see ``unbatch.plot``. Cost:
        as for ``structure``, which is also where all that it shows is from.
        """
        session = self._recorded()
        named = [
            (name, type(m).__name__)
            for top in self.program.modules
            for name, m in top.named_modules()
        ]
        _, loss = self.program.names
        structure = session.structure  # first: the graph is cut where it is judged
        return Diagram.of(
            structure,
            stages(session.graph, session.analysis.findings, structure, dict(named), loss),
        )

    def verify(self) -> Verification:
        """Put every verdict to a numerical test, the proved ones too. Cost: some dozens of forward passes."""
        session = self._recorded()
        return verify(session.structure, session.oracle, session.predictions)

    def crosstalk(
        self, probes: int | None = None, *, samples: Sequence[int] | Tensor | None = None
    ) -> Crosstalk:  # fmt: skip
        """How strongly prediction n listens to sample m: ``[N, N]`` of ``‖∂F_n/∂x_m‖`` (Frobenius norm).

        For integer inputs the change of ``F_n`` when sample m is replaced. Exact by one backward pass per entry of the
        predictions of a sample; with ``probes`` random directions an unbiased estimate of the squares. ``samples``: the
        rows of these predictions only, on the same batch. Raises ``InputError`` for samples that are not there.
        """
        picked = check_samples(samples, self.samples)
        session = self._recorded()
        return crosstalk(session.oracle, probes, None if picked is None else picked.tolist())

    def predictions(self) -> Any:
        """``F``: what the model predicts on the batch, with the noise of the recorded run.

        Of a model that computes its own loss, what the loss is cut at, as the structure says: a tensor, or a tuple.
        """
        session = self._recorded()
        found = session.predictions if self.program.loss is not None else session.at_the_cut
        return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, found)

    def gradient(self) -> dict[str, Tensor]:
        """``∇L`` by every parameter that requires a gradient, as it enters the loss; ``.grad`` is not touched.

        Raises ``InputError`` when no parameter requires a gradient.
        """
        wanted = select(self.program.parameters, None)
        session = self._derivable()
        with untouched(self.program.modules, session.graph.rng), torch.enable_grad():
            return gradients([self._loss_of(self.program.predict(self.inputs))], wanted)

    def gradients(
        self,
        by: str = "component",
        parameters: Selection = None,
        *,
        memory: int | None = None,
        out: Mapping[str, Tensor] | None = None,
    ) -> Rows:
        """The gradient taken apart: ``[N, *param]`` for each parameter, in the scale in which it enters the loss.

        ``by``: "component" (``(J_θ F_n)ᵀ ∂L/∂F_n``), "copy" (what sample n's own use of the parameters contributes) or
        "frozen" (components with batch statistics held constant). Without mixing they are the same, called per-sample;
        ``.kind`` says what they are. Component and copy rows sum to ``∇L``, with ``.rest`` where parameters reach the
        loss beside the predictions. ``parameters``: names, globs or tensors. ``memory``: bytes for temporaries, by
        default a quarter of what is free. ``out``: tensors ``[N, *param]`` to write to, by name.

        Raises ``InputError`` for what does not fit, ``StructureError`` where the rows do not exist.
        """
        question = self._question(by, parameters, memory)
        (rows,) = question.answer([Gradients()], check_out(out, question.parameters, self.samples))
        assert isinstance(rows, Rows)
        return rows

    def compute(
        self,
        *quantities: Quantity,
        by: str = "component",
        parameters: Selection = None,
        memory: int | None = None,
    ) -> Any:
        """Several quantities from one sweep: the one result, or a tuple in the order asked.

        Arguments as for ``gradients``. Statistics over samples (variance, noise scale, ..) are taken over the rows of
        ``by``; where samples mix, or the loss is no sum over them, those are no samples of anything, and a
        ``MixedSamplesWarning`` says so. Raises as ``gradients`` does.
        """
        if not quantities or not all(isinstance(q, Quantity) for q in quantities):
            wrong = next((q for q in quantities if not isinstance(q, Quantity)), None)
            hint = f" Did you mean {wrong.__name__}()?" if isinstance(wrong, type) else ""
            hint = (
                " Write them one after the other, without a list."
                if isinstance(wrong, list | tuple)
                else hint
            )
            raise InputError(errors.MSG_QUANTITY.format(value=wrong) + hint)
        of_columns = any(isinstance(q, ColumnQuantity) for q in quantities)
        results = self._question(by, parameters, memory, of_columns).answer(quantities)
        return results[0] if len(results) == 1 else tuple(results)

    def plan(
        self,
        *quantities: Quantity,
        by: str = "component",
        parameters: Selection = None,
        memory: int | None = None,
    ) -> Plan:
        """What ``compute`` of the same arguments (by default ``gradients``) would do, and why; printable.

        Cost: one forward and one backward pass.
        """
        return self._question(by, parameters, memory).plan(quantities or [Gradients()])

    @overload
    def ggn(
        self,
        parameters: Selection = None,
        blocks: None = None,
        *,
        by: str = "component",
        mc_samples: int | None = None,
        seed: int = 0,
        samples: Sequence[int] | Tensor | None = None,
        memory: int | None = None,
    ) -> GGN: ...

    @overload
    def ggn(
        self,
        parameters: Selection = None,
        blocks: str | Sequence[Selection] = ...,
        *,
        by: str = "component",
        mc_samples: int | None = None,
        seed: int = 0,
        samples: Sequence[int] | Tensor | None = None,
        memory: int | None = None,
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
    ) -> GGN | BlockGGN:
        """The generalized Gauss-Newton matrix ``G = Jᵀ (∇²_F L) J`` on this batch, as an operator ``[D, D]``.

        ``J`` goes through everything that samples share, batch statistics included (``by="frozen"``: with these held
        constant, which is another matrix); the split of the loss at the predictions is that of the structure.
        ``blocks``: "parameter", "module", or groups of parameters, for the block diagonal. ``mc_samples``: with so many
        columns for each sample, drawn from the likelihood with ``seed``, instead of the second derivative. ``samples``:
        the components of these samples only, times N over their number.

        Raises ``InputError`` for what does not fit, ``StructureError`` where the loss has no second derivative.
        """
        question = self._question(by, parameters, memory, of_columns=True)
        draws = check_draws(mc_samples, seed)
        return question.ggn(
            check_blocks(blocks, question.parameters), draws, check_samples(samples, self.samples)
        )

    def with_batch(self, inputs: Any, targets: Any = None) -> Problem:
        """The same problem on other data of the same shapes, without recording it again.

        Where shapes differ, or the program takes decisions on values, the new problem records afresh when asked.
        """
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        inputs, targets = opened(inputs), opened(targets)
        if (fold := self.program.fold) is not None:
            fold = SampleAxes.of(fold.dims, inputs, targets)
            inputs, targets = fold.folded(inputs, fold.inputs), fold.folded(targets, fold.targets)
            other.program = replace(self.program, fold=fold)
        other.inputs, other.targets = inputs, targets
        check_dims("X", inputs, self._dims)
        check_dims("y", targets, self._target_dims)
        other.samples = check_sizes(inputs, self._dims, targets, self._target_dims)
        check_devices(self.program, inputs, targets)
        return other

    # -- what questions share --

    def _refreshed(self) -> Program:
        """The program with the parameters that the model has at this moment."""
        if not self.program.functional:
            self.program = replace(
                self.program, parameters=parameters_of(self.program.model, self.program.loss, None)
            )
        return self.program

    def _derivable(self, program: Program | None = None) -> Session:
        """The recording, of a loss that has a gradient; warns where parts of that are left out."""
        session = self._recorded(program)
        session.check_connected()
        unregistered = session.recording.unregistered
        if unregistered and not self.program.functional:
            errors.warn(unregistered, UnregisteredParameterWarning)
        return session

    def _recorded(self, program: Program | None = None) -> Session:
        """The recording, moved to the numbers of this moment if it can be."""
        program, batch = program or self._refreshed(), self._batch
        session = None if self._session is None else self._session.at(program, batch)
        if session is None or session is not self._session:
            check_values(self.inputs, self._dims)
        if session is None:
            session = Session(Recording.of(program, batch, self._where, self._call_text()))
        self._session = session
        return session

    @property
    def _batch(self) -> Batch:
        return Batch(self.inputs, self.targets, self._dims, self._target_dims, self.samples)

    def _question(
        self, by: str, parameters: Selection, memory: int | None, of_columns: bool = False
    ) -> Question:
        """A question whose arguments are seen to be sound. ``of_columns``: of the Gauss-Newton matrix."""
        if of_columns:
            check_by_of_columns(by)
        check_by(by)
        program = self._refreshed()
        chosen = select(program.parameters, parameters)
        if of_columns:
            check_real(chosen)
        budget = check_memory(memory, next(iter(chosen.values())).device)
        return Question(self._derivable(program), chosen, by, budget)

    def _loss_of(self, output: Any) -> Tensor:
        if self.program.loss is None:
            value = capture.own_loss(output)
            assert value is not None
            return value
        value = self.program.evaluate(output, self.targets)
        assert isinstance(value, Tensor)
        return value

    def _call_text(self) -> str:
        (model, _), fold = self.program.names, self.program.fold
        inputs = self.inputs if fold is None else fold.unfolded(self.inputs, fold.inputs)
        return f"{model} on inputs {capture.shown(inputs)}"
