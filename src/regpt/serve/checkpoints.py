"""Checkpoints of the runs that are served, as models `ID:STEP`: opened when a request names one; of those that are held
in memory the least recently used goes."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from regpt.checkpoint.load import checkpoints, step_of
from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.serve.fields import ApiError
from regpt.serve.paths import ServedModel


@dataclass
class Checkpoints:
    """The runs behind the models.

    Attributes:
        runs: id of a model → folder of its run. A request chooses among its steps; it never names a path.
        read: id, folder of a checkpoint → what gives it a worker, in the thread of the event loop.
        most: checkpoints in memory at once.
        held: those that are, the least recently used first.
    """

    runs: Mapping[str, Path]
    read: Callable[[str, str, Path], Callable[[], ServedModel]]
    most: int
    held: dict[str, ServedModel] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def folders(self, id: str) -> dict[int, Path]:
        """Step → folder of a model's run, as they are on the disk now."""
        return {step_of(one): one for one in checkpoints(self.runs[id])} if self.most and id in self.runs else {}

    async def find(self, name: str) -> ServedModel | None:
        """The model `ID:STEP`; None where there is no such checkpoint.

        Raises:
            ApiError: it is damaged, or all that are held are writing.
        """
        id, _, step = name.rpartition(":")
        if not (step.isascii() and step.isdecimal() and len(step) < 15):
            return None
        async with self.lock:
            folder = self.folders(id).get(int(step))
            if folder is None or name != f"{id}:{int(step)}":
                return None
            if name not in self.held or self.held[name].worker.failure:
                self.make_room(name)
                self.held[name] = (await asyncio.to_thread(self.open, id, name, folder))()
            self.held[name] = self.held.pop(name)  # the most recently used
            return self.held[name]

    def open(self, id: str, name: str, folder: Path) -> Callable[[], ServedModel]:
        try:
            return self.read(id, name, folder)
        except UserError as error:
            print_note(f"warning: {name}: {error}")
            message = f"the checkpoint {name!r} cannot be read: it is damaged, or was deleted just now"
            raise ApiError(message, param="model", code="model_not_found", status=404) from None

    def make_room(self, name: str) -> None:
        if name in self.held:  # it failed
            self.held.pop(name).worker.close()
        while len(self.held) >= self.most:
            idle = next((one for one, model in self.held.items() if not model.worker.open_texts), None)
            if idle is None:
                message = (
                    f"{self.most} checkpoints are in memory, the most that is allowed, and all are writing; try again"
                )
                raise ApiError(message, status=429, code="queue_full", headers={"Retry-After": "1"})
            self.held.pop(idle).worker.close()
