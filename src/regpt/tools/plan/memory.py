"""Memory by part at its peak, and the largest micro-batch that fits."""

from collections.abc import Callable
from dataclasses import dataclass

from regpt.tools.plan.coefficients import (
    BLOCK_INPUT_BYTES,
    CONTEXT_BYTES,
    DROPOUT_PAIR_BYTES,
    FRAGMENTED_SHARE,
    KEPT_BELOW_BYTES,
    LSE_BYTES,
    MALLOC_SHARE,
    MOMENTS,
    OFFLOAD_BYTES,
    PROCESS_BYTES,
    RECOMPUTED,
    RUN_BYTES,
    TOKENIZER_BYTES,
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
    dropout: bool = False


def tensors(shape: Shape, rows: int, settings: Settings) -> dict[str, float]:
    """Tensors at the peak of a step, in bytes by part.

    The peak is where the loss's backward begins, when all that was kept and the logits are there; or, for few tokens,
    where backward ends, when all gradients are; or, with activation checkpointing, within a block that is computed
    again. In between the ones go as the others come.
    """
    path = path_of(settings.path, settings.precision)
    word = 8 if settings.precision == "fp64" else 4
    moments = 0 if settings.offload else MOMENTS[settings.optimizer]
    steady = {
        "weights": word * shape.padded,
        "gradients": word * shape.padded,
        "optimizer": word * moments * shape.padded,
    }
    if settings.offload:
        steady["offload buffers"] = min(OFFLOAD_BYTES, 2 * word * shape.padded)
    peaks = recomputed_peaks if settings.checkpointing else kept_peaks
    wide = word / 4  # counts are of float32, those of fp64 twice that
    candidates = [{name: wide * size for name, size in peak.items()} for peak in peaks(shape, rows, path, settings)]
    return steady | max(candidates, key=lambda parts: sum(parts.values()))


def kept_peaks(shape: Shape, rows: int, path: Path, settings: Settings) -> list[dict[str, float]]:
    """What comes on top of weights, gradients and moments where the peak may be."""
    head = path.head_copies * shape.vocab_rows * shape.n_embd
    copies = {"low-precision copies": path.copies * shape.block_weights + head}
    kept = shape.n_layer * block(shape, rows, path, settings) + tail(shape, rows, path, settings)
    return [copies | {"activations": kept, "logits": logits(shape, rows, path)}, copies | fresh(shape, path)]


def recomputed_peaks(shape: Shape, rows: int, path: Path, settings: Settings) -> list[dict[str, float]]:
    """The same with activation checkpointing: forward keeps no weight copies but the head's."""
    copies = {"low-precision copies": path.head_copies * shape.vocab_rows * shape.n_embd}
    kept = BLOCK_INPUT_BYTES * rows * shape.seq_len * shape.n_layer * shape.n_embd
    again = RECOMPUTED["half" if path.head_copies else "full"] * block(shape, rows, path, settings)
    return [
        copies | {"activations": kept + tail(shape, rows, path, settings), "logits": logits(shape, rows, path)},
        {"activations": kept + again},
        fresh(shape, path),
    ]


def block(shape: Shape, rows: int, path: Path, settings: Settings) -> float:
    """What one block keeps for its backward."""
    pair = DROPOUT_PAIR_BYTES["half" if path.head_copies else "full"] * settings.dropout
    dropout = rows * shape.seq_len * (pair * shape.n_head * shape.seq_len + 2 * settings.dropout * shape.n_embd)
    return dropout + rows * shape.seq_len * (path.activation * shape.n_embd + LSE_BYTES * shape.n_head + 2 * path.norms)


def tail(shape: Shape, rows: int, path: Path, settings: Settings) -> float:
    """What is kept around the last norm, and the masks of attention."""
    masks = 1 if path.masks == "one" or settings.checkpointing else shape.n_layer
    mask = path.mask * masks * rows * shape.seq_len**2 if settings.document_mask else 0
    return rows * shape.seq_len * (path.last * shape.n_embd + path.norms) + mask


def fresh(shape: Shape, path: Path) -> dict[str, float]:
    """Gradients where backward ends."""
    return {"fresh gradients": path.fresh * shape.padded + path.tied * shape.vocab_rows * shape.n_embd}


def logits(shape: Shape, rows: int, path: Path) -> float:
    return path.logits * rows * shape.seq_len * shape.vocab_rows


def gpu_memory(shape: Shape, rows: int, settings: Settings) -> Memory:
    """Of one process on a GPU of its own."""
    workspace = path_of(settings.path, settings.precision).workspace
    parts = tensors(shape, rows, settings) | {"workspace": float(workspace)}
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
