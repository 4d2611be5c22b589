"""Segmentation: a small U-Net with batch norm, trained by cross-entropy plus dice.

The script is as usual, but for the three lines marked `unbatch`. They show

- that not only the batch norms couple the samples: the loss is not a sum over images, because the
  dice coefficient sums over the whole batch. *Reduction* and *SIMD loss* fail, with the line of the
  quotient as culprit. With one dice coefficient per image, averaged, both would hold;
- the squared norms of the parts of the gradient that go through the prediction for each image. The
  parts sum to the gradient, whatever the loss;
- as a picture, how strongly the mask predicted for image n (row) depends on the pixels of image m
  (column). Everything off the diagonal comes through batch statistics; after `.eval()` it is zero.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unbatch as ub  # unbatch


class DoubleConv(nn.Sequential):
    def __init__(self, in_channels, out_channels):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


class Up(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, kernel_size=2, stride=2)
        self.conv = DoubleConv(in_channels, out_channels)

    def forward(self, below, skipped):
        return self.conv(torch.cat([skipped, self.up(below)], dim=1))


class UNet(nn.Module):
    def __init__(self, n_channels=1, n_classes=3, width=6):
        super().__init__()
        self.inc = DoubleConv(n_channels, width)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(width, 2 * width))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), DoubleConv(2 * width, 4 * width))
        self.up1 = Up(4 * width, 2 * width)
        self.up2 = Up(2 * width, width)
        self.outc = nn.Conv2d(width, n_classes, kernel_size=1)

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return self.outc(self.up2(self.up1(x3, x2), x1))


def dice_loss(probabilities, target, epsilon=1e-6):
    """One minus the dice coefficient of each class over the whole batch, on average."""
    inter = 2 * (probabilities * target).sum((0, 2, 3))
    sums = probabilities.sum((0, 2, 3)) + target.sum((0, 2, 3))
    return 1 - ((inter + epsilon) / (sums + epsilon)).mean()


def criterion(masks_pred, true_masks):
    one_hot = F.one_hot(true_masks, masks_pred.shape[1]).movedim(3, 1).float()
    return F.cross_entropy(masks_pred, true_masks) + dice_loss(masks_pred.softmax(1), one_hot)


def shapes(count, size=24):
    """Images with a disc (class 1) and a square (class 2) on noise, and their masks."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    masks = torch.zeros(count, size, size, dtype=torch.long)
    for mask in masks:
        y, x, radius = (int(torch.randint(low, high, ())) for low, high in ((6, 18), (6, 18), (3, 6)))
        mask[(rows - y) ** 2 + (columns - x) ** 2 <= radius**2] = 1
        y, x, side = (int(torch.randint(low, high, ())) for low, high in ((2, 14), (2, 14), (5, 9)))
        mask[y : y + side, x : x + side] = 2
    brightness = torch.tensor([0.0, 0.8, 1.0])[masks]
    return (brightness + 0.2 * torch.randn(masks.shape)).unsqueeze(1), masks


def main():
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(*shapes(160)), batch_size=8, shuffle=True)
    model = UNet()
    optimizer = torch.optim.RMSprop(model.parameters(), lr=2e-3, momentum=0.5)
    for epoch in range(2):
        model.train()
        epoch_loss = 0.0
        for images, true_masks in loader:
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(images), true_masks)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            epoch_loss += loss.item()
        print(f"epoch {epoch}: loss {epoch_loss / len(loader):.3f}")

    problem = ub.Problem(model, criterion, (images, true_masks))  # unbatch
    print(problem.structure, problem.compute(ub.SquaredNorms()).total, problem.crosstalk(probes=4), sep="\n\n")  # unbatch


if __name__ == "__main__":
    main()
