"""Asynchronous checkpoints: a background thread writes them, one at a time, while training continues.

Training waits only for the copy of the tensors to host memory. The copy of GPU tensors uses page-locked buffers, which
the next save reuses.
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
        step: updates made.
        stall_ms: how long training waited.
        write_ms: from the end of the copy until the checkpoint was on disk and older ones were deleted.
        bytes: size of the tensors.
    """

    step: int
    stall_ms: float
    write_ms: float
    bytes: int


class Saver:
    """Saves the checkpoints of one run. Leaving it as a context manager waits until the last one is on disk.

    `save` returns as soon as the tensors are copied. If the write fails later, `failed` becomes True for good, and the
    next `wait` raises the error. Two saves never overlap. Ctrl-C leaves the context without waiting: the checkpoint in
    progress is lost, earlier ones are complete.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        in_use: Callable[[Path], bool] = lambda folder: False,
        saved: Callable[[], object] = lambda: None,
    ) -> None:
        """`in_use(folder)`: a checkpoint must not be deleted yet; `saved()` is called after each save."""
        self.run, self.config, self.in_use, self.saved = run, config, in_use, saved
        self.pinned: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)  # buffers by field of `Contents`
        self.known: dict[Path, bool] = {}  # results of `is_intact`, which reads every byte of a checkpoint
        self.thread: threading.Thread | None = None
        self.last_step: int | None = None  # of the last save that was started
        self.failed = False
        self.failure: BaseException | None = None
        self.done: list[Saved] = []

    def save(self, contents: Contents, device: torch.device) -> None:
        """Copy the tensors of `contents`, after all kernels queued on `device`; write them in the background.

        Raises:
            UserError: the save before this one failed.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that the stall does not count the update itself
        started = time.perf_counter()
        self.wait()
        self.last_step = contents.state.step
        copies = {part: copied_to_host(tensors, self.pinned[part]) for part, tensors in contents.tensors().items()}
        contents = replace(contents, **copies)  # training keeps changing the originals
        stall_ms = (time.perf_counter() - started) * 1e3
        self.thread = threading.Thread(target=self.work, args=(contents, stall_ms), daemon=True)
        self.thread.start()
        if not self.config.background:
            self.wait()

    def work(self, contents: Contents, stall_ms: float) -> None:
        """Write the copy and prune older checkpoints; runs in the thread."""
        started = time.perf_counter()
        try:
            for part, tensors in contents.tensors().items():
                if name := not_finite(tensors):
                    raise UserError(f"{f'{part}/{name}'!r} holds numbers that are not finite, so it was not saved")
            for rows in self.run.glob("*.jsonl"):
                sync(rows)  # a checkpoint on disk implies that the metrics up to its step are
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
        """Delete the older checkpoints of the run that the configuration does not keep; return their folders.

        A damaged checkpoint is neither counted nor deleted: it may hold the only copy of some state. A checkpoint
        that is `in_use` stays until the next save.
        """
        intact = [folder for folder in checkpoints(self.run) if self.is_intact(folder)]
        kept = self.kept(map(step_of, intact))
        unwanted = [folder for folder in intact if step_of(folder) not in kept and not self.in_use(folder)]
        for folder in unwanted:
            discard(folder)
        return unwanted

    def kept(self, steps: Iterable[int]) -> set[int]:
        """Select the `steps` whose checkpoints the configuration keeps."""
        return kept_steps(steps, self.config.keep_last, self.config.keep_every, self.best)

    @cached_property
    def losses(self) -> dict[int, float]:
        """Validation loss by step, read from metrics.jsonl: losses before a resume count, too."""
        return validation_losses(self.run / METRICS)

    def best(self, steps: Iterable[int]) -> int | None:
        """Return the step of the lowest validation loss among `steps`; None unless `checkpoint.keep_best` is set."""
        return best_step(self.losses, steps) if self.config.keep_best else None

    def is_best_unsaved(self, step: int, loss: float) -> bool:
        """Record a validation loss; return True if it is the lowest so far and its step has no checkpoint yet."""
        losses = self.losses | ({step: loss} if math.isfinite(loss) else {})
        self.losses = losses
        saved = step == self.last_step or checkpoint_folder(self.run, step).exists()
        return self.best(losses) == step and not saved

    def note_step_back(self, step: int) -> None:
        """Forget validations after `step`, to which the run was rewound."""
        self.losses = {made: loss for made, loss in self.losses.items() if made <= step}

    def is_intact(self, folder: Path) -> bool:
        if folder not in self.known:
            self.known[folder] = is_intact(folder)
        return self.known[folder]

    def wait(self) -> None:
        """Wait for the save in progress; raise its error, once."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def take_done(self) -> list[Saved]:
        """Return the saves finished since the last call."""
        done, self.done = self.done, []
        return done

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception) and self.thread is not None:
            self.thread.join()  # finish the save in progress, but let `error` propagate rather than its failure


def copied_to_host(tensors: Mapping[str, Tensor], pinned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy `tensors` to host memory; synchronises, so the copies are complete on return.

    Args:
        pinned: page-locked buffers for GPU tensors, by name; allocated here and reused by the next call.
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
    """Name of the first tensor with a NaN or an infinity; empty if all values are finite."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), "")
