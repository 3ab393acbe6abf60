"""What the command line prints."""

import contextlib
import datetime as dt
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from monolith_optax._console import is_capable_terminal, printable
from monolith_optax.net._probe import NodeStatus
from monolith_optax.net._report import NodeReport, Transition

_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[m"
_START_OF_CLEARED_LINE = "\r\x1b[K"


def print_report(report: NodeReport, *, as_json: bool) -> None:
    """One line for each node, and how many are up unless a program reads it."""
    if as_json:
        for status in report.results:
            _print_json(_as_json(status))
        return
    width = max(len(printable(status.address)) for status in report.results)
    for status in report.results:
        address = f"{printable(status.address):{width}}"
        latency = f"{status.latency * 1e3:8.1f} ms"
        _print_line(address, _state(status), latency, _why(status))
    print(f"{len(report.alive)} of {len(report.results)} nodes are up")


def print_transition(transition: Transition, *, as_json: bool) -> None:
    """One line, with the time."""
    now = dt.datetime.now().astimezone().isoformat(timespec="milliseconds")
    status = transition.status
    if as_json:
        _print_json({"time": now} | _as_json(status))
    else:
        _print_line(now, printable(status.address), _state(status), _why(status))


@contextlib.contextmanager
def progress() -> Iterator[Callable[[NodeReport], None]]:
    """Says on standard error how many nodes are up, on a terminal in a single line."""
    one_line = is_capable_terminal(sys.stderr)

    def show(report: NodeReport) -> None:
        line = f"{len(report.alive)} of {len(report.results)} nodes are up"
        if one_line:
            print(_START_OF_CLEARED_LINE + line, end="", file=sys.stderr, flush=True)
        elif not report.all_alive:
            print(line, file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if one_line:
            print(_START_OF_CLEARED_LINE, end="", file=sys.stderr, flush=True)


def _state(status: NodeStatus) -> str:
    text, colour = ("up  ", _GREEN) if status.alive else ("DOWN", _RED)
    # https://no-color.org
    if is_capable_terminal(sys.stdout) and not os.environ.get("NO_COLOR"):
        return f"{colour}{text}{_PLAIN}"
    return text


def _why(status: NodeStatus) -> str:
    return f"{status.reason}: {status.message}" if status.reason else ""


def _print_line(*columns: str) -> None:
    print("  ".join(columns).rstrip(), flush=True)


def _as_json(status: NodeStatus) -> dict[str, Any]:
    return {
        "address": status.address,
        "alive": status.alive,
        "latency": round(status.latency, 6),
        "reason": status.reason,
        "message": status.message,
    }


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)
