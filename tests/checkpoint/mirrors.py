"""Run folders and what copies them to a store, for the tests of `checkpoint.mirror`."""

import contextlib
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.fetch import restore
from regpt.checkpoint.load import checkpoint_folder, load_checkpoint, newest_checkpoint
from regpt.checkpoint.mirror import Mirror
from regpt.checkpoint.saver import Saver
from regpt.remote.lease import Lease
from remote_stores import FaultyStore, Killed

FILES = {"model.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "manifest.json"}


def add(run: Path, saved: Path, step: int) -> Path:
    folder = checkpoint_folder(run, step)
    shutil.copytree(checkpoint_folder(saved, step), folder)
    return folder


def mirror(run: Path, url: str, keep_last: int = 2, keep_every: int = 0, **options) -> Mirror:
    lease = Lease(FaultyStore(url, **options))
    lease.acquire(DEAD[-1] if DEAD else "")
    DEAD.append(lease.claim.token)
    made = Mirror(Saver(run, CheckpointConfig(keep_last=keep_last, keep_every=keep_every)), lease)
    made.said = []  # type: ignore[attr-defined]
    made.say = made.said.append  # type: ignore[attr-defined]
    return made


DEAD: list[str] = []  # claims of the mirrors that these tests have given up, the last one last


def journal(given: Mirror) -> list[tuple[str, str]]:
    assert isinstance(given.store, FaultyStore)
    return [(kind, name) for kind, name in given.store.journal if not name.startswith("lease/")]


def steps(url: str) -> list[str]:
    """The complete checkpoints of the store."""
    return sorted(name.split("/")[1] for name in FaultyStore(url).files() if name.endswith("/manifest.json"))


def newest_step(url: str, into: Path) -> int:
    """The step at which another machine would go on."""
    into.mkdir()
    assert restore(FaultyStore(url), into) == []
    return load_checkpoint(newest_checkpoint(into)).step


def kill_at(n: int):
    """Ends the process before the n-th change of the store."""
    left = [n]

    def before(kind: str, name: str) -> None:
        left[0] -= not name.startswith("lease/")
        if left[0] < 0:
            raise Killed

    return before


def killed_everywhere(run: Path, url: str, content: dict[str, bytes], keep_last: int) -> Iterator[int]:
    """Copies `run` to a store that holds `content`, killed before the first change, the second, … and at last not."""
    for n in itertools.count():
        store = FaultyStore(url)
        store.fs.rm(store.root, recursive=True)
        for name, data in content.items():
            store.write(name, data)
        killed = True
        with contextlib.suppress(Killed):
            mirror(run, url, keep_last, before=kill_at(n)).copy_all()
            killed = False
        yield n
        if not killed:
            return
