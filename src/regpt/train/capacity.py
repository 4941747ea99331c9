"""How much memory there is for a step, and how much it took at its peak: on CUDA, on MPS, on the CPU."""

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from regpt.train.memory import free_memory

DEVICE_SHARE_FREE = 0.04  # of a GPU: what fragments, and what libraries take when they first need it
MPS_SHARE_FREE = 0.2  # of what macOS recommends at most: the screen and other programs live there too
CPU_SHARE_FREE = (
    0.5  # of the memory that is free when a run starts: it is everybody's, and swapping is worse than small
)


@dataclass(frozen=True)
class Capacity:
    """Bytes that this process held before a step, and may hold at its peak."""

    held: int
    limit: int


def capacity(device: torch.device, processes: int) -> Capacity | None:
    """What there is on `device`, caches given back; `processes` share the memory of a CPU. None where nothing tells."""
    free_memory(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        return Capacity(held, held + free - int(DEVICE_SHARE_FREE * total))
    if device.type == "mps":
        limit = int((1 - MPS_SHARE_FREE) * torch.mps.recommended_max_memory())
        return Capacity(torch.mps.driver_allocated_memory(), limit)
    free = available_memory()
    return None if free is None else Capacity(0, int((1 - CPU_SHARE_FREE) * free) // processes)


def start_counting(device: torch.device) -> None:
    """The peak from here on is what `peak_bytes` tells."""
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes held on a GPU since `start_counting`, the allocator's own included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return torch.mps.driver_allocated_memory()  # it keeps what it has taken until it is told to give it back


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """A context in which the bytes that forward keeps for backward are counted, each memory once, weights left out."""

    def __init__(self, weights: list[Tensor]):
        self.seen = {w.untyped_storage().data_ptr() for w in weights}
        self.bytes = 0
        super().__init__(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def available_memory() -> int | None:
    """Bytes that this process could take without swapping; None where the system does not tell."""
    found = [n for n in (free_of_system(), free_of_container()) if n is not None]
    return min(found, default=None)


def free_of_system() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        line = next((x for x in meminfo.read_text(encoding="utf-8").splitlines() if x.startswith("MemAvailable:")), "")
        return int(line.split()[1]) * 1024 if line else None
    if sys.platform == "win32":
        return free_of_windows()
    if sys.platform == "darwin":  # which does not count what its caches would give back: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def free_of_container() -> int | None:
    """What the control group (version 2) still allows; None outside of one, or without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        used = (folder / "memory.current").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None


def free_of_windows() -> int | None:
    """`ullAvailPhys` of GlobalMemoryStatusEx: two 32-bit numbers, then 64-bit ones, of which it is the second."""
    status = (ctypes.c_uint64 * 8)()
    ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
    kernel = getattr(ctypes, "windll").kernel32  # noqa: B009 (exists on Windows only)
    return int(status[2]) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
