"""Models with outputs in which no axis divides what belongs to samples, and their Gauss-Newton
matrix by its definition.

In float64 and at tiny sizes. Batch norms make a case another one in train mode.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

N, M, D, C = 4, 3, 3, 2  # samples, points of another set, inputs, outputs


@dataclass(frozen=True)
class JoinedCase:
    """``build`` returns model and inputs; ``loss`` takes what the model returns.

    ``cut``: of a model with its own loss, what that loss is cut at; the model then returns it from
    ``outputs``. ``options``: of the problem. ``parts``: the loss is linear in what has no axis of
    samples, so that the matrix is a sum over samples. ``rows``: some output has an axis.
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]
    loss: Callable[..., Tensor]
    cut: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    parts: bool = False
    rows: bool = True


CASES: list[JoinedCase] = []


def case(name: str, loss: Callable[..., Tensor], **facts: Any) -> Callable:
    """Add a case whose model and inputs the decorated function returns."""

    def add(build: Callable[[], tuple[nn.Module, tuple[Any, ...]]]) -> Callable:
        CASES.append(JoinedCase(name, build, loss, **facts))
        return build

    return add


class Net(nn.Module):
    """Two layers with a batch norm, and a function that makes what is returned with them."""

    def __init__(self, forward: Callable[..., Any], outputs: int = C, norm: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 5), nn.Linear(5, outputs)
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.scale = nn.Parameter(torch.tensor([0.3, -0.2]))
        self.returned = forward

    def layers(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())

    def forward(self, *inputs: Tensor) -> Any:
        return self.returned(self, *inputs)


class WithLoss(Net):
    """The same with its loss inside."""

    def __init__(self, forward: Callable[..., Any], loss: Callable[..., Tensor], **sizes: Any):
        super().__init__(forward, **sizes)
        self.loss = loss

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.returned(self, *inputs))}


def points(*counts: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, D).double() for count in counts)


def labelled(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[1])


# --- several views of each sample, stacked along the batch ----------------------------------------


def stacked(net: Net, *views: Tensor) -> Tensor:
    return net.layers(torch.cat(views))


def nt_xent(z: Tensor) -> Tensor:
    """Of 2N rows, of which n and n + N are two views of one sample."""
    unit = F.normalize(z, dim=1)
    count = len(z) // 2
    similarities = (unit @ unit.T / 0.5).masked_fill(torch.eye(len(z)).bool(), -1e9)
    return F.cross_entropy(similarities, torch.arange(len(z)).roll(count))


@case("two views, squares", lambda z: z.square().sum() / 2, rows=False)
def _() -> Any:
    return Net(stacked), points(N, N)


@case("three views, classes", labelled, rows=False)
def _() -> Any:
    return Net(stacked), points(N, N, N)


@case("two views, contrasted", nt_xent, rows=False)
def _() -> Any:
    return Net(stacked, outputs=3), points(N, N)


@case(
    "two views, in a dict",
    lambda o: nt_xent(o["views"][0]) + o["rest"]["scale"].square().sum(),
    rows=False,
)
def _() -> Any:
    def returned(net: Net, a: Tensor, b: Tensor) -> Any:
        return {"views": [stacked(net, a, b)], "rest": {"scale": net.scale * 2}}

    return Net(returned, outputs=3), points(N, N)


@case("tokens in one axis", labelled, rows=False)
def _() -> Any:
    def returned(net: Net, x: Tensor) -> Tensor:
        return net.layers(x.flatten(0, 1))

    return Net(returned), (torch.randn(N, 2, D).double(),)


@case("triplets with other negatives", lambda o: _triplet(*o), options={"in_dims": ((0, None), 0)})
def _() -> Any:
    def returned(net: Net, x: Tensor, others: Tensor) -> Any:
        return net.layers(x), net.layers(others)

    return Net(returned), points(N, M)


def _triplet(z: Tensor, others: Tensor) -> Tensor:
    distances = (z[:, None] - others[None]).square().sum(-1)
    return F.softplus(z.square().sum(1, keepdim=True) - distances).mean()


