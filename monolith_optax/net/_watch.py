"""Rounds of probes that report each node that goes up or down."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from monolith_optax.net._arguments import (
    check_at_least_one,
    check_bound,
    check_positive,
    targets_of,
)
from monolith_optax.net._connect import Connector
from monolith_optax.net._reason import Reason
from monolith_optax.net._report import Transition
from monolith_optax.net._round import probe_all
from monolith_optax.net._steps import steps_of


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
    """Watches nodes and reports when one goes up or down.

    Every node is probed once in each interval, or as often as the slowest probe of a
    round allows. The first verdict on a node counts as a transition. Trouble on this
    machine is logged and counts neither for nor against a node.

    Args:
      addrs: the addresses, see `parse_address`.
      interval: seconds from one round of probes to the next.
      failure_threshold: how many probes in a row must fail before a node is down.
      success_threshold: how many probes in a row must succeed before a node is up.
      timeout: seconds that each probe may take; name lookup counts.
      max_concurrency: how many probes may run at a time. None: as many as the limit on
        open files allows.
      connector: how to connect: `HttpConnector`, or a stand-in for `TcpConnector`.

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
    targets = targets_of(addrs)
    check_positive(interval=interval, timeout=timeout)
    check_bound(max_concurrency=max_concurrency)
    check_at_least_one(
        failure_threshold=failure_threshold, success_threshold=success_threshold
    )
    thresholds = {True: success_threshold, False: failure_threshold}

    async def watch() -> AsyncGenerator[Transition, None]:
        clock = asyncio.get_running_loop().time
        known: dict[Any, bool] = {}
        streaks: dict[Any, tuple[bool, int]] = {}
        async with steps_of(connector) as steps:
            while True:
                start = clock()
                report = await probe_all(targets, timeout, max_concurrency, steps)
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
