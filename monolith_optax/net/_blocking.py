"""Asynchronous functions for callers who block."""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_to_end(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs a coroutine to its end, in a thread if an event loop is already running."""

    def run() -> T:
        try:
            # With a factory, the thread's current event loop stays what it is.
            with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
                return runner.run(cancellable())
        finally:
            started.set()

    async def cancellable() -> T:
        task, loop = asyncio.create_task(start()), asyncio.get_running_loop()
        cancels.append(lambda: loop.call_soon_threadsafe(task.cancel))
        started.set()
        return await task

    cancels: list[Callable[[], object]] = []
    started = threading.Event()  # what has not started cannot be cancelled
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        try:
            return thread.submit(run).result()
        except KeyboardInterrupt:
            started.wait()
            for cancel in cancels:
                with contextlib.suppress(RuntimeError):  # it has just ended
                    cancel()
            raise
