"""Models of research papers, and layers of their own making, by the structure that they have."""

import math
from functools import reduce

import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import (
    FLAT,
    GROUPS,
    IMAGE,
    INDEXED,
    MIXED,
    SEQUENCE,
    SIMD,
    STATISTICS,
    conv,
    integers,
    linear,
    norm,
    weight,
)

D = N = 6
NO_STATISTICS = ("fails", "fails", "fails")
DISTINCT = ("holds", "fails", "fails")


# ---------------------------------------------------------------- samples apart


def rotary(net, x):
    angles = torch.outer(torch.arange(4.0), torch.tensor([1.0, 0.1, 0.01]))
    turned = torch.view_as_complex(net.linear(x).view(N, 4, 3, 2)) * torch.polar(
        torch.ones(4, 3), angles
    )
    q = torch.view_as_real(turned).flatten(2)
    return ((q @ q.mT).softmax(-1) @ x)[:, 0]


def slopes_of_distance(net, x):
    """Attention with a bias by distance (ALiBi)."""
    place = torch.arange(4)
    bias = -0.5 * (place[:, None] - place).abs()
    return F.scaled_dot_product_attention(net.linear(x), x, x, attn_mask=bias).mean(1)


def selective_scan(net, x):
    """A state that each token decays by a rate of its own (Mamba)."""
    state, steps = torch.zeros(N, D), []
    for token in x.unbind(1):
        rate = net.linear(token).sigmoid()
        state = rate * state + (1 - rate) * token
        steps.append(state)
    return torch.stack(steps, 1).mean(1)


def windows_of_tokens(net, x):
    """Attention within windows of two tokens, merged into the sample axis (Swin)."""
    w = net.linear(x).view(N, 2, 2, D).flatten(0, 1)
    w = (w @ w.mT).softmax(-1) @ w
    return w.view(N, 2, 2, D).flatten(1, 2).mean(1)


def shifted_windows(net, x):
    w = net.linear(x).roll(1, 1).reshape(2 * N, 2, D)
    return ((w @ w.mT).softmax(-1) @ w).view(N, 4, D).roll(-1, 1)[:, 0]


def shifted_windows_of_the_flat_batch(net, x):
    w = net.linear(x).flatten(0, 1).roll(1, 0).view(2 * N, 2, D)
    return ((w @ w.mT).softmax(-1) @ w).view(N, 4, D)[:, 0]


def capsules(net, x):
    votes, agreement = net.linear(x), torch.zeros(N, 4, 1)
    for _ in range(3):
        out = (agreement.softmax(1) * votes).sum(1, keepdim=True).tanh()
        agreement = agreement + (votes * out).sum(2, keepdim=True)
    return out[:, 0]


def slots(net, x):
    """Slots compete for tokens, and are updated by a cell (slot attention)."""
    s = net.slots.expand(N, 2, D)
    for _ in range(2):
        a = (x @ s.mT).softmax(2)
        update = (a / a.sum(1, keepdim=True)).mT @ x
        s = net.cell(update.flatten(0, 1), s.flatten(0, 1)).view(N, 2, D)
    return s.flatten(1)


def volume_rendering(net, x):
    density, colour = net.linear(x).split([1, 5], 2)
    alpha = 1 - (-F.softplus(density)).exp()
    light = torch.cat([torch.ones(N, 1, 1), (1 - alpha + 1e-6).cumprod(1)[:, :-1]], 1)
    return (light * alpha * colour).sum(1)


def runge_kutta(net, x):
    f = lambda h: net.linear(h).tanh()  # noqa: E731
    for _ in range(2):
        a = f(x)
        b = f(x + a / 4)
        c = f(x + b / 4)
        x = x + (a + 2 * b + 2 * c + f(x + c / 2)) / 12
    return x


def hamiltonian(net, x):
    x = x.detach().requires_grad_()
    energy = net.linear(x).tanh().square().sum()
    (g,) = torch.autograd.grad(energy, x, create_graph=True)
    return torch.cat([g[:, 3:], -g[:, :3]], 1)


