"""The folder `OUT/.work`: locked by one process; holds the settings that a later attempt must repeat."""

import contextlib
import errno
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from regpt.data.manifest import WORK
from regpt.errors import UserError
from regpt.files import exists, is_folder, locked, write_bytes
from regpt.prepare.decontaminate import Evaluations
from regpt.prepare.partition import RESTART
from regpt.prepare.settings import Settings, TextOptions
from regpt.prepare.shards import remove_leftovers
from regpt.structured import read_json

# No space, quota exceeded, file too large: the user can mend all three.
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
FLAGS = {  # of the settings that must be those of the attempt that is continued
    "tokenizer_sha256": "--tokenizer",
    "val_fraction": "--val-fraction",
    "min_chars": "--min-chars",
    "dedup": "--dedup",
    "evaluations": "--decontaminate",
    **{field.name: f"--{field.name.replace('_', '-')}" for field in fields(TextOptions)},
}


def check_out(out: Path) -> None:
    if is_finished(out):
        shutil.rmtree(out / WORK, ignore_errors=True)  # of a process that was killed before it could tidy up
    if exists(out) and not is_folder(out):
        raise UserError(f"--out {out} is a file; give a folder")
    if exists(out / "config.toml") and exists(out / "env.json"):
        raise UserError(f"--out {out} is the folder of a run; give another one for the tokens")


def is_finished(out: Path) -> bool:
    return exists(out / "manifest.json")


@contextlib.contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """Lock the work folder of `out`; afterwards delete it if the data set is finished or nothing was encoded."""
    work = out / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}); choose another folder") from None
    try:
        with locked(work / "lock", out):
            if is_finished(out):  # by another process meanwhile
                raise UserError(f"{out} already holds a data set; repeat the command to compare it")
            try:
                if not is_begun(work):
                    clear(work, out)
                yield work
            finally:
                if is_finished(out):
                    clear(work)
                elif not is_begun(work):
                    clear(work, out)
    finally:
        with contextlib.suppress(OSError):  # not empty
            work.rmdir()
            out.rmdir()


def begin(work: Path, out: Path, settings: Settings, evaluations: Evaluations | None, restart: bool) -> None:
    """Store the settings, or compare them with those of the unfinished attempt, which `restart` deletes."""
    if restart:
        clear(work, out)
    file, now = work / "settings.json", json.loads(json.dumps(asdict(settings)))
    if is_begun(work) and file.is_file():
        before = read_json(file, RESTART)
        if not isinstance(before, dict) or not isinstance(text := before.get("text", {}), dict):
            raise UserError(f"{str(file)!r} holds no settings; {RESTART}")
        before, new = before | text, now | now["text"]
        for name, flag in FLAGS.items():
            if before.get(name, new[name]) != new[name]:
                was = f" ({shown(before[name])}, now {shown(new[name])})"
                raise UserError(
                    f"{out} holds an unfinished preparation with another {flag}{was}; "
                    "repeat its options to go on, or add --restart to give it up"
                )
    for path in work.glob("*.partial"):  # of processes that were killed
        with contextlib.suppress(OSError):  # Windows, while a process ends
            path.unlink()
    write_bytes(file, json.dumps(now).encode())
    if evaluations:
        evaluations.save(work)


def is_begun(work: Path) -> bool:
    """Whether any partition has been encoded."""
    return any(work.glob("part-*.json"))


def clear(work: Path, out: Path | None = None) -> None:
    """Delete everything in `work` but the lock, and the unfinished shards in `out`."""
    for path in work.iterdir():
        if path.name != "lock":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    if out:
        remove_leftovers(out)


def shown(value: Any) -> str:
    """Format a setting for a message; hashes are shortened."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return ", ".join(item[:12] if isinstance(item, str) else str(item) for item in values) or "none"


def try_place(folder: Path) -> None:
    """Check that files can be written into `folder`, before work is spent on their content.

    Raises:
        UserError: it cannot be made or written to.
    """
    above = [one for one in (folder, *folder.parents) if not one.exists()]
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write_bytes(folder / ".regpt-try", b"regpt")
        finally:
            with contextlib.suppress(OSError):  # what is in use, or cannot be changed
                for path in folder.glob(".regpt-try*"):
                    path.unlink()
                for one in above:
                    one.rmdir()


@contextlib.contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Raise a UserError that names `out` for an OSError in the body."""
    try:
        with naming_full_disk(out):
            yield
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from None


@contextlib.contextmanager
def naming_full_disk(out: Path) -> Iterator[None]:
    """Raise a UserError that names `out` where the body finds its disk full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"the disk of {out} is full; free space, then the same command goes on") from None
