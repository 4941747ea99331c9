"""How much memory there is for a step, and how much it took at its peak: on CUDA, on MPS, on the CPU."""

from dataclasses import dataclass
from pathlib import Path

import psutil
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


def capacity(device: torch.device, processes: int) -> Capacity:
    """Memory of `device`, with caches freed; `processes` share the memory of a CPU."""
    free_memory(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
        return Capacity(held, held + free - int(DEVICE_SHARE_FREE * total))
    if device.type == "mps":
        limit = int((1 - MPS_SHARE_FREE) * torch.mps.recommended_max_memory())
        return Capacity(torch.mps.driver_allocated_memory(), limit)
    return Capacity(0, int((1 - CPU_SHARE_FREE) * available_memory()) // processes)


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
