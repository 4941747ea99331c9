"""Where a preparation runs, and in how many processes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from regpt.prepare.settings import Filters
from regpt.prepare.sources import Source
from regpt.prepare.workers import Pool
from regpt.text.fast import is_standard
from regpt.text.tokenizer import Tokenizer

SMALL_BYTES = 24_000_000  # of sources; below it starting processes (0.3 s) takes longer than what they would save
# All processes together, and what they take (measured with English text): the first, another that encodes, and more
# when it compares words, or has `datasketch` in it.
MEMORY_BYTES, FIRST_BYTES, WORKER_BYTES, WORDS_BYTES, NEAR_BYTES = 2 << 30, 160 << 20, 115 << 20, 30 << 20, 45 << 20


@dataclass(frozen=True)
class Placement:
    """Where and how fast; nothing here changes a byte.

    Attributes:
        workers: processes on this machine; None is one a core, as far as 2 GiB of memory allow.
        executor: `local`, or `ray` for a cluster.
        address: of the Ray cluster; None starts one on this machine.
        encoder: `auto` takes the package `gigatoken` where it is installed; `exact` does not.
    """

    workers: int | None = None
    executor: Literal["local", "ray"] = "local"
    address: str | None = None
    encoder: Literal["auto", "exact"] = "auto"


def available_cores() -> int:
    """Cores that this process may use; macOS and Windows do not restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def affordable_workers(filters: Filters) -> int:
    """Processes that encode and, with the first, stay within `MEMORY_BYTES`."""
    each = WORKER_BYTES
    if filters.decontaminate or filters.dedup == "near":
        each += WORDS_BYTES
    if filters.dedup == "near":
        each += NEAR_BYTES
    return (MEMORY_BYTES - FIRST_BYTES) // each


def count_workers(placement: Placement, filters: Filters) -> int:
    return placement.workers or min(available_cores(), affordable_workers(filters))


def start_pool(workers: int, placement: Placement, sources: Sequence[Source], tokenizer: Tokenizer) -> Pool | None:
    """Processes for these sources, or None when this process, or a cluster, does it all."""
    if placement.executor == "ray" or workers == 1 or not is_standard(tokenizer):
        return None
    return Pool(workers) if sum(source.bytes for source in sources) >= SMALL_BYTES else None
