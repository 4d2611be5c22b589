"""Backward passes that PyTorch did not write: functions with a derivative of their own, and hooks.

They may do anything: clip what is pulled back, mix the samples, or leave no graph. What PyTorch
takes for a gradient is then no linear map, or not one of each sample alone. So such a backward pass
is tried before it is believed: whether it is linear, and whether the row of a sample stays what it
is in a batch without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from unbatch.analysis.domain.sample_layout import Layout
from unbatch.autodiff import eager
from unbatch.autodiff.context import Context
from unbatch.autodiff.other_batches import filled_with, finite_batches, is_finite
from unbatch.capture import ops
from unbatch.capture.hooks import hooks_of
from unbatch.capture.own_nodes import own_nodes, with_place
from unbatch.capture.steps import Step
from unbatch.capture.trees import tensors_in
from unbatch.linalg.precision import largest
from unbatch.linalg.probes import gaussians_like, seeded

# Sizes of what is pulled back, of which the backward pass has to be a multiple: where gradients are
# clipped, some of these are.
SCALES = (1e-3, 1.0, 1e3)

# Rounding in the largest numbers shows, to this share, in small ones that are their difference.
CANCELLATION = 1e-3

Named = Mapping[str, Tensor]

Pull = Callable[[Mapping[int, Tensor]], dict[str, Tensor]]


# --- of PyTorch's own -------------------------------------------------------------------------


def joining(steps: Iterable[Step]) -> list[str]:
    """Return the steps of a recording whose derivative takes all samples together, in words."""
    places = []
    for step in steps:
        if ops.joins_backward(step.op, step.named):
            places.append(f"{step.place} (scaled by how often an index occurs in the batch)")
    return list(dict.fromkeys(places))


# --- the trial ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BackwardTrial:
    """What came of it.

    ``linear``: the backward pass is linear in what is pulled back. ``separate``: a sample's row is
    the same whatever the others are. ``places``: what is not PyTorch's, with file and line.
    """

    linear: bool
    separate: bool
    places: tuple[str, ...]

    @property
    def named(self) -> str:
        """What is not PyTorch's, in words."""
        return " and ".join(self.places) or "the program"


def tried(context: Context, independent: bool) -> BackwardTrial:
    """Try the backward pass of a model that its recording cannot stand for.

    ``independent``: no prediction depends on another sample, so that a row should not, either.
    """
    parameters = {n: p for n, p in context.program.parameters.items() if p.requires_grad}
    context, model = _finite_run(context, parameters)
    places = [with_place(node) for node in own_nodes(model.predictions.values())]
    places += context.graph.hooks
    program = context.program
    places += hooks_of(program.modules, program.parameters.values())
    named = tuple(dict.fromkeys(places))
    if not named:
        return BackwardTrial(True, True, ())
    pull = partial(model.pull, parameters=parameters)
    if not _is_linear(context, model, pull):
        return BackwardTrial(False, False, named)
    separate = not independent or context.samples == 1 or _is_separate(context, model, parameters)
    return BackwardTrial(True, separate, named)


def _finite_run(context: Context, parameters: Named) -> tuple[Context, eager.EagerModel]:
    """Run the model, on other samples where some predictions are not finite.

    What is pulled back of the others would not be, either, and says nothing of them.
    """
    model = eager.run(context, parameters)
    inputs = dict(enumerate(tensors_in(context.inputs)))
    if not is_finite(model.predictions) or not is_finite(inputs):
        for other in finite_batches(context, model.predictions):
            another = eager.run(other, parameters)
            if is_finite(another.predictions):
                return other, another
    return context, model


def _is_linear(context: Context, model: eager.EagerModel, pull: Pull) -> bool:
    """Tell whether sums and multiples of cotangents are pulled back to sums and multiples."""
    generator = seeded(2)
    u, w = (
        gaussians_like(model.predictions, generator),
        gaussians_like(model.predictions, generator),
    )
    of_u, of_w = pull(u), pull(w)
    together = pull({i: u[i] + w[i] for i in u})
    bound = context.rounding
    if not _close(together, {name: g + of_w[name] for name, g in of_u.items()}, bound):
        return False
    for scale in _scales(model):
        scaled = pull({i: scale * g for i, g in u.items()})
        if not _close({name: g / scale for name, g in scaled.items()}, of_u, bound):
            return False
    return True


def _scales(model: eager.EagerModel) -> list[float]:
    """Return the sizes of cotangents to try: about one, and about that of the loss."""
    scales = [1e-3, 1e3]
    slope = largest(model.loss.slope.values())
    if 0 < slope < float("inf"):
        scales += [slope * scale for scale in SCALES]
    return scales


def _is_separate(context: Context, model: eager.EagerModel, parameters: Named) -> bool:
    """Tell whether rows of samples stay what they are with others in place of the other samples."""
    cotangents = gaussians_like(model.predictions, seeded(3))
    for n in dict.fromkeys((0, context.samples // 2)):
        other = filled_with(context, n)
        if other is None:
            return False
        alone: dict[int, Tensor] = {}
        for i, g in cotangents.items():
            alone[i] = Layout(context.axes[i], context.samples).only(g, n, n + 1)[0]
        try:
            again = eager.run(other, parameters).pull(alone, parameters)
        except Exception:  # it does not take such a batch
            return False
        row = model.pull(alone, parameters)
        if not _finite_alike(again, row) or not _close(again, row, context.rounding):
            return False
    return True


def _finite_alike(a: Named, b: Named) -> bool:
    """Tell whether gradients are finite in the same places."""
    return all(bool(t.isfinite().equal(b[name].isfinite())) for name, t in a.items())


def _close(computed: Named, expected: Named, bound: float) -> bool:
    """Tell whether gradients agree up to rounding, as far as they are finite."""
    finite = {n: t.isfinite() & computed[n].isfinite() for n, t in expected.items()}
    reference = {n: t[finite[n]] for n, t in expected.items()}
    size = largest(reference.values())
    for name, t in reference.items():
        if not t.numel():
            continue
        allowed = bound * (float(t.abs().max()) + CANCELLATION * size)
        if float((computed[name][finite[name]] - t).abs().max()) > allowed:
            return False
    return True
