"""Who may ask what of the page: everything that is not named here is refused before Gradio sees it."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import urlsplit


COOKIE = "maple_review"
LEAST_TOKEN = 12  # characters
MOST_BODY = 1 << 20

_LOCAL = ("127.0.0.1", "localhost", "[::1]")
# What the page asks for. Not among them: Gradio's files, uploads, proxy, streams and its routes for programs.
_ROUTES = (
    ("GET", r"/"),
    ("GET", r"/config/?"),
    ("GET", r"/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt"),
    ("GET", r"/(?:assets|static)/[\w./@+~\-]+"),
    ("POST", r"/gradio_api/run/predict/?"),
    ("GET", r"/gradio_api/app_id/?"),  # until a server answers again, where one has been ended
    ("GET", r"/media/\d{1,9}/[VAS]{1,3}/(?:clip|image\d{0,3})"),
    ("GET", r"/login"),
    ("POST", r"/login"),
)
_OPEN = ("/login", "/favicon.ico", "/robots.txt")  # without the token

# Gradio's page has scripts and styles in it, and compiles templates. Nothing is loaded from elsewhere.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' blob: data:; frame-ancestors 'none'; form-action 'self'; "
    "base-uri 'self'; object-src 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),  # with none at all, a browser does not say where a form was filled in
    (b"cross-origin-resource-policy", b"same-origin"),
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def cookie_value(token: str) -> str:
    """Return what a browser that knows the token is given: nothing from which the token could be read."""
    return hmac.new(token.encode(), b"maple-trl data review", sha256).hexdigest()


def same(one: str, other: str) -> bool:
    """Compare two secrets in a time that does not depend on where they differ."""
    return hmac.compare_digest(one.encode(), other.encode())


class Gate:
    """
    Lets through what the page itself asks for, from those who may.

    Args:
        app: what is behind it, an ASGI application.
        hosts: names under which the page is asked for, besides those of this machine; `"*"` for any. Another name means
            that a site of elsewhere has made its name lead here.
        token: without which nothing is shown; `None` for none.
    """

    def __init__(self, app: Any, hosts: Iterable[str] = (), token: str | None = None):
        self.app = app
        self.hosts = {*_LOCAL, *hosts}
        self._cookie = None if token is None else cookie_value(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            refusal = self._refusal(scope, headers)
            if refusal is None and scope["method"] == "POST" and scope["path"].startswith("/gradio_api/"):
                body = await _body(receive)
                receive = _once(body, receive)
                refusal = None if _is_plain(body) else (400, "not what the page sends", None)
            if refusal is None:
                await self.app(scope, receive, _with_headers(send))
            else:
                await _answer(send, *refusal)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str | None] | None:
        """Return status, text and where to go instead; `None` for what may pass."""
        method, path = scope["method"], scope["path"]
        if "*" not in self.hosts and _host(headers.get("host", "")) not in self.hosts:
            return 403, "this page is not known under that name", None
        if not _known(method, path, scope.get("raw_path") or path.encode()):
            return 404, "there is nothing here", None
        if not _from_here(method, headers):
            return 403, "only the page itself may ask for this", None
        length = headers.get("content-length", "0")
        if method == "POST" and (not length.isdecimal() or int(length) > MOST_BODY or "transfer-encoding" in headers):
            return 413, "too large", None
        if self._cookie is None or path in _OPEN or same(_cookie(headers), self._cookie):
            return None
        return (303, "log in", "/login") if path == "/" else (401, "log in first", None)


def _known(method: str, path: str, raw: bytes) -> bool:
    """Return whether the page asks for such a thing; a path that could lead elsewhere is never looked up."""
    if ".." in path or "\\" in path or "//" in path or b"%" in raw:
        return False
    method = "GET" if method == "HEAD" else method
    return any(method == known and re.fullmatch(pattern, path) for known, pattern in _ROUTES)


async def _body(receive: Receive) -> bytes:
    """Read what is sent, whose size the server holds to what its header says."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return b"".join(parts)


def _once(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that has been read, and then what else comes."""
    waiting = [body]

    async def received() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return received


def _is_plain(body: bytes) -> bool:
    """Return whether nothing but texts and numbers is sent: Gradio would copy a file that an object there names."""
    try:
        sent = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return False
    if not isinstance(sent, dict):
        return False
    values = sent.pop("data", [])
    return isinstance(values, list) and not any(isinstance(item, dict | list) for item in [*values, *sent.values()])


def _host(value: str) -> str:
    name = value.rpartition(":")[0] if re.search(r":\d+$", value) else value
    return name.lower()


def _from_here(method: str, headers: dict[str, str]) -> bool:
    """Return whether the request does not come from another site that is open in the same browser."""
    site = headers.get("sec-fetch-site", "none")
    if site not in ("same-origin", "none") and not (method == "GET" and headers.get("sec-fetch-mode") == "navigate"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _cookie(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _with_headers(send: Send) -> Send:
    async def sent(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in _HEADERS}
            kept = [pair for pair in message.get("headers", ()) if pair[0].lower() not in ours]
            message = {**message, "headers": [*kept, *_HEADERS]}
        await send(message)

    return sent


async def _answer(send: Send, status: int, text: str, place: str | None) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store"), *_HEADERS]
    if place is not None:
        headers.append((b"location", place.encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