# --- points of several kinds, in different numbers ------------------------------------------------


def squares(outputs: Any) -> Tensor:
    return sum(o.square().mean() for o in outputs)


EDGE = {"in_dims": ((0, None), 0)}


@case("inside and on the edge", squares, options=EDGE)
def _() -> Any:
    def returned(net: Net, inside: Tensor, edge: Tensor) -> Any:
        return net.layers(inside), net.layers(edge)

    return Net(returned), points(N, M)


@case("inside and on two edges", squares, options={"in_dims": ((0, None, None), 0)})
def _() -> Any:
    def returned(net: Net, inside: Tensor, left: Tensor, right: Tensor) -> Any:
        return net.layers(inside), net.layers(left), net.layers(right) - 1

    return Net(returned, norm=False), points(N, M, N + 1)


@case("an equation and its edge", squares, options=EDGE)
def _() -> Any:
    def returned(net: Net, inside: Tensor, edge: Tensor) -> Any:
        # u = Σ tanh(Wx + b) v, of which the Laplacian is known.
        h, w = net.first(inside).tanh(), net.first.weight
        curvature = -2 * h * (1 - h.square()) * w.square().sum(1)
        residual = curvature @ net.second.weight.T + net.second(h).square()
        return residual, net.second(net.first(edge).tanh())

    return Net(returned, outputs=1, norm=False), points(N, M)


@case("an equation by derivatives, and its edge", squares, options=EDGE)
def _() -> Any:
    def returned(net: Net, inside: Tensor, edge: Tensor) -> Any:
        with torch.enable_grad():
            x = inside.detach().requires_grad_()
            u = net.layers(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope.sum(1, keepdim=True) + u, net.layers(edge)

    return Net(returned, outputs=1, norm=False), points(N, M)


# --- numbers and parameters beside predictions ----------------------------------------------------


def with_penalty(net: Net, x: Tensor) -> Any:
    return net.layers(x), net.first.weight.square().sum()


@case("a penalty, as it is", lambda o: (o[0] ** 4).mean() + 0.1 * o[1], parts=True)
def _() -> Any:
    return Net(with_penalty), points(N)


@case("a penalty, squared", lambda o: labelled(o[0]) + 0.1 * o[1].square())
def _() -> Any:
    return Net(with_penalty), points(N)


@case("a penalty that scales the loss", lambda o: labelled(o[0]) * o[1])
def _() -> Any:
    return Net(with_penalty), points(N)


@case(
    "a parameter as an output",
    lambda o: (o[0] * (-o[1]).exp()).square().mean() + o[1].sum(),
)
def _() -> Any:
    return Net(lambda net, x: (net.layers(x), net.scale)), points(N)


@case("two towers, and a temperature made of a parameter", lambda o: _contrasted(*o))
def _() -> Any:
    def returned(net: Net, x: Tensor, z: Tensor) -> Any:
        return net.layers(x), net.layers(z), net.scale[0].exp()

    return Net(returned, outputs=3), points(N, N)


def _contrasted(a: Tensor, b: Tensor, temperature: Tensor) -> Tensor:
    return F.cross_entropy(temperature * a @ b.T, torch.arange(len(a)))


@case("an equation with a coefficient that is learned", lambda o: _with_coefficient(*o))
def _() -> Any:
    net = Net(lambda net, x: (net.layers(x), net.coefficient), norm=False)
    net.coefficient = nn.Parameter(torch.tensor(0.7).double())
    return net, points(N)


def _with_coefficient(z: Tensor, coefficient: Tensor) -> Tensor:
    return (z * coefficient).square().mean() + (coefficient - 1) ** 4


@case("a parameter as an output, and noise in the loss", lambda o: _with_noise(*o))
def _() -> Any:
    return Net(lambda net, x: (net.layers(x), net.scale)), points(N)


def _with_noise(z: Tensor, scale: Tensor) -> Tensor:
    # The noise is drawn with a seed of its own, and recorded all the same.
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).double()
    return ((z + noise) * scale).square().mean()


