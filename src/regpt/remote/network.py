"""First contact with a server: without a network a command ends within seconds, before any library's own retries."""

import socket
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable

from regpt.console.lines import print_note
from regpt.errors import UserError

REACH_SECONDS = 2.5  # to look up a name and to connect; twice, with a wait between, a command ends within ten
PORTS = {"http": 80, "https": 443}
REACHED: set[tuple[str, int]] = set()  # by this process
WAYS_OUT = (
    "check the network, or work offline: give a local file or folder, or copy the caches of a machine that has it "
    "(~/.cache/regpt, ~/.cache/huggingface)"
)


class Unreached(UserError):
    """No connection to a server or to the proxy before it; `why`, without the ways to work offline."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why}; {WAYS_OUT}")
        self.why = why


def reach(address: str, tries: int = 2) -> None:
    """Connect to the server of an http(s) address, or to the proxy that the environment names, and hang up; only once
    in a process, because a server that was reached is worth all tries of a transfer.

    Raises:
        Unreached: none of the `tries` made a connection within `REACH_SECONDS`.
    """
    host, port = target_of(address)
    if (host, port) in REACHED:
        return
    while error := failure(lambda: socket.create_connection((host, port), REACH_SECONDS).close(), REACH_SECONDS):
        tries -= 1
        why = f"no connection to {host}: {getattr(error, 'strerror', None) or error}"
        if not tries:
            raise Unreached(why)
        print_note(f"{why}; trying again in 1 s")
        time.sleep(1.0)
    REACHED.add((host, port))


def target_of(address: str) -> tuple[str, int]:
    split = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(split.scheme.lower())
    if proxy and not urllib.request.proxy_bypass(split.hostname or ""):
        split = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return split.hostname or "", split.port or PORTS.get(split.scheme.lower(), 443)


def failure(action: Callable[[], object], seconds: float) -> Exception | None:
    """The error of `action`; a TimeoutError where it takes longer (looking up a name has no limit of its own)."""
    found: list[Exception | None] = []

    def act() -> None:
        try:
            action()
            found.append(None)
        except (OSError, ValueError) as error:
            found.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else TimeoutError(f"no answer within {seconds:g} s")
