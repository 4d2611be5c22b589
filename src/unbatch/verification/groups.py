"""Groups of samples that depend on each other and on no others, as an experiment shows them.

Where there are such groups, predictions may depend on the others through statistics of their group
alone. To exchange samples of two groups then changes the statistics of both, and says nothing. To
exchange samples within a group leaves them what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from unbatch.verification.counterexample import Counterexample
from unbatch.verification.experiment import Experiment, relative_change
from unbatch.verification.forward_tests import not_equivariant, partitions
from unbatch.verification.variants import GAIN

# Members of a group depend on each other at once. Of a longer chain it is no statistics.
STEPS = 4

# Of so many members it is looked whether they move their own prediction.
MEMBERS = 8

# Others close to the data, and far from them: the largest of a group may hide all others.
VARIANTS = ("noisy", "large", "huge")


def not_by_statistics(
    experiment: Experiment, difference: Counterexample | None, independent: bool
) -> Counterexample | None:
    """Return that permuting samples does more than statistics, of all or of groups, explain.

    ``difference``: what permuting all samples does. ``independent``: no sample depends on others,
    so that there are no statistics.
    """
    if difference is None or independent:
        return difference
    group = _some_group(experiment)
    if not group:
        return difference
    # Within one group alone, so that statistics of groups stay what they are.
    order = torch.arange(experiment.samples)
    order[group] = torch.tensor(group).roll(1)
    return not_equivariant(experiment, [order])


def _some_group(experiment: Experiment) -> list[int]:
    """Return several samples that depend on each other and on no others; none where all do."""
    dependent: set[int] = set()
    for keep in partitions(experiment.samples):
        kept = torch.nonzero(keep)[:, 0].tolist()
        dependent |= _moved_by(experiment, keep).intersection(kept)
    if not dependent:
        return []
    group = _connected(experiment, min(dependent))
    if len(group) in (1, experiment.samples):
        return []
    members = sorted(group)
    return members if _is_group(experiment, members) else []


def _connected(experiment: Experiment, sample: int) -> set[int]:
    """Return the samples whose predictions move with a sample, or with one of those, and so on.

    All samples where that does not come to an end soon.
    """
    group = {sample}
    for _ in range(STEPS):
        moved = _moved_by(experiment, _all_but(experiment, group))
        if moved <= group:
            return group
        group |= moved
    return set(range(experiment.samples))


def _is_group(experiment: Experiment, members: Sequence[int]) -> bool:
    """Tell whether no other samples move predictions of these, and each moves its own.

    Samples that have changed places do not: nobody would call that statistics.
    """
    only_these = ~_all_but(experiment, members)
    if not _moved_by(experiment, only_these).isdisjoint(members):
        return False
    return all(n in _moved_by(experiment, _all_but(experiment, [n])) for n in members[:MEMBERS])


def _all_but(experiment: Experiment, samples: Iterable[int]) -> Tensor:
    """Return which samples are left where some are replaced: ``[N]``, boolean."""
    keep = torch.ones(experiment.samples, dtype=torch.bool)
    keep[list(samples)] = False
    return keep


def _moved_by(experiment: Experiment, keep: Tensor) -> set[int]:
    """Return which predictions move when all samples but these are replaced."""
    moved: set[int] = set()
    for variant in VARIANTS:
        try:
            change = _changes(experiment, keep, variant)
        except Exception:
            continue  # the model does not take that batch
        least = experiment.tolerance * GAIN.get(variant, 1.0)
        moved.update(torch.nonzero(change > least)[:, 0].tolist())
    return moved


def _changes(experiment: Experiment, keep: Tensor, variant: str) -> Tensor:
    """Return by how much each prediction moves, relative to its size."""
    new = experiment.rows(experiment.predict(experiment.changed(keep, variant)))
    return relative_change(experiment.rows(experiment.base), new)
