"""What the command lines share: how they end, and what a terminal can show."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

# argparse exits with 2 for bad usage.
FAILED, INTERRUPTED, TERMINATED = 3, 130, 143


def program(main: Callable[[], int]) -> NoReturn:
    """Runs a command line as a program."""
    # Process 1 of a container ignores every signal that it has no handler for.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    if sys.stdout is not None:  # it is None if it was closed
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())


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
        if not isinstance(error, BrokenPipeError):  # nobody reads the output
            print(f"{name}: {error}", file=sys.stderr)
        if isinstance(error, OSError):
            _discard_output()
        return FAILED
    except Exception:
        # Python's own status for this, 1, may mean something else.
        traceback.print_exc()
        return FAILED
    return status


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
