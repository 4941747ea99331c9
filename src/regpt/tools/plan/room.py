"""How a step is computed on the device, and how many rows at once have room there."""

from dataclasses import dataclass
from typing import Any

from regpt.errors import UsageError
from regpt.kernels.select import MEASURED_CAPABILITY, model_obstacle, select_kernels
from regpt.model.transformer import Transformer
from regpt.model.weights import without_memory
from regpt.tools.plan.memory import PlannedStep, StepMemory, cpu_memory, gpu_memory
from regpt.tools.plan.request import RunSections
from regpt.tools.plan.target import Target
from regpt.train.memory import available_memory
from regpt.train.probe import row_choices

GIB = 2**30
CHECKPOINT_BYTES = 12  # per parameter: float32 weights and two moments
ROWS_ON_CPU = 8  # of `auto`, which tries there what is fastest


def planned_step(run: RunSections, target: Target) -> PlannedStep:
    train = run.train
    return PlannedStep(
        run.model,
        run.data.seq_len,
        path_name(run, target),
        train.precision,
        pad_vocab=train.pad_vocab,
        checkpointing=train.activation_checkpointing,
        offload=run.optim.offload and target.kind != "cpu",  # where all memory is the host's
        document_mask=run.data.document_mask,
    )


def path_name(run: RunSections, target: Target) -> str:
    """eager, compiled or fused: as `regpt train` would choose on that device."""
    train = run.train
    plain = "compiled" if train.compile else "eager"
    if train.kernels == "plain":
        return plain
    with without_memory():
        empty = Transformer(run.model, pad_vocab=train.pad_vocab)
    how = {"deterministic": train.deterministic, "recompute": train.activation_checkpointing}
    if target.here is not None:
        chosen = select_kernels(train.kernels, empty, target.here, train.precision, **how)
        return "fused" if chosen.name == "fused" else plain
    reason = model_obstacle(empty, train.precision, **how)
    if train.kernels == "fused" and reason is not None:
        raise UsageError(f"train.kernels is fused, but {reason}; set train.kernels to plain or auto")
    major, minor = MEASURED_CAPABILITY
    capability = (target.figures.capability if target.figures else None) or 0.0
    return "fused" if reason is None and (train.kernels == "fused" or capability >= major + minor / 10) else plain


@dataclass(frozen=True)
class Room:
    """Memory of a step with any number of rows, and that of the device.

    Attributes:
        batch_rows: rows of a step that each device computes; None where they do not divide.
        process_bytes: Python and the libraries in memory.
        checkpoint_copy: bytes that a checkpoint written in the background holds on a CPU.
    """

    step: PlannedStep
    target: Target
    batch_rows: int | None
    process_bytes: int
    checkpoint_copy: int

    def memory(self, rows: int) -> StepMemory:
        if self.target.kind == "cpu":
            return cpu_memory(self.step, rows, self.process_bytes, self.checkpoint_copy)
        return gpu_memory(self.step, rows)

    def available(self) -> float:
        """Bytes that the run may take: all of a GPU, what is free of this host."""
        return available_memory() + self.process_bytes if self.target.kind == "cpu" else self.target.memory

    def choices(self) -> list[int]:
        """Micro-batches that divide the batch; powers of two where nothing does."""
        return row_choices(self.batch_rows) if self.batch_rows else [2**n for n in range(11)]

    def largest(self) -> int | None:
        """The largest micro-batch that fits; None where not even one row does."""
        return max((n for n in self.choices() if self.memory(n).needed <= self.available()), default=None)

    def rows(self, wanted: int | str) -> int:
        """The configured micro-batch; for `auto` the largest that fits, on a CPU a few rows."""
        if isinstance(wanted, int):
            return wanted
        largest = self.largest() or 1
        if self.target.kind == "cpu":
            return max(n for n in self.choices() if n <= min(ROWS_ON_CPU, largest))
        return largest

    def describe(self, rows: int) -> dict[str, Any]:
        memory, free = self.memory(rows), self.available()
        return {
            "path": self.step.path,
            "of": "the process" if self.target.kind == "cpu" else "tensors",
            "parts_gib": {name: size / GIB for name, size in memory.parts.items()},
            "peak_gib": memory.peak / GIB,
            "host_gib": 8 * self.step.shape.padded / GIB if self.step.offload else 0.0,
            "needed_gib": memory.needed / GIB,
            "available_gib": free / GIB,
            "fits": memory.needed <= free,
            "largest_micro_batch_rows": self.largest(),
        }
