"""Precisions, attention, rates, a training step, tried on one device."""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from regpt.data.batch import Batch
from regpt.kernels import fp8
from regpt.kernels.select import select_kernels
from regpt.model.config import ModelConfig
from regpt.model.transformer import Transformer
from regpt.model.weights import initialize
from regpt.tools.doctor.trial import Attempt, Trial, attempt, attempts
from regpt.tools.measure import bandwidth_bytes, memory_bytes
from regpt.train.config import OptimConfig
from regpt.train.loss import make_loss_sum
from regpt.train.optim import make_optimizer
from regpt.train.peak import device_figures, driver_name, matmul_flops

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ON_DEVICE = {"cpu": ("flash", "math"), "mps": ("math",)}  # the others are of CUDA
PRECISIONS = {"cpu": ("fp32", "bf16", "fp16"), "mps": ("fp32", "bf16", "fp16")}
CUDA_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
SIZES = {"cuda": 8192, "mps": 2048, "cpu": 1024}  # of the products whose rate is measured
SLOW_SIZE = 256  # of float16 on CPUs, most of which emulate it
RATE_SECONDS = 0.3
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 3e-2, "fp16": 1e-2}
SHAPE = (2, 4, 128, 64)  # B, H, T, D of attention
TINY = ModelConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=256, max_seq_len=64)


def devices() -> list[torch.device]:
    """Those that are here, the CPU last."""
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return found + ([torch.device("mps")] if torch.backends.mps.is_available() else []) + [torch.device("cpu")]


def name_of(device: torch.device) -> str:
    return str(device) if device.type == "cuda" else device.type


def training_trials(device: torch.device) -> Iterator[Trial]:
    """What `device` is, and whether it trains."""
    group = name_of(device)
    yield attempt(group, "device", lambda: describe(device))
    yield attempt(group, "training step", lambda: training_step(device))


def device_trials(device: torch.device) -> Iterator[Trial]:
    """What else works on `device`."""
    group = name_of(device)
    precisions = PRECISIONS.get(device.type, CUDA_PRECISIONS)
    yield from attempts(group, ((f"product {name}", check_product(device, name)) for name in precisions))
    if device.type != "mps":  # which has no such type
        yield attempt(group, "linear fp8", lambda: fp8_linear(device))
    backends = ON_DEVICE.get(device.type, tuple(BACKENDS))
    yield from attempts(group, ((f"attention {name}", check_attention(device, name)) for name in backends))
    if device.type == "cuda":
        yield attempt(group, "fused kernels", lambda: fused_kernels(device))
        if fp8.obstacle(device) is None:
            yield attempt(group, "fused fp8", lambda: fused_fp8(device))


def rate_trials(device: torch.device) -> Iterator[Trial]:
    """How fast `device` multiplies and copies."""
    group = name_of(device)
    precisions = PRECISIONS.get(device.type, CUDA_PRECISIONS)
    fp8_too = ("fp8",) if device.type == "cuda" and fp8.obstacle(device) is None else ()
    yield from attempts(group, ((f"rate {name}", product_rate(device, name)) for name in (*precisions, *fp8_too)))
    yield attempt(group, "memory bandwidth", lambda: bandwidth(device))


def describe(device: torch.device) -> str:
    size = memory_bytes(device)
    memory = "" if size is None else f", {size / 2**30:.1f} GiB"
    if device.type != "cuda":
        return f"{driver_name(device)}{memory}"
    major, minor = torch.cuda.get_device_capability(device)
    sheet = device_figures(device)
    peak = f"data sheet {sheet.peak_flops / 1e12:,.4g} TFLOP/s" if sheet else "no data sheet known: MFU is measured"
    return f"{driver_name(device)}{memory}, compute capability {major}.{minor}, {peak}"


def check_product(device: torch.device, precision: str) -> Attempt:
    """A small product in this format against float64."""

    def run() -> str:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
            a, b = (numbers(seed, 128, 128) for seed in (0, 1))
            found = (a.to(device, dtype) @ b.to(device, dtype)).double().cpu()
        finally:
            torch.set_float32_matmul_precision(before)
        return close(found, a.double() @ b.double(), TOLERANCE[precision])

    return run


