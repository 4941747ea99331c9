"""One process at a time may write a remote run: a lease, as files in `RUN/lease` (docs/remote.md has its guarantees).

`00000003.json` is the third claim on the run; the one with the highest number holds it. A claim is created where no
file may be, so of several processes that want the next number one gets it. The holder renews its claim every quarter of
`seconds`; a process that wants the lease watches for as long whether that happens, so clocks are never compared. Before
each file that it writes or deletes the holder looks for its own token in the newest claim.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.remote.retry import transport_errors
from regpt.remote.store import Store

FOLDER = "lease"
SECONDS = 60.0
POLLS = 12  # looks at a claim, in the seconds that it may stay without a change
RENEWALS = 4  # of the holder, in the same time
LONGEST_SECONDS = 3600.0  # that a claim of others may ask for


class Claim(NamedTuple):
    """A file of the lease; one that cannot be read has a number only."""

    number: int
    token: str = ""  # random; kept as long as the same staging folder claims the run again
    host: str = "an unknown host"
    pid: int = 0
    claimed: float = 0.0  # Unix seconds by the clock of `host`, for people
    seconds: float = SECONDS  # without a renewal, after which others may take over
    renewals: int = 0
    released: bool = False  # the holder has ended

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.number:08d}.json"

    @property
    def holder(self) -> str:
        return f"process {self.pid} on {self.host}"

    def data(self) -> bytes:
        return json.dumps(self._asdict(), indent=1).encode()


class LeaseLost(UserError):
    """Another process has taken the run over."""


class Lease:
    """The right to write to `store`, from `acquire` to `renew(released=True)`."""

    def __init__(self, store: Store, seconds: float = SECONDS, sleep: Callable[[float], None] = time.sleep) -> None:
        self.store, self.sleep, self.lock = store, sleep, threading.Lock()
        self.claim = Claim(0, uuid.uuid4().hex, platform.node(), os.getpid(), time.time(), seconds)

    def newest(self) -> Claim | None:
        """The claim with the highest number, whoever made it."""
        stems = [name.removeprefix(f"{FOLDER}/").removesuffix(".json") for name in self.store.files(FOLDER)]
        number = max((int(stem) for stem in stems if stem.isdigit()), default=0)
        data = self.store.read(Claim(number).name) if number else None
        if data is None:
            return None
        try:
            found = TypeAdapter(Claim).validate_json(data)
        except ValidationError:
            return Claim(number)
        return found._replace(number=number, seconds=min(max(found.seconds, 1.0), LONGEST_SECONDS))

    def acquire(self, known: str = "") -> Claim | None:
        """Take the lease; returns the claim before this one.

        Args:
            known: the token of a claim whose process has ended; this one's too, where nobody else has claimed since.

        Raises:
            UserError: another process holds the lease, or the store cannot be read or written.
        """
        before = self.store.tries(self.newest)
        token = known if known and (before is None or before.token == known) else self.claim.token
        if before is not None and before.token != token and not before.released:
            before = self.watch(before)
        self.claim = mine = self.claim._replace(number=before.number + 1 if before else 1, token=token)
        self.store.tries(lambda: self.store.create(mine.name, mine.data()), "written", mine.name)
        after = self.store.tries(self.newest)  # ours, also when the answer to our own creation was lost
        if after is None or after[:2] != mine[:2]:
            raise self.held(after or mine)
        for name in self.store.tries(lambda: self.store.files(FOLDER)):
            if name < mine.name:
                self.store.tries(lambda: self.store.remove(name), "written", name)  # noqa: B023
        return before

    def watch(self, first: Claim) -> Claim:
        """Return the newest claim when it was released, or has not changed for as long as it may.

        Raises:
            UserError: it was renewed.
        """
        print_note(f"{first.holder} holds {self.store.url}; taken over unless renewed within {first.seconds:g} seconds")
        for _ in range(POLLS):
            self.sleep(first.seconds / POLLS)
            seen = self.store.tries(self.newest)
            if seen is None or seen.released:
                return seen or first
            if seen != first:
                raise self.held(seen)
        return first

    def held(self, claim: Claim) -> UserError:
        return UserError(
            f"{self.store.url} is being written by {claim.holder}, who renews its lease of {claim.seconds:g} seconds; "
            "wait until it has ended, or choose another --out"
        )

    def check(self) -> None:
        """Return when the lease is still this process's, or the folder was emptied.

        Raises:
            LeaseLost: it is not; nothing may be written any more.
        """
        newest = self.newest()
        if newest is not None and newest[:2] != self.claim[:2]:
            raise LeaseLost(
                f"{self.store.url} was taken over by {newest.holder}, because this process had not renewed its lease "
                f"for {self.claim.seconds:g} seconds; nothing of theirs was overwritten"
            )

    def renew(self, released: bool = False) -> None:
        """Write that this process is alive, or that others may have the run; errors as in `check`."""
        self.check()
        with self.lock:
            if not self.claim.released:
                self.claim = self.claim._replace(renewals=self.claim.renewals + (not released), released=released)
                self.store.write(self.claim.name, self.claim.data())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While this lasts, a thread renews the lease; it ends when the lease is lost."""
        stop = threading.Event()
        threading.Thread(target=self.keep, args=(stop,), daemon=True).start()
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
                continue  # the mirror reports it
