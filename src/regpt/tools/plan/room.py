"""How a step is computed on the machine, and how many rows at once have room there."""

from dataclasses import dataclass
from typing import Any

from regpt.errors import UsageError
from regpt.kernels.select import MEASURED_CAPABILITY, model_obstacle, select_kernels
from regpt.model.transformer import Transformer
from regpt.model.weights import without_memory
from regpt.tools.plan.coefficients import CHECKPOINT_BYTES
from regpt.tools.plan.machine import Machine
from regpt.tools.plan.memory import Memory, Settings, cpu_memory, gpu_memory, largest_rows
from regpt.tools.plan.request import Request, Sections
from regpt.tools.plan.shape import Shape
from regpt.train.capacity import available_memory
from regpt.train.probe import row_choices

GIB = 2**30
ROWS_ON_CPU = 8  # of `auto`, which tries there what is fastest


def settings_of(run: Sections, machine: Machine) -> Settings:
    train = run.train
    return Settings(
        path_name(run, machine),
        train.precision,
        optimizer=run.optim.name,
        checkpointing=train.activation_checkpointing,
        offload=run.optim.offload and machine.kind != "cpu",  # where all memory is the host's
        document_mask=run.data.document_mask,
        dropout=run.model.dropout > 0,
    )


def path_name(run: Sections, machine: Machine) -> str:
    """eager, compiled or fused: as `regpt train` would choose on that machine."""
    train, model = run.train, run.model
    plain = "compiled" if train.compile else "eager"
    if train.kernels == "plain":
        return plain
    with without_memory():
        empty = Transformer(model, pad_vocab=train.pad_vocab)
    recompute = train.activation_checkpointing
    if machine.here is not None:
        chosen = select_kernels(train.kernels, empty, machine.here, train.precision, recompute=recompute)
        return "fused" if chosen.name == "fused" else plain
    reason = model_obstacle(empty, train.precision, recompute=recompute)
    if train.kernels == "fused" and reason is not None:
        raise UsageError(f"train.kernels is fused, but {reason}; set train.kernels to plain or auto")
    if train.kernels == "fused":
        return "fused"
    major, minor = MEASURED_CAPABILITY
    capability = machine.figures.capability if machine.figures else None
    return "fused" if reason is None and (capability or 0.0) >= major + minor / 10 else plain


@dataclass(frozen=True)
class Rooms:
    """Memory of the run with any number of rows."""

    run: Sections
    request: Request
    machine: Machine
    shape: Shape
    settings: Settings
    process_bytes: int | None

    def choices(self) -> list[int]:
        """Micro-batches that divide the batch; powers of two where nothing does."""
        batch_rows, rest = divmod(self.run.train.batch_tokens, self.run.data.seq_len * self.request.gpus)
        return [2**n for n in range(11)] if rest or not batch_rows else row_choices(batch_rows)

    def memory(self, rows: int) -> Memory:
        if self.machine.kind == "cpu":
            copy = CHECKPOINT_BYTES * self.shape.parameters if self.run.checkpoint.background else 0
            process = {} if self.process_bytes is None else {"process_bytes": self.process_bytes}
            return cpu_memory(self.shape, rows, self.settings, self.run.model.vocab_size, copy, **process)
        return gpu_memory(self.shape, rows, self.settings)

    def available(self) -> float | None:
        """Bytes that the run may take: of a GPU all of it, of this host what is free."""
        if self.machine.kind == "cpu":
            free = available_memory()
            return free if free is None else float(free + (self.process_bytes or 0))
        return self.machine.memory

    def largest(self) -> int | None:
        room = self.available()
        return None if room is None else largest_rows(self.choices(), lambda rows: self.memory(rows).needed, room)

    def rows(self) -> int:
        """The configured micro-batch; for `auto` the largest that fits, on a CPU a few rows."""
        rows = self.run.train.micro_batch_rows
        if rows != "auto":
            return rows
        largest = self.largest() or 1
        if self.machine.kind == "cpu":
            return max(n for n in self.choices() if n <= min(ROWS_ON_CPU, largest))
        return largest

    def describe(self, rows: int) -> dict[str, Any]:
        memory, room = self.memory(rows), self.available()
        return {
            "path": self.settings.path,
            "of": "the process" if self.machine.kind == "cpu" else "tensors",
            "parts_gib": {name: size / GIB for name, size in memory.parts.items()},
            "peak_gib": memory.peak / GIB,
            "host_gib": 8 * self.shape.padded / GIB if self.settings.offload else 0.0,
            "needed_gib": memory.needed / GIB,
            "available_gib": None if room is None else room / GIB,
            "fits": None if room is None else memory.needed <= room,
            "largest_micro_batch_rows": self.largest(),
        }
