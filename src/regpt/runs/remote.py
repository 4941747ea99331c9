"""Runs whose folder is at an address (s3://…): written on this machine, copied there by `checkpoint.mirror`.

The local folder, the staging folder, is like that of any run, with its lock, checkpoints and metrics. It holds all
files of the store, and perhaps more, while the newest claim in the store's lease has its token; otherwise another
machine has continued the run, and the store counts.
"""

import contextlib
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.fetch import fetch_model, folder_name, restore
from regpt.checkpoint.load import print_warning
from regpt.checkpoint.mirror import Mirror
from regpt.checkpoint.saver import Saver
from regpt.config import RunConfig, validate_config
from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.files import unused, write_json
from regpt.parallel.mesh import Mesh
from regpt.remote import is_address
from regpt.remote.download import REMOTE_OPTIONS
from regpt.remote.lease import Claim, Lease
from regpt.remote.retry import PATIENCE, Patience
from regpt.remote.store import Store
from regpt.runs.folder import CONFIG, LOCK, is_run, read_run_config
from regpt.structured import parse_json, parse_toml

NOTE = ".remote.json"  # in the staging folder: its address, and its token in the lease
WAIT_SECONDS = 5.0  # between two heartbeats of the main process, while it waits for the network
T = TypeVar("T")


class RemoteRun:
    """The run at `url`; `folder` is its staging folder.

    Attributes:
        damaged: names of the store's checkpoints that were skipped.
        skipped: why, one message each.
    """

    def __init__(self, url: str, config: CheckpointConfig, patience: Patience = PATIENCE) -> None:
        self.store, self.folder = Store(url, patience), staging_folder(url, config.staging)
        self.url, self.lease = self.store.url, Lease(self.store, config.lease_seconds)
        self.damaged, self.skipped = list[str](), list[str]()

    def refuse_used(self) -> None:
        """Raise a UserError if there is a run already."""
        there = self.store.tries(lambda: self.store.read(CONFIG), name=CONFIG) is not None
        if there or is_run(self.folder):
            which = f"{self.url} already" if there else f"{self.folder}, which never reached {self.url},"
            raise UserError(f"{which} holds a run; go on with: regpt train --resume {self.url}, or use another --out")

    def begin(self, stack: ExitStack) -> None:
        """Claim a new run until `stack` ends; this process owns the staging folder already."""
        self.refuse_used()
        self.claim(stack)
        self.refuse_used()
        self.empty_folder()

    def go_on(self, stack: ExitStack) -> None:
        """Claim the run until `stack` ends and bring the staging folder, which this process owns, up to date.

        Raises:
            UserError: another process holds it, there is no run, or none of its checkpoints is intact.
        """
        if holds_all(self.folder, self.claim(stack)):
            return
        if is_run(self.folder):
            aside = set_aside(self.folder)
            print_note(f"{self.url} was written elsewhere since; this machine's copy of it is now in {aside}")
        print_note(f"copying {self.url} to {self.folder}")
        self.empty_folder()
        self.damaged = restore(self.store, self.folder, self.skip)

    def skip(self, message: str) -> None:
        """Report a damaged checkpoint, and remember it."""
        self.skipped.append(message)
        print_warning(message)

    def claim(self, stack: ExitStack) -> Claim | None:
        """Acquire the lease and renew it until `stack` ends; return the claim before.

        The token of the folder is on disk before the claim. A process that claimed the run with it before has ended,
        because this one holds the lock of the folder.
        """
        token = read_token(self.folder) or uuid.uuid4().hex
        self.note(token)
        before = self.lease.acquire(token)
        stack.enter_context(self.lease.kept())
        return before

    def empty_folder(self) -> None:
        """Delete the remains of an unfinished download; from now on the folder has the token of this claim."""
        for path in content_of(self.folder):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.note(self.lease.claim.token)

    def note(self, token: str) -> None:
        write_json(self.folder / NOTE, {"url": self.url, "token": token})