def coupling_flow(net, x):
    a, b = x.chunk(2, 1)
    scale, shift = net.linear(torch.cat([a, a], 1)).chunk(2, 1)
    return torch.cat([a, b * scale.tanh().exp() + shift], 1), scale.tanh().sum(1)


def soft_sort(net, x):
    """A relaxed permutation of each sample's features (NeuralSort)."""
    s = net.linear(x)
    distance = (s[:, :, None] - s[:, None]).abs().sum(2)
    scale = D + 1 - 2 * torch.arange(1, D + 1)
    p = (scale[:, None] * s[:, None] - distance[:, None]).softmax(2)
    return (p @ x[:, :, None])[:, :, 0]


def sinkhorn_within(net, x):
    s = net.linear(x)[:, :, None] * x[:, None]
    for _ in range(3):
        s = s - s.logsumexp(1, keepdim=True)
        s = s - s.logsumexp(2, keepdim=True)
    return s.exp().sum(2)


def warping_distance(net, x):
    """The soft dynamic time warping of each sequence to a learned one."""
    cost = torch.cdist(net.linear(x), net.pattern.expand(N, 3, D)).square()
    far = torch.full((N,), 1e3)
    row = [torch.zeros(N), far, far, far]
    for i in range(4):
        new = [far]
        for j in range(3):
            before = torch.stack([row[j], row[j + 1], new[j]])
            new.append(cost[:, i, j] - (-before).logsumexp(0))
        row = new
    return row[-1][:, None]


def viterbi(net, x):
    emissions, backward = net.linear(x), []
    score = emissions[:, 0]
    for t in range(1, 4):
        best = score[:, :, None] + net.moves
        backward.append(best.argmax(1))
        score = best.amax(1) + emissions[:, t]
    path = [score.argmax(1)]
    for pointer in reversed(backward):
        path.append(pointer.gather(1, path[-1][:, None])[:, 0])
    return score, torch.stack(path, 1)


def beam_search(net, x):
    score, token = net.linear(x).log_softmax(1).topk(2, 1)
    for _ in range(2):
        step = net.linear(net.table[token]).log_softmax(2)
        score, flat = (score[:, :, None] + step).flatten(1).topk(2, 1)
        token = flat % D
    return score


def hashed_attention(net, x):
    """Attention among tokens of one bucket, sorted by bucket and back (Reformer)."""
    h = net.linear(x)
    order = (h @ net.direction).argmax(2).argsort(dim=1, stable=True)
    s = h.gather(1, order[:, :, None].expand(N, 4, D)).view(N, 2, 2, D)
    s = ((s @ s.mT).softmax(-1) @ s).view(N, 4, D)
    return s.gather(1, order.argsort(1)[:, :, None].expand(N, 4, D)).mean(1)


def heads_by_task(net, x, task):
    out = x.new_zeros(N, D)
    for t in range(3):
        out = torch.where((task == t)[:, None], x @ net.heads[t].T, out)
    return out


def head_by_lookup(net, x, task):
    return torch.einsum("ni,noi->no", x, net.heads[task])


def adapters_of_low_rank(net, x, task):
    return net.linear(x) + torch.einsum("ni,nri,nor->no", x, net.down[task], net.up[task])


def halted_when_certain(net, x):
    """Steps go on as long as any sample wants one, and change those that do (ACT)."""
    h, open_ = x, torch.ones(N, 1, dtype=torch.bool)
    for _ in range(3):
        new = net.linear(h).tanh()
        h = torch.where(open_, new, h)
        open_ = open_ & (new.abs().amax(1, keepdim=True) < 0.8)
    return h


def halted_by_a_loop(net, x):
    h, open_, steps = x, torch.ones(N, 1, dtype=torch.bool), 0
    while open_.any() and steps < 5:
        h = torch.where(open_, net.linear(h).tanh(), h)
        open_ = open_ & (h.abs().amax(1, keepdim=True) < 0.6)
        steps += 1
    return h


def trimmed_to_the_longest(net, x, length):
    longest = int(length.max())
    kept = torch.arange(longest) < length[:, None]
    return (net.linear(x[:, :longest]) * kept[:, :, None]).sum(1) / length[:, None]


