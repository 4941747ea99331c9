"""Training steps and a collective, tried on one device.

`python -m regpt.tools.doctor.device GROUP` tries a group in a process of its own: a trial may crash, hang, or leave a
GPU in a state in which nothing works. Each trial is printed as soon as it is finished, one JSON object a line, so those
before a crash are known.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from regpt.console.lines import print_line
from regpt.data.batch import Batch
from regpt.kernels.select import ops_of, select_kernels
from regpt.model.config import ModelConfig
from regpt.model.families import make_model
from regpt.model.weights import initialize
from regpt.parallel.backends import sum_alone
from regpt.tools.doctor.doctor import MARK, TRAINING, Attempt, Trial, attempt
from regpt.tools.measure import memory_bytes
from regpt.train.backend import make_loss_sum
from regpt.train.config import OptimConfig, PrecisionName
from regpt.train.optim import make_optimizer
from regpt.train.peak import device_figures, driver_name
from regpt.train.precision import matmul_precision, parameter_dtype

PRECISIONS: dict[str, tuple[PrecisionName, ...]] = {
    "cuda": ("fp32", "tf32", "bf16", "fp16", "fp8"),
    "mps": ("fp32", "bf16", "fp16"),
    "cpu": ("fp32", "bf16", "fp16", "fp8"),
}
# Relative, of the gradients of the tiny model: ten times the rounding of the format; e5m2 makes some 5 % alone.
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2, "fp8": 0.25}
TINY = ModelConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=256, max_seq_len=64)


def devices() -> list[torch.device]:
    """The devices of this machine, the CPU last."""
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return found + ([torch.device("mps")] if torch.backends.mps.is_available() else []) + [torch.device("cpu")]


def name_of(device: torch.device) -> str:
    return str(device) if device.type == "cuda" else device.type


def training_trials(device: torch.device) -> Iterator[Trial]:
    """The device, whether it trains, and a sum over one process."""
    group, backend = name_of(device), "nccl" if device.type == "cuda" else "gloo"
    yield attempt(group, "device", lambda: describe(device))
    yield attempt(group, TRAINING, lambda: training_step(device))
    if device.type != "mps":
        yield attempt(group, backend, lambda: f"sum of one process: {sum_alone(backend, device):g}")


def step_trials(device: torch.device) -> Iterator[Trial]:
    """A step in each number format, and of the fused path."""
    group = name_of(device)
    for precision in PRECISIONS[device.type]:
        yield attempt(group, f"step {precision}", step_in(device, precision))
    if device.type == "cuda":
        for precision in ("bf16", "fp8"):
            yield attempt(group, f"fused step {precision}", step_in(device, precision, kernels="fused"))


def compile_trials(device: torch.device) -> Iterator[Trial]:
    precision: PrecisionName = "fp32" if device.type == "cpu" else "bf16"
    yield attempt(name_of(device), "compiled step", step_in(device, precision, compile=True))


GROUPS = {"training": training_trials, "steps": step_trials, "compile": compile_trials}


def describe(device: torch.device) -> str:
    text = f"{driver_name(device)}, {memory_bytes(device) / 2**30:.1f} GiB"
    if device.type != "cuda":
        return text
    major, minor = torch.cuda.get_device_capability(device)
    sheet = device_figures(device)
    peak = f"data sheet {sheet.peak_flops / 1e12:,.4g} TFLOP/s" if sheet else "no data sheet known: MFU is measured"
    return f"{text}, compute capability {major}.{minor}, {peak}"


def training_step(device: torch.device) -> str:
    """Two updates of a tiny model in float32: the second loss on the same batch is lower."""
    model = initialize(make_model(TINY).to(device), 0)
    loss_sum = make_loss_sum(model, "fp32", device, False)
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2), device)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_sum(tiny_batch(device)) / (4 * 64)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not losses[1] < losses[0]:
        raise ArithmeticError(f"the loss did not fall: {losses[0]:.4f}, then {losses[1]:.4f}")
    return f"loss {losses[0]:.3f}, after one update {losses[1]:.3f}"


def tiny_batch(device: torch.device) -> Batch:
    tokens = (torch.arange(4 * 65).view(4, 65) * 7 % TINY.vocab_size).to(device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def step_in(
    device: torch.device, precision: PrecisionName, *, kernels: str = "plain", compile: bool = False
) -> Attempt:
    """Gradients of the tiny model as training computes them, against float64 on the CPU."""

    def run() -> str:
        how = ", compiled" if compile else ""
        if kernels == "fused":
            model = initialize(make_model(TINY).to(device), 0)
            how = f", {select_kernels('fused', model, device, precision).reason}"
        exact = gradients(torch.device("cpu"), "fp64")
        found = gradients(device, precision, kernels, compile)
        return f"gradients of the tiny model{how}: {close(found, exact, TOLERANCE[precision])}"

    return run


def gradients(device: torch.device, precision: PrecisionName, kernels: str = "plain", compile: bool = False) -> Tensor:
    """All gradients of a micro-batch in one vector, float64 on the CPU."""
    with matmul_precision(precision):
        model = initialize(make_model(TINY, ops_of(precision, device)).to(device, parameter_dtype(precision)), 0)
        loss_sum = make_loss_sum(model, precision, device, compile, kernels)  # type: ignore[arg-type]
        (loss_sum(tiny_batch(device)) / (4 * 64)).backward()
    return torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])


def close(found: Tensor, expected: Tensor, tolerance: float) -> str:
    """The relative error in words; raise an ArithmeticError above `tolerance`."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= tolerance:  # "not <=": NaN fails too
        raise ArithmeticError(f"relative error {error:.1e}, {tolerance:.0e} at most is expected")
    return f"relative error {error:.1e}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for one in devices():
        for trial in GROUPS[sys.argv[1]](one):
            print_line(MARK + json.dumps(asdict(trial)))
