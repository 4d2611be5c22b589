"""Backends for laplace-torch: ``Laplace(model, .., backend=UnbatchGGN)``.

Importing this file imports laplace. The loss is laplace's: a sum over samples, cross-entropy for a
classification and half the squared error for a regression. ``Laplace.fit`` puts the model into eval
mode and leaves it there; a backend that is called directly takes the mode that the model is in.

Legend: N samples, C entries of a prediction, P parameters that require a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unbatch.analysis.consequences import consequence
from unbatch.capture.isolation import untouched
from unbatch.curvature.ggn import GGN
from unbatch.curvature.ggn_quantities import DiagGGN
from unbatch.errors import InputError, StructureError
from unbatch.integrations import needed
from unbatch.linalg import spectra
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import sum_of
from unbatch.problem.problem import Problem

MSG_KRON = (
    "UnbatchGGN has no Kronecker factors for this model: {reason} Take hessian_structure='full', "
    "'diag' or 'lowrank'."
)
MSG_KRON_LAST_LAYER = "of the last layer alone they are not computed yet."
MSG_KRON_LAYERS = (
    "{names} are not weight and bias of linear layers with inputs of shape [N, features] that are "
    "used once, and this release has Kronecker factors for no others."
)
MSG_PREDICTIONS = (
    "Jacobians need predictions of shape [N, C], and those of this model have shape {shape}."
)


# The base classes of backends, so laplace is needed to import this file.
_curvature: Any = needed("laplace.curvature", "laplace", "laplace-torch")


class _Problems(dict[Any, Problem]):
    """The problem of the last batch for each loss; none in copies of a backend."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _Problems, ()


class _Backend:
    """What both backends share; the attributes are set by laplace's own classes."""

    model: nn.Module
    lossfunc: nn.Module
    params: list[nn.Parameter]
    likelihood: Any
    factor: float
    last_layer: bool
    subnetwork_indices: Tensor | None

    def _loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Return laplace's loss. In a classification the classes are along the last axis."""
        if self.likelihood != "regression":
            f, y = f.reshape(-1, f.shape[-1]), y.flatten()
        loss: Tensor = self.lossfunc(f, y)
        return loss

    def _problem(self, x: Any, y: Tensor) -> Problem:
        return self._problem_of(self._loss, x, y)

    def _problem_of(self, loss: Callable[..., Tensor], x: Any, y: Tensor) -> Problem:
        """Return the problem on a batch.

        Made from that of the batch before, whose recordings may serve: a fit goes through many.
        """
        key = loss.__name__, self.model, self.lossfunc, self.likelihood
        last = vars(self).setdefault("_problems", _Problems())
        inputs = _arguments(x)
        if key in last:
            try:
                last[key] = last[key].with_batch(inputs, y)
                return last[key]
            except InputError:
                pass  # data of another structure
        last[key] = Problem(self.model, loss, (inputs, y))
        return last[key]

    def _chosen(self, t: Tensor) -> Tensor:
        """Return the entries of the subnetwork, along the last axis."""
        if self.subnetwork_indices is None:
            return t
        return t[..., self.subnetwork_indices]

    def _scaled_loss(self, problem: Problem, y: Tensor) -> Tensor:
        return self.factor * self._loss(problem.predictions(), y).detach()


