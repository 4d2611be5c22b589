"""Image classification: a small ResNet with batch norm on scikit-learn's digits.

The script is as usual, but for the three lines marked `unbatch`. They show

- that the predictions for a batch depend on each other, and which layers couple them: the batch
  norms, through `R` numbers in total. The loss itself is still a mean over the samples;
- the gradient of each term of the loss, as a squared norm. There is one term for each sample, but
  through the batch norms it depends on all samples of the batch; so these are called *per
  component*, not per sample;
- the largest eigenvalues of the Gauss-Newton matrix, through the batch norms. A step of gradient
  descent is stable along the steepest of these directions while the learning rate stays below two
  over the largest.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import unbatch as ub  # unbatch


class BasicBlock(nn.Module):
    def __init__(self, in_planes, planes, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = BasicBlock(8, 8)
        self.layer2 = BasicBlock(8, 16, stride=2)
        self.linear = nn.Linear(16, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.linear(x.mean((2, 3)))


def train(model, loader, criterion, optimizer, epoch):
    model.train()
    for step, (images, target) in enumerate(loader):
        optimizer.zero_grad()
        loss = criterion(model(images), target)
        loss.backward()
        optimizer.step()
        if step == len(loader) - 1:
            print(f"epoch {epoch}: loss {loss.item():.3f}")


def test(model, loader):
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for images, target in loader:
            correct += (model(images).argmax(1) == target).sum().item()
            total += len(target)
    print(f"accuracy on the test set: {correct / total:.1%}")


def main():
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    trainset, testset = torch.utils.data.random_split(dataset, [1500, len(dataset) - 1500])
    trainloader = DataLoader(trainset, batch_size=32, shuffle=True, drop_last=True)

    model = ResNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for epoch in range(2):
        train(model, trainloader, criterion, optimizer, epoch)
    test(model, DataLoader(testset, batch_size=100))

    problem = ub.Problem(model.train(), criterion, next(iter(trainloader)))  # unbatch
    print(problem.structure, problem.compute(ub.SquaredNorms()).total, problem.ggn().eigvalsh()[-5:], sep="\n\n")  # unbatch


if __name__ == "__main__":
    main()
