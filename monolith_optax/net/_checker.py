"""Many probes: once, until all nodes are up, or for as long as somebody watches."""

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import random
import resource
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monolith_optax.net._address import parse_address
from monolith_optax.net._lookup import numeric_addresses
from monolith_optax.net._probe import (
    ATTEMPTS_AT_A_TIME,
    Connector,
    NodeStatus,
    Reason,
    TcpConnector,
    probe,
)

# Descriptors left to the rest of the program.
SPARE_DESCRIPTORS = 16
# Probes started before others are heard: the event loop must not be kept from noticing
# that a node has answered until its timeout is over.
BURST = 64
# Seconds between rounds of wait_for_nodes, doubling from the first to the last.
FIRST_PAUSE, LAST_PAUSE = 0.1, 5.0
# With less than so many seconds left, wait_for_nodes begins no other round.
LEAST_ROUND = 0.05

_logger = logging.getLogger("monolith_optax.net")


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What a check found, for each distinct address in the order given.

    Attributes:
      results: a `NodeStatus` for each address.
    """

    results: tuple[NodeStatus, ...]

    @property
    def alive(self) -> list[Any]:
        """The addresses of the nodes that are up."""
        return [status.address for status in self.results if status.alive]

    @property
    def dead(self) -> list[Any]:
        """All other addresses; those in `local_faults` may be up nevertheless."""
        return [status.address for status in self.results if not status.alive]

    @property
    def local_faults(self) -> list[Any]:
        """The addresses that trouble on this machine kept from being checked."""
        return [
            status.address
            for status in self.results
            if status.reason is Reason.LOCAL_FAULT
        ]

    @property
    def all_alive(self) -> bool:
        """Whether every node is up; so is an empty list."""
        return all(status.alive for status in self.results)

    def __getitem__(self, address: Any) -> NodeStatus:
        """The status of an address.

        Raises:
          KeyError: the address was not checked.
        """
        for status in self.results:
            if status.address == address:
                return status
        raise KeyError(address)

    def __str__(self) -> str:
        """How many nodes are up, and a line for each that is not."""
        down = [
            f"\n  {status.address}: {status.reason} ({status.message})"
            for status in self.results
            if not status.alive
        ]
        return f"{len(self.alive)} of {len(self.results)} nodes are up" + "".join(down)


class NodesDownError(TimeoutError):
    """Not all nodes came up in time.

    Attributes:
      report: the last `NodeReport`: who is down, and why.
    """

    def __init__(self, report: NodeReport) -> None:
        super().__init__(str(report))
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.report,)


@dataclass(frozen=True, slots=True)
class Transition:
    """A node went up or down.

    Attributes:
      address: the address as it was given.
      alive: whether the node is up now.
      status: the probe that settled it.
    """

    address: Any
    alive: bool
    status: NodeStatus


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
      max_concurrency: how many probes may run at a time. None: as many as the limit of
        open files allows.
      connector: a stand-in for `TcpConnector`.

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
      0 of 2 nodes are up
        localhost: invalid address ('localhost' has no port: write host:port.)
        localhost:99999: invalid address ('localhost:99999' must end in a port from 1 \
to 65535, not '99999'.)
    """
    addresses = _distinct(addrs)
    _check_positive(timeout=timeout)
    _check_bound("max_concurrency", max_concurrency)
    async with _connecting(connector) as connect:
        return await _check(addresses, timeout, max_concurrency, connect)


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
      max_concurrency: how many probes may run at a time. None: as many as the limit of
        open files allows.
      on_progress: called with a report on all nodes after every round.
      connector: a stand-in for `TcpConnector`.

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
    addresses = _distinct(addrs)
    _check_positive(deadline=deadline, timeout=timeout)
    _check_bound("max_concurrency", max_concurrency)
    clock = asyncio.get_running_loop().time
    end = clock() + deadline
    latest: dict[Any, NodeStatus] = {}
    pending: Collection[Any] = addresses
    async with _connecting(connector) as connect:
        pause = FIRST_PAUSE
        while True:
            report = await _check(pending, timeout, max_concurrency, connect, end)
            for status in report.results:
                # A probe that the deadline cut short says less than the one before.
                cut_short = status.reason is Reason.TIMEOUT and clock() >= end
                if not (cut_short and status.address in latest):
                    latest[status.address] = status
            report = NodeReport(tuple(latest[address] for address in addresses))
            if on_progress is not None:
                on_progress(report)
            if report.all_alive:
                return report
            pending = [
                status.address
                for status in report.results
                if not status.alive and status.reason is not Reason.INVALID_ADDRESS
            ]
            remaining = end - clock()
            if not pending or remaining <= LEAST_ROUND:
                raise NodesDownError(report)
            # Half of what remains leaves room for one more probe before the deadline.
            jitter = random.uniform(0.5, 1.0)
            await asyncio.sleep(min(pause * jitter, remaining / 2))
            pause = min(2 * pause, LAST_PAUSE)


