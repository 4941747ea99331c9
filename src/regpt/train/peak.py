"""MFU: the FLOPs of a token, and the peak FLOP/s of a device, from its data sheet or else measured."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from regpt.console.text import counted
from regpt.kernels import fp8
from regpt.model.transformer import Transformer
from regpt.model.weights import is_adapter
from regpt.train.config import PrecisionName
from regpt.train.devices import Device, device_by_driver

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
DTYPES |= {"fp16": torch.float16, "fp8": fp8.E4M3}
PRODUCT_SIZE = {"cpu": 1024, "mps": 2048, "cuda": 4096}  # large enough for the best rate, done in milliseconds
SLOW_SIZE = 256  # of float16 on a CPU, which most CPUs have no units for: a larger product takes seconds
MEASURE_SECONDS = 0.2  # once a run
LEAST_PRODUCTS, MOST_PRODUCTS = 3, 50


def flops_per_token(model: Transformer, seq_len: int) -> int:
    """FLOPs of forward and backward for one token: 6 per weight of a matrix product (head included, vocabulary
    unpadded) plus attention (Chowdhery et al. 2022, appendix B). A frozen base has no gradients of weights: 4 for each
    of them, 6 for each of the adapters'."""
    learning = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    products = 4 * model.matmul_parameters() + 6 * learning if learning else 6 * model.matmul_parameters()
    return products + model.attention_flops(seq_len)


@dataclass(frozen=True)
class Peak:
    """The rate of which MFU is a share.

    Attributes:
        flops: FLOP/s of one device.
        how: where the figure is from, in words.
    """

    flops: float
    how: str

    def __str__(self) -> str:
        return f"{self.flops / 1e12:,.4g} TFLOP/s ({self.how})"


@functools.cache  # measured once in a process: at the start of a run
def device_peak(device: torch.device, precision: PrecisionName) -> Peak:
    """Data-sheet peak of `device` in dense bfloat16, of FP8 for fp8 (`Device.mfu_precision`); of a device without one,
    a matrix product in the format of `precision`, measured now in about 0.2 s."""
    sheet = device_figures(device)
    if sheet is not None:
        listed = sheet.mfu_precision(precision)
        return Peak(sheet.peak(precision), f"data sheet of the {sheet.name}, dense {listed}")
    n = SLOW_SIZE if (device.type, precision) == ("cpu", "fp16") else PRODUCT_SIZE.get(device.type, 1024)
    flops = matmul_flops(device, precision, n)
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return Peak(flops, f"measured here: a {precision} product of {n} × {n} matrices on {device.type}{threads}")


def device_figures(device: torch.device) -> Device | None:
    """The data sheet of `device`, None when the table does not have it; CPUs have none."""
    return device_by_driver(driver_name(device))


def driver_name(device: torch.device) -> str:
    """Name of `device` as its driver has it; its kind where it has no name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return torch.backends.mps.get_name()
    return device.type


def matmul_flops(device: torch.device, precision: str, n: int, seconds: float = MEASURE_SECONDS) -> float:
    """FLOP/s of the fastest of the products of two n × n matrices that fit into `seconds` (at least three).

    The fastest, not the mean: what else runs on the machine slows a product down and never speeds it up.

    Raises:
        RuntimeError: the device cannot multiply in this format.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        generator = torch.Generator(device).manual_seed(0)  # its own: a run's random state is not touched
        a, b = (torch.randn(n, n, device=device, generator=generator).to(DTYPES[precision]) for _ in range(2))
        multiply = fp8_product(device) if precision == "fp8" else torch.mm
        multiply(a, b)  # the first one chooses and loads its kernel
        synchronize(device)
        best, started, products = float("inf"), time.perf_counter(), 0
        while products < LEAST_PRODUCTS or (products < MOST_PRODUCTS and time.perf_counter() - started < seconds):
            begin = time.perf_counter()
            multiply(a, b)
            synchronize(device)
            best, products = min(best, time.perf_counter() - begin), products + 1
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * n**3 / best


def fp8_product(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    one = torch.ones((), device=device)
    return lambda a, b: fp8.product(a, b, one, one, torch.bfloat16)


def synchronize(device: torch.device) -> None:
    """Wait for what is queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
