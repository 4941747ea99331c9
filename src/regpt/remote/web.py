"""Files at http and https addresses: their size, and a stream from any offset."""

import base64
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

from regpt.remote.download import RemoteFile, RemoteOptions
from regpt.remote.network import reach
from regpt.remote.retry import persistently


def shown_address(address: str) -> str:
    """`address` without what may be secret: user and password, the query of a signed address."""
    split = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit(split._replace(netloc=split.netloc.rpartition("@")[2], query="", fragment=""))


def web_file(given: str, options: RemoteOptions) -> RemoteFile:
    """The file at an address, whose `#sha256=…` counts as its published hash.

    Raises:
        UserError: it is not there, or the server cannot be reached.
    """
    address, fragment = urllib.parse.urldefrag(given)
    url, timeout_s = shown_address(address), options.patience.timeout_s
    reach(address)
    size, version = persistently(lambda: probe(address, timeout_s), url, options.patience)
    kind, _, digest = fragment.partition("=")
    sha256 = digest.lower() if kind == "sha256" else ""
    return RemoteFile(url, size, url, address, open_http, options, sha256, version)


def probe(address: str, timeout_s: float) -> tuple[int, str]:
    """Size (0 when the server does not state it) and version; asks for one byte: HEAD is often refused."""
    with request(address, "bytes=0-0", None, timeout_s) as response:
        length = response.headers.get("Content-Length") if response.status == 200 else None
        total = (response.headers.get("Content-Range") or "").rpartition("/")[2] or length or ""
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return int(total) if total.isdigit() else 0, version


class SameHost(urllib.request.HTTPRedirectHandler):
    """Redirects that keep the token on the same host and drop it elsewhere: storage must not see it."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        secret = req.unredirected_hdrs.get("Authorization")
        if new and secret and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", secret)
        return new


def request(address: str, wanted: str | None, secret: str | None, timeout_s: float) -> HTTPResponse:
    split = urllib.parse.urlsplit(address)
    user, at, host = split.netloc.rpartition("@")
    if at:  # user and password as the header Authorization (RFC 7617)
        credentials = urllib.parse.unquote(user if ":" in user else f"{user}:").encode()
        secret = secret or "Basic " + base64.b64encode(credentials).decode()
    headers = {"User-Agent": "regpt", "Accept-Encoding": "identity"}
    asked = urllib.request.Request(urllib.parse.urlunsplit(split._replace(netloc=host)), headers=headers)
    if wanted:
        asked.add_header("Range", wanted)
    if secret:
        asked.add_unredirected_header("Authorization", secret)
    return urllib.request.build_opener(SameHost).open(asked, timeout=timeout_s)


@contextmanager
def open_http(
    address: str, offset: int, timeout_s: float, secret: str | None = None
) -> Iterator[tuple[HTTPResponse, int]]:
    """The body from `offset` on, or from 0 where the server ignores Range."""
    if not offset:
        reach(address)
    with request(address, f"bytes={offset}-" if offset else None, secret, timeout_s) as response:
        if response.status == 206 and f"bytes {offset}-" not in response.headers.get("Content-Range", ""):
            raise ConnectionError(f"the server sent {response.headers.get('Content-Range')} instead of bytes {offset}-")
        yield response, offset if response.status == 206 else 0
