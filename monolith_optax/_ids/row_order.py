"""In which order the rows of a table are handed out."""

from typing import Protocol

import numpy as np


class RowOrder(Protocol):
    """The row of each rank, and the rank of each row; rank 0 is row 0."""

    def rows(self, ranks: np.ndarray) -> np.ndarray:
        """The rows of ranks, int32."""

    def ranks(self, rows: np.ndarray) -> np.ndarray:
        """The ranks of rows, int32."""


class Ascending:
    """The smallest row first."""

    def rows(self, ranks: np.ndarray) -> np.ndarray:
        """The same numbers."""
        return ranks

    def ranks(self, rows: np.ndarray) -> np.ndarray:
        """The same numbers."""
        return rows


class Spreading:
    """Rows that follow each other in the order are far from each other in the table.

    Row `k * step % capacity` comes after `k` others. With a good step, as many of any
    consecutive ones fall into one block of rows as into another of its size, up to a
    few, however many blocks there are. So the order does not depend on the number of
    devices.
    """

    def __init__(self, capacity: int) -> None:
        """The order of the rows of a table."""
        self._capacity = capacity
        self._step = good_step(capacity)
        self._inverse = pow(self._step, -1, capacity)

    def rows(self, ranks: np.ndarray) -> np.ndarray:
        """The rows of ranks, int32."""
        return self._times(ranks, self._step)

    def ranks(self, rows: np.ndarray) -> np.ndarray:
        """The ranks of rows, int32."""
        return self._times(rows, self._inverse)

    def _times(self, numbers: np.ndarray, factor: int) -> np.ndarray:
        # Both are below 2**31, so that no product overflows.
        return (numbers.astype(np.int64) * factor % self._capacity).astype(np.int32)


def good_step(capacity: int) -> int:
    """A step whose multiples, modulo the capacity, are spread evenly.

    Rows come near each other after as many steps as the denominator of a fraction that
    is close to `step / capacity`. No fraction with a small one is, if all partial
    quotients of the continued fraction are small. Those of the golden section are 1;
    of the whole numbers near it, the one whose greatest is the smallest is taken.
    """
    golden = capacity * 618_033_989 // 10**9
    around = range(max(golden - _TRIED, 1), min(golden + _TRIED, capacity) + 1)
    return min(around, key=lambda step: (_greatest_quotient(step, capacity), step))


_TRIED = 500


def _greatest_quotient(step: int, capacity: int) -> int:
    """Of the continued fraction; the capacity if they have a factor in common."""
    greatest, a, b = 1, capacity, step
    while b:
        greatest = max(greatest, a // b) if a % b or b == 1 else capacity
        a, b = b, a % b
    return greatest
