"""One process at a time may write a remote run: a lease, as files in `RUN/lease`.

`00000003.json` is the third claim on the run; the one with the highest number holds it. A claim is a file that is
created where none may be, so of several processes that want the next number one gets it. The holder writes its own
file anew every quarter of `seconds`, and no other claim; who wants the lease looks whether that happens for as long. So
no two clocks are compared: only how long one process saw no change. Before it writes or deletes anything else the
holder looks whether a higher number is there; then the lease is lost, for good.

What this guarantees, and what not: docs/remote.md.
"""

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from regpt.errors import UserError
from regpt.remote.retry import transport_errors
from regpt.remote.store import Store
from regpt.structured import parse_json

FOLDER = "lease"
SECONDS = 60.0
POLLS = 12  # looks at a claim, in the seconds that it may stay without a change
RENEWALS = 4  # of the holder, in the same time
SETTLE_SECONDS = 5.0  # where a store cannot refuse to create a file twice: until two who tried have both written
LONGEST_SECONDS = 3600.0  # that a claim of others may ask for
ATTEMPTS = 5  # at a number that somebody else is just creating


@dataclass(frozen=True)
class Clock:
    """Time, as tests can make it: `now` in seconds from anywhere, `sleep`, and `wall` for people."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    wall: Callable[[], float] = time.time


CLOCK = Clock()


@dataclass(frozen=True)
class Claim:
    """The content of a file of the lease.

    Attributes:
        number: in its name.
        token: random, of this claim alone.
        host, pid: who holds it.
        claimed, renewed: Unix seconds by the clock of `host`, for people.
        seconds: without a renewal after which others may take over.
        renewals: how often it was written anew.
        released: whether the holder has ended.
    """

    number: int
    token: str
    host: str = "an unknown host"
    pid: int = 0
    claimed: float = 0.0
    renewed: float = 0.0
    seconds: float = SECONDS
    renewals: int = 0
    released: bool = False

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.number:08d}.json"

    def data(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def holder(self) -> str:
        return f"process {self.pid} on {self.host}"


class LeaseLost(UserError):
    """Another process has taken the run over."""


class Lease:
    """The right to write to `store`, from `acquire` to `release`."""

    def __init__(self, store: Store, seconds: float = SECONDS, clock: Clock = CLOCK) -> None:
        self.store, self.clock = store, clock
        now = clock.wall()
        self.claim = Claim(0, uuid.uuid4().hex, platform.node(), os.getpid(), now, now, seconds)
        self.lost: LeaseLost | None = None
        self.exclusive = False  # whether a claim's number is this claim's alone
        self.lock = threading.Lock()

    def newest(self) -> Claim | None:
        """The claim with the highest number, whoever made it."""
        number = self.highest()
        return self.read(number) if number else None

    def highest(self) -> int:
        """The highest number of a claim; 0 when there is none."""
        stems = [name[len(FOLDER) + 1 : -len(".json")] for name in self.store.files(FOLDER) if name.endswith(".json")]
        return max((int(stem) for stem in stems if stem.isdigit()), default=0)

    def read(self, number: int) -> Claim | None:
        data = self.store.read(Claim(number, "").name)
        return None if data is None else parse(number, data)

    def acquire(self, dead: Collection[str] = (), say: Callable[[str], None] = print) -> Claim | None:
        """Take the lease; returns the claim before this one.

        Args:
            dead: the tokens of claims whose processes are known to have ended.
            say: told why it takes time.

        Raises:
            UserError: another process holds the lease, or the store cannot be read or written.
        """
        after = None
        for _ in range(ATTEMPTS):
            before = self.store.tries(self.newest)
            if before is not None and not before.released and before.token not in dead:
                before = self.watch(before, say)
            self.claim = replace(self.claim, number=before.number + 1 if before else 1)
            self.exclusive = self.created_alone()
            if not self.exclusive:
                say(f"{self.store.url}: this store lets two processes create one file, so the lease is weaker there")
                self.clock.sleep(SETTLE_SECONDS)
            after = self.store.tries(self.newest)  # ours, also when the answer to our own creation was lost
            if after is not None and after.token == self.claim.token:
                self.clean_up()
                return before
        raise held(self.store.url, after or self.claim, self.clock)

    def created_alone(self) -> bool:
        """Create the claim's file, where there is none; whether the store refuses to do so twice, which is tried."""
        create = lambda: self.store.create(self.claim.name, self.claim.data())  # noqa: E731
        self.store.tries(create, "written", self.claim.name)
        return self.store.is_exclusive and not self.store.tries(create, "written", self.claim.name)

    def watch(self, first: Claim, say: Callable[[str], None]) -> Claim:
        """Look at a claim until it has been without a change for as long as it may; returns it.

        Raises:
            UserError: it was renewed.
        """
        say(f"{first.holder} holds {self.store.url}; taken over unless renewed within {first.seconds:g} seconds")
        began = self.clock.now()
        while True:
            self.clock.sleep(first.seconds / POLLS)
            enough = self.clock.now() - began >= first.seconds
            seen = self.store.tries(self.newest)
            if seen is None or seen.released:
                return seen or first
            if seen != first:
                raise held(self.store.url, seen, self.clock)
            if enough:
                return first

    def clean_up(self) -> None:
        """Delete the files of earlier claims: the highest number counts, whether the others are there or not."""
        below = [name for name in self.store.tries(lambda: self.store.files(FOLDER)) if name < self.claim.name]
        self.store.tries(lambda: self.store.remove(below), "written")

    def check(self) -> None:
        """Return when the lease is still this process's.

        Raises:
            LeaseLost: it is not; nothing may be written any more.
        """
        if self.lost is None:
            if self.exclusive and self.highest() <= self.claim.number:  # 0: somebody emptied the folder
                return
            newest = self.newest()
            if newest is None or newest.token == self.claim.token:
                return
            self.lost = LeaseLost(
                f"{self.store.url} was taken over by {newest.holder}, because this process had not renewed its lease "
                f"for {self.claim.seconds:g} seconds; nothing of theirs was overwritten"
            )
        raise self.lost

    def renew(self) -> None:
        """Say that this process is alive.

        Raises:
            LeaseLost: as in `check`.
        """
        self.check()
        with self.lock:
            if not self.claim.released:
                self.claim = replace(self.claim, renewals=self.claim.renewals + 1, renewed=self.clock.wall())
                self.store.write(self.claim.name, self.claim.data())

    def release(self) -> None:
        """Let others have the run at once.

        Raises:
            LeaseLost: as in `check`.
        """
        self.check()
        with self.lock:
            self.claim = replace(self.claim, released=True)
            self.store.write(self.claim.name, self.claim.data())

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While this lasts, a thread renews the lease; it ends when the lease is lost."""
        stop = threading.Event()
        thread = threading.Thread(target=self.keep, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()

    def keep(self, stop: threading.Event) -> None:
        while not stop.wait(self.claim.seconds / RENEWALS):
            try:
                self.renew()
            except LeaseLost:
                return
            except transport_errors():
                continue  # whoever uploads says it


def parse(number: int, data: bytes) -> Claim:
    """A claim as another process wrote it; what cannot be read has the token "" and no holder's name."""
    try:
        values: dict[str, Any] = parse_json(data)
        known = {key: kind(values[key]) for key, kind in KINDS.items() if key in values}
    except (ValueError, TypeError, OverflowError):
        return Claim(number, "")
    claim = replace(Claim(number, ""), **known)
    return replace(claim, seconds=min(max(claim.seconds, 1.0), LONGEST_SECONDS))


KINDS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("token", "host"), str),
    **dict.fromkeys(("pid", "renewals"), int),
    **dict.fromkeys(("claimed", "renewed", "seconds"), float),
    "released": bool,
}


def held(url: str, claim: Claim, clock: Clock) -> UserError:
    until = time.strftime("%H:%M:%S", time.localtime(clock.wall() + claim.seconds))
    return UserError(
        f"{url} is being written by {claim.holder}, whose lease lasts until {until} at least; wait until it has ended, "
        "or choose another --out"
    )
