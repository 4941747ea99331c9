"""Memory by part at its peak, and the largest micro-batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass

from regpt.tools.plan.coefficients import (
    CHECKPOINTED_BYTES,
    CONTEXT_BYTES,
    FRAGMENTED_SHARE,
    KEPT_BELOW_BYTES,
    LSE_BYTES,
    MALLOC_SHARE,
    MOMENTS,
    PROCESS_BYTES,
    RUN_BYTES,
    TOKENIZER_BYTES,
    WORKSPACE_BYTES,
    Path,
    path_of,
)
from regpt.tools.plan.shape import Shape


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        parts: name → bytes at the peak; their sum is `peak`.
        needed: what the device must have for that: with what lies outside of the count.
    """

    parts: dict[str, float]
    needed: float

    @property
    def peak(self) -> float:
        """What `peak_memory_gib` of metrics.jsonl will say: of tensors on a GPU, of the whole process on a CPU."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Settings:
    """What of a run's configuration memory depends on, beside the shape and the rows."""

    path: str
    precision: str
    optimizer: str = "adamw"
    checkpointing: bool = False
    offload: bool = False
    document_mask: bool = False


def tensors(shape: Shape, rows: int, settings: Settings) -> dict[str, float]:
    """Tensors at the peak of a step, in bytes by part.

    The peak is either where the loss's backward begins, when all activations and the logits are there, or where
    backward ends, when all gradients are; in between the ones go as the others come.
    """
    path = path_of(settings.path, settings.precision)
    word = 8 if settings.precision == "fp64" else 4
    wide = word / 4  # counts are of float32, those of fp64 twice that
    kept = 0 if settings.offload else MOMENTS[settings.optimizer]
    parts = {
        "weights": word * shape.padded,
        "gradients": word * shape.padded,
        "optimizer": word * kept * shape.padded,
    }
    copies = path.copies * shape.matrices
    loss = {"activations": wide * activations(shape, rows, path, settings), "logits": wide * logits(shape, rows, path)}
    tied = path.tied * shape.vocab_rows * shape.n_embd
    end = {"fresh gradients": wide * (path.fresh * shape.padded + tied)}
    return parts | {"low-precision copies": copies} | max(loss, end, key=lambda part: sum(part.values()))


def activations(shape: Shape, rows: int, path: Path, settings: Settings) -> float:
    """What forward keeps for backward, logits apart, in bytes."""
    N, L, C = rows * shape.seq_len, shape.n_layer, shape.n_embd
    block = N * (path.activation * C + LSE_BYTES * shape.n_head + 2 * path.norms)
    mask = 0.0
    if settings.document_mask and settings.path != "fused":
        mask = rows * shape.seq_len**2  # bool, (B, 1, T, T)
    tail = N * (path.last * C + path.norms) + mask
    if settings.checkpointing:
        width = "half" if path.copies else "full"
        return N * L * C * CHECKPOINTED_BYTES[width] + block + tail
    return L * block + tail


def logits(shape: Shape, rows: int, path: Path) -> float:
    return path.logits * rows * shape.seq_len * shape.vocab_rows


def gpu_memory(shape: Shape, rows: int, settings: Settings) -> Memory:
    """Of one process on a GPU of its own."""
    parts = tensors(shape, rows, settings) | {"workspace": float(WORKSPACE_BYTES)}
    peak = sum(parts.values())
    return Memory(parts, peak * (1 + FRAGMENTED_SHARE) + CONTEXT_BYTES)


def cpu_memory(
    shape: Shape,
    rows: int,
    settings: Settings,
    vocab_size: int,
    checkpoint_copy: float = 0,
    process_bytes: float = PROCESS_BYTES,
) -> Memory:
    """Of one process on a CPU: the resident memory of all of it.

    Args:
        checkpoint_copy: bytes that a checkpoint written in the background holds.
        process_bytes: what Python and the libraries take before a model is built.
    """
    parts = tensors(shape, rows, settings)
    freed = path_of(settings.path, settings.precision).tied * shape.vocab_rows * shape.n_embd
    kept = freed if freed / 3 < KEPT_BELOW_BYTES else 0.0  # three blocks
    if checkpoint_copy:
        parts["checkpoint copy"] = checkpoint_copy
    parts["allocator"] = kept + MALLOC_SHARE * sum(parts.values())
    parts["process"] = process_bytes + RUN_BYTES + TOKENIZER_BYTES * vocab_size
    peak = sum(parts.values())
    return Memory(parts, peak)


def largest_rows(choices: list[int], needed: Callable[[int], float], available: float) -> int | None:
    """The largest of `choices` (ascending) whose `needed(rows)` bytes are available; None when none is."""
    return max((rows for rows in choices if needed(rows) <= available), default=None)
