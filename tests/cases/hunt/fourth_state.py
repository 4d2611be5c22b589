"""Models with sizes, noise, state and statistics, by a fourth hunt."""

import contextlib
import dataclasses
import functools
import heapq
import math
import queue
from collections import deque
from contextvars import ContextVar
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from cases.hunt.table import table
from cases.models.table import INDEXED, MIXED, SEQUENCE, SIMD, STATISTICS, linear, norm, weight

D = N = 6
MEAN: ContextVar = ContextVar("mean")
KEPT: dict = {}


# ---------------------------------------------------------------- sizes


def lengths(x):
    """How many tokens of a sentence count, at least one."""
    return (x[:, :, 0] > 0).sum(1).clamp(min=1)


def mask(x):
    return torch.arange(x.shape[1]) < lengths(x)[:, None]


def trimmed(net, x):
    """Cut the padding off that no sentence needs, and average over what is left."""
    longest = int(lengths(x).max())
    return net.linear(x[:, :longest]).mean(1)


def trimmed_and_masked(net, x):
    longest = int(lengths(x).max())
    kept = mask(x)[:, :longest, None]
    return (net.linear(x[:, :longest]) * kept).sum(1) / kept.sum(1)


def packed(net, x):
    sequence = rnn.pack_padded_sequence(x, lengths(x).cpu(), batch_first=True, enforce_sorted=False)
    _, last = net.gru(sequence)
    return last[0]


def packed_and_averaged(net, x):
    sequence = rnn.pack_padded_sequence(x, lengths(x).cpu(), batch_first=True, enforce_sorted=False)
    out, _ = rnn.pad_packed_sequence(net.gru(sequence)[0], batch_first=True)
    return out.mean(1)


def flat_tokens(net, x):
    """Run on the tokens that count alone, and sum them up by sentence."""
    kept = mask(x)
    owner = kept.nonzero()[:, 0]
    return torch.zeros(len(x), x.shape[2]).index_add(0, owner, net.linear(x[kept]))


def flat_tokens_normalised(net, x):
    kept = mask(x)
    h = net.linear(x[kept])
    h = h - h.mean(0)
    return torch.zeros(len(x), x.shape[2]).index_add(0, kept.nonzero()[:, 0], h)


def per_token_share(net, x):
    """Divide by how many tokens count in the whole batch."""
    return (net.linear(x) * mask(x)[..., None]).sum(1) / len(x[mask(x)])


def used_features(net, x):
    """Leave out features that are negative everywhere."""
    used = (x > 0).any(0)
    return net.linear(x)[:, :1] * x[:, used].sum(1, keepdim=True) / used.sum()


def only_hard(net, x):
    """Run a second layer on hard samples alone."""
    h = net.linear(x)
    hard = h[:, 0] > 0
    out = h.clone()
    out[hard] = net.second(h[hard])
    return out


def only_hard_normalised(net, x):
    h = net.linear(x)
    hard = h[:, 0] > 0
    out = h.clone()
    out[hard] = h[hard] - h[hard].sum(0)
    return out


def by_number_of_hard(net, x):
    h = net.linear(x)
    return h / (1 + len(h[h[:, 0] > 0]))


def by_number_of_classes(net, x):
    return net.linear(x) / x.argmax(1).unique().numel()


def until_all_agree(net, x):
    """Iterate as long as any sample moves."""
    for _ in range(4):
        moved = net.linear(x).tanh()
        if (moved - x).abs().max() < 0.5:
            break
        x = moved
    return x


def in_chunks(net, x):
    return torch.cat([net.linear(part) for part in x.split(4)])


def padded_to_multiple(net, x):
    missing = -len(x) % 4
    return net.linear(F.pad(x, (0, 0, 0, missing)))[: len(x)]


def padded_and_normalised(net, x):
    """Normalise with rows of padding among the rows."""
    h = F.pad(net.linear(x), (0, 0, 0, -len(x) % 4))
    return ((h - h.mean(0)) / (1 + h.std(0)))[: len(x)]


def rounded_up(net, x):
    """A capacity for each expert, made of the size of the batch alone."""
    return net.linear(x) / math.ceil(len(x) * 1.25 / 2)


def over_capacity(net, x):
    """Drop the samples of an expert beyond its capacity, in the order of the batch."""
    expert = (x[:, 0] > 0).long()
    place = F.one_hot(expert, 2).cumsum(0).gather(1, expert[:, None]) - 1
    return net.linear(x) * (place < 2)


