"""A copy of named tensors as they are at one moment, taken while training waits as shortly as possible.

On a GPU the tensors are first copied on the device, at the speed of its memory; training goes on, and a second stream
brings the copy into page-locked memory of the host, which is kept for the next time. Where the device has no room for
the copy, training waits until the tensors are on the host.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from regpt.errors import UserError

ALIGNMENT = 16  # bytes between the starts of tensors in a buffer: the largest type has 16
SPARE_BYTES = 1 << 30  # of a device, left to the training step beside the copy


@dataclass
class HostMemory:
    """Page-locked memory that is used again by every snapshot of the same size; none on a machine without CUDA."""

    buffer: Tensor | None = None

    def views(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the same shapes and types as `like`, in one page-locked buffer."""
        size = packed_bytes(like)
        if self.buffer is None or self.buffer.numel() < size:
            self.buffer = None  # before the next one is there
            self.buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return views_of(self.buffer, like)


@dataclass
class Snapshot:
    """Copies of tensors, on the device or on the host already.

    Attributes:
        via: `device` when they were copied there first, else `host`.
        largest: the largest absolute value of all tensors, a scalar; not finite when one of them is not.
    """

    tensors: dict[str, Tensor]
    via: str
    largest: Tensor
    memory: HostMemory = field(default_factory=HostMemory)

    def on_host(self) -> dict[str, Tensor]:
        """The copies in host memory; may be called in another thread.

        Raises:
            UserError: a tensor holds a number that is not finite.
        """
        device = self.largest.device
        if self.via == "device":
            with torch.cuda.device(device), torch.cuda.stream(copying_stream(device)):
                host = self.memory.views(self.tensors)
                for name, tensor in self.tensors.items():
                    host[name].copy_(tensor, non_blocking=True)
                torch.cuda.current_stream(device).synchronize()
            self.tensors = host  # gives the device its memory back
        if not math.isfinite(self.largest.item()):
            raise UserError(f"{not_finite(self.tensors)!r} holds numbers that are not finite, so it was not saved")
        return self.tensors


@lru_cache
def copying_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all snapshots: torch has 32 in turn, so a new one each time would some day be one that another uses."""
    return torch.cuda.Stream(device)


def take_snapshot(tensors: Mapping[str, Tensor], memory: HostMemory) -> Snapshot:
    """Copies of `tensors`, complete when this returns: what happens to the originals then does not touch them."""
    first = next(iter(tensors.values()), torch.zeros(0))
    largest = largest_value(tensors, first.device)
    if first.device.type != "cuda":
        return Snapshot({name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}, "host", largest)
    size = packed_bytes(tensors)
    if size + SPARE_BYTES <= torch.cuda.mem_get_info(first.device)[0]:
        copies, via = views_of(torch.empty(size, dtype=torch.uint8, device=first.device), tensors), "device"
    else:
        copies, via = memory.views(tensors), "host"
    for name, tensor in tensors.items():
        copies[name].copy_(tensor.detach(), non_blocking=True)
    torch.cuda.synchronize(first.device)
    return Snapshot(copies, via, largest, memory)


def largest_value(tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """The largest absolute value, a scalar on `device`; NaN when there is one."""
    values = [tensor.detach() for tensor in tensors.values() if tensor.numel()]
    return torch.nn.utils.get_total_norm(values, norm_type=math.inf) if values else torch.zeros((), device=device)


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a NaN or an infinity in it."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), "")


def packed_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(padded(tensor.nbytes) for tensor in tensors.values())


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def views_of(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in `buffer` (bytes,), one behind the other, of the shapes and types of `like`."""
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += padded(tensor.nbytes)
    return views
