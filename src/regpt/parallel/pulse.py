"""Heartbeats between ranks: a stalled rank reports which ranks it is waiting for.

A collective that one process does not enter makes all others wait: NCCL and gloo report that much later, if at all,
and never which rank is missing. Every process writes its number of begun waits, and the present one, into the store of
the rendezvous every few seconds; a process that has waited too long in the same one reads the others' heartbeats,
reports them, and ends with an exit code at which the launcher starts all processes again. A process whose heartbeats
continue and state that it works for itself, writing a checkpoint for example, is not hung: a disk may take any time.
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

HUNG = 70  # sysexits.h EX_SOFTWARE: unexpected, worth another try
LONGEST_PAUSE = 5.0  # seconds between two heartbeats
Note = Mapping[str, Any]  # a heartbeat
Notes = Mapping[int, Note]  # by rank


class Pulse:
    """Heartbeat of one rank. `step` is the update it works on; all processes begin the same waits in order."""

    def __init__(self) -> None:
        self.step = 0
        self.waits = 0
        self.doing = ""  # what is waited for; empty while computing
        self.work = ""  # of this process alone, which may take as long as a disk does
        self.since = time.monotonic()

    @contextlib.contextmanager
    def waiting(self, doing: str) -> Iterator[None]:
        """Around what returns only when all processes have come to it; a wait inside another is a part of that one."""
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
        """Around what may take long in this process alone: the others wait for it, unless it waits itself."""
        before, self.work = self.work, work
        try:
            yield
        finally:
            self.work = before

    def note(self) -> dict[str, Any]:
        return {"step": self.step, "waits": self.waits, "doing": self.doing, "work": self.work, "time": time.time()}


@contextlib.contextmanager
def watched(pulse: Pulse, rank: int, world_size: int, connect: Callable[[], Store], seconds: float) -> Iterator[None]:
    """Send the heartbeats of `pulse`, and end this process when it has waited `seconds` for another one."""
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
        excused, heard: when all missing ranks were last found at work, and the heartbeats of that time.
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
            with contextlib.suppress(Exception):  # the store is gone when the launcher is: then there is nobody to tell
                store = store or self.connect()
                store.set(key(self.rank), json.dumps(self.pulse.note()))
            self.look_for_launcher()
            waited = time.monotonic() - max(self.pulse.since, self.excused)
            if self.pulse.doing and waited > self.seconds:
                self.judge(self.notes(store), waited)

    def judge(self, notes: Notes, waited: float) -> None:
        """End the process, unless all that it waits for are at work."""
        own = self.pulse.note()
        missing = missing_ranks(self.world_size, own, notes)
        if missing and all(rank in notes and at_work(notes[rank], self.heard.get(rank)) for rank in missing):
            self.excused, self.heard = time.monotonic(), notes
            if self.rank == min(set(range(self.world_size)) - set(missing)):  # one says it for all
                work = ", ".join(f"rank {rank} is {notes[rank]['work']}" for rank in missing)
                print_note(f"step {own['step']}: {work}; the others wait for it")
        else:
            print_note(diagnosis(self.rank, self.world_size, own, notes, waited))
            os._exit(HUNG)

    def look_for_launcher(self) -> None:
        """Stop as after SIGTERM when the launcher was killed: nobody would start again what dies, or end what hangs."""
        if os.getppid() != self.parent:
            self.parent = os.getppid()
            print_note(f"rank {self.rank}: the launcher is gone; stopping")
            os.kill(os.getpid(), signal.SIGTERM)

    def notes(self, store: Store | None) -> Notes:
        """Last heartbeat of every rank, as far as the store can be reached."""
        notes: Notes = {}
        with contextlib.suppress(Exception):
            for rank in range(self.world_size):
                if store is not None and store.check([key(rank)]):
                    notes[rank] = json.loads(store.get(key(rank)))
        return notes


def key(rank: int) -> str:
    return f"regpt/pulse/{rank}"


def missing_ranks(world_size: int, own: Note, notes: Notes) -> list[int]:
    """Those that have not begun the wait that this process is in."""
    return [other for other in range(world_size) if other not in notes or notes[other]["waits"] < own["waits"]]


def at_work(note: Note, before: Note | None) -> bool:
    """Whether a process works for itself, and has noted so since its note `before`; no clocks of hosts are compared."""
    return bool(note.get("work")) and not note["doing"] and (before is None or note["time"] != before["time"])


def diagnosis(rank: int, world_size: int, own: Note, notes: Notes, waited: float) -> str:
    """One sentence: the step, what is waited for, who has not come to it and what was last heard of them."""
    begin = f"step {own['step']}: rank {rank} has waited {waited:.0f} seconds for {own['doing']}"
    if not notes:
        return f"{begin}; the store is not to be reached, so its host is gone"
    missing = missing_ranks(world_size, own, notes)
    if not missing:
        return f"{begin}; all {world_size} ranks are in it: suspect a device or the network (NCCL_DEBUG=INFO says more)"
    return f"{begin}; missing: " + ", ".join(heard(other, notes.get(other), own["time"]) for other in missing)


def heard(rank: int, note: Note | None, now: float) -> str:
    if note is None:
        return f"rank {rank} (never heard of)"
    doing = f"waiting for {note['doing']}" if note["doing"] else note.get("work") or "computing"
    return f"rank {rank} ({doing} in step {note['step']}, heard of {now - note['time']:.0f} seconds ago)"
