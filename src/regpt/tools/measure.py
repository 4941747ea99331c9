"""Memory, disk, load and packages of this machine."""

import math
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from regpt.console.text import counted
from regpt.prepare.workers import available_cores
from regpt.train.memory import container_limit

BUSY_SHARE = 0.75  # of the cores, that want to run: more than one command of ours accounts for


def memory_bytes(device: torch.device) -> float:
    """Memory of `device`: a GPU's own, what Metal recommends at most, the host's or the control group's limit."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    return float(min(psutil.virtual_memory().total, container_limit() or math.inf))


def busy() -> str | None:
    """`load 12.3 on 2 cores` where more than `BUSY_SHARE` of the cores were in use over the last minute: other work
    shares this machine, and figures taken meanwhile are too low."""
    load, cores = psutil.getloadavg()[0], available_cores()
    return f"load {load:.1f} on {counted(cores, 'core')}" if load > max(1.0, BUSY_SHARE * cores) else None


def installed(name: str) -> str | None:
    """The version of a package, None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def free_disk_bytes(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest folder above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
