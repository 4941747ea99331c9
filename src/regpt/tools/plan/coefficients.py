"""Every empirical number of the plan, with its origin; nothing else in this folder is fitted to a measurement.

Symbols: N tokens of a micro-batch, L layers, H heads, C n_embd, V rows of the (padded) head, P parameters.

Where a count says *counted*, it is the sum over the tensors that forward keeps for backward, from the graph that
`torch.compile` partitions (torch 2.13), from autograd's saved tensors, or from the code of the fused path; the tests
repeat the count. *Measured* names the machine and the date; docs/log.md has the command.

To set a path's numbers after a measurement on another GPU or with other kernels: memory from the peak of
`regpt bench train` at two micro-batch sizes (their difference is `activation`·N·L·C + `logits`·N·V; what is left is
`PER_PARAMETER`·P + copies), time from its profile. `python benchmarks/plan.py` prints both beside the prediction.
"""

from dataclasses import dataclass, replace
from typing import Literal

from regpt.errors import UsageError

CUBLAS_BYTES = 32 * 2**20  # what cuBLAS takes from PyTorch's allocator on Hopper (its CUBLAS_WORKSPACE_CONFIG)
# Attention's share of the peak grows with the length of rows as T/(T + this): skipping what causality masks pays in
# blocks. From the fused path's steps with rows of 1024 (40 % reached) and of 2048 (51.5 %) on an H100.
ATTENTION_HALF_LENGTH = 826


@dataclass(frozen=True)
class Path:
    """One way to compute a micro-batch's loss and gradients.

    Memory, in bytes at the peak, which is where the loss's backward begins:
        activation: per token, layer and channel (N·L·C): what blocks keep for backward.
        norms: per token and norm (N·(2L + 1)): means and deviations, float32.
        last: per token and channel (N·C): around the last norm and the head.
        logits: per token and row of the head (N·V).
        mask: per pair of positions of a row (B·T²), with attention masked by document: a number for each pair,
        masks: for all layers together, or for each.
        copies: per weight of a block's matrix products, while forward and backward run.
        head_copies: the same of the head's.
        fresh: per parameter, when backward ends: gradients that are not yet added to those of earlier micro-batches.
        workspace: of the libraries, from PyTorch's allocator.
        tied: per weight of the head, when backward ends: its gradient, the embedding's and their sum.

    Time:
        product_share: of the device's peak in the run's format, reached by the matrix products.
        attention_share: of the same peak, approached by attention in long rows (ATTENTION_HALF_LENGTH), its FLOPs
            counted without a discount for causality.
        traffic: bytes moved at the full bandwidth of the data sheet, per token, layer and channel, by all the rest:
            norms, residuals, GELU, casts, bias gradients.
        logits_traffic: likewise, per token and row of the head.
        weight_traffic: likewise, per parameter and micro-batch: copies made, gradients cast and added.
        launches: kernels a layer, forward and backward; a micro-batch takes at least LAUNCH_SECONDS for each.
        fp8_share: of the device's peak in FP8, reached by the products of the blocks, in runs in FP8.
        casts: bytes more than `traffic`, per token, layer and channel, of runs in FP8.
    """

    activation: float
    norms: float
    last: float
    logits: float
    mask: float
    masks: Literal["one", "each layer"]
    copies: float
    head_copies: float
    fresh: float
    tied: float
    workspace: float
    product_share: float
    attention_share: float
    traffic: float
    logits_traffic: float
    weight_traffic: float
    launches: float
    origin: str
    fp8_share: float = 0.0
    casts: float = 0.0


