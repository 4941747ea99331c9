"""What a run is planned for: a GPU of the table, or what this machine has, measured where no data sheet is known."""

from dataclasses import dataclass

import torch

from regpt.console.text import counted
from regpt.parallel.mesh import choose_device
from regpt.tools.measure import bandwidth_bytes, memory_bytes
from regpt.tools.plan.coefficients import LARGE_PRODUCT_SHARE
from regpt.train.devices import Device, device_by_name
from regpt.train.peak import PRODUCT_SIZE, device_figures, device_peak, driver_name, matmul_flops


@dataclass(frozen=True)
class Machine:
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
    memory: float | None
    peak: float
    how: str


def machine_of(typed: str, device: str, precision: str) -> Machine:
    """The machine that `--gpu` names, or with an empty name this one's `device` (auto, cuda, mps, cpu).

    Raises:
        UsageError: a GPU that the table does not have, or a device that this machine does not have.
    """
    if typed and typed.lower() != "cpu":
        figures = device_by_name(typed)
        here = None
        if torch.cuda.is_available() and device_figures(torch.device("cuda")) == figures:
            here = torch.device("cuda")
        memory = memory_bytes(here) if here else figures.memory_gib * 2**30
        how = f"data sheet: {figures.source}"
        return Machine(figures.name, "gpu", figures, here, memory, figures.peak(precision), how)
    here = choose_device(typed.lower() or device)
    return this_gpu(here, precision) if here.type == "cuda" else this_host(here, precision)


def this_gpu(here: torch.device, precision: str) -> Machine:
    memory = memory_bytes(here)
    figures = device_figures(here)
    if figures is not None:
        how = f"data sheet: {figures.source}"
        return Machine(figures.name, "gpu", figures, here, memory, figures.peak(precision), how)
    figures = measured_figures(here)
    return Machine(figures.name, "gpu", figures, here, memory, figures.peak(precision), figures.source)


def measured_figures(here: torch.device) -> Device:
    """What stands in for a data sheet: large products and copies on the device, scaled up to what sheets promise."""
    rates = {}
    for precision in ("fp32", "tf32", "bf16", "fp16", "fp8"):
        try:
            rates[precision] = matmul_flops(here, precision, PRODUCT_SIZE["cuda"]) / LARGE_PRODUCT_SHARE / 1e12
        except RuntimeError:  # not on this device
            rates[precision] = None
    major, minor = torch.cuda.get_device_capability(here)
    return Device(
        name=driver_name(here),
        driver=(),
        also=(),
        capability=major + minor / 10,
        fp32=rates["fp32"] or 1.0,
        tf32=rates["tf32"],
        bf16=rates["bf16"],
        fp16=rates["fp16"],
        fp8=rates["fp8"],
        memory_gib=(memory_bytes(here) or 0) / 2**30,
        bandwidth=bandwidth_bytes(here) / 1e9,
        link=None,
        source=f"measured here: products of {PRODUCT_SIZE['cuda']}² matrices and copies, no data sheet is known",
    )


def this_host(here: torch.device, precision: str) -> Machine:
    """A CPU, or Apple's GPU: what is planned is calibrated on it."""
    peak = device_peak(here, precision)  # type: ignore[arg-type]
    name = driver_name(here) if here.type == "mps" else f"CPU with {counted(torch.get_num_threads(), 'thread')}"
    return Machine(name, here.type, device_figures(here), here, memory_bytes(here), peak.flops, peak.how)
