"""One round of probes, all at the same time."""

import asyncio
import logging
import math
import resource
import sys
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from monolith_optax.net._address import Address
from monolith_optax.net._arguments import check_bound, check_positive, targets_of
from monolith_optax.net._connect import Connector, cancel
from monolith_optax.net._probe import NodeStatus, Target, probe, status_of
from monolith_optax.net._reason import Reason
from monolith_optax.net._report import NodeReport
from monolith_optax.net._steps import Steps, steps_of

# Descriptors left to the rest of the program.
SPARE_DESCRIPTORS = 16
# Probes that start before the event loop may notice answers: latencies are measured
# when it does.
BURST = 64

_logger = logging.getLogger("monolith_optax.net")


async def check_nodes(
    addrs: Iterable[Any],
    *,
    timeout: float = 1.0,
    max_concurrency: int | None = None,
    connector: Connector | None = None,
) -> NodeReport:
    """Probes every distinct address once, all at the same time.

    A node is alive if a TCP connection to it can be opened. The connection is closed
    at once, and nothing is sent.

    Args:
      addrs: the addresses, see `parse_address`. One that is malformed is reported with
        `Reason.INVALID_ADDRESS`.
      timeout: seconds that each probe may take; name lookup counts.
      max_concurrency: how many probes may run at a time. None: as many as the limit on
        open files allows.
      connector: how to connect: `HttpConnector`, or a stand-in for `TcpConnector`.

    Returns:
      A `NodeReport`.

    Raises:
      TypeError: addrs is a string or not iterable.
      ValueError: timeout or max_concurrency is not positive.

    Example:
      >>> import asyncio
      >>> report = asyncio.run(check_nodes(["localhost", "localhost:99999"]))
      >>> report.all_alive
      False
      >>> print(report)
      0 of 2 up
        localhost: invalid address ('localhost' has no port: write host:port.)
        localhost:99999: invalid address ('localhost:99999' must end in a port from 1 \
to 65535, not '99999'.)
    """
    targets = targets_of(addrs)
    check_positive(timeout=timeout)
    check_bound(max_concurrency=max_concurrency)
    async with steps_of(connector) as steps:
        return await probe_all(targets, timeout, max_concurrency, steps)


async def probe_all(
    targets: Collection[Target],
    timeout: float,
    max_concurrency: int | None,
    steps: Steps,
    end: float = math.inf,
) -> NodeReport:
    """Probes targets until the time `end` of the event loop's clock."""
    if any(target.needs_lookup for target in targets):
        await steps.prepare()
    statuses = await _Round(timeout, max_concurrency, steps, end).run(targets)
    report = NodeReport(tuple(statuses[target.given] for target in targets))
    _log(report)
    return report


class _Round:
    """Probes that run at the same time, as far as the limits allow."""

    def __init__(
        self,
        timeout: float,
        max_concurrency: int | None,
        steps: Steps,
        end: float,
    ) -> None:
        self.timeout, self.steps, self.end = timeout, steps, end
        self.clock = asyncio.get_running_loop().time
        most_sockets = max(1, _descriptors_left())
        self.sockets = asyncio.Semaphore(most_sockets)
        self.probes = asyncio.Semaphore(max_concurrency or most_sockets)
        self.attempts: list[asyncio.Future[OSError | None]] = []
        self.statuses: dict[Any, NodeStatus] = {}

    async def run(self, targets: Iterable[Target]) -> dict[Any, NodeStatus]:
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, target in enumerate(targets, start=1):
                    await self.start(target, tasks)
                    if number % BURST == 0:
                        await asyncio.sleep(0)
                await asyncio.gather(*self.attempts)  # raises faults of our own
        finally:
            await cancel(self.attempts)
        return self.statuses

    async def start(self, target: Target, tasks: asyncio.TaskGroup) -> None:
        """Starts a probe when the limits allow it; an IP address needs no task."""
        given, address, numeric = target
        if isinstance(address, ValueError):
            reason, message = Reason.INVALID_ADDRESS, str(address)
            self.statuses[given] = NodeStatus(given, False, 0.0, reason, message)
            return
        await self.probes.acquire()
        await self.sockets.acquire()
        start = self.clock()
        timeout = min(self.timeout, self.end - start)
        if numeric is not None and self.steps.at_once is not None:
            outcome = self.steps.at_once(numeric, timeout)
            settle = partial(self.settle, given, start, timeout)
            if outcome.done():
                settle(outcome)
            else:
                outcome.add_done_callback(settle)
                self.attempts.append(outcome)
        else:
            task = tasks.create_task(self.in_task(given, address, timeout))
            task.add_done_callback(self.release)

    async def in_task(self, given: Any, address: Address, timeout: float) -> None:
        self.statuses[given] = await probe(
            given, address, self.steps, timeout, self.sockets
        )

    def settle(
        self,
        given: Any,
        start: float,
        timeout: float,
        outcome: asyncio.Future[OSError | None],
    ) -> None:
        self.release()
        if not outcome.cancelled() and outcome.exception() is None:
            latency = self.clock() - start
            self.statuses[given] = status_of(given, outcome.result(), latency, timeout)

    def release(self, _: object = None) -> None:
        self.probes.release()
        self.sockets.release()


def _log(report: NodeReport) -> None:
    if report.local_faults:
        example = report[report.local_faults[0]]
        _logger.warning(
            "%d of %d nodes could not be checked because of trouble on this machine; "
            "%s: %s",
            len(report.local_faults),
            len(report.results),
            example.address,
            example.message,
        )
    _logger.debug("%s", report)


def _descriptors_left() -> int:
    """How many files may still be opened, less some for the rest of the program."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        return limit - len(list(Path("/dev/fd").iterdir())) - SPARE_DESCRIPTORS
    except OSError:
        return 0  # not even the list can be opened