def trimmed_and_averaged(net, x, length):
    return net.linear(x[:, : int(length.max())]).mean(1)


def finite_scalars(net, x):
    z = net.linear(x).tanh() * 2
    return z + (z.round() - z).detach()


def product_codes(net, x):
    parts = net.linear(x).view(N, 2, 3)
    code = (parts[:, :, None] - net.codes).square().sum(3).argmin(2)
    return net.codes[torch.arange(2), code].flatten(1)


def modulated_convolution(net, x):
    """Weights by style, samples as groups of one convolution (StyleGAN 2)."""
    style = x.mean((2, 3))
    w = net.kernel * style[:, None, :, None, None]
    w = w / w.square().sum((2, 3, 4), keepdim=True).add(1e-8).sqrt()
    out = F.conv2d(x.reshape(1, N * 3, 6, 6), w.flatten(0, 1), groups=N)
    return out.view(N, 4, 4, 4)


def squeeze_and_excite(net, x):
    h = net.conv(x)
    return h * net.gate(h.mean((2, 3))).sigmoid()[:, :, None, None]


def style_of_its_own(net, x):
    """Features with mean and spread given by a layer (AdaIN)."""
    mean, spread = net.gate(x.mean((2, 3))).chunk(2, 1)
    return F.instance_norm(x) * spread[:, :, None, None] + mean[:, :, None, None]


def filter_response(net, x):
    h = net.conv(x)
    return torch.maximum(h * (h.square().mean((2, 3), keepdim=True) + 1e-6).rsqrt(), net.floor)


def per_task_adaptation(net, x):
    """One step of gradient descent for each task, by vmap (MAML)."""

    def adapted(task):
        loss = lambda w: (task @ w.T).square().mean()  # noqa: E731
        w = net.linear.weight - 0.1 * torch.func.grad(loss)(net.linear.weight)
        return (task @ w.T).mean(0)

    return torch.func.vmap(adapted)(x)


def set_pooling(net, x):
    a = (net.seed @ net.linear(x).mT).softmax(-1)
    return (a @ x).flatten(1)


def neural_process(net, x):
    context, target = x[:, :2], x[:, 2:]
    return net.linear(target + net.linear(context).relu().mean(1, keepdim=True)).flatten(1)


def graph_attention(net, x, edges):
    h = net.linear(x)
    score = (h @ h.mT).masked_fill(~(edges | torch.eye(4, dtype=torch.bool)), -math.inf)
    return (score.softmax(2) @ h).mean(1)


def equivariant_messages(net, x):
    place = x[..., :3]
    difference = place[:, :, None] - place[:, None]
    w = net.linear(x).mean(2)[:, :, None] * difference.square().sum(3)
    return (place + (w.tanh()[..., None] * difference).mean(2)).flatten(1)


TASKS = integers(3, N)
LENGTHS = integers(3, N)

