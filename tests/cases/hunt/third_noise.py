"""Models that draw random numbers: what is drawn for a sample counts as part of the sample."""

import random

import numpy as np
import torch
from torch import distributions, nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import (
    FLAT,
    INDEXED,
    MIXED,
    ODD,
    SEQUENCE,
    SIMD,
    STATISTICS,
    integers,
    linear,
    weight,
)

D = N = 6
CUBE = (N, N, D)


# ---------------------------------------------------------------- whole numbers drawn per sample


def diffusion(net, x):
    """A time for each sample, looked up in a schedule, and noise of that size."""
    t = torch.randint(0, 10, (N,))
    keep = torch.linspace(1, 0.1, 10)[t][:, None]
    return net.linear(keep.sqrt() * x + (1 - keep).sqrt() * torch.randn_like(x))


def diffusion_with_embedded_time(net, x):
    return net.linear(x + F.embedding(torch.randint(0, D, (N,)), net.table))


def diffusion_with_scaled_time(net, x):
    t = torch.randint(0, 1000, (N, 1))
    return net.linear(x) * (t / 1000).cos()


def sampled_action(net, x):
    logits = net.linear(x)
    action = torch.multinomial(logits.softmax(1), 1)[:, 0]
    return logits + net.table[action]


def sampled_code(net, x):
    code = distributions.Categorical(logits=net.linear(x)).sample()
    return F.embedding(code, net.table)


def next_word_drawn(net, x):
    h = x
    for _ in range(2):
        word = net.linear(h).softmax(1).multinomial(1)
        h = h + net.table[word[:, 0]]
    return h


def several_draws(net, x):
    return net.linear(x) + net.linear(x).softmax(1).multinomial(2).float().mean(1, keepdim=True)


def words_replaced(net, words):
    drawn = torch.randint(0, 9, (N, 4))
    return net.words(torch.where(torch.rand(N, 4) < 0.5, drawn, words)).mean(1)


def span_masked(net, x):
    start = torch.randint(0, D, (N, 1))
    place = torch.arange(D)
    return net.linear(x * ((place < start) | (place > start + 1)))


def flipped_by_a_coin(net, x):
    coin = torch.randint(0, 2, (N, 1)).bool()
    return net.linear(torch.where(coin, x.flip(1), x))


def coins_as_booleans(net, x):
    return net.linear(x) * torch.empty(N, D, dtype=torch.bool).bernoulli_(0.5)


def negatives(net, x):
    other = net.table[torch.randint(0, D, (N, 3))]
    return (net.linear(x)[:, None] * other).sum(2)


def one_token_each(net, x):
    return net.linear(x[torch.arange(N), torch.randint(0, 4, (N,))])


def one_token_each_by_gather(net, x):
    place = torch.randint(0, 4, (N, 1, 1)).expand(N, 1, D)
    return net.linear(x.gather(1, place)[:, 0])


def feature_dropped(net, x):
    return net.linear(x).scatter(1, torch.randint(0, D, (N, 1)), 0.0)


def tokens_kept(net, x):
    """Two tokens each, the others are left out (masked autoencoder)."""
    order = torch.rand(N, 4).argsort(1)[:, :2, None]
    return net.linear(x.gather(1, order.expand(N, 2, D)).mean(1))


def tokens_shuffled(net, x):
    order = torch.rand(N, 4).argsort(1)[:, :, None].expand(N, 4, D)
    return net.linear(x.gather(1, order).cumsum(1)[:, 1])


