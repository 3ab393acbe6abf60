"""What the command line prints."""

import datetime as dt
import json
import os
import sys
import time
from typing import Any

from monolith_optax._console import is_capable_terminal, printable
from monolith_optax.net._probe import NodeStatus
from monolith_optax.net._reason import Reason
from monolith_optax.net._report import NodeReport, Transition
from monolith_optax.net._wait import Goal

_GREEN, _RED, _PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[m"
# How many missing nodes a line names.
MOST_NAMES = 5


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
    print(report.count())


def print_transition(transition: Transition, *, as_json: bool) -> None:
    """One line, with the time."""
    status = transition.status
    if as_json:
        _print_json({"time": _now()} | _as_json(status))
    else:
        _print_line(_now(), printable(status.address), _state(status), _why(status))


class Waiting:
    """Says who is missing, whenever that changes."""

    def __init__(self, goal: Goal, *, as_json: bool) -> None:
        self._goal, self._as_json = goal, as_json
        self._start = time.monotonic()
        self._last: dict[Any, tuple[bool, Reason | None]] = {}

    def progress(self, report: NodeReport) -> None:
        """After a round: objects of the nodes that changed, or a line."""
        now = {
            status.address: (status.alive, status.reason) for status in report.results
        }
        changed = [
            s for s in report.results if self._last.get(s.address) != now[s.address]
        ]
        self._last = now
        if self._as_json:
            for status in changed:
                _print_json({"time": _now()} | _as_json(status))
        elif changed and not self._goal.is_met_by(report):
            self._say(report, _names(self._goal.missing_in(report)))

    def end(self, report: NodeReport) -> None:
        """How the wait ended."""
        missing = self._goal.missing_in(report)
        met = self._goal.is_met_by(report)
        if self._as_json:
            summary = {
                "met": met,
                "up": len(report.alive),
                "nodes": len(report.results),
                "missing": [status.address for status in missing],
                "seconds": round(time.monotonic() - self._start, 3),
            }
            _print_json({"time": _now()} | summary)
        elif met:
            self._say(report)
        else:
            self._say(report, "gave up")
            for status in missing:
                why = _why(status) or "still up"
                print(f"  {printable(status.address)}  {why}", file=sys.stderr)

    def _say(self, report: NodeReport, more: str = "") -> None:
        count = f"{len(report.results) - len(self._goal.missing_in(report))} of "
        seconds = f" after {time.monotonic() - self._start:.1f} s"
        state = " down" if self._goal.down else " up"
        line = f"{count}{len(report.results)}{state}{seconds}"
        print(f"{line}; {more}" if more else line, file=sys.stderr, flush=True)


def _names(missing: list[NodeStatus]) -> str:
    """Some of the nodes, as there may be thousands."""
    names = [
        f"{printable(status.address)} ({status.reason or 'up'})"
        for status in missing[:MOST_NAMES]
    ]
    if more := len(missing) - len(names):
        names.append(f"and {more} more")
    return "missing: " + ", ".join(names)


def _now() -> str:
    return dt.datetime.now().astimezone().isoformat(timespec="milliseconds")


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
