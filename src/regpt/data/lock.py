"""One process a folder: a lock that ends with the process that holds it, also when it is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from regpt.errors import UserError


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock file `path`, which belongs to `folder`; it is deleted afterwards.

    Raises:
        UserError: another process holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        if not take(file):
            file.seek(0)
            holder = file.read().strip()
            who = f"process {holder}" if holder else "another process"
            raise UserError(f"{folder} is being written by {who}; wait until it has finished, or choose another --out")
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


if os.name == "posix":
    import fcntl

    def take(file: IO[str]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

else:
    import msvcrt

    LOCKED_BYTE = 1 << 30  # Windows forbids others to read what is locked: far behind the number of the process

    def take(file: IO[str]) -> bool:
        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        file.seek(0)
        return True
