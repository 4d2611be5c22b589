"""Nets whose samples are positions, pixels or tokens, that mix them below and act on each alone
above.

`alone`: the parameters that are used where each position is alone; `below`: those right below the
topmost batch norm, for which there is a closed form. All others need a backward pass for each
position. `terms(p, y)`: what each pixel or token adds to the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, H, W, T, D, C, WORDS = 2, 3, 2, 4, 6, 3, 7
PIXELS, TOKENS = (0, 2, 3), (0, 1)


@dataclass(frozen=True)
class PositionCase:
    name: str
    build: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    dims: tuple[int, ...]
    alone: str  # names, which may end in a star
    below: str = ""
    classes: int = 1  # the axis of predictions on which they lie
    in_one_pass: bool = True  # the parameters `alone` stand nowhere else

    def terms(self, p: Tensor, y: Tensor) -> Tensor:
        """Cross-entropies, of which the loss is the mean."""
        p = p.movedim(self.classes, 1)
        y = y.reshape(p.shape[:1] + p.shape[2:])
        return F.cross_entropy(p, y, reduction="none").flatten() / y.numel()

    def loss(self, p: Tensor, y: Tensor) -> Tensor:
        return self.terms(p, y).sum()

    def names(self, model: nn.Module, below: bool = False) -> list[str]:
        """The parameters that are `alone`, and those `below` the batch norm if asked for."""
        patterns = self.alone.split()
        if below:
            patterns += self.below.split()
        starts = tuple(pattern.rstrip("*") for pattern in patterns)
        return [name for name, _ in model.named_parameters() if name.startswith(starts)]


CASES: list[PositionCase] = []


def case(name: str, data: Any, dims: tuple[int, ...], alone: str, **options: Any) -> Callable:
    """Register a function or class that makes a net."""

    def register(build: Callable[[], nn.Module]) -> Callable:
        CASES.append(PositionCase(name, build, data, dims, alone, **options))
        return build

    return register


def image(height: int = H, width: int = W, images: int = B) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 2, height, width), torch.randint(C, (images, height, width))


def words() -> tuple[Tensor, Tensor]:
    return torch.randint(WORDS, (B, T)), torch.randint(C, (B, T))


def wording() -> tuple[Tensor, Tensor]:
    return torch.randint(WORDS, (B, T)), torch.randint(WORDS, (B, T))


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 3, 5), torch.randint(C, (B, 5))


def voxels() -> tuple[Tensor, Tensor]:
    return torch.randn(B, 2, 2, 2, 2), torch.randint(C, (B, 2, 2, 2))


def conv(i: int, o: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, size, padding=size // 2, **options)


def block(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(conv(i, o), nn.BatchNorm2d(o), nn.ReLU())


# ---------------------------------------------------------------- pixels


@case("u-net", lambda: image(4, 2), PIXELS, "head* joined.1*", below="joined.0*")
class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(2, 4), block(4, 6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.joined, self.head = block(8, 4), nn.Conv2d(4, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.second(F.max_pool2d(fine, 2))
        return self.head(self.joined(torch.cat([self.up(coarse), fine], 1)))


@case("fully convolutional, batch norms", image, PIXELS, "4* 6* 7*", below="3*")
def fully_convolutional() -> nn.Module:
    return nn.Sequential(
        *block(2, 4),
        conv(4, 6),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 5, 1),
        nn.Conv2d(5, C, 1, bias=False),
    )


@case("1x1 convolutions with groups", image, PIXELS, "2* 4*")
def grouped() -> nn.Module:
    return nn.Sequential(
        conv(2, 4), nn.Tanh(), nn.Conv2d(4, 6, 1, groups=2), nn.Tanh(), nn.Conv2d(6, C, 1, groups=3)
    )


@case("a last convolution of neighbours", lambda: image(5, 4), PIXELS, "2* 4*")
def neighbours() -> nn.Module:
    last = nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2)
    return nn.Sequential(conv(2, 4), nn.Tanh(), last, nn.Tanh(), nn.Conv2d(6, C, 1))


@case("a last transposed convolution", lambda: image(6, 9), PIXELS, "2* 4*")
def enlarged() -> nn.Module:
    """Every pixel sees one, two or four of a smaller image."""
    options = {"padding": (1, 2), "output_padding": (1, 0), "dilation": (1, 2)}
    last = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, **options)
    small = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    return nn.Sequential(small, nn.Tanh(), last, nn.Tanh(), nn.Conv2d(6, C, 1))


@case("activations in place", image, PIXELS, "1* 3* 5*", below="0*")
def in_place() -> nn.Module:
    return nn.Sequential(
        conv(2, 4),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, C, 1),
    )


@case("pixels of a single image", lambda: image(images=1), PIXELS, "4* 6*", below="3*")
@case("batch norm of each pixel", image, PIXELS, "4* 6*", below="3*")
def normed() -> nn.Module:
    """Pixels depend on each other through the statistics alone."""
    first = [nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Tanh()]
    second = [nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5), nn.Tanh()]
    return nn.Sequential(*first, *second, nn.Conv2d(5, C, 1))


@case("features last", image, PIXELS, "norm* head*")
class FeaturesLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = conv(2, D), nn.LayerNorm(D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).permute(0, 2, 3, 1)
        return self.head(self.norm(h).tanh()).permute(0, 3, 1, 2)


@case("an mlp of each pixel", image, PIXELS, "hidden* head* slope*")
class PixelMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.hidden, self.head = conv(2, D), nn.Linear(D, 5), nn.Linear(5, C)
        self.slope = nn.PReLU(5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).flatten(2).mT
        h = self.head(self.slope(self.hidden(h).flatten(0, 1)))
        return h.unflatten(0, (B, H, W)).movedim(-1, 1)


@case("scales and shifts of channels", image, PIXELS, "scale shift norm* head*")
class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = conv(2, 4), nn.Conv2d(4, C, 1)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.norm = nn.BatchNorm2d(4).eval()

    def train(self, mode: bool = True) -> "Scaled":
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm((self.first(x).tanh() * self.scale + self.shift).tanh()))


@case("places of pixels", image, PIXELS, "rows columns places head*")
class Places(nn.Module):
    """Parameters with an entry for each row, column or pixel, the same for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = conv(2, 4), nn.Conv2d(4, C, 1)
        self.rows = nn.Parameter(torch.randn(H, 1))
        self.columns = nn.Parameter(torch.randn(4, 1, W))
        self.places = nn.Parameter(torch.randn(H, W))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh() * self.places + self.rows
        return self.head((h * self.columns).tanh())


