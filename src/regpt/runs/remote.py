"""Runs whose folder is at an address (s3://…): written on this machine, copied there by `remote.mirror`.

The local folder, the staging folder, is as that of any run, with its lock, its checkpoints, its metrics. It holds all
files of the store, and perhaps more, as long as the newest claim in the store's lease has its token; otherwise another
machine has continued the run, and the store counts.
"""

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from regpt.checkpoint.config import CheckpointConfig
from regpt.checkpoint.fetch import cache_folder, fetch_model, folder_name, restore
from regpt.checkpoint.load import print_warning
from regpt.checkpoint.save import is_intact
from regpt.config import RunConfig, validate_config
from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.files import unused, write_json
from regpt.parallel.mesh import Mesh
from regpt.remote import is_address
from regpt.remote.lease import Claim, Lease
from regpt.remote.mirror import Mirror
from regpt.remote.retry import PATIENCE, Patience
from regpt.remote.store import Store
from regpt.runs.folder import CONFIG, LOCK, is_run, read_run_config
from regpt.structured import parse_json, parse_toml

NOTE = ".remote.json"  # in the staging folder: its address, and its token in the lease
WAIT_SECONDS = 5.0  # of the main process, between two signs of life to the others
T = TypeVar("T")


class RemoteRun:
    """The run at `url`; `folder` is its staging folder."""

    def __init__(
        self,
        url: str,
        config: CheckpointConfig,
        patience: Patience = PATIENCE,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.skipped: list[str] = []  # problems of the store's checkpoints that were not used
        self.store, self.folder = Store(url, patience), staging_folder(url, config.staging)
        self.url, self.lease = self.store.url, Lease(self.store, config.lease_seconds, sleep)

    def refuse_used(self) -> None:
        """Raise a UserError where a run is already."""
        there = self.store.tries(lambda: self.store.read(CONFIG), name=CONFIG) is not None
        if there or is_run(self.folder):
            which = f"{self.url} already" if there else f"{self.folder}, which never reached {self.url},"
            raise UserError(f"{which} holds a run; go on with: regpt train --resume {self.url}, or use another --out")

    def begin(self, stack: ExitStack) -> Mirror:
        """Claim a new run until `stack` ends; the staging folder is this process's own already."""
        self.refuse_used()
        self.claim(stack)
        self.refuse_used()
        empty(self.folder)
        self.note(self.lease.claim.token)
        return self.mirror(stack)

    def go_on(self, stack: ExitStack) -> Mirror:
        """Claim the run until `stack` ends, and make the staging folder hold it; that is this process's own already.

        Raises:
            UserError: another process holds it, there is no run, or none of its checkpoints is intact.
        """
        before = self.claim(stack)
        if holds_all(self.folder, before):
            return self.mirror(stack)
        if is_run(self.folder):
            aside = set_aside(self.folder)
            print_note(f"{self.url} was written elsewhere since; this machine's copy of it is now in {aside}")
        print_note(f"copying {self.url} to {self.folder}")
        empty(self.folder)
        self.note(self.lease.claim.token)
        return self.mirror(stack, restore(self.store, self.folder, self.skip))

    def skip(self, message: str) -> None:
        """Report that a checkpoint is damaged, and remember it."""
        self.skipped.append(message)
        print_warning(message)

    def claim(self, stack: ExitStack) -> Claim | None:
        """Acquire the lease, and renew it until `stack` ends; the claim before.

        The token of the folder is on the disk before the claim. The process that claimed the run with it before has
        ended, because the folder's lock is ours.
        """
        token = read_token(self.folder) or uuid.uuid4().hex
        self.note(token)
        before = self.lease.acquire(token)
        stack.enter_context(self.lease.kept())
        return before

    def note(self, token: str) -> None:
        write_json(self.folder / NOTE, {"url": self.url, "token": token})

    def mirror(self, stack: ExitStack, damaged: Sequence[str] = ()) -> Mirror:
        """The mirror of the folder; when `stack` ends it copies the rest, such as the row about an error, but not after
        Ctrl-C."""
        mirror = Mirror(self.folder, self.lease, is_intact, damaged)

        def end(kind: object, error: BaseException | None, trace: object) -> None:
            if error is None or isinstance(error, Exception):
                mirror.finish()
                if mirror.failure is not None and mirror.failure is not error:
                    print_note(str(mirror.failure))

        stack.push(end)
        return mirror


def staging_folder(url: str, staging: str) -> Path:
    """Where the run at `url` is on this machine."""
    return (Path(staging).expanduser() if staging else cache_folder() / "runs") / folder_name(url)


def stored_config(url: str, staging: str) -> RunConfig:
    """The configuration of the run at `url`: that of its staging folder where this holds all that the store holds.

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
        except ValueError as error:  # no TOML, or no text
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
    """Whether the staging folder `folder` has all files of the store: nobody else has claimed the run since."""
    return is_run(folder) and (newest is None or newest.token == read_token(folder))


def read_token(folder: Path) -> str:
    """The token of a staging folder; empty where it cannot be read."""
    try:
        return str(parse_json((folder / NOTE).read_bytes())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def set_aside(folder: Path) -> Path:
    """Move the content of `folder` to a new folder next to it; the lock, which is held, stays.

    config.toml goes last: after a crash the rest still counts as a run, and is set aside too.
    """
    aside = unused(folder, ".old-")
    aside.mkdir()
    for path in reversed(content_of(folder)):
        path.replace(aside / path.name)
    return aside


def empty(folder: Path) -> None:
    """Delete the remains of an unfinished download in `folder`."""
    for path in content_of(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def content_of(folder: Path) -> list[Path]:
    """Content of a staging folder; config.toml comes first, so that a crash leaves nothing that seems a whole run."""
    paths = [path for path in folder.iterdir() if path.name not in (LOCK, NOTE)]
    return sorted(paths, key=lambda path: path.name != CONFIG)


def by_main(mesh: Mesh, work: Callable[[], T]) -> T | None:
    """`work()` in the main process, however long it takes; the others get None, when it has ended."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if mesh.is_main:
        threading.Thread(target=run, daemon=True).start()  # Ctrl-C does not wait for it
    while mesh.any(mesh.is_main and not wait([future], WAIT_SECONDS).done):
        pass  # the others learn that nothing hangs
    return future.result() if mesh.is_main else None


def on_this_machine(name: str, mesh: Mesh, *, optimizer: bool = False) -> str:
    """The model `name`; a copy of the checkpoint that it means where it is an address, the same in all processes."""
    if not is_address(name):
        return name
    folder = by_main(mesh, lambda: fetch_model(name, optimizer=optimizer))
    return mesh.gather(str(folder or "").encode())[0].decode()


def bring_up_to_date(mirror: Mirror | None, mesh: Mesh, tell: Callable[[str], None]) -> None:
    """Return, in all processes, when the main one has copied everything; reports the file on its way meanwhile.

    Raises:
        UserError: it could not be copied, or the run was taken over.
    """
    wait_s = 0.0
    while mesh.any(mirror is not None and not mirror.finish(wait_s)):
        wait_s = WAIT_SECONDS
        if mirror is not None:
            tell(f"copying to {mirror.store.url}: {mirror.sending}")
    if mirror is not None:
        if mirror.failure is not None:
            raise mirror.failure
        tell(f"{mirror.store.url} is complete; the copy on this machine, {mirror.run}, may be deleted")