table(
    SIMD,
    {
        "padding cut, and masked": trimmed_and_masked,
        "tokens packed": packed,
        "tokens that count, summed by sentence": flat_tokens,
    },
    SEQUENCE,
    accept_unknown=True,
    gru=lambda: nn.GRU(SEQUENCE[-1], SEQUENCE[-1], batch_first=True),
)
table(
    STATISTICS,
    {
        "padding cut, and averaged": trimmed,
        "tokens packed, and averaged": packed_and_averaged,
        "tokens that count, centred": flat_tokens_normalised,
        "a share of the tokens that count": per_token_share,
    },
    SEQUENCE,
    accept_unknown=True,
    gru=lambda: nn.GRU(SEQUENCE[-1], SEQUENCE[-1], batch_first=True),
)
table(
    SIMD,
    {
        "in chunks of four": in_chunks,
        "padded to a multiple of four": padded_to_multiple,
        "a capacity of the size of the batch": rounded_up,
    },
)
table(
    SIMD,
    {"a second layer for hard samples": only_hard},
    second=linear(),
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "features that are used": used_features,
        "hard samples by their sum": only_hard_normalised,
        "by the number of hard samples": by_number_of_hard,
        "by the number of classes that are there": by_number_of_classes,
        "until all agree": until_all_agree,
        "normalised with rows of padding": padded_and_normalised,
    },
    accept_unknown=True,
)
table(MIXED, {"samples beyond the capacity of an expert": over_capacity}, accept_unknown=True)


# ---------------------------------------------------------------- noise


def standard_noise(net, x):
    noise = torch.randn(len(x), D)
    return net.linear(x + (noise - noise.mean(0)) / noise.std(0))


def noise_of_own_size(net, x):
    return net.linear(x) + torch.empty_like(x).normal_(0.0, 0.1) * x.norm(dim=1, keepdim=True)


def noise_of_common_size(net, x):
    return net.linear(x) + torch.empty_like(x).normal_(0.0, 1.0) * x.norm()


def uniform_up_to_the_largest(net, x):
    return net.linear(x) + torch.empty_like(x).uniform_(0.0, float(x.max()))


def geometric(net, x):
    return net.linear(x) * torch.empty(len(x), 1).geometric_(0.5)


def cauchy(net, x):
    return net.linear(x) + torch.empty_like(x).cauchy_()


def log_normal(net, x):
    return net.linear(x) * torch.empty_like(x).log_normal_()


def mixed_up(net, x):
    share = torch.rand(len(x), 1)
    return net.linear(share * x + (1 - share) * x[torch.randperm(len(x))])


def mean_in_an_order_drawn(net, x):
    return net.linear(x - x[torch.randperm(len(x))].mean(0))


def by_vmap(net, x):
    one = lambda row: net.linear(row + torch.randn_like(row))  # noqa: E731
    return torch.vmap(one, randomness="different")(x)


def largest_noise(net, x):
    noise = torch.rand(len(x), 1)
    return net.linear(x) * (noise == noise.max())


def rank_of_noise(net, x):
    """Keep the half of the samples with the smaller numbers, as for a fixed share of masks."""
    noise = torch.rand(len(x))
    return net.linear(x) * (noise <= noise.median())[:, None]