table(
    SIMD,
    {
        "rotary embedding": rotary,
        "attention with slopes of distance": slopes_of_distance,
        "selective scan": selective_scan,
        "windows of tokens": windows_of_tokens,
        "shifted windows of tokens": shifted_windows,
        "routing by agreement": capsules,
        "slots that compete": slots,
        "volume rendering along a ray": volume_rendering,
        "warping to a learned sequence": warping_distance,
        "best path through states": viterbi,
        "attention by buckets": hashed_attention,
        "adaptation per task": per_task_adaptation,
        "set pooled by a learned seed": set_pooling,
        "context and targets within the sample": neural_process,
        "messages between points": equivariant_messages,
    },
    SEQUENCE,
    accept_unknown=True,
    slots=weight(1, 2, D),
    cell=lambda: nn.GRUCell(D, D),
    pattern=weight(1, 3, D),
    moves=weight(D, D),
    direction=weight(D, 3),
    seed=weight(2, D),
)
table(
    SIMD,
    {
        "steps of Runge-Kutta": runge_kutta,
        "Hamiltonian flow": hamiltonian,
        "coupling flow with its log-determinant": coupling_flow,
        "relaxed sorting within the sample": soft_sort,
        "balanced transport within the sample": sinkhorn_within,
        "beams kept within the sample": beam_search,
        "steps until certain, unrolled": halted_when_certain,
        "steps until certain, in a loop": halted_by_a_loop,
        "finite scalars": finite_scalars,
        "product codes": product_codes,
    },
    accept_unknown=True,
    table=weight(D, D),
    codes=weight(2, 4, 3),
)
table(
    SIMD,
    {
        "heads by task, one after the other": heads_by_task,
        "heads by task, looked up": head_by_lookup,
        "adapters of low rank by task": adapters_of_low_rank,
    },
    FLAT,
    TASKS,
    accept_unknown=True,
    heads=weight(3, D, D),
    down=weight(3, 2, D),
    up=weight(3, D, 2),
)
table(
    SIMD,
    {
        "modulated convolution, samples as groups": modulated_convolution,
        "squeeze and excite": squeeze_and_excite,
        "filter response": filter_response,
    },
    IMAGE,
    accept_unknown=True,
    linear=lambda: None,
    kernel=weight(1, 4, 3, 3, 3),
    conv=conv(),
    gate=linear(4, 4),
    floor=weight(4, 1, 1),
)
table(
    SIMD,
    {"style from the sample": style_of_its_own},
    IMAGE,
    linear=lambda: None,
    gate=linear(3, 6),
)
table(
    SIMD,
    {"attention along the edges of a graph": graph_attention},
    SEQUENCE,
    lambda: torch.rand(N, 4, 4) < 0.5,
    accept_unknown=True,
)
table(
    SIMD,
    {"trimmed to the longest, masked": trimmed_to_the_longest},
    SEQUENCE,
    lambda: torch.tensor([1, 2, 3, 2, 1, 3]),
    accept_unknown=True,
)
table(
    STATISTICS,
    {"trimmed to the longest, averaged": trimmed_and_averaged},
    SEQUENCE,
    lambda: torch.tensor([1, 2, 3, 2, 1, 3]),
    accept_unknown=True,
)
table(
    MIXED,
    {"shifted windows of the flat batch": shifted_windows_of_the_flat_batch},
    SEQUENCE,
    accept_unknown=True,
)


# ---------------------------------------------------------------- statistics of the batch


def renormalised(net, x):
    """Batch norm, corrected to running statistics by factors without a gradient."""
    h = net.linear(x)
    mean, spread = h.mean(0), h.std(0)
    r = (spread / net.spread).clamp(0.5, 2).detach()
    d = ((mean - net.mean) / net.spread).clamp(-1, 1).detach()
    return (h - mean) / spread * r + d


def newton_whitening(net, x):
    """The inverse root of the covariance by Newton's iteration (IterNorm)."""
    h = net.linear(x)
    c = h - h.mean(0)
    cov = c.T @ c / N + 0.1 * torch.eye(D)
    trace, p = cov.trace(), torch.eye(D)
    for _ in range(3):
        p = 1.5 * p - 0.5 * p @ p @ p @ cov / trace
    return c @ p / trace.sqrt()


def power_norm(net, x):
    h = net.linear(x)
    return h / h.square().mean(0).sqrt()


def mixed_statistics(net, x):
    """Half of the running mean and half of the batch's, as at test time."""
    h = net.linear(x)
    return (h - 0.5 * net.mean - 0.5 * h.mean(0)) / (0.5 * net.spread + 0.5 * h.std(0))


def sinkhorn_assignment(net, x):
    q = net.linear(x).exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


def codebook_moved_first(net, x):
    h = net.linear(x)
    code = F.one_hot(torch.cdist(h, net.table).argmin(1), D).float()
    with torch.no_grad():
        net.table.mul_(0.9).add_(0.1 * (code.T @ h) / (code.sum(0)[:, None] + 1))
    return h + (code @ net.table - h).detach()


def codebook_moved_after(net, x):
    h = net.linear(x)
    code = F.one_hot(torch.cdist(h, net.table).argmin(1), D).float()
    quantised = code @ net.table
    with torch.no_grad():
        net.table.mul_(0.9).add_(0.1 * (code.T @ h) / (code.sum(0)[:, None] + 1))
    return h + (quantised - h).detach()


