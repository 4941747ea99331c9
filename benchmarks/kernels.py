"""Each piece of the fused path at GPT-2 124M's shapes on one CUDA device: error against float32, time, and floor.

    python benchmarks/kernels.py [--rows 64] [--only whole products attention between head masks] [--json FILE]

`head` is the loss of 16,384 rows of 2,048 features over two vocabularies, forward and backward, in bfloat16: all logits
at once, and in chunks (`regpt.model.head`). Its memory is the peak on top of inputs and gradients.

`masks` is attention of 2 rows of 8,192 tokens, forward and backward, by every way to a document mask and a window, as
a multiple of causal attention without either; memory as for `head`, the error against booleans, both in bfloat16.

A floor is the larger of the bytes that must move over 3.35 TB/s (data sheet of an H100 SXM) and of the operations over
the rate that an 8192³ product reached in the same process.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from triton.testing import do_bench  # pyright: ignore[reportMissingImports]

from regpt.config import read_config
from regpt.data.batch import Batch
from regpt.kernels import triton_head, triton_ops
from regpt.kernels.attention import CudnnAttention
from regpt.kernels.cublaslt import Products
from regpt.kernels.gpt2 import FusedGPT2
from regpt.kernels.masked import TorchAttention, attend_in_band, band, cudnn, flash
from regpt.model.families import make_model
from regpt.model.head import in_chunks, padded_logits, rows_at_once, summed_losses
from regpt.model.masks import CAUSAL, AttentionMask, sdpa_mask
from regpt.model.ops import attention as plain_attention
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.train.backend import make_loss_sum

DEVICE = torch.device("cuda")
BANDWIDTH = 3.35e12
T, H, D, V, N_VOCAB = 1024, 12, 64, 50304, 50257
C = H * D


class Table:
    """Rows of results, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.rate = 8e14

    def time(
        self,
        name: str,
        call: Callable[..., Any],
        *args: Any,
        flops: float = 0,
        moved: float = 0,
        error: float = 0,
        **kw,
    ) -> float:
        ms = do_bench(lambda: call(*args, **kw), warmup=15, rep=60, return_mode="median")
        floor = max(flops / self.rate, moved / BANDWIDTH) * 1e3
        self.rows.append({"name": name, "ms": ms, "floor_ms": floor, "error": error})
        speed = f"{flops / ms / 1e9:5.0f} TFLOP/s" if flops else f"{moved / ms / 1e6:5.0f} GB/s"
        print(f"{name:36} {ms:8.3f} ms   floor {floor:7.3f}   {speed}   error {error:.1e}", flush=True)
        return ms


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).bfloat16()


def relative(given: Tensor, expected: Tensor) -> float:
    return ((given.double() - expected.double()).norm() / expected.double().norm()).item()


def products(table: Table, N: int) -> None:
    lt = Products(DEVICE)
    square = randn(8192, 8192)
    ms = table.time("8192³, torch", torch.mm, square, square, flops=2 * 8192**3)
    table.rate = 2 * 8192**3 / ms * 1e3
    for name, n_in, n_out in (("qkv", C, 3 * C), ("proj", C, C), ("fc", C, 4 * C), ("proj2", 4 * C, C), ("head", C, V)):
        x, w, bias, dy = randn(N, n_in), randn(n_out, n_in, scale=0.02), randn(n_out), randn(N, n_out)
        out, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.zeros(n_out, n_in, device=DEVICE)
        flops = 2.0 * N * n_in * n_out
        forward = {"transpose_b": True} | ({} if name == "head" else {"epilogue": "bias", "bias": bias})
        few = F.linear(x[:512].float(), w.float(), None if name == "head" else bias.float())
        lt(x, w, out, **forward)
        table.time(f"{name} forward", lt, x, w, out, flops=flops, error=relative(out[:512], few), **forward)
        table.time(f"{name} forward, torch", F.linear, x, w, None if name == "head" else bias, flops=flops)
        if name.startswith("proj"):
            table.time(f"{name} forward + residual", lt, x, w, out, flops=flops, add=dy, **forward)
        if name == "fc":
            gelu = forward | {"epilogue": "gelu_aux_bias", "aux": torch.empty_like(out)}
            lt(x, w, out, **gelu)
            error = relative(out[:512], F.gelu(few, approximate="tanh"))
            table.time("fc forward, GELU", lt, x, w, out, flops=flops, error=error, **gelu)
        lt(dy, w, dx)
        error = relative(dx[:512], dy[:512].float() @ w.float())
        table.time(f"{name} dx", lt, dy, w, dx, flops=flops, error=error)
        if name == "proj2":
            dgelu = {"epilogue": "dgelu", "aux": randn(N, n_in)}
            table.time("proj2 dx, GELU's derivative", lt, dy, w, dx, flops=flops, **dgelu)
        add = {"transpose_a": True, "add": dw}
        table.time(f"{name} dw, added in float32", lt, dy, x, dw, flops=flops, **add)
        del x, w, dy, out, dx, dw
        torch.cuda.empty_cache()


