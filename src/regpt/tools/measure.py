"""Memory, its bandwidth, the disk and the load of this machine. Each measurement takes about a second."""

import math
import os
import shutil
import tempfile
import time
from pathlib import Path

import psutil
import torch

from regpt.console.text import counted
from regpt.prepare.workers import available_cores
from regpt.train.memory import container_limit
from regpt.train.peak import synchronize

BUSY_SHARE = 0.75  # of the cores, that want to run: more than one command of ours accounts for

COPY_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 28}  # far more than a cache holds
COPIES = 5
DISK_BYTES = 1 << 28


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


def bandwidth_bytes(device: torch.device) -> float:
    """Bytes a second of a copy within the memory of `device`, what is read and what is written both counted; the best
    of five."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(COPIES):
        synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * source.nbytes / best


def disk_write_bytes(folder: Path) -> float:
    """Bytes a second that reach the disk of `folder`, as a checkpoint would: written, then synced.

    Raises:
        OSError: nothing can be written there.
    """
    block = os.urandom(1 << 20)  # not zeros: some file systems do not store them
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".regpt-disk-") as file:
        begin = time.perf_counter()
        for _ in range(DISK_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - begin)


def free_disk_bytes(folder: Path) -> int:
    """Bytes free on the disk of `folder`, or of the nearest folder above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
