"""The server of the page: Gradio behind the gate, and the copies of clips."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from maple_trl.data.review.desk import ReviewDesk
from maple_trl.data.review.gate import COOKIE, LEAST_TOKEN, Gate, cookie_value, same
from maple_trl.data.review.rows import ReviewError
from maple_trl.data.review.scratch import review_cache, scratch_folder
from maple_trl.data.review.shelf import ClipShelf
from maple_trl.modalities import ModalityTag
from maple_trl.omni.errors import MediaError


LOCAL = ("127.0.0.1", "localhost", "::1")
_WRONG_TOKEN_SECONDS = 1.0


def serve(
    desk: ReviewDesk,
    media_root: str | os.PathLike[str],
    reviewer: str,
    host: str = "127.0.0.1",
    port: int = 7861,
    token: str | None = None,
    most_bytes: int = 1 << 30,
    ready: Callable[[str], None] = print,
) -> None:
    """
    Serve the page until the process is interrupted or told to end.

    Args:
        host: address that is listened on. One that other machines reach needs a token.
        port: 0 for any that is free.
        token: without which nothing is shown.
        most_bytes: what copies of clips may take on the disk.
        ready: is called with the page's address, once it is served.

    Raises:
        ReviewError: when the port is taken, or `token` is missing or short.
        FileNotFoundError: if `media_root` is no folder.
    """
    if token is None and host not in LOCAL:
        raise ReviewError(
            f"--host {host} is reached from other machines: give --token_file FILE, or leave the option out"
        )
    if token is not None and len(token) < LEAST_TOKEN:
        raise ReviewError(f"a token has {LEAST_TOKEN} characters or more")
    with scratch_folder(review_cache()) as folder, _listening(host, port) as sock:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "gradio")}
        app = make_app(desk, ClipShelf(media_root, folder / "clips", most_bytes), reviewer, host, token)
        from gradio import http_server

        class Server(http_server.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                if self.started:
                    name = f"[{host}]" if ":" in host else host
                    ready(f"http://{name}:{sock.getsockname()[1]}/")

        # Addresses of requests are not written down, nor anything else but faults.
        config = http_server.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        with _ended_by_signals():
            Server(config).run(sockets=[sock])


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End quietly when told to: uvicorn sends itself the signal again once it has closed, and files are still there."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if main else None
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise ReviewError(
            f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 takes a free one"
        ) from error
    sock.listen(128)
    return sock


def make_app(
    desk: ReviewDesk, shelf: ClipShelf, reviewer: str, host: str = "127.0.0.1", token: str | None = None
) -> Any:
    """Return the whole application, for a server of ASGI applications."""
    import gradio as gr
    from fastapi import FastAPI, Request
    from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse

    from maple_trl.data.review.page import ReviewPage, page_assets
    from maple_trl.data.review.view import render

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    def media(request: Request) -> Any:
        number, tag, kind = (request.path_params[name] for name in ("number", "tag", "kind"))
        try:
            if number >= len(desk.data) or ModalityTag.parse(tag) != tag:
                return PlainTextResponse("there is no such row or tag", 404)
            row = desk.data.row(number)
            is_picture = kind.startswith("image")
            path: Path = shelf.image(row, int(kind.removeprefix("image") or 0)) if is_picture else shelf.clip(row, tag)
        except (MediaError, ValueError) as error:
            return PlainTextResponse(str(error), 404)
        kinds = {".jpg": "image/jpeg", ".mp4": "video/mp4" if "V" in tag else "audio/mp4"}
        return FileResponse(path, media_type=kinds[path.suffix], headers={"cache-control": "no-store"})

    async def login(request: Request) -> Any:
        if token is None:
            return RedirectResponse("/", 303)
        if request.method != "POST":
            return HTMLResponse(render("login.html.j2", wrong=False))
        sent = parse_qs((await request.body()).decode("utf-8", "replace")).get("token", [""])[0]
        if not same(sent.strip(), token):
            await asyncio.sleep(_WRONG_TOKEN_SECONDS)
            return HTMLResponse(render("login.html.j2", wrong=True), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(COOKIE, cookie_value(token), httponly=True, samesite="strict", max_age=30 * 86_400)
        return answer

    app.add_route("/media/{number:int}/{tag}/{kind}", media, methods=["GET"])
    app.add_route("/login", login, methods=["GET", "POST"])
    blocks = ReviewPage(desk, shelf, reviewer).blocks()
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=["/"],
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        **page_assets(),
    )
    hosts = ["*"] if host in ("0.0.0.0", "::") else [host.lower(), f"[{host.lower()}]"]
    return Gate(app, hosts, token)
