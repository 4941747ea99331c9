"""Who this process is among its peers, which device it has, and sums over all of them.

A mesh of one process answers every call too: nothing outside this folder asks how many processes there are in order
to do something else.
"""

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from regpt.errors import UsageError
from regpt.parallel.reduce import sum_in_buckets

TIMEOUT = timedelta(minutes=10)  # a collective that waits longer is a hang


@dataclass(frozen=True)
class Mesh:
    """The processes of one run. `rank` counts them from 0; `device` is this process's own."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """`x`, on this process's device or the CPU, summed over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def total(self, x: Tensor) -> Tensor:
        """`x`, which is on the CPU, summed over all processes: on the CPU, the same in each."""
        if self.world_size == 1:
            return x
        return self.sum(x.to(self.device)).cpu()

    def any(self, flag: bool) -> bool:
        """True in every process when `flag` is true in one of them; waits for all, but not for their devices."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, data: bytes) -> list[bytes]:
        """`data` of every process, by rank, in all of them."""
        if self.world_size == 1:
            return [data]
        sizes = self.sum(
            torch.tensor([len(data) * (rank == self.rank) for rank in range(self.world_size)]).to(self.device)
        )
        width = int(sizes.max())
        mine = torch.zeros(width, dtype=torch.uint8)
        mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        parts = [torch.empty(width, dtype=torch.uint8, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(parts, mine.to(self.device))
        return [bytes(part[:size].tolist()) for part, size in zip(parts, sizes.tolist())]

    def smallest(self, number: int) -> int:
        """The smallest of the numbers that the processes give."""
        x = torch.tensor(number)
        if self.world_size > 1:
            dist.all_reduce(x, op=dist.ReduceOp.MIN)
        return int(x)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum (not its mean) over all processes."""
        if self.world_size > 1:
            sum_in_buckets([p.grad for p in parameters if p.grad is not None], dist.all_reduce)

    def wait(self) -> None:
        """Return when every process has come here."""
        self.any(False)


def under_launcher() -> bool:
    """True in a process that torchrun (or --nproc) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_rank() -> int:
    """Rank that the launcher gave this process, 0 without one."""
    return int(os.environ.get("RANK", "0"))


def launcher_world_size() -> int:
    """Number of processes that the launcher started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def open_mesh(device_name: str = "auto") -> Iterator[Mesh]:
    """The mesh that torchrun's environment describes, one process without it; NCCL on GPUs, gloo elsewhere.

    Raises:
        UsageError: a device that this machine does not have.
    """
    rank, world_size = launcher_rank(), launcher_world_size()
    device = choose_device(device_name, index=int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not under_launcher():
        yield Mesh(0, 1, device)
        return
    if device.type == "mps":
        raise UsageError("several processes cannot share the MPS device; use --train.device cpu, or one process")
    if device.type == "cpu":
        share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    # Functions of this module keep the process group of the time of its import as a default (torch 2.13). Imported
    # later, by an optimizer say, it would hold ours: gloo's threads would outlive it and abort an ending process.
    importlib.import_module("torch.distributed.nn")
    # On GPUs both: what the processes agree on beside the gradients goes through the CPU, and waits for no kernel.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield Mesh(rank, world_size, device)
    finally:
        dist.destroy_process_group()


def share_cores(processes: int) -> None:
    """Give this process its share of the cores; threads that outnumber them spend their time waiting for each other."""
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def choose_device(name: str = "auto", index: int = 0) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU; `index` is the CUDA device of this process.

    Raises:
        UsageError: a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = ", ".join(kind for kind, yes in available.items() if yes)
    if name == "auto":
        name = next(kind for kind, yes in available.items() if yes)
    if not available.get(name, False):
        raise UsageError(f"device {name!r} is not available on this machine; choose from auto, {there}")
    if name != "cuda":
        return torch.device(name)
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"{index + 1} processes need as many CUDA devices and this machine has {torch.cuda.device_count()}; "
            "lower --nproc"
        )
    return torch.device("cuda", index)
