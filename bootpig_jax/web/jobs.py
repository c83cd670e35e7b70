"""Work in a thread that tells a page how far it is, and stops when nobody waits for it."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

Event = TypeVar("Event")
Report = Callable[[Event], None]


class Cancelled(Exception):
    """The job was stopped, or nobody waits for its result any more."""


async def stream(
    work: Callable[[Report[Any]], None], stop: asyncio.Event
) -> AsyncGenerator[Any, None]:
    """Runs `work` in a thread and yields what it reports.

    When `stop` is set or the iterator is closed, the next report raises `Cancelled` inside of
    `work`.

    Args:
        work: gets a function to report with, which any thread may call.
        stop: ends the iterator, whatever `work` is doing.

    Raises:
        Cancelled: `stop` was set.
        Exception: what `work` raises.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[None] = loop.create_future()
    events: asyncio.Queue[Any] = asyncio.Queue()
    left = threading.Event()
    last = object()

    def report(event: Any) -> None:
        if left.is_set():
            raise Cancelled
        loop.call_soon_threadsafe(events.put_nowait, event)

    def end(error: Exception | None) -> None:
        if not outcome.done():
            outcome.set_result(None) if error is None else outcome.set_exception(error)
        events.put_nowait(last)

    def run() -> None:
        error = None
        try:
            work(report)
        except Cancelled:
            return
        except Exception as raised:  # raised again below, where it is waited for
            error = raised
        loop.call_soon_threadsafe(end, error)

    # A daemon: the server need not wait for a picture when it stops.
    threading.Thread(target=run, daemon=True).start()
    stopped = asyncio.create_task(stop.wait())
    stopped.add_done_callback(lambda _: events.put_nowait(last))
    try:
        while (event := await events.get()) is not last:
            yield event
        if stop.is_set():
            raise Cancelled
        await outcome
    finally:
        stopped.cancel()
        left.set()
        outcome.cancel()
