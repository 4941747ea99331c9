"""Checkpoints written while training continues, one at a time, in a thread.

On a GPU the tensors are first copied on the device, at the speed of its memory; training continues, and a side stream
copies them to page-locked memory of the host, which is kept for the next time. Where the device has no room for the
copy, training waits until the tensors are on the host.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from regpt.checkpoint.best import METRICS, best_step, validation_losses
from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import checkpoint_folder
from regpt.checkpoint.save import Contents, is_intact, kept_steps, prune_checkpoints, save_checkpoint
from regpt.errors import UserError
from regpt.files import sync


@dataclass(frozen=True)
class Saved:
    """One finished save.

    Attributes:
        step: updates that the checkpoint has seen.
        stall_ms: how long training waited.
        write_ms: from then until the checkpoint was on the disk and older ones were gone.
        bytes: of its tensors.
        via: where they were copied first: `device` or `host`.
    """

    step: int
    stall_ms: float
    write_ms: float
    bytes: int
    via: str


class Saver:
    """Saves the checkpoints of one run; use it as a context, which ends when the last one is on the disk.

    `save` returns as soon as the tensors have been copied. When something goes wrong later, `failed` becomes true and
    stays so, and the next `wait` raises what it was. Two saves never overlap. When Ctrl-C ends the context nothing
    waits: the checkpoint that was being written is not there, the ones before it are.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        in_use: Callable[[Path], bool] = lambda folder: False,
        saved: Callable[[], object] = lambda: None,
    ) -> None:
        """`in_use(folder)`: an old checkpoint is not to be deleted yet; `saved()` is called after each save."""
        self.run, self.config, self.in_use, self.saved = run, config, in_use, saved
        self.memory = HostMemory()
        self.known: dict[Path, bool] = {}  # whether a checkpoint is intact: each is read once
        self.thread: threading.Thread | None = None
        self.last_step: int | None = None  # of the save last begun
        self.failed = False
        self.failure: BaseException | None = None
        self.done: list[Saved] = []

    def save(self, contents: Contents, device: torch.device) -> None:
        """Copy the tensors of `contents`, after what was queued on `device`; write them in the background.

        Raises:
            UserError: the save before this one failed.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the update itself is no part of what saving costs
        started = time.perf_counter()
        self.wait()
        self.last_step = contents.state.step
        snapshot = take_snapshot(contents.tensors(), self.memory)
        contents = contents.with_tensors({})  # the originals go on changing
        stall_ms = (time.perf_counter() - started) * 1e3
        self.thread = threading.Thread(target=self.work, args=(contents, snapshot, stall_ms), daemon=True)
        self.thread.start()
        if not self.config.background:
            self.wait()

    def work(self, contents: Contents, snapshot: "Snapshot", stall_ms: float) -> None:
        """Everything after the copy, in the thread."""
        started = time.perf_counter()
        try:
            tensors = snapshot.on_host()
            for rows in self.run.glob("*.jsonl"):
                sync(rows)  # what was said of the steps before reaches the disk first
            step = contents.state.step
            folder = checkpoint_folder(self.run, step)
            save_checkpoint(folder, contents.with_tensors(tensors), self.config.max_file_mib << 20)
            self.known[folder] = True
            self.prune()
            self.saved()
        except BaseException as error:  # raised again by `wait`
            self.failure, self.failed = error, True
            return
        write_ms = (time.perf_counter() - started) * 1e3
        size = sum(tensor.nbytes for tensor in tensors.values())
        if not self.config.background:
            stall_ms += write_ms
        self.done.append(Saved(step, stall_ms, write_ms, size, snapshot.via))

    def prune(self) -> None:
        """Delete the checkpoints that are no longer wanted."""
        last, every = self.config.keep_last, self.config.keep_every
        prune_checkpoints(self.run, last, every, self.is_intact, self.in_use, self.best)

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Those of `steps` whose checkpoints the configuration keeps."""
        return kept_steps(steps, self.config.keep_last, self.config.keep_every, self.best)

    @cached_property
    def losses(self) -> dict[int, float]:
        """Validation loss by step, those of earlier processes too."""
        return validation_losses(self.run / METRICS)

    def best(self, steps: Iterable[int]) -> int | None:
        """The one of `steps` that `checkpoint.keep_best` keeps."""
        return best_step(self.losses, steps) if self.config.keep_best else None

    def is_best_unsaved(self, step: int, loss: float) -> bool:
        """Note a validation; whether it is the lowest so far, and its weights are not in a checkpoint."""
        losses = self.losses | ({step: loss} if math.isfinite(loss) else {})
        self.losses = losses
        there = step == self.last_step or checkpoint_folder(self.run, step).exists()
        return self.best(losses) == step and not there

    def note_step_back(self, step: int) -> None:
        """The run goes on from `step`: later validations do not count."""
        self.losses = {made: loss for made, loss in self.losses.items() if made <= step}

    def is_intact(self, folder: Path) -> bool:
        if folder not in self.known:
            self.known[folder] = is_intact(folder)
        return self.known[folder]

    def wait(self) -> None:
        """Return when nothing is being written; raises what went wrong, once."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def take_done(self) -> list[Saved]:
        """The saves that were finished since the last call."""
        done, self.done = self.done, []
        return done

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception) and self.thread is not None:
            self.thread.join()  # what was begun is finished; its own failure would hide the error


ALIGNMENT = 16  # bytes between the starts of tensors in a buffer: the largest type has 16
SPARE_BYTES = 1 << 30  # of a device, left to the training step next to the copy


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
    """Tensors in `buffer` (bytes,), one after the other, of the shapes and types of `like`."""
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        start += padded(tensor.nbytes)
    return views