def first_batch_sets_the_scale(net, x):
    h = net.linear(x)
    if net.ready.item() == 0:
        net.shift.copy_(-h.mean(0))
        net.ready.fill_(1)
    return h + net.shift


def inner_step_by_backward(net, x):
    w = net.linear.weight.detach().clone().requires_grad_()
    (x @ w.T).tanh().sum().backward()
    return x @ (w - 0.1 * w.grad).T * net.linear.bias


def power_iteration(net, x):
    v = torch.ones(D) / D
    for _ in range(4):
        v = F.normalize(x.T @ (x @ v), dim=0)
    return net.linear(x) / (x @ v).norm()


def linear_moments(net, x):
    order = 2 * torch.arange(N) - N + 1
    return net.linear(x) - (x.sort(0).values * order[:, None]).mean(0)


def mean_of_means(net, x):
    return net.linear(x) - (x[:3].mean(0) + x[3:].mean(0)) / 2


def clustered(net, x):
    """Three steps of soft k-means, and the distance to what came out."""
    centres = net.table
    for _ in range(3):
        a = (-torch.cdist(x, centres)).softmax(1)
        centres = a.T @ x / a.sum(0)[:, None]
    return torch.cdist(net.linear(x), centres)


def kernel_of_features(net, x):
    """Random features of the batch: a map from their means (linear attention over samples)."""
    f = F.elu(net.linear(x)) + 1
    return f @ (f.T @ x) / (f @ f.sum(0))[:, None]


def mean_field(net, x):
    h = net.linear(x)
    for _ in range(3):
        h = (h + 0.1 * h.mean(0)).tanh()
    return h


def ridge_by_cholesky(net, x):
    factor = torch.linalg.cholesky(x.T @ x + torch.eye(D))
    return x @ torch.cholesky_solve(x.T @ net.linear(x).tanh(), factor)


def with_ridge(x, y):
    return torch.cat([x, torch.eye(D)]), torch.cat([y, torch.zeros(D, D)])


def welford(net, x):
    mean = torch.zeros(D)
    for count, row in enumerate(x, 1):
        mean = mean + (row - mean) / count
    return net.linear(x) - mean


def all_ranks_weighed(net, x):
    weights = torch.linspace(0, 1, N)[:, None]
    return net.linear(x) - (x.sort(0).values * weights).sum(0)


