"""Contrastive pre-training in the style of SimCLR, with two views of each digit.

The script is as usual, but for the three lines marked `unbatch`. They show

- that two things couple the samples. The batch norms couple the predictions: *independent forward*
  fails, as in any net with batch norm. The loss compares each image with all others: *reduction*
  and *SIMD loss* fail as well, and the report names the line. So there is no loss per sample and no
  per-sample gradient, with or without batch norm;
- what still exists: the gradient is a sum with one part for each image, through the embedding of
  that image. The squared norms of the parts say which images contribute most;
- how strongly the embedding of one image depends on other images: the share of its squared
  derivatives w.r.t. their pixels, as an estimate. Without batch norm it would be 0. It does not
  involve the loss.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unbatch as ub  # unbatch


def augment(images):
    """Shifted by up to a pixel, brightened or darkened, with noise."""
    shifts = torch.randint(-1, 2, (len(images), 2)).tolist()
    images = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(images, shifts, strict=True)])
    return images * (0.7 + 0.6 * torch.rand(len(images), 1, 1, 1)) + 0.05 * torch.randn_like(images)


class SimCLR(nn.Module):
    """An encoder, and the projection head that is thrown away after training."""

    def __init__(self, dim=16):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.projector = nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, dim))

    def forward(self, views):
        """Two views of each image, ``[n, 2, 1, 8, 8]``, to embeddings ``[n, 2, dim]``."""
        n = len(views)
        return self.projector(self.encoder(views.flatten(0, 1))).view(n, 2, -1)


def nt_xent(z, temperature=0.5):
    """The normalised temperature-scaled cross-entropy: find the other view of the same image among all."""
    n = len(z)
    z = F.normalize(z.transpose(0, 1).flatten(0, 1), dim=1)
    similarity = z @ z.T / temperature
    similarity = similarity.masked_fill(torch.eye(2 * n, dtype=torch.bool), float("-inf"))
    partners = torch.arange(2 * n).roll(n)
    return F.cross_entropy(similarity, partners)


def main():
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train_loader = DataLoader(TensorDataset(images), batch_size=24, shuffle=True, drop_last=True)

    model = SimCLR()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-6)
    model.train()
    for epoch in range(2):
        total = 0.0
        for (x,) in train_loader:
            views = torch.stack([augment(x), augment(x)], 1)
            loss = nt_xent(model(views))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        print(f"epoch {epoch}: loss {total / len(train_loader):.3f}")

    problem = ub.Problem(model, nt_xent, (views, None))  # unbatch
    print(problem.structure, problem.compute(ub.SquaredNorms()).total, problem.crosstalk(4).strength, sep="\n\n")  # unbatch


if __name__ == "__main__":
    main()
