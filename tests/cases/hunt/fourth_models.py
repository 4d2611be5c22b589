"""Models as research code has them: sequences, sets, images, normalisations, samples in pairs."""

import einops
import torch
from torch import nn
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import (
    GROUPS,
    IMAGE,
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
T = 4


# ---------------------------------------------------------------- sequences


def diagonal_state_space(net, x):
    """A linear recurrence with complex states, as a convolution by FFT (S4D)."""
    rate = torch.complex(-net.decay.exp(), net.angle)
    steps = torch.arange(T)
    kernel = (rate[:, None] * steps).exp().real
    u = net.linear(x).transpose(1, 2)
    y = torch.fft.irfft(torch.fft.rfft(u, n=2 * T) * torch.fft.rfft(kernel, n=2 * T), n=2 * T)
    return y[..., :T].transpose(1, 2)


def complex_recurrence(net, x):
    rate = torch.polar((-net.decay.exp()).exp(), net.angle)
    state, out = torch.zeros(N, D, dtype=torch.complex64), []
    for t in range(T):
        state = rate * state + net.linear(x[:, t])
        out.append(state.real)
    return torch.stack(out, 1).mean(1)


def retention(net, x):
    place = torch.arange(T)
    gap = place[:, None] - place
    decay = torch.where(gap >= 0, 0.9 ** gap.clamp(min=0), 0.0)
    return ((net.linear(x) @ x.mT) * decay) @ x


def token_shift(net, x):
    """Each token blended with the one before it, then weighted by a decay (RWKV)."""
    before = F.pad(x, (0, 0, 1, -1))
    key = net.linear(x * 0.7 + before * 0.3)
    above, below, out = torch.zeros(N, D), torch.zeros(N, D), []
    for t in range(T):
        w = key[:, t].exp()
        out.append((above + w * x[:, t]) / (below + w))
        above, below = 0.9 * above + w * x[:, t], 0.9 * below + w
    return torch.stack(out, 1).flatten(1)


def token_shift_of_the_flat_batch(net, x):
    flat = net.linear(x).flatten(0, 1)
    return (flat + F.pad(flat, (0, 0, 1, -1))).view(N, T, D).mean(1)


def long_convolution(net, x):
    q, k, v = net.projections(x).chunk(3, 2)
    u = (k * v).transpose(1, 2)
    y = F.conv1d(F.pad(u, (T - 1, 0)), net.filters, groups=D).transpose(1, 2)
    return q * y


def latents_that_attend(net, x):
    latents = net.latents.expand(N, -1, -1)
    out, _ = net.attention(latents, x, x, need_weights=False)
    return out.flatten(1)


def random_features(net, x):
    """Attention by random features of queries and keys (Performer)."""
    f = lambda h: (h @ net.directions - h.square().sum(2, keepdim=True) / 2).exp()  # noqa: E731
    q, k = f(net.linear(x)), f(x)
    return (q @ (k.mT @ x)) / (q @ k.sum(1, keepdim=True).mT)


def landmarks(net, x):
    """Attention through means of neighbouring tokens (Nyströmformer)."""
    q, k = net.linear(x), x
    ql, kl = q.view(N, 2, 2, D).mean(2), k.view(N, 2, 2, D).mean(2)
    a = (q @ kl.mT).softmax(2)
    b = torch.linalg.pinv((ql @ kl.mT).softmax(2) + torch.eye(2))
    return a @ b @ ((ql @ k.mT).softmax(2) @ x)


def fourier_mixing(net, x):
    return net.linear(torch.fft.fft2(x).real)


def fourier_over_everything(net, x):
    return net.linear(torch.fft.fftn(x).real)


def spatial_gate(net, x):
    u, v = net.linear(x).chunk(2, 2)
    return u * net.mix(F.layer_norm(v, (3,)).mT).mT


def relative_shift(net, x):
    """Scores by distance, brought into place by padding and a view (Transformer-XL)."""
    q = net.linear(x)
    by_distance = q @ net.distances.T
    shifted = F.pad(by_distance, (1, 0)).view(N, T + 1, T)[:, 1:].reshape(N, T, T)
    return (q @ x.mT + shifted).softmax(2) @ x


def position_buckets(net, x):
    """A learned bias for each bucket of distances (T5)."""
    gap = torch.arange(T)[:, None] - torch.arange(T)
    bucket = torch.where(gap > 0, (gap + 1).float().log2().long().clamp(max=2), 3)
    return (net.linear(x) @ x.mT + net.biases[bucket]).softmax(2) @ x


def dilated_and_gated(net, x):
    h = x.transpose(1, 2)
    for dilation in (1, 2):
        a, b = F.conv1d(F.pad(h, (dilation, 0)), net.causal, dilation=dilation).chunk(2, 1)
        h = h + a.tanh() * b.sigmoid()
    return h[:, :, -1]


def convolution_module(net, x):
    """A gated convolution with a batch norm over all frames (Conformer)."""
    h = F.glu(net.twice(x).transpose(1, 2), 1)
    return F.silu(net.norm(F.conv1d(h, net.depthwise, padding=1, groups=D))).transpose(1, 2)


def pointer(net, x):
    scores = (net.linear(x) @ x[:, -1:].mT)[..., 0].softmax(1)
    return torch.einsum("nt,ntd->nd", scores, x)


def copied_words(net, words):
    """A law over words, of which a part is copied from the input (pointer-generator)."""
    h = net.words(words)
    attention = (h @ h[:, -1:].mT)[..., 0].softmax(1)
    written = net.head(h[:, -1]).softmax(1)
    return (0.5 * written).scatter_add(1, words, 0.5 * attention).log()


def partition_function(net, x):
    """The normalisation of a linear-chain field, forwards."""
    scores = net.linear(x)
    alpha = scores[:, 0]
    for t in range(1, T):
        alpha = (alpha[:, :, None] + net.moves).logsumexp(1) + scores[:, t]
    return alpha.logsumexp(1, keepdim=True)


def biaffine(net, x):
    head, child = net.linear(x), F.pad(x, (0, 1), value=1.0)
    return torch.einsum("nti,ij,nsj->nts", head, net.arcs, child)


def memory_that_is_written(net, x):
    """Content is addressed, erased and added (neural Turing machine)."""
    memory = net.memory.expand(N, -1, -1)
    for t in range(T):
        key = net.linear(x[:, t])
        w = F.cosine_similarity(key[:, None], memory, dim=2).softmax(1)[:, :, None]
        memory = memory * (1 - w * key[:, None].sigmoid()) + w * key[:, None].tanh()
    return memory.flatten(1)


def merged_tokens(net, x):
    """The most alike pair of even and odd tokens becomes one (ToMe)."""
    h = net.linear(x)
    a, b = h[:, ::2], h[:, 1::2]
    best, partner = (F.normalize(a, dim=2) @ F.normalize(b, dim=2).mT).max(2)
    order = best.argsort(1, descending=True)
    kept = a.gather(1, order[:, 1:, None].expand(-1, -1, D))
    moved = a.gather(1, order[:, :1, None].expand(-1, -1, D))
    target = partner.gather(1, order[:, :1])[:, :, None].expand(-1, -1, D)
    return torch.cat([kept, b.scatter_reduce(1, target, moved, "mean")], 1)


def span_of_answers(net, x):
    start, end = net.linear(x)[..., :2].unbind(2)
    return start.log_softmax(1)[:, :, None] + end.log_softmax(1)[:, None]


def masked_mean(net, x):
    kept = x.abs().sum(2) > 2
    h = net.linear(x).masked_fill(~kept[:, :, None], 0)
    return h.sum(1) / kept.sum(1, keepdim=True).clamp(min=1)


def padding_in_attention(net, x):
    padded = x[..., 0] > 1
    padded = padded & ~padded.all(1, keepdim=True)
    return net.attention(x, x, x, key_padding_mask=padded)[0]


def weights_of_layers(net, x):
    """All layers, in a learned mixture (ELMo)."""
    layers = [x]
    for _ in range(2):
        layers.append(net.linear(layers[-1]).relu())
    return net.scale * sum(w * h for w, h in zip(net.mixture.softmax(0), layers, strict=True))


def cache_of_keys(net, x):
    keys, out = [], []
    for t in range(T):
        keys.append(net.linear(x[:, t]))
        past = torch.stack(keys, 1)
        out.append(F.scaled_dot_product_attention(x[:, t : t + 1], past, past))
    return torch.cat(out, 1)


def ring_buffer(net, x):
    buffer = torch.zeros(N, 2, D)
    for t in range(T):
        buffer[:, t % 2] = net.linear(x[:, t] + buffer.mean(1))
    return buffer.flatten(1)


def frames_shifted_in_time(net, x):
    """Some channels come from the frame before, some from the next (TSM)."""
    h = net.linear(x).reshape(N * T, D)
    frames = h.view(-1, T, D)
    out = torch.zeros_like(frames)
    out[:, :-1, :2] = frames[:, 1:, :2]
    out[:, 1:, 2:4] = frames[:, :-1, 2:4]
    out[:, :, 4:] = frames[:, :, 4:]
    return out.view(N, T, D)


def frames_shifted_in_segments_of_another_length(net, x):
    frames = net.linear(x).reshape(N * T, D).view(-1, 3, D)
    out = torch.zeros_like(frames)
    out[:, :-1, :2] = frames[:, 1:, :2]
    out[:, :, 2:] = frames[:, :, 2:]
    return out.view(N, T, D)


def advantages(net, x):
    """Generalised advantages, backwards in time."""
    value, reward = net.linear(x)[..., 0], x[..., 1]
    last, out = torch.zeros(N), []
    for t in reversed(range(T - 1)):
        last = reward[:, t] + 0.9 * value[:, t + 1] - value[:, t] + 0.8 * last
        out.insert(0, last)
    return torch.stack(out, 1)


def normalised_advantages(net, x):
    a = advantages(net, x)
    return (a - a.mean()) / (a.std() + 1e-8)


def burnt_in(net, x):
    with torch.no_grad():
        _, state = net.gru(x[:, :2])
    return net.gru(x[:, 2:], state)[0]


def time_first(net, x):
    """A recurrence that expects time first, on a batch that has samples first."""
    return net.time_first(x)[0]


SEQUENTIAL = {
    "decay": weight(D),
    "angle": weight(D),
    "projections": linear(D, 3 * D),
    "filters": weight(D, 1, T),
    "latents": weight(1, 2, D),
    "attention": lambda: nn.MultiheadAttention(D, 2, batch_first=True),
    "directions": weight(D, 5),
    "mix": linear(T, T),
    "distances": weight(T, D),
    "biases": weight(4),
    "causal": weight(2 * D, D, 2),
    "moves": weight(D, D),
    "arcs": weight(D, D + 1),
    "memory": weight(1, 3, D),
    "mixture": weight(3),
    "scale": weight(1),
    "gru": lambda: nn.GRU(D, D, batch_first=True),
    "time_first": lambda: nn.GRU(D, D),
    "twice": linear(D, 2 * D),
    "norm": norm(),
    "depthwise": weight(D, 1, 3),
    "encoder": lambda: nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0),
    "sequence_attention": lambda: nn.MultiheadAttention(D, 2),
}
table(
    SIMD,
    {
        "a diagonal state space by FFT": diagonal_state_space,
        "a recurrence with complex states": complex_recurrence,
        "retention with decay": retention,
        "tokens shifted by one, and decayed": token_shift,
        "a long gated convolution": long_convolution,
        "latents attend to a sequence": latents_that_attend,
        "attention by random features": random_features,
        "attention by landmarks": landmarks,
        "mixed by Fourier transforms": fourier_mixing,
        "a spatial gate": spatial_gate,
        "attention by relative shift": relative_shift,
        "buckets of distances": position_buckets,
        "dilated and gated": dilated_and_gated,
        "pointed at by the last": pointer,
        "partition function of a chain": partition_function,
        "arcs of a parser": biaffine,
        "a memory that is written": memory_that_is_written,
        "alike tokens merged": merged_tokens,
        "spans of answers": span_of_answers,
        "mean of tokens that are large": masked_mean,
        "attention with padded keys": padding_in_attention,
        "a mixture of layers": weights_of_layers,
        "keys in a cache": cache_of_keys,
        "a ring of states": ring_buffer,
        "frames shifted in time": frames_shifted_in_time,
        "advantages in time": advantages,
        "a state burnt in": burnt_in,
    },
    SEQUENCE,
    accept_unknown=True,
    **SEQUENTIAL,
)
table(
    STATISTICS,
    {
        "a gated convolution with batch norm": convolution_module,
        "advantages normalised over the batch": normalised_advantages,
        "a softmax over samples by oversight": lambda n, x: (
            n.linear(x).mean(2).softmax(0)[..., None] * x
        ),
        "features normalised along samples by oversight": lambda n, x: F.normalize(
            n.linear(x), dim=0
        ),
        "loudness relative to the loudest of the batch": lambda n, x: (
            n.linear(x) / x.abs().max().clamp(min=1e-5)
        ),
        "tokens as channels of a batch norm": lambda n, x: n.tokens(n.linear(x)),
    },
    SEQUENCE,
    accept_unknown=True,
    tokens=norm(T),
    **SEQUENTIAL,
)
table(
    MIXED,
    {
        "tokens shifted by one in the flat batch": token_shift_of_the_flat_batch,
        "Fourier over samples, too": fourier_over_everything,
        "segments of another length": frames_shifted_in_segments_of_another_length,
        "a recurrence that takes samples for time": time_first,
        "an encoder that takes samples for time": lambda n, x: n.encoder(n.linear(x)),
        "attention that takes samples for time": lambda n, x: n.sequence_attention(x, x, x)[0],
        "attention with a causal mask over samples": lambda n, x: F.scaled_dot_product_attention(
            n.linear(x).transpose(0, 1),
            x.transpose(0, 1),
            x.transpose(0, 1),
            is_causal=True,
        ).transpose(0, 1),
    },
    SEQUENCE,
    accept_unknown=True,
    **SEQUENTIAL,
)
table(
    SIMD,
    {"words copied or written": copied_words},
    integers(9, N, T),
    linear=lambda: None,
    words=lambda: nn.Embedding(9, D),
    head=linear(D, 9),
    accept_unknown=True,
)


