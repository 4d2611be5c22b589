"""Backends for laplace-torch: ``Laplace(model, .., backend=UnbatchGGN)``.

Importing this file imports laplace. The loss is laplace's: a sum over samples, cross-entropy for a classification and
half the squared error for a regression. ``Laplace.fit`` puts the model into eval mode and leaves it there; asked by
itself, a backend takes the mode that the model is in.

Legend: N samples, C entries of a prediction, P parameters that require a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from unbatch.analysis.consequences import consequence
from unbatch.capture.isolation import untouched
from unbatch.curvature.ggn import GGN
from unbatch.curvature.ggn_quantities import DiagGGN
from unbatch.errors import StructureError
from unbatch.integrations import needed
from unbatch.linalg import spectra
from unbatch.linalg.operators import Operator
from unbatch.linalg.rows import sum_of
from unbatch.problem.problem import Problem

MSG_KRON = "UnbatchGGN has no Kronecker factors for this model: {reason} Take hessian_structure='full', 'diag' or 'lowrank'."


MSG_KRON_LAYERS = (
    "{names} are not weight and bias of linear layers with inputs of shape [N, features] that are used once, and this "
    "release has Kronecker factors for no others."
)


MSG_PREDICTIONS = "Jacobians are those of predictions of shape [N, C]; this model's are {shape}."


_curvature: Any = needed("laplace.curvature", "laplace", "laplace-torch")


class _Unbatch:
    """What both backends share."""

    model: nn.Module
    lossfunc: nn.Module
    params: list[nn.Parameter]
    likelihood: Any
    factor: float
    last_layer: bool
    subnetwork_indices: Tensor | None

    def _loss(self, f: Tensor, y: Tensor) -> Tensor:
        """As in laplace's other backends: the last axis of the predictions of a classification has the classes."""
        loss: Tensor = self.lossfunc(
            *((f, y) if self.likelihood == "regression" else (_by_class(f), y.flatten()))
        )
        return loss

    def _problem(self, x: Any, y: Tensor) -> Problem:
        return Problem(self.model, self._loss, (_arguments(x), y))

    def _chosen(self, t: Tensor) -> Tensor:
        """The entries of the subnetwork, along the last axis."""
        return t if self.subnetwork_indices is None else t[..., self.subnetwork_indices]

    def _scaled_loss(self, problem: Problem, y: Tensor) -> Tensor:
        return self.factor * self._loss(problem.predictions(), y).detach()