table(
    SIMD,
    {
        "diffusion at a time drawn": diffusion,
        "diffusion with an embedded time": diffusion_with_embedded_time,
        "diffusion with a time that scales": diffusion_with_scaled_time,
        "an action drawn": sampled_action,
        "a code drawn by a law": sampled_code,
        "words drawn one after the other": next_word_drawn,
        "several draws without replacement": several_draws,
        "a span masked": span_masked,
        "flipped by a coin each": flipped_by_a_coin,
        "coins as booleans": coins_as_booleans,
        "negatives drawn": negatives,
        "a feature dropped by its index": feature_dropped,
        "random signs": lambda n, x: n.linear(x) * (2 * torch.randint(0, 2, (N, 1)) - 1),
        "random whole factors": lambda n, x: (
            n.linear(x) * torch.empty(N, 1, dtype=torch.int64).random_(0, 5)
        ),
        "a class drawn, one-hot": lambda n, x: (
            n.linear(x) * F.one_hot(torch.randint(0, D, (N,)), D)
        ),
        "places drawn by fixed weights": lambda n, x: (
            n.linear(x) * torch.multinomial(torch.ones(5), N, True)[:, None]
        ),
        "counts drawn as floats": lambda n, x: n.linear(x) * torch.empty(N, 1).geometric_(0.4),
        "counts of own rates": lambda n, x: n.linear(x) + torch.poisson(x.exp()),
    },
    accept_unknown=True,
    table=weight(D, D),
)
table(
    SIMD,
    {"words replaced by drawn ones": words_replaced},
    integers(9, N, 4),
    linear=lambda: None,
    words=lambda: nn.Embedding(9, 3),
    accept_unknown=True,
)
table(
    SIMD,
    {
        "one token each, drawn": one_token_each,
        "one token each, gathered": one_token_each_by_gather,
        "tokens kept by chance": tokens_kept,
        "tokens shuffled by chance": tokens_shuffled,
    },
    SEQUENCE,
    accept_unknown=True,
)


# ---------------------------------------------------------------- noise of no sample, or moved


def bayesian(net, x):
    return F.linear(x, net.linear.weight + 0.3 * torch.randn_like(net.linear.weight))


def bayesian_average(net, x):
    return torch.stack([bayesian(net, x) for _ in range(3)]).mean(0)


def embeddings_dropped(net, i):
    return F.embedding(i, F.dropout(net.table, 0.3))


def noisy_kernel(net, x):
    return F.conv1d(x, net.kernel + 0.3 * torch.randn(D, D, 1))


table(
    SIMD,
    {
        "weights drawn": bayesian,
        "weights drawn thrice": bayesian_average,
        "weights dropped": lambda n, x: F.linear(x, F.dropout(n.linear.weight, 0.3)),
        "a projection drawn": lambda n, x: n.linear(x) @ torch.randn(D, D),
        "noise flipped": lambda n, x: n.linear(x) + torch.randn(N, D).flip(0),
        "noise rolled": lambda n, x: n.linear(x) + torch.randn(N, D).roll(1, 0),
        "noise transposed": lambda n, x: n.linear(x) + torch.randn(D, N).T,
        "noise of a covariance": lambda n, x: n.linear(x) + torch.randn(N, D) @ n.linear.weight,
        "biases drawn": lambda n, x: F.linear(x, n.linear.weight, torch.randn(D)),
        "one draw for all": lambda n, x: n.linear(x) * torch.rand(()),
        "features drawn for all": lambda n, x: n.linear(x)[:, torch.randperm(D)],
        "noise before and between layers": lambda n, x: n.linear(
            n.linear(x + torch.randn(N, D)) + torch.randn(N, D)
        ),
    },
    accept_unknown=True,
)
table(
    SIMD,
    {"weights drawn, five samples": lambda n, x: F.linear(x, n.linear.weight + torch.randn(8, 8))},
    ODD,
)
table(
    SIMD,
    {"a table dropped": embeddings_dropped},
    integers(D, N),
    table=weight(D, D),
    linear=lambda: None,
    accept_unknown=True,
)
table(
    SIMD,
    {
        "a kernel drawn": noisy_kernel,
        "noise by time and sample": lambda n, x: n.linear(x) + torch.randn(N, N, D).transpose(0, 1),
    },
    CUBE,
    kernel=weight(D, D, 1),
    accept_unknown=True,
)


# ---------------------------------------------------------------- noise that is written