# ---------------------------------------------------------------- sets and graphs


def edges_of_neighbours(net, x):
    """Each point with its nearest ones within the sample (DGCNN)."""
    near = torch.cdist(x, x).topk(2, 2, largest=False).indices
    batch = torch.arange(N)[:, None, None]
    neighbours = x[batch, near]
    edges = torch.cat([neighbours - x[:, :, None], x[:, :, None].expand_as(neighbours)], 3)
    return net.edge(edges).amax(2)


def farthest_points(net, x):
    batch = torch.arange(N)
    distance = torch.full((N, T), 1e10)
    farthest = torch.zeros(N, dtype=torch.long)
    chosen = []
    for _ in range(2):
        chosen.append(farthest)
        centre = x[batch, farthest][:, None]
        distance = torch.minimum(distance, (x - centre).square().sum(2))
        farthest = distance.argmax(1)
    index = torch.stack(chosen, 1)
    return net.linear(x[batch[:, None], index]).flatten(1)


def farthest_points_by_flat_index(net, x):
    """The index of a point in the flat batch is its own plus an offset by sample."""
    near = torch.cdist(x, x).argsort(2)[:, :, 1]
    flat = (near + torch.arange(N)[:, None] * T).view(-1)
    return net.linear(x.flatten(0, 1)[flat]).view(N, T, D)


