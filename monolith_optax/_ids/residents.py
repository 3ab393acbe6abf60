"""Residents: which rows of the store are on the device, where, and which leave next."""

from typing import Literal, TypeAlias

import numpy as np

Policy: TypeAlias = Literal["lru", "lfu"]

# The order in which rows leave is found for this share of the table at a time.
_SHARE = 8


class Residents:
    """The rows of a table on the device, by the numbers that they have in the store.

    Unknown ids share row 0, on the device and in the store, and it never leaves.

    Args:
      capacity: the number of rows of the table on the device.
      policy: which rows leave first: those that were used longest ago ("lru"), or those
        that were used in the fewest batches since they came ("lfu"), where old uses
        count less and less.
    """

    def __init__(self, capacity: int, policy: Policy) -> None:
        """A table in which only row 0 is in use."""
        self.capacity, self._policy = capacity, policy
        self._rows = np.zeros(1, np.int32)  # on the device, by number; 0: not there
        self._numbers = np.zeros(capacity, np.int32)  # by row; 0: free
        self._last_used = np.zeros(capacity, np.int64)  # by row: the number of a batch
        self._uses = np.zeros(capacity, np.int64)
        self._next_free = 1  # no row from here on was ever in use
        self._freed = np.zeros(0, np.int32)
        self._now = 0
        self._leaving = np.zeros(0, np.int32)  # in this order, unless used since
        self._ordered_at = 0

    def __len__(self) -> int:
        """How many rows are in use, besides row 0."""
        return self._next_free - 1 - len(self._freed)

    @property
    def nbytes(self) -> int:
        """The memory that it takes, in bytes."""
        arrays = self._rows, self._numbers, self._last_used, self._uses
        return sum(array.nbytes for array in arrays)

    def grow(self, size: int) -> None:
        """Makes room for so many numbers."""
        if size > len(self._rows):
            rows = np.zeros(max(size, len(self._rows) * 5 // 4), np.int32)
            rows[: len(self._rows)] = self._rows
            self._rows = rows

    def use(self, numbers: np.ndarray) -> np.ndarray:
        """The rows of a batch, 0 for what is not there. They do not leave for it."""
        self._now += 1
        rows = self.rows(numbers)
        self._last_used[rows] = self._now
        self._uses[rows] += 1
        return rows

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """Where they are; 0 for those that are not there."""
        rows: np.ndarray = self._rows[numbers]
        return rows

    def place(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gives rows to numbers of the batch that are not there yet.

        Returns:
          Their rows, the rows that others leave for them, and the numbers of these.
        """
        free = self._take_free(len(numbers))
        left = self._take_used(len(numbers) - len(free))
        gone = self._numbers[left]
        self._rows[gone] = 0
        rows = np.concatenate([free, left])
        self._rows[numbers], self._numbers[rows] = rows, numbers
        self._last_used[rows], self._uses[rows] = self._now, 1
        return rows, left, gone

    def _take_free(self, wanted: int) -> np.ndarray:
        freed, self._freed = self._freed[:wanted], self._freed[wanted:]
        end = min(self.capacity, self._next_free + wanted - len(freed))
        unused = np.arange(self._next_free, end, dtype=np.int32)
        self._next_free = end
        return np.concatenate([freed, unused])

    def _take_used(self, wanted: int) -> np.ndarray:
        found = [np.zeros(0, np.int32)]
        while wanted:
            if not len(self._leaving):
                self._order(wanted)
            some = self._leaving[: 2 * wanted]
            still = (self._last_used[some] <= self._ordered_at) & (
                self._numbers[some] > 0
            )
            positions = np.flatnonzero(still)[:wanted]
            done = positions[-1] + 1 if len(positions) == wanted else len(some)
            self._leaving = self._leaving[done:]
            found.append(some[positions])
            self._last_used[some[positions]] = self._now  # so it is not found again
            wanted -= len(positions)
        return np.concatenate(found)

    def _order(self, wanted: int) -> None:
        """Finds out which rows leave next, of those that the batch does not use."""
        rows = np.flatnonzero((self._numbers > 0) & (self._last_used < self._now))
        keys = self._last_used[rows]
        if self._policy == "lfu":
            keys += self._uses[rows] << 40
            self._uses >>= 1
        some = min(len(rows), max(wanted, self.capacity // _SHARE))
        if some < len(rows):
            first = np.argpartition(keys, some - 1)[:some]
            rows, keys = rows[first], keys[first]
        self._leaving = rows[np.argsort(keys, kind="stable")].astype(np.int32)
        self._ordered_at = self._now - 1

    def forget(self, numbers: np.ndarray) -> None:
        """Frees the rows of numbers that no longer have an owner."""
        rows = self._rows[numbers]
        rows = rows[rows > 0]
        self._rows[numbers] = 0
        self._numbers[rows] = 0
        self._freed = np.concatenate([self._freed, rows])

    def all(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows in use, row 0 included, and their numbers."""
        rows = np.flatnonzero(self._numbers)
        rows = np.concatenate([np.zeros(1, np.int64), rows]).astype(np.int32)
        return rows, self._numbers[rows]
