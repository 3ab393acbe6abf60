"""Many probes at the same time."""

import asyncio
import contextlib
import logging
import math
import resource
import sys
from collections.abc import AsyncIterator, Collection, Iterable
from pathlib import Path
from typing import Any

from monolith_optax.net._address import parse_address
from monolith_optax.net._lookup import numeric_addresses
from monolith_optax.net._probe import (
    ATTEMPTS_AT_A_TIME,
    Connector,
    NodeStatus,
    TcpConnector,
    probe,
)
from monolith_optax.net._report import NodeReport

# Descriptors left to the rest of the program.
SPARE_DESCRIPTORS = 16
# Probes started before others are heard: the event loop must not be kept from noticing
# that a node has answered until its timeout is over.
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
    addresses = distinct(addrs)
    check_positive(timeout=timeout)
    check_bound("max_concurrency", max_concurrency)
    async with connecting(connector) as connect:
        return await probe_all(addresses, timeout, max_concurrency, connect)


async def probe_all(
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
async def connecting(connector: Connector | None) -> AsyncIterator[Connector]:
    if connector is not None:
        yield connector
    else:
        async with TcpConnector() as own:
            yield own


def distinct(addrs: Iterable[Any]) -> list[Any]:
    addresses = list(iterable(addrs))
    try:
        return list(dict.fromkeys(addresses))
    except TypeError as error:
        raise TypeError(
            f"Addresses must be strings, but they are {addresses!r}."
        ) from error


def iterable(addrs: Any) -> Iterable[Any]:
    if isinstance(addrs, str | bytes) or not isinstance(addrs, Iterable):
        raise TypeError(
            f"addrs must be a list of addresses such as ['host:2222'], but it is "
            f"{addrs!r}."
        )
    return addrs


def check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{name} must be a positive number, but it is {number!r}.")


def check_bound(name: str, number: int | None) -> None:
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ValueError(f"{name} must be None or at least 1, but it is {number!r}.")
