"""Text classification: a convolutional net over word vectors, for praise and complaints.

The script is as usual, but for the three lines marked `unbatch`. They show

- that all structures hold: each sentence is classified on its own, and the loss is a mean over
  sentences, so a *per-sample* gradient exists;
- the four sentences of a batch with the largest squared gradients. Some labels of the training set
  are wrong on purpose, and once the others are learned, sentences with a wrong label mostly have
  the largest gradients.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import unbatch as ub  # unbatch

PRAISE = "wonderful moving funny brilliant charming fresh clever lovely".split()
COMPLAINT = "dull clumsy boring tired shallow noisy weak tedious".split()
PLAIN = "the film was with a story and some actors that i saw last night it had music".split()
LENGTH = 12


def reviews(count):
    """Sentences with two words that tell, their labels, and which of the labels are wrong."""
    generator = torch.Generator().manual_seed(0)

    def some(words):
        return words[torch.randint(len(words), (), generator=generator)]

    out = []
    for i in range(count):
        label, wrong = i % 2, i % 16 in (3, 4)
        words = [some(PLAIN) for _ in range(4 + i % (LENGTH - 5))]
        for _ in range(2):
            place = int(torch.randint(len(words), (), generator=generator))
            words.insert(place, some(PRAISE if label else COMPLAINT))
        out.append((" ".join(words), 1 - label if wrong else label, wrong))
    return out


class TextCNN(nn.Module):
    def __init__(self, embed_num, embed_dim=16, kernel_num=12, kernel_sizes=(1, 2, 3), class_num=2, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(embed_num, embed_dim, padding_idx=0)
        self.convs = nn.ModuleList([nn.Conv2d(1, kernel_num, (k, embed_dim)) for k in kernel_sizes])
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(len(kernel_sizes) * kernel_num, class_num)

    def forward(self, x):
        x = self.embed(x).unsqueeze(1)  # [batch, 1, words, embed_dim]
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        x = [F.max_pool1d(i, i.size(2)).squeeze(2) for i in x]
        return self.fc(self.dropout(torch.cat(x, 1)))


def main():
    torch.manual_seed(0)
    data = reviews(512)
    vocabulary = {w: i + 1 for i, w in enumerate(sorted({w for text, _, _ in data for w in text.split()}))}

    def collate(batch):
        ids = torch.zeros(len(batch), LENGTH, dtype=torch.long)
        for row, (text, _, _) in zip(ids, batch, strict=True):
            numbers = torch.tensor([vocabulary[w] for w in text.split()])
            row[: len(numbers)] = numbers
        notes = [f"{'wrong' if wrong else 'right'} label {label}: {text}" for text, label, wrong in batch]
        return ids, torch.tensor([label for _, label, _ in batch]), notes

    train_iter = DataLoader(data, batch_size=64, shuffle=True, collate_fn=collate)
    model = TextCNN(len(vocabulary) + 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for epoch in range(8):
        model.train()
        corrects = 0
        for feature, target, text in train_iter:  # noqa: B007  the texts are for people
            optimizer.zero_grad()
            logit = model(feature)
            loss = F.cross_entropy(logit, target)
            loss.backward()
            optimizer.step()
            corrects += (logit.argmax(1) == target).sum().item()
        print(f"epoch {epoch}: accuracy {corrects / len(data):.1%}")

    problem = ub.Problem(model, F.cross_entropy, (feature, target))  # unbatch
    print(problem.structure, *(text[n] for n in problem.compute(ub.SquaredNorms()).total.topk(4).indices), sep="\n")  # unbatch


if __name__ == "__main__":
    main()