class UnbatchGGN(_Unbatch, _curvature.GGNInterface):
    """The Gauss-Newton matrix, for ``hessian_structure`` "full", "diag", "lowrank", and "kron" where it is defined.

    Any model that ``Problem`` takes. Where samples listen to each other (batch norm in train mode, or one that tracks
    no statistics, in eval mode as well), the matrix is that of the batch, exact through the statistics. ``low_rank``:
    how many eigenpairs a "lowrank" fit keeps. ``stochastic``: laplace's sampled Fisher matrix for "full", and columns
    drawn from the likelihood for "diag", ``num_samples`` of them.

    "kron" is defined where no sample listens to another, and is computed for nets of linear layers. Otherwise it raises
    ``StructureError`` with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        last_layer: bool = False,
        subnetwork_indices: Tensor | None = None,
        dict_key_x: str = "input_ids",
        dict_key_y: str = "labels",
        stochastic: bool = False,
        num_samples: int = 1,
        low_rank: int = 10,
    ) -> None:
        super().__init__(
            model,
            likelihood,
            last_layer,
            subnetwork_indices,
            dict_key_x,
            dict_key_y,
            stochastic,
            num_samples,
        )
        self.low_rank = low_rank

    def jacobians(self, x: Any, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
        """``∂F/∂θ``, ``[N, C, P]``, and the predictions ``[N, C]``; with ``enable_backprop`` laplace's own.

        The rows of an entry c are those of the loss ``Σ_n F_nc``, so they are exact where samples listen to each other.
        """
        if enable_backprop:
            found: tuple[Tensor, Tensor] = super().jacobians(x, enable_backprop)
            return found
        first = torch.zeros(_samples(x), 1, dtype=torch.long, device=self.params[0].device)
        problem = Problem(self.model, _entry, (_arguments(x), first))
        f: Tensor = problem.predictions()
        if f.ndim != 2:
            raise StructureError(MSG_PREDICTIONS.format(shape=tuple(f.shape)))
        each = (problem.with_batch(_arguments(x), first + c) for c in range(f.shape[1]))
        rows = [
            self._chosen(of_entry.gradients(parameters=self.params).flat()) for of_entry in each
        ]
        return torch.stack(rows, 1), f

    def diag(self, x: Any, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Loss, and the diagonal, ``[P]``."""
        if self.last_layer:
            found: tuple[Tensor, Tensor] = super().diag(x, y, **kwargs)
            return found
        problem = self._problem(x, y)
        diagonal = self.factor * self._chosen(self._ggn(problem).diag())
        return self._scaled_loss(problem, y), diagonal

    def eig_lowrank(self, data_loader: Iterable[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The ``low_rank`` largest eigenpairs, ``[P, k]`` and ``[k]``, of the sum over batches, and the loss.

        Raises ``ConvergenceError`` where they are not found.
        """
        device, losses, matrices = self.params[0].device, [], list[Operator]()
        for x, y in data_loader:
            problem = self._problem(_to(x, device), y.to(device))
            losses.append(self._scaled_loss(problem, y.to(device)))
            matrices.append(self._ggn(problem))
        values, vectors = self._largest(matrices)
        felt = values > len(vectors) * torch.finfo(values.dtype).eps * values.abs().max()
        return vectors[:, felt], self.factor * values[felt], sum_of(losses)

    def _largest(self, matrices: list[Operator]) -> spectra.Eigenpairs:
        first, *others = matrices
        if not others and isinstance(first, GGN):
            return first.eigh(self.low_rank)
        total = first
        for other in others:
            total = total + other
        pairs: spectra.Eigenpairs = spectra.eigh(total, self.low_rank)
        return pairs

    def _ggn(self, problem: Problem) -> GGN:
        draws = self.num_samples if self.stochastic else None
        seed = int(torch.randint(2**31, ())) if self.stochastic else 0
        return problem.ggn(parameters=self.params, mc_samples=draws, seed=seed)

    def kron(self, x: Any, y: Tensor, N: int, **kwargs: Any) -> tuple[Tensor, Any]:
        """Loss, and laplace's ``Kron``: for every linear layer ``[B, A]`` for its weight and ``[B]`` for its bias.

        ``B`` is the bias's block of the Gauss-Newton matrix, ``[out, out]``, and ``A`` the mean of ``z zᵀ`` over the
        inputs ``z`` of the layer, ``[in, in]``, times n/N for a batch of n out of N. Raises ``StructureError``.
        """
        problem = self._problem(x, y)
        if self.last_layer:
            raise StructureError(
                MSG_KRON.format(reason="of the last layer alone they are not computed yet.")
            )
        follows = consequence("KFLR", problem.structure.statuses)
        if follows.outcome != "exact":
            raise StructureError(MSG_KRON.format(reason=follows.reason))
        factors = []
        for layer, z in self._layer_inputs(x, problem).items():
            B = problem.ggn(parameters=[layer.bias]).to_dense()
            A = z.T @ z / len(z) * (len(y) / N)
            factors += [[B, A], [B.clone()]]
        kron = needed("laplace.utils", "laplace", "laplace-torch").Kron(factors)
        return self._scaled_loss(problem, y), self.factor * kron

    def _layer_inputs(self, x: Any, problem: Problem) -> dict[nn.Linear, Tensor]:
        """What enters each linear layer, ``[n, in]``, in the order of the parameters; raises where others have some."""
        layers = [
            m for m in self.model.modules() if isinstance(m, nn.Linear) and m.bias is not None
        ]
        seen: dict[nn.Linear, list[Tensor]] = {m: [] for m in layers}
        with untouched([self.model]), torch.no_grad():  # takes the hooks off again, too
            for layer in layers:
                layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0]))
            self.model(x)
        fits = [m for m in layers if len(seen[m]) == 1 and seen[m][0].ndim == 2]
        names = {p: n for n, p in self.params_dict.items()}
        parts = problem.compute(DiagGGN(per_component=True), parameters=self.params)
        fits = [m for m in fits if m.bias in names and m.weight in names]
        fits = [
            m for m in fits if _is_paired(parts[names[m.weight]], parts[names[m.bias]], seen[m][0])
        ]
        known = [p for m in fits for p in (m.weight, m.bias)]
        strange = [n for p, n in names.items() if not any(p is q for q in known)]
        if strange or len(known) != len(self.params):
            raise StructureError(
                MSG_KRON.format(
                    reason=MSG_KRON_LAYERS.format(names=", ".join(strange) or "Parameters")
                )
            )
        return {m: seen[m][0] for m in fits}


def _is_paired(weight: Tensor, bias: Tensor, z: Tensor) -> bool:
    """Whether the columns of a weight are those of the bias times what was seen to enter, for every sample.

    Not so where a weight or bias is used anywhere else. ``[n, out, in]`` and ``[n, out]`` are diagonals by component.
    """
    wanted = bias[:, :, None] * z.square()[:, None, :]
    return bool((weight - wanted).norm() <= torch.finfo(z.dtype).eps ** 0.5 * wanted.norm())


class UnbatchEF(_Unbatch, _curvature.EFInterface):
    """The empirical Fisher matrix, ``Σ_n g_n g_nᵀ``, for ``hessian_structure`` "full" and "diag".

    ``g_n`` is the gradient of the n-th term of the loss, where samples listen to each other as well: rows by component.
    """

    def gradients(self, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the gradient, ``[N, P]``, and the loss, both without laplace's factor."""
        problem = self._problem(x, y)
        rows = self._chosen(problem.gradients(parameters=self.params).flat())
        return rows, self._loss(problem.predictions(), y).detach()


def _entry(f: Tensor, c: Tensor) -> Tensor:
    """``Σ_n F_nc``, with c as a target of every sample."""
    return f.gather(1, c).sum() if f.ndim == 2 else f.sum()


def _samples(x: Any) -> int:
    leaf: Tensor = next(t for t in tree_leaves(x) if isinstance(t, Tensor))
    return len(leaf)


def _by_class(f: Tensor) -> Tensor:
    return f.reshape(-1, f.shape[-1])


def _arguments(x: Any) -> Any:
    """Inputs as laplace's models take them: a mapping is one argument, not several by name."""
    return (x,) if isinstance(x, Mapping) else x


def _to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x
