"""Does a number of statistics that does not grow with the batch carry all cross-sample dependence?

Let ``F_n = f(x_n, s)`` with R statistics ``s``. Take the samples of one half of the batch as ``n``
and those of the other half as ``m``, a random entry ``u`` of the predictions and a random direction
``v`` of the inputs. Then the matrix

    D[n, m] = uᵀ (∂F_n/∂x_m) v = uᵀ (∂F_n/∂s) (∂s/∂x_m) v

is a product of ``[N/2, R]`` and ``[R, N/2]``, so its rank is at most R whatever N is. A rank that
grows with the batch refutes that there is such an ``s``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from unbatch.linalg.precision import in_double
from unbatch.verification.counterexample import Counterexample
from unbatch.verification.experiment import Experiment, Untestable, tensor_leaves

# Four times as many samples have to give at least three times the rank.
MANY, FEW, GROWTH = 128, 32, 3

# Singular values below this, relative to the largest, are rounding of float64.
NEGLIGIBLE = 1e-9


def growing_rank(experiment: Experiment) -> Counterexample | None:
    """Return that the rank of the cross-sample derivatives grows with the number of samples."""
    try:
        few = _cross_rank(experiment, FEW)
        many = _cross_rank(experiment, MANY)
    except Exception:
        # The model may have been made for this batch size.
        return _full_rank(experiment)
    if few == 0 or many < GROWTH * few:
        return None
    test = f"rank of the cross-derivatives grows from {few} ({FEW} samples) to {many} ({MANY})"
    return Counterexample(test, many / few)


def _full_rank(experiment: Experiment) -> Counterexample | None:
    """Return that half of the samples need a number each from the others.

    All that can be said at one batch size. Small batches are left out: a rank of two is as large as
    the batch allows already with a mean and a variance.
    """
    half = experiment.samples // 2
    if half < 3:
        return None
    try:
        ranks = [_cross_rank(experiment, experiment.samples, seed) for seed in range(5)]
    except Exception:
        return None
    # A draw may be degenerate by chance; a bound on the rank would hold for each.
    if max(ranks) < half:
        return None
    test = f"rank of the cross-derivatives is as large as the batch allows, {half}"
    return Counterexample(test, float(half))


def _cross_rank(experiment: Experiment, samples: int, seed: int = 1) -> int:
    """Return the rank of ``D`` for a batch of ``samples`` redrawn samples.

    Raises what the model does where it does not take so many samples.
    """
    rows, inputs = _redrawn(experiment, samples, seed)
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
    # The sample axes of the inputs that can be differentiated by, in their order.
    dims = []
    for dim, x in zip(experiment.dims, tree_leaves(experiment.inputs), strict=True):
        if dim is not None and x.is_floating_point():
            dims.append(dim)
    directions = []
    for x, dim in zip(inputs, dims, strict=True):
        shape = x.movedim(dim, 0)[0].shape
        directions.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    half = samples // 2
    # One backward pass gives a whole row: the derivatives by all samples of the other half.
    D = torch.zeros(half, half, dtype=torch.float64)
    for n in range(half):
        with experiment.backward():
            grads = torch.autograd.grad(rows[n] @ u, inputs, retain_graph=True, allow_unused=True)
        for grad, dim, v in zip(grads, dims, directions, strict=True):
            if grad is not None:
                others = grad.movedim(dim, 0)[half:]
                D[n] += (others * v).reshape(samples - half, -1).sum(1)
    values = torch.linalg.svdvals(D)
    # No derivative at all: the dependence, if any, is not smooth.
    if float(values[0]) == 0:
        return 0
    return int((values > NEGLIGIBLE * values[0]).sum())


def _redrawn(experiment: Experiment, samples: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Return predictions for another number of samples, and the inputs that they come from.

    ``[samples, entries]``, in float64. The samples are drawn from the batch and get noise, so that
    no two of them are equal: that would bound the rank.
    """
    if experiment.cut_inside_model:
        raise Untestable("the predictions lie inside the model")
    generator = torch.Generator().manual_seed(seed)
    smooth: list[Tensor] = []

    def redrawn(x: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return in_double(x.detach())
        chosen = torch.randint(experiment.samples, (samples,), generator=generator)
        x = x.detach().cpu().index_select(dim, chosen)
        if not x.is_floating_point():
            # Tokens and labels are redrawn, and have no derivatives.
            return x
        x = x.double()
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        x = (x + x.abs().mean() * noise).requires_grad_()
        smooth.append(x)
        return x

    inputs = experiment.with_leaves(redrawn)
    program = experiment.program.in_double()
    originals = [*experiment.program.modules, *experiment.originals]
    with program.untouched(experiment.graph.rng, originals), torch.enable_grad():
        outputs = program.forward(inputs)
    leaves = tensor_leaves(outputs)
    rows = []
    for i, dim in zip(experiment.places, experiment.out_dims, strict=True):
        if dim is not None and leaves[i].is_floating_point():
            rows.append(leaves[i].movedim(dim, 0).reshape(samples, -1))
    return torch.cat(rows, 1), smooth
