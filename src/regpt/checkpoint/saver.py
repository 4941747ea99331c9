"""Checkpoints written while training continues, one at a time, in a thread.

Training waits until the tensors are copied to host memory: for those of a GPU page-locked, and kept for the next time.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from regpt.checkpoint.best import METRICS, best_step, validation_losses
from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import checkpoint_folder, checkpoints, step_of
from regpt.checkpoint.save import Contents, is_intact, kept_steps, save_checkpoint
from regpt.errors import UserError
from regpt.files import discard, sync


@dataclass(frozen=True)
class Saved:
    """One finished save.

    Attributes:
        step: updates that the checkpoint has seen.
        stall_ms: how long training waited.
        write_ms: from then until the checkpoint was on the disk and older ones were gone.
        bytes: of its tensors.
    """

    step: int
    stall_ms: float
    write_ms: float
    bytes: int


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
        self.pinned: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)  # by the fields of `Contents`
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
        copies = {part: copied_to_host(tensors, self.pinned[part]) for part, tensors in contents.tensors().items()}
        contents = replace(contents, **copies)  # the originals go on changing
        stall_ms = (time.perf_counter() - started) * 1e3
        self.thread = threading.Thread(target=self.work, args=(contents, stall_ms), daemon=True)
        self.thread.start()
        if not self.config.background:
            self.wait()

    def work(self, contents: Contents, stall_ms: float) -> None:
        """Everything after the copy, in the thread."""
        started = time.perf_counter()
        try:
            for part, tensors in contents.tensors().items():
                if name := not_finite(tensors):
                    raise UserError(f"{f'{part}/{name}'!r} holds numbers that are not finite, so it was not saved")
            for rows in self.run.glob("*.jsonl"):
                sync(rows)  # what was said of the steps before reaches the disk first
            step = contents.state.step
            folder = checkpoint_folder(self.run, step)
            save_checkpoint(folder, contents, self.config.max_file_mib << 20)
            self.known[folder] = True
            self.prune()
            self.saved()
        except BaseException as error:  # raised again by `wait`
            self.failure, self.failed = error, True
            return
        write_ms = (time.perf_counter() - started) * 1e3
        size = sum(tensor.nbytes for tensors in contents.tensors().values() for tensor in tensors.values())
        if not self.config.background:
            stall_ms += write_ms
        self.done.append(Saved(step, stall_ms, write_ms, size))

    def prune(self) -> list[Path]:
        """Delete the older checkpoints of the run; returns those deleted.

        A damaged one is neither counted nor deleted: it may be the only trace of something. One that is `in_use` stays
        until the next time.
        """
        whole = [folder for folder in checkpoints(self.run) if self.is_intact(folder)]
        kept = self.kept(map(step_of, whole))
        unwanted = [folder for folder in whole if step_of(folder) not in kept and not self.in_use(folder)]
        for folder in unwanted:
            discard(folder)
        return unwanted

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


def copied_to_host(tensors: Mapping[str, Tensor], pinned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of `tensors` in host memory, complete when this returns.

    Args:
        pinned: page-locked memory for the tensors of a GPU, by name; filled here, and used again by the next call.
    """
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items() if not tensor.is_cuda}
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    for name in tensors.keys() - copies.keys():
        tensor, known = tensors[name], pinned.get(name)
        if known is None or (known.shape, known.dtype) != (tensor.shape, tensor.dtype):
            pinned[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies[name] = pinned[name].copy_(tensor.detach(), non_blocking=True)
    for device in devices:
        torch.cuda.synchronize(device)
    return copies


def not_finite(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor with a NaN or an infinity in it; empty without one."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), "")