def watch_nodes(
    addrs: Iterable[Any],
    *,
    interval: float,
    failure_threshold: int = 3,
    success_threshold: int = 1,
    timeout: float = 1.0,
    max_concurrency: int | None = None,
    connector: Connector | None = None,
) -> AsyncGenerator[Transition, None]:
    """Watches nodes and tells when one goes up or down.

    Every node is probed once in each interval, or as often as the slowest probe of a
    round allows. The first verdict on a node counts as a transition. Trouble on this
    machine is logged and counts neither for nor against a node.

    Args:
      addrs: the addresses, see `parse_address`.
      interval: seconds from one round of probes to the next.
      failure_threshold: how many probes in a row must fail before a node is down.
      success_threshold: how many probes in a row must succeed before a node is up.
      timeout: seconds that each probe may take; name lookup counts.
      max_concurrency: how many probes may run at a time. None: as many as the limit of
        open files allows.
      connector: a stand-in for `TcpConnector`.

    Returns:
      An asynchronous generator of `Transition`. Nothing runs while it is not awaited;
      `aclose()` or cancellation ends it.

    Raises:
      TypeError: addrs is a string or not iterable.
      ValueError: a number is not positive, or a threshold is below 1.

    Example:
      >>> import asyncio
      >>> async def first_transition():
      ...     async for transition in watch_nodes(
      ...         ["no port"], interval=0.01, failure_threshold=2
      ...     ):
      ...         return transition.address, transition.alive
      >>> asyncio.run(first_transition())
      ('no port', False)
    """
    addresses = _distinct(addrs)
    _check_positive(interval=interval, timeout=timeout)
    _check_bound("max_concurrency", max_concurrency)
    thresholds = {True: success_threshold, False: failure_threshold}
    if min(thresholds.values()) < 1:
        raise ValueError(
            "failure_threshold and success_threshold must be at least 1, but they are "
            f"{failure_threshold} and {success_threshold}."
        )

    async def watch() -> AsyncGenerator[Transition, None]:
        clock = asyncio.get_running_loop().time
        known: dict[Any, bool] = {}
        streaks: dict[Any, tuple[bool, int]] = {}
        async with _connecting(connector) as connect:
            while True:
                start = clock()
                report = await _check(addresses, timeout, max_concurrency, connect)
                for status in report.results:
                    if status.reason is Reason.LOCAL_FAULT:
                        continue
                    alive, length = streaks.get(status.address, (status.alive, 0))
                    length = length + 1 if alive == status.alive else 1
                    streaks[status.address] = status.alive, length
                    if (
                        known.get(status.address) != status.alive
                        and length >= thresholds[status.alive]
                    ):
                        known[status.address] = status.alive
                        yield Transition(status.address, status.alive, status)
                await asyncio.sleep(max(0.0, start + interval - clock()))

    return watch()


