"""In front of the paths: token, host, origin, closed headers, counts. Plain ASGI."""

import hashlib
import hmac
import ipaddress
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from regpt.serve.fields import ApiError, shown

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
SEND = "regpt.send"  # key of the server's own `send` in a scope: what follows an answer's start may go there at once
# Need no token: for those who watch the process; the page, which then asks for one.
OPEN = ("/health", "/", "/page.js", "/page.css")
SECURITY = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
]


class Gate:
    """Refuses what no path should see.

    Args:
        token: what `Authorization: Bearer` must hold; empty: no token is needed, and only names of this machine are
            answered, so that no page of the web reaches the server under a name of its own (DNS rebinding).
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: str = ""):
        self.app, self.token = app, token
        self.answered: Counter[tuple[str, int]] = Counter()  # path, status
        self.started = time.time()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(pair for pair in SECURITY if pair[0] not in given)]
                route = scope.get("route")
                self.answered[getattr(route, "path", "other"), message["status"]] += 1
            await send(message)

        try:
            self.check(scope["path"], dict(scope["headers"]), scope["method"])
        except ApiError as error:
            await send_error(error, sending)
            return
        scope[SEND] = send
        await self.app(scope, receive, sending)

    def check(self, path: str, headers: dict[bytes, bytes], method: str) -> None:
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        origin = headers.get(b"origin", b"").decode("latin-1")
        if not self.token and not is_local(host):
            message = f"the host {shown(host)} is not this machine's; use localhost, or start the server with --token"
            raise ApiError(message, status=403, code="wrong_host")
        if origin and origin.partition("://")[2] != headers.get(b"host", b"").decode("latin-1"):
            message = f"pages of {shown(origin)} may not use this server: requests from other origins are closed"
            raise ApiError(message, status=403, code="wrong_origin")
        if self.token and path not in OPEN and not self.is_allowed(headers.get(b"authorization", b"")):
            message = "the API key is missing or wrong; send the server's token as Authorization: Bearer TOKEN"
            raise ApiError(message, status=401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            message = f"the content type is {shown(kind.decode('latin-1'))}, must be application/json"
            raise ApiError(message, status=415, code="unsupported_media_type")

    def is_allowed(self, given: bytes) -> bool:
        """Compare digests: neither length nor content changes the time."""
        scheme, _, key = given.partition(b" ")
        found, wanted = (hashlib.sha256(one).digest() for one in (key.strip(), self.token.encode()))
        return hmac.compare_digest(found, wanted) and scheme.lower() == b"bearer"


def host_name(host: str) -> str:
    """Without its port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def is_local(name: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost" or name.lower().endswith(".localhost")


async def send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
