"""Random nets with a loss and a batch, as source text: what the fuzz tests put before the whole
pipeline.

`net_source(choose)` is a plain function of a way to choose from a list: the `choice` of a
`random.Random(seed)`, or a draw of hypothesis. A source prints as what it is, so that one which
failed can be pasted into a table and kept. Samples lie on axis 0 of `h` between any two blocks; no
line spells out how many there are, so a sample can run alone.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

LIMIT = 200  # entries of a value, for each sample
PARAMETERS = 160  # entries of all parameters
LARGE = 1e4  # size of a value

Choose = Callable[[Sequence], Any]


def normals(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


FAILURES = (
    RuntimeError,
    AssertionError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
    Warning,
)
SPACE: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "normals": normals,
    "integers": integers,
    "parametrizations": parametrizations,
}


class Net(nn.Module):
    """Parts by name, and a forward pass of source lines from `x` (a tensor or a tuple) to `h`."""

    def __init__(self, forward: str) -> None:
        super().__init__()
        body = "\n    ".join(["h = x", *forward.splitlines(), "return h"])
        space = dict(SPACE)
        exec(compile(f"def run(net, x):\n    {body}", f"net-{id(self)}.py", "exec"), space)
        self.run = space["run"]

    def forward(self, *x: Any) -> Any:
        return self.run(self, x if len(x) > 1 else x[0])


@dataclass(frozen=True)
class Source:
    """`setup` makes parts of `net`, inputs `x` and targets `y`; `forward` leads from `x` to `h`;
    `loss` of `p`, `y`.
    """

    setup: str
    forward: str
    loss: str
    train: bool = True

    def build(self) -> tuple[Net, Callable[..., Tensor], Any, Any]:
        """The arguments of the reference, the same at every call; parameters away from zeros and
        ones.
        """
        net = Net(self.forward)
        made = SPACE | {"net": net, "y": None}
        with torch.random.fork_rng(devices=[]), in_float64():
            torch.manual_seed(1)
            exec(self.setup, made)
            unsettle(net)
        function = eval(f"lambda p, y=None: {self.loss}", made)
        return net.train(self.train), function, made["x"], made["y"]

    def __str__(self) -> str:
        parts = (f'"""\n{self.setup}\n"""', f'"""\n{self.forward}\n"""', f'"{self.loss}"')
        return "\nSource(" + ", ".join(parts) + f", train={self.train})"


@contextmanager
def quietly() -> Iterator[None]:
    """Warnings are errors, and the random state is left alone."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.enable_grad():
        warnings.simplefilter("error")
        yield


