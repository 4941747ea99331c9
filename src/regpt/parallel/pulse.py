"""Heartbeats between ranks: a stalled rank reports which ranks it is waiting for.

A collective that one rank does not enter stalls all others: NCCL and gloo report it much later, if at all, and never
which rank is missing. Every few seconds each rank writes a heartbeat into the store of the rendezvous: how many waits
for other ranks it has entered, and the current one. A rank that has waited too long reads the others' heartbeats,
reports the missing ranks, and exits with a code on which the launcher restarts all processes. A rank whose heartbeats
continue and name local work, such as writing a checkpoint, is not hung: a disk may take any time.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from regpt.console.lines import print_note

HUNG = 70  # sysexits.h EX_SOFTWARE: unexpected, so the launcher restarts
LONGEST_PAUSE = 5.0  # seconds between two heartbeats
Note = Mapping[str, Any]  # a heartbeat
Notes = Mapping[int, Note]  # by rank


class Pulse:
    """State that a rank's heartbeat reports. All ranks enter the same waits in order, so `waits` are comparable."""

    def __init__(self) -> None:
        self.step = 0  # update that it works on
        self.waits = 0  # waits entered so far
        self.doing = ""  # name of the current wait; empty while computing
        self.work = ""  # name of local work without a time limit, such as writing to a disk
        self.since = time.monotonic()  # start of the current wait, or end of the last

    @contextlib.contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Mark a wait for all other ranks, such as a collective; a nested wait counts as part of the outer one."""
        if self.doing:
            yield
            return
        self.waits += 1
        self.doing, self.since = doing, time.monotonic()
        try:
            yield
        finally:
            self.doing, self.since = "", time.monotonic()

    @contextlib.contextmanager
    def working(self, work: str) -> Iterator[None]:
        """Mark local work that may take long: outside a wait, the other ranks wait for it without a time limit."""
        before, self.work = self.work, work
        try:
            yield
        finally:
            self.work = before

    def note(self) -> dict[str, Any]:
        return {"step": self.step, "waits": self.waits, "doing": self.doing, "work": self.work, "time": time.time()}


@contextlib.contextmanager
def watched(pulse: Pulse, rank: int, world_size: int, connect: Callable[[], Store], seconds: float) -> Iterator[None]:
    """Send the heartbeats of `pulse`; end this process when it has waited `seconds` for another rank."""
    watch = Watch(pulse, rank, world_size, connect, seconds)
    thread = threading.Thread(target=watch.run, name="regpt-pulse", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.done.set()
        thread.join(timeout=LONGEST_PAUSE)


@dataclass
class Watch:
    """The thread of `watched`.

    Attributes:
        excused: last time at which every missing rank was at local work; the wait counts from then.
        heard: the heartbeats of that time.
    """

    pulse: Pulse
    rank: int
    world_size: int
    connect: Callable[[], Store]
    seconds: float
    done: threading.Event = field(default_factory=threading.Event)
    parent: int = field(default_factory=os.getppid)
    excused: float = 0.0
    heard: Notes = field(default_factory=dict)

    def run(self) -> None:
        store = None
        while not self.done.wait(min(LONGEST_PAUSE, self.seconds / 4)):
            with contextlib.suppress(Exception):  # the store ends with the launcher
                store = store or self.connect()
                store.set(key(self.rank), json.dumps(self.pulse.note()))
            self.stop_without_launcher()
            waited = time.monotonic() - max(self.pulse.since, self.excused)
            if self.pulse.doing and waited > self.seconds:
                self.judge(self.notes(store), waited)

    def judge(self, notes: Notes, waited: float) -> None:
        """End the process with a diagnosis, unless all missing ranks are at local work."""
        own = self.pulse.note()
        missing = missing_ranks(self.world_size, own, notes)
        if missing and all(rank in notes and at_work(notes[rank], self.heard.get(rank)) for rank in missing):
            self.excused, self.heard = time.monotonic(), notes
            if self.rank == min(set(range(self.world_size)) - set(missing)):  # one rank prints
                work = ", ".join(f"rank {rank} is {notes[rank]['work']}" for rank in missing)
                print_note(f"step {own['step']}: {work}; the others wait for it")
        else:
            print_note(diagnosis(self.rank, self.world_size, own, notes, waited))
            os._exit(HUNG)

    def stop_without_launcher(self) -> None:
        """Send SIGTERM to this process if the launcher was killed: no one would restart or stop its processes."""
        if os.getppid() != self.parent:
            self.parent = os.getppid()
            print_note(f"rank {self.rank}: the launcher is gone; stopping")
            os.kill(os.getpid(), signal.SIGTERM)

    def notes(self, store: Store | None) -> Notes:
        """Read the last heartbeat of every rank; those that the store does not return are missing."""
        notes: Notes = {}
        with contextlib.suppress(Exception):
            for rank in range(self.world_size):
                if store is not None and store.check([key(rank)]):
                    notes[rank] = json.loads(store.get(key(rank)))
        return notes


def key(rank: int) -> str:
    return f"regpt/pulse/{rank}"


def missing_ranks(world_size: int, own: Note, notes: Notes) -> list[int]:
    """List the ranks that have not entered this rank's current wait."""
    return [other for other in range(world_size) if other not in notes or notes[other]["waits"] < own["waits"]]


def at_work(note: Note, before: Note | None) -> bool:
    """Return True if a rank is at local work, with a newer heartbeat than `before` (by that rank's own clock)."""
    return bool(note.get("work")) and not note["doing"] and (before is None or note["time"] != before["time"])


def diagnosis(rank: int, world_size: int, own: Note, notes: Notes, waited: float) -> str:
    """Describe a stalled wait in one sentence: step, wait, missing ranks and their last heartbeats."""
    begin = f"step {own['step']}: rank {rank} has waited {waited:.0f} seconds for {own['doing']}"
    if not notes:
        return f"{begin}; the rendezvous store cannot be reached, so its host is gone"
    missing = missing_ranks(world_size, own, notes)
    if not missing:
        return f"{begin}; all {world_size} ranks are in it: suspect a device or the network (try NCCL_DEBUG=INFO)"
    return f"{begin}; missing: " + ", ".join(last_heartbeat(other, notes.get(other), own["time"]) for other in missing)


def last_heartbeat(rank: int, note: Note | None, now: float) -> str:
    if note is None:
        return f"rank {rank} (no heartbeat yet)"
    doing = f"waiting for {note['doing']}" if note["doing"] else note.get("work") or "computing"
    return f"rank {rank} ({doing} in step {note['step']}, last heartbeat {now - note['time']:.0f} seconds ago)"
