"""`state.json`: what a run needs to go on, besides its tensors."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from regpt.checkpoint.manifest import damaged
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
        trainer: what the trainer keeps beside weights and moments, such as the scaler of float16.
        average_updates: updates in the moving average of the weights, where one is kept.
        random: for each process, the states of its global generators (see `checkpoint.generators`).
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
    try:
        state = TypeAdapter(RunState).validate_json(json.dumps(read_object(path, REMEDY)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise damaged(path, f"describes no run ({where}: {first['msg']})") from None
    numbers = {"step": state.step, "data.next_row": state.data.next_row, "average_updates": state.average_updates}
    for name, number in (numbers | {"data.seq_len": state.data.seq_len}).items():
        if not 0 <= number <= LARGEST_NUMBER:
            raise damaged(path, f"has {name} {number}, which must be between 0 and {LARGEST_NUMBER}")
    return state
