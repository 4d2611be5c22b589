"""A question of one process keeps no other waiting: what needs them is refused before it runs, and
training goes on.

Two processes talk through gloo. One of them asks, the other does not; should a question wait for it
after all, the group gives up after ``PATIENCE``, and the test fails.
"""

import copy
import datetime
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import unbatch as ub

PATIENCE = datetime.timedelta(seconds=60)
N, D, C = 6, 4, 3


class Forth(torch.autograd.Function):
    """The sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Forth.apply(grad)


class Back(torch.autograd.Function):
    """Nothing but a sum of the gradients of all processes, as in tensor parallelism."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Forth.apply(grad)


class Centred(nn.Module):
    """By the mean over the samples of all processes, as in SyncBatchNorm, which needs an
    accelerator.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x - Forth.apply(x.mean(0)) / dist.get_world_size() if self.training else x


class SummedBack(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Back.apply(x)


class OwnParallel(DistributedDataParallel):
    """Not taken off, because it might do more; sends its buffers around."""


def plain(between: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), between or nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, C))


def spread() -> nn.Module:
    from torch.distributed.tensor import distribute_module, init_device_mesh

    return distribute_module(plain(nn.Tanh()), init_device_mesh("cpu", (2,)))


def sharded() -> nn.Module:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    return fully_shard(plain(nn.Tanh()), mesh=init_device_mesh("cpu", (2,)))


def contrastive(p: Tensor, y: Tensor) -> Tensor:
    every = [torch.zeros_like(p) for _ in range(dist.get_world_size())]
    dist.all_gather(every, p.detach())
    return (p @ torch.cat(every).T).logsumexp(1).mean()


def data(seed: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=made), torch.randint(C, (N,), generator=made)


Made = Callable[[], nn.Module]
REFUSED: dict[str, tuple[Made, Callable[[nn.Module], Any]]] = {
    "statistics of all": (lambda: plain(Centred()), lambda net: problem_of(net).structure),
    "statistics of all, wrapped": (
        lambda: DistributedDataParallel(plain(Centred())),
        lambda net: problem_of(net).gradients(),
    ),
    "a loss over all": (plain, lambda net: ub.Problem(net, contrastive, data(0)).ggn()),
    "in the backward pass": (lambda: plain(SummedBack()), lambda net: problem_of(net).gradients()),
    "a wrapper of one's own": (
        lambda: OwnParallel(plain()),
        lambda net: problem_of(net).crosstalk(),
    ),
    "parameters spread": (spread, lambda net: problem_of(net).gradient()),
    "parameters sharded": (sharded, lambda net: problem_of(net).structure),
}


def problem_of(net: nn.Module) -> ub.Problem:
    return ub.Problem(net, F.cross_entropy, data(0))


def trained(net: nn.Module, monitor: ub.Monitor | None) -> nn.Module:
    """Three steps of this process, on data of its own."""
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(3):
        X, y = data(10 * seed + dist.get_rank())
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        if monitor is not None:
            monitor.step(X, y)
        optimizer.step()
    return net


def compared(between: nn.Module) -> dict[str, Any]:
    """Training with a monitor in the first process, and without."""
    net = plain(between)
    twin, quantities = copy.deepcopy(net), ["trace"]
    monitor = (
        ub.Monitor(net, F.cross_entropy, quantities=quantities, every=1)
        if dist.get_rank() == 0
        else None
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(net, monitor)
    trained(twin, None)
    pairs = zip(net.state_dict().values(), twin.state_dict().values(), strict=True)
    told = [str(w.message) for w in caught if w.category is ub.MonitorWarning]
    line = monitor.last if monitor is not None else {}
    return {"same": all(torch.equal(a, b) for a, b in pairs), "told": told, "line": line}


def process(rank: int, folder: str) -> None:
    """What each of the two does; the answers of the first are written to a file."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=PATIENCE)
    torch.manual_seed(0)
    nets = {name: make() for name, (make, _) in REFUSED.items()}  # by both together
    found: dict[str, Any] = {}
    if rank == 0:
        found = {name: refusal(ask, nets[name]) for name, (_, ask) in REFUSED.items()}
    found |= {
        f"training, {type(between).__name__}": compared(between)
        for between in (nn.BatchNorm1d(5), Centred())
    }
    if rank == 0:
        evaluated = problem_of(plain(Centred()).eval())
        found["in eval"] = evaluated.structure.independent_forward.status
        with open(f"{folder}/found.json", "w", encoding="utf-8") as file:
            json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def refusal(ask: Callable[[nn.Module], Any], net: nn.Module) -> str:
    try:
        ask(net)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "answered"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_wait_is_refused(found, name):
    assert found[name].startswith(
        "CaptureError: The model or the loss communicates with other processes"
    )


def test_the_place_is_named(found):
    assert "c10d.allreduce_.default in 1 at" in found["statistics of all"]
    assert "test_processes.py:" in found["statistics of all"]


def test_nothing_waits_after_eval(found):
    assert found["in eval"] == "holds"


def test_a_monitor_in_one_process_leaves_training_as_it_is(found):
    answered, refused = found["training, BatchNorm1d"], found["training, Centred"]
    assert answered["same"]
    assert refused["same"]
    assert "value" in answered["line"]["quantities"]["trace"]
    assert answered["told"] == []
    assert refused["line"]["error"].startswith(
        "CaptureError: The model or the loss communicates with other processes"
    )
    assert len(refused["told"]) == 1


def test_alone_there_is_nobody_to_wait_for(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        assert problem_of(plain(Centred())).gradients().kind
    finally:
        dist.destroy_process_group()
