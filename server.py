"""Serves the page of app.py on 127.0.0.1, to that page alone, and no file except its own.

Gradio opens whatever a request names as a file. So a guard in front of it lets through only what the page
itself asks for, and only paths that this server has handed out.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from utils import UserError
from visits import MINUTE, MOST_WAITING, UPLOAD, Visits, server_folder

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "[::1]")
LARGEST_UPLOAD, LARGEST_CALL = 100_000_000, 1_000_000  # bytes
TOO_LARGE = "larger than the 100 MB that this page takes"
API = "/gradio_api"
FILE = f"{API}/file="
CALLS = re.compile(f"{API}/(queue/join|run/predict)/?")
HEARTBEAT = re.compile(rf"{API}/heartbeat/(\w{{1,64}})")
# What else the page asks for; Gradio's other routes are closed
PLAIN = re.compile(
    "/|/config|/theme.css|/favicon.ico|/manifest.json|/(assets|static)/.*|"
    f"{API}/(queue/data|cancel|reset|upload|upload_progress|app_id)"
)
JUNK = (  # what parsers of a request's body raise if it is broken or forged
    ClientDisconnect, MultiPartException, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    RecursionError,
)  # fmt: skip
SIGNALS = {getattr(signal, name, signal.SIGTERM) for name in ("SIGINT", "SIGTERM", "SIGHUP")}
BLANK = bytes.fromhex("47494638396101000100800000000000ffffff21f90401000000002c000000000100010000020144003b")


class Guard:
    """Stands in front of Gradio's app and checks who sends a request, for which path, with what content."""

    def __init__(self, app: Callable, visits: Visits, port: int, own: set[str]) -> None:
        self.app, self.visits, self.own = app, visits, own
        self.hosts = [f"{host}:{port}" for host in HOSTS] + (list(HOSTS) if port == 80 else [])

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page has no websocket
            return await send({"type": "websocket.close"})
        request, path = Request(scope, receive), scope["path"]
        if not self.is_of_page(request):
            answer = PlainTextResponse(f"this page answers only at http://{self.hosts[0]}", 403)
        elif path.startswith(FILE + UPLOAD):  # a blank, until the page has the picture from its visit
            answer = Response(BLANK, media_type="image/gif")
        elif found := HEARTBEAT.fullmatch(path):
            answer = await self.stay(found[1], request, send)
        elif CALLS.fullmatch(path):
            answer = await self.call(request, send)
        elif PLAIN.fullmatch(path) or self.is_own(path):
            return await self.app(scope, receive, send)
        else:
            answer = PlainTextResponse("not found", 404)
        if answer is not None:
            await answer(scope, receive, send)

    def is_of_page(self, request: Request) -> bool:
        """Returns whether a request comes from this server's own page, not from another site's."""
        headers = request.headers
        host, origin, site = headers.getlist("host"), headers.getlist("origin"), headers.get("sec-fetch-site")
        if len(host) != 1 or host[0].lower() not in self.hosts:
            return False  # foreign names that resolve to this machine, too
        if origin and origin != [f"http://{host[0].lower()}"]:
            return False
        is_followed = request.scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"  # a link
        return site in (None, "none", "same-origin") or is_followed

    def is_own(self, path: str) -> bool:
        """Returns whether a path is exactly that of a file of some visit, or of one bundled with the page."""
        name = path.removeprefix(FILE)
        return name != path and (name in self.own or self.visits.has(name))

    async def stay(self, session: str, request: Request, send: Callable) -> Response | None:
        """Keeps a visit alive as long as its page keeps this connection open."""
        try:
            visit = self.visits.open(session)
        except UserError as error:
            return PlainTextResponse(str(error), 503)
        try:
            await self.app(request.scope, request.receive, send)
        finally:  # whatever ended it
            asyncio.get_running_loop().run_in_executor(None, self.visits.close, visit)

    async def call(self, request: Request, send: Callable) -> Response | None:
        """Passes an event on to Gradio, without anything that Gradio would take for a file."""
        try:
            body = b"".join([part async for part in limited(request, LARGEST_CALL)])
            asked = json.loads(body)
            event, data = asked.get("event_data"), asked["data"]
            kept = {key: asked.get(key) for key in ("fn_index", "trigger_id", "session_hash")}
            kept["data"] = [reduced(item) for item in data]
            kept["event_data"] = {"index": reduced(event.get("index")), "value": None} if event else None
        except JUNK:
            return PlainTextResponse("not a call from the page", 400)
        waiting = [{"type": "http.request", "body": json.dumps(kept).encode()}]

        async def receive() -> dict:
            return waiting.pop() if waiting else await request.receive()

        await self.app(request.scope, receive, send)