def learned_rotation(net, x):
    """A transform by the sample itself, and its distance from a rotation (PointNet)."""
    m = net.square(x.amax(1)).view(N, D, D) + torch.eye(D)
    return net.linear(x @ m).amax(1), (m @ m.mT - torch.eye(D)).norm(dim=(1, 2))


def propagated(net, x, adjacency):
    a = adjacency + torch.eye(T)
    scale = a.sum(2).rsqrt()
    return net.linear(scale[:, :, None] * a * scale[:, None] @ x)


def spectral_filter(net, x, adjacency):
    laplacian = torch.diag_embed(adjacency.sum(2)) - adjacency
    before, now = x, laplacian @ x
    return net.linear(before + now + 2 * laplacian @ now - before).mean(1)


def inducing_points(net, x):
    h, _ = net.down(net.points.expand(N, -1, -1), x, x)
    return net.up(x, h, h)[0].mean(1)


def soft_slots(net, x):
    """Slots are mixtures of the tokens of a sample, and tokens of its slots (soft MoE)."""
    scores = x @ net.points[0].T
    slots = scores.softmax(1).mT @ x
    return scores.softmax(2) @ net.linear(slots)


def continuous_filters(net, x):
    """Filters by distance between the points of a sample (SchNet)."""
    distance = torch.cdist(x[..., :3], x[..., :3])
    basis = (-(distance[..., None] - torch.linspace(0, 2, D)).square()).exp()
    return (net.linear(basis) * x[:, None]).sum(2)


