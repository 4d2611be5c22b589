"""Models whose samples meet where no op of PyTorch is seen: in Python, memory and threads."""

import contextlib
import copy
import ctypes
import io
import math
import pickle
import random
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

import numpy as np
import torch
from torch.distributions import Normal
from torch.nn import functional as F

from cases.hunt.table import table
from cases.models.table import INDEXED, MIXED, SIMD, STATISTICS


def in_thread(net, x):
    h = net.linear(x)
    with ThreadPoolExecutor(1) as pool:
        mean = pool.submit(lambda: h.mean(0)).result()
    return h - mean


def in_plain_thread(net, x):
    h, box = net.linear(x), []
    thread = Thread(target=lambda: box.append(h.detach().amax(0)))
    thread.start()
    thread.join()
    return h - box[0]


def in_thread_in_place(net, x):
    h = net.linear(x).detach()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: h.sub_(h.mean(0))).result()
    return h * net.linear.weight.sum()


def through_torch_save(net, x):
    file = io.BytesIO()
    torch.save(x.mean(0), file)
    file.seek(0)
    return net.linear(x) - torch.load(file)


def through_pickle(net, x):
    return net.linear(x) - pickle.loads(pickle.dumps(x.mean(0)))


def by_ctypes(net, x):
    mean = x.mean().contiguous()
    return net.linear(x) * ctypes.c_float.from_address(mean.data_ptr()).value


def by_storage_bytes(net, x):
    mean = x.mean().clone()
    return net.linear(x) * np.frombuffer(bytes(mean.untyped_storage()), np.float32)[0].item()


def by_dlpack(net, x):
    return net.linear(x) - torch.from_dlpack(x.mean(0))


def by_numpy_dlpack(net, x):
    return net.linear(x) * float(np.from_dlpack(x.mean(0))[0])


def by_buffer(net, x):
    mean = x.mean(0).contiguous().numpy()
    return net.linear(x) - torch.frombuffer(bytearray(mean.tobytes()), dtype=torch.float32)


def printed(net, x):
    return net.linear(x) * float(str(x.mean()).split("(")[1].rstrip(")"))


def formatted(net, x):
    return net.linear(x) * float(f"{x.mean():.3f}")


def percent(net, x):
    return net.linear(x) * float("%.3f" % x.mean())  # noqa: UP031


def cholesky_fails(net, x):
    try:
        torch.linalg.cholesky(x.T @ x - 0.01 * torch.eye(6))
        scale = 1.0
    except RuntimeError:
        scale = 2.0
    return net.linear(x) * scale


def inverse_fails(net, x):
    try:
        torch.linalg.inv(torch.diag(x.mean(0).clamp(min=0)))
        scale = 1.0
    except RuntimeError:
        scale = 2.0
    return net.linear(x) * scale


def raises_and_catches(net, x):
    try:
        if x.mean() > 0:
            raise ValueError
    except ValueError:
        return 2 * net.linear(x)
    return net.linear(x)


def asserts_and_catches(net, x):
    try:
        assert x.mean() > 0.3
    except AssertionError:
        return 2 * net.linear(x)
    return net.linear(x)


def law_refused(net, x):
    try:
        Normal(0.0, x.mean() + 0.5)
    except ValueError:
        return 2 * net.linear(x)
    return net.linear(x)


