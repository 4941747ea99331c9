"""A folder with the methods of Triton's cache manager."""

from pathlib import Path


class Kept:
    def __init__(self, folder: Path):
        self.folder = folder

    def get_file(self, name: str) -> str | None:
        path = self.folder / name
        return str(path) if path.exists() else None

    def put(self, data: bytes, name: str) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        return str(self.folder / name)
