"""One probe: can a TCP connection to an address be opened, and if not, why not."""

import asyncio
import contextlib
import enum
import errno
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

from monolith_optax.net._address import parse_address
from monolith_optax.net._lookup import NameLookup, SocketAddress, numeric_addresses

# RFC 8305: how long one address of a name has before the next is tried beside it.
ATTEMPT_DELAY = 0.25
# So many sockets may be open for one name.
ATTEMPTS_AT_A_TIME = 2


class Reason(enum.StrEnum):
    """Why a node is not known to be alive."""

    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    NAME_NOT_RESOLVED = "name not resolved"
    INVALID_ADDRESS = "invalid address"
    LOCAL_FAULT = "local fault"


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """What one probe found.

    Attributes:
      address: the address as it was given.
      alive: whether a connection was opened.
      latency: seconds until the connection was open or the probe had failed; name
        lookup counts.
      reason: why the node is not alive; None if it is. After
        `Reason.LOCAL_FAULT` the node may well be up: the trouble is on this machine.
      message: the reason in words; empty if the node is alive.
    """

    address: Any
    alive: bool
    latency: float
    reason: Reason | None = None
    message: str = ""


class Connector(Protocol):
    """How to connect: `TcpConnector`, or a stand-in for tests."""

    def __call__(self, host: str, port: int) -> Awaitable[None]:
        """Opens a connection and closes it, or raises the OSError that prevents it."""


class TcpConnector:
    """Opens TCP connections, to several addresses of a name in turn (RFC 8305).

    Args:
      lookup: gives the socket addresses of a name. None: `getaddrinfo`, in a process
        of its own that ends with the context.
    """

    def __init__(
        self, lookup: Callable[[str], Awaitable[list[SocketAddress]]] | None = None
    ) -> None:
        self._own_lookup = NameLookup()
        self._lookup = lookup or self._own_lookup

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._own_lookup.__aexit__(*exc_info)

    async def prepare(self) -> None:
        """Starts what looks up names, so that its start counts in no timeout."""
        if self._lookup is self._own_lookup:
            with contextlib.suppress(OSError):  # the first lookup tells
                await self._own_lookup.start()

    async def __call__(self, host: str, port: int) -> None:
        """Opens a connection and closes it.

        Raises:
          OSError: no address of the host could be connected to.
        """
        addresses = numeric_addresses(host) or await self._lookup(host)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
        attempts = [
            (family, (place[0], port, *place[2:]))
            for family, place in _interleaved(addresses)
        ]
        if len(attempts) == 1:
            await _connect(*attempts[0])
        else:
            await _connect_to_any(attempts)


async def probe(address: Any, connector: Connector, timeout: float) -> NodeStatus:
    """Probes one address; `timeout` covers name lookup and connecting together."""
    try:
        host, port = parse_address(address)
    except ValueError as error:
        return NodeStatus(address, False, 0.0, Reason.INVALID_ADDRESS, str(error))
    clock = asyncio.get_running_loop().time
    start = clock()
    try:
        async with _patient_timeout(timeout):
            await connector(host, port)
    except TimeoutError:
        message = f"no answer within {max(timeout, 0):.3g} s"
        return NodeStatus(address, False, clock() - start, Reason.TIMEOUT, message)
    except OSError as error:
        message = error.strerror or str(error)
        return NodeStatus(address, False, clock() - start, reason_of(error), message)
    return NodeStatus(address, True, clock() - start)


@contextlib.asynccontextmanager
async def _patient_timeout(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, for which an answer that has come counts before the clock.

    Where the event loop was held up, both are noticed in the same turn of it: the
    timeout then waits for the next.
    """
    async with asyncio.timeout(None) as limit:
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, limit.reschedule, loop.time())
        try:
            yield
        finally:
            timer.cancel()


_REASONS = {
    Reason.REFUSED: {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED},
    Reason.TIMEOUT: {errno.ETIMEDOUT},
    Reason.UNREACHABLE: {
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
    },
    # A link-local address without its scope.
    Reason.INVALID_ADDRESS: {errno.EINVAL},
}


def reason_of(error: OSError) -> Reason:
    """What an error says of the node; of this machine, if it says nothing of it."""
    if isinstance(error, socket.gaierror):
        local = error.errno in (socket.EAI_MEMORY, socket.EAI_SYSTEM)
        return Reason.LOCAL_FAULT if local else Reason.NAME_NOT_RESOLVED
    return next(
        (reason for reason, numbers in _REASONS.items() if error.errno in numbers),
        Reason.LOCAL_FAULT,
    )


def _interleaved(addresses: list[SocketAddress]) -> list[SocketAddress]:
    """One address of each family in turn, beginning with the first one's family."""
    families: dict[socket.AddressFamily, list[SocketAddress]] = {}
    for family, place in addresses:
        families.setdefault(family, []).append((family, place))
    turns = itertools.zip_longest(*families.values())
    return [address for turn in turns for address in turn if address is not None]


# This machine lacks something: of a name's addresses, none has been tried in earnest.
_SHORTAGES = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.EPERM,
    errno.EACCES,
}


def _telling(error: OSError) -> tuple[bool, int]:
    """Sorts the error that says most of a node first."""
    return error.errno not in _SHORTAGES, list(Reason).index(reason_of(error))


async def _connect_to_any(attempts: list[SocketAddress]) -> None:
    """Succeeds with the first attempt that does; each gets a head start."""
    started: list[asyncio.Task[None]] = []
    running: list[asyncio.Task[None]] = []
    errors: list[OSError] = []
    waiting = list(attempts)
    try:
        while waiting or running:
            if waiting:
                if len(running) == ATTEMPTS_AT_A_TIME:
                    running.pop(0).cancel()
                started.append(asyncio.create_task(_connect(*waiting.pop(0))))
                running.append(started[-1])
            done, _ = await asyncio.wait(
                running,
                timeout=ATTEMPT_DELAY if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            running = [task for task in running if task not in done]
            for error in [task.exception() for task in done]:
                if error is None:
                    return
                if not isinstance(error, OSError):
                    raise error
                errors.append(error)
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)
    raise min(errors, key=_telling)


async def _connect(family: socket.AddressFamily, place: tuple[Any, ...]) -> None:
    """Opens a connection and closes it without leaving a socket in TIME_WAIT."""
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.setblocking(False)
        connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        try:
            await asyncio.get_running_loop().sock_connect(connection, place)
        except OSError as error:
            # The system's words: asyncio's name the socket address alone.
            raise OSError(error.errno, os.strerror(error.errno or 0)) from error
        if _met_itself(connection):
            raise ConnectionRefusedError(
                errno.ECONNREFUSED, "nobody listens: the connection met itself"
            )


def _met_itself(connection: socket.socket) -> bool:
    """Whether both ends are one socket: TCP allows it when the ports are the same."""
    try:
        return bool(connection.getsockname() == connection.getpeername())
    except OSError:
        return False  # closed by the other end already, so there is one