def reduced(value: Any) -> Any:
    """Keeps numbers, texts and lists of them; reduces a dict, such as an upload, to its path."""
    if isinstance(value, dict):
        return {"path": value["path"]} if isinstance(value.get("path"), str) else None
    return [one for one in value if not isinstance(one, dict | list)] if isinstance(value, list) else value


async def limited(request: Request, most: int, see: Callable = len) -> AsyncIterator[bytes]:
    """Yields a request's body in parts, each shown to `see`. Raises MultiPartException over `most` bytes."""
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise MultiPartException(TOO_LARGE)
        see(part)
        yield part


def upload_into(visits: Visits) -> Callable:
    """Makes the handler of uploads: one file each, stored in no folder until a visit takes it."""
    from gradio.routes import file_upload_statuses

    arriving: list[str] = []

    async def upload(request: Request) -> Response:
        if len(arriving) + len(visits.waiting) >= MOST_WAITING:
            return PlainTextResponse("too many uploads at once: try again in two minutes", 503)
        progress = request.query_params.get("upload_id", "")
        arriving.append(progress)
        file_upload_statuses.track(progress)  # the page asks for it
        try:
            see = functools.partial(file_upload_statuses.append, progress, "")
            parts = limited(request, LARGEST_UPLOAD, see)
            form = await MultiPartParser(request.headers, parts, max_files=1, max_fields=0).parse()
            file = form["files"]
            return JSONResponse([visits.wait(safe_name(file.filename), file.file)])
        except MultiPartException as error:
            return PlainTextResponse(error.message, 413 if error.message == TOO_LARGE else 400)
        except JUNK:
            return PlainTextResponse("not an upload", 400)
        finally:
            arriving.remove(progress)
            file_upload_statuses.set_done(progress)

    return upload


def safe_name(given: str) -> str:
    """Turns a browser's name for a file into a safe one, unchanged where possible."""
    name = "".join(letter for letter in re.split(r"[/\\]", given)[-1] if letter.isprintable()).strip(" .")
    stem, suffix = Path(name or "portrait").stem, Path(name).suffix
    return stem.encode()[:200].decode(errors="ignore") + suffix.encode()[:20].decode(errors="ignore")


def serve(build: Callable[[Visits], tuple[Any, dict[str, Any]]], port: int, own: set[str]) -> None:
    """Serves a page until a signal ends the process. Raises UserError.

    build: makes the gradio.Blocks and its theme and CSS; own: files that come with the page.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, stop)
    try:
        with server_folder() as folder, socket.socket() as listener:
            visits = Visits(folder)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((ADDRESS, port))
                listener.listen()
            except OSError:
                raise UserError(f"--port {port} is taken, or needs more rights; choose another") from None
            os.environ |= {"GRADIO_TEMP_DIR": str(folder), "GRADIO_ANALYTICS_ENABLED": "False"}
            page, look = build(visits)  # imports Gradio, which now sees where it may write
            app = guarded(page, visits, port, own, **look)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
            thread = threading.Thread(target=server.run, args=[[listener]], daemon=True)
            thread.start()
            print(f"http://{ADDRESS}:{port} (Ctrl-C stops it and deletes all pictures)", flush=True)
            try:
                while thread.is_alive():
                    thread.join(MINUTE)
                    visits.sweep()
            finally:
                visits.end()
        raise UserError("the server has stopped")
    except SystemExit as stopped:
        print("stopped", file=sys.stderr, flush=True)
        os._exit(stopped.code)  # a normal exit would wait for a job's threads, or abort in them


def stop(number: int, _: Any) -> None:
    """Ends the server at the first signal; a closed terminal sends several."""
    for one in SIGNALS:
        signal.signal(one, signal.SIG_IGN)
    sys.exit(128 + number)


def guarded(page: Any, visits: Visits, port: int, own: set[str], **look: Any) -> Guard:
    """Puts a page behind the guard -> an ASGI app."""
    import gradio

    app = Starlette(routes=[Route(f"{API}/upload", upload_into(visits), methods=["POST"])])
    page.has_launched = page.is_running = True  # so that Gradio also checks what handlers return
    gradio.mount_gradio_app(
        app, page, "/", show_error=False, ssr_mode=False, footer_links=[], run_history=False,
        max_file_size=LARGEST_UPLOAD, **look,
    )  # fmt: skip
    return Guard(app, visits, port, own)
