"""Questions about files on disk that every reader asks: is there one by this name, and does it hold its content."""

import errno
import glob
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from regpt.errors import UserError

T = TypeVar("T")
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: keys in order, below 1,024 bytes; `hawser` was the name of
# the project before its first release. Windows clones may have CRLF.
LFS_POINTER = re.compile(
    rb"version https://(git-lfs|hawser)\.github\.com/spec/v1\r?\n"
    rb"([a-z0-9.-]+ [^\r\n]+\r?\n)*oid \w+:[0-9a-f]+\r?\nsize \d+\s*"
)
LFS_POINTER_BYTES = 1024
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE | re.DOTALL)  # two letters at least: C:/ is none
# Nothing can have this name, or nothing has it (on Windows EINVAL is a character that no name holds).
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EBADF)


def status(path: str | Path) -> os.stat_result | None:
    """What the system knows about `path`; None where nothing has that name, also of one that no file system takes: too
    long, or with a NUL character, for which `Path.is_file` and its siblings raise before Python 3.14.

    Raises:
        UserError: the system does not answer, such as for a folder that this user may not look into.
    """
    try:
        return os.stat(path)
    except ValueError:  # a NUL character, or a surrogate that no byte stands for
        return None
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise UserError(
            f"cannot look at {str(path)!r} ({error.strerror}); check its permissions and its disk"
        ) from None


def version(folder: Path) -> tuple[int, int, int] | None:
    """Which folder it is and when it last changed; None where nothing is. The number alone does not tell: a file system
    may give that of a deleted folder to the next."""
    found = status(folder)
    return (found.st_dev, found.st_ino, found.st_ctime_ns) if found else None


def unless_gone(folder: Path, read: Callable[[], T], doubtful: Callable[[T], object] = lambda found: False) -> T | None:
    """`read()`, what it reads being in `folder`; None where the folder was deleted or replaced meanwhile, as a live run
    does with its checkpoints.

    Args:
        doubtful: true of a result that, as an error, counts only when the folder is still the same.

    Raises:
        UserError: what `read` raises, and a file that cannot be read.
    """
    before = version(folder)

    def gone() -> bool:
        return before is None or version(folder) != before

    try:
        found = read()
    except (UserError, OSError) as error:
        if gone():
            return None
        if isinstance(error, OSError):
            raise UserError(
                f"cannot read {str(error.filename or folder)!r} ({error.strerror or error}); check its permissions and "
                "its disk"
            ) from None
        raise
    return None if doubtful(found) and gone() else found


def identity(path: str | Path) -> tuple[int, int] | None:
    """What is at `path`, whatever its name will be: device and file number; None where nothing is."""
    found = status(path)
    return (found.st_dev, found.st_ino) if found else None


def exists(path: str | Path) -> bool:
    """Whether `path` names something; False also for names that no file system takes (NUL, thousands of letters)."""
    return status(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether `path` names a file; False also for names that no file system takes."""
    found = status(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether `path` names a folder; False also for names that no file system takes."""
    found = status(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def at_home(path: str) -> str:
    """`path` with the home folder for its `~`, which shells leave as it is in `--flag=~/x`, in quotes and in files."""
    return os.path.expanduser(path) if path == "~" or path.startswith("~/") else path


def resolved(path: str | Path) -> Path:
    """The absolute `path` without links; of a name that no file system takes, and of a circle of links, as it is."""
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # RuntimeError: a circle of links, before Python 3.13
        return Path(path).absolute()


def matching(pattern: str) -> list[Path]:
    """What a glob matches (`**` for folders below), sorted; nothing for a pattern that no file system takes."""
    try:
        return [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    except (OSError, ValueError):
        return []


def address_of(path: str | Path) -> str | None:
    """The address (s3://…, https://…) that someone gave as `path`, also where a `Path` made `s3:/…` of it."""
    found = ADDRESS.match(str(path))
    return f"{found[1]}://{found[2]}" if found else None


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file inside the folder that it is joined to, on every operating system."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def is_plain_path(name: str) -> bool:
    """Whether `name`, with / between folders, can only mean a file below the folder that it is joined to."""
    return all(is_plain_name(part) for part in name.split("/"))


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file is a Git LFS pointer, from its first `LFS_POINTER_BYTES` bytes (all of it, for a pointer).

    A clone made without git-lfs holds such pointers of about 130 bytes instead of its large files.
    """
    return len(head) <= LFS_POINTER_BYTES and LFS_POINTER.fullmatch(head) is not None


def holds_lfs_pointer(path: Path) -> bool:
    """Whether the file `path` is a Git LFS pointer; OSError where it cannot be read."""
    with path.open("rb") as file:
        return is_lfs_pointer(file.read(LFS_POINTER_BYTES + 1))


def refuse_lfs_pointer(path: Path) -> None:
    """Raise a UserError where the file `path` is a Git LFS pointer; OSError where it cannot be read."""
    if holds_lfs_pointer(path):
        raise UserError(
            f"{str(path)!r} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself; "
            "fetch the content with: git lfs pull"
        )
