"""Files on disk: what exists, atomic writing (temporary name, fsync, rename, fsync of the folder), locks, SHA-256."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO, Any, TypeVar

from regpt.errors import UserError

T = TypeVar("T")
STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # no file even where a shell redirects them to one
PARTIAL = ".partial"  # after the name of a file that is being written
SUCCESSOR = ".new"  # after the name of a folder that is about to be replaced
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md: keys in order, below 1,024 bytes; `hawser` was the name of
# the project before its first release. Windows clones may have CRLF.
LFS_POINTER = re.compile(
    rb"version https://(git-lfs|hawser)\.github\.com/spec/v1\r?\n"
    rb"([a-z0-9.-]+ [^\r\n]+\r?\n)*oid \w+:[0-9a-f]+\r?\nsize \d+\s*"
)
LFS_POINTER_BYTES = 1024
BUSY_PAUSES_S = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.IGNORECASE | re.DOTALL)  # two letters at least: C:/ is none
# Nothing can have this name, or nothing has it (on Windows EINVAL is a character that no name holds).
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.EBADF)


def stat_or_none(path: str | Path) -> os.stat_result | None:
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
        what = f"cannot look at {str(path)!r} ({error.strerror})"
        raise UserError(f"{what}; check its permissions and its disk") from None


def identity(path: str | Path) -> tuple[int, int, int] | None:
    """Device, number and time of the last change of the file or folder at `path`, whatever its name; None where nothing
    is. The number alone is not enough: a file system may give that of a deleted folder to the next."""
    found = stat_or_none(path)
    return (found.st_dev, found.st_ino, found.st_ctime_ns) if found else None


def unless_gone(folder: Path, read: Callable[[], T], doubtful: Callable[[T], object] = lambda found: False) -> T | None:
    """`read()`, what it reads being in `folder`; None where the folder was deleted or replaced meanwhile, as a live run
    does with its checkpoints.

    Args:
        doubtful: true of a result that, as an error, counts only when the folder is still the same.

    Raises:
        UserError: what `read` raises, and a file that cannot be read.
    """
    before = identity(folder)

    def gone() -> bool:
        return before is None or identity(folder) != before

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


def exists(path: str | Path) -> bool:
    """Whether `path` names something; False also for names that no file system takes (NUL, thousands of letters)."""
    return stat_or_none(path) is not None


def is_file(path: str | Path) -> bool:
    """Whether `path` names a file; False also for names that no file system takes."""
    found = stat_or_none(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(path: str | Path) -> bool:
    """Whether `path` names a folder; False also for names that no file system takes."""
    found = stat_or_none(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def at_home(path: str) -> str:
    """`path` with the home folder for its `~`, which shells leave as it is in `--flag=~/x`, in quotes and in files."""
    return os.path.expanduser(path) if path == "~" or path.startswith(("~/", f"~{os.sep}")) else path


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


def refuse_lfs_pointer(path: Path) -> None:
    """Raise a UserError where the file `path` is a Git LFS pointer; OSError where it cannot be read."""
    with path.open("rb") as file:
        head = file.read(LFS_POINTER_BYTES + 1)
    if is_lfs_pointer(head):
        raise UserError(
            f"{str(path)!r} is a Git LFS pointer of {path.stat().st_size} bytes, not the file itself; "
            "fetch the content with: git lfs pull"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of the file `path`, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path, remedy: str | None = None) -> Iterator[IO[bytes]]:
    """An open file that replaces `path` atomically when the body ends without an error; a pipe or device is written to.

    Raises:
        UserError: the file cannot be written, where a `remedy` is given; otherwise it is an OSError.
    """
    found, stream = stat_or_none(path), STREAMS.get(str(path))
    if stream or (found and stat.S_IFMT(found.st_mode) not in (stat.S_IFREG, stat.S_IFDIR)):
        with write_errors(path, remedy), open(os.dup(stream) if stream else path, "wb") as file:
            return (yield file)
    partial = path.with_name(path.name + PARTIAL)
    with write_errors(path, remedy):
        try:
            with partial.open("wb") as file:
                yield file
                finish_file(file, path)
        except BaseException:
            with suppress(OSError):  # a disk that takes nothing
                partial.unlink(missing_ok=True)
            raise


@contextmanager
def write_errors(path: Path, remedy: str | None) -> Iterator[None]:
    """Raise a UserError for an OSError in the body, where a `remedy` is given."""
    try:
        yield
    except OSError as error:
        if remedy is None:
            raise
        raise UserError(f"cannot write {str(path)!r} ({error.strerror or error}); {remedy}") from None


def finish_file(file: IO[bytes], path: Path) -> None:
    """Close `file` when its content is on the disk, and rename it to `path`, in the same folder or another."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    rename(Path(file.name), path)
    sync(path.parent)


