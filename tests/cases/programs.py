"""Random programs over tensors, as source text: what the property tests put before the analyser.

`forward_program(choose)` and `loss_program(choose)` are plain functions of a way to choose from a
list: the `choice` of a `random.Random(seed)`, or a draw of hypothesis. A program prints as the
lines it runs.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N = 4  # as many samples as features and time steps: nothing can be told by size alone
SHAPES = [(N, 4), (N, 4), (N, 3), (N, 4, 4), (N, 2, 4), (N, 8), (N,)]
LIMIT = 600  # elements of a value
LARGE = 1e6  # size of a value

Choose = Callable[[Sequence], Any]


class Program(nn.Module):
    """Source lines that turn `x` (and `y`) into `h`, with weights `net.w0`, `net.w1`, .."""

    def __init__(self, lines: Sequence[str], weights: Mapping[str, Tensor], arguments: str = "x"):
        super().__init__()
        for name, w in weights.items():
            self.register_parameter(name, nn.Parameter(w))
        self.lines, self.arguments = list(lines), arguments
        body = "\n    ".join([*lines, "return h"])
        space: dict[str, Any] = {"torch": torch, "F": F}
        exec(
            compile(f"def run(net, {arguments}):\n    {body}", f"program-{id(self)}.py", "exec"),
            space,
        )
        self.run = space["run"]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.run(self, *inputs)

    def __repr__(self) -> str:
        weights = [f"# net.{name}: {list(w.shape)}" for name, w in self.named_parameters()]
        return "\n".join(["", *weights, *self.lines])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Draft:
    """A program in the making, run line by line on one batch so that shapes are known."""

    choose: Choose
    space: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    older: list[str] = field(default_factory=lambda: ["x"])

    def __post_init__(self) -> None:
        self.space |= {"torch": torch, "F": F, "net": self}

    def __getattr__(self, name: str) -> Tensor:
        if name[0] == "w" and name[1:].isdigit():
            return self.weights[int(name[1:])]
        raise AttributeError(name)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.space["h"].shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        """A dim of `h`; the first and the last are drawn more often."""
        return self.choose([*range(self.ndim), self.ndim - 1])

    def dims(self) -> list[int]:
        return sorted({self.dim(), self.dim()})

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def places(self, dim: int) -> list[int]:
        """An index along a dim: any entries in any order."""
        return [self.choose(range(self.shape[dim])) for _ in range(self.shape[dim])]

    def weight(self, *shape: int) -> str:
        self.weights.append(noise(*shape, seed=len(self.weights) + 1))
        return f"net.w{len(self.weights) - 1}"

    def past(self) -> str:
        """An earlier value."""
        return self.choose(self.older)

    def alike(self) -> str:
        """An earlier value of the shape of `h`, or something made from `h`."""
        like = [v for v in self.older if self.space[v].shape == self.space["h"].shape]
        return self.choose([*like, "h.tanh()", "(2 * h)"])

    def add(self, line: str) -> None:
        """Keep the line if it runs and its value is of moderate size."""
        trial = dict(self.space)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(line, trial)
        h = trial["h"]
        fits = isinstance(h, Tensor) and 0 < h.numel() <= LIMIT and h.dtype == torch.float64
        if not fits or not torch.isfinite(h).all() or h.abs().max() > LARGE:
            raise ValueError(line)
        keep = f"v{len(self.older)}"
        self.lines += [*line.split("\n"), f"{keep} = h"]
        self.older.append(keep)
        self.space = trial | {keep: h}

    def grow(self, makers: Sequence[Callable[["Draft"], str]]) -> None:
        """Add a line by one of the makers, or nothing where it does not apply."""
        try:
            self.add(self.choose(makers)(self))
        except (RuntimeError, LookupError, ValueError, TypeError, Warning):
            return

    def program(self, arguments: str) -> Program:
        """The lines, without names and weights that nobody reads."""
        words = re.findall(r"\w+", "\n".join(self.lines))
        lines = [
            line
            for line in self.lines
            if not re.fullmatch(r"v\d+ = h", line) or words.count(line.split()[0]) > 1
        ]
        weights = {f"w{i}": w for i, w in enumerate(self.weights) if f"w{i}" in words}
        return Program(lines, weights, arguments)


# ---------------------------------------------------------------- what a line may do


def pointwise(d: Draft) -> str:
    return "h = " + d.choose(
        [
            "h.tanh()",
            "h * h",
            "h.abs()",
            "h.sigmoid()",
            "2 * h - 1",
            "h.clamp(-2, 2).exp()",
            "1 / (1 + h * h)",
            "-h",
        ]
    )


def branch(d: Draft) -> str:
    v = d.alike()
    return "h = " + d.choose(
        [
            f"torch.where({v} > 0, h, 0.1 * h)",
            f"h.masked_fill({v} < -0.5, 0.0)",
            f"torch.maximum(h, {v})",
            f"h * ({v} > 3)",
        ]
    )


def binary(d: Draft) -> str:
    return f"h = h {d.choose('+-*')} {d.past()}"


def reduction(d: Draft) -> str:
    name = d.choose(["sum", "mean", "amax", "logsumexp", "amin"])
    return f"h = h.{name}({d.dims() or 'dim=()'}, keepdim={d.choose([True, False])})"


def reduction_of_one_dim(d: Draft) -> str:
    name = d.choose(["prod", "std", "var", "norm"])
    return f"h = h.{name}(dim={d.dim()}, keepdim={d.choose([True, False])})"


def selection(d: Draft) -> str:
    dim, keep = d.dim(), d.choose([True, False])
    # PyTorch's own median is wrong on values that share memory, such as expanded ones.
    kind = d.choose(
        [
            "contiguous().median({}, {}).values",
            "max({}, {}).values",
            "argmax({}, {}).to(h)",
            "min({}, {}).indices.to(h)",
        ]
    )
    return "h = h." + kind.format(dim, keep)


def centring(d: Draft) -> str:
    dims = d.dims()
    return "h = " + d.choose(
        [
            f"h - h.mean({dims}, keepdim=True)",
            f"h / (1 + h.abs().sum({dims}, keepdim=True))",
            f"h - h.amax({dims}, keepdim=True)",
        ]
    )


def softmax(d: Draft) -> str:
    return f"h = h.{d.choose(['softmax', 'log_softmax'])}({d.dim()})"


def normalisation(d: Draft) -> str:
    width, k = d.size(min(1, d.ndim - 1)), d.choose(range(d.ndim))
    kinds = [
        "F.batch_norm(h, None, None, training=True)",
        f"F.layer_norm(h, {list(d.shape[k:])})",
        f"F.group_norm(h, {d.choose([g for g in range(1, width + 1) if width % g == 0])})",
        "F.instance_norm(h)",
        f"F.normalize(h, dim={d.dim()})",
    ]
    return "h = " + d.choose(kinds)


def normalisation_with_weights(d: Draft) -> str:
    w, b = d.weight(d.size(1)), d.weight(d.size(1))
    running = d.choose(["None, None", f"{b}.detach(), {w}.detach().exp()"])
    return f"h = F.batch_norm(h, {running}, {w}, {b}, training={running.startswith('N')})"


def reshaping(d: Draft) -> str:
    """Merge two neighbouring dims, or split one, or both."""
    sizes = list(d.shape)
    if d.choose([True, False]) and d.ndim > 1:
        i = d.choose(range(d.ndim - 1))
        sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
    if d.choose([True, False]):
        i = d.choose(range(len(sizes)))
        a = d.choose([a for a in range(1, sizes[i] + 1) if sizes[i] % a == 0])
        sizes[i : i + 1] = [a, sizes[i] // a]
    return f"h = h.reshape({sizes})"


def transposition(d: Draft) -> str:
    order = sorted(range(d.ndim), key=lambda i: d.choose(range(5)))
    return "h = " + d.choose(
        [
            f"h.transpose({d.dim()}, {d.dim()})",
            f"h.permute({order})",
            f"h.movedim({d.dim()}, {d.dim()})",
        ]
    )


def movement(d: Draft) -> str:
    dim = d.dim()
    kinds = [
        f"h.flip({dim})",
        f"h.roll({d.choose([1, -1, 2])}, {dim})",
        f"h.index_select({dim}, torch.tensor({d.places(dim)}))",
        f"h.narrow({dim}, {d.choose([0, 1])}, {max(1, d.size(dim) - 1)})",
        f"h.split({d.choose([1, 2, 3])}, {dim})[0]",
        f"h.chunk(2, {dim})[-1]",
        f"h.select({dim}, {d.choose([0, -1])})",
        f"h.repeat_interleave(2, {dim})",
        f"h.unsqueeze({dim})",
        f"h.unfold({dim}, 2, 1)",
        f"F.pad(h.movedim({dim}, -1), (1, 0)).movedim(-1, {dim})",
        f"h.squeeze({dim})",
        "h.tril()",
        "h.diagonal()",
        f"h.diff(dim={dim})",
    ]
    return "h = " + d.choose(kinds)


def joining(d: Draft) -> str:
    dim, v = d.dim(), d.alike()
    return f"h = torch.{d.choose(['cat', 'stack'])}([h, {v}], {dim})"


def enlarging(d: Draft) -> str:
    dim = d.dim()
    times = [d.choose([1, 1, 2]) for _ in range(d.ndim)]
    sizes = [N if i == dim else -1 for i in range(d.ndim + 1)]
    return "h = " + d.choose([f"h.unsqueeze({dim}).expand({sizes})", f"h.repeat({times})"])


def gathering(d: Draft) -> str:
    dim = d.dim()
    index = d.choose([f"h.argsort({dim})", f"x.argsort({dim})", f"torch.tensor({d.places(dim)})"])
    if index.startswith("torch"):
        return f"h = h[{', '.join([':'] * dim + [index])}]"
    return "h = " + d.choose([f"h.gather({dim}, {index})", f"h.take_along_dim({index}, {dim})"])


def scattering(d: Draft) -> str:
    dim = d.dim()
    kinds = [
        f"torch.zeros_like(h).index_add({dim}, torch.tensor({d.places(dim)}), h)",
        f"torch.zeros_like(h).scatter_add({dim}, h.argsort({dim}), h)",
        f"h.index_copy({dim}, torch.arange({d.size(dim)}), 2 * h)",
        f"F.one_hot(h.argmax({dim}), {d.size(dim)}).to(h)",
    ]
    return "h = " + d.choose(kinds)


def contraction(d: Draft) -> str:
    dim = d.dim()
    kinds = [
        f"h @ {d.weight(d.size(-1), d.choose([3, 4]))}",
        f"torch.tensordot(h, {d.weight(d.size(dim), 4)}, ([{dim}], [0]))",
        f"F.linear(h, {d.weight(4, d.size(-1))}, {d.weight(4)})",
        f"{d.weight(d.size(0), d.size(0))} @ h",
    ]
    return "h = " + d.choose(kinds)


def product_of_values(d: Draft) -> str:
    letters = "abcd"[: d.ndim]
    out = [i for i in letters if d.choose([True, True, False])]
    kinds = [
        "h @ h.mT",
        f"h @ {d.alike()}",
        f"torch.einsum('{letters},{letters}->{''.join(out)}', h, {d.alike()})",
        "F.scaled_dot_product_attention(h, h, h)",
        f"h.unsqueeze({d.dim()}) - h.unsqueeze({d.dim()})",
    ]
    return "h = " + d.choose(kinds)


def convolution(d: Draft) -> str:
    channels, taps = d.size(-2), d.choose([1, 3])
    groups = d.choose([1, 1, channels])
    w = d.weight(4 if groups == 1 else channels, channels // groups, taps)
    return f"h = F.conv1d(h, {w}, padding={taps // 2}, groups={groups})"


def scan(d: Draft) -> str:
    dim = d.dim()
    kinds = [
        f"h.cumsum({dim})",
        f"h.tanh().cumprod({dim})",
        f"h.cummax({dim}).values",
        f"h.sort({dim}).values",
        f"h.sort({dim}).indices.to(h)",
        f"h.topk({min(2, d.size(dim))}, {dim}).values",
    ]
    return "h = " + d.choose(kinds)


def writing(d: Draft) -> str:
    """In-place writes, through views of the value."""
    dim = d.dim()
    i, j = d.choose([0, 1]), d.choose([0, -1])
    kinds = [
        f"h.select({dim}, {i}).mul_(2)",
        f"h.select({dim}, {i}).add_(h.select({dim}, {j}).clone())",
        f"h.narrow({dim}, 0, 1).zero_()",
        f"h.transpose(0, {dim})[{i}] += 1",
        f"h.transpose(0, {dim})[1:] += h.transpose(0, {dim})[:-1].clone()",
        f"h.view(-1)[::{d.choose([2, 3])}] = 0",
        f"h.sub_(h.mean({dim}, keepdim=True))",
        f"h.copy_(h.flip({dim}))",
        "h[h > 1] = 0",
        f"h.add_({d.past()})",
    ]
    return f"h = h.clone()\n{d.choose(kinds)}"


def counting(d: Draft) -> str:
    dim = d.dim()
    sizes = [-1 if i == dim else 1 for i in range(d.ndim)]
    return f"h = h {d.choose('*+')} torch.arange(1.0, {d.size(dim) + 1}).reshape({sizes})"


def loop(d: Draft) -> str:
    a, b = d.dim(), d.dim()
    bodies = [
        "r.tanh()",
        "r / (1 + r.abs().sum())",
        "r.cumsum(-1)",
        "(i + 1) * r",
        "r - h.select({a}, i - 1)",
        "r @ r",
        "r.flip(0)",
    ]
    body = d.choose(bodies).format(a=a)
    return "h = " + d.choose(
        [f"torch.stack([{body} for i, r in enumerate(h.unbind({a}))], {b})", f"sum(h.unbind({a}))"]
    )


LINES = [
    pointwise,
    branch,
    binary,
    binary,
    reduction,
    reduction,
    reduction_of_one_dim,
    selection,
    centring,
    softmax,
    normalisation,
    normalisation_with_weights,
    reshaping,
    reshaping,
    transposition,
    transposition,
    movement,
    movement,
    joining,
    enlarging,
    gathering,
    scattering,
    contraction,
    contraction,
    product_of_values,
    convolution,
    scan,
    writing,
    writing,
    counting,
    loop,
]


def forward_program(choose: Choose, longest: int = 7) -> tuple[Program, Tensor]:
    """A model and its inputs; the predictions have N entries along axis 0."""
    x = noise(*choose(SHAPES), seed=99)
    d = Draft(choose, {"x": x, "h": x})
    d.lines.append("h = x")
    for _ in range(choose(range(1, longest + 1))):
        d.grow(LINES)
    d.lines.append(_ending(d))
    return d.program("x"), x


def _ending(d: Draft) -> str:
    """Samples to axis 0, as far as shapes can tell."""
    if d.shape[:1] == (N,):
        return "h = 1 * h"
    if N in d.shape:
        return f"h = h.movedim({d.shape.index(N)}, 0)"
    if d.space["h"].numel() % N == 0:
        return f"h = h.reshape({N}, -1)"
    return "h = x * h.mean()"


# ---------------------------------------------------------------- losses


def row_loss(d: Draft) -> str:
    """A number for each sample from its own row."""
    kinds = [
        "((p - y) ** 2).sum(1)",
        "(p * y).sum(1)",
        "(p - y).abs().mean(1)",
        "F.cross_entropy(p, y.argmax(1), reduction='none')",
        "p.logsumexp(1)",
        "(p.tanh() * y).amax(1)",
        "p[:, 0] * y[:, 1]",
        "p.square().mean(1)",
        "torch.stack([(r * r).sum() for r in p])",
        "F.cosine_similarity(p, y)",
        "p.gather(1, y.argmax(1, keepdim=True))[:, 0]",
    ]
    return "h = " + d.choose(kinds)


def tangle(d: Draft) -> str:
    """Numbers in which samples meet."""
    kinds = [
        "(p * p.roll(1, 0)).sum(1)",
        "(p - p.mean(0)).square().sum(1)",
        "p.softmax(0).sum(1)",
        "p.cumsum(0).square().sum(1)",
        "(p @ p.t()).logsumexp(1)",
        "p.std(0)",
        "p.mean(0).square()",
        "p.sum(0).tanh()",
        "(p / p.norm()).sum(1)",
        "(p @ y.t()).logsumexp(1)",
        "p.amax(0)",
        "p.sort(0).values[0]",
        "p.flip(0).square().sum(1)",
    ]
    return "h = " + d.choose(kinds)


def weighting(d: Draft) -> str:
    kinds = [
        "h * torch.arange(1.0, 5.0)",
        "h * y[:, 0]",
        "h * y.sum(1).softmax(0)",
        "h * (h > 0.5)",
        "h * p.sum(1)",
        "h * p.detach().sum(1).softmax(0)",
        "h / y.square().sum()",
        "h * (h > h.mean())",
        "h * torch.tensor([1.0, 0.0, 1.0, 1.0])",
        "h[y[:, 0] > 0]",
        "h[:2]",
        "h.flip(0)",
        "h - h.mean()",
        "h * h.detach()",
        "h / (1 + h.abs().sum())",
        "torch.arange(1.0, 5.0) + h",
    ]
    return "h = " + d.choose(kinds)


def bend(d: Draft) -> str:
    return "h = " + d.choose(
        [
            "h.tanh()",
            "h * h",
            "h.abs()",
            "h.clamp(-2, 2).exp()",
            "(1 + h * h).sqrt()",
            "2 * h + 1",
            "h.relu()",
            "-h",
        ]
    )


def merge(d: Draft) -> str:
    return f"h = h {d.choose('+-*+')} {d.choose([v for v in d.older if v not in 'xpy'] or ['1'])}"


def total(d: Draft) -> str:
    kinds = [
        "sum()",
        "mean()",
        "sum()",
        "mean()",
        "max()",
        "logsumexp(0)",
        "prod()",
        "norm()",
        "std()",
        "median()",
        "square().sum()",
    ]
    return "h = h." + d.choose(kinds)


def loss_program(choose: Choose, longest: int = 4) -> Program:
    """A loss of predictions `p` and targets `y`, both `[N, 3]`."""
    d = Draft(
        choose, {"p": noise(N, 3, seed=5), "y": noise(N, 3, seed=6), "x": noise(1)}, older=["p"]
    )
    first = choose([row_loss, row_loss, tangle])
    d.grow([first])
    for _ in range(choose(range(longest))):
        d.grow([row_loss, tangle, weighting, weighting, bend, merge, merge, total])
    if "h" not in d.space:
        d.add("h = p.sum(1)")
    d.grow([total])
    for _ in range(choose([0, 0, 1])):
        d.grow([bend, merge])
    if d.shape:
        d.add(f"h = h.{choose(['sum', 'mean', 'amax'])}()")
    return d.program("p, y")