def into_a_buffer(net, x):
    net.noise.normal_(0, 0.3)
    return net.linear(x) + net.noise


def into_the_data_of_a_buffer(net, x):
    net.noise.data.normal_(0, 0.3)
    return net.linear(x) + net.noise


def into_a_part_of_a_buffer(net, x):
    net.longer[: len(x)].normal_(0, 0.3)
    return net.linear(x) + net.longer[: len(x)]


def into_every_second_column(net, x):
    e = torch.zeros(N, D)
    e[:, ::2].normal_()
    return net.linear(x) + e


def in_place_of_two_columns(net, x):
    h = net.linear(x).clone()
    h[:, :2].normal_()
    return h


def added_to_two_columns(net, x):
    h = net.linear(x).clone()
    h[:, :2] += torch.randn(N, 2)
    return h


def row_by_row(net, x):
    e = torch.empty(N, D)
    for row in e:
        row.normal_()
    return net.linear(x) + e


def into_out(net, x):
    e = torch.empty(N, D)
    torch.randn(N, D, out=e)
    return net.linear(x) + e


def kept(*shape):
    return lambda: nn.Parameter(torch.zeros(shape), requires_grad=False)


def reflected(net, x):
    """A reflection at a plane that is drawn for the whole batch."""
    v = F.normalize(torch.randn(D), dim=0)
    return net.linear(x) - 2 * (x @ v)[:, None] * v


table(
    SIMD,
    {
        "noise into a buffer": into_a_buffer,
        "noise into the data of a buffer": into_the_data_of_a_buffer,
        "noise into a part of a buffer": into_a_part_of_a_buffer,
        "noise into every second column": into_every_second_column,
        "noise in place of two columns": in_place_of_two_columns,
        "noise added to two columns": added_to_two_columns,
        "noise row by row into a buffer": row_by_row,
        "noise into out": into_out,
        "a reflection drawn": reflected,
        "features of Fourier, drawn": lambda n, x: (n.linear(x) @ torch.randn(D, 5)).cos(),
        "an orthogonal matrix drawn": lambda n, x: (
            n.linear(x) @ torch.linalg.qr(torch.randn(D, D))[0]
        ),
        "rows and their whole factors": lambda n, x: torch.stack(
            [n.linear(row) * torch.randint(0, 5, (1,)) for row in x]
        ),
        "noise of a generator of its own": lambda n, x: (
            n.linear(x) + torch.randn(N, D, generator=n.generator)
        ),
        "noise by vmap": lambda n, x: torch.func.vmap(
            lambda row: n.linear(row) + torch.randn(D), randomness="different"
        )(x),
        "noise of several draws averaged": lambda n, x: (
            (n.linear(x)[None] + torch.randn(N, N, D)).relu().mean(0)
        ),
        "noise in the flat batch": lambda n, x: (n.linear(x).flatten() + torch.randn(N * D)).view(
            N, D
        ),
    },
    accept_unknown=True,
    noise=kept(N, D),
    longer=kept(N + 2, D),
    generator=lambda: torch.Generator().manual_seed(0),
)


# ---------------------------------------------------------------- laws


def by_law(law):
    return lambda net, x: law(net.linear(x), x).rsample()


