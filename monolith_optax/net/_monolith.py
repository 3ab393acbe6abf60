"""Monolith's node checker, a synchronous face on the asynchronous one."""

from collections.abc import Collection, Iterable
from typing import Any

from monolith_optax._public import public
from monolith_optax.net._arguments import check_bound, check_iterable
from monolith_optax.net._blocking import run_to_end
from monolith_optax.net._report import NodeReport
from monolith_optax.net._round import check_nodes


@public("monolith_optax.net")
class NodeAliveChecker:
    """Monolith's node checker: probes all addresses when it is made.

    It also works where an event loop is already running, in a notebook for instance.
    In asynchronous code, await `check_nodes` instead.

    Args:
      addrs: the addresses, see `parse_address`.
      timeout: seconds that each probe may take; name lookup counts.
      num_thread: how many probes may run at a time. None: as many as the limit on open
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
        check_iterable(addrs)
        self._addrs = addrs if isinstance(addrs, Collection) else list(addrs)
        self._timeout = timeout
        self._num_thread = num_thread
        check_bound(num_thread=num_thread)
        self.check()

    def check(self) -> NodeReport:
        """Probes all addresses again and returns the new report."""
        self.report = run_to_end(
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
