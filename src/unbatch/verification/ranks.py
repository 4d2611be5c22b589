"""Does a number of statistics that does not grow with the batch carry all cross-sample dependence?

Let ``F_n = f(x_n, s)`` with R statistics ``s``. Take the samples of one half of the batch as ``n``
and those of the other half as ``m``, a random entry ``u`` of the predictions and a random direction
``v`` of the inputs. Then the matrix

    D[n, m] = uᵀ (∂F_n/∂x_m) v = uᵀ (∂F_n/∂s) (∂s/∂x_m) v

is a product of ``[N/2, R]`` and ``[R, N/2]``, so its rank is at most R whatever N is. A rank that
grows with the batch speaks against such an ``s``. Alone it says nothing, as no number of samples is
larger than every R: a Gram matrix of k features is ``k²`` numbers. So there also has to be what no
number of statistics carries: a function such as exp, of every pair of samples, that has a matrix
over the pairs whose rank grows as well. (That of ``exp(a_n + b_m)`` has the rank 1.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unbatch.capture.after_run import AfterRun
from unbatch.capture.ops import base_name
from unbatch.capture.trees import flat
from unbatch.linalg.precision import in_double
from unbatch.verification.counterexample import Counterexample
from unbatch.verification.experiment import Experiment, Untestable, tensor_leaves

# Four times as many samples have to give at least three times the rank.
MANY, FEW, GROWTH = 128, 32, 3

# A smooth function of pairs of small samples has few singular values that are no rounding.
GROWTH_OF_PAIRS = 2

# Singular values below this, relative to the largest, are rounding of float64.
NEGLIGIBLE = 1e-9

# Functions of one number that are no polynomials, nor quotients of them.
CURVED = (
    *("abs", "sign", "sqrt", "rsqrt", "exp", "exp2", "expm1", "log", "log1p", "log2", "log10"),
    *("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "erf", "erfc", "erfinv"),
    *("sigmoid", "log_sigmoid_forward", "softplus", "gelu", "silu", "mish", "elu"),
    *("relu", "relu6", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "threshold"),
    *("clamp", "clamp_min", "gt", "ge", "lt", "le"),
    *("_softmax", "_log_softmax", "_safe_softmax", "_cdist_forward", "_euclidean_dist"),
)

# In these a softmax of the products of all queries and keys is out of sight.
ATTENTION = "_scaled_dot_product"

# Of so many functions of the pairs the ranks are looked at.
ENTRIES = 4


@dataclass(frozen=True)
class Ranks:
    """Of the cross-derivatives, and the largest of a matrix over the pairs of samples."""

    derivatives: int
    pairs: int


def growing_rank(experiment: Experiment) -> Counterexample | None:
    """Return that the rank of the cross-sample derivatives grows with the number of samples."""
    sizes = [_unlike_any(experiment, samples) for samples in (FEW, MANY)]
    try:
        few, many = [_ranks(experiment, samples) for samples in sizes]
    except Exception:
        # The model may have been made for this batch size.
        return None
    if not few.derivatives or many.derivatives < GROWTH * few.derivatives:
        return None
    if not few.pairs or many.pairs < GROWTH_OF_PAIRS * few.pairs:
        return None
    test = (
        f"rank of the cross-derivatives grows from {few.derivatives} ({sizes[0]} samples) "
        f"to {many.derivatives} ({sizes[1]})"
    )
    return Counterexample(test, many.derivatives / few.derivatives)


def _unlike_any(experiment: Experiment, samples: int) -> int:
    """Return a number of samples, as many or a few more, that is no other size of the program."""
    sizes: set[int] = set()
    for value in experiment.graph.values:
        sizes.update(value.shape)
    while samples in sizes:
        samples += 2
    return samples


class _Pairs(TorchDispatchMode):
    """Watches for functions of all pairs of ``samples`` samples that are no polynomials.

    ``rank``: the largest of their matrices, of the first half of the samples by the second.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.rank = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = base_name(func)
        if name.startswith(ATTENTION) and args[0].shape[-2] == args[1].shape[-2] == self.samples:
            query, key = args[0].detach(), args[1].detach()
            self._note((query @ key.mT / query.shape[-1] ** 0.5).softmax(-1))
        elif name in CURVED:
            for t in flat(out):
                if isinstance(t, Tensor):
                    self._note(t.detach())
        return out

    def _note(self, t: Tensor) -> None:
        """Note the ranks of a value that has an axis for each sample of a pair."""
        axes = [d for d, size in enumerate(t.shape) if size == self.samples]
        if len(axes) < 2 or t.is_complex():
            return
        half = self.samples // 2
        matrices = t.movedim(axes[:2], (0, 1)).reshape(self.samples, self.samples, -1)
        for entry in range(min(matrices.shape[2], ENTRIES)):
            self.rank = max(self.rank, _rank(matrices[:half, half:, entry].double()))


def _rank(matrix: Tensor) -> int:
    """Return the rank of a matrix, but for rounding."""
    values = torch.linalg.svdvals(matrix)
    if not float(values[0]) > 0:
        return 0
    return int((values > NEGLIGIBLE * values[0]).sum())


def _ranks(experiment: Experiment, samples: int) -> Ranks:
    """Return the ranks for a batch of ``samples`` redrawn samples.

    Raises what the model does where it does not take so many samples.
    """
    watch = _Pairs(samples)
    with watch:
        rows, inputs, after = _redrawn(experiment, samples)
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
        with experiment.backward(after):
            grads = torch.autograd.grad(rows[n] @ u, inputs, retain_graph=True, allow_unused=True)
        for grad, dim, v in zip(grads, dims, directions, strict=True):
            if grad is not None:
                others = grad.movedim(dim, 0)[half:]
                D[n] += (others * v).reshape(samples - half, -1).sum(1)
    # No derivative at all: the dependence, if any, is not smooth.
    return Ranks(_rank(D), watch.rank)


def _redrawn(experiment: Experiment, samples: int) -> tuple[Tensor, list[Tensor], AfterRun]:
    """Return predictions for another number of samples, the inputs that they come from, and what
    the run has left.

    ``[samples, entries]``, in float64. The samples are drawn from the batch and get noise, so that
    no two of them are equal: that would bound the rank.
    """
    if experiment.cut_inside_model:
        raise Untestable("the predictions lie inside the model")
    generator = torch.Generator().manual_seed(1)
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
    after = AfterRun()
    with program.untouched(experiment.graph.rng, originals, after), torch.enable_grad():
        outputs = program.forward(inputs)
    leaves = tensor_leaves(outputs)
    rows = []
    for i, dim in zip(experiment.places, experiment.out_dims, strict=True):
        if dim is not None and leaves[i].is_floating_point():
            rows.append(leaves[i].movedim(dim, 0).reshape(samples, -1))
    return torch.cat(rows, 1), smooth, after
