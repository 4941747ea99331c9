"""A run folder, copied to a bucket while the run continues: finished checkpoints with their manifest last, then the
rest.

A thread does it, and training never waits for it. While the run lasts an error is reported once and the copy tried
again, ever more seldom; the last copy, at the end, has a number of tries. The store's manifests state which checkpoints
have arrived; of other files it is their size and time here. Before every single file the lease decides whether anything
may be written (`remote.lease`).
"""

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.remote.lease import Lease, LeaseLost
from regpt.remote.retry import NotTransferred, problem_of, transport_errors
from regpt.remote.store import Store, is_safe

CONFIG = "config.toml"  # written last of the files next to checkpoints: it makes a run of the folder
CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")


class Undelivered(UserError):
    """The run is saved on this machine, and the store could not be brought up to date."""

    exit_code = 75  # saved, start it again


class Mirror:
    """Copies the run folder `run` to the store of `lease`; `start` it, `notify` it of news, `finish` it.

    Attributes:
        failure: why nothing more will be copied.
        say: receives messages about trouble, from the thread.
        intact: whether a local checkpoint is whole.
        kept: the steps that stay, of those given; the others are not copied, and deleted from the store.
        uploading: the local checkpoint that is being read, which is not to be deleted meanwhile.
        sending: the file that is on its way.
        damaged: names of checkpoints of the store that are not what their manifest says: neither counted nor deleted.
        there: the manifests of checkpoints of the store, by name, as far as they were compared.
        sent: size and time of the files that have arrived, by name.
    """

    def __init__(self, run: Path, lease: Lease, intact: Callable[[Path], bool], damaged: Iterable[str] = ()) -> None:
        self.run, self.lease, self.store, self.intact = run, lease, lease.store, intact
        self.kept: Callable[[set[int]], set[int]] = lambda steps: steps
        self.say: Callable[[str], None] = print_note
        self.damaged, self.there, self.sent = set(damaged), dict[str, bytes](), dict[str, tuple[int, ...]]()
        self.uploading: Path | None = None
        self.sending = ""
        self.failure: Exception | None = None
        self.wake, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self.work, daemon=True)

    # ---- from the thread that trains

    def start(self) -> None:
        self.wake.set()
        self.thread.start()

    def notify(self) -> None:
        """There is something new in the folder."""
        self.wake.set()

    def finish(self, seconds: float | None = None) -> bool:
        """Copy the rest, waiting at most `seconds`; whether nothing is left to wait for."""
        self.closing = True
        self.wake.set()
        if self.thread.ident is None:  # never started
            self.thread.start()
        self.thread.join(seconds)
        return not self.thread.is_alive()

    # ---- in the thread

    def work(self) -> None:
        """Copy until the run has ended and everything is there, or until it is of no use."""
        failures, patience = 0, self.store.patience
        try:
            while not self.closing:
                self.wake.wait(patience.wait(failures) if failures else None)
                self.wake.clear()
                try:
                    self.copy_all()
                    failures = 0
                except transport_errors() as error:
                    failures += 1
                    why = problem_of(error).text
                    if failures == 1:
                        self.say(f"{self.store.url} could not be written ({why}); tried again while the run goes on")
            self.store.tries(self.copy_all, "brought up to date")
            self.store.tries(lambda: self.lease.renew(released=True), "written")
        except LeaseLost as error:
            self.failure = UserError(f"{error}; what this process trained is in {self.run}")
        except NotTransferred as error:
            self.failure = Undelivered(
                f"{self.store.url} could not be brought up to date: {error.why}; everything is in {self.run} on this "
                f"machine, copy it with: regpt train --resume {self.store.url}"
            )
        except Exception as error:  # a defect: raised again where the run ends, with its traceback
            self.failure = error

    def copy_all(self) -> None:
        """Make the store hold what the folder holds."""
        self.lease.check()
        self.put_files()
        while folder := self.next_missing():
            self.uploading = folder
            try:
                self.put_checkpoint(folder)
            except FileNotFoundError:
                if (folder / MANIFEST).is_file():
                    raise
                # it was deleted here, because newer ones are there
            finally:
                self.uploading = None

    def next_missing(self) -> Path | None:
        """The newest local checkpoint that is kept and not in the store, after `prune`."""
        complete = self.prune()
        folders = {path.name: path for path in (self.run / CHECKPOINTS).glob("step-*")}
        names = sorted(filter(STEP_FOLDER.fullmatch, folders), key=step_number, reverse=True)
        kept = self.kept({step_number(name) for name in (*names, *complete)})
        for name in names:
            if name in complete and name not in self.there:
                self.there[name] = self.store.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") or b""
            is_new = content(folders[name] / MANIFEST) not in (None, self.there.get(name))
            if is_new and step_number(name) in kept and self.intact(folders[name]):
                return folders[name]
        return None

    def prune(self) -> list[str]:
        """Delete the checkpoints of the store that are not kept, and older half-copied ones; the complete ones left."""
        stored = {name: whole for name, whole in stored_checkpoints(self.store).items() if name not in self.damaged}
        complete = [name for name, whole in stored.items() if whole]
        kept, newest = self.kept(set(map(step_number, complete))), max(map(step_number, complete), default=0)
        for name, whole in stored.items():
            if step_number(name) not in kept if whole else step_number(name) < newest:
                self.drop(name)
        return [name for name in complete if step_number(name) in kept]

    def put_files(self) -> None:
        """Copy the changed files next to checkpoints; delete those from the store that have gone here."""
        present = dict(self.files())
        for name, path in present.items():
            try:
                self.put(name, path)
            except FileNotFoundError:
                if path.exists():
                    raise
        self.remove([name for name in self.sent if not name.startswith(f"{CHECKPOINTS}/") and name not in present])

    def put_checkpoint(self, folder: Path) -> None:
        """Copy a checkpoint, its manifest last; an older (see `rewind`) or damaged one of its name is deleted first."""
        manifest = (folder / MANIFEST).read_bytes()
        if folder.name in self.there or folder.name in self.damaged:
            self.drop(folder.name)
        paths = {self.name_of(path): path for path in sorted(folder.iterdir()) if path.name != MANIFEST}
        for name, path in paths.items():
            self.put(name, path)
        self.put_files()  # a checkpoint that is complete has its rows of metrics
        sizes = self.store.files(f"{CHECKPOINTS}/{folder.name}")
        for name, path in paths.items():
            if sizes.get(name) != path.stat().st_size:
                del self.sent[name]
                raise ConnectionError(f"{name} arrived with {sizes.get(name, 0):,} bytes, not all")
        if content(folder / MANIFEST) == manifest:  # otherwise it was replaced here meanwhile
            self.put(self.name_of(folder / MANIFEST), folder / MANIFEST)
            self.there[folder.name] = manifest

    def put(self, name: str, path: Path) -> None:
        """Copy a file unless it is there; of rows that are being written, whole lines."""
        stamp = stamp_of(path)
        if self.sent.get(name) == stamp:
            return
        self.lease.check()
        self.sending = f"{name}, {stamp[0] / 1e6:,.1f} MB" if stamp else name
        if path.suffix == ".jsonl":
            data = path.read_bytes()
            self.store.write(name, data[: data.rfind(b"\n") + 1])
        else:
            self.store.put(name, path)
        self.sent[name] = stamp

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.lease.check()
            self.store.remove(name)
            self.sent.pop(name, None)

    def drop(self, folder: str) -> None:
        """Delete a checkpoint of the store: its manifest first, so that the rest is not a checkpoint."""
        self.there.pop(folder, None)
        names = self.store.files(f"{CHECKPOINTS}/{folder}")
        self.remove(sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")))
        self.damaged.discard(folder)

    def files(self) -> Iterator[tuple[str, Path]]:
        """The files next to checkpoints that are not private, by their names; config.toml last."""
        paths: list[Path] = []
        for folder, folders, names in os.walk(self.run):  # passes over folders that are just being deleted
            if Path(folder) == self.run:
                folders[:] = [name for name in folders if name != CHECKPOINTS]
            paths += [path for path in (Path(folder, name) for name in names) if not path.is_symlink()]
        named = [(self.name_of(path), path) for path in sorted(paths)]
        yield from sorted((pair for pair in named if is_safe(pair[0])), key=lambda pair: pair[0] == CONFIG)

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.run).as_posix()


def stored_checkpoints(store: Store) -> dict[str, bool]:
    """The checkpoint folders of the run in `store`, the newest first, and whether they have a manifest."""
    files = store.files(CHECKPOINTS)
    names = {name.split("/")[1] for name in files}
    names = sorted(filter(STEP_FOLDER.fullmatch, names), key=step_number, reverse=True)
    return {name: f"{CHECKPOINTS}/{name}/{MANIFEST}" in files for name in names}


def complete_checkpoints(store: Store) -> list[str]:
    """The names of the checkpoints of the run in `store` that have a manifest, the newest first."""
    return [name for name, whole in stored_checkpoints(store).items() if whole]


def step_number(folder: str) -> int:
    return int(folder.removeprefix("step-"))


def stamp_of(path: Path) -> tuple[int, ...]:
    """Size and time of a file; nothing when it has just been deleted."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return stat.st_size, stat.st_mtime_ns


def content(path: Path) -> bytes | None:
    """The bytes of a file that may just be deleted; None when there is no file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
