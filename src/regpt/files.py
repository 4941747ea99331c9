"""Questions about files on disk that every reader asks: is there one by this name, and does it hold its content."""

import os
import re
from pathlib import Path

from regpt.errors import UserError

# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: keys in order, below 1,024 bytes; `hawser` was the name of
# the project before its first release. Windows clones may have CRLF.
LFS_POINTER = re.compile(
    rb"version https://(git-lfs|hawser)\.github\.com/spec/v1\r?\n"
    rb"([a-z0-9.-]+ [^\r\n]+\r?\n)*oid \w+:[0-9a-f]+\r?\nsize \d+\s*"
)
LFS_POINTER_BYTES = 1024


def exists(path: str | Path) -> bool:
    """Whether `path` names something; False also for names that no file system takes (NUL, thousands of letters)."""
    return os.path.exists(path)  # pathlib's own methods raise OSError for these before Python 3.14


def is_file(path: str | Path) -> bool:
    """Whether `path` names a file; False also for names that no file system takes."""
    return os.path.isfile(path)


def is_folder(path: str | Path) -> bool:
    """Whether `path` names a folder; False also for names that no file system takes."""
    return os.path.isdir(path)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether a file is a Git LFS pointer, from its first `LFS_POINTER_BYTES` bytes (all of it, for a pointer).

    A clone made without git-lfs holds such pointers of about 130 bytes instead of its large files.
    """
    return len(head) <= LFS_POINTER_BYTES and LFS_POINTER.fullmatch(head) is not None


def refuse_lfs_pointer(path: Path) -> None:
    """Raise a UserError where the file `path` is a Git LFS pointer; OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(LFS_POINTER_BYTES)
    if is_lfs_pointer(head):
        raise UserError(
            f"{str(path)!r} is a Git LFS pointer of {len(head)} bytes, not the file itself; fetch the content with: "
            "git lfs pull"
        )