class NodeAliveChecker:
    """Monolith's node checker: probes all addresses when it is made.

    It works with and without an event loop that is already running, in a notebook for
    instance. In asynchronous code, await `check_nodes` instead.

    Args:
      addrs: the addresses, see `parse_address`.
      timeout: seconds that each probe may take; name lookup counts.
      num_thread: how many probes may run at a time. None: as many as the limit of open
        files allows, so that a thousand silent nodes cost one timeout. There are no
        threads: the name is Monolith's, whose default of 10 made them cost a hundred.

    Attributes:
      report: the last `NodeReport`: who is down, and why.

    Raises:
      TypeError: addrs is a string or not iterable.
      ValueError: timeout or num_thread is not positive.

    Example:
      >>> checker = NodeAliveChecker(["localhost:none"])
      >>> checker.all_nodes_alive(), checker.get_dead_nodes()
      (False, ['localhost:none'])
    """

    report: NodeReport

    def __init__(
        self, addrs: Iterable[Any], timeout: float = 1, num_thread: int | None = None
    ) -> None:
        self._addrs = addrs if isinstance(addrs, Collection) else list(_iterable(addrs))
        self._timeout = timeout
        self._num_thread = num_thread
        _check_bound("num_thread", num_thread)
        self.check()

    def check(self) -> NodeReport:
        """Probes all addresses again and returns the new report."""
        self.report = _run(
            lambda: check_nodes(
                self._addrs, timeout=self._timeout, max_concurrency=self._num_thread
            )
        )
        return self.report

    def get_addrs(self) -> Collection[Any]:
        """The addresses as they were given."""
        return self._addrs

    def get_alive_nodes(self) -> list[Any]:
        """The addresses that are alive, each once."""
        return self.report.alive

    def get_dead_nodes(self) -> list[Any]:
        """The addresses that are not, each once."""
        return self.report.dead

    def all_nodes_alive(self) -> bool:
        """Whether no address is dead."""
        return self.report.all_alive


async def _check(
    addresses: Collection[Any],
    timeout: float,
    max_concurrency: int | None,
    connector: Connector,
    end: float = math.inf,
) -> NodeReport:
    """Probes addresses until the time `end` of the event loop's clock."""
    clock = asyncio.get_running_loop().time
    sockets = {address: _sockets_for(address) for address in addresses}
    if isinstance(connector, TcpConnector) and ATTEMPTS_AT_A_TIME in sockets.values():
        await connector.prepare()
    most_sockets = max(1, _descriptors_left())
    sockets = {address: min(n, most_sockets) for address, n in sockets.items()}
    free_sockets = asyncio.Semaphore(most_sockets)
    free_probes = asyncio.Semaphore(max_concurrency or most_sockets)

    async def limited(address: Any) -> NodeStatus:
        try:
            return await probe(address, connector, min(timeout, end - clock()))
        finally:
            free_probes.release()
            for _ in range(sockets[address]):
                free_sockets.release()

    tasks = []
    async with asyncio.TaskGroup() as group:
        for number, address in enumerate(addresses, start=1):
            await free_probes.acquire()
            for _ in range(sockets[address]):
                await free_sockets.acquire()
            tasks.append(group.create_task(limited(address)))
            if number % BURST == 0:
                await asyncio.sleep(0)
    report = NodeReport(tuple(task.result() for task in tasks))
    _log(report)
    return report


def _sockets_for(address: Any) -> int:
    """How many sockets a probe may have open at a time: more than one for a name."""
    try:
        host = parse_address(address).host
    except ValueError:
        return 0
    return 1 if numeric_addresses(host) else ATTEMPTS_AT_A_TIME


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


@contextlib.asynccontextmanager
async def _connecting(connector: Connector | None) -> AsyncIterator[Connector]:
    if connector is not None:
        yield connector
    else:
        async with TcpConnector() as own:
            yield own


def _run(check: Callable[[], Coroutine[Any, Any, NodeReport]]) -> NodeReport:
    """Runs a coroutine to its end, in a thread where an event loop is running."""

    def run() -> NodeReport:
        # With a factory, the runner leaves the thread's current event loop alone.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(cancellable())

    async def cancellable() -> NodeReport:
        task, loop = asyncio.create_task(check()), asyncio.get_running_loop()
        cancels.append(lambda: loop.call_soon_threadsafe(task.cancel))
        return await task

    cancels: list[Callable[[], object]] = []
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run()
    with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
        try:
            return thread.submit(run).result()
        except KeyboardInterrupt:
            for cancel in cancels:
                cancel()
            raise


def _distinct(addrs: Iterable[Any]) -> list[Any]:
    addresses = list(_iterable(addrs))
    try:
        return list(dict.fromkeys(addresses))
    except TypeError as error:
        raise TypeError(
            f"Addresses must be strings, but they are {addresses!r}."
        ) from error


def _iterable(addrs: Any) -> Iterable[Any]:
    if isinstance(addrs, str | bytes) or not isinstance(addrs, Iterable):
        raise TypeError(
            f"addrs must be a list of addresses such as ['host:2222'], but it is "
            f"{addrs!r}."
        )
    return addrs


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{name} must be a positive number, but it is {number!r}.")


def _check_bound(name: str, number: int | None) -> None:
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ValueError(f"{name} must be None or at least 1, but it is {number!r}.")