def attention(table: Table, B: int) -> None:
    qkv, dout = randn(B, T, 3 * C), randn(B, T, C)
    flops = 2.0 * B * H * T * T * D  # causal: half of the scores
    through_torch, packed = TorchAttention(), CudnnAttention(DEVICE)
    leaf = qkv.detach().requires_grad_()
    with torch.enable_grad():
        ref = through_torch.attend(leaf, H, CAUSAL)
    (dref,) = torch.autograd.grad(ref, leaf, dout, retain_graph=True)
    table.time("attention forward, torch", through_torch.attend, qkv, H, CAUSAL, flops=flops)
    table.time("attention backward, torch", torch.autograd.grad, ref, leaf, dout, retain_graph=True, flops=2.5 * flops)
    for name, mask in (("", CAUSAL), (", documents of 400", AttentionMask(documents=documents(B)))):
        out, stats = packed.forward(qkv, H, mask)
        error = 0 if mask.packed else relative(out, ref)
        table.time(f"attention forward, packed{name}", packed.forward, qkv, H, mask, flops=flops, error=error)
        given = (dout, qkv, out, stats, H, mask)
        error = 0 if mask.packed else relative(packed.backward(*given), dref)
        table.time(f"attention backward, packed{name}", packed.backward, *given, flops=2.5 * flops, error=error)


def documents(B: int, T: int = T, mean: int = 400) -> Tensor:
    """Cumulative lengths of documents of `mean` tokens in the mean, cut where rows end, padded to a power of two."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(4 * B * T // mean).exponential_(1 / mean, generator=generator).long() + 1
    starts = torch.cat([lengths.cumsum(0), torch.arange(0, B * T + 1, T)]).unique()
    cu = starts[starts <= B * T]
    size = 1 << (len(cu) - 1).bit_length()
    return F.pad(cu, (0, size + 1 - len(cu)), value=B * T).to(DEVICE)


def between(table: Table, N: int) -> None:
    x, dh, residual = randn(N, C), randn(N, C), randn(N, C)
    weight, bias, total = (torch.randn(C, device=DEVICE) for _ in range(3))
    h, (mean, rstd) = triton_ops.layer_norm(x, weight, bias, 1e-5)
    error = relative(h, F.layer_norm(x.float(), (C,), weight, bias))
    table.time("norm forward", triton_ops.layer_norm, x, weight, bias, 1e-5, moved=4.0 * N * C, error=error)
    given = (dh, x, weight, mean, rstd, residual)
    table.time("norm backward", triton_ops.layer_norm_backward, *given, moved=8.0 * N * C)
    sums = triton_ops.layer_norm_backward(*given)[1]
    table.time("partial sums", triton_ops.add_partial_sums, sums, [(total, True)] * 3)
    wide, wide_sum = randn(N, 4 * C), torch.zeros(4 * C, device=DEVICE)
    triton_ops.add_column_sums(wide, wide_sum, False)
    error = relative(wide_sum, wide.double().sum(0))
    table.time("column sums", triton_ops.add_column_sums, wide, wide_sum, True, moved=8.0 * N * C, error=error)
    ids = (torch.rand(N // T, T, device=DEVICE) ** 4 * N_VOCAB).long()  # some are frequent, as in text
    wte, wpe = torch.randn(V, C, device=DEVICE), torch.randn(T, C, device=DEVICE)
    table.time("embed", triton_ops.embed, ids, None, wte, wpe, torch.bfloat16, moved=2.0 * N * C)
    table.time("embed backward", triton_ops.embed_backward, dh, ids, None, wte, wpe, moved=2.0 * N * C)
    logits, targets = randn(N, V), torch.randint(N_VOCAB, (N,), device=DEVICE)
    for block, warps in ((4096, 8), (4096, 16), (8192, 16), (16384, 32), (8192, 32)):
        triton_ops.LOGIT_BLOCK, triton_ops.LOGIT_WARPS = block, warps
        name = f"cross-entropy in place, {block} {warps}"
        given = (logits, targets, N_VOCAB, -100)
        table.time(name, triton_ops.cross_entropy, *given, gradient=True, moved=4.0 * N * V)


HEAD_N, HEAD_C, HEAD_VOCABULARIES = 16_384, 2048, (50_304, 128_256)


def head(table: Table) -> None:
    for rows_of_head in HEAD_VOCABULARIES:
        n_vocab = rows_of_head - 47 if rows_of_head == V else rows_of_head  # GPT-2's is padded
        given = randn(HEAD_N, HEAD_C), randn(rows_of_head, HEAD_C, scale=0.02)
        hidden, weight = (x.requires_grad_() for x in given)
        targets = torch.randint(n_vocab, (HEAD_N,), device=DEVICE)
        rows = rows_at_once(rows_of_head, torch.bfloat16)

        def at_once(hidden: Tensor, weight: Tensor, targets=targets, n_vocab=n_vocab) -> Tensor:
            return summed_losses(padded_logits(hidden, weight, n_vocab), targets)

        def chunked(hidden: Tensor, weight: Tensor, sums=None, given=(targets, n_vocab, 0.0, 0.0, rows)) -> Tensor:
            return in_chunks(hidden, weight, *given, sums)[0]

        exact = head_gradients(chunked, hidden.detach().float(), weight.detach().float())
        ways = {
            "whole": at_once,
            "whole, compiled": torch.compile(at_once, dynamic=False),
            f"{rows} rows": chunked,
            f"{rows} rows, Triton": partial(chunked, sums=triton_head.SUMS),
        }
        for name, loss in ways.items():
            head_row(table, f"head {rows_of_head:,} {name}", loss, hidden, weight, exact)


def head_row(table: Table, name: str, loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, exact: list) -> None:
    """One line of the table and one of memory; the weight's gradient in float32 counts as a gradient, not as extra."""
    error = max(map(relative, head_gradients(loss, hidden, weight), exact))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_gradients(loss, hidden, weight)
    extra = torch.cuda.max_memory_allocated() - before - 4 * weight.numel() - 2 * hidden.numel()
    flops = 6.0 * HEAD_N * weight.numel()
    ms = table.time(name, head_gradients, loss, hidden, weight, flops=flops, error=error)
    table.rows[-1]["extra_bytes"] = extra
    print(f"    {HEAD_N / ms * 1e3:,.0f} tokens/s, {extra / 2**30:.2f} GiB on top of inputs and gradients")


