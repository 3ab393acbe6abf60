"""What checks of many nodes report."""

from dataclasses import dataclass
from typing import Any

from monolith_optax._public import public
from monolith_optax.net._probe import NodeStatus
from monolith_optax.net._reason import Reason


@public("monolith_optax.net")
@dataclass(frozen=True, slots=True, repr=False)
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
        """All other addresses; those in `local_faults` may still be up."""
        return [status.address for status in self.results if not status.alive]

    @property
    def local_faults(self) -> list[Any]:
        """The addresses that trouble on this machine prevented us from checking."""
        return [
            status.address
            for status in self.results
            if status.reason is Reason.LOCAL_FAULT
        ]

    @property
    def all_alive(self) -> bool:
        """Whether every node is up; True if there are none."""
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

    def __repr__(self) -> str:
        """Short: `asyncio.run` makes one of every result, and nodes may be many."""
        return f"<NodeReport: {self.count()}>"

    def __str__(self) -> str:
        """How many nodes are up, and a line for each that is not."""
        down = [
            f"\n  {status.address}: {status.reason} ({status.message})"
            for status in self.results
            if not status.alive
        ]
        return self.count() + "".join(down)

    def count(self) -> str:
        """How many nodes are up, in words."""
        return f"{len(self.alive)} of {len(self.results)} up"


@public("monolith_optax.net")
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


@public("monolith_optax.net")
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