def interactions(net, x):
    """Messages along a fixed list of edges (interaction network)."""
    sender, receiver = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])
    message = net.edge(torch.cat([x[:, sender], x[:, receiver]], 2))
    return torch.zeros(N, T, D).index_add(1, receiver, message)


def farthest_of_the_batch(net, x):
    return net.linear(x) * torch.cdist(x.flatten(1), x.flatten(1)).amax()


ADJACENCY = lambda: torch.rand(N, T, T).round()  # noqa: E731

GRAPHS = {
    "edge": linear(2 * D, D),
    "square": linear(D, D * D),
    "points": weight(1, 2, D),
    "down": lambda: nn.MultiheadAttention(D, 2, batch_first=True),
    "up": lambda: nn.MultiheadAttention(D, 2, batch_first=True),
}
table(
    SIMD,
    {
        "edges to the nearest points": edges_of_neighbours,
        "farthest points": farthest_points,
        "nearest points by a flat index": farthest_points_by_flat_index,
        "a learned rotation of points": learned_rotation,
        "attention through inducing points": inducing_points,
        "soft slots of tokens": soft_slots,
        "filters by distance": continuous_filters,
        "messages along fixed edges": interactions,
    },
    SEQUENCE,
    accept_unknown=True,
    **GRAPHS,
)
table(
    SIMD,
    {"propagated along own edges": propagated, "filtered by a Laplacian": spectral_filter},
    SEQUENCE,
    ADJACENCY,
    accept_unknown=True,
)
table(
    STATISTICS,
    {"scaled by the diameter of the batch": farthest_of_the_batch},
    SEQUENCE,
    accept_unknown=True,
)