@case("the mean of the predictions", lambda o: labelled(o[0]) + o[1].square().sum())
def _() -> Any:
    def returned(net: Net, x: Tensor) -> Any:
        z = net.layers(x)
        return z, z.mean(0) * 3

    return Net(returned), points(N)


@case("predictions, a view of them, classes and a constant", lambda o: _of_four(*o))
def _() -> Any:
    def returned(net: Net, x: Tensor) -> Any:
        z = net.layers(x)
        return z, z[:, 0].sum(), z.argmax(1), torch.linspace(0, 1, 3).double()

    return Net(returned), points(N)


def _of_four(z: Tensor, total: Tensor, classes: Tensor, grid: Tensor) -> Tensor:
    return F.cross_entropy(z, classes) + (total - grid).square().mean()


# --- outputs that are all shared, and axes that differ --------------------------------------------


@case("moments alone", lambda o: (o[0] - 1).square().sum() + (o[1] * o[0]).sum(), rows=False)
def _() -> Any:
    def returned(net: Net, x: Tensor) -> Any:
        z = net.layers(x)
        return z.mean(0), z.var(0)

    return Net(returned), points(N)


@case("one number for the batch", lambda o: o.exp(), rows=False)
def _() -> Any:
    return Net(lambda net, x: net.layers(x).square().mean()), points(N)


@case("samples on axis 1 of one output", squares, parts=True)
def _() -> Any:
    def returned(net: Net, x: Tensor) -> Any:
        z = net.layers(x)
        return z, torch.cat([z, z.square(), z + 1], 1).T

    return Net(returned), points(N)


@case("samples on axis 1 of one output, mixed", squares)
def _() -> Any:
    def returned(net: Net, x: Tensor) -> Any:
        z = net.layers(x)
        attended = (z @ z.T).softmax(1) @ z
        return z, torch.cat([attended, z.square(), z + 1], 1).T

    return Net(returned), points(N)


# --- models that are run themselves, as their recording has other derivatives ---------------------


class Twice(torch.autograd.Function):
    """Has another derivative than its recording."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


@case("two views, by a derivative of its own", nt_xent, rows=False)
def _() -> Any:
    return Net(lambda net, *views: Twice.apply(stacked(net, *views)), outputs=3), points(N, N)


@case("inside and on the edge, by a derivative of its own", squares, options=EDGE)
def _() -> Any:
    def returned(net: Net, inside: Tensor, edge: Tensor) -> Any:
        return Twice.apply(net.layers(inside)), Twice.apply(net.layers(edge)), net.scale

    return Net(returned), points(N, M)


# --- models that compute their loss ---------------------------------------------------------------


@case("a loss inside, two views", nt_xent, cut=True, rows=False)
def _() -> Any:
    return WithLoss(stacked, nt_xent, outputs=3), points(N, N)


@case("a loss inside, three views", labelled, cut=True, rows=False)
def _() -> Any:
    return WithLoss(stacked, labelled), points(N, N, N)


# --- the definition -------------------------------------------------------------------------------


def dense_ggn(case: JoinedCase, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """Return ``JᵀHJ`` by a backward pass for every entry of all outputs, and double backward."""
    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    output = model.returned(model, *inputs)
    leaves, spec = tree_flatten(output)
    moving = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    entries = torch.cat([leaves[i].flatten() for i in moving])
    J = torch.stack([_gradient(entry, parameters) for entry in entries])

    def joint(flat: Tensor) -> Tensor:
        parts, start = list(leaves), 0
        for i in moving:
            stop = start + leaves[i].numel()
            parts[i] = flat[start:stop].view(leaves[i].shape)
            start = stop
        return case.loss(tree_unflatten(parts, spec))

    H = torch.autograd.functional.hessian(joint, entries.detach())
    return J.T @ H @ J


def _gradient(entry: Tensor, parameters: list[Tensor]) -> Tensor:
    grads = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
    flat = []
    for g, p in zip(grads, parameters, strict=True):
        flat.append(torch.zeros_like(p).flatten() if g is None else g.flatten())
    return torch.cat(flat)
