"""Models that ask what a number is, and others that leave PyTorch by a side door."""

import array
import bisect
import decimal
import fractions
import heapq
import json
import math
import numbers
import statistics
import struct

import numpy as np
import torch
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import INDEXED, MIXED, SIMD, STATISTICS, N


def is_a_float(net, x):
    v = x.mean().item()
    return net.linear(x) * (v if isinstance(v, float) else 1.0)


def is_an_int(net, x):
    v = (x > 0).sum().item()
    return net.linear(x) * (v if isinstance(v, int) else 1)


def is_real(net, x):
    v = x.mean().item()
    return net.linear(x) * (v if isinstance(v, numbers.Real) else 1.0)


def has_its_class(net, x):
    v = x.mean().item()
    return net.linear(x) * (v if type(v) is float else 1.0)


def matched(net, x):
    match x.mean().item():
        case float(v):
            return net.linear(x) * v
    return net.linear(x)


def has_a_method(net, x):
    v = x.mean().item()
    return net.linear(x) * (v if hasattr(v, "is_integer") else 1.0)


def as_json(net, x):
    try:
        return net.linear(x) * json.loads(json.dumps(x.mean().item()))
    except TypeError:
        return net.linear(x)


def a_method_of_floats(net, x):
    try:
        return net.linear(x) * float.fromhex(x.mean().item().hex())
    except AttributeError:
        return net.linear(x)


def a_scalar_of_numpy(net, x):
    v = x.mean().item()
    return net.linear(x) * (v if np.isscalar(v) else 1.0)


def summed_by_apply(net, x):
    seen = []
    x.clone().apply_(lambda v: seen.append(v) or v)
    return net.linear(x) * sum(seen)


def written_by_apply(net, x):
    h, seen = net.linear(x).detach(), []
    h.apply_(lambda v: seen.append(v) or sum(seen))
    return h * net.linear.weight.sum()


def own_by_apply(net, x):
    h = net.linear(x).detach()
    h.apply_(lambda v: 2 * v)
    return h * net.linear.weight.sum()


def mapped(net, x):
    h = net.linear(x).detach()
    h.map_(h.flip(0).contiguous(), lambda a, b: a + b)
    return h * net.linear.weight.sum()


def scale_of_quantised(net, x):
    q = torch.quantize_per_tensor_dynamic(x, torch.qint8, False)
    return net.linear(x) * q.q_scale()


def quantised_and_back(net, x):
    return net.linear(torch.quantize_per_tensor_dynamic(x, torch.qint8, False).dequantize())


def number_in_the_loss_of_grad(net, x):
    g = torch.func.grad(lambda v: net.linear(v).tanh().mean(0).square().sum())(x)
    return net.linear(x) + g


def compiled(net, x):
    return torch.compile(lambda t: t - t.mean(0), backend="eager")(net.linear(x))


def hooked(net, x):
    h = net.linear(x)
    h.register_hook(lambda g: g - g.mean(0))
    return h


def saved_elsewhere(net, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.flip(0), lambda t: t.flip(0)):
        return net.linear(x).tanh()


def is_leaf(net, x):
    return net.linear(x) * (x.mean(0) if x.requires_grad else 1.0)


def index_fails(net, x):
    try:
        net.linear.weight[(x[:, 0] > 0).sum() + 2]
        scale = 1.0
    except IndexError:
        scale = 2.0
    return net.linear(x) * scale


def gather_fails(net, x):
    try:
        net.linear.bias.gather(0, (x[:, 0] > 0).sum()[None] + 2)
        scale = 1.0
    except (IndexError, RuntimeError):
        scale = 2.0
    return net.linear(x) * scale


def scatter_fails(net, x):
    try:
        torch.zeros(6).scatter(0, (x[:, 0] > 0).sum()[None] + 2, 1.0)
        scale = 1.0
    except (IndexError, RuntimeError):
        scale = 2.0
    return net.linear(x) * scale


def solve_fails(net, x):
    try:
        torch.linalg.solve(torch.diag((x[:, 0].sum() > 0).float().expand(3)), torch.ones(3))
        scale = 1.0
    except RuntimeError:
        scale = 2.0
    return net.linear(x) * scale


def select_fails(net, x):
    try:
        net.linear.weight.index_select(0, (x[:, 0] > 0).sum()[None] + 2)
        scale = 1.0
    except (IndexError, RuntimeError):
        scale = 2.0
    return net.linear(x) * scale


def jitter_until_it_succeeds(net, x):
    """Add to the diagonal until the factor exists, as libraries of Gaussian processes do."""
    gram = x.T @ x - 0.5 * torch.eye(6)
    for jitter in (0.0, 1.0, 10.0, 100.0):
        try:
            torch.linalg.cholesky(gram + jitter * torch.eye(6))
            break
        except RuntimeError:
            continue
    return net.linear(x) * (1 + jitter)