@contextmanager
def in_float64() -> Iterator[None]:
    """What is made here has double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def unsettle(net: nn.Module) -> None:
    """Away from zeros and ones, at which mistakes do not show."""
    for p in net.parameters():
        p.add_(0.2 * torch.randn_like(p))
    for name, b in net.named_buffers():
        if name.endswith("running_mean"):
            b.normal_()
        if name.endswith("running_var"):
            b.uniform_(0.5, 2)


@dataclass
class Draft:
    """A net in the making, run block by block on its batch so that shapes are known."""

    choose: Choose
    samples: int
    train: bool
    setup: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)
    net: nn.Module = field(default_factory=nn.Module)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def h(self) -> Tensor:
        value: Tensor = self.values["h"]
        return value

    @property
    def ndim(self) -> int:
        return self.h.ndim

    @property
    def width(self) -> int:
        """Of the last axis."""
        return self.h.shape[-1]

    @property
    def channels(self) -> int:
        return self.h.shape[1]

    def part(self, make: str) -> str:
        """A new part of the net: an expression that makes a module or a tensor."""
        name = f"net.{'abcdefghijklmnopqrstuvwxyz'[len(self.names)]}"
        self.setup.append(f"{name} = {make}")
        self.names.append(name)
        with in_float64():
            exec(self.setup[-1], SPACE | {"net": self.net})
        return name

    def weight(self, *shape: int) -> str:
        return self.part(f"nn.Parameter(normals({', '.join(map(str, shape))}))")

    def linear(self, i: int, o: int) -> str:
        bias = self.choose(["", "", ", bias=False"])
        return self.part(f"nn.Linear({i}, {o}{bias})")

    def some(self, least: int = 1, most: int = 4) -> int:
        n: int = self.choose(range(least, most + 1))
        return n

    def divisor(self, of: int) -> int:
        n: int = self.choose([g for g in range(1, of + 1) if of % g == 0])
        return n

    def alike(self) -> str:
        """An earlier value of the shape of `h`, or something made from `h`."""
        like = [v for v in self.older if self.values[v].shape == self.h.shape]
        v: str = self.choose([*like, "h.tanh()", "(2 * h)"])
        return v

    def grow(self, makers: Sequence[Callable[["Draft"], str]], tries: int = 3) -> None:
        """Add a block by one of the makers, or nothing where none of a few applies."""
        for _ in range(tries):
            before = len(self.setup), len(self.names)
            try:
                self.add(self.choose(makers)(self))
                break
            except FAILURES:
                del self.setup[before[0] :], self.names[before[1] :]

    def add(self, block: str) -> None:
        """Keep the block if it runs and its value is of moderate size."""
        trial = dict(self.values)
        keep = f"v{len(self.older)}"
        self.net.train(self.train)
        with quietly():
            exec("\n".join(["h = x", *self.lines, block]), trial | SPACE | {"net": self.net}, trial)
            h = trial["h"]
            if h.requires_grad:
                h.sum().backward()  # what was written in place may be needed
        whole = (
            isinstance(h, Tensor)
            and h.dtype == torch.float64
            and h.ndim > 0
            and h.shape[0] == self.samples
        )
        if (
            not whole
            or not 0 < h.numel() <= LIMIT * self.samples
            or not h.isfinite().all()
            or h.abs().max() > LARGE
        ):
            raise ValueError(block)
        self._drop_parts(block)
        if sum(p.numel() for p in self.net.parameters()) > PARAMETERS:
            raise ValueError("too many parameters")
        self.lines += [block, f"{keep} = h"]
        self.older.append(keep)
        self.values = trial | {keep: h}

    def _drop_parts(self, block: str) -> None:
        """Those which were made for another choice."""
        for line in self.setup[:]:
            name = line.split(" = ")[0]
            if name[:4] == "net." and not re.search(
                rf"\b{name}\b", "\n".join([*self.lines, block])
            ):
                self.setup.remove(line)
                delattr(self.net, name[4:])

    def forward(self) -> str:
        """The lines, without names that nobody reads."""
        words = re.findall(r"\w+", "\n".join(self.lines))
        return "\n".join(
            s
            for s in self.lines
            if not re.fullmatch(r"v\d+ = h", s) or words.count(s.split()[0]) > 1
        )


# --------------------------------------------------------- blocks: each a few lines from `h` to `h`


def dense(d: Draft) -> str:
    return f"h = {d.linear(d.width, d.some())}(h)"


def dense_by_hand(d: Draft) -> str:
    i, o = d.width, d.some()
    w, b = d.weight(o, i), d.weight(o)
    low = f"{d.weight(o, 1)} @ {d.weight(1, i)}"
    kinds = [
        f"F.linear(h, {w}, {b})",
        f"h @ {w}.t() + {b}",
        f"h @ {w}.tanh().t()",
        f"F.linear(h, {w} + {low})",
        f"torch.einsum('...i,oi->...o', h, {w}) * {b}.exp()",
        f"F.linear(h, {w} / (1 + {w}.norm()), {b})",
    ]
    return f"h = {d.choose(kinds)}"


def parametrised(d: Draft) -> str:
    kind, dim = d.choose(["weight_norm", "spectral_norm"]), d.width
    return f"h = {d.part(f'parametrizations.{kind}(nn.Linear({dim}, {d.some()}))')}(h)"


def tied(d: Draft) -> str:
    """A linear layer of before, once more, or its transpose."""
    layers = [n for n in d.names if isinstance(getattr(d.net, n[4:]), nn.Linear)]
    name = d.choose(layers)
    return "h = " + d.choose(
        [f"{name}(h)", f"F.linear(h, {name}.weight.t())", f"{name}({name}(h).tanh())"]
    )


def convolution(d: Draft) -> str:
    space = d.ndim - 2
    i, g = d.channels, d.divisor(d.channels)
    o, k = g * d.some(1, 2), d.choose([1, 2, 3])
    options = d.choose(
        ["", ", padding=1", ", stride=2", ", bias=False", ", padding=1, padding_mode='circular'"]
    )
    if d.choose([False, False, False, True]):
        return f"h = {d.part(f'nn.ConvTranspose{space}d({i}, {o}, {k}, groups={g})')}(h)"
    return f"h = {d.part(f'nn.Conv{space}d({i}, {o}, {k}, groups={g}{options})')}(h)"


def batch_norm(d: Draft) -> str:
    space = max(d.ndim - 2, 1)
    options = d.choose(
        ["", "", "", ", affine=False", ", track_running_stats=False", ", momentum=None, eps=0.1"]
    )
    return f"h = {d.part(f'nn.BatchNorm{space}d({d.channels}{options})')}(h)"


def batch_norm_of_tokens(d: Draft) -> str:
    norm = d.part(f"nn.BatchNorm1d({d.width})")
    return "h = " + d.choose(
        [
            f"{norm}(h.flatten(0, -2)).view(h.shape)",
            f"{norm}(h.transpose(0, 1).flatten(0, -2)).unflatten(0, (h.shape[1], h.shape[0])).transpose(0, 1)",
        ]
    )


def norm_within(d: Draft) -> str:
    c = d.channels
    kinds = [
        f"nn.LayerNorm({d.width})",
        f"nn.LayerNorm({list(d.h.shape[1:])}, elementwise_affine=False)",
        f"nn.GroupNorm({d.divisor(c)}, {c})",
        f"nn.RMSNorm({d.width})",
        f"nn.InstanceNorm{max(d.ndim - 2, 1)}d({c}, affine=True)",
    ]
    return f"h = {d.part(d.choose(kinds))}(h)"


def activation(d: Draft) -> str:
    kinds = [
        "h.tanh()",
        "F.relu(h)",
        "F.gelu(h)",
        "h.sigmoid()",
        "F.softplus(h)",
        "F.relu(h, inplace=True)",
        "F.elu(h, inplace=True)",
        "h.tanh_()",
        "F.leaky_relu_(h, 0.1)",
        "h * h.sigmoid()",
        "h.sin()",
        f"{d.part('nn.PReLU()')}(h)",
        "h.clone().mul_(2)",
        "h.square() / (1 + h.square())",
    ]
    return f"h = {d.choose(kinds)}"


def join(d: Draft) -> str:
    v = d.alike()
    kinds = [
        f"h + {v}",
        f"h * {v}",
        f"torch.cat([h, {v}], -1)",
        f"torch.stack([h, {v}], 1)",
        f"h - {v}.detach()",
    ]
    return f"h = {d.choose(kinds)}"


def residual(d: Draft) -> str:
    inner = d.linear(d.width, d.width)
    kinds = [
        f"h + {inner}(h).tanh()",
        f"h * {inner}(h).sigmoid()",
        f"h + {d.weight(d.width)} * {inner}(h.tanh())",
        f"h.clone().add_({inner}(h))",
    ]
    return f"h = {d.choose(kinds)}"


def attention(d: Draft) -> str:
    """Within a sample, over the axis before the last."""
    q, k = d.linear(d.width, 2), d.linear(d.width, 2)
    kinds = [
        f"({q}(h) @ {k}(h).mT).softmax(-1) @ h",
        f"torch.einsum('nts,nsd->ntd', torch.einsum('ntd,nsd->nts', {q}(h), {k}(h)).softmax(-1), h)",
        f"F.scaled_dot_product_attention({q}(h), {k}(h), h)",
        f"{d.part(f'nn.MultiheadAttention({d.width}, 1, batch_first=True)')}(h, h, h, need_weights=False)[0]",
    ]
    return f"h = {d.choose(kinds)}"


def recurrence(d: Draft) -> str:
    kind = d.choose(["RNN", "GRU", "LSTM"])
    return f"h = {d.part(f'nn.{kind}({d.width}, 2, batch_first=True)')}(h)[0]"


def pooling(d: Draft) -> str:
    axis = d.choose(range(1, d.ndim))
    kinds = [
        f"h.mean({axis})",
        f"h.amax({axis})",
        f"h.sum({axis}, keepdim=True)",
        f"h.logsumexp({axis})",
        f"F.avg_pool{d.ndim - 2}d(h, 2)",
        f"F.max_pool{d.ndim - 2}d(h, 2)",
        "h.mean(tuple(range(2, h.ndim)))",
    ]
    return f"h = {d.choose(kinds)}"


def reshaping(d: Draft) -> str:
    a = d.divisor(d.width)
    kinds = [
        "h.flatten(1)",
        "h.transpose(1, -1)",
        "h.mT",
        f"h.unflatten(-1, ({a}, -1))",
        f"h.unflatten(-1, (-1, {a}))",
        "h.unsqueeze(1)",
        "h.squeeze(1)",
        "h.flip(-1)",
        "h.roll(1, -1)",
        f"h[..., : {d.width - 1}]",
        "h.reshape(h.shape[0], -1)",
        "h.transpose(0, 1).contiguous().transpose(0, 1)",
        "h[..., ::2]",
    ]
    return f"h = {d.choose(kinds)}"


def tokens_merged(d: Draft) -> str:
    """Samples and time on one axis, or time in front of the samples."""
    layer, t = d.linear(d.width, d.some()), d.channels
    kinds = [
        f"{layer}(h.reshape(-1, {d.width})).view(*h.shape[:-1], -1)",
        f"{layer}(h.transpose(0, 1)).transpose(0, 1)",
        f"{layer}(h.transpose(0, 1).reshape(-1, {d.width})).view({t}, h.shape[0], -1).transpose(0, 1)",
        f"torch.stack([{layer}(s).tanh() for s in h.unbind(1)], 1)",
        f"torch.cat([{layer}(s) for s in h.split(1, 0)])",
    ]
    return f"h = {d.choose(kinds)}"


def dropout(d: Draft) -> str:
    return f"h = {d.choose([d.part('nn.Dropout(0.3)') + '(h)', 'F.dropout(h, 0.4, net.training)'])}"


def statistic(d: Draft) -> str:
    """Samples meet in numbers that all of them share."""
    w = d.linear(d.width, d.width)
    kinds = [
        "h - h.mean(0)",
        "h - h.mean(0, keepdim=True)",
        "h / (1 + h.abs().amax(0))",
        "h / (0.1 + h.std(0))",
        "h / h.norm()",
        "h * h.square().mean(0).add(0.1).rsqrt()",
        f"h + {w}(h.mean(0)).tanh()",
        f"h + {w}(h).mean(0, keepdim=True)",
        "(h - h.mean(0)) / h.var(0, unbiased=False).add(0.1).sqrt()",
        "h - h.sum(0) / h.shape[0]",
        "h * h.tanh().sum().sigmoid()",
        "h - h.detach().mean(0)",
        "h * h.softmax(0)",
        "h @ torch.einsum('n...i,n...j->ij', h, h).tanh()",
        "h - h.logsumexp(0)",
        "h - h.mean()",
        "h / (1 + h.square().sum((0, -1), keepdim=True))",
    ]
    return f"h = {d.choose(kinds)}"


def statistic_in_place(d: Draft) -> str:
    kinds = [
        "h -= h.mean(0)",
        "h.sub_(h.mean(0)).div_(1 + h.square().mean(0))",
        "h.div_(h.abs().amax(0) + 1)",
        "h[..., 0] -= h[..., 0].mean()",
    ]
    return f"h = h.clone()\n{d.choose(kinds)}"


def meeting(d: Draft) -> str:
    """Samples meet by more than shared numbers."""
    q = d.linear(d.width, 2)
    return f"h = {d.choose(['h + h.roll(1, 0)', f'({q}(h) @ {q}(h).T).softmax(-1) @ h', 'h.cumsum(0)', 'h - h.flip(0)'])}"


def parameter(d: Draft) -> str:
    w, b = d.weight(d.width), d.weight(1)
    last = d.choose(["", "h = h.clone()\n"])
    kinds = [
        f"h = h * {w}",
        f"h = h + {w}",
        f"h = h * {w} + {w}",
        f"h = torch.addcmul(h, h, {w}.tanh())",
        f"h = {b} * h",
        f"h = F.layer_norm(h, ({d.width},), {w}, {w})",
        f"h = torch.where(h > {w}, h, {w} * h)",
        f"h = torch.cat([{w}.expand(h.shape[0], 1, -1), h], 1)",
        f"h = h ** 2 * {b}.exp() - {w}",
        f"{last}h *= {w}",
        f"{last}h[..., 0] += {b}",
        f"h = h + {w}.expand_as(h).tanh()",
        f"h = h.addcdiv({w}, 1 + h * h)",
    ]
    return d.choose(kinds)


def writing(d: Draft) -> str:
    kinds = [
        "h[:, 0].mul_(2)",
        "h[..., :1] = h[..., -1:].tanh()",
        "h.flatten(1)[:, ::2] = 0.5",
        "h.transpose(0, 1)[0] += 1",
        "h[:, 1:] += h[:, :-1].clone()",
        "h.select(-1, 0).copy_(h.sum(-1))",
        "h[h > 1] = 0.3",
        "h.mT.tanh_()",
        "h.masked_fill_(h < -1, -1.0)",
    ]
    return f"h = h.clone()\n{d.choose(kinds)}"


def written_into_a_buffer(d: Draft) -> str:
    layer = d.linear(d.width, d.width)
    kinds = [
        f"z = torch.zeros_like(h)\nz[:, 0] = h[:, -1]\nz[:, 1:] = {layer}(h)[:, 1:]\nh = z",
        f"z = h.new_zeros(*h.shape[:-1], {d.width + 1})\nz[..., 1:] = h\nz[..., 0] = {d.weight(1)}\nh = z",
    ]
    return d.choose(kinds)


BLOCKS = [
    dense,
    dense,
    dense,
    dense_by_hand,
    parametrised,
    tied,
    tied,
    convolution,
    convolution,
    convolution,
    batch_norm,
    batch_norm,
    batch_norm,
    batch_norm_of_tokens,
    norm_within,
    norm_within,
    activation,
    activation,
    activation,
    join,
    join,
    residual,
    attention,
    recurrence,
    pooling,
    reshaping,
    reshaping,
    tokens_merged,
    dropout,
    statistic,
    statistic,
    statistic_in_place,
    meeting,
    parameter,
    parameter,
    writing,
    written_into_a_buffer,
]


# ---------------------------------------------- losses of predictions `[N, ..]`, with their targets

REAL, BITS = "torch.randn_like(p)", "torch.randint(2, p.shape).double()"
LABELS = "torch.randint(p.shape[1], (p.shape[0], *p.shape[2:]))"
TOKENS = "torch.randint(p.shape[-1], p.shape[:-1])"
LOSSES = [
    ("F.mse_loss(p, y)", REAL),
    ("F.mse_loss(p, y, reduction='sum')", REAL),
    ("F.mse_loss(p, y).sqrt()", REAL),
    ("0.5 * (p - y).square().flatten(1).sum(1).mean()", REAL),
    ("F.binary_cross_entropy_with_logits(p, y)", BITS),
    ("F.binary_cross_entropy(p.sigmoid(), y, reduction='sum')", BITS),
    ("F.cross_entropy(p, y)", LABELS),
    ("F.cross_entropy(p, y)", LABELS),
    ("F.cross_entropy(p, y, reduction='sum')", LABELS),
    ("F.cross_entropy(p, y, weight=torch.linspace(0.5, 2, p.shape[1]).double())", LABELS),
    ("F.cross_entropy(p, y, label_smoothing=0.1)", LABELS),
    ("F.cross_entropy(p, y, ignore_index=0, reduction='sum')", LABELS),
    ("F.cross_entropy(p, y.softmax(1))", REAL),
    ("F.nll_loss(F.log_softmax(p, 1), y)", LABELS),
    ("F.cross_entropy(p.flatten(0, -2), y.flatten())", TOKENS),
    ("F.cross_entropy(p / net.temperature.exp(), y)", LABELS),
    ("F.mse_loss(p, y) + 0.1 * sum(w.square().sum() for w in net.parameters())", REAL),
    ("F.mse_loss(p * net.temperature, y)", REAL),
    ("F.huber_loss(p, y)", REAL),
    ("(p - y).abs().mean()", REAL),
    ("(p * y).sum()", REAL),
    ("(p - y).tanh().square().mean()", REAL),
    ("(p * y).sin().sum()", REAL),
    ("-(p - y).square().sum()", REAL),
    ("((p - y).square().flatten(1).sum(1) * torch.arange(1.0, 1 + len(p))).sum()", REAL),
    ("((p - y).square().flatten(1).sum(1) * y.flatten(1).sum(1).softmax(0)).sum()", REAL),
    ("(p - y).square().flatten(1).sum(1).logsumexp(0)", REAL),
    ("(1 + (p - y).square().flatten(1).mean(1)).prod()", REAL),
    ("(p - y).square().flatten(1).sum(1).topk(1).values.mean()", REAL),
    (
        "F.cross_entropy(F.normalize(p.flatten(1)) @ F.normalize(y.flatten(1)).T, torch.arange(len(p)))",
        REAL,
    ),
    ("F.cross_entropy(p.flatten(1) @ p.flatten(1).T, torch.arange(len(p)))", "None"),
    ("(p - p.mean(0)).square().sum() + p.sum().tanh()", "None"),
    ("1 - 2 * (p.sigmoid() * y).sum() / (p.sigmoid().sum() + y.sum() + 1)", BITS),
    ("F.gaussian_nll_loss(p[:, 0], y[:, 0], p[:, -1].exp())", REAL),
    ("F.poisson_nll_loss(p.clamp(max=3), y)", BITS),
    (
        "((1 - p.softmax(1).gather(1, y[:, None])[:, 0]) ** 2 * F.cross_entropy(p, y, reduction='none')).mean()",
        LABELS,
    ),
    ("(p - y).square().mean() * 0 + (p * p * p).sum()", REAL),
]


def _inputs(d: Draft) -> None:
    """Flat, sequences, images, integers, or two tensors."""
    kinds = {
        "flat": f"normals({d.samples}, {d.some(1, 5)})",
        "sequence": f"normals({d.samples}, {d.some(1, 4)}, {d.some(2, 4)})",
        "image": f"normals({d.samples}, {d.some(1, 3)}, {d.some(2, 4)}, 3)",
        "integers": f"integers(4, {d.samples}, {d.some(1, 3)})",
        "two": f"(normals({d.samples}, 3), normals({d.samples}, 3))",
    }
    kind = d.choose([*kinds, "flat", "sequence", "image"])
    d.setup.append(f"x = {kinds[kind]}")
    d.values["x"] = eval(kinds[kind], dict(SPACE))
    first = {"integers": "h = {0}(h)", "two": "h = {1}(x[0]) + {2}(x[1]).tanh()"}.get(
        kind, "h = h * 1"
    )
    makes = {
        "integers": ["nn.Embedding(4, 2)", *[""] * 2],
        "two": ["", "nn.Linear(3, 3)", "nn.Linear(3, 3)"],
    }
    parts = [d.part(make) if make else "" for make in makes.get(kind, [])]
    d.add(first.format(*parts))


def net_source(choose: Choose, longest: int = 7) -> Source:
    """A net, its batch and its loss."""
    d = Draft(choose, samples=choose([1, 2, 3, 4, 4, 5]), train=choose([True, True, False]))
    _inputs(d)
    for _ in range(choose(range(1, longest + 1))):
        d.grow(BLOCKS)
    if not d.h.requires_grad or d.h.numel() > 10 * d.samples:
        d.grow([lambda d: f"h = {d.linear(d.h[0].numel(), d.some())}(h.flatten(1))"])
    if not d.h.requires_grad or d.h.numel() > 20 * d.samples:
        d.grow([lambda d: f"h = {d.weight(1)} * h.reshape(h.shape[0], -1)[:, :2]"])
    return _with_loss(d)


def _with_loss(d: Draft) -> Source:
    """One of the losses that runs on these predictions."""
    shape = str(tuple(d.h.shape))
    for loss, targets in [*(d.choose(LOSSES) for _ in range(4)), LOSSES[0]]:
        learned = ["net.temperature = nn.Parameter(normals())"] if "temperature" in loss else []
        drawn = "y = " + targets.replace("p.shape", shape).replace(
            "randn_like(p)", f"randn({shape})"
        )
        source = Source("\n".join([*d.setup, *learned, drawn]), d.forward(), loss, d.train)
        if _runs(source):
            return source
    raise AssertionError(f"no loss runs on {source}")


def _runs(source: Source) -> bool:
    """The loss is a number with a gradient, neither of them huge."""
    try:
        net, loss, x, y = source.build()
        with quietly():
            value = loss(net(*x) if isinstance(x, tuple) else net(x), y)
            grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    except FAILURES:
        return False
    moderate = [value.abs(), *(g.abs().max() for g in grads if g is not None and g.numel())]
    return value.ndim == 0 and all(t < LARGE**2 for t in moderate)
