"""What a batch moves between the store and the device before it is trained on."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from monolith_optax._public import public


class TableMoves:
    """The moves of the tables that share their ids.

    Args:
      leaving: the rows that leave the device.
      numbers: the numbers of these in the store, which must ascend.
      record: the type of a record of the store.
    """

    def __init__(
        self, leaving: np.ndarray, numbers: np.ndarray, record: np.dtype[np.void]
    ) -> None:
        """Moves that only take rows off the device."""
        self.leaving, self.numbers, self._record = leaving, numbers, record
        self.coming = self.fresh = np.zeros(0, np.int32)
        self.values = np.zeros(0, record)  # of the rows that come
        self.first: dict[int, Any] = {}  # by leaf: the weights of fresh rows
        # Positions of rows that come whose values others hand back, and which.
        self._pending: list[tuple[np.ndarray, TableMoves, np.ndarray]] = []
        # What has left, by field, when it has: arrays of the device.
        self._left: dict[str, Any] = {}
        self._left_records: np.ndarray | None = None

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """The positions in `leaving` of what has these numbers, or -1."""
        if not len(self.numbers):
            return np.full(len(numbers), -1)
        positions = np.searchsorted(self.numbers, numbers)
        positions = np.minimum(positions, len(self.numbers) - 1)
        return np.where(self.numbers[positions] == numbers, positions, -1)

    def take(self, numbers: np.ndarray, earlier: Iterable["TableMoves"]) -> np.ndarray:
        """Leaves values that earlier moves hand back to them, the latest first.

        Args:
          numbers: of the rows that come.
          earlier: moves that have not reached the store, from the latest on.

        Returns:
          The positions of the rows that are in the store.
        """
        left = np.arange(len(numbers))
        for moves in earlier:
            found = moves.find(numbers[left])
            if (theirs := found >= 0).any():
                self._pending.append((left[theirs], moves, found[theirs]))
                left = left[~theirs]
        return left

    def fill(self) -> None:
        """Waits for the values that other moves hand back."""
        for positions, moves, theirs in self._pending:
            self.values[positions] = moves.records()[theirs]
        self._pending = []

    def arrays(self) -> dict[str, Any]:
        """What the device needs, filled up to the number of ids in the batch."""
        names = self._record.names or ()
        return {
            "leaving": self._padded(self.leaving),
            "coming": self._padded(self.coming),
            "fresh": self._padded(self.fresh),
            "values": {name: np.ascontiguousarray(self.values[name]) for name in names},
            "first": self.first,
        }

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        padded = np.full(len(self.values), -1, np.int32)
        padded[: len(rows)] = rows
        return padded

    def hand_back(self, left: dict[str, Any]) -> None:
        """What has left, by field, as arrays that the device may still compute."""
        for rows in left.values():
            rows.copy_to_host_async()
        self._left = left

    def records(self) -> np.ndarray:
        """What has left, as records; waits for the device."""
        if self._left_records is None:
            self._left_records = as_records(self._left, len(self.leaving), self._record)
        return self._left_records


@public("monolith_optax")
class Moves:
    """What `RowCache.move` does before a batch is trained on.

    Attributes:
      fresh: by name of ids, the rows whose ids are new in this batch.
    """

    def __init__(self, number: int, tables: dict[str, TableMoves]) -> None:
        """The moves of a batch of this number."""
        self.number, self.tables = number, tables
        self.fresh = {name: table.fresh for name, table in tables.items()}
        self.done = False


def as_records(
    values: dict[str, Any], count: int, record: np.dtype[np.void]
) -> np.ndarray:
    """The first rows of arrays, by field, as records; waits for the device."""
    records = np.zeros(count, record)
    for field, rows in values.items():
        records[field] = np.asarray(rows)[:count]
    return records