class UnbatchGGN(_Backend, _curvature.GGNInterface):
    """The Gauss-Newton matrix, for ``hessian_structure`` "full", "diag", "lowrank" and "kron".

    Any model that ``Problem`` takes. Where samples depend on each other (batch norm in train mode,
    or one that tracks no statistics, in eval mode as well), the matrix is that of the batch, exact
    through the statistics. ``low_rank``: how many eigenpairs a "lowrank" fit keeps. ``stochastic``:
    laplace's sampled Fisher matrix for "full", and columns drawn from the likelihood for "diag",
    ``num_samples`` of them.

    "kron" is defined where no sample depends on another, and is computed for nets of linear layers.
    Otherwise it raises ``StructureError`` with the reason.
    """

    def __init__(self, *args: Any, low_rank: int = 10, **kwargs: Any) -> None:
        """``args``, ``kwargs``: those of laplace's ``GGNInterface``."""
        super().__init__(*args, **kwargs)
        self.low_rank = low_rank

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """``∂F/∂θ``, ``[N, C, P]``, and the predictions ``[N, C]``.

        The rows of an entry c are those of the loss ``Σ_n F_nc``, so they are exact where samples
        depend on each other. With ``enable_backprop`` they are laplace's own.
        """
        if enable_backprop:
            own: tuple[Tensor, Tensor] = super().jacobians(x, enable_backprop)
            return own
        # The entry is a target, so that the model is recorded once for all of them.
        entry = torch.zeros(_samples(x), 1, dtype=torch.long, device=self.params[0].device)
        problem = self._problem_of(_sum_of_entry, x, entry)
        f: Tensor = problem.predictions()
        if f.ndim != 2:
            raise StructureError(MSG_PREDICTIONS.format(shape=tuple(f.shape)))
        rows = []
        for c in range(f.shape[1]):
            of_entry = problem.with_batch(_arguments(x), entry + c)
            gradients = of_entry.gradients(parameters=self.params)
            rows.append(self._chosen(gradients.flat()))
        return torch.stack(rows, 1), f

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the loss, and the diagonal, ``[P]``."""
        if self.last_layer:
            own: tuple[Tensor, Tensor] = super().diag(x, y, **kwargs)
            return own
        problem = self._problem(x, y)
        diagonal = self.factor * self._chosen(self._ggn(problem).diag())
        return self._scaled_loss(problem, y), diagonal

    def eig_lowrank(self, data_loader: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ``low_rank`` largest eigenpairs, ``[P, k]`` and ``[k]``, and the loss.

        Of the sum over batches. Raises ``ConvergenceError`` where the pairs do not converge.
        """
        device = self.params[0].device
        losses: list[Tensor] = []
        matrices: list[Operator] = []
        for x, y in data_loader:
            # A mapping of inputs stays where it is.
            if isinstance(x, Tensor):
                x = x.to(device)
            y = y.to(device)
            problem = self._problem(x, y)
            losses.append(self._scaled_loss(problem, y))
            matrices.append(self._ggn(problem))
        values, vectors = self._largest(matrices)
        # The matrix may have fewer eigenvalues than that; the others are rounding.
        rounding = len(vectors) * torch.finfo(values.dtype).eps * values.abs().max()
        significant = values > rounding
        return vectors[:, significant], self.factor * values[significant], sum_of(losses)

    def _largest(self, matrices: list[Operator]) -> spectra.Eigenpairs:
        first, *others = matrices
        if not others and isinstance(first, GGN):
            # By its Gram matrix; a sum has none.
            return first.eigh(self.low_rank)
        total = first
        for other in others:
            total = total + other
        pairs: spectra.Eigenpairs = spectra.eigh(total, self.low_rank)
        return pairs

    def _ggn(self, problem: Problem) -> GGN:
        if not self.stochastic:
            return problem.ggn(parameters=self.params)
        # From the random state of PyTorch, as laplace's own draws are.
        seed = int(torch.randint(2**31, ()))
        return problem.ggn(parameters=self.params, mc_samples=self.num_samples, seed=seed)

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the loss, and laplace's ``Kron``.

        For every linear layer ``[B, A]`` for its weight and ``[B]`` for its bias. ``B`` is the
        bias's block of the Gauss-Newton matrix, ``[out, out]``, and ``A`` the mean of ``z zᵀ`` over
        the inputs ``z`` of the layer, ``[in, in]``, times n/N for a batch of n out of N.

        Raises ``StructureError`` for a model that has no such factors.
        """
        problem = self._problem(x, y)
        if self.last_layer:
            raise StructureError(MSG_KRON.format(reason=MSG_KRON_LAST_LAYER))
        # KFLR is the name of these factors without sampling in the table of consequences.
        follows = consequence("KFLR", problem.structure.statuses)
        if follows.outcome != "exact":
            raise StructureError(MSG_KRON.format(reason=follows.reason))
        factors = []
        for layer, z in self._layers(x, problem).items():
            B = problem.ggn(parameters=[layer.bias]).to_dense()
            A = z.T @ z / len(z) * (len(y) / N)
            factors += [[B, A], [B.clone()]]
        kron = needed("laplace.utils", "laplace", "laplace-torch").Kron(factors)
        return self._scaled_loss(problem, y), self.factor * kron

    def _layers(self, x: Any, problem: Problem) -> dict[nn.Linear, Tensor]:
        """Return the linear layers with their inputs ``[n, in]``, in the order of the parameters.

        Raises ``StructureError`` where a parameter is not weight or bias of such a layer.
        """
        names = {p: name for name, p in self.params_dict.items()}
        diagonals = problem.compute(DiagGGN(per_component=True), parameters=self.params)
        layers = {}
        covered: set[Tensor] = set()
        for layer, inputs in _linear_inputs(self.model, x).items():
            if len(inputs) != 1 or inputs[0].ndim != 2:
                # Several uses, or several positions in a sample: no single z per sample.
                continue
            if layer.weight not in names or layer.bias not in names:
                # Not trained.
                continue
            weight, bias = diagonals[names[layer.weight]], diagonals[names[layer.bias]]
            if _is_paired(weight, bias, inputs[0]):
                layers[layer] = inputs[0]
                covered |= {layer.weight, layer.bias}
        others = [name for p, name in names.items() if p not in covered]
        # A parameter of two layers is covered twice, and fits into neither of their factors.
        if others or 2 * len(layers) != len(self.params):
            layer_names = ", ".join(others) or "Parameters"
            reason = MSG_KRON_LAYERS.format(names=layer_names)
            raise StructureError(MSG_KRON.format(reason=reason))
        return layers


def _linear_inputs(model: nn.Module, x: Any) -> dict[nn.Linear, list[Tensor]]:
    """Return what enters each linear layer with a bias, a tensor for every call of it."""
    inputs: dict[nn.Linear, list[Tensor]] = {}

    def keep(layer: Any, args: tuple[Any, ...]) -> None:
        inputs[layer].append(args[0])

    # ``untouched`` takes the hooks off again, too.
    with untouched([model]), torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                inputs[layer] = []
                layer.register_forward_pre_hook(keep)
        model(x)
    return inputs


def _is_paired(weight: Tensor, bias: Tensor, z: Tensor) -> bool:
    """Return whether the columns of a weight are those of the bias times the layer's input.

    By the diagonals of each component, ``[n, out, in]`` and ``[n, out]``: the first are the second
    times ``z²``, for every sample. Not so where a weight or bias is used anywhere else.
    """
    expected = bias[:, :, None] * z.square()[:, None, :]
    tolerance = torch.finfo(z.dtype).eps ** 0.5
    return bool((weight - expected).norm() <= tolerance * expected.norm())


class UnbatchEF(_Backend, _curvature.EFInterface):
    """The empirical Fisher matrix, ``Σ_n g_n g_nᵀ``, for ``hessian_structure`` "full" and "diag".

    ``g_n`` is the gradient of the n-th term of the loss, where samples depend on each other, too:
    the rows by component.
    """

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of the gradient, ``[N, P]``, and the loss, both without laplace's factor."""
        problem = self._problem(x, y)
        rows = self._chosen(problem.gradients(parameters=self.params).flat())
        return rows, self._loss(problem.predictions(), y).detach()


def _sum_of_entry(f: Tensor, c: Tensor) -> Tensor:
    """``Σ_n F_nc``, with c as a target of every sample."""
    if f.ndim != 2:
        # Refused later, with a message.
        return f.sum()
    return f.gather(1, c).sum()


def _samples(x: Any) -> int:
    leaf: Tensor = next(t for t in tree_leaves(x) if isinstance(t, Tensor))
    return len(leaf)


def _arguments(x: Any) -> Any:
    """Return inputs as laplace's models take them: a mapping is one argument."""
    return (x,) if isinstance(x, Mapping) else x
