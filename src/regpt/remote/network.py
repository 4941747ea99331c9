"""Is there a network? Asked before the first request to a server, so that no library's patience is spent on none."""

import base64
import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable

REACH_SECONDS = 2.5  # to look up a name and to connect; twice, with a wait between, a command ends within ten
PORTS = {"http": 80, "https": 443}
WAYS_OUT = (
    "check the network, or work offline: give a local file or folder, or copy the caches of a machine that has it "
    "(~/.cache/regpt, ~/.cache/huggingface)"
)


class Unreached(OSError):
    """No connection to a server or to the proxy before it."""


def divided(address: str) -> tuple[str, str | None]:
    """An address without user and password, and the header Authorization that carries them (RFC 7617)."""
    split = urllib.parse.urlsplit(address)
    user, at, host = split.netloc.rpartition("@")
    if not at:
        return address, None
    credentials = urllib.parse.unquote(user if ":" in user else f"{user}:").encode()
    return urllib.parse.urlunsplit(split._replace(netloc=host)), "Basic " + base64.b64encode(credentials).decode()


def reach(address: str, seconds: float = REACH_SECONDS) -> None:
    """Connect to the server of an http(s) address, or to the proxy that the environment names, and hang up.

    Raises:
        Unreached: within `seconds` there was no connection.
    """
    host, port = target_of(address)
    error = failure(lambda: socket.create_connection((host, port), timeout=seconds).close(), seconds)
    if error is not None:
        raise Unreached(f"no connection to {host}: {getattr(error, 'strerror', None) or error}")


def target_of(address: str) -> tuple[str, int]:
    split = urllib.parse.urlsplit(address)
    scheme, host = split.scheme.lower(), split.hostname or ""
    proxy = urllib.request.getproxies().get(scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        split = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        scheme, host = split.scheme.lower(), split.hostname or ""
    return host, split.port or PORTS.get(scheme, 443)


def failure(action: Callable[[], object], seconds: float) -> Exception | None:
    """What `action` raised; a TimeoutError where it takes longer (to look up a name has no limit of its own)."""
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
