"""Files at http and https addresses: their size and hash, and a stream from any offset."""

import base64
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

from regpt.remote.download import Checksum, RemoteFile, RemoteOptions
from regpt.remote.network import divided, reach
from regpt.remote.retry import persistently


def shown_address(address: str) -> str:
    """`address` without what may be secret: user and password, the query of a signed address."""
    split = urllib.parse.urlsplit(address)
    host = split.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((split.scheme, host, split.path, "", ""))


def web_file(given: str, options: RemoteOptions) -> RemoteFile:
    """The file at an address, whose `#sha256=…` counts as its published hash.

    Raises:
        UserError: it is not there, or the server cannot be reached.
    """
    address, fragment = urllib.parse.urldefrag(given)
    url, timeout_s = shown_address(address), options.patience.timeout_s
    size, version, checksum = persistently(lambda: probe(address, timeout_s), url, options.patience.of_listing())
    if fragment.startswith("sha256="):
        checksum = Checksum("sha256", fragment.removeprefix("sha256=").lower())
    return RemoteFile(url, size, url, address, open_http, options, checksum, version)


def probe(address: str, timeout_s: float) -> tuple[int, str, Checksum | None]:
    """Size (0 when the server does not say), version and published hash; asks for one byte: HEAD is often refused."""
    reach(address)
    with request(address, "bytes=0-0", None, timeout_s) as response:
        length = response.headers.get("Content-Length") if response.status == 200 else None
        total = (response.headers.get("Content-Range") or "").rpartition("/")[2] or length or ""
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        digest = re.search(r"sha-256=:([A-Za-z0-9+/=]+):", response.headers.get("Repr-Digest") or "")  # RFC 9530
    checksum = Checksum("sha256", base64.b64decode(digest[1]).hex()) if digest else None
    return int(total) if total.isdigit() else 0, version, checksum


class SameHost(urllib.request.HTTPRedirectHandler):
    """Redirects that keep the token on the same host and drop it elsewhere: storage must not see it."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        secret = req.unredirected_hdrs.get("Authorization")
        if new and secret and (new.type, new.host) == (req.type, req.host):
            new.add_unredirected_header("Authorization", secret)
        return new


def request(address: str, wanted: str | None, secret: str | None, timeout_s: float) -> HTTPResponse:
    address, user = divided(address)
    secret = secret or user
    asked = urllib.request.Request(address, headers={"User-Agent": "regpt", "Accept-Encoding": "identity"})
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