def head_gradients(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Gradients of the mean, as a step has them: a scale that is not 1."""
    of = hidden.requires_grad_(), weight.requires_grad_()
    return list(torch.autograd.grad(loss(*of) / HEAD_N, of))


MASK_T, MASK_ROWS, MASK_SHAPES = 8192, 2, {"llama-124m": (12, 12, 64), "llama3-1b": (32, 8, 64)}
Attention = Callable[..., Tensor]


def masks(table: Table) -> None:
    cuts = documents(MASK_ROWS, MASK_T, 1000)
    kinds = {
        f"documents of {MASK_ROWS * MASK_T / (len(cuts.unique()) - 1):,.0f}": AttentionMask(documents=cuts),
        "window 4096": AttentionMask(window=4096),
        "window 1024": AttentionMask(window=1024),
        "documents, window 1024": AttentionMask(window=1024, documents=cuts),
    }
    inputs, unmasked, expected = {}, {}, {}
    for name, (H_q, H_kv, D_head) in MASK_SHAPES.items():
        heads = (H_q, H_kv, H_kv, H_q)
        *leaves, dout = (randn(MASK_ROWS, MASK_T, n, D_head).transpose(1, 2) for n in heads)  # as projected
        inputs[name] = [y.requires_grad_() for y in leaves], dout
        unmasked[name] = mask_row(table, f"{name} causal", plain_attention, None, *inputs[name])
    for way, (call, translate) in WAYS.items():  # one after the other: an error of the device ends those that follow
        for name, (kind, mask) in product(inputs, kinds.items()):
            try:
                form, bound = translate(mask), expected.get((name, kind), ())
                mask_row(table, f"{name} {kind} {way}", call, form, *inputs[name], unmasked[name], bound)
                if way == "booleans":
                    expected[name, kind] = attended(call, form, *inputs[name])
            except Exception as error:  # a way without this mask is a line, too
                print(f"{name} {kind} {way}: {type(error).__name__} {str(error)[:200]}", flush=True)


def translated(mask: AttentionMask) -> Tensor | None:
    return sdpa_mask(mask, MASK_ROWS, MASK_T, MASK_T, DEVICE)


def attended(call: Attention, form: Any, leaves: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
    out = call(*leaves, form)
    return out, *torch.autograd.grad(out, leaves, dout)


def mask_row(
    table: Table,
    name: str,
    call: Attention,
    form: Any,
    leaves: list[Tensor],
    dout: Tensor,
    unmasked: float = 0,
    expected: tuple[Tensor, ...] = (),
) -> float:
    """One line of the table; the milliseconds."""
    error = max(map(relative, attended(call, form, leaves, dout), expected), default=0.0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attended(call, form, leaves, dout)
    extra = torch.cuda.max_memory_allocated() - before - 2 * sum(y.numel() for y in (*leaves, dout))
    ms = do_bench(lambda: attended(call, form, leaves, dout), warmup=30, rep=150, return_mode="median")
    of_forward = do_bench(lambda: call(*leaves, form), warmup=15, rep=60, return_mode="median")
    ratio = ms / (unmasked or ms)
    table.rows.append({"name": name, "ms": ms, "forward_ms": of_forward, "ratio": ratio, "extra_bytes": extra})
    table.rows[-1]["error"] = error
    figures = f"{ms:8.3f} ms, forward {of_forward:7.3f}, {ratio:5.2f} of causal, {extra / 2**20:7.1f} MiB"
    print(f"{name:50} {figures}, error {error:.1e}", flush=True)
    return ms


def cudnn_by_torch(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, window: int | None) -> Tensor:
    """cuDNN as torch calls it, which has documents but no windows."""
    if documents is None or window is not None:
        raise ValueError("no windows")
    flat = (y.flatten(0, 1) for y in (q, k, v))
    given = None, documents, documents, q.size(1), q.size(1), True, 0.0, True
    return torch.ops.aten._cudnn_attention_forward(*flat, *given)[0].view_as(q)


@partial(torch.compile, dynamic=False)
def flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=q.size(1) != k.size(1))  # type: ignore[return-value]


def block_mask(mask: AttentionMask) -> BlockMask:
    """Built by compiled code, which keeps no B·T² booleans; its time is printed."""
    token = torch.arange(MASK_ROWS * MASK_T, device=DEVICE)
    cuts = mask.documents
    ids = None if cuts is None else torch.searchsorted(cuts, token, right=True).view(MASK_ROWS, MASK_T)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = i >= j
        allowed = allowed if mask.window is None else allowed & (i - j < mask.window)
        return allowed if ids is None else allowed & (ids[b, i] == ids[b, j])

    make = torch.compile(create_block_mask, dynamic=False)
    given = seen, None if ids is None else MASK_ROWS, None, MASK_T, MASK_T, DEVICE
    made = make(*given)
    print(f"    block mask of FlexAttention: {do_bench(lambda: make(*given), warmup=10, rep=30):.3f} ms")
    return made


def in_band(mask: AttentionMask) -> Any:
    return band(mask, MASK_ROWS, MASK_T, MASK_T, DEVICE)


WAYS: dict[str, tuple[Attention, Callable[[AttentionMask], Any]]] = {
    "booleans": (plain_attention, translated),
    "flash": (partial(attend_in_band, attend=flash), in_band),
    "cudnn": (partial(attend_in_band, attend=cudnn), in_band),
    "flex": (flex, block_mask),
    "cudnn by torch": (partial(attend_in_band, attend=cudnn_by_torch), in_band),
}


def whole(table: Table, B: int) -> None:
    model = make_model(read_config("gpt2-124m").with_vocab_size().model).to(DEVICE)
    initialize(model, 0)
    ids = (torch.rand(B, T + 1, device=DEVICE) ** 4 * N_VOCAB).long()
    idx, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    fused = FusedGPT2(model, Products(DEVICE), CudnnAttention(DEVICE), triton_ops)
    alone = FusedGPT2(model, fused.products, fused.attention, triton_ops, overlap=False)
    ways: dict[str, Callable[[Batch], Tensor]] = {
        "fused": lambda batch: fused.loss_sum(*batch[:4]),
        "fused, one stream": lambda batch: alone.loss_sum(*batch[:4]),
        "plain, compiled": make_loss_sum(model, "bf16", DEVICE, True),
    }
    exact = gradients(model, make_loss_sum(model, "fp32", DEVICE, False), Batch(idx[:4], targets[:4]))
    for name, loss_sum in ways.items():
        error = max(
            relative(given, exact[key])
            for key, given in gradients(model, loss_sum, Batch(idx[:4], targets[:4])).items()
        )
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        step(loss_sum, Batch(idx, targets))
        torch.cuda.synchronize()
        first = time.perf_counter() - started
        ms = table.time(f"micro-step {name}", step, loss_sum, Batch(idx, targets), error=error)
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"    {B * T / ms * 1e3:,.0f} tokens/s, first {first:.1f} s, {memory:.2f} GiB")


def step(loss_sum: Callable[[Batch], Tensor], batch: Batch) -> None:
    (loss_sum(batch) / batch.idx.numel()).backward()


def gradients(model: Transformer, loss_sum: Callable[[Batch], Tensor], batch: Batch) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    step(loss_sum, batch)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=["whole", "products", "attention", "between"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, "cuDNN", torch.backends.cudnn.version())
    table = Table()
    sections = {
        "whole": lambda: whole(table, args.rows),
        "products": lambda: products(table, args.rows * T),
        "attention": lambda: attention(table, args.rows),
        "between": lambda: between(table, args.rows * T),
        "head": lambda: head(table),
        "masks": lambda: masks(table),
    }
    for name in args.only:
        sections[name]()
        torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(table.rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