table(
    SIMD,
    {
        "a normal with own covariance": by_law(
            lambda h, x: distributions.LowRankMultivariateNormal(h, x[:, :, None], h.exp())
        ),
        "a Beta number": by_law(lambda h, x: distributions.Beta(h.exp(), x.exp())),
        "a point of a simplex": by_law(lambda h, x: distributions.Dirichlet(h.exp())),
        "a Student number": by_law(lambda h, x: distributions.StudentT(3.0, h, 1.0)),
        "a Laplace number": by_law(lambda h, x: distributions.Laplace(h, x.exp())),
        "a relaxed coin": by_law(lambda h, x: distributions.RelaxedBernoulli(0.5, logits=h)),
        "a relaxed class": by_law(
            lambda h, x: distributions.RelaxedOneHotCategorical(0.5, logits=h)
        ),
        "a Kumaraswamy number": by_law(lambda h, x: distributions.Kumaraswamy(h.exp(), x.exp())),
        "a Gumbel number": by_law(lambda h, x: distributions.Gumbel(h, 1.0)),
        "a hard class by Gumbel": lambda n, x: F.gumbel_softmax(n.linear(x), hard=True) @ n.table,
        "the three largest by Gumbel": lambda n, x: x.gather(
            1, (n.linear(x) - torch.rand(N, D).log()).topk(3, 1)[1]
        ),
        "paths left out by chance": lambda n, x: (
            x + n.linear(x) * x.new_empty(N, 1).bernoulli_(0.7).div_(0.7)
        ),
        "own features blended": lambda n, x: torch.lerp(x, n.linear(x), torch.rand(N, 1)),
        "kept from before by chance": lambda n, x: torch.where(
            torch.rand_like(x) < 0.3, x, n.linear(x)
        ),
        "a window cut out": lambda n, x: (
            n.linear(x) * ((torch.arange(D) - torch.rand(N, 1) * D).abs() > 1.5)
        ),
        "rounded by chance": lambda n, x: (n.linear(x) + torch.rand(N, D)).floor(),
        "a step of Langevin": lambda n, x: x - n.linear(x).tanh() + 0.1 * torch.randn_like(x),
        "a coin of Python for all": lambda n, x: n.linear(
            x if random.random() < 0.5 else x.flip(1)
        ),
    },
    accept_unknown=True,
    table=weight(D, D),
)


# ---------------------------------------------------------------- noise that joins samples


def noise_drawn_once_or_twice(net, x):
    """The first half adds the noise that it is multiplied by, the others draw anew."""
    e = torch.randn(N, D)
    added = torch.cat([e[:3], torch.randn(3, D)])
    return net.linear(x) * e + added


table(INDEXED, {"noise drawn once, or twice": noise_drawn_once_or_twice}, accept_unknown=True)
table(
    MIXED,
    {
        "another sample by a number drawn": lambda n, x: n.linear(x) + x[torch.randint(0, N, (N,))],
        "another sample by an order drawn": lambda n, x: n.linear(x) + x[torch.rand(N).argsort()],
        "another sample by numpy": lambda n, x: n.linear(
            0.7 * x + 0.3 * x[np.random.permutation(N)]
        ),
        "another sample by Python": lambda n, x: n.linear(x) + x[random.sample(range(N), N)],
    },
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "noise as large as the batch is wide": lambda n, x: (
            n.linear(x) + torch.normal(0.0, x.std().item(), (N, D))
        ),
        "a mean weighted by chance": lambda n, x: n.linear(x) - (torch.rand(N, 1) * x).mean(0),
        "a mean of those kept by chance": lambda n, x: n.linear(x) - F.dropout(x, 0.3).mean(0),
        "classes drawn from the mean": lambda n, x: (
            n.linear(x) * torch.multinomial(x.mean(0).softmax(0), 1)
        ),
        "a range drawn from": lambda n, x: (
            n.linear(x) * torch.empty(1).uniform_(0, x.amax().item())
        ),
    },
    accept_unknown=True,
)
table(
    SIMD,
    {"two layers of a recurrence with dropout": lambda n, x: n.rnn(x)[0]},
    CUBE,
    rnn=lambda: nn.LSTM(D, D, 2, dropout=0.3, batch_first=True),
    accept_unknown=True,
)
table(
    SIMD,
    {"a decoder with dropout": lambda n, x, z: n.layer(x, z)[:, 0]},
    SEQUENCE,
    (N, 3, D),
    layer=lambda: nn.TransformerDecoderLayer(D, 2, 8, batch_first=True),
    accept_unknown=True,
)
table(
    SIMD,
    {"noise as an input": lambda n, x, e: n.linear(x) * e},
    FLAT,
    FLAT,
    linear=linear(),
)