table(
    STATISTICS,
    {
        "batch renormalisation": renormalised,
        "whitening by Newton's iteration": newton_whitening,
        "power normalisation": power_norm,
        "half running and half own statistics": mixed_statistics,
        "balanced assignment to prototypes": sinkhorn_assignment,
        "a codebook moved, then used": codebook_moved_first,
        "the first batch sets a shift": first_batch_sets_the_scale,
        "an inner step by backward()": inner_step_by_backward,
        "spectral norm of the batch": power_iteration,
        "linear moments": linear_moments,
        "mean of the means of halves": mean_of_means,
        "soft clusters of the batch": clustered,
        "linear attention among samples": kernel_of_features,
        "mean field, three steps": mean_field,
        "ridge regression by a factor": ridge_by_cholesky,
        "mean by Welford": welford,
        "all ranks in one sum": all_ranks_weighed,
        "norm over all, functional": lambda n, x: F.layer_norm(n.linear(x), (N, D)),
        "pixel norm along the batch": lambda n, x: x * (x.square().mean(0) + 1e-8).rsqrt(),
        "pooled to one over the batch": lambda n, x: (
            n.linear(x) - F.adaptive_avg_pool1d(x.T[None], 1)[0].T
        ),
        "untracked batch norm": lambda n, x: n.norm(n.linear(x)),
        "last of a cumulative sum": lambda n, x: n.linear(x) - x.cumsum(0)[-1],
        "largest of two halves": lambda n, x: (
            n.linear(x) - torch.maximum(x[:3].amax(0), x[3:].amax(0))
        ),
        "logsumexp of two halves": lambda n, x: (
            n.linear(x) - torch.logaddexp(x[:3].logsumexp(0), x[3:].logsumexp(0))
        ),
        "largest by a reduction of Python": lambda n, x: n.linear(x) - reduce(torch.maximum, x),
        "sums of unequal parts": lambda n, x: n.linear(x) - (x[:2].sum(0) + x[2:].sum(0)) / N,
        "mean absolute difference of pairs": lambda n, x: (
            n.linear(x) * (x[:, None] - x).abs().mean()
        ),
        "median of the means of pairs": lambda n, x: (
            n.linear(x) - ((x[:, None] + x) / 2).flatten(0, 1).median(0).values
        ),
        "principal axes by singular values": lambda n, x: (
            n.linear(x) @ torch.linalg.svd(x).Vh.abs()
        ),
        "triangular factor of the batch": lambda n, x: n.linear(x) @ torch.linalg.qr(x)[1].abs(),
        "least squares on the batch": lambda n, x: (
            x @ torch.linalg.lstsq(*with_ridge(x, x.tanh())).solution
        ),
        "second moments by a cumulative sum": lambda n, x: (
            n.linear(x) @ (x[:, :, None] * x[:, None]).cumsum(0)[-1].tanh()
        ),
    },
    accept_unknown=True,
    table=lambda: nn.Parameter(torch.randn(D, D), requires_grad=False),
    norm=lambda: nn.BatchNorm1d(D, track_running_stats=False).eval(),
    mean=lambda: nn.Parameter(torch.randn(D), requires_grad=False),
    spread=lambda: nn.Parameter(torch.rand(D) + 0.5, requires_grad=False),
    shift=lambda: nn.Parameter(torch.zeros(D), requires_grad=False),
    ready=lambda: nn.Parameter(torch.tensor(0), requires_grad=False),
)
table(
    SIMD,
    {"a codebook used, then moved": codebook_moved_after},
    accept_unknown=True,
    table=lambda: nn.Parameter(torch.randn(D, D), requires_grad=False),
)


# ---------------------------------------------------------------- groups of samples


def pairs_given_back(net, x):
    h = net.linear(x)
    return ((h[:3] + h[3:]) / 2).repeat(2, 1)


def group_mean_alone(net, x):
    return net.linear(x).view(2, 3, D).mean(1, keepdim=True).expand(2, 3, D).reshape(N, D)


def mean_of_views(net, x):
    h = net.linear(x)
    return h - h.view(3, 2, D).mean(0).repeat(3, 1)


def group_of_four_and_two(net, x):
    return torch.cat([net.norm(part) for part in net.linear(x).split(4)])


def centred_in_four_and_two(net, x):
    return torch.cat([part - part.mean(0) for part in net.linear(x).split(4)])


def pairs_of_neighbours(net, x):
    return net.linear(x).view(3, 2, D).mean(1).repeat_interleave(2, 0)


def centred_by_the_other_half(net, x):
    h = net.linear(x)
    return torch.cat([h[:3] - h[3:].mean(0), h[3:] - h[:3].mean(0)])


def standardised_in_groups(net, x):
    h = net.linear(x).view(2, 3, D)
    return (h - h.mean(1, keepdim=True)).relu().view(N, D)


def groups_then_sum(net, x):
    h = standardised_in_groups(net, x)
    return h + h.sum(0)


def groups_then_index_add(net, x):
    h = standardised_in_groups(net, x)
    pooled = torch.zeros(1, D).index_add(0, torch.zeros(N, dtype=torch.int64), h)
    return h + pooled


def groups_then_python_sum(net, x):
    h = standardised_in_groups(net, x)
    return h + sum(h.unbind())


