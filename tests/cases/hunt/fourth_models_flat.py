"""Models of vectors, as research code has them: flows, kernels, tables, pairs of views, habits."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import distributions, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cases.hunt.table import table
from cases.models.table import (
    FLAT,
    GROUPS,
    INDEXED,
    MIXED,
    SEQUENCE,
    SIMD,
    STATISTICS,
    linear,
    norm,
    weight,
)

D = N = 6


# ---------------------------------------------------------------- flows and differential equations


def rational_spline(net, x):
    """Each feature goes through the bin that it falls into (neural spline flow)."""
    widths = net.bins(x).view(N, D, 4).softmax(2).cumsum(2)
    edges = F.pad(widths, (1, 0)) * 6 - 3
    inside = x.clamp(-2.9, 2.9)
    place = (torch.searchsorted(edges, inside[..., None]) - 1).clamp(0, 3)
    left, right = edges.gather(2, place), edges.gather(2, place + 1)
    share = (inside[..., None] - left) / (right - left + 1e-6)
    return torch.where(x.abs() < 2.9, (share * (2 - share))[..., 0], x)


def autoregressive(net, x):
    """Masked weights: feature i sees those before it (MADE)."""
    hidden = F.linear(x, net.linear.weight.tril(-1)).relu()
    shift, scale = F.linear(hidden, net.both * torch.ones(2 * D, D).tril()).chunk(2, 1)
    return (x - shift) * (-scale).exp(), -scale.sum(1)


def autoregressive_inverse(net, x):
    y = torch.zeros_like(x)
    for i in range(D):
        shift = F.linear(y, net.linear.weight.tril(-1))[:, i]
        y = torch.cat([y[:, :i], (x[:, i] + shift)[:, None], y[:, i + 1 :]], 1)
    return y


def trace_by_probes(net, x):
    """The divergence of a field by one random probe (FFJORD)."""
    x = x.detach().requires_grad_()
    y = net.linear(x).tanh()
    e = torch.randn_like(x)
    (back,) = torch.autograd.grad(y, x, e, create_graph=True)
    return torch.cat([y, (back * e).sum(1, keepdim=True)], 1)


def exact_trace(net, x):
    def divergence(row):
        return torch.func.jacrev(lambda r: net.linear(r).tanh())(row).trace()

    return torch.vmap(divergence)(x)


def own_steps(net, x):
    """Each sample goes on with steps of its own size until its own time is over."""
    time, h = torch.zeros(N, 1), x
    while bool((time < 1).any()):
        slope = net.linear(h).tanh()
        step = torch.minimum(1 / (2 + slope.norm(dim=1, keepdim=True)), 1 - time)
        h, time = h + step * slope, time + step
    return h


def anderson(net, x):
    """A fixed point of each sample, by the last two iterates."""
    before, now = torch.zeros_like(x), net.linear(x).tanh()
    for _ in range(3):
        f, g = net.inner(before).tanh() + x - before, net.inner(now).tanh() + x - now
        a = (f * (f - g)).sum(1) / (f - g).square().sum(1).clamp(min=1e-6)
        before, now = now, (1 - a)[:, None] * (before + f) + a[:, None] * (now + g)
    return now


def lagrangian(net, x):
    """Accelerations by the second derivatives of an energy."""

    def energy(q, v):
        return (v.square().sum() / 2) + net.inner(torch.cat([q, v])).tanh().sum()

    def acceleration(row):
        q, v = row[:3], row[3:]
        mass = torch.func.hessian(energy, 1)(q, v) + 3 * torch.eye(3)
        force = torch.func.grad(energy, 0)(q, v)
        cross = torch.func.jacrev(torch.func.grad(energy, 1), 0)(q, v)
        return torch.linalg.solve(mass, force - cross @ v)

    return torch.vmap(acceleration)(x)


def residual_of_an_equation(net, x):
    """What a network leaves of a differential equation at each point (PINN)."""
    x = x.detach().requires_grad_()
    u = net.linear(x).sin().sum(1)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
    return (du[:, 1] - ddu[:, 0] + u)[:, None]


def operator_network(net, x):
    """Branches of each function, and a trunk of places that all share (DeepONet)."""
    places = torch.linspace(0, 1, 5)[:, None]
    return net.linear(x) @ net.trunk(places).T


def annealed_langevin(net, x):
    h = x
    for size in (1.0, 0.5):
        h = h + size * net.linear(h).tanh() + math.sqrt(2 * size) * torch.randn_like(h)
    return h


def denoising_steps(net, x):
    """Three reverse steps of a diffusion, with times that all samples share."""
    h = x
    alphas = torch.linspace(0.9, 0.99, 3)
    for t in reversed(range(3)):
        noise = net.linear(h + net.times.weight[t])
        h = (h - (1 - alphas[t]) * noise) / alphas[t].sqrt()
        if t:
            h = h + (1 - alphas[t]).sqrt() * torch.randn_like(h)
    return h


FLOWS = {
    "bins": linear(D, 4 * D),
    "both": weight(2 * D, D),
    "inner": linear(),
    "trunk": linear(1, D),
    "times": lambda: nn.Embedding(3, D),
}
table(
    SIMD,
    {
        "a spline of each feature": rational_spline,
        "masked autoregressive flow": autoregressive,
        "inverse autoregressive flow": autoregressive_inverse,
        "a trace by a random probe": trace_by_probes,
        "an exact trace by vmap": exact_trace,
        "steps of each sample's own size": own_steps,
        "fixed points by Anderson's iteration": anderson,
        "accelerations of a Lagrangian": lagrangian,
        "what is left of an equation": residual_of_an_equation,
        "branch and trunk": operator_network,
        "Langevin steps": annealed_langevin,
        "reverse steps of a diffusion": denoising_steps,
    },
    accept_unknown=True,
    **FLOWS,
)


# ---------------------------------------------------------------- kernels, tables, experts


def inducing_process(net, x):
    """Mean and variance of a sparse Gaussian process at each input."""
    kernel = lambda a, b: (-torch.cdist(a, b).square() / 2).exp()  # noqa: E731
    factor = torch.linalg.cholesky(kernel(net.table, net.table) + 0.1 * torch.eye(5))
    a = torch.linalg.solve_triangular(factor, kernel(net.table, x), upper=False)
    return torch.cat([a.T @ net.values, 1 - a.square().sum(0)[:, None]], 1)


def joint_process(net, x):
    """A joint sample of a Gaussian process at all inputs of the batch."""
    kernel = (-torch.cdist(x, x).square() / 2).exp() + 0.1 * torch.eye(N)
    return torch.linalg.cholesky(kernel) @ torch.randn(N, 2) + net.linear(x)[:, :2]


def nearest_in_a_store(net, x):
    distance = torch.cdist(net.linear(x), net.table)
    best = distance.topk(2, 1, largest=False)
    share = (-best.values).softmax(1)
    return (share[:, :, None] * net.values[best.indices]).sum(1)


def nearest_in_the_batch(net, x):
    distance = torch.cdist(x, x) + 1e6 * torch.eye(N)
    return net.linear(x[distance.topk(2, 1, largest=False).indices].mean(1))


def means_of_classes(net, x, labels):
    """Distances to the means of the classes that the batch has (prototypes)."""
    h, one_hot = net.linear(x), F.one_hot(labels, 3).to(x.dtype)
    means = one_hot.T @ h / one_hot.sum(0)[:, None].clamp(min=1)
    return -torch.cdist(h, means)


def means_of_classes_in_a_loop(net, x, labels):
    h = net.linear(x)
    means = torch.stack([h[labels == c].sum(0) / (1 + (labels == c).sum()) for c in range(3)])
    return -torch.cdist(h, means)


def residual_codes(net, x):
    left, out = net.linear(x), 0
    for codes in (net.table, net.table * 0.5):
        nearest = codes[torch.cdist(left, codes).argmin(1)]
        out, left = out + nearest, left - nearest
    return out


def signs_as_codes(net, x):
    """Codes without a lookup: the signs of features, and their number (LFQ)."""
    h = net.linear(x)
    code = ((h > 0).long() * 2 ** torch.arange(D)).sum(1)
    return torch.where(h > 0, 1.0, -1.0) + net.large(code)


def hashed_grid(net, x):
    """Features of the corners of a cell, looked up by a hash (instant NGP)."""
    place = x[:, :2] * 4
    corner = place.floor()
    out = 0
    for offset in ((0, 0), (0, 1), (1, 0), (1, 1)):
        c = corner + torch.tensor(offset)
        share = (1 - (place - c).abs()).clamp(min=0).prod(1, keepdim=True)
        index = (c[:, 0].long() ^ (c[:, 1].long() * 2654435761)) % 64
        out = out + share * net.large(index)
    return out


def experts_with_a_capacity(net, x):
    """The first two samples that want an expert get it (Switch)."""
    choice = net.router(x).argmax(1)
    one_hot = F.one_hot(choice, 3)
    place = (one_hot.cumsum(0) * one_hot).sum(1)
    kept = (place <= 2).to(x.dtype)[:, None]
    return kept * torch.stack([e(x) for e in net.experts], 1)[torch.arange(N), choice]


def experts_that_choose(net, x):
    """Each expert takes the two samples that score best."""
    scores = net.router(x).softmax(1)
    out = torch.zeros(N, D)
    for e, expert in enumerate(net.experts):
        weights, index = scores[:, e].topk(2)
        out = out.index_add(0, index, weights[:, None] * expert(x[index]))
    return out


def slots_over_the_batch(net, x):
    scores = net.router(x)
    slots = scores.softmax(0).T @ x
    mixed = torch.stack([e(s) for e, s in zip(net.experts, slots, strict=True)])
    return scores.softmax(1) @ mixed


def experts_without_routing(net, x):
    gate = net.router(x).softmax(1)
    return torch.einsum("ne,end->nd", gate, torch.stack([e(x) for e in net.experts]))


def experts_by_mask(net, x):
    weights, index = net.router(x).topk(2, 1)
    out = torch.zeros(N, D)
    for e, expert in enumerate(net.experts):
        share = (weights.softmax(1) * (index == e)).sum(1, keepdim=True)
        out = out + share * expert(x)
    return out


def experts_by_gathered_weights(net, x):
    w = torch.stack([e.weight for e in net.experts])
    return torch.bmm(w[net.router(x).argmax(1)], x[:, :, None])[:, :, 0]


def anchors_that_attend(net, x):
    """A few learned anchors read the batch, and samples read the anchors."""
    anchors = (net.table @ net.linear(x).T).softmax(1) @ x
    return (x @ anchors.T).softmax(1) @ anchors


def samples_as_a_sequence(net, x):
    return net.attention(x, x, x)[0] + x


def samples_as_a_sequence_of_one(net, x):
    h = net.linear(x)[None]
    return net.first(h, h, h)[0][0]


TABLES = {
    "table": weight(5, D),
    "values": weight(5, 3),
    "large": lambda: nn.Embedding(64, D),
    "router": linear(D, 3),
    "experts": lambda: nn.ModuleList(nn.Linear(D, D) for _ in range(3)),
    "attention": lambda: nn.MultiheadAttention(D, 2),
    "first": lambda: nn.MultiheadAttention(D, 2, batch_first=True),
}
table(
    SIMD,
    {
        "a sparse Gaussian process": inducing_process,
        "nearest in a store": nearest_in_a_store,
        "residual codes": residual_codes,
        "signs as codes": signs_as_codes,
        "a hashed grid": hashed_grid,
        "experts without routing": experts_without_routing,
        "two experts each, by masks": experts_by_mask,
        "an expert's weights gathered": experts_by_gathered_weights,
    },
    accept_unknown=True,
    **TABLES,
)
table(
    STATISTICS,
    {
        "slots over the batch": slots_over_the_batch,
        "anchors that read the batch": anchors_that_attend,
    },
    accept_unknown=True,
    **TABLES,
)
table(
    STATISTICS,
    {
        "distances to the means of classes": means_of_classes,
        "distances to the means of classes, in a loop": means_of_classes_in_a_loop,
    },
    FLAT,
    lambda: torch.tensor([0, 1, 2, 2, 1, 0]),
    accept_unknown=True,
)
table(
    MIXED,
    {
        "a joint Gaussian process": joint_process,
        "nearest in the batch": nearest_in_the_batch,
        "experts with a capacity": experts_with_a_capacity,
        "experts that choose their samples": experts_that_choose,
        "samples as a sequence": samples_as_a_sequence,
        "samples as a sequence of one": samples_as_a_sequence_of_one,
    },
    accept_unknown=True,
    **TABLES,
)


# ---------------------------------------------------------------- views, pairs, queues


def both_views(net, x):
    """Two views of each sample, one after the other, through one encoder with batch norm."""
    h = net.norm(net.linear(torch.cat([x, x.flip(1)])))
    a, b = h.chunk(2)
    return torch.cat([a, b], 1)


def both_views_apart(net, x):
    return torch.cat([net.norm(net.linear(x)), net.norm(net.linear(x.flip(1)))], 1)


def both_views_interleaved(net, x):
    h = net.linear(torch.stack([x, x.flip(1)], 1).flatten(0, 1)).relu()
    return h[::2] * h[1::2]


def both_views_taken_for_interleaved(net, x):
    h = net.linear(torch.cat([x, x.flip(1)])).relu()
    return h[::2] * h[1::2]


def all_against_all(net, x):
    h = F.normalize(net.linear(x), dim=1)
    return h @ h.T / 0.1


def against_a_queue(net, x):
    """Scores against keys of earlier batches; then the batch joins the queue (MoCo)."""
    h = F.normalize(net.linear(x), dim=1)
    own = (h * F.normalize(x, dim=1)).sum(1, keepdim=True)
    scores = torch.cat([own, h @ net.queue.clone().T], 1)
    with torch.no_grad():
        net.queue[:N] = F.normalize(x, dim=1)
    return scores


def against_a_queue_joined_first(net, x):
    h = F.normalize(net.linear(x), dim=1)
    with torch.no_grad():
        net.queue[:N] = F.normalize(x, dim=1)
    return h @ net.queue.T


def shuffled_norm(net, x):
    """Halves of the batch are normalised in an order by chance (ShuffleBN)."""
    order = torch.randperm(N)
    h = torch.cat([net.norm(part) for part in net.linear(x)[order].chunk(2)])
    return h[order.argsort()]


def teacher_that_follows(net, x):
    with torch.no_grad():
        for old, new in zip(net.teacher.parameters(), net.linear.parameters(), strict=True):
            old.mul_(0.99).add_(new, alpha=0.01)
        target = net.teacher(x)
    return torch.cat([net.linear(x), target], 1)


def centred_teacher(net, x):
    """Targets are centred by a mean that then follows the batch (DINO)."""
    target = ((net.teacher(x) - net.centre) / 0.04).softmax(1)
    with torch.no_grad():
        net.centre.mul_(0.9).add_(0.1 * net.teacher(x).mean(0))
    return target


def teacher_centred_first(net, x):
    with torch.no_grad():
        net.centre.mul_(0.9).add_(0.1 * net.teacher(x).mean(0))
    return ((net.teacher(x) - net.centre) / 0.04).softmax(1)


def scaled_together(net, x):
    """Samples are centred, and share a scale (PairNorm)."""
    h = net.linear(x)
    h = h - h.mean(0)
    return h / (1e-6 + h.square().sum(1).mean()).sqrt()


def reference_batch(net, x):
    """Moments of a fixed batch and of the sample itself (virtual batch norm)."""
    mean = (net.reference.sum(0) + x) / 6
    square = (net.reference.square().sum(0) + x.square()) / 6
    return net.linear((x - mean) / (square - mean.square() + 1e-5).sqrt())


def clean_half_as_reference(net, x):
    h = net.linear(x)
    return (h - h[: N // 2].mean(0)) / h[: N // 2].std(0)


def masked_batch_norm(net, x, mask):
    h, m = net.linear(x), mask[..., None]
    mean = (h * m).sum((0, 1)) / m.sum()
    spread = ((h - mean).square() * m).sum((0, 1)) / m.sum()
    return (h - mean) * (spread + 1e-5).rsqrt() * m


def blended_with_the_flipped(net, x):
    return net.linear(0.7 * x + 0.3 * x.flip(0))


def queries_of_the_other_half(net, x):
    q, k = net.linear(x).chunk(2)
    return (q @ k.T).softmax(1) @ k


VIEWS = {
    "norm": norm(),
    "queue": lambda: nn.Parameter(torch.randn(8, D), requires_grad=False),
    "teacher": linear(),
    "centre": lambda: nn.Parameter(torch.zeros(D), requires_grad=False),
    "reference": lambda: nn.Parameter(torch.randn(5, D), requires_grad=False),
}
table(
    SIMD,
    {
        "two views interleaved": both_views_interleaved,
        "scores against a queue": against_a_queue,
        "a teacher that follows": teacher_that_follows,
        "a teacher, centred": centred_teacher,
        "a fixed batch as reference": reference_batch,
    },
    accept_unknown=True,
    **VIEWS,
)
table(
    STATISTICS,
    {
        "two views in one batch norm": both_views,
        "two views, one after the other": both_views_apart,
        "a teacher, centred first": teacher_centred_first,
        "centred, with one scale": scaled_together,
    },
    accept_unknown=True,
    **VIEWS,
)
table(GROUPS, {"halves by chance, normalised": shuffled_norm}, accept_unknown=True, **VIEWS)
table(
    STATISTICS,
    {"a batch norm of unmasked frames": masked_batch_norm},
    SEQUENCE,
    lambda: (torch.rand(N, 4) < 0.7).float(),
    accept_unknown=True,
)
table(
    MIXED,
    {
        "two views taken for interleaved": both_views_taken_for_interleaved,
        "all against all": all_against_all,
        "scores against a queue joined first": against_a_queue_joined_first,
        "half of the batch as reference": clean_half_as_reference,
        "blended with the flipped batch": blended_with_the_flipped,
    },
    accept_unknown=True,
    **VIEWS,
)


# ---------------------------------------------------------------- habits of programs


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


def in_a_dict(net, x):
    h = net.linear(x)
    return {"logits": h.relu(), "hidden": [h, h * 2]}


def in_micro_batches(net, x):
    return torch.cat([net.linear(part).tanh() for part in x.split(4)])


def in_micro_batches_with_norm(net, x):
    return torch.cat([net.norm(net.linear(part)) for part in x.chunk(3)])


def sample_by_sample(net, x):
    return torch.stack([net.linear(x[i : i + 1])[0] for i in range(len(x))])


def into_a_result(net, x):
    out = x.new_empty(N, D)
    for i, row in enumerate(x):
        out[i] = net.linear(row)
    return out


def into_a_result_in_reverse(net, x):
    out = x.new_empty(N, D)
    for i, row in enumerate(x):
        out[N - 1 - i] = net.linear(row)
    return out


def early_exit(net, x):
    """Samples that are certain keep the first head's answer."""
    first = net.linear(x)
    certain = first.softmax(1).amax(1, keepdim=True) > 0.5
    return torch.where(certain, first, net.inner(first.relu()))