def masked_share(net, x):
    """Keep half of the features of each sample, as masked autoencoders do."""
    order = torch.rand(len(x), D).argsort(1)
    kept = order[:, : D // 2]
    return net.linear(torch.zeros_like(x).scatter(1, kept, x.gather(1, kept)))


def dropped_and_centred(net, x):
    h = F.dropout(net.linear(x), 0.5)
    return h - h.mean(0)


def noisy_gates(net, x):
    """Two experts by noisy gates, as in sparse mixtures."""
    gates = net.linear(x) + torch.randn(len(x), D) * F.softplus(net.second(x))
    value, place = gates.topk(2, 1)
    return torch.zeros_like(gates).scatter(1, place, value.softmax(1))


def noise_kept(net, x):
    net.noise = torch.randn(len(x), D)
    return net.linear(x + net.noise)


def noise_kept_in_a_buffer(net, x):
    net.kept.normal_()
    return net.linear(x + net.kept)


table(
    SIMD,
    {
        "noise of the own size": noise_of_own_size,
        "geometric numbers": geometric,
        "Cauchy numbers": cauchy,
        "log-normal numbers": log_normal,
        "noise by vmap, another each": by_vmap,
        "half of the features masked": masked_share,
        "noisy gates": noisy_gates,
        "noise made standard": standard_noise,
        "the sample with the largest number": largest_noise,
        "samples below the median number": rank_of_noise,
        "noise that is kept": noise_kept,
        "noise kept in a buffer of the batch's size": noise_kept_in_a_buffer,
    },
    second=linear(),
    kept=lambda: nn.Buffer(torch.zeros(N, D)),
    accept_unknown=True,
)
table(
    STATISTICS,
    {
        "noise of a common size": noise_of_common_size,
        "uniform numbers up to the largest": uniform_up_to_the_largest,
        "a mean in an order drawn": mean_in_an_order_drawn,
        "dropped, and centred": dropped_and_centred,
    },
    accept_unknown=True,
)
table(MIXED, {"mixed up with others": mixed_up}, accept_unknown=True)


# ---------------------------------------------------------------- state


def act_norm(net, x):
    """Normalise by the first batch."""
    if not net.ready:
        net.shift.data.copy_(x.mean(0))
        net.ready.fill_(True)
    return net.linear(x - net.shift)


def in_data(net, x):
    net.shift.data = x.mean(0)
    return net.linear(x - net.shift)


def in_bias(net, x):
    with torch.no_grad():
        net.linear.bias.copy_(x.mean(0))
    return net.linear(x)


def registered(net, x):
    net.register_buffer("late", x.mean(0))
    return net.linear(x - net.late)


def loaded(net, x):
    net.linear.load_state_dict({"weight": net.linear.weight, "bias": x.mean(0)})
    return net.linear(x)


def in_vector(net, x):
    vector_to_parameters(x.mean(0), [net.shift])
    return net.linear(x - net.shift)


def initialised(net, x):
    nn.init.constant_(net.shift, x.mean().item())
    return net.linear(x - net.shift)


def calibrated(net, x):
    """Set running statistics to those of the batch, and use them."""
    net.norm.running_mean = x.mean(0)
    return net.norm.eval()(net.linear(x))


def adapted(net, x):
    """Blend running statistics with those of the batch, as when a model is adapted in tests."""
    net.norm.running_mean.lerp_(x.mean(0), 0.1)
    return net.norm.eval()(net.linear(x))


def centre_before(net, x):
    """Subtract a centre, and move it afterwards."""
    out = net.linear(x) - net.centre
    net.centre.lerp_(out.detach().mean(0), 0.1)
    return out


def centre_after(net, x):
    out = net.linear(x)
    net.centre.lerp_(out.detach().mean(0), 0.1)
    return out - net.centre


def in_deque(net, x):
    net.means.append(x.mean(0))
    return net.linear(x - torch.stack(list(net.means)).mean(0))


def in_queue(net, x):
    net.queue.put(x.mean(0))
    return net.linear(x - net.queue.get())


def in_heap(net, x):
    heap: list = []
    heapq.heappush(heap, (0, x.mean(0)))
    return net.linear(x - heapq.heappop(heap)[1])


def in_context(net, x):
    token = MEAN.set(x.mean(0))
    out = net.linear(x - MEAN.get())
    MEAN.reset(token)
    return out


def in_global(net, x):
    KEPT["mean"] = x.mean(0)
    return net.linear(x - KEPT["mean"])


def in_default(net, x, memo={}):  # noqa: B006
    memo.setdefault("mean", x.mean(0))
    return net.linear(x - memo["mean"])


class Told(Exception):
    pass


def in_exception(net, x):
    try:
        raise Told(x.mean(0))
    except Told as told:
        return net.linear(x - told.args[0])


def on_tensor(net, x):
    h = net.linear(x)
    h.mean_of_batch = x.mean(0)
    return h - h.mean_of_batch


def in_hook(net, x):
    """Centre by what a hook has seen."""
    seen = {}
    handle = net.linear.register_forward_hook(lambda m, i, o: seen.update(mean=o.mean(0)))
    out = net.linear(x)
    handle.remove()
    return out - seen["mean"]


def hook_changes(net, x):
    handle = net.linear.register_forward_hook(lambda m, i, o: o - o.mean(0))
    out = net.linear(x)
    handle.remove()
    return out


@dataclasses.dataclass
class State:
    mean: torch.Tensor
    step: int = 0


def in_state(net, x):
    state = State(x.mean(0))
    state = dataclasses.replace(state, step=state.step + 1)
    return net.linear(x - state.mean)


@functools.lru_cache(maxsize=8)
def mean_of(x):
    return x.mean(0)


def in_cache(net, x):
    return net.linear(x - mean_of(x))


def by_generator(net, x):
    def running():
        total = 0
        while True:
            row = yield total
            total = total + row

    means = running()
    next(means)
    for row in x:
        total = means.send(row)
    return net.linear(x - total / len(x))


def in_stack(net, x):
    means = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: means.append(x.mean(0)))
    return net.linear(x - means[0])


