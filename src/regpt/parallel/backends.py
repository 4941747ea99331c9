"""Whether a library for sums over processes works here."""

import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

WAIT = timedelta(seconds=20)


def sum_alone(backend: str, device: torch.device) -> float:
    """A sum over a group of this one process on `device`: 1.

    Raises:
        RuntimeError, ValueError: `backend` (gloo, nccl) is not part of this torch, or does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "store")
        store = dist.FileStore(path, 1)  # pyright: ignore[reportPrivateImportUsage]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=WAIT)
        try:
            x = torch.ones((), device=device)
            dist.all_reduce(x)
            return x.item()
        finally:
            dist.destroy_process_group()
