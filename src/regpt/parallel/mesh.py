"""Who this process is among its peers, and which device it has. World size 1 answers every call too."""


import torch

from regpt.errors import UsageError


def choose_device(name: str = "auto", index: int = 0) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU; `index` is the CUDA device of this process.

    Raises:
        UsageError: a device that this machine does not have.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if name not in available:
        raise UsageError(f"device {name!r} is unknown; choose from auto, {', '.join(available)}")
    if not available[name]:
        there = ", ".join(kind for kind, yes in available.items() if yes)
        raise UsageError(f"device {name!r} is not available on this machine; choose from auto, {there}")
    if name != "cuda":
        return torch.device(name)
    if index >= torch.cuda.device_count():
        raise UsageError(f"process {index} has no CUDA device: this machine has {torch.cuda.device_count()}; lower --nproc")
    return torch.device("cuda", index)
