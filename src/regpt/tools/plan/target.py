"""The device that a run is planned for: a GPU of the table, or this machine, measured where no data sheet is known."""

from dataclasses import dataclass

import torch

from regpt.console.text import counted
from regpt.parallel.mesh import choose_device
from regpt.tools.measure import bandwidth_bytes, memory_bytes
from regpt.train.config import PrecisionName
from regpt.train.devices import Device, device_by_name
from regpt.train.peak import PRODUCT_SIZE, device_figures, device_peak, driver_name, matmul_flops

LARGE_PRODUCT_SHARE = 0.78  # an 8192³ bfloat16 product on an H100 SXM: 768 of 989 TFLOP/s
MEASURED = "measured here"


@dataclass(frozen=True)
class Target:
    """One device.

    Attributes:
        name: of the device.
        kind: gpu, cpu or mps.
        figures: of a GPU: its data sheet's, or in their place what was measured.
        here: the device itself where it is part of this machine.
        memory: bytes that it has.
        peak: FLOP/s of which MFU is a share.
        how: where the figures are from.
    """

    name: str
    kind: str
    figures: Device | None
    here: torch.device | None
    memory: float
    peak: float
    how: str


def target_of(typed: str, device: str, precision: PrecisionName) -> Target:
    """The device that `--gpu` names, or with an empty name this machine's `device` (auto, cuda, mps, cpu).

    Raises:
        UsageError: a GPU that the table does not have, or a device that this machine does not have.
    """
    here, figures = None, None
    if typed and typed.lower() != "cpu":
        figures = device_by_name(typed)
        if torch.cuda.is_available() and device_figures(torch.device("cuda")) == figures:
            here = torch.device("cuda")
    else:
        here = choose_device(typed.lower() or device)
        if here.type != "cuda":
            return this_host(here, precision)
        figures = device_figures(here) or measured_figures(here)
    memory = memory_bytes(here) if here else figures.memory_gib * 2**30
    how = figures.source if figures.source.startswith(MEASURED) else f"data sheet: {figures.source}"
    return Target(figures.name, "gpu", figures, here, memory, figures.peak(precision), how)


def measured_figures(here: torch.device) -> Device:
    """Figures of a GPU without a data sheet: large products and copies on it, scaled up to what sheets promise."""

    def rate(precision: str) -> float | None:
        try:
            return matmul_flops(here, precision, PRODUCT_SIZE["cuda"]) / LARGE_PRODUCT_SHARE / 1e12
        except RuntimeError:  # not on this device
            return None

    rates = {name: rate(name) for name in ("fp32", "tf32", "bf16", "fp16", "fp8")}
    major, minor = torch.cuda.get_device_capability(here)
    return Device(
        name=driver_name(here),
        driver=(),
        also=(),
        capability=major + minor / 10,
        **(rates | {"fp32": rates["fp32"] or 1.0}),  # type: ignore[arg-type]
        memory_gib=memory_bytes(here) / 2**30,
        bandwidth=bandwidth_bytes(here) / 1e9,
        link=None,
        source=f"{MEASURED}: products of {PRODUCT_SIZE['cuda']}² matrices and copies, no data sheet is known",
    )


def this_host(here: torch.device, precision: PrecisionName) -> Target:
    """A CPU, or Apple's GPU, on which a step is timed."""
    peak = device_peak(here, precision)
    name = driver_name(here) if here.type == "mps" else f"CPU with {counted(torch.get_num_threads(), 'thread')}"
    return Target(name, here.type, device_figures(here), here, memory_bytes(here), peak.flops, peak.how)
