"""A folder at an address that fsspec knows (s3://, gs://, …): its files by their names in it.

Credentials, regions and endpoints are those of s3fs and gcsfs, as for sources of text (`remote.buckets`). Nothing is
cached between calls: another machine may have written meanwhile.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from regpt.errors import UsageError
from regpt.files import is_plain_path, rename
from regpt.remote.buckets import connect
from regpt.remote.retry import PATIENCE, Patience, persistently, status_of, transport_errors

REFUSED = {409, 412}  # HTTP: there is such a file, or it is being created
T = TypeVar("T")


class Store:
    """The folder at `url`. Methods raise what fsspec raises; `tries` repeats them and raises a UserError."""

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        """Raise a UserError for an address of an unknown kind, a missing package or an unreachable server."""
        self.url, self.patience = url.rstrip("/"), patience
        scheme = url.split("://")[0].lower()
        if scheme in ("http", "https", "hf"):
            raise UsageError(f"{url} is an address that runs are not kept at; give a folder, s3://BUCKET/FOLDER, …")
        self.is_local = scheme in ("file", "local")
        options = {"auto_mkdir": True} if self.is_local else {}
        self.fs, root = connect(url, "using", use_listings_cache=False, **options)
        self.root = root.rstrip("/")

    def tries(self, action: Callable[[], T], done: str = "read", name: str = "") -> T:
        """The result of `action`, tried again while its error may pass.

        Raises:
            UserError: the file `name` could not be `done`, all tries together or for a reason that lasts.
        """
        return persistently(action, f"{self.url}/{name}".rstrip("/"), self.patience, done=done)

    def files(self, folder: str = "") -> dict[str, int]:
        """The size of each file below `folder`, by its name in the store; hidden ones, half-written, are left out."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self.place(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = f"{self.root}/"
        inside = {path.removeprefix(start): info for path, info in found.items() if path.startswith(start)}
        return {name: int(info["size"]) for name, info in inside.items() if info["type"] == "file" and is_safe(name)}

    def read(self, name: str) -> bytes | None:
        """The content of a file; None when there is none."""
        try:
            return self.fs.cat_file(self.place(name))
        except (FileNotFoundError, IsADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        self.whole(name, lambda place: self.fs.pipe_file(place, data))

    def put(self, name: str, path: Path) -> None:
        """Write the file `path`."""
        self.whole(name, lambda place: self.fs.put_file(str(path), place))

    def whole(self, name: str, write: Callable[[str], object]) -> None:
        """Call `write(place)` so that nobody sees half a file: buckets are atomic, local folders need a rename."""
        place = self.place(name)
        if not self.is_local:
            write(place)
            return
        parent, _, last = place.rpartition("/")
        write(f"{parent}/.{last}.partial")
        rename(Path(f"{parent}/.{last}.partial"), Path(place))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; return whether it was written. Atomic on S3, Google's storage and local disks;
        elsewhere a check, then a write."""
        try:
            if self.is_local:
                with self.fs.open(self.place(name), "xb") as file:
                    file.write(data)
            else:
                self.fs.pipe_file(self.place(name), data, mode="create")
        except FileExistsError:
            return False
        except transport_errors() as error:
            if {status_of(error), status_of(error.__cause__ or error)} & REFUSED:
                return False
            raise
        return True

    def get(self, name: str, path: Path) -> bool:
        """Download a file, which appears as `path` when it is complete; False if there is no such file."""
        partial = path.with_name(f".{path.name}.partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.fs.get_file(self.place(name), str(partial))
        except FileNotFoundError:
            return False
        rename(partial, path)
        return True

    def remove(self, name: str) -> None:
        """Delete a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.place(name))
        if self.is_local and "/" in name:
            with contextlib.suppress(OSError):  # other files are there; in buckets a folder is only a name
                os.rmdir(self.place(name.rpartition("/")[0]))

    def place(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


def is_safe(name: str) -> bool:
    """Whether a name in a store is of a file inside the folder that it is downloaded to, and not hidden."""
    return is_plain_path(name) and not any(part.startswith(".") for part in name.split("/"))
