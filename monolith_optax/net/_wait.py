"""Rounds of probes until enough nodes are up, or down."""

import asyncio
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from monolith_optax.net._arguments import check_bound, check_positive, targets_of
from monolith_optax.net._connect import Connector
from monolith_optax.net._probe import NodeStatus, Target
from monolith_optax.net._reason import Reason
from monolith_optax.net._report import NodeReport, NodesDownError
from monolith_optax.net._round import probe_all
from monolith_optax.net._steps import steps_of

# Seconds between rounds, doubling from the first to the last.
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0
# Seconds: with less than this left, no other round starts.
LEAST_ROUND = 0.05

# What shows that nothing accepts connections there. Others say nothing about the node.
_CLOSED = {
    Reason.REFUSED,
    Reason.TIMEOUT,
    Reason.UNREACHABLE,
    Reason.NAME_NOT_RESOLVED,
}
_SILENT = {Reason.TIMEOUT, Reason.NO_NAME_SERVER}


@dataclass(frozen=True)
class Goal:
    """What to wait for.

    Attributes:
      nodes: how many nodes must get there.
      down: whether they must go down instead of up.
    """

    nodes: int
    down: bool = False

    def reached_by(self, status: NodeStatus) -> bool:
        """Whether one node is there."""
        return status.reason in _CLOSED if self.down else status.alive

    def missing_in(self, report: NodeReport) -> list[NodeStatus]:
        """The nodes that are not there, even if enough others are."""
        return [status for status in report.results if not self.reached_by(status)]

    def is_met_by(self, report: NodeReport) -> bool:
        """Whether enough nodes are there."""
        return len(report.results) - len(self.missing_in(report)) >= self.nodes


async def wait_for_nodes(
    addrs: Iterable[Any],
    *,
    deadline: float,
    timeout: float = 1.0,
    max_concurrency: int | None = None,
    on_progress: Callable[[NodeReport], None] | None = None,
    connector: Connector | None = None,
) -> NodeReport:
    """Probes nodes again and again, with growing pauses, until all of them are up.

    A node that was up once is not probed again.

    Args:
      addrs: the addresses, see `parse_address`.
      deadline: seconds after which to give up.
      timeout: seconds that each probe may take; name lookup counts.
      max_concurrency: how many probes may run at a time. None: as many as the limit on
        open files allows.
      on_progress: called with a report on all nodes after every round.
      connector: how to connect: `HttpConnector`, or a stand-in for `TcpConnector`.

    Returns:
      A `NodeReport` in which all nodes are alive.

    Raises:
      NodesDownError: the deadline passed, or the nodes that are still down can never
        come up because their addresses are malformed. It has the last report.
      TypeError: addrs is a string or not iterable.
      ValueError: deadline, timeout or max_concurrency is not positive.

    Example:
      >>> import asyncio
      >>> asyncio.run(wait_for_nodes([], deadline=60.0)).all_alive
      True
    """
    targets = targets_of(addrs)
    check_positive(deadline=deadline, timeout=timeout)
    check_bound(max_concurrency=max_concurrency)
    report = await wait(
        targets,
        Goal(len(targets)),
        deadline=deadline,
        timeout=timeout,
        max_concurrency=max_concurrency,
        on_progress=on_progress,
        connector=connector,
    )
    if not report.all_alive:
        raise NodesDownError(report)
    return report


async def wait(
    targets: list[Target],
    goal: Goal,
    *,
    deadline: float,
    timeout: float,
    interval: float | None = None,
    max_concurrency: int | None = None,
    on_progress: Callable[[NodeReport], None] | None = None,
    connector: Connector | None = None,
) -> NodeReport:
    """Probes until the goal is met, or cannot be; returns the last report.

    As `wait_for_nodes`, but with a deadline of 0 there is one round, and `interval` is
    the time from one round to the next. None: pauses grow.
    """
    clock = asyncio.get_running_loop().time
    start = clock()
    end = start + deadline if deadline else math.inf
    latest: dict[Any, NodeStatus] = {}
    pending, pause = targets, FIRST_PAUSE
    async with steps_of(connector) as steps:
        while True:
            began = clock()
            found = await probe_all(pending, timeout, max_concurrency, steps, end)
            for status in found.results:
                # A probe that the deadline cut short says less than the one before.
                cut_short = status.reason in _SILENT and clock() >= end
                if not (cut_short and status.address in latest):
                    latest[status.address] = status
            report = NodeReport(tuple(latest[target.given] for target in targets))
            if on_progress is not None:
                on_progress(report)
            pending = [
                target
                for target, status in zip(targets, report.results, strict=True)
                if not goal.reached_by(status)
                and status.reason is not Reason.INVALID_ADDRESS
            ]
            remaining = end - clock() if deadline else 0.0
            if goal.is_met_by(report) or not pending or remaining <= LEAST_ROUND:
                return report
            if interval is None:
                seconds = pause * random.uniform(0.5, 1.0)
                pause = min(2 * pause, LAST_PAUSE)
            else:
                seconds = max(0.0, began + interval - clock())
            # Half of what remains leaves room for one more probe before the deadline.
            await asyncio.sleep(min(seconds, remaining / 2))
