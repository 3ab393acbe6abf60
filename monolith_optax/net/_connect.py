"""TCP connections: one attempt, and several addresses of a name in turn."""

import asyncio
import contextlib
import errno
import itertools
import math
import os
import select
import socket
import struct
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, Self

from monolith_optax._public import public
from monolith_optax.net._address import Address
from monolith_optax.net._names import NameLookup, SocketAddress, numeric_addresses
from monolith_optax.net._reason import LOCAL_SHORTAGES, Reason, reason_of

# RFC 8305: the head start in seconds that one address of a name has over the next.
ATTEMPT_DELAY = 0.25
# Closing resets the connection instead of leaving a socket in TIME_WAIT.
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@public("monolith_optax.net")
class Connector(Protocol):
    """How to connect: `TcpConnector`, or a stand-in for tests."""

    def __call__(self, host: str, port: int) -> Awaitable[None]:
        """Opens a connection and closes it, or raises the OSError that prevents it."""


@public("monolith_optax.net")
class TcpConnector:
    """Opens TCP connections, to several addresses of a name in turn (RFC 8305).

    Args:
      lookup: returns the socket addresses of a name, as pairs of a family and what
        `socket.connect` takes. Their ports are ignored. None: `getaddrinfo`, in a
        separate process that ends with the context.
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
            with contextlib.suppress(OSError):  # each lookup will say so
                await self._own_lookup.start()

    async def __call__(self, host: str, port: int) -> None:
        """Opens a connection and closes it.

        Raises:
          OSError: no address of the host could be connected to. If several were tried,
            this is the error that says most about the node, and its cause is an
            `ExceptionGroup` of the others.
        """
        found = await self.look_up(host)
        sockets = asyncio.Semaphore(sys.maxsize)
        await self.connect(Address(host, port), found, math.inf, sockets)

    async def look_up(self, host: str) -> list[SocketAddress]:
        """The socket addresses of a host, whose ports mean nothing."""
        found = numeric_addresses(host) or await self._lookup(host)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
        return found

    async def connect(
        self,
        address: Address,
        found: list[SocketAddress],
        end: float,
        sockets: asyncio.Semaphore,
    ) -> SocketAddress:
        """Connects, for a caller who gives up at the time `end` of the loop's clock.

        The caller has taken one of `sockets` and gives it back.

        Returns:
          The one that answered, of the socket addresses that were found for the host.
        """
        addresses = [
            (family, (sockaddr[0], address.port, *sockaddr[2:]))
            for family, sockaddr in _interleaved(found)
        ]
        return await _connect_to_any(addresses, end, sockets)


def attempt(
    address: SocketAddress, timeout: float = math.inf
) -> asyncio.Future[OSError | None]:
    """Opens a connection and closes it at once. Nothing is sent.

    It starts no task, because thousands of attempts run at a time.

    Returns:
      A future of the error that prevented the connection, or of None. Cancelling it
      ends the attempt. Its exception, if any, is a fault of the checker.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[OSError | None] = loop.create_future()
    try:
        connection = _begin(address)
    except OSError as error:
        outcome.set_result(error)
        return outcome
    # This machine's own addresses have by now, at less than the event loop costs.
    if _has_answered(connection):
        with connection:
            outcome.set_result(_error_of(connection))
    else:
        _await_answer(connection, timeout, outcome)
    return outcome


def _await_answer(
    connection: socket.socket, timeout: float, outcome: asyncio.Future[OSError | None]
) -> None:
    """Has the event loop settle the outcome, by an answer or after the timeout."""
    loop, descriptor = outcome.get_loop(), connection.fileno()

    def settle() -> None:
        if outcome.done():
            return
        try:
            outcome.set_result(_error_of(connection))
        except Exception as fault:  # the loop would only log it, again and again
            outcome.set_exception(fault)

    def expire() -> None:
        # Where something held up the event loop, an answer may be there already.
        if _has_answered(connection):
            settle()
        elif not outcome.done():
            outcome.set_result(TimeoutError())

    def close(_: object) -> None:
        if timer is not None:
            timer.cancel()
        loop.remove_writer(descriptor)
        connection.close()

    timer = loop.call_later(timeout, expire) if timeout < math.inf else None
    loop.add_writer(descriptor, settle)
    outcome.add_done_callback(close)


