"""Waiting for the coordinator of a cluster before joining it."""

import time
from collections.abc import Callable

from monolith_optax.net._address import parse_address
from monolith_optax.net._arguments import check_positive
from monolith_optax.net._blocking import run_to_end
from monolith_optax.net._cluster import coordinator_addresses
from monolith_optax.net._report import NodeReport, NodesDownError
from monolith_optax.net._wait import wait_for_nodes


def wait_for_coordinator(
    address: str | None = None,
    *,
    process_id: int,
    deadline: float = 300.0,
    timeout: float = 1.0,
    on_progress: Callable[[NodeReport], None] | None = None,
) -> None:
    """Waits until the coordinator of a JAX cluster can be reached.

    Call it before `jax.distributed.initialize`, which would wait without a word and
    then end the whole process. The coordinator is process 0 and starts inside that
    call, so process 0 itself does not wait and returns at once.

    It blocks, also where an event loop is already running. In asynchronous code, await
    `wait_for_nodes([address], deadline=...)` instead.

    Args:
      address: what `jax.distributed.initialize` is given as `coordinator_address`.
        None: the environment variable `JAX_COORDINATOR_ADDRESS`.
      process_id: the number of this process.
      deadline: seconds after which to give up.
      timeout: seconds that each probe may take; name lookup counts.
      on_progress: called with a report after every probe.

    Raises:
      TimeoutError: the coordinator is still down at the deadline. The message has its
        address and the reason; the `NodesDownError` that it comes from has a report.
      ValueError: there is no address or it is malformed, process_id is negative, or
        deadline or timeout is not positive.

    Example:
      >>> wait_for_coordinator("localhost:8476", process_id=0)
      >>> wait_for_coordinator("127.0.0.1:1", process_id=3, deadline=0.1)
      Traceback (most recent call last):
      ...
      TimeoutError: Process 3 waited 0.1 s for the coordinator (process 0) at \
127.0.0.1:1, but it is not up: refused (Connection refused). Start process 0 there, or \
allow it more time.
    """
    check_positive(deadline=deadline, timeout=timeout)
    [address] = coordinator_addresses(address)
    parse_address(address)
    if process_id < 0:
        raise ValueError(f"process_id must not be negative, but it is {process_id}.")
    if process_id == 0:
        return
    start = time.monotonic()
    try:
        run_to_end(
            lambda: wait_for_nodes(
                [address], deadline=deadline, timeout=timeout, on_progress=on_progress
            )
        )
    except NodesDownError as error:
        status, seconds = error.report[address], round(time.monotonic() - start, 1)
        raise TimeoutError(
            f"Process {process_id} waited {seconds:g} s for the coordinator (process "
            f"0) at {address}, but it is not up: {status.reason} ({status.message}). "
            "Start process 0 there, or allow it more time."
        ) from error