COMPILED_HALF = Path(
    # Counted. x̂ of two norms in float32 8, inputs of four products 2 + 2 + 2 + 8, q, k, v 6, before GELU 8.
    activation=36,
    norms=4,  # one deviation a norm
    last=8,  # x̂ of the last norm 4, its bfloat16 result 2, its gradient 2
    logits=2,  # bfloat16; their gradient is written over them
    mask=2,
    masks="one",
    copies=2,
    head_copies=2,
    fresh=4,  # backward is one graph: all its gradients come out together
    tied=0,
    workspace=CUBLAS_BYTES,
    # Measured on one H100 SXM 80GB, gpt2-124m, 64 rows of 1024, torch 2.11, 2026-11-22: 1084.7 ms a step; its profile
    # has products 136, attention 37, logits 21 and all else 65 of 259 ms for two micro-batches, here scaled up by the
    # 3.5 % that a step took longer in a run than in the profile.
    product_share=0.698,
    attention_share=0.708,
    traffic=180,
    logits_traffic=11.1,
    weight_traffic=30,
    launches=40,
    origin="torch.compile, bfloat16: memory counted, time measured on an H100 SXM (gpt2-124m, 64 rows of 1024)",
)
EAGER_HALF = Path(
    # Counted. Residual stream into two norms 8, inputs of four products 14, q, k, v 6, before GELU 8.
    activation=36,
    norms=8,  # mean and deviation
    last=6,
    logits=12,  # float32, three times: log-softmax, its gradient, the gradient before it
    mask=2,
    masks="each layer",
    copies=2,
    head_copies=2,
    fresh=0,  # gradients are added as they come
    tied=12,
    workspace=CUBLAS_BYTES,
    product_share=0.698,
    attention_share=0.708,
    # Counted as bytes read and written by each operation, over 0.75 of the bandwidth; not measured.
    traffic=260,
    logits_traffic=80,
    weight_traffic=30,
    launches=110,
    origin="eager, bfloat16: memory counted, time estimated from the operations",
)
FUSED_HALF = Path(
    # Counted in kernels/gpt2.py. Residual stream in bfloat16 2 + 2, norms' results 2 + 2, q, k, v 6, attended 2, before
    # and after GELU 8 + 8.
    activation=32,
    norms=8,
    last=6,
    logits=2,  # overwritten by their gradient
    mask=0,
    masks="one",
    copies=2,
    head_copies=2,
    fresh=0,  # products add into the gradients
    tied=0,
    workspace=0.28 * 2**30,  # cuBLASLt's, and what the second stream holds; the measured peak less what was counted
    # Measured on one H100 SXM 80GB, torch 2.11, 2026-11-22 (docs/log.md, "The fused path"): logits 5.4 and norms with
    # bias sums 7.8 ms a micro-batch of 64 rows of 1024 in the profile, a tenth more in a run at the power limit;
    # attention from rows of 1024 against rows of 2048; the products' share fitted to five runs (124M, 350M, 1558M),
    # which the whole meets to 3 %.
    product_share=0.63,
    attention_share=0.723,
    traffic=47.5,
    logits_traffic=6,
    weight_traffic=16,
    launches=30,
    origin="fused kernels, bfloat16: memory counted, time measured on an H100 SXM (124M, 350M, 1558M)",
)
COMPILED_FULL = Path(
    # Counted. As in bfloat16, products' inputs, q, k, v and GELU in float32: 8 + 28 + 12 + 16.
    activation=64,
    norms=4,
    last=12,
    logits=4,
    mask=4,
    masks="one",
    copies=0,
    head_copies=0,
    fresh=4,
    tied=0,
    workspace=CUBLAS_BYTES,
    product_share=0.75,
    attention_share=0.723,
    traffic=320,  # as compiled bfloat16, with what is bfloat16 there doubled; not measured
    logits_traffic=22,
    weight_traffic=16,
    launches=40,
    origin="torch.compile, float32: memory counted, time estimated from bfloat16",
)
EAGER_FULL = Path(
    # Counted, and measured with the profiler's allocations on a CPU: exact to 0.1 % (tests/tools).
    activation=64,
    norms=8,
    last=8,
    logits=12,
    mask=4,
    masks="each layer",
    copies=0,
    head_copies=0,
    fresh=0,
    tied=12,
    workspace=CUBLAS_BYTES,
    product_share=0.75,
    attention_share=0.723,
    traffic=420,
    logits_traffic=80,
    weight_traffic=16,
    launches=90,
    origin="eager, float32: memory counted, time estimated from the operations",
)
COMPILED_FP8 = replace(
    COMPILED_HALF,
    # Counted. x̂ of two norms in float32 8, q, k, v 6, before GELU 8, attended 2, the same for its product 1: the other
    # products' inputs, and the weights, are rounded once more in the backward.
    activation=25,
    copies=0,
    # Measured on an H100 SXM: gpt2-124m 1,120.0 ms, gpt2-1558m of 8 layers 526.6 ms; these two make exactly that.
    fp8_share=0.598,
    casts=137,
    origin="torch.compile, FP8: memory counted, time measured on an H100 SXM (124M and 8 layers of 1558M)",
)
EAGER_FP8 = replace(
    EAGER_HALF,
    # Counted. Residual stream into two norms 8, inputs of four products 7, q, k, v 6, attended 2, before GELU 8.
    activation=31,
    copies=1,
    fp8_share=0.698,
    # The linear layers of a block are given 7 numbers a channel and give 9, whose gradients are cast: read for the
    # maximum (2 bytes) and the cast (2), written (1), and once more, transposed (2).
    casts=16 * 7,
    origin="eager, FP8: memory counted, time reckoned from the operations and not measured",
)
FUSED_FP8 = replace(
    FUSED_HALF,
    # Counted in kernels/gpt2_fp8.py. Residual stream 2 + 2, norms' results 1 + 1, q, k, v 6, attended 2 + 1, before and
    # after GELU 8 + 4. Copies: bfloat16, as validation wants it, and FP8 both ways.
    activation=27,
    copies=4,
    # Fitted to four runs on an H100 SXM (124M twice, 350M, 1558M), which it meets to 1.2 %. GELU and bias sums, which
    # `traffic` and products have in bfloat16, move into the casts, so little is left on top.
    fp8_share=0.473,
    casts=21,
    origin="fused kernels, FP8: memory counted, time measured on an H100 SXM (124M, 350M, 1558M)",
)
PATHS = {
    ("compiled", "fp8"): COMPILED_FP8,
    ("eager", "fp8"): EAGER_FP8,
    ("compiled", "half"): COMPILED_HALF,
    ("eager", "half"): EAGER_HALF,
    ("fused", "half"): FUSED_HALF,
    ("fused", "fp8"): FUSED_FP8,
    ("compiled", "full"): COMPILED_FULL,
    ("eager", "full"): EAGER_FULL,
}

