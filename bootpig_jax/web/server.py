"""What both pages share: how they look, who may send them what, and how they are served.

A page takes pictures by upload only. Gradio would also fetch a file whose path is a web address,
from anywhere its server can reach, so such requests are refused before Gradio sees them; so are
requests that are larger than a page ever sends. Uploaded files lie in a folder of the server's own,
which is deleted when it stops.
"""

import argparse
import contextlib
import json
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bootpig_jax.errors import UserError

MAX_FILE = 20 * 2**20  # bytes of one uploaded file
MAX_UPLOAD = 100 * 2**20  # bytes of all files in one upload
MAX_JSON = 2**20  # bytes of any other request
MAX_QUEUE = 20  # jobs that wait; more are refused
# Every so many seconds, uploads that are so many seconds old are deleted.
DELETE_UPLOADS = (600, 6 * 3600)

THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    # Fonts that are on the reader's machine: nothing is loaded from elsewhere.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
)


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError`."""
        raise UserError(f"{message}; see --help")


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Adds the options that say where a page is served."""
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 serves other machines too; there is no log-in"
    )
    parser.add_argument("--port", type=int, default=port, help="default: %(default)s")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for what is uploaded and drawn, deleted at the end; make the page inside of it."""
    with tempfile.TemporaryDirectory(prefix="bootpig-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def serve(page: gr.Blocks, host: str, port: int, css: str) -> None:
    """Serves a page until Ctrl-C or a request to terminate; prints its address when it is up.

    Raises:
        UserError: the address can't be had.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    page.queue(max_size=MAX_QUEUE, default_concurrency_limit=1, api_open=False)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            theme=THEME,
            css=css,
            max_file_size=MAX_FILE,
            app_kwargs={"middleware": [Middleware(UploadsOnly)]},
            allowed_paths=[],
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"--port: {host}:{port} can't be used ({error}); name another") from None
    try:
        print(f"open {url} (Ctrl-C stops)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


class UploadsOnly:
    """Refuses requests that name a file by a web address, and those that are too large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 403, 400 or 413, or hands the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        upload = headers.get("content-type", "").startswith("multipart/form-data")
        limit = MAX_UPLOAD if upload else MAX_JSON
        refusal = None
        if "/file=http" in scope["path"].lower() or "/proxy=" in scope["path"]:
            refusal = PlainTextResponse("only files of this server are served", 403)
        elif int(headers.get("content-length", 0)) > limit:
            refusal = PlainTextResponse(f"more than {limit // 2**20} MB", 413)
        elif upload:
            # Gradio counts the bytes of each file itself.
            receive = _limited(receive, limit)
        elif scope["method"] == "POST":
            body = await _read(receive, limit)
            if body is None:
                refusal = PlainTextResponse(f"more than {limit // 2**20} MB", 413)
            elif names_address(body):
                refusal = PlainTextResponse("files are taken by upload, not by address", 400)
            else:
                receive = _replay(body, receive)
        await (refusal or self.app)(scope, receive, send)


def names_address(body: bytes) -> bool:
    """Whether a JSON text holds a file, `{"path": ...}`, whose path is a web address."""
    try:
        waiting: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return False  # Gradio refuses it
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and "://" in path:
                return True
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False


async def _read(receive: Receive, limit: int) -> bytes | None:
    """A request's body; `None` if it is longer than `limit`."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > limit:
            return None
        if not message.get("more_body", False):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that starts with a body that was read before."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


def _limited(receive: Receive, limit: int) -> Receive:
    """A `receive` that ends the request when it becomes longer than `limit`."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        return message if seen <= limit else {"type": "http.disconnect"}

    return counted