# ---------------------------------------------------------------- images


def involution(net, x):
    """A kernel for each pixel, made of the pixel (involution)."""
    kernels = net.kernels(x).view(N, 1, 9, 36)
    patches = F.unfold(x, 3, padding=1).view(N, 3, 9, 36)
    return (kernels * patches).sum(2).view(N, 3, 6, 6)


def mixed_kernels(net, x):
    """Kernels mixed by each sample, samples as groups (CondConv)."""
    share = net.share(x.mean((2, 3))).softmax(1)
    kernel = torch.einsum("ne,eoihw->noihw", share, net.bank).flatten(0, 1)
    return F.conv2d(x.reshape(1, -1, 6, 6), kernel, padding=1, groups=N).view(N, 4, 6, 6)


def mixed_kernels_by_vmap(net, x):
    share = net.share(x.mean((2, 3))).softmax(1)
    kernels = torch.einsum("ne,eoihw->noihw", share, net.bank)
    return torch.vmap(lambda image, kernel: F.conv2d(image[None], kernel)[0])(x, kernels)


def axial(net, x):
    """Attention along rows, with rows of all samples as one batch."""
    rows = einops.rearrange(x, "n c h w -> (n h) w c")
    rows = F.scaled_dot_product_attention(rows, rows, rows)
    columns = einops.rearrange(rows, "(n h) w c -> (n w) h c", n=N)
    columns = F.scaled_dot_product_attention(columns, columns, columns)
    return einops.rearrange(columns, "(n w) h c -> n c h w", n=N)