def factor_of_own(net, x):
    h = x[:, :, None] * x[:, None] + torch.eye(6)
    return net.linear(x) * torch.linalg.cholesky(h)[:, 0]


def binary_fails(net, x):
    try:
        F.binary_cross_entropy(x.sum().abs()[None] / 9, torch.ones(1))
        scale = 1.0
    except RuntimeError:
        scale = 2.0
    return net.linear(x) * scale


def split_fails(net, x):
    try:
        torch.ones(6).split((x[:, 0] > 0).long().tolist()[:2])
        scale = 1.0
    except RuntimeError:
        scale = 2.0
    return net.linear(x) * scale


table(
    STATISTICS,
    {
        "a number if it is a float": is_a_float,
        "a number if it is an int": is_an_int,
        "a number if it is real": is_real,
        "a number if it has the class of floats": has_its_class,
        "a number that matches": matched,
        "a number if it has a method": has_a_method,
        "a number as JSON, if it can be": as_json,
        "a number by its hexadecimal, if it has one": a_method_of_floats,
        "a number if numpy takes it for a scalar": a_scalar_of_numpy,
        "a number packed": lambda n, x: (
            n.linear(x) * struct.unpack("f", struct.pack("f", x.mean()))[0]
        ),
        "a number as a decimal": lambda n, x: n.linear(x) * float(decimal.Decimal(float(x.mean()))),
        "a number as a fraction": lambda n, x: (
            n.linear(x) * float(fractions.Fraction(float(x.mean())))
        ),
        "numbers in an array": lambda n, x: n.linear(x) * sum(array.array("f", x[:, 0])),
        "numbers averaged by Python": lambda n, x: n.linear(x) * statistics.fmean(x[:, 0].tolist()),
        "numbers summed exactly": lambda n, x: n.linear(x) * math.fsum(x[:, 0].tolist()),
        "largest of a heap": lambda n, x: n.linear(x) * heapq.nlargest(2, x[:, 0].tolist())[1],
        "place among numbers": lambda n, x: (
            n.linear(x) * bisect.bisect([-1.0, 0.0, 1.0], x.sum().item())
        ),
        "whether a number is finite": lambda n, x: (
            n.linear(x) * math.isfinite(x.exp().exp().sum().item())
        ),
        "numbers made an array": lambda n, x: n.linear(x) * float(np.array(x.tolist()).mean()),
        "sum by apply": summed_by_apply,
        "scale of quantised numbers": scale_of_quantised,
        "quantised by the range of the batch": quantised_and_back,
        "a gradient of the mean in the forward pass": number_in_the_loss_of_grad,
        "compiled mean": compiled,
        "number of entries of a sparse matrix": lambda n, x: (
            n.linear(x) * x.relu().to_sparse()._nnz()
        ),
        "values of a sparse matrix": lambda n, x: n.linear(x) * x.relu().to_sparse().values().sum(),
        "entries of a sparse matrix by row": lambda n, x: (
            n.linear(x) * x.relu().to_sparse_csr().values().numel()
        ),
        "histogram": lambda n, x: n.linear(x) * torch.histogram(x, 4)[0][0],
        "an index that fails": index_fails,
        "a gather that fails": gather_fails,
        "a scatter that fails": scatter_fails,
        "a solver that fails": solve_fails,
        "a selection that fails": select_fails,
        "jitter until a factor exists": jitter_until_it_succeeds,
        "a likelihood that fails": binary_fails,
        "a split that fails": split_fails,
    },
    accept_unknown=True,
)
table(
    MIXED,
    {"sum of those before, by apply": written_by_apply, "mapped with the flipped": mapped},
    accept_unknown=True,
)
table(
    SIMD,
    {
        "doubled by apply": own_by_apply,
        "a hook that centres gradients": hooked,
        "saved elsewhere": saved_elsewhere,
        "a statistic if inputs want gradients": is_leaf,
        "factor of own matrix": factor_of_own,
        "product with a sparse matrix": lambda n, x: (
            torch.sparse.mm(n.linear.weight.to_sparse(), x.T).T
        ),
        "functional call": lambda n, x: torch.func.functional_call(
            n.linear, {"weight": n.linear.weight * 2, "bias": n.linear.bias}, (x,)
        ),
    },
    accept_unknown=True,
)
table(
    INDEXED,
    {
        "a list of Python by index": lambda n, x: torch.stack(
            [r * i for i, r in enumerate(n.linear(x))]
        ),
        "scaled by a reversed loop": lambda n, x: torch.stack(
            [n.linear(x[i]) * (N - i) for i in range(N)]
        ),
    },
)
