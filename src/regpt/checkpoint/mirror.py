"""A run folder copied to a bucket while training continues: checkpoints with their manifest last, then the other files.

A thread copies; training waits for it only at the end. While the run lasts a network error is reported once and the
copy retried with backoff; the last copy has a number of tries. Before each file that it writes or deletes the lease
decides whether this process still may (`remote.lease`); no other process writes there, so the store is listed once.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from regpt.checkpoint.fetch import CONFIG, stored_checkpoints
from regpt.checkpoint.load import CHECKPOINTS, checkpoints, step_of
from regpt.checkpoint.manifest import MANIFEST
from regpt.checkpoint.saver import Saver
from regpt.errors import UserError
from regpt.files import SUCCESSOR
from regpt.remote.lease import Lease, LeaseLost
from regpt.remote.retry import NotTransferred, problem_of, transport_errors
from regpt.remote.store import is_safe


class Undelivered(UserError):
    """The run is saved on this machine, but the store could not be brought up to date."""

    exit_code = 75  # saved, start it again


class Mirror:
    """Copies the run of `saver` to the store of `lease`, after each save and when it is finished.

    Attributes:
        failure: why nothing more will be copied.
        say: receives messages about trouble, from the thread.
        damaged: names of checkpoints in the store that do not match their manifest: neither counted nor deleted.
        complete: manifests of the checkpoints in the store, by name, once `listed`.
        begun: manifests of those of which some files may have arrived.
        sent: size and time of the files that have arrived, by name.
        uploading: the local checkpoint that is being read, and must not be deleted meanwhile.
        sending: the file on its way.
    """

    def __init__(
        self, saver: Saver, lease: Lease, damaged: Iterable[str] = (), say: Callable[[str], None] = print
    ) -> None:
        self.saver, self.run, self.lease, self.store, self.say = saver, saver.run, lease, lease.store, say
        self.damaged, self.sent = set(damaged), dict[str, tuple[int, int]]()
        self.complete, self.begun, self.listed = dict[str, bytes](), dict[str, bytes](), False
        self.uploading: Path | None = None
        self.sending = ""
        self.failure: Exception | None = None
        self.wake, self.closing = threading.Event(), False
        self.thread = threading.Thread(target=self.work, daemon=True)
        saver.in_use, saver.saved = (lambda folder: folder == self.uploading), self.wake.set

    def start(self) -> None:
        self.wake.set()
        self.thread.start()

    def finish(self) -> None:
        """Copy the rest, then delete the local checkpoints that had to stay for it.

        Raises:
            UserError: it could not be copied, or the run was taken over.
        """
        self.closing = True
        self.wake.set()
        self.thread.join()
        if self.failure is not None:
            raise self.failure
        self.saver.prune()

    def work(self) -> None:
        """Copy until the run has ended and everything has arrived, or until the lease is lost."""
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
                    if failures == 1:
                        why = problem_of(error).text
                        self.say(f"{self.store.url} could not be written ({why}); training continues, it is retried")
            self.store.tries(self.copy_all, "brought up to date")
        except LeaseLost as error:
            self.failure = UserError(f"{error}; what this process trained is in {self.run}")
        except NotTransferred as error:
            self.failure = Undelivered(
                f"{self.store.url} could not be brought up to date: {error.why}; everything is in {self.run} on this "
                f"machine, copy it with: regpt train --resume {self.store.url}"
            )
        except Exception as error:  # a defect: raised again by `finish`, with its traceback
            self.failure = error

    def copy_all(self) -> None:
        """Make the store hold what the run folder holds."""
        self.lease.check()
        if not self.listed:
            self.find_complete()
        self.copy_files()
        while folder := self.next_missing():
            self.uploading = folder
            try:
                self.copy_checkpoint(folder)
            except FileNotFoundError:
                if (folder / MANIFEST).is_file():
                    raise
                # deleted here just before `uploading` was set, because newer ones are there
            finally:
                self.uploading = None

    def find_complete(self) -> None:
        """List the checkpoints in the store; delete those without a manifest, which interrupted copies left."""
        here = {folder.name for folder in checkpoints(self.run)}
        for name, is_complete in stored_checkpoints(self.store).items():
            if not is_complete:
                self.drop(name)
            elif name not in self.damaged:
                manifest = self.store.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") if name in here else None
                self.complete[name] = manifest or b""
        self.listed = True

    def next_missing(self) -> Path | None:
        """Delete the remote checkpoints that are not kept and return the newest kept local one that the store lacks."""
        local = [folder for folder in checkpoints(self.run) if not folder.name.endswith(SUCCESSOR)]
        complete = {step_of(Path(name)) for name in self.complete}
        stays, kept = self.saver.kept(complete), self.saver.kept({*map(step_of, local), *complete})
        for name in [*self.complete, *self.begun]:
            if step_of(Path(name)) not in (stays if name in self.complete else kept):
                self.drop(name)
        for folder in reversed(local):
            with contextlib.suppress(FileNotFoundError):  # just deleted
                is_new = (folder / MANIFEST).read_bytes() != self.complete.get(folder.name)
                if is_new and step_of(folder) in kept and self.saver.is_intact(folder):
                    return folder
        return None

    def copy_files(self) -> None:
        """Copy the changed files next to checkpoints, config.toml last; delete those from the store that are gone."""
        present: list[str] = []
        for folder, folders, names in os.walk(self.run):  # tolerates folders that are being deleted
            if Path(folder) == self.run:
                folders[:] = [name for name in folders if name != CHECKPOINTS]
            present += [self.name_of(Path(folder, name)) for name in names if not Path(folder, name).is_symlink()]
        present = sorted(filter(is_safe, present), key=lambda name: (name == CONFIG, name))
        for name in present:
            with contextlib.suppress(FileNotFoundError):
                self.put(self.run / name)
        self.remove([name for name in self.sent if not name.startswith(f"{CHECKPOINTS}/") and name not in present])

    def copy_checkpoint(self, folder: Path) -> None:
        """Copy a checkpoint, its manifest last; what the store has under its name is deleted first."""
        manifest = (folder / MANIFEST).read_bytes()
        if self.begun.get(folder.name) != manifest:
            self.drop(folder.name)
            self.begun[folder.name] = manifest
        paths = [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]
        for path in paths:
            self.put(path)
        self.copy_files()  # a complete checkpoint has its rows of metrics
        sizes = self.store.files(f"{CHECKPOINTS}/{folder.name}")
        for path in paths:
            if sizes.get(name := self.name_of(path)) != path.stat().st_size:
                del self.sent[name]
                raise ConnectionError(f"{name} arrived with {sizes.get(name, 0):,} bytes, not all")
        if (folder / MANIFEST).read_bytes() == manifest:  # otherwise it was replaced here meanwhile
            self.put(folder / MANIFEST)
            self.complete[folder.name] = self.begun.pop(folder.name)

    def put(self, path: Path) -> None:
        """Copy a file unless it has arrived; of rows that are being written, whole lines."""
        name, stat = self.name_of(path), path.stat()
        if self.sent.get(name) == (stamp := (stat.st_size, stat.st_mtime_ns)):
            return
        self.lease.check()
        self.sending = f"{name}, {stat.st_size / 1e6:,.1f} MB"
        if path.suffix == ".jsonl":
            data = path.read_bytes()
            self.store.write(name, data[: data.rfind(b"\n") + 1])
        else:
            self.store.put(name, path)
        self.sent[name] = stamp

    def drop(self, folder: str) -> None:
        """Delete a checkpoint from the store, its manifest first, so that the rest is not a checkpoint."""
        self.complete.pop(folder, None)
        self.begun.pop(folder, None)
        names = self.store.files(f"{CHECKPOINTS}/{folder}")
        self.remove(sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")))
        self.damaged.discard(folder)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self.lease.check()
            self.store.remove(name)
            self.sent.pop(name, None)

    def name_of(self, path: Path) -> str:
        return path.relative_to(self.run).as_posix()