def axial_with_axes_confused(net, x):
    rows = einops.rearrange(x, "n c h w -> (n h) w c")
    rows = F.scaled_dot_product_attention(rows, rows, rows)
    return einops.rearrange(rows, "(h n) w c -> n c h w", n=N)


def patches_as_tokens(net, x):
    tokens = einops.rearrange(x, "n c (h a) (w b) -> n (h w) (c a b)", a=3, b=3)
    cls = einops.repeat(net.token, "d -> n 1 d", n=N)
    return torch.cat([cls, tokens], 1) @ net.embed


def coordinates_as_channels(net, x):
    line = torch.linspace(-1, 1, 6)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij"))
    return net.with_grid(torch.cat([x, grid.expand(N, -1, -1, -1)], 1))


def blurred_pool(net, x):
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, stride=2, groups=3)


def standardised_weights(net, x):
    w = net.conv.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
    return F.conv2d(x, w, net.conv.bias)


def masked_kernel(net, x):
    mask = torch.ones(3, 3)
    mask[1, 1:] = 0
    mask[2] = 0
    return F.conv2d(x, net.conv.weight * mask, padding=1)


def response_norm(net, x):
    """Channels by their share of the norm (ConvNeXt V2)."""
    size = x.norm(dim=(2, 3), keepdim=True)
    return x * (size / (size.mean(1, keepdim=True) + 1e-6)) + x


def position_moments(net, x):
    h = net.conv(x)
    mean, spread = h.mean(1, keepdim=True), h.std(1, keepdim=True)
    return (h - mean) / (spread + 1e-5) * mean


def channel_attention(net, x):
    y = x.mean((2, 3))[:, None]
    return x * F.conv1d(y, net.line, padding=1)[:, 0, :, None, None].sigmoid()


def by_flow(net, x):
    """An image sampled where its own flow points."""
    line = torch.linspace(-1, 1, 6)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    flow = net.flow(x).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid + 0.1 * flow, align_corners=True)


def fourier_operator(net, x):
    """A few modes multiplied by complex weights, written into zeros (FNO)."""
    modes = torch.fft.rfft2(x)
    out = torch.zeros(N, 3, 6, 4, dtype=torch.complex64)
    spectral = torch.view_as_complex(net.spectral)
    out[:, :, :2, :2] = torch.einsum("nixy,ioxy->noxy", modes[:, :, :2, :2], spectral)
    out[:, :, -2:, :2] = torch.einsum("nixy,ioxy->noxy", modes[:, :, -2:, :2], spectral)
    return torch.fft.irfft2(out, s=(6, 6))


def invertible_mixing(net, x):
    w = torch.linalg.qr(net.mixing)[0]
    return F.conv2d(x, w[:, :, None, None]), torch.linalg.slogdet(w)[1].expand(N)


def squeezed(net, x):
    h = F.pixel_unshuffle(x, 2)
    a, b = h.chunk(2, 1)
    return torch.cat([a, b * a.tanh().exp()], 1)


def deviation_of_the_batch(net, x):
    """The deviation over groups of the batch as one more channel (StyleGAN)."""
    y = x.view(3, 2, 1, 3, 6, 6)
    y = (y - y.mean(0)).square().mean(0).add(1e-8).sqrt().mean((2, 3, 4))
    return torch.cat([x, y[:, :, None, None].repeat(3, 1, 6, 6)], 1)


