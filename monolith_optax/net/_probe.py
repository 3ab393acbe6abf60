"""One probe: can a TCP connection to an address be opened, and if not, why not."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from monolith_optax._public import public
from monolith_optax.net._address import Address, parse_address
from monolith_optax.net._names import SocketAddress, numeric_addresses
from monolith_optax.net._reason import Reason, reason_of
from monolith_optax.net._steps import Steps


@public("monolith_optax.net")
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


class Target(NamedTuple):
    """An address as it was given, and what it means.

    Attributes:
      given: the address as it was given.
      parsed: its host and port, or the error that says why it has none.
      numeric: its socket address, unless that must be looked up for every probe: that
        of a name, or of an IP address with a scope, whose interface may be replaced.
    """

    given: Any
    parsed: Address | ValueError
    numeric: SocketAddress | None = None

    @property
    def needs_lookup(self) -> bool:
        """Whether the host is a name, or has a scope."""
        return self.numeric is None and isinstance(self.parsed, Address)


def parse_target(given: Any) -> Target:
    try:
        parsed = parse_address(given)
    except ValueError as error:
        return Target(given, error)
    if "%" in parsed.host:
        return Target(given, parsed)
    return Target(given, parsed, next(iter(numeric_addresses(*parsed)), None))


def status_of(
    given: Any, error: OSError | None, latency: float, timeout: float
) -> NodeStatus:
    """The status of a node whose probe ended with `error`, or with a connection."""
    if error is None:
        return NodeStatus(given, True, latency)
    message = error.strerror or str(error)
    if not message:  # a TimeoutError of our own
        message = f"no answer within {max(timeout, 0):.3g} s"
    return NodeStatus(given, False, latency, reason_of(error), message)


async def probe(
    given: Any,
    address: Address,
    steps: Steps,
    timeout: float,
    sockets: asyncio.Semaphore,
) -> NodeStatus:
    """Probes a node; `timeout` covers name lookup and connecting together."""
    clock = asyncio.get_running_loop().time
    start = clock()
    looking_up = True
    try:
        async with _patient_timeout(timeout):
            found = await steps.look_up(address.host)
            looking_up = False
            await steps.connect(address, found, start + timeout, sockets)
    except OSError as error:
        if looking_up and isinstance(error, TimeoutError):
            words = f"no answer from a name server within {max(timeout, 0):.3g} s"
            error = socket.gaierror(socket.EAI_AGAIN, words)
        return status_of(given, error, clock() - start, timeout)
    return status_of(given, None, clock() - start, timeout)


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
