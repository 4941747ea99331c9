"""Numbers that are bitwise the same when something is computed again by as many processes of one kind.

What would differ between a run and the same run resumed, and what fixes it:

- attention's backward adds in the order in which blocks finish: asked for deterministic algorithms, torch takes the
  ordered flash kernel, and never cuDNN's;
- the gradient of an embedding adds with atomics: torch sorts the indices first then, compiled code falls back to that;
- cuBLAS divides a product by the memory it finds: a fixed workspace, from the environment (`parallel.mesh`);
- Inductor times several tilings of a reduction and keeps the fastest, which another day may be another one:
  `deterministic` among its options (`train.backend`), so that nothing depends on its cache either;
- NCCL chooses among algorithms that add in different orders: the ring alone, from the environment (`parallel.mesh`);
- gradients are summed in buckets that depend on the parameters only (`parallel.reduce`); threads of a CPU divide sums:
  their number is part of a checkpoint (`train.trainer`).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

# Read by cuBLAS and NCCL when they are first used: docs.nvidia.com/cuda/cublas, "Results Reproducibility", and NCCL's
# "Environment Variables".
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}


@contextlib.contextmanager
def repeatable(on: bool) -> Iterator[None]:
    """Deterministic algorithms only, while the context lasts; an operation that has none raises a RuntimeError."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing reads memory that it has not written
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