@case("group norm below the head", image, PIXELS, "1* 3*")
def group_norm() -> nn.Module:
    return nn.Sequential(conv(2, 4), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, C, 1))


@case("gates of whole images", image, PIXELS, "hidden* head*")
class Gated(nn.Module):
    """What the gates are made of is no parameter of the head, and mixes the pixels all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = conv(2, 4), nn.Linear(4, 5)
        self.hidden, self.head = nn.Conv2d(4, 5, 1), nn.Conv2d(5, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        gates = self.gate(h.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(self.hidden(h) * gates)


@case("rows of pixels", lambda: (image()[0], torch.randint(C, (B, 1, H, W))), (0, 2), "2*")
def lines() -> nn.Module:
    """The last layer sees neighbours in a row, and a row is a sample."""
    last = nn.Conv2d(4, C, (1, 3), padding=(0, 1))
    return nn.Sequential(conv(2, 4), nn.Tanh(), last)


@case("voxels", voxels, (0, 2, 3, 4), "2*")
def volume() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv3d(3, C, 1))


@case("every pixel alone", image, PIXELS, "0* 2*")
def all_alone() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, C, 1))


# ---------------------------------------------------------------- points


@case("points, with the largest of all", points, (0, 2), "last* head*")
class Points(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.last, self.head = nn.Conv1d(8, 5, 1), nn.Conv1d(5, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        largest = h.amax(2, keepdim=True).expand_as(h)
        return self.head(self.last(torch.cat([h, largest], 1)).relu())


# ---------------------------------------------------------------- tokens


class Attention(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.all, self.out, self.causal = nn.Linear(D, 3 * D), nn.Linear(D, D), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.all(x).unflatten(-1, (3, 2, D // 2)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).flatten(2))


class Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(WORDS, D), nn.Embedding(T, D)
        self.before, self.attention = nn.LayerNorm(D), Attention(causal=True)
        self.middle, self.wide, self.narrow = nn.LayerNorm(D), nn.Linear(D, 8), nn.Linear(8, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, WORDS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x) + self.places(torch.arange(T))
        h = h + self.attention(self.before(h))
        h = h + self.narrow(F.gelu(self.wide(self.middle(h))))
        return self.head(self.norm(h))


LAST = "attention.out* middle* wide* narrow* norm*"


@case("language model", wording, TOKENS, f"{LAST} head*", classes=2)
def language() -> nn.Module:
    return Language(tied=False)


@case("language model, tied", wording, TOKENS, f"{LAST} table*", classes=2, in_one_pass=False)
def tied() -> nn.Module:
    return Language(tied=True)


@case(
    "labels of words",
    words,
    TOKENS,
    "layer.linear* layer.norm* layer.self_attn.out* head*",
    classes=2,
)
class Labels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, D), nn.Linear(D, C)
        self.layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.table(x)))


@case("time first", words, TOKENS, "norm* head* shift", classes=2)
class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.rnn = nn.Embedding(WORDS, D), nn.GRU(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, C)
        self.shift = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.table(x.T))
        return self.head(self.norm(h + self.shift).tanh()).transpose(0, 1)


@case("a table above attention", words, TOKENS, "words* places* head*", classes=2)
class LateTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(WORDS, D), Attention(causal=False)
        self.words, self.places = nn.Embedding(WORDS, D), nn.Embedding(T, D)
        self.head = nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.table(x)) + self.words(x) + self.places(torch.arange(T))
        return self.head(h.tanh())


@case("tokens in an order of their own", words, TOKENS, "head*", classes=2)
class Sorted(nn.Module):
    """Experts see tokens in the order of the experts, which is undone afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.attention = nn.Embedding(WORDS, D), Attention(causal=False)
        self.router, self.expert, self.head = nn.Linear(D, 2), nn.Linear(D, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention(self.table(x)).flatten(0, 1)
        order = self.router(h)[:, 0].argsort()
        h = self.expert(h[order])[order.argsort()]
        return self.head(h.tanh()).unflatten(0, (B, T))


@case("tokens of parts", words, TOKENS, "mixed* head*", classes=2)
class Parts(nn.Module):
    """A mixer: what mixes tokens is a layer over them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.over = nn.Embedding(WORDS, D), nn.Linear(T, T)
        self.mixed, self.head = nn.Linear(D, 2 * D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.over(self.table(x).mT).mT
        left, right = self.mixed(h).chunk(2, -1)
        return self.head(left * right.sigmoid())
