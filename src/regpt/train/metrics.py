"""Cost and speed of a step, comparable with other systems."""

import sys
from pathlib import Path

import torch

from regpt.model.transformer import Transformer


def flops_per_token(model: Transformer, seq_len: int) -> int:
    """FLOPs of forward and backward for one token: 6 per weight of a matrix product (head included, vocabulary
    unpadded) plus attention (Chowdhery et al. 2022, appendix B)."""
    return 6 * model.matmul_parameters() + model.attention_flops(seq_len)


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory that this process has held so far, in GiB: tensors on a GPU; on the CPU the whole process, Python
    and libraries included. None where nothing counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "cpu" and (peak := peak_resident_bytes()) is not None:
        return peak / 2**30
    return None


def peak_resident_bytes() -> int | None:
    """Largest resident set of this process so far; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.is_file():  # not getrusage: on Linux a child's maximum begins with its parent's
        line = next((x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("VmHWM:")), None)
        return int(line.split()[1]) * 1024 if line else None
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return None
