"""What this machine has and does: memory, its bandwidth, the disk. Short measurements, each in about a second."""

import ctypes
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from regpt.train.peak import synchronize

COPY_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 28}  # far more than a cache holds
COPIES = 5
DISK_BYTES = 1 << 28


def memory_bytes(device: torch.device) -> float | None:
    """Memory that `device` has: a GPU's own, what Metal recommends at most, the host's; None where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    limits = [n for n in (host_memory(), container_memory()) if n is not None]
    return float(min(limits)) if limits else None


def host_memory() -> int | None:
    """Bytes of main memory."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)()  # MEMORYSTATUSEX: two 32-bit numbers, then ullTotalPhys
        ctypes.cast(status, ctypes.POINTER(ctypes.c_uint32))[0] = ctypes.sizeof(status)
        kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
        return int(status[1]) if kernel.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def container_memory() -> int | None:
    """The limit of the control group (version 2) that this process runs in; None outside of one."""
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(limit) if limit.isdigit() else None


def resident_bytes() -> int | None:
    """Main memory that this process holds now; None where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next((x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmRSS:")), None)
    return int(line.split()[1]) * 1024 if line else None


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
