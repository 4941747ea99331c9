"""The states of a process's global random generators, as text.

Initialisation, data order, dropout and samples are functions of their seeds, or have generators of their own: no result
of regpt depends on these here. They are kept for what users add, an augmentation say.
"""

import base64
import random
import struct

import numpy as np
import torch
from torch import Tensor

from regpt.errors import UserError

# A Mersenne Twister of 624 words, a position in them, and perhaps a normal number that was drawn with the last one.
PYTHON, NUMPY = "<626I?d", "<624Iiid"


def generator_states(device: torch.device) -> dict[str, str]:
    """Name → state in base64: torch's on the CPU and on `device`, NumPy's and Python's."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        tensors["mps"] = torch.mps.get_rng_state()
    version, words, gauss = random.getstate()
    _, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one)
    return {name: encode(bytes(state.tolist())) for name, state in tensors.items()} | {
        "python": encode(struct.pack(PYTHON, version, *words, gauss is not None, gauss or 0.0)),
        "numpy": encode(struct.pack(NUMPY, *map(int, key), *rest)),
    }


def restore_generators(states: dict[str, str], device: torch.device) -> None:
    """Set the generators of this process to `states`; those of another kind of device are left out.

    Raises:
        UserError: text that is no state.
    """
    try:
        torch.set_rng_state(as_tensor(states["cpu"]))
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(as_tensor(states["cuda"]), device)
        if device.type == "mps" and "mps" in states:
            torch.mps.set_rng_state(as_tensor(states["mps"]))
        version, *words, has_gauss, gauss = struct.unpack(PYTHON, base64.b64decode(states["python"]))
        random.setstate((version, tuple(words), gauss if has_gauss else None))
        *key, position, has_gauss, gauss = struct.unpack(NUMPY, base64.b64decode(states["numpy"]))
        if not 0 <= position <= len(key):  # NumPy would read there, whatever lies there
            raise ValueError(f"position {position} of {len(key)} words")
        np.random.set_state(("MT19937", np.array(key, np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    except (KeyError, ValueError, TypeError, struct.error, RuntimeError) as error:
        raise UserError(
            f"the checkpoint holds no states of random generators ({error}); resume from another one"
        ) from None


def encode(state: bytes) -> str:
    return base64.b64encode(state).decode("ascii")


def as_tensor(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