# With dropout, per head and pair of positions: the probabilities, their mask, and what is left of them, as counted on
# the plain path (tests/tools/test_plan_memory.py); compiled code may keep less. Masks of residuals: a byte a number.
DROPOUT_PAIR_BYTES = {"full": 9, "half": 7}
LSE_BYTES = 4  # per token, layer and head: attention keeps a float32 log-sum-exp (Dao 2023, section 3.1)
CHECKPOINT_BYTES = 12  # per parameter: float32 weights and two moments
MOMENTS = {"adamw": 2}  # tensors as large as the parameters that an optimizer keeps
OFFLOAD_BYTES = 3 * 2 * 4 * 2**23  # on the device with moments in host memory: three pieces of both (train/offload.py)
BLOCK_INPUT_BYTES = 4  # per N·L·C with activation checkpointing: each block's input, float32 (counted)
RECOMPUTED = {
    "half": 1.5,
    "full": 1.3,
}  # of one block's activations: with the gradients that its backward makes (measured)
RECOMPUTE_SHARE = 1 / 3  # of a block's forward and backward: its forward, made again

# --- memory of a GPU beside tensors ---
CONTEXT_BYTES = 0.7 * 2**30  # CUDA context and loaded kernels, outside of PyTorch's count; 0.5 to 0.8 GiB seen, assumed
FRAGMENTED_SHARE = 0.03  # of the peak: blocks that the allocator holds and cannot use; assumed

# --- memory of a process on a CPU beside tensors, Linux, glibc, torch 2.13, measured 2026-11-22 (docs/log.md) ---
PROCESS_BYTES = 320 * 2**20  # Python, torch and regpt imported, the model's class used once; read anew where possible
RUN_BYTES = (
    33 * 2**20
)  # the rest of a run: oneDNN's kernels and buffers, batches made ahead, terminal, tokenizer's code
TOKENIZER_BYTES = 430  # per entry of the vocabulary: GPT-2's 50,257 take 20.6 MiB
KEPT_BELOW_BYTES = 32 * 2**20  # glibc keeps freed blocks below this size (its largest M_MMAP_THRESHOLD) in the process
MALLOC_SHARE = 0.02  # of the tensors: what lies between blocks

# --- time ---
LAUNCH_SECONDS = 6e-6  # for PyTorch to launch a kernel: the floor of small models on a GPU; typical, not measured
STEP_SECONDS = (
    0.010  # of a GPU a step: nothing to do while the host reads the loss and starts the next; H100, see above
)
OPTIMIZER_TRAFFIC = (
    44  # bytes per parameter and step: fused AdamW reads 16, writes 12; norm and clipping 12; 90 % of peak
)
# Between host and GPU, PCIe 5 (Hopper on) or 4; typical, not measured.
HOST_BYTES_PER_SECOND = {True: 50e9, False: 25e9}
LINK_SHARE = 0.6  # of a link's rate, reached by an all-reduce in buckets; assumed
LARGE_PRODUCT_SHARE = 0.78  # an 8192³ bfloat16 product on an H100 SXM: 768 of 989 TFLOP/s
FORWARD_SHARE = 0.36  # of a micro-batch's time: its forward alone, as validation runs it (a third of the products)
START_SECONDS = {True: 45.0, False: 10.0}  # compiled or not: imports, building, the first step
DISK_BYTES_PER_SECOND = 1e9  # writing a checkpoint; assumed

# --- judgement ---
GOOD_EPOCHS = 4  # Muennighoff et al. 2023: up to four epochs are nearly as good as new data
USELESS_EPOCHS = 16  # the same: after about sixteen, repeating brings almost nothing
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022: what is optimal for a given number of FLOPs


def path_of(name: str, precision: str) -> Path:
    """The numbers of a path; fp64 is planned as float32 of twice the size (`memory.py`).

    Raises:
        UsageError: no such combination.
    """
    width = "fp8" if precision == "fp8" else "half" if precision in ("bf16", "fp16") else "full"
    if (name, width) not in PATHS:
        raise UsageError(f"the {name} path does not compute in {precision}; set train.kernels to plain or auto")
    return PATHS[name, width]