def deviation_of_the_whole_batch(net, x):
    spread = x.std(0, correction=0).mean()
    return torch.cat([net.conv(x), spread.expand(N, 1, 4, 4)], 1)


def evolved_norm(net, x):
    """The larger of the batch's deviation and the sample's (EvoNorm B0)."""
    batch = x.var((0, 2, 3), keepdim=True).add(1e-5).sqrt()
    own = x.var((2, 3), keepdim=True).add(1e-5).sqrt()
    return x / torch.maximum(batch, 0.5 * x + own)


def switched_norm(net, x):
    weights = net.switch.softmax(0)
    own, layer, batch = x.mean((2, 3), True), x.mean((1, 2, 3), True), x.mean((0, 2, 3), True)
    return x - weights[0] * own - weights[1] * layer - weights[2] * batch


def half_instance_half_batch(net, x):
    a, b = x.split([1, 2], 1)
    return torch.cat([F.instance_norm(a), net.two(b)], 1)


def blended_styles(net, x):
    """Moments blended with those of another sample (MixStyle)."""
    mean, spread = x.mean((2, 3), True), x.std((2, 3), keepdim=True)
    other = torch.arange(N).flip(0)
    return (x - mean) / spread * (0.5 * spread + 0.5 * spread[other]) + mean[other]


def patch_of_another(net, x):
    """A box of each image comes from another one (CutMix)."""
    h = x.clone()
    h[:, :, 1:4, 2:5] = x.roll(1, 0)[:, :, 1:4, 2:5]
    return net.conv(h)


def shared_crop(net, x):
    top, left = torch.randint(0, 3, (2,)).tolist()
    return net.conv(x[:, :, top : top + 4, left : left + 4])


IMAGES = {
    "linear": lambda: None,
    "kernels": conv(3, 9, padding=1),
    "share": linear(3, 2),
    "bank": weight(2, 4, 3, 3, 3),
    "token": weight(27),
    "embed": weight(27, D),
    "with_grid": conv(5, 2),
    "conv": conv(),
    "line": weight(1, 1, 3),
    "flow": conv(3, 2, padding=1),
    "spectral": weight(3, 3, 2, 2, 2),
    "mixing": weight(3, 3),
    "switch": weight(3),
    "two": lambda: nn.BatchNorm2d(2),
}
table(
    SIMD,
    {
        "a kernel for each pixel": involution,
        "kernels mixed by the sample": mixed_kernels,
        "kernels mixed by the sample, by vmap": mixed_kernels_by_vmap,
        "attention along rows and columns": axial,
        "patches as tokens": patches_as_tokens,
        "coordinates as channels": coordinates_as_channels,
        "a blurred pool": blurred_pool,
        "standardised weights": standardised_weights,
        "a masked kernel": masked_kernel,
        "response norm": response_norm,
        "moments of each position": position_moments,
        "attention over channels": channel_attention,
        "sampled by its own flow": by_flow,
        "a Fourier operator": fourier_operator,
        "invertible mixing of channels": invertible_mixing,
        "squeezed, and coupled": squeezed,
        "a crop that is the same for all": shared_crop,
    },
    IMAGE,
    accept_unknown=True,
    **IMAGES,
)
table(
    STATISTICS,
    {
        "the deviation of the batch as a channel": deviation_of_the_whole_batch,
        "an evolved norm": evolved_norm,
        "a switched norm": switched_norm,
        "half instance norm, half batch norm": half_instance_half_batch,
    },
    IMAGE,
    accept_unknown=True,
    **IMAGES,
)
table(
    GROUPS,
    {"the deviation of groups as a channel": deviation_of_the_batch},
    IMAGE,
    accept_unknown=True,
    **IMAGES,
)
table(
    MIXED,
    {
        "axes confused on the way back": axial_with_axes_confused,
        "styles of others": blended_styles,
        "a patch of another image": patch_of_another,
    },
    IMAGE,
    accept_unknown=True,
    **IMAGES,
)
