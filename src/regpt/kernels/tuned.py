"""Which algorithms were found fastest, kept where Triton keeps what it has compiled: tuned once on a machine."""

import hashlib
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

FILE = "algorithm.bin"
DIGEST_BYTES = 32


class Tuned:
    """Bytes by key, on disk.

    Args:
        about: what an algorithm is good for, beside its key: the device, the library's version.
        cache: makes Triton's cache manager for a hexadecimal name; its own by default.
    """

    def __init__(self, about: str, cache: Callable[[str], Any] | None = None):
        if cache is None:
            from triton.runtime.cache import get_cache_manager as cache  # pyright: ignore[reportMissingImports]

            assert cache is not None
        self.about, self.cache = about, cache

    def get(self, key: Hashable) -> bytes | None:
        """What `put` was given last; None where there is nothing, or where it was damaged."""
        path = self.place(key).get_file(FILE)
        kept = b"" if path is None else Path(path).read_bytes()
        digest, algorithm = kept[:DIGEST_BYTES], kept[DIGEST_BYTES:]
        return algorithm if digest == hashlib.sha256(algorithm).digest() else None

    def put(self, key: Hashable, algorithm: bytes) -> None:
        self.place(key).put(hashlib.sha256(algorithm).digest() + algorithm, FILE)

    def place(self, key: Hashable) -> Any:
        return self.cache(hashlib.sha256(f"{self.about} {key}".encode()).hexdigest())
