"""IdMap: rows of a table for 64-bit ids, given out, looked up and taken back."""

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from monolith_optax._ids.arrays import DTYPES, problems
from monolith_optax._ids.index import NOTHING, IdIndex
from monolith_optax._ids.raw import as_int64
from monolith_optax._ids.row_order import Ascending, RowOrder, Spreading
from monolith_optax._public import public


@public("monolith_optax")
class IdMap:
    """Rows of an embedding table for 64-bit ids, on the host.

    JAX has no 64-bit integers by default and no tables that grow, so raw ids stay in
    the input pipeline, and the model gets rows. An id gets a row when it has been seen
    `admit_after` times; until then, and when all rows are taken, it has row 0, which
    all unknown ids share and which is trained like any other row.

    The map is deterministic: the same calls give the same rows on every machine. It is
    for one thread at a time.

    Args:
      capacity: the number of rows of the table. Unknown ids share row 0, so at
        most `capacity - 1` ids have a row at a time.
      admit_after: how many times an id must be seen before it gets a row. Repeats
        within a batch count. If it is more than 1, ids without a row take memory as
        well, until they expire.
      spread: whether the rows that are handed out one after the other are spread over
        the table, instead of the smallest first. A table that is split over devices is
        then used evenly by all of them, however many there are, while it fills up. The
        table must have all of its rows from the beginning.

    Attributes:
      capacity: the number of rows of the table.
      admit_after: how many times an id must be seen before it gets a row.
      spread: whether rows are handed out all over the table.
      nbytes: the memory that the map takes, in bytes.

    Raises:
      ValueError: `capacity` is not from 1 to 2147483647, or `admit_after` is not from
        1 to 2147483647.

    Example:
      >>> from monolith_optax import IdMap
      >>> ids = IdMap(capacity=1000)
      >>> rows, fresh = ids.assign([[2**60, 7], [7, 8]], time=1_700_000_000)
      >>> print(rows, fresh)
      [[1 2]
       [2 3]] [ 1  2  3 -1]
      >>> print(ids.lookup([8, 9]), len(ids), 2**60 in ids)
      [3 0] 3 True
      >>> print(ids.expire(before=1_700_000_001))
      [1 2 3]

    References:
      Liu et al., 2022: [Monolith](https://arxiv.org/abs/2209.07663), section 2.2.1.
    """

    def __init__(
        self, capacity: int, *, admit_after: int = 1, spread: bool = False
    ) -> None:
        """A map of no ids."""
        self.capacity = _positive("capacity", capacity)
        self.admit_after = _positive("admit_after", admit_after)
        self.spread = bool(spread)
        self._order: RowOrder = Spreading(self.capacity) if spread else Ascending()
        self._index = IdIndex()
        self._size = 1  # of the entries in use
        self._ids = np.zeros(1, np.int64)
        # The row of an entry; minus how often it was seen if it has none yet.
        self._rows = np.zeros(1, np.int32)
        self._last_seen = np.zeros(1, np.int64)
        # Ranks of rows in the order in which they are handed out.
        self._next_rank = 1  # none from here on has had an owner
        self._freed = np.zeros(0, np.int32)  # those that had one, largest first

    def assign(
        self, raw: Any, *, time: int = 0
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The rows of ids, after giving rows to those that are due.

        Ids get rows in the order in which they first appear in the batch, each the
        smallest that is free or, with `spread`, the first in its order that is.

        Args:
          raw: 64-bit ids, signed or unsigned, of any shape. An unsigned id is the same
            as the signed one of the same bits.
          time: when the batch was seen, in any unit that never needs a fraction, such
            as seconds since 1970. Only `expire` looks at it.

        Returns:
          `rows`, int32, of the shape of `raw`: what the model looks up. `fresh`, int32,
          of shape (raw.size,): the rows whose owner is new, to be reset before this
          batch is trained on, padded with -1 so that its shape depends only on
          the size of `raw`.

        Raises:
          TypeError: `raw` does not consist of integers, or `time` is not one.
          ValueError: an integer does not fit into 64 bits.
        """
        ids = as_int64(raw)
        time = _time(time)
        flat = ids.reshape(-1)
        entries = self._index.find(flat, self._ids)
        rows = np.maximum(self._rows[entries], 0)
        fresh = np.full(flat.size, -1, np.int32)
        known = entries[entries != NOTHING]
        self._last_seen[known] = np.maximum(self._last_seen[known], time)
        rowless = np.flatnonzero(rows == 0)
        if rowless.size:
            distinct, first, place, times = _in_order_of_appearance(flat[rowless])
            given = self._see(distinct, entries[rowless[first]], times, time)
            rows[rowless] = given[place]
            new = given[given > 0]
            fresh[: new.size] = new
        return rows.reshape(ids.shape), fresh

    def _see(
        self, ids: np.ndarray, entries: np.ndarray, times: np.ndarray, time: int
    ) -> np.ndarray:
        """Counts distinct ids without a row; returns the rows that they get, or 0."""
        # Counts stop at admit_after, so they never overflow.
        counts = np.minimum(times - self._rows[entries], self.admit_after)
        due = np.flatnonzero(counts == self.admit_after)
        rows = np.zeros(len(ids), np.int32)
        taken = self._take_rows(len(due))
        rows[due[: len(taken)]] = taken
        # An id that would get a row at its next sight anyway needs no count.
        counts = np.minimum(counts, self.admit_after - 1).astype(np.int32)
        values = np.where(rows > 0, rows, -counts)
        known = entries != NOTHING
        self._rows[entries[known]] = values[known]
        self._append(~known & (values != 0), ids, values, time)
        return rows

    def _take_rows(self, wanted: int) -> np.ndarray:
        """Up to that many free rows, the first of their order."""
        reused = self._freed[::-1][:wanted]
        self._freed = self._freed[: len(self._freed) - len(reused)]
        end = min(self.capacity, self._next_rank + wanted - len(reused))
        unused = np.arange(self._next_rank, end, dtype=np.int32)
        self._next_rank = end
        return self._order.rows(np.concatenate([reused, unused]))

    def _append(
        self, which: np.ndarray, ids: np.ndarray, rows: np.ndarray, time: int
    ) -> None:
        """Makes new entries."""
        start, stop = self._size, self._size + int(np.count_nonzero(which))
        if stop > len(self._ids):
            self._resize(max(stop, start + start // 4))
        self._ids[start:stop] = ids[which]
        self._rows[start:stop] = rows[which]
        self._last_seen[start:stop] = time
        self._size = stop
        self._index.insert(start, stop, self._ids)

    def _resize(self, size: int) -> None:
        for name in ("_ids", "_rows", "_last_seen"):
            old = getattr(self, name)
            new = np.zeros(size, old.dtype)
            new[: self._size] = old[: self._size]
            setattr(self, name, new)

    def lookup(self, raw: Any) -> NDArray[np.int32]:
        """The rows of ids; 0 for those that have none. Changes nothing.

        Args:
          raw: 64-bit ids, signed or unsigned, of any shape.

        Returns:
          int32, of the shape of `raw`.

        Raises:
          TypeError: `raw` does not consist of integers.
          ValueError: an integer does not fit into 64 bits.
        """
        ids = as_int64(raw)
        entries = self._index.find(ids.reshape(-1), self._ids)
        rows: NDArray[np.int32] = np.maximum(self._rows[entries], 0)
        return rows.reshape(ids.shape)

    def expire(self, *, before: int) -> NDArray[np.int32]:
        """Forgets the ids that were last seen before a time, and frees their rows.

        Ids that have no row yet and were not seen since are forgotten as well, with
        their counts. Call it after training on every batch that `assign` or `lookup`
        has turned into rows: a batch in flight would train rows of others.

        Args:
          before: ids seen at this time or later stay.

        Returns:
          The rows that are free now, int32, ascending.

        Raises:
          TypeError: `before` is not an integer.
          ValueError: it does not fit into 64 bits.
        """
        keep = self._last_seen[: self._size] >= _time(before)
        keep[NOTHING] = True
        rows = self._rows[: self._size][~keep]
        freed = np.sort(rows[rows > 0])
        if not keep.all():
            entries = {name: x[keep] for name, x in self._entries().items()}
            self._set_entries(**entries)
            ranks = np.concatenate([self._freed, self._order.ranks(freed)])
            self._freed = np.sort(ranks)[::-1]
        return freed

    def __len__(self) -> int:
        """How many ids have a row."""
        return self._next_rank - 1 - len(self._freed)

    def __contains__(self, raw: object) -> bool:
        """Whether an id has a row."""
        return bool(self.lookup(raw) > 0)

    def items(self) -> Iterator[tuple[int, int]]:
        """The ids, as signed integers, with their rows, in no particular order.

        `to_arrays` gives them many times faster.
        """
        entries = np.flatnonzero(self._rows > 0)
        ids, rows = self._ids[entries], self._rows[entries]
        return zip(ids.tolist(), rows.tolist(), strict=True)

    @property
    def nbytes(self) -> int:
        """The memory that the map takes, in bytes."""
        arrays = self._index, self._ids, self._rows, self._last_seen, self._freed
        return sum(array.nbytes for array in arrays)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The whole map, as arrays that any checkpoint library can save.

        Returns:
          Copies: `ids` (int64), `rows` (int32, 0 for ids that have none yet), `counts`
          (int32, how often those were seen, else 0) and `last_seen` (int64), all of
          shape (n,); `capacity`, `admit_after` and, only of a map with `spread`, a 1 of
          that name (int64, shape ()). The first of the n stands for the unknown row, so
          that no array is ever empty.
        """
        numbers = {"capacity": self.capacity, "admit_after": self.admit_after}
        if self.spread:
            numbers["spread"] = 1
        of_map = {name: np.asarray(n, np.int64) for name, n in numbers.items()}
        return {**self._entries(), **of_map}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> "IdMap":
        """The map that `to_arrays` described, which continues as the original would.

        With a larger `capacity` in the arrays the map is of a table that has grown: ids
        keep their rows, and all other rows are free.

        Args:
          arrays: what `to_arrays` returned. An id of row 0 and count 0 is skipped.

        Raises:
          ValueError: an array is missing or of another shape or dtype, a row or a count
            is out of range, or an id or a row is there twice.
        """
        if problem := next(problems(arrays), None):
            raise ValueError(f"These are not the arrays of an IdMap. {problem}")
        self = cls(
            int(arrays["capacity"]),
            admit_after=int(arrays["admit_after"]),
            spread=bool(arrays.get("spread", False)),
        )
        entries = {name: np.asarray(arrays[name]) for name in DTYPES}
        used = (entries["rows"] > 0) | (entries["counts"] > 0)
        unknown_row_first = np.concatenate([[NOTHING], np.flatnonzero(used)])
        entries = {name: x[unknown_row_first] for name, x in entries.items()}
        for array in entries.values():
            array[NOTHING] = 0
        self._set_entries(**entries)
        ranks = self._order.ranks(entries["rows"])
        self._next_rank = int(ranks.max()) + 1
        free = np.ones(self._next_rank, bool)
        free[ranks] = False
        self._freed = np.flatnonzero(free)[::-1].astype(np.int32)
        return self

    def views(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids, rows (not positive where there is none) and times, not copied."""
        some = slice(self._size)
        return self._ids[some], self._rows[some], self._last_seen[some]

    def __reduce__(self) -> tuple[Callable[..., "IdMap"], tuple[Any, ...]]:
        """Pickles the arrays."""
        return IdMap.from_arrays, (self.to_arrays(),)

    def _entries(self) -> dict[str, np.ndarray]:
        rows = self._rows[: self._size]
        return {
            "ids": self._ids[: self._size].copy(),
            "rows": np.maximum(rows, 0),
            "counts": np.maximum(-rows, 0),
            "last_seen": self._last_seen[: self._size].copy(),
        }

    def _set_entries(
        self,
        ids: np.ndarray,
        rows: np.ndarray,
        counts: np.ndarray,
        last_seen: np.ndarray,
    ) -> None:
        self._ids, self._last_seen = ids, last_seen
        self._rows = np.where(counts > 0, -counts, rows)
        self._size = len(ids)
        self._index = IdIndex()
        self._index.insert(NOTHING + 1, len(ids), ids)


def _in_order_of_appearance(
    ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids, their first positions, each position's id, and their counts."""
    distinct, first, place, times = np.unique(
        ids, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return distinct[order], first[order], rank[place], times[order]


def _positive(name: str, value: int) -> int:
    value = operator.index(value)
    if not 1 <= value < 2**31:
        raise ValueError(f"{name} must be from 1 to {2**31 - 1}, but it is {value}.")
    return value


def _time(time: int) -> int:
    time = operator.index(time)
    if not -(2**63) <= time < 2**63:
        raise ValueError(f"A time must fit into 64 bits, but this one is {time}.")
    return time