def fp8_linear(device: torch.device) -> str:
    """A layer as `train.precision` fp8 computes it: forward and both gradients."""
    reason = fp8.obstacle(device)
    if reason is not None:
        raise RuntimeError(reason)
    slowly = ", in software: for tests" if device.type == "cpu" else ""
    return f"e4m3 forward, e5m2 backward, relative error {fp8.error_of_linear(device):.1e}{slowly}"


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float) -> str:
    """The relative error in words.

    Raises:
        ArithmeticError: it is above `tolerance`.
    """
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= tolerance:  # "not <=": NaN fails too
        raise ArithmeticError(f"relative error {error:.1e}, {tolerance:.0e} at most is expected")
    return f"relative error {error:.1e}"


def check_attention(device: torch.device, backend: str) -> Attempt:
    """Causal attention forward and backward by this backend alone, in the format that training uses there."""

    def run() -> str:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        q, k, v = (numbers(seed, *SHAPE).to(device, dtype).requires_grad_() for seed in range(3))
        with sdpa_kernel([BACKENDS[backend]]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            out.sum().backward()
        assert q.grad is not None
        exact = exact_attention(*(x.detach().double().cpu() for x in (q, k, v)))
        return f"{str(dtype).removeprefix('torch.')}, {close(out.detach().double().cpu(), exact, TOLERANCE['bf16'])}"

    return run


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / q.size(-1) ** 0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v


def fused_kernels(device: torch.device) -> str:
    """The fused path's loss and gradients against the plain path's, if it is chosen here."""
    model = initialize(Transformer(TINY).to(device), 0)
    chosen = select_kernels("auto", model, device, "bf16")
    if chosen.name != "fused":
        raise RuntimeError(chosen.reason)
    fused = one_update(model, make_loss_sum(model, "bf16", device, False, "fused"), device)
    again = initialize(Transformer(TINY).to(device), 0)
    plain = one_update(again, make_loss_sum(again, "bf16", device, False), device)
    return f"{chosen.reason}; {close(torch.tensor(fused), torch.tensor(plain), TOLERANCE['bf16'])}"


def fused_fp8(device: torch.device) -> str:
    """The fused path in FP8: it is refused where its kernels do not store the same by rows and by columns."""
    model = initialize(Transformer(TINY).to(device), 0)
    return select_kernels("fused", model, device, "fp8").reason


def training_step(device: torch.device) -> str:
    """Two updates of a tiny model in float32: the second loss on the same batch is lower."""
    with contextlib.nullcontext() if device.type != "cuda" else torch.cuda.device(device):
        model = initialize(Transformer(TINY).to(device), 0)
        loss_sum = make_loss_sum(model, "fp32", device, False)
        first = one_update(model, loss_sum, device)
        second = one_update(model, loss_sum, device)
    if not second < first:
        raise ArithmeticError(f"the loss did not fall: {first:.4f}, then {second:.4f}")
    return f"loss {first:.3f}, after one update {second:.3f}"


def one_update(model: Transformer, loss_sum: Callable[[Batch], Tensor], device: torch.device) -> float:
    """Forward, backward, AdamW; the loss a token before it."""
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2), device)
    tokens = (torch.arange(4 * 65).view(4, 65) * 7 % TINY.vocab_size).to(device)
    loss = loss_sum(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())) / (4 * 64)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def product_rate(device: torch.device, precision: str) -> Attempt:
    n = SLOW_SIZE if (device.type, precision) == ("cpu", "fp16") else SIZES[device.type]

    def run() -> tuple[str, float, str]:
        rate = matmul_flops(device, precision, n, seconds=RATE_SECONDS) / 1e12
        return f"{rate:,.4g} TFLOP/s, the best product of {n} × {n} matrices", rate, "TFLOP/s"

    return run


def bandwidth(device: torch.device) -> tuple[str, float, str]:
    rate = bandwidth_bytes(device) / 1e9
    return f"{rate:,.0f} GB/s read and written by a copy", rate, "GB/s"
