"""Running out of memory: how it is recognised, and what can be given back."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from regpt.errors import UserError

# CUDA, MPS and PyTorch's CPU allocator (Linux, macOS and Windows say it differently); a library that cannot make its
# workspace; Triton.
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device or this machine has no memory left for what was asked for."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def free_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more and what PyTorch has kept for later use."""
    gc.collect()  # an exception's frames and their tensors may refer to each other
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # work that was broken off may still be writing, on whatever stream
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextlib.contextmanager
def memory_advice(what: str, advice: str) -> Iterator[None]:
    """Running out of memory in this context ends the command with one sentence."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {what}; {advice}") from error
