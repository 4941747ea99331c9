"""A run folder, copied to a store while the run goes on: finished checkpoints with their manifest last, then the rest.

A thread does it, and training waits for nothing of it. An error is said once and tried again, more and more seldom,
as long as the run goes on; the last copy, at the end, is given up after a number of tries. Whether anything may be
written the lease decides (`remote.lease`), before every single file.
"""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.load import CHECKPOINTS, STEP_FOLDER, checkpoints, step_of
from regpt.checkpoint.manifest import MANIFEST, read_manifest
from regpt.checkpoint.save import is_intact
from regpt.errors import UserError
from regpt.files import SUCCESSOR
from regpt.remote.lease import Lease, LeaseLost
from regpt.remote.retry import problem_of, transport_errors
from regpt.remote.store import Store, is_safe

CONFIG = "config.toml"  # written last of the files beside checkpoints: it makes a run of the folder


@dataclass
class Remote:
    """What is known of the store's checkpoints.

    Attributes:
        manifests: the content of each manifest.json, by the name of its checkpoint.
        damaged: names of those that were downloaded and are not what their manifest says: neither counted nor deleted.
    """

    manifests: dict[str, bytes] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)


class Mirror:
    """Copies the run folder `run` to the store of `lease`; `start` it, `notify` it of what is new, `finish` it.

    Attributes:
        failed: true when nothing more will be copied; `failure` says why.
        say: told of trouble, by the thread.
        intact: whether a local checkpoint is whole.
        best: the one of these steps that is kept for its validation loss.
        uploading: the local checkpoint that is being read, which is not to be deleted meanwhile.
    """

    def __init__(self, run: Path, lease: Lease, config: CheckpointConfig, damaged: set[str] | None = None) -> None:
        self.run, self.lease, self.config = run, lease, config
        self.store: Store = lease.store
        self.remote: Remote | None = None  # asked by the thread
        self.damaged = damaged or set()
        self.intact: Callable[[Path], bool] = is_intact
        self.best: Callable[[set[int]], int | None] = lambda steps: None
        self.say: Callable[[str], None] = print
        self.sent: dict[str, tuple[int, ...]] = {}  # files beside checkpoints: size and time of what is there
        self.parts: dict[str, bytes] = {}  # files of checkpoints that are there, with the manifest that they belong to
        self.pruned = False  # since the last checkpoint was added there
        self.uploading: Path | None = None
        self.failure: Exception | None = None
        self.wake, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self.work, daemon=True)

    # ---- from the thread that trains

    def start(self) -> None:
        self.thread.start()

    def notify(self) -> None:
        """There is something new in the folder."""
        self.wake.set()

    def is_uploading(self, folder: Path) -> bool:
        return folder == self.uploading

    @property
    def failed(self) -> bool:
        return self.failure is not None

    def finish(self, seconds: float | None = None) -> bool:
        """Copy what is left, wait at most `seconds` for it; whether nothing is left to wait for."""
        self.closing = True
        self.wake.set()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    def left(self) -> tuple[int, int]:
        """Files still to be copied, and their bytes, as far as is known."""
        sizes = [size for _, path in self.changed_files() for size in stamp_of(path)[:1]]
        for folder in self.missing_checkpoints():
            manifest, files = content(folder / MANIFEST), read_manifest(folder).files
            name = f"{CHECKPOINTS}/{folder.name}"
            sizes += [file.size for file in files if self.parts.get(f"{name}/{file.file}") != manifest]
        return len(sizes), sum(sizes)

    # ---- in the thread

    def work(self) -> None:
        """Copy until the run has ended and everything is there, or until it is of no use."""
        failures, last_tries, wait_s = 0, 0, None
        while True:
            if not self.closing:
                self.wake.wait(wait_s)
            self.wake.clear()
            closing = self.closing
            last_tries += closing
            try:
                self.copy_all()
                if closing:
                    self.lease.release()
                    return
                if failures:
                    self.say(f"{self.store.url} is up to date again")
                failures, wait_s = 0, None
            except LeaseLost as error:
                self.failure = UserError(f"{error}; what this process trained is in {self.run}")
                return
            except (UserError, *transport_errors()) as error:
                failures, wait_s = failures + 1, self.wait_seconds(failures + 1)
                if closing and self.give_up(error, last_tries):
                    return
                if failures == 1:
                    text = described(error)[0]
                    self.say(f"{self.store.url} could not be written ({text}); tried again while the run goes on")
                if closing:
                    self.store.patience.sleep(wait_s)
            except Exception as error:  # a defect: raised again where the run ends, with its traceback
                self.failure = error
                return

    def wait_seconds(self, failures: int) -> float:
        patience = self.store.patience
        return min(patience.longest_wait_s, patience.wait_s * 2 ** min(failures - 1, 20))

    def give_up(self, error: BaseException, last_tries: int) -> bool:
        """Whether the copy at the end, tried so often, is not tried again; then `error` is its failure."""
        text, lasts = described(error)
        if not lasts and last_tries < self.store.patience.tries:
            return False
        self.failure = UserError(
            f"{self.store.url} could not be brought up to date: {text}; everything is in {self.run} on this "
            f"machine, copy it with: regpt train --resume {self.store.url}"
        )
        return True

    def copy_all(self) -> None:
        """Make the store hold what the folder holds."""
        self.lease.check()
        if self.remote is None:
            self.remote = look(self.store, self.damaged)
        self.put_changed_files()
        while folder := next(self.missing_checkpoints(), None):
            self.uploading = folder
            try:
                self.put_checkpoint(folder)
            except FileNotFoundError:
                if (folder / MANIFEST).is_file():
                    raise
                # it was deleted here, because newer ones are there
            finally:
                self.uploading = None
            self.prune()
        if not self.pruned:
            self.prune()

    def put_changed_files(self) -> None:
        """Copy the files beside checkpoints; delete those there that were copied and have gone here."""
        present = dict(self.files())
        for name, path in self.changed_files():
            stamp = stamp_of(path)
            self.lease.check()
            try:
                self.put_file(name, path)
            except FileNotFoundError:
                if path.exists():
                    raise
                continue  # it was deleted here
            self.sent[name] = stamp
        gone = [name for name in self.sent if name not in present]
        if gone:
            self.lease.check()
            self.store.remove(gone)
            self.sent = {name: known for name, known in self.sent.items() if name in present}

    def put_file(self, name: str, path: Path) -> None:
        if path.suffix == ".jsonl":  # rows are written meanwhile
            data = path.read_bytes()
            self.store.write(name, data[: data.rfind(b"\n") + 1])
        else:
            self.store.put(name, path)

    def files(self) -> Iterator[tuple[str, Path]]:
        """The files beside checkpoints that are no one's own, by their names; config.toml last."""
        paths: list[Path] = []
        for folder, folders, names in os.walk(self.run):  # which passes over folders that are just being deleted
            if Path(folder) == self.run:
                folders[:] = [name for name in folders if name != CHECKPOINTS]
            paths += [path for path in (Path(folder, name) for name in names) if not path.is_symlink()]
        named = [(path.relative_to(self.run).as_posix(), path) for path in sorted(paths)]
        yield from sorted((pair for pair in named if is_safe(pair[0])), key=lambda pair: pair[0] == CONFIG)

    def changed_files(self) -> Iterator[tuple[str, Path]]:
        for name, path in self.files():
            stamp = stamp_of(path)
            if stamp and self.sent.get(name) != stamp:
                yield name, path

    def missing_checkpoints(self) -> Iterator[Path]:
        """Local checkpoints that are to be there and are not, the newest first."""
        there = self.remote.manifests if self.remote else {}
        folders = {f.name: f for f in checkpoints(self.run) if not f.name.endswith(SUCCESSOR)}
        steps = {step_of(Path(name)) for name in (*folders, *there)}
        for name in sorted(folders, reverse=True):
            folder = folders[name]
            manifest = content(folder / MANIFEST)
            if manifest is None or manifest == there.get(name) or step_of(folder) not in self.wanted(steps):
                continue
            if self.intact(folder):
                yield folder

    def wanted(self, steps: set[int]) -> set[int]:
        """The steps that `checkpoint.keep_last`, `keep_every` and `keep_best` keep."""
        last, every = self.config.keep_last, self.config.keep_every
        newest = sorted(steps)[-last:]
        return set(newest) | {step for step in steps if (every and step % every == 0) or step == self.best(steps)}

    def put_checkpoint(self, folder: Path) -> None:
        """Copy a checkpoint; where an older one has its name, at no moment neither is there whole."""
        assert self.remote is not None
        name = f"{CHECKPOINTS}/{folder.name}"
        manifest = (folder / MANIFEST).read_bytes()
        if folder.name in self.remote.damaged:
            self.set_aside(folder.name)
        replaced = folder.name in self.remote.manifests
        if replaced:
            if not self.put_files(folder, name + SUCCESSOR, manifest):
                return
            self.drop(folder.name)
        if self.put_files(folder, name, manifest):
            self.remote.manifests[folder.name] = manifest
        if replaced:
            self.drop(folder.name + SUCCESSOR)

    def put_files(self, folder: Path, name: str, manifest: bytes) -> bool:
        """Copy the files of `folder` to `name`, the manifest last; False when the folder has become another one."""
        files = read_manifest(folder).files
        for file in files:
            part = f"{name}/{file.file}"
            if self.parts.get(part) != manifest:
                self.lease.check()
                self.store.put(part, folder / file.file)
                self.parts[part] = manifest
        self.put_changed_files()  # a checkpoint that is complete has its rows of metrics
        sizes = self.store.files(name)
        for file in files:
            part = f"{name}/{file.file}"
            if sizes.get(part) != file.size:
                del self.parts[part]
                raise ConnectionError(f"{part} arrived with {sizes.get(part, 0):,} of {file.size:,} bytes")
        if content(folder / MANIFEST) != manifest:
            return False
        self.lease.check()
        self.store.write(f"{name}/{MANIFEST}", manifest)
        return True

    def set_aside(self, name: str) -> None:
        """Give a damaged checkpoint of the store another name: it is never deleted."""
        assert self.remote is not None
        taken = {part.split("/")[1] for part in self.store.files(CHECKPOINTS)}
        number = 1
        while f"{name}.damaged-{number}" in taken:
            number += 1
        for part in self.store.files(f"{CHECKPOINTS}/{name}"):
            self.lease.check()
            self.store.copy(part, part.replace(f"/{name}/", f"/{name}.damaged-{number}/", 1))
        self.drop(name)
        self.remote.damaged.discard(name)

    def drop(self, name: str) -> None:
        """Delete a checkpoint of the store: its manifest first, so that what is left is no checkpoint."""
        assert self.remote is not None
        parts = sorted(self.store.files(f"{CHECKPOINTS}/{name}"), key=lambda part: not part.endswith(f"/{MANIFEST}"))
        self.lease.check()
        self.remote.manifests.pop(name, None)
        for part in parts:
            self.store.remove([part])
            self.parts.pop(part, None)

    def prune(self) -> None:
        """Delete the checkpoints of the store that are no longer wanted, and what was left half-copied before."""
        assert self.remote is not None
        self.pruned = False
        manifests, damaged = self.remote.manifests, self.remote.damaged
        steps = {step_of(Path(name)) for name in manifests}
        wanted = self.wanted(steps)
        for name in [name for name in manifests if self.config.keep_last and step_of(Path(name)) not in wanted]:
            self.drop(name)
        there = {part.split("/")[1] for part in self.store.files(CHECKPOINTS)}
        for name in there - set(manifests) - damaged:
            if STEP_FOLDER.fullmatch(name) and steps and step_of(Path(name)) < max(steps):
                self.drop(name)
        self.pruned = True


def look(store: Store, damaged: set[str]) -> Remote:
    """The complete checkpoints of `store`."""
    manifests = {}
    for part in store.files(CHECKPOINTS):
        _, name, *rest = part.split("/")
        if rest == [MANIFEST] and STEP_FOLDER.fullmatch(name) and name not in damaged:
            manifests[name] = store.read(part) or b""
    return Remote(manifests, set(damaged))


def stamp_of(path: Path) -> tuple[int, ...]:
    """Size and time of a file; nothing when it has just been deleted."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_size, stat.st_mtime_ns


def content(path: Path) -> bytes | None:
    """The bytes of a file that may just be deleted; None when there is none."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def described(error: BaseException) -> tuple[str, bool]:
    """What an error says, and whether another try is of no use."""
    if isinstance(error, UserError):
        return str(error), True
    try:
        problem = problem_of(error)
    except UserError as full:
        return str(full), True
    return problem.text, problem.lasts