def early_exit_for_all(net, x):
    first = net.linear(x)
    if first.softmax(1).amax(1).min() > 0.9:
        return first
    return net.inner(first.relu())


def early_exit_by_rows(net, x):
    out = net.linear(x)
    unsure = out.softmax(1).amax(1) < 0.5
    out = out.clone()
    out[unsure] = net.inner(out[unsure].relu())
    return out


def recomputed(net, x):
    return checkpoint(lambda h: net.inner(net.linear(h).relu()), x, use_reentrant=False)


def in_less_precision(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        return net.inner(net.linear(x).relu()).float()


def noise_only_in_training(net, x):
    h = net.linear(x)
    return h + 0.1 * torch.randn_like(h) if net.training else h


def reparametrised(net, x):
    law = distributions.Normal(net.linear(x), F.softplus(net.inner(x)) + 1e-3)
    z = law.rsample()
    return torch.cat([z, law.log_prob(z)], 1)


def posterior_of_the_batch(net, x):
    law = distributions.Normal(net.linear(x).mean(0), net.linear(x).std(0))
    return law.log_prob(net.inner(x))


def cached_table(net, x):
    @functools.cache
    def row(k):
        return net.linear.weight[k] * 2

    return x @ torch.stack([row(k % 2) for k in range(4)]).T


def dropped_paths(net, x):
    keep = torch.empty(N, 1).bernoulli_(0.8) / 0.8
    return x + keep * net.linear(x)


def clipped_rows(net, x):
    size = x.norm(dim=1, keepdim=True)
    return net.linear(x * (1 / size.clamp(min=1)))


def clipped_batch(net, x):
    return net.linear(x * (1 / x.norm().clamp(min=1)))


def wrong_axis_of_a_softmax(net, x):
    return nn.Softmax(dim=0)(net.linear(x))


def positions_of_the_batch(net, x):
    """Positions are added along the first axis, which is that of the samples."""
    return net.linear(x) + net.positions[: x.size(0)]


def hidden_state_kept(net, x):
    h = torch.tanh(net.linear(x) + net.inner(net.state))
    net.state.copy_(h.detach())
    return h


def squeezed_away(net, x):
    score = net.linear(x).mean(1, keepdim=True)
    return score - score.squeeze()


def broadcast_of_labels(net, x, y):
    return net.linear(x).mean(1) * y.view(-1, 1)


def warmed_up(net, x):
    net.step += 1
    return net.linear(x) * min(1.0, float(net.step) / 10)


HABITS = {
    "inner": linear(),
    "norm": norm(),
    "positions": weight(8, D),
    "state": lambda: nn.Parameter(torch.randn(N, D), requires_grad=False),
    "step": lambda: nn.Parameter(torch.zeros(()), requires_grad=False),
}
table(
    SIMD,
    {
        "a dict of predictions": in_a_dict,
        "in micro-batches": in_micro_batches,
        "sample by sample": sample_by_sample,
        "rows written into a result": into_a_result,
        "early exit by sample": early_exit,
        "early exit by rows": early_exit_by_rows,
        "recomputed": recomputed,
        "in less precision": in_less_precision,
        "noise in training": noise_only_in_training,
        "a sample and its likelihood": reparametrised,
        "rows from a cache": cached_table,
        "paths dropped": dropped_paths,
        "rows clipped": clipped_rows,
        "warmed up by a count of calls": warmed_up,
    },
    accept_unknown=True,
    **HABITS,
)
table(
    STATISTICS,
    {
        "likelihood under moments of the batch": posterior_of_the_batch,
        "batch clipped": clipped_batch,
        "softmax along the wrong axis": wrong_axis_of_a_softmax,
        "early exit for all": early_exit_for_all,
    },
    accept_unknown=True,
    **HABITS,
)
table(
    GROUPS,
    {"in micro-batches, with batch norm": in_micro_batches_with_norm},
    accept_unknown=True,
    **HABITS,
)
table(
    INDEXED,
    {
        "positions along the batch": positions_of_the_batch,
        "a hidden state that is kept": hidden_state_kept,
    },
    accept_unknown=True,
    **HABITS,
)
table(
    MIXED,
    {
        "rows written in reverse order": into_a_result_in_reverse,
        "one axis too few": squeezed_away,
    },
    accept_unknown=True,
    **HABITS,
)
table(
    MIXED,
    {"labels broadcast against scores": broadcast_of_labels},
    FLAT,
    lambda: torch.randn(N),
    accept_unknown=True,
)


# ---------------------------------------------------------------- layers of the library


def adaptive_softmax(net, x):
    return net.adaptive.log_prob(x)


def adaptive_softmax_of_labels(net, x, y):
    return net.adaptive(x, y)[0]


def categorical_projection(net, x):
    """Mass moved onto atoms, by flat indices with an offset per sample (C51)."""
    p = net.linear(x).softmax(1)
    place = (x[:, :1] + 0.9 * torch.linspace(-2, 2, D)).clamp(-2, 2) * (D - 1) / 4 + (D - 1) / 2
    low, high = place.floor().long(), place.ceil().long()
    offset = torch.arange(0, N * D, D)[:, None]
    mass = torch.zeros(N * D)
    mass.index_add_(0, (low + offset).view(-1), (p * (high - place)).view(-1))
    mass.index_add_(0, (high + offset).view(-1), (p * (place - low)).view(-1))
    return mass.view(N, D)


def dueling(net, x):
    value, advantage = net.linear(x).split([1, D - 1], 1)
    return value + advantage - advantage.mean(1, keepdim=True)


def quantile_heads(net, x):
    """Fractions drawn for each sample, embedded by cosines (IQN)."""
    tau = torch.rand(N, 3, 1)
    phi = net.linear((math.pi * tau * torch.arange(D)).cos()).relu()
    return (x[:, None] * phi).mean(2)


def bilinear_scores(net, x):
    return net.bilinear(x[:, :3], x[:, 3:])


def normalised_weights(net, x):
    return F.linear(F.normalize(x), F.normalize(net.linear.weight)) * 16


def cells_in_a_loop(net, x):
    h, c = torch.zeros(N, D), torch.zeros(N, D)
    for _ in range(2):
        h, c = net.cell(x, (h, c))
    return h


LAYERS = {
    "adaptive": lambda: nn.AdaptiveLogSoftmaxWithLoss(D, 10, [3, 6], div_value=2.0),
    "bilinear": lambda: nn.Bilinear(3, 3, 4),
    "cell": lambda: nn.LSTMCell(D, D),
}
table(
    SIMD,
    {
        "adaptive softmax": adaptive_softmax,
        "mass moved onto atoms": categorical_projection,
        "value and advantages": dueling,
        "fractions drawn and embedded": quantile_heads,
        "bilinear scores": bilinear_scores,
        "cosines to weights": normalised_weights,
        "cells in a loop": cells_in_a_loop,
        "twin layers with spectral norm": lambda n, x: n.spectral(x),
        "weights by direction and size": lambda n, x: n.normed(x),
        "instance norm of features": lambda n, x: n.instance(x[:, None])[:, 0],
    },
    accept_unknown=True,
    spectral=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(D, D)),
    normed=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, D)),
    instance=lambda: nn.InstanceNorm1d(1, affine=True),
    **LAYERS,
)
table(
    SIMD,
    {"adaptive softmax of labels": adaptive_softmax_of_labels},
    FLAT,
    lambda: torch.tensor([0, 4, 7, 2, 9, 5]),
    accept_unknown=True,
    **LAYERS,
)


def padded_and_packed(net, x, lengths):
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, _ = nn.utils.rnn.pad_packed_sequence(net.gru(packed)[0], batch_first=True, total_length=4)
    return out


def last_by_length(net, x, lengths):
    return net.gru(x)[0][torch.arange(N), lengths - 1]


def last_of_the_longest(net, x, lengths):
    return net.gru(x)[0][:, int(lengths.max()) - 1]


GRU = {"gru": lambda: nn.GRU(D, D, batch_first=True)}
LENGTHS = lambda: torch.tensor([2, 1, 3, 2, 1, 3])  # noqa: E731
table(
    SIMD,
    {"packed by length": padded_and_packed, "the last by length": last_by_length},
    SEQUENCE,
    LENGTHS,
    accept_unknown=True,
    **GRU,
)
table(
    STATISTICS,
    {"the last of the longest": last_of_the_longest},
    SEQUENCE,
    LENGTHS,
    accept_unknown=True,
    **GRU,
)
