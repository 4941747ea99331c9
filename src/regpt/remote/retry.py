"""Retries: which errors of a network may pass, how long to wait, and one sentence when they do not."""

import errno
import http.client
import sys
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from regpt.console.lines import is_terminal, print_note
from regpt.errors import UserError

BUSY = (408, 425, 429)  # besides 5xx: the statuses that RFC 9110, 8470 and 6585 say may be tried again
LONGEST_RETRY_AFTER_S = 3600
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
LOG_IN = "it needs a token: log in, or ask for access"
HINTS = {401: f"; {LOG_IN}", 403: f"; {LOG_IN}", 404: "; check the name, or log in if it is private"}

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """`tries` in a row that bring no byte, waits doubling from `wait_s`."""

    tries: int = 8
    wait_s: float = 1.0
    longest_wait_s: float = 60.0
    timeout_s: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def wait(self, tries: int) -> float:
        """Seconds to wait after so many tries in a row."""
        return min(self.longest_wait_s, self.wait_s * 2 ** min(max(0, tries - 1), 20))


PATIENCE = Patience()


class NotTransferred(UserError):
    """Something elsewhere could not be read or written; `why` is the last error."""

    def __init__(self, sentence: str, why: str) -> None:
        super().__init__(sentence)
        self.why = why


class Problem(NamedTuple):
    text: str
    lasts: bool
    retry_after_s: float = 0.0


def persistently(
    attempt: Callable[[], T],
    name: str,
    patience: Patience,
    gained: Callable[[], int] = lambda: 0,
    waiting: Callable[[str], None] | None = None,
    done: str = "read",
) -> T:
    """The result of `attempt`, tried again while its error may pass; a try that gained bytes starts the count anew.

    Args:
        waiting: receives the reason of a wait each second, and may raise to end it.

    Raises:
        NotTransferred: `name` could not be `done`.
    """
    tries, before = 0, gained()
    while True:
        try:
            return attempt()
        except transport_errors() as error:
            problem = problem_of(error)
        tries = 0 if gained() > before else tries + 1
        before = gained()
        if problem.lasts or tries >= patience.tries:
            again = "" if problem.lasts else f", {tries} times; the same command continues where this one stopped"
            raise NotTransferred(f"{name} could not be {done}: {problem.text}{again}", problem.text)
        wait_s = max(problem.retry_after_s, patience.wait(tries))
        if waiting is None or not is_terminal(sys.stderr):
            print_note(f"{name}: {problem.text}; trying again in {wait_s:.0f} s")
        while wait_s > 0:
            if waiting is not None:
                waiting(f"trying again in {wait_s:.0f} s: {problem.text}")
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
        reason = http.client.responses.get(status, "unknown status")
        text = f"the server answered {status} {reason}{HINTS.get(status, '')}"
        return Problem(text, not (status in BUSY or status >= 500), retry_after_s(error))
    cause = getattr(error, "reason", error)  # of a urllib.error.URLError
    cause = cause if isinstance(cause, BaseException) else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    if text.startswith("Forbidden") or type(cause).__name__ == "NoCredentialsError":  # gcsfs, s3fs; botocore
        return Problem(f"{text[:200]}; log in, or ask for access", lasts=True)
    text = f"there is no such file ({text})" if isinstance(cause, FileNotFoundError) else text
    return Problem(text, bool(LASTING & {kind.__name__ for kind in type(cause).__mro__}))


def status_of(error: BaseException) -> int | None:
    """The HTTP status in an error of urllib, huggingface_hub, gcsfs or botocore."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    status = str(getattr(response, "status_code", getattr(error, "code", None)))
    return int(status) if status.isdigit() else None


def retry_after_s(error: BaseException) -> float:
    """Seconds that the header Retry-After asks for (RFC 9110, 10.2.3); 0 for a date."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("Retry-After") or ""
    return float(min(int(value), LONGEST_RETRY_AFTER_S)) if value.isdigit() else 0.0
