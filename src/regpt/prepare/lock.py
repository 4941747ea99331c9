"""One process a folder: a lock that ends with the process that holds it, also when it is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from regpt.errors import UserError


@contextmanager
def locked(path: Path, folder: Path, otherwise: str = "choose another --out") -> Iterator[None]:
    """Hold the lock file `path`, which belongs to `folder`; it is deleted afterwards.

    Raises:
        UserError: another process holds it; `otherwise` is what else to do than to wait.
    """
    with taken(path, folder, otherwise) as file:
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if os.name == "posix":  # while it is held, so that nobody else's is deleted
                path.unlink(missing_ok=True)
    if os.name != "posix":  # Windows deletes no open file
        with suppress(OSError):
            path.unlink()


@contextmanager
def taken(path: Path, folder: Path, otherwise: str) -> Iterator[IO[str]]:
    """The lock file, open and locked."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            if not take(file):
                file.seek(0)
                holder = file.read().strip()
                who = f"process {holder}" if holder else "another process"
                raise UserError(f"{folder} is being written by {who}; wait until it has finished, or {otherwise}")
            if still_there(file, path):
                yield file
                return


def still_there(file: IO[str], path: Path) -> bool:
    """False when the holder before us deleted the file between our opening and our locking it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path` now; the file itself stays as it is."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return not take(file, shared=True)
    except OSError:  # no file, or not ours to open
        return False


if os.name == "posix":
    import fcntl

    def take(file: IO[str], shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

else:
    import msvcrt

    LOCKED_BYTE = 1 << 30  # Windows forbids others to read what is locked: far behind the number of the process

    def take(file: IO[str], shared: bool = False) -> bool:
        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        file.seek(0)
        return True
