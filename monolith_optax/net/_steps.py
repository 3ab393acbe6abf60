"""The steps in which a probe connects: one face for all that may be a connector."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from monolith_optax.net._address import Address
from monolith_optax.net._connect import Connector, TcpConnector, attempt
from monolith_optax.net._names import SocketAddress


class Steps(NamedTuple):
    """How a connector connects.

    Attributes:
      prepare: `TcpConnector.prepare`.
      look_up: `TcpConnector.look_up`.
      connect: `TcpConnector.connect`.
      at_once: connects to an IP address without a task, if the connector allows it.
    """

    prepare: Callable[[], Awaitable[None]]
    look_up: Callable[[str], Awaitable[list[SocketAddress]]]
    connect: Callable[
        [Address, list[SocketAddress], float, asyncio.Semaphore], Awaitable[object]
    ]
    at_once: Callable[[SocketAddress, float], asyncio.Future[OSError | None]] | None


@contextlib.asynccontextmanager
async def steps_of(connector: Connector | None) -> AsyncIterator[Steps]:
    """The steps of a connector, which its owner closes, or of a new one."""
    if connector is None:
        async with TcpConnector() as own:
            yield _steps(own)
    else:
        yield _steps(connector)


def _steps(connector: Connector) -> Steps:
    prepare = _nothing
    if isinstance(connector, TcpConnector):
        prepare, kind = connector.prepare, type(connector)
        if kind.__call__ is TcpConnector.__call__:
            at_once = attempt if kind is TcpConnector else None
            return Steps(prepare, connector.look_up, connector.connect, at_once)

    async def connect(address: Address, *_: object) -> None:
        await connector(*address)

    return Steps(prepare, _no_addresses, connect, None)


async def _nothing() -> None:
    pass


async def _no_addresses(_: str) -> list[SocketAddress]:
    return []
