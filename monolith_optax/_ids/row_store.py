"""RowStore: rows of tables with their slots, in host memory or in files."""

import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

# Rows of the first segment, and of the largest: each has twice as many as the last one
# until then. A small store stays small, and a large one grows by a part of its size.
_FIRST, _MOST = 2**12, 2**22


class RowStore:
    """Records by the number of a row. It grows without moving what is there.

    A record is all that belongs to a row, weights and slots, side by side, so that a
    row that is read from a file costs one access. Rows that were never written are
    zeros.

    Args:
      record: the type of a record, with a field for each leaf.
      folder: where its files are; None: in memory. The files have no names, so the
        system removes them when the process ends, however it ends.
    """

    def __init__(
        self, record: np.dtype[np.void], folder: str | os.PathLike[str] | None = None
    ) -> None:
        """A store of no rows."""
        self.record, self._folder = record, folder
        self._segments: list[np.ndarray] = []
        self._starts = np.zeros(1, np.int64)  # of the segments, and the end of the last

    def __len__(self) -> int:
        """How many rows it has room for."""
        return int(self._starts[-1])

    @property
    def nbytes(self) -> int:
        """The size of the rows that there is room for, in bytes."""
        return len(self) * self.record.itemsize

    def grow(self, size: int) -> None:
        """Makes room for so many rows.

        Raises:
          OSError: the folder has no room for them. The store is as it was.
        """
        while len(self) < size:
            rows = min(_FIRST << len(self._segments), _MOST)
            self._segments.append(self._new_segment(rows))
            self._starts = np.append(self._starts, len(self) + rows)

    def _new_segment(self, rows: int) -> np.ndarray:
        # NumPy copies items of this kind as blocks, and those with fields one by one.
        block = f"V{self.record.itemsize}"
        if self._folder is None:
            return np.zeros(rows, block)
        size = rows * self.record.itemsize
        with tempfile.TemporaryFile(dir=self._folder) as file:
            # A write to a mapped file that finds no room on the disk would be a crash.
            os.posix_fallocate(file.fileno(), 0, size)
            mapped = mmap.mmap(file.fileno(), size)
        mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, block)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The records of some rows."""
        records = np.empty(len(rows), f"V{self.record.itemsize}")
        for segment, positions, inside in self._parts(rows):
            records[positions] = segment.take(inside)
        return records.view(self.record)

    def write(self, rows: np.ndarray, records: np.ndarray) -> None:
        """New records of some rows, no two of them the same."""
        blocks = records.view(f"V{self.record.itemsize}")
        for segment, positions, inside in self._parts(rows):
            segment[inside] = blocks.take(positions)

    def _parts(
        self, rows: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Segments, which of the rows are there, and where."""
        which = np.searchsorted(self._starts, rows, side="right") - 1
        for k in np.flatnonzero(np.bincount(which)):
            positions = np.flatnonzero(which == k)
            yield self._segments[k], positions, rows[positions] - self._starts[k]

    def parts(self, size: int) -> Iterator[np.ndarray]:
        """The first rows in order, as views that may be written to."""
        for start, segment in zip(self._starts, self._segments, strict=False):
            part = segment[: max(0, size - int(start))]
            if len(part):
                yield part.view(self.record)


def record_of(fields: dict[str, Any]) -> np.dtype[np.void]:
    """The type of a record that has something of these types for each row."""
    return np.dtype(
        [(name, leaf.dtype, leaf.shape[1:]) for name, leaf in fields.items()],
        align=True,
    )
