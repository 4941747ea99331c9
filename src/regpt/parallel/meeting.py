"""A name that one group of processes agrees on, in a store that may hold what earlier groups have left.

torchrun's default rendezvous on one machine, the static one, keeps its store when it starts the processes again: gloo
would find there the addresses of those that have died and wait for them (seen with torch 2.13). Its count of restarts
does not tell groups apart: those of two machines may differ. So rank 0 draws a name and gives it to processes that are
certainly alive: each asks under a name of its own that nobody had before.
"""

import time
import uuid
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

POLL_SECONDS = 0.01


def agree_on_name(store: Store, rank: int, world_size: int, seconds: float) -> str:
    """The same name in every process of this group, and in no other group; waits for all of them.

    Raises:
        RuntimeError: a process did not come within `seconds`.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        give_name(store, mine, world_size, seconds)
        return mine
    store.set(question(rank), mine)
    try:
        store.wait([answer(rank, mine)], timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RuntimeError(f"rank 0 did not come within {seconds:g} seconds ({error})") from None
    name = store.get(answer(rank, mine)).decode()
    store.set(thanks(rank, name), "")
    return name


def give_name(
    store: Store, name: str, world_size: int, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Answer every process until all have thanked for `name`; a question that is left over is answered for nothing."""
    missing = set(range(1, world_size))
    limit = time.monotonic() + seconds
    while missing:
        for rank in sorted(missing):
            if store.check([question(rank)]):
                store.set(answer(rank, store.get(question(rank)).decode()), name)
            if store.check([thanks(rank, name)]):
                missing.remove(rank)
        if missing and time.monotonic() > limit:
            ranks = ", ".join(map(str, sorted(missing)))
            raise RuntimeError(f"of {world_size} processes these did not come within {seconds:g} seconds: {ranks}")
        if missing:
            sleep(POLL_SECONDS)


def question(rank: int) -> str:
    return f"regpt/question/{rank}"


def answer(rank: int, asked: str) -> str:
    return f"regpt/answer/{rank}/{asked}"


def thanks(rank: int, name: str) -> str:
    return f"regpt/thanks/{rank}/{name}"