table(
    GROUPS,
    {
        "pairs averaged, and given back to both": pairs_given_back,
        "the mean of a group for all of it": group_mean_alone,
        "views centred by their mean": mean_of_views,
        "pairs of neighbours averaged": pairs_of_neighbours,
        "ghost batch norm of four and two": group_of_four_and_two,
        "centred in parts of four and two": centred_in_four_and_two,
    },
    accept_unknown=True,
    norm=norm(),
)
table(MIXED, {"centred by the other half": centred_by_the_other_half}, accept_unknown=True)
# A sum over samples of several groups is no symmetric function of them.
table(
    NO_STATISTICS,
    {
        "ghost norm, then a sum over all": groups_then_sum,
        "ghost norm, then pooled by index_add": groups_then_index_add,
        "ghost norm, then summed by Python": groups_then_python_sum,
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- places in the batch


def split_norms(net, x):
    """Clean samples and adversarial ones, each half with a batch norm of its own."""
    h = net.linear(x)
    return torch.cat([net.norm(h[:3]), net.other(h[3:])])


def members_of_an_ensemble(net, x):
    """Every second sample has the fast weights of another member (BatchEnsemble)."""
    r, s = net.fast.repeat(3, 1, 1).unbind(1)
    return net.linear(x * r) * s


def prototypes_of_support(net, x):
    """The first half of the batch is the support of the other."""
    h = net.linear(x)
    return torch.cdist(h, h[:3])


def style_of_the_next(net, x):
    return (x - x.mean(1, keepdim=True)) * x.roll(1, 0).std(1, keepdim=True) + net.linear.bias


def batch_former(net, x):
    return net.layer(net.linear(x)[None])[0]


def minibatch_features(net, x):
    m = net.linear(x).view(N, 2, 3)
    distance = (m[:, None] - m).abs().sum(3)
    return torch.cat([x, (-distance).exp().sum(1) - 1], 1)


def overlapping_windows(net, x):
    rows = [net.linear(x[i]) - x[max(0, i - 1) : i + 2].mean(0) for i in range(N)]
    return torch.stack(rows)


def online_mean(net, x):
    mean = reduce(lambda m, row: 0.9 * m + 0.1 * row, x, torch.zeros(D))
    return net.linear(x) - mean


def teacher_forced_by_others(net, x):
    state, out = torch.zeros(D), []
    for row in net.linear(x):
        out.append(row + state.tanh())
        state = row
    return torch.stack(out)


table(
    DISTINCT,
    {
        "members of an ensemble in turn": members_of_an_ensemble,
        "one kernel per sample, as channels": lambda n, x: n.conv(x[None])[0],
        "group norm with weights per sample": lambda n, x: F.group_norm(
            n.linear(x)[None], N, n.per_sample
        )[0],
    },
    fast=lambda: nn.Parameter(torch.randn(2, 2, D)),
    conv=lambda: nn.Conv1d(N, N, 3, padding=1, groups=N),
    per_sample=weight(N),
)
table(
    NO_STATISTICS,
    {
        "two batch norms for two halves": split_norms,
        "prototypes of the first half": prototypes_of_support,
        "style of the next sample": style_of_the_next,
        "a transformer among samples": batch_former,
        "similarity to others as a feature": minibatch_features,
        "means of windows of samples": overlapping_windows,
        "an online mean of the samples": online_mean,
        "each sample told of the one before": teacher_forced_by_others,
        "local response among samples": lambda n, x: F.local_response_norm(n.linear(x)[None], 3)[0],
        "weights of a norm over all": lambda n, x: F.layer_norm(n.linear(x), (N, D), n.all),
        "mean of unequal means": lambda n, x: n.linear(x) - (x[:2].mean(0) + x[2:].mean(0)) / 2,
    },
    accept_unknown=True,
    norm=norm(),
    other=lambda: nn.BatchNorm1d(D, eps=0.1),
    layer=lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
    all=weight(N, D),
)
table(
    SIMD,
    {
        "group norm, samples as channels": lambda n, x: F.group_norm(n.linear(x)[None], N)[0],
        "instance norm, samples as channels": lambda n, x: F.instance_norm(n.linear(x)[None])[0],
    },
)
table(
    STATISTICS,
    {"leave one out of three": lambda n, x: n.linear(x) - (x.sum(0) - x) / 2},
    (3, D),
    accept_unknown=True,
)
table(
    INDEXED,
    {"diagonal doubled through strides": lambda n, x: diagonal_doubled(n.linear(x).clone())},
)


def diagonal_doubled(h):
    h.as_strided((N,), (N + 1,)).mul_(2.0)
    return h
