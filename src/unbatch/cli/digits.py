"""The net of the tour and the digits it learns to read.

Nothing of the package is used here: the training loop is that of any user.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from unbatch.cli.texts import BATCH

MSG_NO_SKLEARN = (
    "The demo trains on the handwritten digits that come with scikit-learn, which is not "
    "installed. Install it with `pip install 'unbatch[demo]'`."
)


CLASSES = 10


STEP_SIZE = 0.2  # of the training


class Digits(NamedTuple):
    """Images ``[N, 1, 8, 8]`` and labels ``[N]``, to learn from and held out."""

    X: Tensor
    y: Tensor
    X_held_out: Tensor
    y_held_out: Tensor


class Net(nn.Module):
    """Twice convolution, batch norm and ReLU, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16 * 4 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, 10]`` for images ``[N, 1, 8, 8]``."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return self.linear(x.flatten(1))


def load() -> Digits:
    """Return the digits, a fifth of them held out.

    Raises ``ImportError`` where scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(MSG_NO_SKLEARN) from error
    data = load_digits()
    # Grey values go from 0 to 16.
    X = torch.as_tensor(data.images, dtype=torch.get_default_dtype()).unsqueeze(1) / 16
    y = torch.as_tensor(data.target)
    # Of a generator of its own: the split is the same whatever was drawn before.
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    held_out, learned = order[: len(y) // 5], order[len(y) // 5 :]
    return Digits(X[learned], y[learned], X[held_out], y[held_out])


def train(model: Net, digits: Digits, epochs: int, out: Console) -> float:
    """Train under a progress bar; return the accuracy on held-out digits."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[accuracy]}"),
        TimeElapsedColumn(),
    )
    steps = epochs * (len(digits.y) // BATCH)
    with Progress(*columns, console=out) as progress:
        task = progress.add_task("training", total=steps, accuracy="")
        for _ in range(epochs):
            for batch in _whole_batches(len(digits.y)):
                _step(model, digits.X[batch], digits.y[batch])
                progress.advance(task)
            reached = f"{accuracy(model, digits):.1%} of held-out digits read correctly"
            progress.update(task, accuracy=reached)
    return accuracy(model, digits)


def _whole_batches(count: int) -> Iterator[Tensor]:
    """Yield the indices of batches in random order, without the rest that fills none."""
    for batch in torch.randperm(count).split(BATCH):
        # The statistics of a few leftover samples would disturb the running ones.
        if len(batch) == BATCH:
            yield batch


def _step(model: Net, X: Tensor, y: Tensor) -> None:
    """Take a step of plain gradient descent."""
    # By hand, because the first optimizer of torch.optim takes seconds to import.
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(model(X), y), parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p.add_(g, alpha=-STEP_SIZE)


def accuracy(model: Net, digits: Digits) -> float:
    """Return the share of held-out digits that the model, in eval mode, reads correctly."""
    # In train mode, held-out digits would be normalised by each other, and would move the running
    # statistics.
    model.eval()
    with torch.no_grad():
        right = model(digits.X_held_out).argmax(1) == digits.y_held_out
    model.train()
    return float(right.double().mean())