def by_partial(net, x):
    centre = functools.partial(torch.sub, other=x.mean(0))
    return net.linear(centre(x))


class Centre(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)


def checkpointed(net, x):
    return net.linear(checkpoint(lambda h: h - h.mean(0), x, use_reentrant=False))


def called_with_statistics(net, x):
    parameters = {"weight": net.linear.weight, "bias": x.mean(0)}
    return torch.func.functional_call(net.linear, parameters, (x,))


def bank_by_own_place(net, x):
    """Write features to a bank, and read them again."""
    place = torch.arange(len(x))
    net.bank[place] = x
    return net.linear(net.bank[place])


def bank_of_neighbours(net, x):
    net.bank[: len(x)] = x
    return net.linear(net.bank[torch.cdist(x, net.bank).argsort(1)[:, 1]])


def counts_samples(net, x):
    net.count += len(x)
    return net.linear(x) / net.count


def counts_positives(net, x):
    net.count += (x > 0).sum()
    return net.linear(x) / net.count


def counts_positives_later(net, x):
    out = net.linear(x) / (1 + net.count)
    net.count += (x > 0).sum()
    return out


STATE = {
    "shift": weight(D),
    "ready": lambda: nn.Buffer(torch.tensor(False)),
    "norm": norm(),
    "centre": lambda: nn.Buffer(torch.zeros(D)),
    "means": lambda: deque(maxlen=4),
    "queue": queue.Queue,
    "bank": lambda: nn.Buffer(torch.randn(2 * N, D)),
    "count": lambda: nn.Buffer(torch.zeros(())),
    "space": SimpleNamespace,
}

table(
    SIMD,
    {
        "a centre that moves afterwards": centre_before,
        "samples counted in a buffer": counts_samples,
        "positives counted for the next time": counts_positives_later,
    },
    **STATE,
)
table(
    SIMD,
    {"a bank, by the own place": bank_by_own_place},
    accept_unknown=True,
    **STATE,
)
table(
    STATISTICS,
    {
        "a mean of the first batch, by a flag": act_norm,
        "a mean in the data of a parameter": in_data,
        "a mean in a bias": in_bias,
        "a mean in a buffer registered": registered,
        "a mean loaded as a bias": loaded,
        "a mean in a parameter, as a vector": in_vector,
        "a mean that initialises": initialised,
        "a mean as running mean": calibrated,
        "a mean blended into the running mean": adapted,
        "a centre that moves before": centre_after,
        "a mean in a deque": in_deque,
        "a mean in a queue": in_queue,
        "a mean in a heap": in_heap,
        "a mean in a variable of a context": in_context,
        "a mean in a global": in_global,
        "a mean in a default": in_default,
        "a mean in an exception": in_exception,
        "a mean on a tensor": on_tensor,
        "a mean that a hook has seen": in_hook,
        "a mean that a hook subtracts": hook_changes,
        "a mean in a state": in_state,
        "a mean in a cache": in_cache,
        "a mean by a generator": by_generator,
        "a mean in a stack of contexts": in_stack,
        "a mean in a partial": by_partial,
        "a mean in a function of one's own": lambda n, x: n.linear(Centre.apply(x)),
        "a mean in a checkpoint": checkpointed,
        "a mean as a bias of a call": called_with_statistics,
        "positives counted in a buffer": counts_positives,
    },
    accept_unknown=True,
    **STATE,
)
table(MIXED, {"a neighbour in a bank": bank_of_neighbours}, accept_unknown=True, **STATE)


# ---------------------------------------------------------------- statistics


def by_own_class(net, x):
    """Subtract the mean of the own class."""
    owner = F.one_hot((x[:, 0] > 0).long(), 2).to(x.dtype)
    means = owner.T @ x / owner.sum(0)[:, None].clamp(min=1)
    return net.linear(x - owner @ means)


def balanced(net, x):
    """Weigh samples by how rare their class is."""
    label = (x[:, 0] > 0).long()
    return net.linear(x) / torch.bincount(label, minlength=2)[label][:, None]


def others_alone(net, x):
    return net.linear(x - (x.sum(0) - x) / (len(x) - 1))


