"""Who this process is among its peers, which device it has, and sums over all of them.

A mesh of one process answers every call too: nothing outside this folder asks how many processes there are in order
to do something else.
"""

import contextlib
import importlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from regpt.errors import UsageError
from regpt.parallel.meeting import agree_on_name
from regpt.parallel.pulse import Pulse, watched
from regpt.parallel.reduce import sum_in_buckets
from regpt.parallel.repeatable import ENVIRONMENT, repeatable

HANG_SECONDS = 600.0  # a process that waits longer for the others waits in vain
MOST_PROCESSES, LAST_PORT = 1 << 20, 65535
STORE_TIMEOUT = timedelta(seconds=30)  # to say how a process is, and to hear of others
USE_LIBUV = os.name == "posix"  # PyTorch's wheels for Windows are built without it, and then TCPStore raises
BACKEND_TIMEOUT = timedelta(days=7)  # of NCCL and gloo, which take a slow disk for a hang; `parallel.pulse` does not


@dataclass(frozen=True)
class Mesh:
    """The processes of one run. `rank` counts them from 0; `device` is this process's own."""

    rank: int
    world_size: int
    device: torch.device
    pulse: Pulse = field(default_factory=Pulse, compare=False)

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """`x`, on this process's device or the CPU, summed over all processes, in place."""
        if self.world_size > 1:
            with self.pulse.waiting("a sum over all processes"):
                dist.all_reduce(x)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest `x` of all processes, in place."""
        if self.world_size > 1:
            with self.pulse.waiting("the largest of several numbers"):
                dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return x

    def total(self, x: Tensor) -> Tensor:
        """`x`, which is on the CPU, summed over all processes: on the CPU, the same in each."""
        if self.world_size == 1:
            return x
        with self.pulse.waiting("a sum of results"):
            return self.sum(x.to(self.device)).cpu()

    def any(self, flag: bool) -> bool:
        """True in every process when `flag` is true in one of them; waits for all, but not for their devices."""
        with self.pulse.waiting("a common decision"):
            return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, data: bytes) -> list[bytes]:
        """`data` of every process, by rank, in all of them."""
        parts = [data] * self.world_size
        if self.world_size > 1:
            with self.pulse.waiting("data of every process"):
                dist.all_gather_object(parts, data)
        return parts

    def smallest(self, number: int) -> int:
        """The smallest of the numbers that the processes give."""
        x = torch.tensor(number)
        if self.world_size > 1:
            with self.pulse.waiting("the smallest of several numbers"):
                dist.all_reduce(x, op=dist.ReduceOp.MIN)
        return int(x)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its sum (not its mean) over all processes."""
        if self.world_size > 1:
            with self.pulse.waiting("the sum of the gradients"):
                sum_in_buckets([p.grad for p in parameters if p.grad is not None], dist.all_reduce)

    def wait(self) -> None:
        """Return when every process has come here."""
        self.any(False)


def under_launcher() -> bool:
    """True in a process that torchrun (or --nproc) started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_rank() -> int:
    """Rank that the launcher gave this process, 0 without one."""
    return launcher_number("RANK", 0, most=launcher_world_size() - 1) if under_launcher() else 0


def launcher_world_size() -> int:
    """Number of processes that the launcher started, 1 without one."""
    return launcher_number("WORLD_SIZE", 1) if under_launcher() else 1


def launcher_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment of one of `processes` processes on this machine, whose launcher has a store at `port`."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True}
    ours = {name: str(value) for name, value in (numbers | place).items()}
    return {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"} | os.environ | ours  # the first as torchrun does


def launcher_restarts() -> int:
    """How often torchrun (`--max-restarts`) has started this group of processes again."""
    return launcher_number("TORCHELASTIC_RESTART_COUNT", 0, default=0)


def launcher_number(name: str, least: int, most: int = MOST_PROCESSES, default: int | None = None) -> int:
    """The number that the launcher put into the environment variable `name`.

    Raises:
        UsageError: it is missing and has no default, is no whole number, or is not from `least` to `most`.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        given = "is missing" if text is None else f"is {text!r}"
        raise UsageError(
            f"the environment variable {name} {given}, must be a whole number from {least} to {most}, as torchrun sets "
            "it; start with torchrun or --nproc, or unset RANK and WORLD_SIZE for one process"
        )
    return number


@contextlib.contextmanager
def open_mesh(
    device_name: str = "auto", *, deterministic: bool = False, hang_seconds: float = HANG_SECONDS
) -> Iterator[Mesh]:
    """The mesh that torchrun's environment describes, one process without it; NCCL on GPUs, gloo elsewhere.

    `deterministic`: what is computed in it is bitwise the same in the next one (see `parallel.repeatable`).
    A process that waits `hang_seconds` for the others says for which of them, and ends (see `parallel.pulse`).

    Raises:
        UsageError: a device that this machine does not have.
    """
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ} if deterministic else {}
    os.environ.update(ours)
    try:
        with repeatable(deterministic), joined(device_name, hang_seconds) as mesh:
            yield mesh
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextlib.contextmanager
def joined(device_name: str, hang_seconds: float) -> Iterator[Mesh]:
    rank, world_size = launcher_rank(), launcher_world_size()
    device = choose_device(device_name, index=launcher_number("LOCAL_RANK", 0, default=0) if under_launcher() else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not under_launcher():
        yield Mesh(0, 1, device)
        return
    if device.type == "mps":
        raise UsageError("several processes cannot share the MPS device; use --train.device cpu, or one process")
    launcher_address()  # wrong: say so before anything waits
    if device.type == "cpu":
        share_cores(launcher_number("LOCAL_WORLD_SIZE", 1, default=1))
    # Functions of this module keep the process group of the time of its import as a default (torch 2.13). Imported
    # later, by an optimizer say, it would hold ours: gloo's threads would outlive it and abort an ending process.
    importlib.import_module("torch.distributed.nn")
    name, place = "", {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):  # the launcher has one; otherwise rank 0 makes one
        name = agree_on_name(meeting_point(), rank, world_size, hang_seconds)
        place = {"store": meeting_point(name, BACKEND_TIMEOUT), "rank": rank, "world_size": world_size}
    mesh = Mesh(rank, world_size, device)
    with watched(mesh.pulse, rank, world_size, lambda: meeting_point(name), hang_seconds):
        with mesh.pulse.waiting("the beginning of all processes"):
            # On GPUs both: what the ranks agree on besides gradients goes through the CPU, and waits for no
            # kernel.
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=BACKEND_TIMEOUT, **place)
        try:
            yield mesh
        finally:
            with mesh.pulse.waiting("the end of all processes"):  # NCCL finishes what was begun
                dist.destroy_process_group()


def meeting_point(name: str = "", timeout: timedelta = STORE_TIMEOUT) -> TCPStore | PrefixStore:
    """A connection of its own to the launcher's store, or to the corner of it that is this group's alone."""
    address, port = launcher_address()
    how = {"is_master": False, "wait_for_workers": False, "use_libuv": USE_LIBUV}
    store = TCPStore(address, port, timeout=timeout, **how)
    return PrefixStore(name, store) if name else store


def launcher_address() -> tuple[str, int]:
    """Host and port of the launcher's store."""
    if not os.environ.get("MASTER_ADDR"):
        raise UsageError(
            "the environment variable MASTER_ADDR is missing or empty, must be the host of rank 0; use torchrun"
        )
    return os.environ["MASTER_ADDR"], launcher_number("MASTER_PORT", 0, most=LAST_PORT)


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
