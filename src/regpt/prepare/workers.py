"""Encode partitions in this process, or in several at once: every executor yields each partition when it is done.

Workers are started as `python -m regpt.prepare.worker`, which works alike on every system, asks nothing of the program
that imports this package, and ends with it. One that is killed loses its partition's work; another does it again.
"""

import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from regpt.errors import UserError
from regpt.prepare.encode import encode_partition
from regpt.prepare.partition import Partition
from regpt.prepare.parts import Counts
from regpt.prepare.settings import Settings
from regpt.text.tokenizer import Encoder

TRIES = 3  # of a partition whose process is killed
News = Callable[[Partition, Counts], None]
Finished = Generator[Partition, None, None]


class DiskFull(Exception):
    """A worker could not write."""


class Request(NamedTuple):
    """A partition for a process, and the first line that the process must have been given."""

    start: str
    partition: Partition
    threads: int


def encode_here(
    work: Path,
    tasks: Iterator[Partition],
    settings: Settings,
    encoder: Encoder,
    threads: int,
    news: News,
) -> Finished:
    """One partition after another; `threads` of this process encode."""
    for partition in tasks:
        encode_partition(
            work, partition, settings, encoder, threads, progress=lambda counts, p=partition: news(p, counts)
        )
        yield partition


class Pool:
    """Processes that encode. They start at once, and load what they need while the work is divided; they end with
    `encode`, or with the context."""

    def __init__(self, workers: int) -> None:
        self._requests: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Partition, dict[str, Any]]] = queue.SimpleQueue()
        self._crew = [Attendant(self._requests, self._answers) for _ in range(workers)]

    def encode(self, work: Path, tasks: Iterator[Partition], settings: Settings, news: News) -> Finished:
        """Partitions in the order in which the processes finish them; ends the processes.

        Raises:
            UserError: what a worker says about the text, or three processes were killed at the same partition.
            DiskFull: a worker could not write.
        """
        with self:
            start = json.dumps({"work": str(work), "settings": asdict(settings)})
            workers, waiting = len(self._crew), 0
            first = list(itertools.islice(tasks, workers))
            threads = workers // max(1, len(first))  # more than one for a few files that cannot be divided
            tasks = itertools.chain(first, tasks)
            while True:
                while waiting < 2 * workers and (task := next(tasks, None)):
                    self._requests.put(Request(start, task, threads))
                    waiting += 1
                if not waiting:
                    return
                partition, answer = self._answers.get()
                if "counts" in answer:
                    news(partition, Counts(**answer["counts"]))
                else:
                    raise_failure(answer)
                    waiting -= 1
                    yield partition

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for attendant in self._crew:
            attendant.stop()
            self._requests.put(None)  # wakes one that has nothing to do
        for attendant in self._crew:
            attendant.join()


def raise_failure(answer: dict[str, Any]) -> None:
    """What a worker's last answer about a partition means."""
    if "error" in answer:
        raise UserError(answer["error"])
    if "full" in answer:
        raise DiskFull
    if "crash" in answer:
        raise RuntimeError(f"a worker failed\n{answer['crash']}")


class Attendant:
    """A thread that hands partitions to a process of its own and passes the answers on."""

    def __init__(
        self,
        requests: "queue.SimpleQueue[Request | None]",
        answers: "queue.SimpleQueue[tuple[Partition, dict[str, Any]]]",
    ) -> None:
        self._requests, self._answers = requests, answers
        self._stopped, self._fresh = False, True
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._attend, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process:
                self._process.kill()

    def join(self) -> None:
        self._thread.join()

    def _attend(self) -> None:
        self._started()
        while (request := self._requests.get()) and not self._stopped:
            for _ in range(TRIES):
                if self._encode(request) or self._stopped:
                    break
            else:
                name = request.partition.readings[0].source.file
                sentence = f"{TRIES} processes were killed while they read {name}"
                fix = "perhaps for want of memory: use fewer --workers"
                self._answers.put((request.partition, {"error": f"{sentence}, {fix}"}))
        self._end_process()

    def _encode(self, request: Request) -> bool:
        """False if the process ended without a last answer."""
        process = self._started()
        if process is None:
            return False
        assert process.stdin
        assert process.stdout
        try:
            if self._fresh:
                process.stdin.write(request.start + "\n")
                self._fresh = False
            process.stdin.write(f'{{"threads": {request.threads}, "partition": {request.partition.to_json()}}}\n')
            process.stdin.flush()
        except OSError:  # it has ended
            self._end_process()
            return False
        for line in process.stdout:
            answer = json.loads(line)
            self._answers.put((request.partition, answer))
            if "counts" not in answer:
                return True
        self._end_process()
        return False

    def _started(self) -> "subprocess.Popen[str] | None":
        with self._lock:
            if self._stopped:
                return None
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "regpt.prepare.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
                self._fresh = True
            return self._process

    def _end_process(self) -> None:
        with self._lock:
            if self._process:
                self._process.kill()
                self._process.communicate()
                self._process = None
