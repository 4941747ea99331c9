"""Memory of a step by part: the model's own forward and backward on fake tensors, whose storages are counted; and
its sizes, counted on the model too, so that they cannot differ from it.

Bytes live after each allocation are a line in the rows of the micro-batch. Two passes, of 2 and of 4 rows, give the
line of every allocation, and so the exact peak of any micro-batch of the eager path. Compiled and fused code is the
same pass with two differences: logits exist once, in the computing format, and `KEPT`. A head in chunks (`model.head`)
is one chunk of its size, whatever the rows.
"""

import functools
import weakref
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regpt.data.batch import Batch
from regpt.kernels import fp8
from regpt.kernels.fused import CHUNK_BYTES, even_chunks
from regpt.model.adapter_config import AdapterConfig
from regpt.model.adapters import adapt
from regpt.model.config import FAMILIES, ModelConfig
from regpt.model.families import make_model
from regpt.model.grouped import experts_grouped, looped_product
from regpt.model.head import SMALL_VOCAB, chunk_rows, in_chunks, padded_logits, summed_losses
from regpt.model.ops import PLAIN
from regpt.model.quantize import QuantizedWeight
from regpt.model.weights import WithoutValues, allocate, count_parameters, without_memory
from regpt.train.backend import make_loss_sum
from regpt.train.config import PrecisionName, StateDtype, WeightDtype
from regpt.train.low_memory import may_be_quantized
from regpt.train.peak import flops_per_token
from regpt.train.precision import HALF_TYPES, gradient_dtype, parameter_dtype
from regpt.train.recompute import mlps_in_pieces, recompute_blocks
from regpt.train.rounding import BLOCK

