"""One process at a time may write a remote run: a lease, as files in `RUN/lease` (docs/remote.md has its guarantees).

`00000003.json` is the third claim on the run; the claim with the highest number holds it. Creating a claim fails where
the file exists, so of several processes that want the next number one gets it. The holder renews its claim every
quarter of `seconds`; a process that wants the lease watches that long for a renewal, so clocks are never compared.
Before each file that it writes or deletes the holder looks for its own token in the newest claim.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from regpt.console.lines import print_note
from regpt.errors import UserError
from regpt.remote.retry import transport_errors
from regpt.remote.store import Store

FOLDER = "lease"
SECONDS = 60.0
POLLS = 12  # looks at the claim of another process, in its `seconds`
RENEWALS = 4  # of the holder, in the same time
LONGEST_SECONDS = 3600.0  # accepted from the claim of another process


class Claim(NamedTuple):
    """A file of the lease; an unreadable one has only a number."""

    number: int
    token: str = ""  # random; the same while one staging folder claims the run again and again
    host: str = "an unknown host"
    pid: int = 0
    claimed: float = 0.0  # Unix seconds by the clock of `host`, for people
    seconds: float = SECONDS  # without a renewal, until others may take over
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
    """The right to write to `store`: `acquire` it, then work while it is `kept`."""

    def __init__(self, store: Store, seconds: float = SECONDS) -> None:
        self.store = store
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
            known: token of a process that has ended; this one takes it, unless others have claimed the run since.

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
        return before

    def watch(self, first: Claim) -> Claim:
        """Return the newest claim once it is released, or was not renewed in its `seconds`.

        Raises:
            UserError: it was renewed.
        """
        print_note(f"{first.holder} holds {self.store.url}; taken over unless renewed within {first.seconds:g} seconds")
        for _ in range(POLLS):
            self.store.patience.sleep(first.seconds / POLLS)
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
        """Raise LeaseLost if another process has claimed the run: nothing may be written any more."""
        newest = self.newest()
        if newest is not None and newest[:2] != self.claim[:2]:
            raise LeaseLost(
                f"{self.store.url} was taken over by {newest.holder}, because this process had not renewed its lease "
                f"for {self.claim.seconds:g} seconds; nothing of theirs was overwritten"
            )

    def renew(self, released: bool = False) -> None:
        """Write that this process is alive, or that it has ended; raises LeaseLost as `check`."""
        self.check()
        self.claim = self.claim._replace(renewals=self.claim.renewals + (not released), released=released)
        self.store.write(self.claim.name, self.claim.data())

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease in a thread while this lasts, then release it: not after Ctrl-C, when a file may be on its
        way."""
        stop, may_release = threading.Event(), True
        thread = threading.Thread(target=self.keep, args=(stop,), daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            may_release = isinstance(error, Exception)
            raise
        finally:
            stop.set()
            if may_release:
                thread.join()
                with suppress(LeaseLost, *transport_errors()):
                    self.renew(released=True)

    def keep(self, stop: threading.Event) -> None:
        while not stop.wait(self.claim.seconds / RENEWALS):
            try:
                self.renew()
            except LeaseLost:
                return
            except transport_errors():
                continue  # the mirror reports it
