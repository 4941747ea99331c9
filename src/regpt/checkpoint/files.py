"""Files as checkpoints and exports need them: written whole or not at all."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from regpt import structured
from regpt.errors import UserError

REMEDY = "restore the file or choose another model"
SUCCESSOR = ".new"  # behind the name of a folder that is about to be replaced


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the body is done, and is gone when the body raises.

    What the body writes with `write_json`, `write_text` and `write_tensors` has reached the disk before the rename. An
    older `folder` is replaced as in `put_in_place`.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    temporary = temporary_beside(folder)
    try:
        make_folder(temporary)
        yield temporary
        flush_folder(temporary)
        put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {str(folder)!r} ({error}); free some space or choose another place, "
            "what was saved before is untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Give the finished folder `temporary` the name `folder`, whose older bearer is deleted.

    Two folders cannot change names at once, so the new one waits as `successor(folder)` while the old one leaves: a
    crash at any moment leaves the old one under its name or the new one under one of its two, always whole.
    """
    waiting = successor(folder)
    if folder.exists():
        discard(waiting)
        temporary.replace(waiting)
        flush_folder(folder.parent)
        promote(waiting)
    else:
        temporary.replace(folder)
        flush_folder(folder.parent)


def promote(waiting: Path) -> None:
    """Let a waiting successor take its name; the older bearer is deleted."""
    folder = waiting.with_name(waiting.name.removesuffix(SUCCESSOR))
    discard(folder)
    waiting.replace(folder)
    flush_folder(folder.parent)


def successor(folder: Path) -> Path:
    """Where what replaces `folder` waits for its name."""
    return folder.with_name(folder.name + SUCCESSOR)


def discard(folder: Path) -> None:
    """Delete `folder` if it exists; it loses its name first, so that a crash leaves no half of it under that name."""
    if folder.is_dir():
        temporary = temporary_beside(folder)
        folder.replace(temporary)
        shutil.rmtree(temporary)


def temporary_beside(folder: Path) -> Path:
    """A new name for a folder that is being written or deleted, such as `.step-00000250.tmp-1f0c9a2e`."""
    return folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex[:8]}")


def remove_leftovers(parent: Path, name: str) -> None:
    """Delete what crashes left in `parent` of folders whose names match the pattern `name`."""
    for leftover in parent.glob(f".{name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
    flush(path)


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def flush(path: Path) -> None:
    """Wait until the contents of the file are on the disk."""
    with path.open("rb+") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make `folder`, which does not exist, and the folders above it; their names are on the disk when it returns."""
    above = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    for parent in above:
        flush_folder(parent.parent)


def flush_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk; Windows has no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        UserError: no such file, something else in it, or something beyond the limits of `regpt.structured`.
    """
    content = structured.read_json(path, REMEDY)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no JSON object; {REMEDY}")
    return content
