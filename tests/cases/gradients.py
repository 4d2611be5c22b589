"""Models and losses whose rows of gradients are compared with their definitions, in float64 and at
tiny sizes.

`mixes` says whether a prediction listens to other samples in train mode, `mixes_in_eval` whether it
still does in eval mode. `frozen` and `copies` say whether the reference can run the case so: it
runs one sample on its own, which a model that cuts the batch into groups does not allow, and holds
statistics constant, which attention between samples has none of. Inputs and predictions carry
samples on axis 0.
"""

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from cases.models import Net

N, D, T, C = 5, 6, 4, 3
WEIGHTS = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


@dataclass(frozen=True)
class GradientCase:
    name: str
    build: Callable[[], tuple[nn.Module, Callable, Any, Any]]
    mixes: bool = False
    mixes_in_eval: bool = False
    frozen: bool = True
    copies: bool = True

    def mixes_in(self, mode: str) -> bool:
        return self.mixes if mode == "train" else self.mixes_in_eval


CASES: list[GradientCase] = []


class Twice(torch.autograd.Function):
    """Has another derivative than its recording, so that the model is run itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


# ---------------------------------------------- losses: `make(model, predictions) -> loss, targets`

LOSSES: dict[str, Callable] = {}


def targeted(name, draw, loss=None):
    """A loss and how its targets are drawn from the predictions, at once or as the decorator of the
    loss.
    """
    if loss is None:
        return lambda f: targeted(name, draw, f)
    LOSSES[name] = lambda model, p: (loss, draw(p))
    return loss


def labels(p):
    return torch.randint(p.shape[1], (p.shape[0], *p.shape[2:]))


def ignoring(p):
    y = labels(p)
    y.view(-1)[1::3] = -100
    return y


def normal(p):
    return torch.randn(p.shape, dtype=p.dtype)


def bits(p):
    return torch.randint(2, p.shape).to(p.dtype)


def options(function, **given):
    return lambda p, y: function(p, y, **given)


targeted("ce", labels, F.cross_entropy)
targeted("ce sum", labels, options(F.cross_entropy, reduction="sum"))
targeted("ce module", labels, nn.CrossEntropyLoss())
targeted("ce class weights", labels, options(F.cross_entropy, weight=WEIGHTS))
targeted("ce class weights sum", labels, options(F.cross_entropy, weight=WEIGHTS, reduction="sum"))
targeted("ce ignore_index", ignoring, F.cross_entropy)
targeted("ce smoothing", labels, options(F.cross_entropy, label_smoothing=0.2))
targeted(
    "ce soft targets", lambda p: torch.randn(p.shape, dtype=p.dtype).softmax(1), F.cross_entropy
)
targeted("nll", labels, lambda p, y: F.nll_loss(p.log_softmax(1), y))
targeted("mse", normal, F.mse_loss)
targeted("mse sum", normal, options(F.mse_loss, reduction="sum"))
targeted("mse by hand", normal, lambda p, y: 0.5 * (p - y).pow(2).flatten(1).sum(1).mean())
targeted("bce", bits, F.binary_cross_entropy_with_logits)
targeted("bce sum", bits, options(F.binary_cross_entropy_with_logits, reduction="sum"))
targeted("huber", normal, F.huber_loss)
targeted("huber sum", normal, options(F.huber_loss, reduction="sum", delta=0.3))
targeted("root of a mean", normal, lambda p, y: F.mse_loss(p, y).sqrt())
targeted("log-sum-exp", normal, lambda p, y: (p - y).square().flatten(1).sum(1).logsumexp(0))


@targeted("contrastive", lambda p: torch.arange(p.shape[0]).roll(1))
def _(p, y):
    z = F.normalize(p, dim=1)
    return F.cross_entropy(z @ z.t() / 0.5, y)


@targeted("triplet", lambda p: None)
def _(p):
    apart = (p - p.roll(1, 0)).square().sum(1) - (p - p.roll(2, 0)).square().sum(1)
    return F.softplus(apart).mean()


@targeted("dice", bits)
def _(p, y):
    q = p.sigmoid()
    return 1 - 2 * (q * y).sum() / (q.sum() + y.sum() + 1)


class Tempered(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, p, y):
        return F.cross_entropy(p / self.log_temperature.exp(), y)


LOSSES["with a parameter"] = lambda model, p: (Tempered(), labels(p))


def decayed(model, p):
    def loss(p, y):
        return F.cross_entropy(p, y) + 0.1 * sum(w.square().sum() for w in model.parameters())

    return loss, labels(p)


LOSSES["with weight decay"] = decayed


PLAIN = list(LOSSES)  # of predictions `[N, C]`

# Losses of predictions that are no one tensor `[N, C]`.


@targeted("tokens", lambda p: torch.randint(p.shape[2], p.shape[:2]))
def _(p, y):
    return F.cross_entropy(p.flatten(0, 1), y.flatten())


@targeted("tokens ignored", lambda p: torch.randint(p.shape[2], p.shape[:2]))
def _(p, y):
    padded = torch.arange(y.numel()) % 3 == 1
    return F.cross_entropy(p.flatten(0, 1), y.flatten().masked_fill(padded, -100), reduction="sum")


@targeted("of a dict", lambda p: (labels(p["class"]), normal(p["box"])))
def _(p, y):
    return F.cross_entropy(p["class"], y[0]) + 0.5 * F.mse_loss(p["box"], y[1], reduction="sum")


@targeted("of a tuple", lambda p: normal(p[0]))
def _(p, y):
    mean, log_variance = p
    return F.gaussian_nll_loss(mean, y, log_variance.exp())


@targeted("with an auxiliary one", lambda p: labels(p[0]))
def _(p, y):
    return F.cross_entropy(p[0], y) + 0.3 * p[1]


@targeted("distance of views", lambda p: None)
def _(p):
    return (p[0] - p[1]).square().sum(1).mean()


# ---------------------------------------------------------------- how cases are made

MIXES = {"mixes": True}
ALWAYS_MIXES = {"mixes": True, "mixes_in_eval": True}
GROUPS = {"mixes": True, "frozen": False, "copies": False}  # one sample is no group
NO_STATISTIC = ALWAYS_MIXES | {"frozen": False}


def built(name, loss="ce", **flags):
    """A case from a function that returns `(model, inputs)`; `loss` is a key of `LOSSES`."""

    def register(make):
        def build():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(zlib.crc32(name.encode()))
                model, inputs = make()
                unsettle(model.double())
                function, targets = LOSSES[loss](model, predictions(model, inputs))
                return model, function, inputs, targets

        assert name not in {case.name for case in CASES}, name
        CASES.append(GradientCase(name, build, **flags))
        return make

    return register


@torch.no_grad()
def unsettle(model):
    """Away from zeros and ones, at which mistakes do not show."""
    for p in model.parameters():
        p.add_(0.2 * torch.randn_like(p))
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.normal_()
        if name.endswith("running_var"):
            b.uniform_(0.5, 2)


@torch.no_grad()
def predictions(model, inputs):
    model = copy.deepcopy(model).eval()
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def normals(*shape):
    return torch.randn(shape, dtype=torch.float64)


def layers(name, shape, *makers, loss="ce", **flags):
    """A case from layers in a row."""
    built(name, loss, **flags)(
        lambda: (nn.Sequential(*(make() for make in makers)), normals(*shape))
    )


def forward(name, *inputs, loss="ce", flags=MappingProxyType({}), **parts):
    """A case from a forward function; inputs are shapes or makers, `net.head` maps D to C unless
    given.
    """

    def register(function):
        def make():
            made = tuple(i() if callable(i) else normals(*i) for i in inputs or [(N, D)])
            net = Net(function, {"head": linear(D, C), **parts})
            return net, made if len(made) > 1 else made[0]

        return built(name, loss, **flags)(make)

    return register


def linear(i=D, o=D, **options):
    return lambda: nn.Linear(i, o, **options)


def conv(i=2, o=4, k=3, **options):
    return lambda: nn.Conv2d(i, o, k, **options)


def norm(width=D, **options):
    return lambda: nn.BatchNorm1d(width, **options)


def weight(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


def integers(high, *shape):
    return lambda: torch.randint(high, shape)


FLAT, SEQUENCE, IMAGE = (N, D), (N, T, D), (N, 2, 6, 6)
HEAD = linear(D, C)
POOLED = (lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten)

# ---------------------------------------------------------------- three models, every loss

for key in PLAIN:
    layers(f"mlp, {key}", FLAT, linear(), nn.Tanh, HEAD, loss=key)
    layers(f"batch norm, {key}", FLAT, linear(), norm(), nn.Tanh, HEAD, loss=key, **MIXES)
    layers(
        f"two batch norms, {key}",
        FLAT,
        linear(),
        norm(),
        nn.Tanh,
        linear(),
        norm(),
        HEAD,
        loss=key,
        **MIXES,
    )

# ---------------------------------------------------------------- samples apart: layers

layers("linear without bias", FLAT, linear(bias=False), nn.ReLU, linear(D, C, bias=False))
layers(
    "softplus, gelu, silu",
    FLAT,
    linear(),
    nn.Softplus,
    linear(),
    nn.GELU,
    linear(),
    nn.SiLU,
    HEAD,
    loss="mse",
)
layers("linear on tokens", SEQUENCE, linear(), nn.Tanh, HEAD, loss="tokens")
layers("linear on tokens, some ignored", SEQUENCE, linear(), nn.Tanh, HEAD, loss="tokens ignored")
layers("conv2d", IMAGE, conv(), nn.ReLU, conv(4, C, 3), *POOLED)
layers(
    "conv2d without bias, strided",
    IMAGE,
    conv(stride=2, padding=1, bias=False),
    nn.Tanh,
    *POOLED,
    linear(4, C),
)
layers("conv2d 1x1", IMAGE, conv(k=1), nn.Tanh, *POOLED, linear(4, C))
layers(
    "conv2d grouped",
    IMAGE,
    conv(2, 4),
    nn.Tanh,
    conv(4, 6, groups=2, padding=1),
    *POOLED,
    linear(6, C),
)
layers(
    "conv2d depthwise",
    IMAGE,
    conv(2, 4),
    nn.Tanh,
    conv(4, 8, groups=4),
    nn.Tanh,
    conv(8, C, 1),
    *POOLED,
)
layers(
    "conv2d dilated",
    IMAGE,
    conv(2, 4, 2, dilation=(2, 3), padding=(1, 2)),
    nn.Tanh,
    *POOLED,
    linear(4, C),
)
layers(
    "conv2d same", IMAGE, conv(2, 4, (3, 5), padding="same"), nn.Tanh, nn.Flatten, linear(144, C)
)
layers(
    "conv2d circular",
    IMAGE,
    conv(2, 4, padding=1, padding_mode="circular"),
    nn.Tanh,
    *POOLED,
    linear(4, C),
)
layers(
    "conv2d reflected",
    IMAGE,
    conv(2, 4, padding=1, padding_mode="reflect"),
    nn.Tanh,
    *POOLED,
    linear(4, C),
)
layers("fully convolutional", IMAGE, conv(2, 4), nn.Tanh, conv(4, C, 1), loss="ce ignore_index")
layers("max pool", IMAGE, conv(2, 4), lambda: nn.MaxPool2d(2), nn.Flatten, linear(16, C))
layers(
    "conv1d",
    (N, 2, 7),
    lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1),
    nn.Tanh,
    lambda: nn.Conv1d(4, 4, 2, groups=2, dilation=2),
    nn.Flatten,
    linear(8, C),
)
layers(
    "conv3d",
    (4, 2, 4, 3, 4),
    lambda: nn.Conv3d(2, 3, 2, padding=(1, 0, 1), stride=2),
    nn.Flatten,
    linear(27, C),
)
layers(
    "conv1d transposed",
    (N, 2, 3),
    lambda: nn.ConvTranspose1d(2, 3, 2, stride=2),
    nn.Tanh,
    loss="mse sum",
)
layers(
    "conv2d transposed, grouped",
    (N, 2, 3, 3),
    lambda: nn.ConvTranspose2d(
        2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=1
    ),
    nn.Tanh,
    *POOLED,
    linear(4, C),
)
layers(
    "conv3d transposed",
    (4, 2, 2, 2, 2),
    lambda: nn.ConvTranspose3d(2, 3, 2, bias=False),
    nn.Flatten,
    linear(81, C),
)
layers("layer norm", FLAT, linear(), lambda: nn.LayerNorm(D), nn.Tanh, HEAD)
layers(
    "layer norm on tokens", SEQUENCE, linear(), lambda: nn.LayerNorm((T, D)), HEAD, loss="tokens"
)
layers("group norm", IMAGE, conv(), lambda: nn.GroupNorm(2, 4), nn.Tanh, *POOLED, linear(4, C))
layers("rms norm", SEQUENCE, linear(), lambda: nn.RMSNorm(D), nn.Tanh, HEAD, loss="tokens")
layers(
    "instance norm",
    IMAGE,
    conv(),
    lambda: nn.InstanceNorm2d(4, affine=True),
    nn.Tanh,
    *POOLED,
    linear(4, C),
)
layers("prelu", FLAT, linear(), nn.PReLU, HEAD)
layers("prelu per channel", IMAGE, conv(), lambda: nn.PReLU(4), *POOLED, linear(4, C))
layers(
    "in-place activations",
    FLAT,
    linear(),
    lambda: nn.ReLU(inplace=True),
    linear(),
    lambda: nn.ELU(inplace=True),
    HEAD,
)
layers("dropout", FLAT, linear(), lambda: nn.Dropout(0.4), nn.Tanh, HEAD)


@built("bilinear")
def _():
    net = Net(
        lambda net, x, y: net.head(net.meet(x, y)),
        {"meet": lambda: nn.Bilinear(D, T, D), "head": HEAD},
    )
    return net, (normals(N, D), normals(N, T))


@forward("embedding", integers(7, N, T), embed=lambda: nn.Embedding(7, D, padding_idx=0))
def _(net, i):
    return net.head(net.embed(i).tanh().mean(1))


@forward("embedding bag", integers(7, N, T), embed=lambda: nn.EmbeddingBag(7, D, mode="mean"))
def _(net, i):
    return net.head(net.embed(i))


@forward("embedding bag, sum", integers(7, N, T), embed=lambda: nn.EmbeddingBag(7, D, mode="sum"))
def _(net, i):
    return net.head(net.embed(i).tanh())


# ----------------------------------------------------------- samples apart: parameters used by hand


@forward("functional linear", hidden=linear())
def _(net, x):
    return net.head(F.linear(x, net.hidden.weight, net.hidden.bias).tanh())


@forward("functional conv", (N, 2, 6, 6), kernel=weight(D, 2, 3, 3), shift=weight(D))
def _(net, x):
    return net.head(F.conv2d(x, net.kernel, net.shift, stride=2).tanh().mean((2, 3)))


@forward("autoencoder with tied weights", hidden=linear(D, T), loss="mse")
def _(net, x):
    return F.linear(net.hidden(x).tanh(), net.hidden.weight.t())


@forward(
    "embedding tied with the output",
    integers(7, N, T),
    embed=lambda: nn.Embedding(7, D),
    loss="tokens",
)
def _(net, i):
    return F.linear(net.embed(i).tanh(), net.embed.weight)


@built("two modules with one weight")
def _():
    net = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D), nn.Linear(D, C))
    net[2].weight = net[0].weight
    return net, normals(N, D)


@forward("a layer used twice", hidden=linear())
def _(net, x):
    return net.head(net.hidden(net.hidden(x).tanh()).tanh())


@forward("a layer used on two inputs", FLAT, FLAT, loss="distance of views")
def _(net, x, y):
    return net.head(x), net.head(y)


@forward("weight norm", hidden=lambda: parametrizations.weight_norm(nn.Linear(D, D)))
def _(net, x):
    return net.head(net.hidden(x).tanh())


@forward("spectral norm", hidden=lambda: parametrizations.spectral_norm(nn.Linear(D, D)))
def _(net, x):
    return net.head(net.hidden(x).tanh())


@forward(
    "weight norm of a conv", IMAGE, conv=lambda: parametrizations.weight_norm(nn.Conv2d(2, D, 3))
)
def _(net, x):
    return net.head(net.conv(x).tanh().mean((2, 3)))


@forward("weight standardisation", IMAGE, conv=conv(2, D))
def _(net, x):
    w = net.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
    return net.head(F.conv2d(x, w, net.conv.bias).tanh().mean((2, 3)))


@forward("lora", base=linear(), a=weight(D, 2), b=weight(2, D))
def _(net, x):
    return net.head(F.linear(x, net.base.weight + net.a @ net.b, net.base.bias).tanh())


@forward(
    "lora with a frozen base",
    base=lambda: nn.Linear(D, D).requires_grad_(False),
    a=weight(D, 2),
    b=weight(2, D),
)
def _(net, x):
    return net.head((net.base(x) + x @ net.a @ net.b).tanh())


@forward("bare scale", scale=weight(D), shift=weight(1, D))
def _(net, x):
    return net.head((net.scale * x + net.shift).tanh())


@forward("a scalar", gain=weight())
def _(net, x):
    return net.head((net.gain * x).tanh())


@forward("power and quotient", power=weight(D), divisor=weight(D))
def _(net, x):
    return net.head((x.abs() + 0.5) ** net.power / (2 + net.divisor.square()))


@forward("x @ W", w=weight(D, D))
def _(net, x):
    return net.head((x @ net.w).tanh())


@forward("W @ x on the left", SEQUENCE, w=weight(D, T))
def _(net, x):
    return net.head((net.w @ x).tanh().mean(1))


@forward("einsum", SEQUENCE, w=weight(2, T, D, D))
def _(net, x):
    return net.head(torch.einsum("ntd,htde->nhe", x, net.w).tanh().sum(1))


@forward("low-rank bilinear einsum", FLAT, FLAT, a=weight(D, D))
def _(net, x, y):
    return net.head(torch.einsum("ni,ij,nj->nj", x, net.a, y))


@forward("gated by an exponential", decay=weight(D))
def _(net, x):
    return net.head(x * torch.exp(-F.softplus(net.decay)) + (x > net.decay.mean()) * net.decay)


@forward("positions", SEQUENCE, positions=weight(T, D), mlp=linear())
def _(net, x):
    return net.head(net.mlp(x + net.positions).tanh().mean(1))


@forward("class token", SEQUENCE, token=weight(1, 1, D), key=linear(), value=linear())
def _(net, x):
    x = torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1)
    return net.head((net.key(x) @ x.mT).softmax(-1)[:, 0].unsqueeze(1).bmm(net.value(x)).squeeze(1))


def shifted_right(x):
    """As decoders prepare their inputs: all moved on by one place, and the first place filled."""
    out = x.new_zeros(x.shape)
    out[:, 1:] = x[:, :-1].clone()
    out[:, 0] = 2
    return out


@forward(
    "tokens shifted right", integers(7, N, T), embed=lambda: nn.Embedding(7, D), hidden=linear()
)
def _(net, i):
    return net.head(net.hidden(net.embed(shifted_right(i))).tanh().mean(1))


@forward(
    "tokens shifted right, tied output",
    integers(7, N, T),
    embed=lambda: nn.Embedding(7, D),
    hidden=linear(),
    loss="tokens",
)
def _(net, i):
    return net.hidden(net.embed(shifted_right(i))).tanh() @ net.embed.weight.t()


@forward("inputs shifted right", SEQUENCE, hidden=linear())
def _(net, x):
    return net.head(net.hidden(shifted_right(x)).tanh().mean(1))


@forward("class token written in place", SEQUENCE, token=weight(D), hidden=linear(), query=linear())
def _(net, x):
    h = torch.zeros(x.shape[0], T + 1, D, dtype=x.dtype)
    h[:, 0], h[:, 1:] = net.token, net.hidden(x)
    return net.head((net.query(h) @ h.mT).softmax(-1).bmm(h).mean(1))


@forward(
    "tokens shifted right, batch norm",
    SEQUENCE,
    hidden=linear(),
    norm=norm(),
    deep=linear(),
    flags=MIXES,
)
def _(net, x):
    h = net.norm(net.hidden(shifted_right(x)).flatten(0, 1)).unflatten(0, x.shape[:2])
    return net.head(net.deep(h.tanh()).mean(1))


@forward(
    "class token written in place, batch norm",
    SEQUENCE,
    token=weight(D),
    hidden=linear(),
    norm=norm(),
    flags=MIXES,
)
def _(net, x):
    h = torch.zeros(x.shape[0], T + 1, D, dtype=x.dtype)
    h[:, 0], h[:, 1:] = net.token, net.hidden(x)
    return net.head(net.norm(h.mT).mT.tanh().mean(1))


@forward("parameter of every token, stacked", SEQUENCE, weights=weight(T, D, D))
def _(net, x):
    return net.head(torch.stack([x[:, t] @ net.weights[t] for t in range(T)], 1).tanh().mean(1))


@forward("soft experts", router=linear(D, 2), experts=weight(2, D, D))
def _(net, x):
    gate = net.router(x).softmax(-1)
    return net.head(torch.einsum("ng,nd,gde->ne", gate, x, net.experts))


@forward("hypernetwork", hyper=linear(D, D * 2))
def _(net, x):
    w = net.hyper(x).view(-1, 2, D)
    return net.head((w @ x.unsqueeze(-1)).squeeze(-1).repeat(1, 3).tanh())


@forward("indexed parameter", integers(4, N), FLAT, table=weight(4, D))
def _(net, i, x):
    return net.head((x + net.table[i]).tanh())


# ----------------------------------------------------------- samples apart: sequences and attention


def attention_mask(n, t):
    mask = torch.zeros(n, t, dtype=torch.bool)
    mask[1::2, -1] = True
    return mask


def attention(**given):
    return lambda: nn.MultiheadAttention(D, 2, batch_first=True, **given)


def encoder(**given):
    return lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, **given)


@forward("attention", SEQUENCE, attend=attention())
def _(net, x):
    return net.head(net.attend(x, x, x, need_weights=False)[0].mean(1))


@forward(
    "attention by plain ops, padded",
    SEQUENCE,
    lambda: attention_mask(N, T),
    attend=attention(bias=False),
)
def _(net, x, mask):
    return net.head(net.attend(x, x, x, key_padding_mask=mask, need_weights=True)[0].mean(1))


@forward(
    "attention with other keys",
    SEQUENCE,
    (N, 3, T),
    attend=attention(kdim=T, vdim=T, add_bias_kv=True),
)
def _(net, x, y):
    return net.head(net.attend(x, y, y)[0].mean(1))


@forward("attention by hand", SEQUENCE, qkv=linear(D, 3 * D))
def _(net, x):
    q, k, v = net.qkv(x).view(*x.shape[:2], 3, 2, D // 2).permute(2, 0, 3, 1, 4)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return net.head(h.transpose(1, 2).flatten(2).mean(1))


@forward("transformer", SEQUENCE, encoder=encoder(batch_first=True))
def _(net, x):
    return net.head(net.encoder(x).mean(1))


@forward("transformer, time first", SEQUENCE, encoder=encoder(norm_first=True))
def _(net, x):
    return net.head(net.encoder(x.transpose(0, 1)).mean(0))


@forward(
    "transformer, padded", SEQUENCE, lambda: attention_mask(N, T), encoder=encoder(batch_first=True)
)
def _(net, x, mask):
    return net.head(net.encoder(x, src_key_padding_mask=mask)[:, 0])


def recurrent(name, make, width=4, time_first=False):
    @forward(name, SEQUENCE, rnn=make, head=linear(width, C))
    def _(net, x):
        h = net.rnn(x.transpose(0, 1))[0][-1] if time_first else net.rnn(x)[0][:, -1]
        return net.head(h)


recurrent("rnn", lambda: nn.RNN(D, 4, batch_first=True))
recurrent("rnn with relu, time first", lambda: nn.RNN(D, 4, nonlinearity="relu"), time_first=True)
recurrent("lstm", lambda: nn.LSTM(D, 4, batch_first=True))
recurrent("lstm, two layers, time first", lambda: nn.LSTM(D, 4, num_layers=2), time_first=True)
recurrent("lstm, both ways", lambda: nn.LSTM(D, 3, bidirectional=True, batch_first=True), 6)
recurrent("lstm, projected", lambda: nn.LSTM(D, 4, proj_size=2, batch_first=True), 2)
recurrent("gru", lambda: nn.GRU(D, 4, num_layers=2, bidirectional=True, batch_first=True), 8)
recurrent("gru without bias", lambda: nn.GRU(D, 4, bias=False), time_first=True)


@forward("lstm cell in a loop", SEQUENCE, cell=lambda: nn.LSTMCell(D, D))
def _(net, x):
    h = c = torch.zeros_like(x[:, 0])
    for t in range(T):
        h, c = net.cell(x[:, t], (h, c))
    return net.head(h)


@forward("recurrence by hand", SEQUENCE, step=linear(), keep=linear(bias=False))
def _(net, x):
    h = x[:, 0]
    for t in range(1, T):
        h = (net.step(x[:, t]) + net.keep(h)).tanh()
    return net.head(h)


# -------------------------------------------------------------- samples apart: shapes and structure


@forward("residual", one=linear(), two=linear())
def _(net, x):
    x = x + net.one(x).tanh()
    return net.head(x + net.two(x).tanh())


@forward("squeeze and excite", IMAGE, conv=conv(2, D), squeeze=linear(D, 2), excite=linear(2, D))
def _(net, x):
    h = net.conv(x).tanh()
    gate = net.excite(net.squeeze(h.mean((2, 3))).relu()).sigmoid()
    return net.head((h * gate[:, :, None, None]).mean((2, 3)))


@forward("samples merged with time", SEQUENCE, mlp=linear())
def _(net, x):
    return net.head(net.mlp(x.reshape(-1, D)).tanh()).view(*x.shape[:2], C).mean(1)


@forward("time first", SEQUENCE, mlp=linear())
def _(net, x):
    return net.head(net.mlp(x.transpose(0, 1)).tanh()).mean(0)


@forward("time merged with samples", SEQUENCE, mlp=linear())
def _(net, x):
    h = net.mlp(x.transpose(0, 1).reshape(-1, D)).tanh()
    return net.head(h).view(T, -1, C).mean(0)


@forward("features last, samples last", w=weight(D, D))
def _(net, x):
    return net.head((net.w @ x.t()).tanh().t())


@forward("written in place", hidden=linear())
def _(net, x):
    h = net.hidden(x)
    h[:, :2] = h[:, 2:4].tanh()
    h[:, 4:].mul_(2)
    return net.head(h.relu_())


@forward("filled in place", SEQUENCE, step=linear())
def _(net, x):
    out = torch.zeros_like(x)
    for t in range(T):
        out[:, t] = net.step(x[:, t]).tanh()
    return net.head(out.mean(1))


@forward("split and joined", one=linear(3, 3), two=linear(3, 3))
def _(net, x):
    a, b = x.chunk(2, 1)
    return net.head(torch.cat([net.two(b).tanh(), net.one(a)], 1))


@forward("a frozen layer", fixed=lambda: nn.Linear(D, D).requires_grad_(False), hidden=linear())
def _(net, x):
    return net.head(net.fixed(net.hidden(x).tanh()).tanh())


@forward("an unused parameter", unused=linear(), empty=weight(0, 3))
def _(net, x):
    return net.head(x)


@forward("a parameter without entries in use", empty=weight(0))
def _(net, x):
    return net.head(x) + net.empty.sum()


@forward("detached in the middle", hidden=linear(), other=linear())
def _(net, x):
    return net.head(net.hidden(x).detach() + net.other(x).tanh())


@forward("dict of predictions", hidden=linear(), box=linear(D, 2), loss="of a dict")
def _(net, x):
    h = net.hidden(x).tanh()
    return {"class": net.head(h), "box": net.box(h), "features": h}


@forward("tuple of predictions", hidden=linear(), spread=linear(D, C), loss="of a tuple")
def _(net, x):
    h = net.hidden(x).tanh()
    return net.head(h), net.spread(h)


@forward("an auxiliary loss", hidden=linear(), loss="with an auxiliary one")
def _(net, x):
    return net.head(net.hidden(x).tanh()), net.hidden.weight.square().sum()


@forward("two inputs, one of them integers", FLAT, integers(7, N), embed=lambda: nn.Embedding(7, D))
def _(net, x, i):
    return net.head((x + net.embed(i)).tanh())


@built("inputs by name")
def _():
    net = Net(lambda net, *, left, right: net.head((left * right).tanh()), {"head": HEAD})
    return net, {"left": normals(N, D), "right": normals(N, D)}


@built("parametrised to be symmetric")
def _():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).mT

    hidden = nn.Linear(D, D)
    parametrize.register_parametrization(hidden, "weight", Symmetric())
    return nn.Sequential(hidden, nn.Tanh(), nn.Linear(D, C)), normals(N, D)


# --------------------------------------------------------- samples that meet: batch norm as a layer

layers("batch norm first", FLAT, norm(), linear(), nn.Tanh, HEAD, **MIXES)
layers("batch norm last", FLAT, linear(), nn.Tanh, HEAD, norm(C), **MIXES)
layers("batch norm, not affine", FLAT, linear(), norm(affine=False), nn.Tanh, HEAD, **MIXES)
layers(
    "batch norm without running statistics",
    FLAT,
    linear(),
    norm(track_running_stats=False),
    HEAD,
    **ALWAYS_MIXES,
)
layers(
    "batch norm, cumulative average",
    FLAT,
    linear(),
    norm(momentum=None, eps=0.1),
    nn.Tanh,
    HEAD,
    **MIXES,
)
layers("batch norm right after batch norm", FLAT, linear(), norm(), norm(), nn.Tanh, HEAD, **MIXES)
layers(
    "three batch norms",
    FLAT,
    *[m for _ in range(3) for m in (linear(), norm(), nn.Tanh)],
    HEAD,
    **MIXES,
)
layers(
    "batch norm and dropout",
    FLAT,
    linear(),
    norm(),
    lambda: nn.Dropout(0.4),
    linear(),
    norm(),
    HEAD,
    **MIXES,
)
layers(
    "batch norm of a conv",
    IMAGE,
    conv(),
    lambda: nn.BatchNorm2d(4),
    nn.ReLU,
    *POOLED,
    linear(4, C),
    **MIXES,
)
layers(
    "two batch norms of convs",
    IMAGE,
    *(conv(2, 4), lambda: nn.BatchNorm2d(4), nn.Tanh),
    *(conv(4, C, bias=False), lambda: nn.BatchNorm2d(C), nn.Tanh, *POOLED),
    loss="ce class weights",
    **MIXES,
)
layers(
    "batch norm of the image",
    IMAGE,
    lambda: nn.BatchNorm2d(2),
    conv(2, C),
    nn.Tanh,
    *POOLED,
    **MIXES,
)
layers(
    "batch norm in 3d",
    (4, 2, 3, 2, 3),
    *(lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3), nn.Tanh, nn.Flatten, linear(12, C)),
    **MIXES,
)
layers(
    "batch norm over time",
    (N, 2, 7),
    *(lambda: nn.Conv1d(2, 4, 3), norm(4), nn.Tanh, nn.Flatten, linear(20, C)),
    **MIXES,
)


@forward("batch norm of tokens", SEQUENCE, hidden=linear(), norm=norm(), loss="tokens", flags=MIXES)
def _(net, x):
    h = net.norm(net.hidden(x).reshape(-1, D)).view(x.shape)
    return net.head(h.tanh())


@forward("batch norm of tokens, time first", SEQUENCE, hidden=linear(), norm=norm(), flags=MIXES)
def _(net, x):
    h = net.norm(net.hidden(x.transpose(0, 1)).reshape(-1, D)).view(T, -1, D)
    return net.head(h.tanh().mean(0))


@forward("functional batch norm", hidden=linear(), gain=weight(D), flags=ALWAYS_MIXES)
def _(net, x):
    return net.head(F.batch_norm(net.hidden(x), None, None, net.gain, training=True).tanh())


@forward("batch norm used twice", hidden=linear(), norm=norm(), flags=MIXES)
def _(net, x):
    return net.head(net.norm(net.hidden(net.norm(net.hidden(x)).tanh())))


@forward("batch norm with a residual path", hidden=linear(), norm=norm(), flags=MIXES)
def _(net, x):
    h = net.hidden(x)
    return net.head(h + net.norm(h).tanh())


@forward(
    "batch norm on one of two paths", hidden=linear(), norm=norm(), other=linear(), flags=MIXES
)
def _(net, x):
    return net.head(net.norm(net.hidden(x)) * net.other(x).sigmoid())


@forward(
    "small residual network",
    IMAGE,
    stem=conv(2, 4, padding=1, bias=False),
    norms=lambda: nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4)),
    convs=lambda: nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)),
    short=conv(4, 4, 1, bias=False),
    head=linear(4, C),
    flags=MIXES,
)
def _(net, x):
    x = net.norms[0](net.stem(x)).relu()
    h = net.norms[1](net.convs[0](x)).relu()
    h = net.norms[2](net.convs[1](h))
    return net.head((h + net.norms[3](net.short(x))).relu().mean((2, 3)))


@forward(
    "batch norm, then a transformer",
    SEQUENCE,
    norm=norm(T),
    encoder=encoder(batch_first=True),
    flags=MIXES,
)
def _(net, x):
    return net.head(net.encoder(net.norm(x)).mean(1))


@forward(
    "batch norm, then an lstm",
    SEQUENCE,
    hidden=linear(),
    norm=norm(T),
    rnn=lambda: nn.LSTM(D, D),
    flags=MIXES,
)
def _(net, x):
    return net.head(net.rnn(net.norm(net.hidden(x)).transpose(0, 1))[0][-1])


@forward(
    "batch norm with tied weights around", hidden=linear(), norm=norm(), loss="mse", flags=MIXES
)
def _(net, x):
    return F.linear(net.norm(net.hidden(x)).tanh(), net.hidden.weight.t())


@forward(
    "batch norm under weight norm",
    hidden=lambda: parametrizations.weight_norm(nn.Linear(D, D)),
    norm=norm(),
    flags=MIXES,
)
def _(net, x):
    return net.head(net.norm(net.hidden(x)).tanh())


@forward(
    "batch norm of a dict of predictions",
    hidden=linear(),
    norm=norm(),
    box=linear(D, 2),
    loss="of a dict",
    flags=MIXES,
)
def _(net, x):
    h = net.norm(net.hidden(x))
    return {"class": net.head(h.tanh()), "box": net.box(x), "features": h}


class SettledNorm(nn.BatchNorm1d):
    """Stays in eval mode, as when a network is fine-tuned."""

    def train(self, mode=True):
        return super().train(False)


layers("batch norm kept in eval", FLAT, linear(), lambda: SettledNorm(D).train(), nn.Tanh, HEAD)


@forward("ghost batch norm", (6, D), hidden=linear(), norm=norm(), flags=GROUPS)
def _(net, x):
    h = torch.cat([net.norm(part) for part in net.hidden(x).chunk(2)])
    return net.head(h.tanh())


def by_groups(rows_of):
    """Rows of "ghost batch norm", which no sample can run alone: group by group, each a batch of
    its own.
    """
    model, loss, x, y = next(case for case in CASES if case.name == "ghost batch norm").build()
    parts = {name: lambda part=part: part for name, part in model.named_children()}
    group = Net(lambda net, x: net.head(net.norm(net.hidden(x)).tanh()), parts).train(
        model.training
    )
    p = model(x).detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(loss(p, y), p)
    pulled = [
        rows_of(group, lambda p, v: (p * v).sum(), *pair)
        for pair in zip(x.chunk(2), cotangent.chunk(2), strict=True)
    ]
    return {name: torch.cat([rows[name] for rows in pulled]) for name in pulled[0]}


# ---------------------------------------------------------------- samples that meet: by hand


@forward("centred", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    return net.head((h - h.mean(0)).tanh())


@forward("standardised by mean and std", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    return net.head(((h - h.mean(0)) / (h.std(0) + 1e-3)).tanh())


@forward("standardised by moments", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    mean, square = h.mean(0, keepdim=True), h.square().mean(0, keepdim=True)
    return net.head(((h - mean) * (square - mean.square() + 1e-3).rsqrt()).tanh())


@forward(
    "scale folded into one factor",
    hidden=linear(),
    gain=weight(D),
    shift=weight(D),
    flags=ALWAYS_MIXES,
)
def _(net, x):
    h = net.hidden(x)
    var, mean = torch.var_mean(h, 0, unbiased=False)
    scale = net.gain / torch.sqrt(var + 1e-3)
    return net.head((h * scale + (net.shift - mean * scale)).tanh())


@forward("standardised by sums", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    centred = h - h.sum(0) / N  # a sample on its own has another x.shape[0]
    return net.head(centred / ((centred**2).sum(0) / (N - 1)).sqrt().clamp_min(1e-3))


@forward("images standardised by hand", IMAGE, conv=conv(2, D), gain=weight(D), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.conv(x)
    mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True)
    return net.head(((h - mean) / var.sqrt() * net.gain[:, None, None]).tanh().mean((2, 3)))


@forward(
    "batch norms with activations in place",
    (N, 2, 6, 6),
    loss="ce",
    first=conv(),
    norm=lambda: nn.BatchNorm2d(4),
    second=conv(4, D),
    deep=lambda: nn.BatchNorm2d(D, affine=False),
    flags=MIXES,
)
def _(net, x):
    h = F.relu(net.norm(net.first(x)), inplace=True)
    return net.head(F.leaky_relu_(net.deep(net.second(h)).add_(1), 0.1).mean((2, 3)))


@forward("divided by the largest", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    return net.head(h / h.abs().amax(0))


@forward("divided by one norm of all", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    return net.head(h / h.norm())


@forward(
    "a parameter applied to a statistic", hidden=linear(), context=linear(), flags=ALWAYS_MIXES
)
def _(net, x):
    h = net.hidden(x).tanh()
    return net.head((h + net.context(h.mean(0)).tanh()).tanh())


@forward("a parameter inside a statistic of inputs", context=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    return net.head((x + net.context(x.mean(0, keepdim=True))).tanh())


@forward("covariance", hidden=linear(), flags=ALWAYS_MIXES)
def _(net, x):
    h = net.hidden(x)
    return net.head((h @ (h.t() @ h) / N).tanh())


@forward("class centres by einsum", hidden=linear(), router=linear(D, 2), flags=ALWAYS_MIXES)
def _(net, x):
    share = net.router(x).softmax(1)
    centres = torch.einsum("ng,nd->gd", share, net.hidden(x))
    return net.head((x - share @ centres).tanh())


@forward("soft mixing of experts", slots=weight(D, 2), experts=weight(2, D, D), flags=ALWAYS_MIXES)
def _(net, x):
    scores = x @ net.slots
    slots = scores.softmax(0).t() @ x
    return net.head(scores.softmax(1) @ torch.einsum("gd,gde->ge", slots, net.experts).tanh())


@forward("attention between samples", query=linear(), value=linear(), flags=NO_STATISTIC)
def _(net, x):
    q = net.query(x)
    return net.head((q @ q.t()).softmax(1) @ net.value(x))


@forward("neighbours", hidden=linear(), flags=NO_STATISTIC | {"copies": False})
def _(net, x):
    h = net.hidden(x).tanh()
    return net.head(h + 0.5 * h.roll(1, 0))


@forward(
    "centred, then batch norm", hidden=linear(), norm=norm(), deep=linear(), flags=ALWAYS_MIXES
)
def _(net, x):
    h = net.hidden(x)
    return net.head(net.norm(net.deep((h - h.mean(0)).tanh())).tanh())