# Share of the eager path's activations that another path keeps: bytes a token, layer and channel of both, counted on
# the compiler's graph and in kernels/gpt2*.py (tests/tools/test_plan_memory.py repeats the counts). Compiled code keeps
# all of them in bfloat16 and float32. Peaks of 25 runs on H100 and H200 are met to 3.1 %, with activation checkpointing
# to 4 % (tests/tools/test_plan_measured.py).
KEPT = {("compiled", "fp8"): 25 / 31, ("fused", "bf16"): 32 / 36, ("fused", "fp8"): 27 / 31}
# The same of families with gates and RMSNorm, compiled: what the partitioner computes again of rotations, norms and
# gates (counted likewise; 0.659 and 0.658 measured on an H200), by the widest format of their activations, without and
# with norms of q and k.
KEPT_GATED = {"mixed": (0.66, 0.62), "bf16": (0.715, 0.663), "fp32": (0.77, 0.742)}
# Bytes of a weight's copies on top of the eager path's one: compiled code rounds weights once more in the backward, the
# fused path has them in bfloat16, as validation wants it, and in FP8 by rows and by columns.
MORE_COPIES = {("compiled", "fp8"): -1, ("fused", "fp8"): 3}
# From PyTorch's allocator: cuBLAS on Hopper (CUBLAS_WORKSPACE_CONFIG); the fused path's, measured peak less counts.
WORKSPACE = {"compiled": 32 * 2**20, "eager": 32 * 2**20, "fused": 0.28 * 2**30}
OFFLOADED = 3 * 2 * 2**23  # numbers on the device with moments in host memory: three pieces of both (train/adamw.py)
WORDS = {"fp32": 4.0, "bf16": 2.0, "int8": 1 + 4 / BLOCK}  # bytes of a number; of int8 with its share of a scale
CONTEXT_BYTES = 0.7 * 2**30  # of a GPU outside of PyTorch's count: context, loaded kernels; 0.5 to 0.8 GiB seen
FRAGMENTED_SHARE = 0.03  # of the peak: blocks that the allocator holds and cannot use; assumed
# Of a process on a CPU: oneDNN's buffers, batches made ahead, the tokenizer (20 MiB for GPT-2's). Two runs are met to
# 3 % (docs/log.md).
RUN_BYTES = 54 * 2**20
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on.

    Attributes:
        parameters: without vocabulary padding, the tied head once.
        active: of them, those that compute a token: without the experts that it is not routed to.
        padded: what is in memory, without adapters.
        matrices: weights of a token's matrix products, the padded head included: without experts, those that bfloat16
            copies are made of.
        learned: those with gradients and moments, padded: all, or the adapters.
        quantized: of them, those whose moments may be in 8 bits.
        stored: of `padded`, those of a quantized base, and their bytes.
        largest: of a quantized base's weights, the one with most numbers, which a product dequantizes.
        vocab_rows: rows of the head, padded.
        flops_per_token: forward and backward, at the real vocabulary (`train.peak`).
        attention_flops: of them, those of attention's products.
    """

    parameters: int
    active: int
    padded: int
    matrices: int
    learned: int
    quantized: int
    stored: tuple[int, int]
    largest: int
    n_layer: int
    n_embd: int
    vocab_rows: int
    flops_per_token: int
    attention_flops: int

    @property
    def product_flops(self) -> int:
        """FLOPs of matrix products for one token, forward and backward, as they are computed: padding included."""
        return self.passes * self.matrices + 6 * self.learned * self.adapted

    @property
    def adapted(self) -> bool:
        return self.learned != self.padded

    @property
    def passes(self) -> int:
        """FLOPs of a weight for one token: a frozen one has no gradient."""
        return 4 if self.adapted else 6

    @property
    def block_weights(self) -> int:
        """Weights of the matrix products in blocks, without the head."""
        return self.matrices - self.vocab_rows * self.n_embd

    @property
    def block_flops(self) -> int:
        """FLOPs of those products for one token, forward and backward."""
        return self.passes * self.block_weights + 6 * self.learned * self.adapted


NO_ADAPTERS = AdapterConfig()


def shape_of(config: ModelConfig, seq_len: int, *, pad_vocab: bool, adapter: AdapterConfig = NO_ADAPTERS) -> Shape:
    """Count a model of this shape."""
    with without_memory():
        model = make_model(config, pad_vocab=pad_vocab)
        padded, matrices = sum(p.numel() for p in model.parameters()), model.matmul_parameters(padded=True)
        model = adapt(model, adapter)
    learned = [p for p in model.parameters() if p.requires_grad]
    stored = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    return Shape(
        parameters=count_parameters(model),
        active=count_parameters(model) - model.idle_parameters(),
        padded=padded,
        matrices=matrices,
        learned=sum(p.numel() for p in learned) if model.adapter else padded,
        quantized=sum(p.numel() for p in learned if may_be_quantized(p)),
        stored=(
            sum(module.shape.numel() for module in stored),
            sum(piece.nbytes for module in stored for piece in module.pieces().values()),
        ),
        largest=max((module.shape.numel() for module in stored), default=0),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        vocab_rows=model.head_weight.size(0),
        flops_per_token=flops_per_token(model, seq_len),
        attention_flops=model.attention_flops(seq_len),
    )


@dataclass(frozen=True)
class PlannedStep:
    """A training step as a device will compute it; fields as in the configuration, `path` eager, compiled or fused,
    `blocks`: compiled one by one. Of GRPO: tokens of a row that the head computes, replies written at once, bytes of
    a weight's copies."""

    model: ModelConfig
    seq_len: int
    path: str
    precision: PrecisionName
    pad_vocab: bool = True
    checkpointing: bool = False
    offload: bool = False
    document_mask: bool = False
    weights: WeightDtype = "fp32"
    gradients: WeightDtype = "fp32"
    state: StateDtype = "fp32"
    blocks: bool = False
    activation_offload: bool = False
    adapter: AdapterConfig = NO_ADAPTERS
    mlp_tokens: int = 0
    reply_tokens: int = 0
    written: int = 0
    copies_bytes: float = 0.0

    @functools.cached_property
    def shape(self) -> Shape:
        return shape_of(self.model, self.seq_len, pad_vocab=self.pad_vocab, adapter=self.adapter)

    @property
    def weight_bytes(self) -> float:
        """Of one weight."""
        return 8 if self.precision == "fp64" else WORDS[self.weights]

    @property
    def all_weight_bytes(self) -> float:
        """Of all weights: adapters are float32 at least, a quantized base is what its pieces are."""
        shape, (numbers, pieces) = self.shape, self.shape.stored
        adapters = (8 if self.precision == "fp64" else 4) * shape.learned * shape.adapted
        return self.weight_bytes * (shape.padded - numbers) + pieces + adapters

    @property
    def gradient_bytes(self) -> float:
        return 8 if self.precision == "fp64" else WORDS["fp32" if self.shape.adapted else self.gradients]

    @property
    def moment_bytes(self) -> float:
        """Of both moments of all weights."""
        word = 8 if self.precision == "fp64" else WORDS["fp32" if self.state == "int8" else self.state]
        small = self.shape.quantized if self.state == "int8" else 0
        return 2 * (word * (self.shape.learned - small) + WORDS["int8"] * small)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one process.

    Attributes:
        parts: name → bytes at the peak; their sum is `peak`.
        needed: what the device must have for that: with what is outside of the count.
    """

    parts: dict[str, float]
    needed: float

    @property
    def peak(self) -> float:
        """`peak_memory_gib` of metrics.jsonl, in bytes: of tensors on a GPU, of the whole process on a CPU."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Trace:
    """Bytes live at each allocation of a micro-batch, and those (two numbers) when the last norm is done.

    Rows of weights, gradients and moments are not counted; copies of the weights are.
    """

    live: np.ndarray
    hidden: np.ndarray


