"""A page's server in a process of its own, and the browser that its pages are tried in."""

import contextlib
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 240  # seconds until a test gives up on what never comes


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: where it is, without a slash at the end.
        process: it.
        lines: what it has printed and nobody has read yet.
    """

    url: str
    process: subprocess.Popen[str]
    lines: "queue.Queue[str | None]"

    def wait_for(self, beginning: str, patience: float = PATIENCE) -> str:
        """The next line that begins so; `queue.Empty` if there is none."""
        while (line := self.lines.get(timeout=patience)) is not None:
            if line.startswith(beginning):
                return line.strip()
        raise AssertionError(f"the server ended before it printed {beginning!r}")

    def stop(self) -> str:
        """Ends the server as a service manager does; what it still printed."""
        self.process.terminate()
        assert self.process.wait(timeout=PATIENCE) == 0
        return "".join(iter(self.lines.get, None))  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(*command: str) -> Iterator[Server]:
    """Runs `python -m COMMAND PORT` until its page is up; kills it at the end."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", *command, str(port)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    server = Server(f"http://127.0.0.1:{port}", process, lines)
    try:
        server.wait_for("open http")
        yield server
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def browser_page(url: str) -> Iterator[tuple[Page, list[str]]]:
    """A page in headless Chromium, and the addresses that it has asked for."""
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} is missing: on Debian, apt-get install chromium")
    with sync_playwright() as playwright:
        # As root and in most containers Chromium has no sandbox. By itself it asks for nothing.
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM),
            args=[
                *("--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync", "--no-first-run"),
            ],
        )
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE * 1000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield page, asked
        browser.close()
