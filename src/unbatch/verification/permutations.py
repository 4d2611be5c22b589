"""Predictions for a permuted batch, with the noise of every sample permuted along.

Dropout gives each sample a mask of its own. If only the samples were permuted, sample n would get
the mask of another one, and its prediction would change for no reason of the model. So the noise
that was recorded is permuted, too, wherever the analysis says which sample an element of it is for
(``noise_owners.py``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from unbatch.verification.experiment import Experiment, Untestable
from unbatch.verification.noise import draws
from unbatch.verification.noise_owners import owners_of_noise, sample_axis
from unbatch.verification.noise_use import MSG_NOISE, Owners

MSG_AMOUNTS = "samples use different amounts of noise"


def predict_permuted(experiment: Experiment, order: Tensor) -> list[Tensor]:
    """Return the predictions with sample ``order[n]``, and its noise, in the place of sample n.

    Raises ``Untestable`` where it cannot be said which noise belongs to which sample.
    """
    inputs = experiment.permuted(order)
    if not draws(experiment.graph):
        return experiment.predict(inputs)
    return experiment.replayed(inputs, permuted_noise(experiment, order))


def permuted_noise(experiment: Experiment, order: Tensor) -> dict[int, Tensor]:
    """Return all noise of the recording by value, that of sample ``order[n]`` in the place of n.

    Raises ``Untestable`` where it cannot be said which noise belongs to which sample.
    """
    noise = {}
    for ref, owners in owners_of_noise(experiment).items():
        value = experiment.graph.known(ref)
        if value is None:
            raise Untestable(MSG_NOISE)
        noise[ref] = value
        if owners is not None:
            noise[ref] = _permute_owned(value, owners, order)
    return noise


def _permute_owned(value: Tensor, owners: Owners, order: Tensor) -> Tensor:
    """Return ``value`` where sample n has the elements of sample ``order[n]``, in their order."""
    axis = sample_axis(owners, len(order))
    if axis is not None:
        return value.index_select(axis, order.to(value.device))
    flat = value.reshape(-1)
    places_of = [_places_of(owners, n) for n in range(len(order))]
    out = flat.clone()
    for n, m in enumerate(order.tolist()):
        if len(places_of[n]) != len(places_of[m]):
            raise Untestable(MSG_AMOUNTS)
        out[places_of[n]] = flat[places_of[m]]
    return out.reshape(value.shape)


def _places_of(owners: Owners, n: int) -> Tensor:
    """Return the places of the elements of sample n, in a flat tensor."""
    return torch.from_numpy(np.flatnonzero(owners.reshape(-1) == n))