class LiveBytes(TorchDispatchMode):
    """A context that records the bytes of the storages made in it and not freed, at each allocation."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}
        self.live, self.history = 0, [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                self.history.append(self.live)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@functools.cache
def trace(step: PlannedStep, rows: int, chunk: int = 0) -> Trace:
    """Forward and backward of `rows` rows, on fake tensors; gradients of an earlier micro-batch are there already.
    With a head of one chunk of `chunk` tokens, else of all logits."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    marks: list[int] = []

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, n_vocab: int) -> Tensor:
        marks.append(live.live)
        if step.reply_tokens:
            hidden, targets = hidden[: rows * step.reply_tokens], targets[: rows * step.reply_tokens]
        if chunk:
            return in_chunks(hidden[:1].expand(chunk, -1), weight, targets[:1].expand(chunk), n_vocab, 0, 0, chunk)[0]
        if step.path == "eager":
            return summed_losses(padded_logits(hidden, weight, n_vocab), targets)
        return F.linear(hidden, weight)[0, 0]  # logits once: freed, then as large a gradient

    linear = fp8.linear if step.precision == "fp8" else PLAIN.linear
    with FakeTensorMode(), WithoutValues():
        experts = functools.partial(experts_grouped, product=looped_product)  # fake tensors have no other
        ops = replace(PLAIN, linear=linear, linear_cross_entropy=loss, experts=experts)
        model = allocate(
            adapt(make_model(step.model, ops, pad_vocab=step.pad_vocab), step.adapter),
            CPU,
            parameter_dtype("fp32", step.weights),
        )
        if step.mlp_tokens:
            mlps_in_pieces(model, step.mlp_tokens)
        if step.checkpointing:
            recompute_blocks(model)
        dtype = gradient_dtype(step.weights, step.gradients)
        for p in [p for p in model.parameters() if p.requires_grad]:
            p.grad_dtype = dtype or p.dtype
            p.grad = torch.empty_like(p, dtype=dtype)
        batch = fake_batch(step, rows)
        known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *batch]
        live = LiveBytes([tensor for tensor in known if tensor is not None])
        with live:
            no_autocast = step.precision == "fp64" or step.weights == "bf16"
            loss_sum = make_loss_sum(model, "fp32" if no_autocast else step.precision, CPU, False)
            (loss_sum(batch) / 7).backward()
    return Trace(np.array(live.history), np.array(marks))


def fake_batch(step: PlannedStep, rows: int) -> Batch:
    """Rows of one document each; compiled code keeps one mask for all layers, which `tensors` adds."""
    T = step.seq_len
    idx = torch.zeros(rows, T, dtype=torch.int64)
    keys = torch.zeros(rows, dtype=torch.int64) if step.model.dropout else None
    if not (step.document_mask and step.path == "eager"):
        return Batch(idx, idx, dropout_keys=keys)
    return Batch(idx, idx, torch.zeros(rows, T, dtype=torch.int64), torch.arange(0, rows * T + 1, T), keys)


