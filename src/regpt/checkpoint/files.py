"""Files as checkpoints and exports need them: written whole or not at all, read tensor by tensor."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regpt.errors import UserError


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the body is done, and is gone when the body raises.

    What the body writes with `write_json`, `write_text` and `write_tensors` has reached the disk before the rename. An
    older `folder` is moved out of the way first: a crash between these two renames leaves neither under the name.

    Raises:
        UserError: the disk is full, or the place cannot be written to.
    """
    temporary = temporary_beside(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush_folder(temporary)
        discard(folder)
        temporary.replace(folder)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {str(folder)!r} ({error}); free some space or choose another place, "
            "what was saved before is untouched"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file of `tensors`, from any device; the metadata is what transformers asks for."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    flush(path)


def flush(path: Path) -> None:
    """Wait until the contents of the file are on the disk."""
    with path.open("rb+") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


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
        UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {str(path)!r} ({error.strerror}); restore the file or choose another model"
        ) from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(f"{str(path)!r} is not JSON ({error}); restore the file or choose another model") from None
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} holds no JSON object; restore the file or choose another model")
    return content


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file inside the folder that it is joined to, on every operating system."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files by name; each is read, to the CPU, only when it is asked for.

    Raises:
        UserError: a file that is missing or damaged, or a name that two files hold.
    """

    def __init__(self, files: Iterable[Path]):
        self.file_of: dict[str, Path] = {}
        for file in files:
            with opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    if name in self.file_of:
                        raise UserError(
                            f"tensor {name!r} is in both {self.file_of[name]} and {file}; remove one of them"
                        )
                    self.file_of[name] = file

    def __getitem__(self, name: str) -> Tensor:
        with opened(self.file_of[name]) as tensors:
            return tensors.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file_of)

    def __len__(self) -> int:
        return len(self.file_of)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A handle on a safetensors file; what is wrong with the file is a UserError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {str(file)!r} as safetensors ({error}); restore the file or choose another model"
        ) from None