def _begin(address: SocketAddress) -> socket.socket:
    family, sockaddr = address
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        number = connection.connect_ex(sockaddr)
        if number not in (0, errno.EINPROGRESS, errno.EINTR):
            raise OSError(number, os.strerror(number))
    except BaseException:
        connection.close()
        raise
    return connection


def _error_of(connection: socket.socket) -> OSError | None:
    """How an attempt ended: the error, or None."""
    number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        return OSError(number, os.strerror(number))
    try:
        # TCP allows a connection of a socket with itself if its ports are the same.
        met_itself = connection.getsockname() == connection.getpeername()
    except OSError:
        return None  # the other end has closed it already, so there is one
    if not met_itself:
        return None
    return ConnectionRefusedError(
        errno.ECONNREFUSED, "nothing listens there: the connection met itself"
    )


def _has_answered(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(0))


def _interleaved(addresses: list[SocketAddress]) -> list[SocketAddress]:
    """One address of each family in turn, beginning with the first one's family."""
    families: dict[socket.AddressFamily, list[SocketAddress]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    turns = itertools.zip_longest(*families.values())
    return [address for turn in turns for address in turn if address is not None]


# Happy Eyeballs (RFC 8305): attempts start one after the other, each with a head start
# over the next that ends early if it fails, and run beside each other until one
# succeeds. So an address that never answers costs one head start, not the timeout, and
# a slow address still wins if all others are silent. The RFC has no bound on open
# sockets. We have one: an attempt takes another socket only if no probe waits for it,
# and otherwise the oldest attempt gives up its own. It has no timeout either: ours is
# divided so that the last of many addresses still has two head starts to answer.
async def _connect_to_any(
    addresses: list[SocketAddress], end: float, sockets: asyncio.Semaphore
) -> SocketAddress:
    clock = asyncio.get_running_loop().time
    waiting = list(reversed(addresses))
    running: dict[asyncio.Future[OSError | None], SocketAddress] = {}
    errors: list[OSError] = []
    held = 1
    try:
        while waiting or running:
            if waiting:
                if len(running) == held and sockets.locked():
                    oldest = next(iter(running))
                    del running[oldest]
                    await cancel([oldest])
                elif len(running) == held:
                    await sockets.acquire()  # at once, since it is not locked
                    held += 1
                address = waiting.pop()
                running[attempt(address)] = address
            head_start = min(ATTEMPT_DELAY, (end - clock()) / (len(waiting) + 2))
            done, _ = await asyncio.wait(
                running,
                timeout=head_start if waiting else None,
                return_when=asyncio.FIRST_COMPLETED,
            )
            for one in done:
                address = running.pop(one)
                error = one.result()
                if error is None:
                    return address
                errors.append(error)
    finally:
        await cancel(running)
        for _ in range(held - 1):
            sockets.release()
    telling = min(errors, key=_telling)
    errors.remove(telling)
    if errors:
        raise telling from ExceptionGroup("other addresses of the same name", errors)
    raise telling


async def cancel(attempts: Iterable[asyncio.Future[OSError | None]]) -> None:
    """Returns when their sockets are closed."""
    if pending := [one for one in attempts if one.cancel()]:
        await asyncio.wait(pending)


def _telling(error: OSError) -> tuple[bool, int]:
    """Sorts the error that says most about a node first.

    If this machine lacked something, not all addresses were tried in earnest.
    """
    shortage = error.errno in LOCAL_SHORTAGES
    return not shortage, list(Reason).index(reason_of(error))
