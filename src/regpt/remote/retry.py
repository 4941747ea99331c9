"""Another try: which errors of a network may pass, how long to wait, and one sentence where it was of no use."""

import email.utils
import errno
import http.client
import sys
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from regpt.console.lines import is_terminal, print_note
from regpt.errors import UserError
from regpt.remote.network import WAYS_OUT

BUSY = (408, 425, 429)  # besides 5xx: the statuses that RFC 9110, 8470 and 6585 say may be tried again
LONGEST_RETRY_AFTER_S = 3600
LISTING_TRIES = 3
# Errors of libraries that are neither OSError nor ours; looked up only when the library is loaded.
LIBRARY_ERRORS = (
    ("httpx", "HTTPError"),  # of huggingface_hub 1
    ("httpx2", "HTTPError"),  # of huggingface_hub 2
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
# No use in trying these again, by the names of their classes: most are of libraries that may be absent.
LASTING = {"FileNotFoundError", "PermissionError", "IsADirectoryError", "NotADirectoryError"}
LASTING |= {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
LASTING |= {"SSLCertVerificationError", "OfflineModeIsEnabled", "UnsupportedProtocol", "InvalidURL"}

# Nobody has answered: no network, no such host, nobody listens there.
UNREACHED = {"Unreached", "gaierror", "ConnectError", "ConnectTimeout", "ProxyError", "ClientConnectorError"}
UNREACHED |= {"EndpointConnectionError", "ConnectTimeoutError", "ProxyConnectionError"}
NO_ROUTE = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a download is tried: `tries` in a row that bring no byte, waits doubling from `wait_s`; `unreached` of
    them where no server has been reached yet."""

    tries: int = 8
    wait_s: float = 1.0
    longest_wait_s: float = 60.0
    timeout_s: float = 30.0
    unreached: int = 2
    sleep: Callable[[float], None] = time.sleep

    def steady(self) -> "Patience":
        """With a server that was reached before: the network is away, and may return."""
        return replace(self, unreached=self.tries)

    def of_listing(self) -> "Patience":
        """For a first question: nobody waits minutes to hear that there is no network."""
        return replace(self, tries=min(LISTING_TRIES, self.tries))

    def wait(self, tries: int) -> float:
        """Seconds to wait after so many tries in a row."""
        return min(self.longest_wait_s, self.wait_s * 2 ** min(max(0, tries - 1), 20))


PATIENCE = Patience()


class NotTransferred(UserError):
    """Something elsewhere could not be read or written."""


class Problem(NamedTuple):
    text: str
    lasts: bool
    retry_after_s: float = 0.0
    unreached: bool = False


def persistently(
    attempt: Callable[[], T],
    name: str,
    patience: Patience,
    gained: Callable[[], int] = lambda: 0,
    waiting: Callable[[str], None] | None = None,
    done: str = "read",
) -> T:
    """The result of `attempt`, tried again while its error may pass; a try that gained bytes starts the count anew.

    Raises:
        NotTransferred: `name` could not be `done`.
    """
    tries, before, reached = 0, gained(), False
    while True:
        try:
            return attempt()
        except transport_errors() as error:
            problem = problem_of(error)
        tries = 0 if gained() > before else tries + 1
        reached = reached or not problem.unreached or not tries
        before = gained()
        if not reached and tries >= min(patience.unreached, patience.tries):
            raise NotTransferred(f"{name} could not be {done}: {problem.text}; {WAYS_OUT}")
        if problem.lasts or tries >= patience.tries:
            again = "" if problem.lasts else f", {tries} times; the same command continues where this one stopped"
            raise NotTransferred(f"{name} could not be {done}: {problem.text}{again}")
        wait_s = max(problem.retry_after_s, patience.wait(tries))
        if waiting is None or not is_terminal(sys.stderr):
            print_note(f"{name}: {problem.text}; trying again in {wait_s:.0f} s")
        pause(wait_s, problem.text, patience, waiting or (lambda note: None))


def pause(wait_s: float, why: str, patience: Patience, waiting: Callable[[str], None]) -> None:
    """In steps of a second, so that whoever watches can stop it."""
    while wait_s > 0:
        waiting(f"trying again in {wait_s:.0f} s: {why}")
        patience.sleep(min(1.0, wait_s))
        wait_s -= 1.0


def transport_errors() -> tuple[type[BaseException], ...]:
    loaded = ((sys.modules.get(module), name) for module, name in LIBRARY_ERRORS)
    libraries = tuple(getattr(module, name) for module, name in loaded if module)
    return (OSError, http.client.HTTPException, *libraries)


def problem_of(error: BaseException) -> Problem:
    """What an error of ours, of the operating system, of HTTP or of a library means for another try."""
    if isinstance(error, UserError):
        return Problem(str(error), lasts=True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = "the disk of the download folder is full; free space and run the same command again: it continues"
        return Problem(full, lasts=True)
    if status := status_of(error):
        return Problem(said(status), not (status in BUSY or status >= 500), retry_after_s(error))
    cause = getattr(error, "reason", error)  # of a urllib.error.URLError
    cause = cause if isinstance(cause, BaseException) else error
    kinds = {kind.__name__ for kind in type(cause).__mro__}
    unreached = bool(UNREACHED & kinds) or getattr(cause, "errno", None) in NO_ROUTE
    lasts = bool(LASTING & kinds)
    text = " ".join(str(cause).split()) or type(cause).__name__
    if text.startswith("Forbidden") or type(cause).__name__ == "NoCredentialsError":  # gcsfs, s3fs; botocore
        return Problem(f"{text[:200]}; log in, or ask for access", lasts=True)
    return Problem(
        f"there is no such file ({text})" if isinstance(cause, FileNotFoundError) else text, lasts, 0.0, unreached
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of urllib, huggingface_hub, gcsfs or botocore."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = str(getattr(response, "status_code", getattr(error, "code", None)))
    return int(status) if status.isdigit() else None


def said(status: int) -> str:
    reason = http.client.responses.get(status, "unknown status")
    hint = {
        401: "; it needs a token: log in, or ask for access",
        403: "; it needs a token: log in, or ask for access",
        404: "; check the name, or log in if it is private",
    }
    return f"the server answered {status} {reason}{hint.get(status, '')}"


def retry_after_s(error: BaseException) -> float:
    """Seconds that the header Retry-After asks for, as a number or a date (RFC 9110, 10.2.3)."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After") or ""
    if value.isdigit():
        return float(min(int(value), LONGEST_RETRY_AFTER_S))
    try:
        wait_s = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):
        return 0.0
    return max(0.0, min(wait_s, LONGEST_RETRY_AFTER_S))