def rename(path: Path, name: Path, wait: Callable[[float], object] = time.sleep) -> None:
    """Rename `path` to `name`, replacing a file of that name. Windows refuses it while another process, such as a
    reader or a virus scanner, has one of them open: it is tried again for two seconds."""
    for pause_s in BUSY_PAUSES_S if os.name != "posix" else ():
        try:
            path.replace(name)
            return
        except PermissionError:
            wait(pause_s)
    path.replace(name)


def write_bytes(path: Path, data: bytes, remedy: str | None = None) -> None:
    """Replace `path` atomically; errors as in `replacing`."""
    with replacing(path, remedy) as file:
        file.write(data)


def write_text(path: Path, text: str, remedy: str | None = None) -> None:
    """Replace `path` atomically with `text` in UTF-8; errors as in `replacing`."""
    write_bytes(path, text.encode(), remedy)


def write_json(path: Path, content: Any, remedy: str | None = None) -> None:
    """Replace `path` atomically with `content` as JSON in UTF-8, lone surrogates escaped; errors as in `replacing`."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"), remedy)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk; Windows syncs no folders."""
    if is_file(path):
        with path.open("rb+") as file:  # Windows syncs only files that are open for writing
            os.fsync(file.fileno())
    elif os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the body ends, and is deleted when the body raises.

    The files of the body must be synced, as those of `replacing` are. An older `folder` is replaced as in
    `put_in_place`.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    temporary = temporary_name(folder)
    try:
        above = [parent for parent in temporary.parents if not parent.exists()]
        temporary.mkdir(parents=True)
        for parent in above:
            sync(parent.parent)
        yield temporary
        sync(temporary)
        put_in_place(temporary, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {str(folder)!r} ({error}); free some space or choose another place, "
            "what was saved before is untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename the finished folder `temporary` to `folder`; an older folder of that name is deleted.

    Two folders cannot change names at once, so the new one waits as `folder` + `SUCCESSOR` while the old one leaves: a
    crash at any moment leaves the old one under its name or the new one under one of its two, always whole.
    """
    if folder.exists():
        waiting = folder.with_name(folder.name + SUCCESSOR)
        discard(waiting)
        rename(temporary, waiting)
        sync(folder.parent)
        promote(waiting)
    else:
        rename(temporary, folder)
        sync(folder.parent)


def promote(waiting: Path) -> None:
    """Rename a waiting successor to its final name; the older folder of that name is deleted."""
    folder = waiting.with_name(waiting.name.removesuffix(SUCCESSOR))
    discard(folder)
    rename(waiting, folder)
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Delete `folder` if it exists; it is renamed first, so that a crash leaves no half of it under that name."""
    if folder.is_dir():
        temporary = temporary_name(folder)
        rename(folder, temporary)
        shutil.rmtree(temporary)


def temporary_name(folder: Path) -> Path:
    """A new name for a folder that is being written or deleted, such as `.step-00000250.tmp-1f0c9a2e`."""
    return folder.with_name(f".{folder.name}.tmp-{os.urandom(4).hex()}")


def remove_temporary(parent: Path, name: str) -> None:
    """Delete the folders in `parent` that crashes left half-written, whose names match the pattern `name`."""
    for leftover in parent.glob(f".{name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def unused(path: Path, mark: str) -> Path:
    """The first of the paths with `mark` (such as `.old-{}`), filled with 1, 2, …, after their name that does not
    exist."""
    return next(found for n in count(1) if not (found := path.with_name(path.name + mark.format(n))).exists())


# Locks: a lock ends with the process that holds it, also when that is killed.


@contextmanager
def locked(path: Path, folder: Path, otherwise: str = "choose another --out") -> Iterator[None]:
    """Hold the lock file `path`, which protects `folder`; it is deleted afterwards.

    Raises:
        UserError: another process holds it; the message offers to wait or to do `otherwise`.
    """
    while True:
        with path.open("a+", encoding="utf-8") as file:
            if not try_lock(file):
                file.seek(0)
                holder = file.read().strip()
                who = f"process {holder}" if holder else "another process"
                raise UserError(f"{folder} is being written by {who}; wait until it has finished, or {otherwise}")
            if not (found := stat_or_none(path)) or not os.path.samestat(os.fstat(file.fileno()), found):
                continue  # the holder before us has deleted the file between our opening and our locking it
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            try:
                yield
            finally:
                if os.name == "posix":  # while it is held, so that no other process's is deleted
                    path.unlink(missing_ok=True)
        if os.name != "posix":  # Windows deletes no open file
            with suppress(OSError):
                path.unlink()
        return


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path` now; the file itself stays as it is."""
    try:
        with path.open("r", encoding="utf-8") as file:
            return not try_lock(file, shared=True)
    except OSError:  # no file, or not ours to open
        return False


if os.name == "posix":
    import fcntl

    def try_lock(file: IO[str], shared: bool = False) -> bool:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

else:
    import msvcrt

    LOCKED_BYTE = 1 << 30  # Windows forbids others to read locked bytes: far after the number of the process

    def try_lock(file: IO[str], shared: bool = False) -> bool:
        file.seek(LOCKED_BYTE)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        file.seek(0)
        return True
