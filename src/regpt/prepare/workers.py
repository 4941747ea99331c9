"""Encode partitions in this process, or in a pool of processes.

Both yield a partition when its files are complete. A process that dies loses the partitions in hand, which are encoded
again: files get their names when they are whole. Modules that import NumPy are imported after
`limit_memory_and_threads`.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from regpt.errors import UserError

if TYPE_CHECKING:
    from regpt.prepare.partition import Counts, Partition
    from regpt.prepare.settings import Settings
    from regpt.prepare.sources import Source
    from regpt.text.tokenizer import Encoder, Tokenizer

    News = Callable[[int, Counts], None]  # index of a partition, and what is encoded of it so far

NEWS_S = 0.2
SMALL_BYTES = 24_000_000  # of sources; below it starting processes (0.3 s) takes longer than what they would save
MAX_WORKERS = 16  # unless more are asked for: 2 to 3 GiB of memory
REPORT: list[Callable[[Any], None]] = []  # in a process of a pool: how it reports to the first one


def available_cores() -> int:
    """Cores that this process may use; macOS and Windows do not restrict them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_pool(workers: int, sources: Sequence[Source], tokenizer: Tokenizer) -> Pool | None:
    """Processes for these sources, or None when this process does it all."""
    from regpt.text.fast import is_standard

    worth = workers > 1 and is_standard(tokenizer) and sum(source.bytes for source in sources) >= SMALL_BYTES
    return Pool(workers) if worth else None


def encode_here(
    work: Path, tasks: Iterator[Partition], settings: Settings, news: News, encoder: Encoder, threads: int
) -> Generator[Partition]:
    """One partition after another; `threads` of this process encode."""
    from regpt.prepare.encode import encode_partition

    for partition in tasks:
        encode_partition(work, partition, settings, encoder, threads, functools.partial(news, partition.index))
        yield partition


class Pool:
    """Processes that encode. They start at once and import while the work is divided; they end with the context."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._start()

    def encode(self, work: Path, tasks: Iterator[Partition], settings: Settings, news: News) -> Generator[Partition]:
        """Partitions in the order in which the processes finish them; ends the processes.

        Raises:
            UserError: unreadable text, or a partition whose processes die.
            OSError: a worker could not write.
        """
        with self:
            first = list(itertools.islice(tasks, self._workers))
            threads = self._workers // max(1, len(first))  # more than one for a few files that cannot be divided
            tasks = itertools.chain(first, tasks)
            running: dict[Future[None], Partition] = {}
            while True:
                while len(running) < 2 * self._workers and (task := next(tasks, None)):
                    running[self._submit(encode_and_report, work, task, settings, threads)] = task
                if not running:
                    return
                try:
                    for future in self._wait(running, news):
                        future.result()
                        yield running.pop(future)
                except BrokenProcessPool:
                    self._restart_with_fewer(list(running.values()))
                    tasks, running, threads = itertools.chain(list(running.values()), tasks), {}, 1

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for process in multiprocessing.active_children():
            if isinstance(process, WorkerProcess):
                process.kill()
        self._executor.shutdown(cancel_futures=True)

    def _start(self) -> None:
        context = WorkerContext()
        self._news = context.SimpleQueue()
        self._executor = ProcessPoolExecutor(self._workers, context, start_worker, (self._news.put,))
        for _ in range(self._workers):
            self._submit(import_encoder)

    def _restart_with_fewer(self, in_hand: Sequence[Partition]) -> None:
        """Start half as many processes after one has died, most likely for want of memory.

        Raises:
            UserError: there was one only.
        """
        self.__exit__()
        if self._workers == 1:
            name, fix = in_hand[0].readings[0].source.file, "divide large documents, or use a machine with more memory"
            raise UserError(f"a process was killed while it read {name}, perhaps for want of memory: {fix}")
        self._workers //= 2
        self._start()

    def _submit(self, function: Callable[..., None], *task: Any) -> Future[None]:
        try:
            return self._executor.submit(function, *task)
        except (BrokenProcessPool, OSError, ValueError):  # a process died between two tasks or while another started
            broken: Future[None] = Future()
            broken.set_exception(BrokenProcessPool())
            return broken

    def _wait(self, running: Iterable[Future[None]], news: News) -> set[Future[None]]:
        """The futures that are done, after up to `NEWS_S`; passes on what the processes report meanwhile."""
        done, _ = wait(running, NEWS_S, FIRST_COMPLETED)
        while not self._news.empty():
            news(*self._news.get())
        return done


class WorkerProcess(SpawnProcess):
    """A process that does not run the user's script again, which may lack `if __name__ == "__main__"`."""

    def start(self) -> None:
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class WorkerContext(SpawnContext):
    Process = WorkerProcess  # type: ignore[assignment]


def start_worker(report: Callable[[Any], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    limit_memory_and_threads()
    REPORT.append(report)


def end_with_parent() -> None:
    """End this process, also in the middle of a partition, when the one that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def limit_memory_and_threads() -> None:
    """Keep libraries of one process among many small; to be called before NumPy and pyarrow are imported."""
    os.putenv("OPENBLAS_NUM_THREADS", "1")  # NumPy's: no algebra here, and 16 times 16 threads that spin for a while
    os.putenv("ARROW_DEFAULT_MEMORY_POOL", "system")  # others keep twice as much for later


def import_encoder() -> None:
    import regpt.prepare.encode  # noqa: F401


def encode_and_report(work: Path, partition: Partition, settings: Settings, threads: int) -> None:
    """Encode `partition` in a process of a pool."""
    from regpt.prepare.encode import encode_partition, open_encoder

    (report,) = REPORT
    try:
        encoder = open_encoder(work, settings)
        encode_partition(work, partition, settings, encoder, threads, lambda counts: report((partition.index, counts)))
    except MemoryError:
        files = ", ".join(dict.fromkeys(reading.source.file for reading in partition.readings))
        fix = "divide large documents, or use fewer --workers"
        raise UserError(f"{files}: more memory is needed than there is; {fix}") from None
