"""What the command lines share: how they end, and what a terminal can show."""

import asyncio
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, NoReturn, TextIO

# argparse exits with 2 for bad usage.
FAILED, INTERRUPTED, TERMINATED = 3, 130, 143
_STATUSES: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}

_running: list[Callable[[], object]] = []  # cancels the asynchronous command, if any
_received: list[int] = []  # the signal that cancelled it


def program(main: Callable[[], int]) -> NoReturn:
    """Runs a command line as a program."""
    for number in _STATUSES:
        # Process 1 of a container ignores every signal that it has no handler for.
        # A shell may have started us with a signal ignored, and it stays ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    if sys.stdout is not None:  # it is None if it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = main()
    finally:
        for number in _STATUSES:  # it ends anyway, with its own status
            signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def run(command: Coroutine[Any, Any, int]) -> int:
    """Runs an asynchronous command, and returns its exit status.

    A signal cancels it, so that it closes what it has opened. Raised between any two
    instructions, KeyboardInterrupt would leave some of it open.
    """

    async def cancellable() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        _running.append(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            return await command
        finally:
            _running.clear()

    try:
        return asyncio.run(cancellable())
    except asyncio.CancelledError:
        return _STATUSES[_received.pop()]


def status_of(
    name: str,
    command: Callable[[], int],
    *,
    failures: tuple[type[Exception], ...] = (OSError,),
) -> int:
    """The exit status of a command, whose failures are printed.

    Args:
      name: the name of the program.
      command: returns the status.
      failures: what a command may raise. Anything else is a bug, whose traceback is
        printed.
    """
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except failures as error:
        if not isinstance(error, BrokenPipeError):  # the reader of the output is gone
            print(f"{name}: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            _discard_output()
        return FAILED
    except Exception:
        # Python's own status for this, 1, may mean something else.
        traceback.print_exc()
        return FAILED
    return status


def _end(number: int, _: FrameType | None) -> None:
    """Ends the program in order: what is open is closed first."""
    for each in _STATUSES:
        if signal.getsignal(each) is _end:
            signal.signal(each, _end_at_once)
    if _running:
        _received.append(number)
        _running[0]()
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        sys.exit(TERMINATED)


def _end_at_once(number: int, _: FrameType | None) -> NoReturn:
    """Ends the program although it is ending already: a second signal does not wait."""
    os._exit(_STATUSES[number])


def is_capable_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can colour text and clear lines."""
    # None: the stream was closed before the program started.
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Text without control characters, which a terminal might obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _discard_output() -> None:
    """What could not be written would fail again when Python flushes it at exit."""
    with contextlib.suppress(OSError):  # not a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