@contextlib.contextmanager
def mirrored(remote: RemoteRun | None, saver: Saver, mesh: Mesh, say: Callable[[str], None]) -> Iterator[Mirror | None]:
    """Copy the run folder to `remote` while this lasts, in the main process; `deliver` waits for the last files.

    An error ends the run but not the copy, so its row in the metrics arrives; Ctrl-C ends both.
    """
    if remote is None or not mesh.is_main:
        yield None
        return
    mirror = Mirror(saver, remote.lease, remote.damaged, say)
    mirror.start()
    try:
        yield mirror
    except Exception as error:
        try:
            mirror.finish()
        except Exception as failure:
            if failure is not error:
                print_note(str(failure))
        raise


def deliver(mirror: Mirror | None, mesh: Mesh) -> None:
    """Return, in all processes, when the main one has copied everything; meanwhile report the file on its way.

    Raises:
        UserError: it could not be copied, or the run was taken over.
    """

    def report() -> None:
        if mirror is not None:
            mirror.say(f"copying to {mirror.store.url}: {mirror.sending}")

    by_main(mesh, lambda: mirror and mirror.finish(), report)
    if mirror is not None:
        mirror.say(f"{mirror.store.url} is complete; the copy on this machine, {mirror.run}, may be deleted")


def staging_folder(url: str, staging: str) -> Path:
    """Local folder of the run at `url`."""
    return (Path(staging).expanduser() if staging else REMOTE_OPTIONS.folder / "runs") / folder_name(url)


def stored_config(url: str, staging: str) -> RunConfig:
    """Configuration of the run at `url`: from its staging folder if that holds everything, otherwise from the store.

    Args:
        staging: instead of the run's own checkpoint.staging.

    Raises:
        UserError: there is no run, or it cannot be read.
    """
    store, there = Store(url), None
    if data := store.tries(lambda: store.read(CONFIG), name=CONFIG):
        source = f"{store.url}/{CONFIG}"
        try:
            there = validate_config(parse_toml(data), source)
        except ValueError as error:  # not TOML, or not text
            raise UserError(f"{source} is not valid TOML: {error}; restore the file") from None
    folder = staging_folder(store.url, staging or (there.checkpoint.staging if there else ""))
    if holds_all(folder, store.tries(Lease(store).newest)):
        return read_run_config(folder)
    if there is None:
        raise UserError(
            f"{store.url} holds no run (no {CONFIG}); start one with: regpt train RECIPE --data DIR --out {store.url}"
        )
    return there


def holds_all(folder: Path, newest: Claim | None) -> bool:
    """Whether the staging folder has all files of the store: nobody else has claimed the run since."""
    return is_run(folder) and (newest is None or newest.token == read_token(folder))


def read_token(folder: Path) -> str:
    """Token of a staging folder; empty if it cannot be read."""
    try:
        return str(parse_json((folder / NOTE).read_bytes())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def set_aside(folder: Path) -> Path:
    """Move the content of `folder` to a new folder next to it, except for the lock, which is held.

    config.toml goes last: after a crash the rest still counts as a run, and is set aside too.
    """
    aside = unused(folder, ".old-{}")
    aside.mkdir()
    for path in sorted(content_of(folder), key=lambda path: path.name == CONFIG):
        path.replace(aside / path.name)
    return aside


def content_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in (LOCK, NOTE)]


def by_main(mesh: Mesh, work: Callable[[], T], meanwhile: Callable[[], None] = lambda: None) -> T | None:
    """Return `work()` in the main process, however long it takes; the others get None when it has ended.

    `meanwhile` is called in all processes every `WAIT_SECONDS`.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if mesh.is_main:
        threading.Thread(target=run, daemon=True).start()  # Ctrl-C does not wait for it
    while mesh.any(mesh.is_main and not wait([future], WAIT_SECONDS).done):
        meanwhile()  # the collective is a heartbeat: the other ranks do not take the main one for stalled
    return future.result() if mesh.is_main else None


def on_this_machine(name: str, mesh: Mesh, *, optimizer: bool = False) -> str:
    """Return the model `name`; if it is an address, the local copy of its checkpoint, the same in all processes."""
    if not is_address(name):
        return name
    folder = by_main(mesh, lambda: fetch_model(name, optimizer=optimizer))
    return mesh.gather(str(folder or "").encode())[0].decode()
