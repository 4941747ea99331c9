"""`state.json`: the state of a run besides its tensors, with the states of its global random generators."""

import base64
import json
import random
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regpt.checkpoint.manifest import damaged, validated
from regpt.errors import UserError
from regpt.files import write_json
from regpt.structured import read_object
from regpt.tensors import REMEDY

LARGEST_NUMBER = 1 << 53  # what every reader of JSON keeps exactly (RFC 8259, section 6)


@dataclass(frozen=True)
class DataPosition:
    """Where a run stands in its data: the next step begins at row `next_row`, of `seq_len` tokens, of this order."""

    __pydantic_config__ = {"extra": "forbid"}

    manifest_sha256: str
    next_row: int
    seq_len: int
    order: str
    seed: int
    shuffle_rows: str | int = "none"  # of states that were written before it existed


@dataclass(frozen=True)
class RunState:
    """The state of a run after `step` updates.

    Attributes:
        step: updates made.
        data: the position in the data, and which data that is.
        schedule: what set the learning rate: name, length, rate of the last update.
        trainer: state of the trainer besides weights and moments, such as the scaler of float16.
        average_updates: updates in the moving average of the weights, where one is kept.
        random: for each process, the states of its global generators (see `generator_states`).
        config: the whole configuration of the run, as in config.toml.
        made_with: versions, device and number of processes.
    """

    __pydantic_config__ = {"extra": "forbid"}

    step: int
    data: DataPosition
    schedule: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    average_updates: int = 0
    random: tuple[dict[str, str], ...] = ()
    config: dict[str, dict[str, Any]] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)


def write_state(path: Path, state: RunState) -> None:
    write_json(path, asdict(state))


def read_state(path: Path) -> RunState:
    """The state in `path`.

    Raises:
        UserError: the file is missing or holds something else.
    """
    state = validated(RunState, json.dumps(read_object(path, REMEDY)), path, "does not describe a run")
    numbers = {"step": state.step, "data.next_row": state.data.next_row, "average_updates": state.average_updates}
    for name, number in (numbers | {"data.seq_len": state.data.seq_len}).items():
        if not 0 <= number <= LARGEST_NUMBER:
            raise damaged(path, f"has {name} {number}, which must be between 0 and {LARGEST_NUMBER}")
    return state


# Initialisation, data order, dropout and samples are functions of their seeds, or have generators of their own: no
# result of regpt depends on the global generators. They are kept for users' additions, such as an augmentation.
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