def jackknife(net, x):
    others = [torch.cat([x[:i], x[i + 1 :]]).mean(0) for i in range(len(x))]
    return net.linear(x - torch.stack(others))


def cross_correlation(net, x):
    a = (x - x.mean(0)) / x.std(0)
    b = net.linear(x)
    return a @ (a.T @ b / len(x))


def random_features(net, x):
    phi = torch.cos(net.linear(x))
    return phi * phi.mean(0)


def kernel_to_others(net, x):
    return net.linear(x) * (-torch.cdist(x, x)).exp().mean(1, keepdim=True)


def kernel_of_pairs(net, x):
    return net.linear(x) * torch.pdist(x).exp().neg().exp().mean()


def first_frequency(net, x):
    return net.linear(x) - torch.fft.rfft(x, dim=0)[0].real


def there_and_back(net, x):
    return net.linear(x.roll(1, 0)).roll(-1, 0)


def all_at_once(net, x):
    """Sums and sums of squares in one vector, as they are sent between processes."""
    sent = torch.cat([x.sum(0), x.square().sum(0), torch.tensor([float(len(x))])])
    total, squares, count = sent.split([D, D, 1])
    mean = total / count
    return net.linear((x - mean) / (squares / count - mean.square() + 1e-3).sqrt())


def by_matrix(net, x):
    return net.linear(x - torch.full((len(x), len(x)), 1 / len(x)) @ x)


def by_einsum(net, x):
    return net.linear(x - torch.einsum("nd,n->d", x, torch.ones(len(x))) / len(x))


def by_vmapped_features(net, x):
    return net.linear(torch.vmap(lambda column: column - column.mean(), 1, 1)(x))


def on_average_of_pairs(net, x):
    return net.linear((x + x.flip(0)) / 2 - x)


def trapezoid(net, x):
    return net.linear(x) - torch.trapezoid(x, dim=0)


def differences(net, x):
    return net.linear(x) - x.diff(dim=0).sum(0)


def sums_of_differences(net, x):
    return net.linear(x) - x.diff(dim=0).abs().sum(0)


table(
    STATISTICS,
    {
        "centred by the own class": by_own_class,
        "weighed by how rare a class is": balanced,
        "the mean of the others": others_alone,
        "means without one each": jackknife,
        "a correlation of two views": cross_correlation,
        "a mean of random features": random_features,
        "a mean kernel of pairs": kernel_of_pairs,
        "the first frequency of the batch": first_frequency,
        "sums sent at once": all_at_once,
        "a mean by a matrix of constants": by_matrix,
        "a mean by einsum": by_einsum,
        "a mean by vmap over features": by_vmapped_features,
        "columns renormed": lambda n, x: n.linear(x.renorm(2, 1, 1.0)),
        "normalised along samples": lambda n, x: n.linear(F.normalize(x, dim=0)),
        "the largest by a cumulative one": lambda n, x: n.linear(x) - x.cummax(0).values[-1],
        "the sum of sorted ones": lambda n, x: n.linear(x) - x.sort(0).values.sum(0),
        "a mean of rolled samples": lambda n, x: n.linear(x) - x.roll(1, 0).mean(0),
        "a softmax over samples": lambda n, x: n.linear(x) * x.softmax(0),
        "an angle to the mean": lambda n, x: (
            n.linear(x) * F.cosine_similarity(x, x.mean(0))[:, None]
        ),
        "correlations of features": lambda n, x: n.linear(x) @ torch.corrcoef(x.T),
        "a histogram": lambda n, x: n.linear(x) * torch.histc(x.detach(), 6, -3, 3),
        "smallest and largest": lambda n, x: n.linear((x - x.aminmax().min) / x.max()),
        "a norm of columns": lambda n, x: n.linear(x) / torch.linalg.vector_norm(x, dim=0),
        "layer norm along samples": lambda n, x: n.linear(F.layer_norm(x.T, (N,)).T),
    },
    accept_unknown=True,
)
table(SIMD, {"rolled there and back": there_and_back})
table(
    MIXED,
    {
        "a mean kernel to others": kernel_to_others,
        "the average with the one across": on_average_of_pairs,
        "an integral along samples": trapezoid,
        "the first and the last": differences,
        "variation along samples": sums_of_differences,
    },
    accept_unknown=True,
)
table(
    INDEXED,
    {
        "a time by the place": lambda n, x: n.linear(x) + torch.linspace(0, 1, len(x))[:, None],
        "every second sample doubled": lambda n, x: (
            n.linear(x) * (1 + torch.arange(len(x)) % 2)[:, None]
        ),
    },
)