def tensors(step: PlannedStep, rows: int) -> dict[str, float]:
    """Tensors at the peak of a step, in bytes by part."""
    shape = step.shape
    chunk = chunk_of(step, rows)
    of_row = -(-step.mlp_tokens // rows)  # pieces of MLPs divide each row
    two, four = (trace(replace(step, mlp_tokens=n * of_row), n, chunk) for n in (2, 4))
    per_row, fixed = (four.live - two.live) / 2, 2 * two.live - four.live
    hidden_row, copies = float((four.hidden - two.hidden)[0]) / 2, float((2 * two.hidden - four.hidden)[0])
    kept = fused_gated_bytes(step) * rows * step.seq_len or kept_share(step) * hidden_row * rows
    peak = float((fixed + per_row * rows).max()) + kept - hidden_row * rows
    if step.path == "compiled" and not step.blocks:  # one graph: all gradients of a micro-batch come out together
        peak = max(peak, copies + step.gradient_bytes * shape.learned)
    if step.path == "compiled" and step.document_mask:
        mask = (2 if step.precision in HALF_TYPES else 4) * rows * step.seq_len**2
        kept, peak = kept + mask, peak + mask
    peak += shape.largest * (4 if step.precision not in HALF_TYPES else 2)  # the trace does not see it
    more = MORE_COPIES.get((step.path, step.precision), 0) * shape.block_weights
    copies, peak = copies + more, peak + more
    wide = 2 if step.precision == "fp64" else 1  # traces are of 32 bits and fewer
    parts = {"weights": step.all_weight_bytes, "gradients": step.gradient_bytes * shape.learned}
    parts["optimizer"] = 0 if step.offload else step.moment_bytes  # AdamW's moments
    if step.offload:
        parts["offload buffers"] = min(OFFLOADED * step.moment_bytes / 2 / shape.learned, step.moment_bytes)
    kept = min(kept, peak - copies)
    if step.activation_offload:
        kept, peak = 0.0, peak - kept
    if step.written:
        parts["rollouts"] = rollout_bytes(step)
    momentary = {"low-precision copies": copies, "activations": kept, "logits, new gradients": peak - copies - kept}
    return parts | {name: wide * size for name, size in momentary.items()}


def rollout_bytes(step: PlannedStep) -> float:
    """Of keys, values and logits of the replies that are written at once, and of the weights' copies."""
    shape, word = step.model.resolved(), 2 if step.precision in HALF_TYPES else 4
    cached = 2 * shape.n_layer * shape.n_kv_head * shape.head_size * step.seq_len * word
    return step.written * (cached + 4 * step.shape.vocab_rows) + step.copies_bytes * step.shape.padded


def kept_share(step: PlannedStep) -> float:
    """Of the eager path's activations, those that `step` keeps; with activation checkpointing all: they are inputs."""
    family = FAMILIES[step.model.family]
    if step.path != "compiled" or not family.gated or step.checkpointing or step.precision == "fp8":
        return KEPT.get((step.path, step.precision), 1.0)
    formats = "bf16" if step.weights == "bf16" else "mixed" if step.precision in HALF_TYPES else "fp32"
    return KEPT_GATED[formats][bool(family.qk_norm)]


def fused_gated_bytes(step: PlannedStep) -> int:
    """Bytes a token that the fused path of a family with gates keeps (the states in kernels/llama.py); 0 on others."""
    shape = step.model.resolved()
    if step.path != "fused" or not FAMILIES[shape.family].gated:
        return 0
    queries, keys = shape.n_head * shape.head_size, shape.n_kv_head * shape.head_size
    numbers = 4 * shape.n_embd + 2 * queries + 2 * keys + 3 * shape.n_inner  # bfloat16
    return shape.n_layer * (2 * numbers + 4 * (shape.n_head + 2)) + 2 * 2 * shape.n_embd


def chunk_of(step: PlannedStep, rows: int) -> int:
    """Tokens of a chunk of the head; 0 where the logits of a micro-batch are computed whole."""
    tokens = rows * step.seq_len
    if step.path == "fused":
        few = step.shape.vocab_rows <= SMALL_VOCAB
        return 0 if few else even_chunks(tokens, CHUNK_BYTES // (2 * step.shape.vocab_rows))
    dtype = HALF_TYPES.get(step.precision, parameter_dtype(step.precision, step.weights))
    return min(chunk_rows(tokens, step.shape.vocab_rows, dtype), tokens)


def gpu_memory(step: PlannedStep, rows: int) -> StepMemory:
    """Memory of one process with its own GPU; masks in half precision are data there (`kernels.masked`)."""
    step = replace(step, document_mask=step.document_mask and step.precision not in HALF_TYPES)
    parts = tensors(step, rows) | {"workspace": float(WORKSPACE[step.path])}
    return StepMemory(parts, sum(parts.values()) * (1 + FRAGMENTED_SHARE) + CONTEXT_BYTES)


def cpu_memory(step: PlannedStep, rows: int, process_bytes: float, checkpoint_copy: float = 0) -> StepMemory:
    """Resident memory of one process on a CPU.

    Args:
        process_bytes: Python and the libraries, before a model is built.
        checkpoint_copy: bytes that a checkpoint written in the background holds.
    """
    parts = tensors(step, rows) | {"process": process_bytes + RUN_BYTES}
    if checkpoint_copy:
        parts["checkpoint copy"] = checkpoint_copy
    return StepMemory(parts, sum(parts.values()))