def row_out_of_range(net, x):
    try:
        net.linear.weight[int((x > 0).sum()) // 3]
    except IndexError:
        return 2 * net.linear(x)
    return net.linear(x)


def lookup_out_of_range(net, x):
    count = (x[:, 0] > 0).sum()[None]
    try:
        F.embedding(count, net.linear.weight[:3])
    except (IndexError, RuntimeError):
        return 2 * net.linear(x)
    return net.linear(x)


def class_out_of_range(net, x):
    labels = (x[:, 0] > 0).sum()[None]
    try:
        F.nll_loss(torch.zeros(1, 4), labels)
    except (IndexError, RuntimeError):
        return 2 * net.linear(x)
    return net.linear(x)


def one_hot_refused(net, x):
    try:
        F.one_hot((x[:, 0] > 0).sum(), 3)
    except RuntimeError:
        return 2 * net.linear(x)
    return net.linear(x)


def draw_refused(net, x):
    try:
        torch.multinomial(x.sum(0), 1)
    except RuntimeError:
        return 2 * net.linear(x)
    return net.linear(x)


def solver_refused(net, x):
    try:
        torch.linalg.eigh(torch.where(x.sum() > 0, math.nan, 1.0) * torch.eye(3))
    except RuntimeError:
        return 2 * net.linear(x)
    return net.linear(x)


table(
    STATISTICS,
    {
        "mean taken in a pool of threads": in_thread,
        "maximum taken in a thread": in_plain_thread,
        "mean subtracted in place in a thread": in_thread_in_place,
        "mean saved and loaded": through_torch_save,
        "mean pickled": through_pickle,
        "mean read at its address": by_ctypes,
        "mean read from the bytes of its memory": by_storage_bytes,
        "mean over dlpack": by_dlpack,
        "mean over dlpack to numpy": by_numpy_dlpack,
        "mean through a buffer": by_buffer,
        "mean printed and parsed": printed,
        "mean formatted and parsed": formatted,
        "mean by percent and parsed": percent,
        "mean by deepcopy": lambda n, x: n.linear(x) - copy.deepcopy(x.mean(0)),
        "mean by copy": lambda n, x: n.linear(x) - copy.copy(x.mean(0)),
        "mean made a tensor in a list": lambda n, x: n.linear(x) * torch.tensor([x.mean()]),
        "mean by np.asarray": lambda n, x: n.linear(x) - torch.tensor(np.asarray(x.mean(0))),
        "mean by np.mean of the rows": lambda n, x: (
            n.linear(x) - torch.as_tensor(np.stack([r.numpy() for r in x]).mean(0))
        ),
        "floor of the sum": lambda n, x: n.linear(x) * math.floor(x.sum()),
        "rounded sum": lambda n, x: n.linear(x) * round(x.sum().item(), 1),
        "divmod of the sum": lambda n, x: n.linear(x) * divmod(x.sum().item(), 2.0)[1],
        "real part of the sum": lambda n, x: n.linear(x) * complex(x.sum()).real,
        "largest of a list": lambda n, x: n.linear(x) * max(x[:, 0].tolist()),
        "sum of sorted numbers": lambda n, x: n.linear(x) * sum(sorted(x[:, 0].tolist())[:2]),
        "length of a range": lambda n, x: n.linear(x) * len(range((x[:, 0] > 0).sum())),
        "a slice up to a count": lambda n, x: n.linear(x) * torch.ones(6)[: (x > 0).sum()].sum(),
        "a list at a count": lambda n, x: n.linear(x) * [*range(7)][(x[:, 0] > 0).sum()],
        "a dict at a count": lambda n, x: n.linear(x) * {3: 3.0}.get(int((x[:, 0] > 0).sum()), 1.0),
        "a string times a count": lambda n, x: n.linear(x) * len("a" * int((x[:, 0] > 0).sum())),
        "an arange up to a count": lambda n, x: n.linear(x) * torch.arange((x > 0).sum()).sum(),
        "repeated by a count": lambda n, x: n.linear(x) * torch.ones(2).repeat((x > 0).sum()).sum(),
        "zeros by a count": lambda n, x: n.linear(x) * torch.zeros((x > 0).sum()).shape[0],
        "a clamp at the mean": lambda n, x: n.linear(x).clamp(max=x.mean().item()),
        "dropout at the rate of a mean": lambda n, x: (
            n.linear(x) * F.dropout(torch.ones(()), x.mean().sigmoid().item())
        ),
        "alpha of an addition": lambda n, x: torch.add(n.linear(x), x, alpha=x.mean().item()),
        "number of distinct values": lambda n, x: n.linear(x) * len((x > 0).long().sum(1).unique()),
        "number of non-zeros": lambda n, x: n.linear(x) * (x > 0).nonzero().shape[0],
        "rows of a selection": lambda n, x: n.linear(x) * x[x[:, 0] > 0].size(0),
        "elements of a selection": lambda n, x: n.linear(x) * x[x > 0].numel(),
        "pieces of a selection": lambda n, x: n.linear(x) * len(x[x > 0].split(2)),
        "rows unbound of a selection": lambda n, x: n.linear(x) * len(x[x[:, 0] > 0].unbind()),
        "loop over a selection": lambda n, x: n.linear(x) * sum(1 for _ in x[x[:, 0] > 0]),
        "selection zipped": lambda n, x: n.linear(x) * len(list(zip(x, x[x > 0], strict=False))),
        "stride of a selection": lambda n, x: (
            n.linear(x) * x.T[:, x[:, 0] > 0].contiguous().stride(0)
        ),
        "bytes of a selection": lambda n, x: n.linear(x) * x[x > 0].nbytes,
        "length of a selection's memory": lambda n, x: (
            n.linear(x) * x[x > 0].untyped_storage().nbytes()
        ),
        "torch.equal of halves": lambda n, x: n.linear(x) * torch.equal(x > 9, x > 8),
        "allclose of halves": lambda n, x: (
            n.linear(x) * (1 + torch.allclose(x.sum(0), x.amax(0), 9))
        ),
        "truth of any": lambda n, x: n.linear(x) * (2 if (x > 2).any() else 1),
        "a number in a tensor": lambda n, x: n.linear(x) * (2 if 0 in (x > 0).sum(0) else 1),
        "is_nonzero": lambda n, x: n.linear(x) * (x > 1.5).any().is_nonzero(),
        "and of two truths": lambda n, x: n.linear(x) * bool(x.mean() > 0 and x.amax() > 1),
        "weights of a choice": lambda n, x: (
            n.linear(x) * random.Random(0).choices([1.0, 2.0], [x[0:].exp().sum().item(), 50.0])[0]
        ),
        "a Cholesky factor that fails": cholesky_fails,
        "an inverse that fails": inverse_fails,
        "an error raised and caught": raises_and_catches,
        "an assertion caught": asserts_and_catches,
        "a law that refuses its scale": law_refused,
        "a row out of range": row_out_of_range,
        "a lookup out of range": lookup_out_of_range,
        "a class out of range": class_out_of_range,
        "a one-hot that refuses": one_hot_refused,
        "a draw that refuses": draw_refused,
        "a solver that refuses": solver_refused,
    },
    accept_unknown=True,
)


# ---------------------------------------------------------------- writes that are no ops


def data_exchanged(net, x):
    h = net.linear(x)
    h.data = h.data - h.data.mean(0)
    return h


def data_flipped(net, x):
    h = net.linear(x)
    h.data = h.data.flip(0)
    return h


def data_exchanged_and_used(net, x):
    h = net.linear(x)
    h.data = h.data.flip(0)
    return h * 2


def data_of_a_view(net, x):
    h = net.linear(x).detach().clone()
    row = h[0]
    row.data = h[1]
    row += h[2]
    return h * net.linear.weight.sum()


def data_exchanged_back(net, x):
    h = net.linear(x)
    kept = h.data
    h.data = h.data.flip(0)
    h.data = kept
    return h


def data_of_the_input(net, x):
    x.data = x.data - x.data.mean(0)
    return net.linear(x)


def data_by_setattr(net, x):
    h = net.linear(x)
    setattr(h, "data", h.detach().roll(1, 0))  # noqa: B010
    return h


def data_written_later(net, x):
    h, other = net.linear(x), torch.zeros(6, 6)
    h.data = other
    other += x.flip(0)
    return h


def data_of_the_own(net, x):
    h = net.linear(x)
    h.data = h.data * 2
    return h.tanh()


def data_of_another_shape(net, x):
    h = torch.empty(0)
    h.data = net.linear(x).detach().flip(0)
    return h * net.linear.weight.sum()


def data_in_a_tuple(net, x):
    a, b = net.linear(x), x * 1
    a.data, b.data = b.data.flip(0), a.data.flip(0)
    return a, b


def data_of_a_buffer(net, x):
    net.linear.bias.data = x.mean(0)
    return net.linear(x)


def numpy_in_place(net, x):
    h = net.linear(x).detach()
    a = h.numpy()
    a -= a.mean(0)
    return h * net.linear.weight.sum()


def numpy_row_copied(net, x):
    h = net.linear(x).detach()
    h.numpy()[0] = h.numpy()[1]
    return h * net.linear.weight.sum()


def memory_moved(net, x):
    h = net.linear(x).detach()
    ctypes.memmove(h.data_ptr(), h.data_ptr() + 24, 24)
    return h * net.linear.weight.sum()


def storage_copied(net, x):
    h = net.linear(x).detach()
    h.untyped_storage().copy_(h.flip(0).contiguous().untyped_storage())
    return h * net.linear.weight.sum()


def set_to_another(net, x):
    h = net.linear(x).detach()
    h.set_(h.flip(0))
    return h * net.linear.weight.sum()


def set_to_storage(net, x):
    h = net.linear(x).detach()
    out = torch.empty(0).set_(h.untyped_storage(), 0, (6, 6), (6, 1))
    return out * net.linear.weight.sum()


def set_shifted(net, x):
    h = net.linear(x).detach().repeat(2, 1)
    out = torch.empty(0).set_(h.untyped_storage(), 6, (6, 6), (6, 1))
    return out * net.linear.weight.sum()


def transposed_in_place(net, x):
    h = net.linear(x).detach().clone()
    h.t_()
    return h * net.linear.weight.sum()


def as_strided_in_place(net, x):
    h = net.linear(x).detach().clone()
    h.as_strided_((6, 6), (1, 6))
    return h * net.linear.weight.sum()


def rows_swapped(net, x):
    h = net.linear(x)
    h[[0, 1]] = h[[1, 0]]
    return h


def half_added(net, x):
    h = net.linear(x).clone()
    h[::2] += h[1::2]
    return h


def shifted_in_place(net, x):
    h = net.linear(x).clone()
    h[1:] += h[:-1].clone()
    return h


def unbound_zeroed(net, x):
    h = net.linear(x).clone()
    h[2].zero_()
    return h


def view_centred(net, x):
    h = net.linear(x).clone()
    h.T.sub_(h.T.mean(1, keepdim=True))
    return h


def foreach_in_place(net, x):
    h = net.linear(x).clone()
    torch._foreach_sub_([h], [h.mean(0)])
    return h


def out_into_view(net, x):
    h = net.linear(x).detach().clone()
    torch.add(h[1], h[0], out=h[0])
    return h * net.linear.weight.sum()


def real_part_written(net, x):
    z = torch.complex(net.linear(x), x).detach()
    z.real.sub_(z.real.mean(0))
    return z.real * net.linear.weight.sum()


def kept_in_a_class(net, x):
    type(net).kept = x.mean(0)
    return net.linear(x) - type(net).kept


def kept_on_a_tensor(net, x):
    net.linear.weight.kept = x.mean(0)
    return net.linear(x) - net.linear.weight.kept


table(
    STATISTICS,
    {
        "data exchanged for centred data": data_exchanged,
        "data of a bias set to the mean": data_of_a_buffer,
        "data of the input centred": data_of_the_input,
        "centred through numpy": numpy_in_place,
        "centred through a transposed view": view_centred,
        "centred by foreach": foreach_in_place,
        "real parts centred": real_part_written,
        "mean kept in a class": kept_in_a_class,
        "mean kept on a parameter": kept_on_a_tensor,
    },
    accept_unknown=True,
)
table(
    MIXED,
    {
        "data exchanged for flipped data": data_flipped,
        "data flipped and used": data_exchanged_and_used,
        "data of a row exchanged, and written to": data_of_a_view,
        "data rolled by setattr": data_by_setattr,
        "data written to after it was given": data_written_later,
        "data of an empty tensor": data_of_another_shape,
        "data exchanged for that of each other": data_in_a_tuple,
        "one row copied through numpy": numpy_row_copied,
        "one row moved in memory": memory_moved,
        "memory copied from a flipped one": storage_copied,
        "set to a flipped tensor": set_to_another,
        "set to memory, one row on": set_shifted,
        "transposed in place": transposed_in_place,
        "strided otherwise in place": as_strided_in_place,
        "two rows swapped by lists": rows_swapped,
        "odd rows added to even ones": half_added,
        "each row added to the next": shifted_in_place,
        "row zero through out": out_into_view,
    },
    accept_unknown=True,
)
table(
    SIMD,
    {
        "set to its own memory": set_to_storage,
        "data exchanged and given back": data_exchanged_back,
        "data exchanged for its double": data_of_the_own,
    },
    accept_unknown=True,
)
table(INDEXED, {"row two zeroed through a view": unbound_zeroed})


# ---------------------------------------------------------------- errors that are caught, or not


def tries(attempt, errors=Exception):
    """Twice the predictions where an attempt raises an error."""

    def forward(net, x):
        try:
            attempt(net, x)
        except errors:
            return 2 * net.linear(x)
        return net.linear(x)

    return forward


def suppresses(net, x):
    scale = 1.0
    with contextlib.suppress(RuntimeError):
        torch.linalg.inv(x.T @ x)
        scale = 2.0
    return net.linear(x) * scale


def tried_in_a_block(net, x):
    try:
        with torch.no_grad():
            torch.linalg.eigh(x.T @ x)
        scale = 2.0
    except:  # noqa: E722
        scale = 1.0
    return net.linear(x) * scale


def tried_further_up(net, x):
    def count(rows):
        return rows.sum(0).bincount()

    try:
        scale = len(count((x > 0).long()))
    except (RuntimeError, TypeError) as error:
        scale = len(str(error))
    return net.linear(x) * (1 + 0 * scale)


def sizes_that_fit(net, x):
    try:
        x[x[:, 0] > 0] + x[x[:, 0] <= 0]
        scale = 2.0
    except RuntimeError:
        scale = 1.0
    return net.linear(x) * scale


def tried_and_cleaned(net, x):
    try:
        return net.linear(x) @ torch.linalg.inv(net.linear.weight)
    finally:
        net.calls = 1


def tried_with_parameters(net, x):
    try:
        factor = torch.linalg.cholesky(net.linear.weight @ net.linear.weight.T + torch.eye(6))
    except RuntimeError:
        factor = torch.eye(6)
    return net.linear(x) @ factor


def tried_as_a_whole(net, x):
    try:
        return net.linear(x).tanh().softmax(1)
    except RuntimeError:
        return net.linear(x)


def looked_up_in_a_constant_try(net, x):
    try:
        return net.linear(x)[:, torch.tensor([2, 1, 0])]
    except IndexError:
        return net.linear(x)


table(
    STATISTICS,
    {
        "a factor tried": tries(lambda n, x: torch.linalg.cholesky(x.T @ x)),
        "an LU factor tried": tries(lambda n, x: torch.linalg.lu_factor(x.T @ x), RuntimeError),
        "a pseudo-inverse tried": tries(lambda n, x: torch.linalg.pinv(x)),
        "singular values tried": tries(lambda n, x: torch.linalg.svdvals(x)),
        "least squares tried": tries(lambda n, x: torch.linalg.lstsq(x, x)),
        "an addition by index tried": tries(
            lambda n, x: torch.zeros(9).index_add(0, (x > 0).sum(0), x[0])
        ),
        "a put tried": tries(lambda n, x: torch.zeros(9).put((x > 0).sum(0), x[0])),
        "a take tried": tries(lambda n, x: torch.zeros(9).take((x > 0).sum(0))),
        "whole numbers divided, tried": tries(lambda n, x: 6 // (x > 0).sum(0)),
        "Bernoulli numbers tried": tries(lambda n, x: torch.bernoulli(x.abs().mean(0) / 2)),
        "Poisson numbers tried": tries(lambda n, x: torch.poisson(x.mean(0) + 1)),
        "a one-hot tried": tries(lambda n, x: F.one_hot((x > 0).sum(0), 7)),
        "a margin tried": tries(
            lambda n, x: F.multi_margin_loss(torch.zeros(6, 7), (x > 0).sum(0))
        ),
        "bags of rows tried": tries(
            lambda n, x: F.embedding_bag((x > 0).sum(0)[None], torch.zeros(7, 2))
        ),
        "an inverse whose failure is suppressed": suppresses,
        "eigenvalues tried in a block": tried_in_a_block,
        "sizes that fit, tried": sizes_that_fit,
    },
    accept_unknown=True,
)
table(SIMD, {"counts tried further up, unused": tried_further_up}, accept_unknown=True)
table(
    SIMD,
    {
        "an inverse, and cleaning up": tried_and_cleaned,
        "a factor of parameters tried": tried_with_parameters,
        "ordinary ops tried": tried_as_a_whole,
        "a constant lookup tried": looked_up_in_a_constant_try,
    },
)
