"""Memory of a step: how much there is, how much it took at its peak, and what to do when it runs out."""

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from regpt.errors import UserError

DEVICE_SHARE_FREE = 0.04  # of a GPU: for fragments, and for libraries when they first need it
MPS_SHARE_FREE = 0.2  # of the most that macOS recommends: the screen and other programs need it too
CPU_SHARE_FREE = 0.5  # of the memory that is free when a run starts: others share it, and swapping is worse than small
# CUDA, MPS and PyTorch's CPU allocator (Linux, macOS and Windows word it differently); a library that cannot make its
# workspace; Triton.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Capacity:
    """Bytes that this process held before a step, and may hold at its peak."""

    held: int
    limit: int


def capacity(device: torch.device, processes: int) -> Capacity:
    """Memory of `device`, with caches freed; `processes` share the memory of a CPU."""
    free_memory(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        return Capacity(held, held + free - int(DEVICE_SHARE_FREE * total))
    held = peak_bytes(device)
    if device.type == "mps":
        return Capacity(held, int((1 - MPS_SHARE_FREE) * torch.mps.recommended_max_memory()))
    return Capacity(held, held + int((1 - CPU_SHARE_FREE) * available_memory()) // processes)


def start_counting(device: torch.device) -> None:
    """Begin a new peak for `peak_bytes`, where the device can."""
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes held since `start_counting`, on a GPU the allocator's own included; 0 where nothing counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # it keeps its memory until `free_memory`
    return peak_resident_bytes() or 0


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory that this process has held so far, in GiB: tensors on a GPU; on the CPU the whole process, Python
    and libraries included. None where nothing counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "cpu" and (peak := peak_resident_bytes()) is not None:
        return peak / 2**30
    return None


def peak_resident_bytes() -> int | None:
    """Largest resident set of this process so far; None where the system does not count it."""
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage: on Linux a child's maximum begins with its parent's
        line = next((x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM:")), None)
        return int(line.split()[1]) * 1024 if line else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows


def available_memory() -> int:
    """Bytes that this process could take without swapping."""
    free, limit = psutil.virtual_memory().available, container_limit()
    return free if limit is None else min(free, max(0, limit - container_bytes("memory.current")))


def container_limit() -> int | None:
    """Bytes that the control group (version 2) allows; None outside of one, or without a limit."""
    try:
        return container_bytes("memory.max")
    except (OSError, ValueError):  # no group; "max"
        return None


def container_bytes(name: str) -> int:
    return int((Path("/sys/fs/cgroup") / name).read_text(encoding="utf-8"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that a device or this machine lacks the memory that was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def free_memory(device: torch.device) -> None:
    """Give back unreferenced memory, PyTorch's cache included."""
    gc.collect()  # an exception's frames and their tensors may refer to each other
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # interrupted work may still be writing, on whatever stream
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextlib.contextmanager
def memory_advice(what: str, advice: str) -> Iterator[None]:
    """Turn running out of memory in this context into one sentence that ends the command."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {what}; {advice}") from error
