"""Ids whose rows are partly on the device: their numbers, their rows, their store."""

import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from monolith_optax._ids.id_map import IdMap
from monolith_optax._ids.moves import TableMoves
from monolith_optax._ids.residents import Policy, Residents
from monolith_optax._ids.row_store import RowStore

# First weights of a leaf of params: a number, or a function of ids and a row's shape.
Init = float | Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


class CachedIds:
    """The ids of one or more tables on the device that look up the same ids.

    Each id has a number, as `IdMap` gives rows to ids, which is where its record is in
    the store, and a row on the device while it is there.

    Args:
      name: what the caller calls them.
      capacity: the number of rows of the tables on the device.
      record: the type of the records of the store.
      inits: by leaf of params, how its rows begin, and the shape of a row.
      admit_after: how often an id must be seen before it gets a row.
      policy: which rows leave the device first.
      folder: where the store is; None: in memory.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        record: np.dtype[np.void],
        inits: dict[int, tuple[Init, tuple[int, ...]]],
        *,
        admit_after: int,
        policy: Policy,
        folder: str | os.PathLike[str] | None,
    ) -> None:
        """No ids."""
        self.name, self.capacity, self.record = name, capacity, record
        self._inits = inits
        self.ids = IdMap(2**31 - 1, admit_after=admit_after)
        self.residents = Residents(capacity, policy)
        self.store = RowStore(record, folder)
        self.grow(1)

    @property
    def numbers(self) -> int:
        """No number from here on has belonged to an id."""
        return self.ids._next_rank

    @property
    def nbytes(self) -> int:
        """The memory of ids and store, in bytes."""
        return self.ids.nbytes + self.residents.nbytes + self.store.nbytes

    def grow(self, numbers: int) -> None:
        """Makes room for so many numbers."""
        self.store.grow(numbers)
        self.residents.grow(numbers)

    def check(self, ids: np.ndarray) -> None:
        """That the ids of a batch fit on the device, before anything changes.

        Raises:
          ValueError: there are too many.
          OSError: the store's folder has no room for new ones.
        """
        if ids.size >= self.capacity:
            distinct = len(np.unique(ids))
            if distinct >= self.capacity:
                raise ValueError(
                    f"The batch has {distinct} distinct ids of {self.name!r}, but its "
                    f"tables have {self.capacity} rows, and unknown ids share row 0: "
                    f"give tables of {distinct + 1} rows or more, or smaller batches."
                )
        self.grow(self.numbers + ids.size)

    def plan(
        self, ids: np.ndarray, time: int | None, earlier: Iterable[TableMoves]
    ) -> tuple[np.ndarray, TableMoves, dict[str, int]]:
        """The rows of a batch, and the moves that bring them to the device.

        Args:
          ids: the ids of the batch, int64, (n,), which `check` has found to fit.
          time: when the batch was seen. None: look ids up, and let unknown ones be.
          earlier: moves that have not reached the store, from the latest on.

        Returns:
          The rows, the moves, and what to count.
        """
        fresh = np.zeros(0, np.int32)
        if time is None:
            numbers = self.ids.lookup(ids)
        else:
            numbers, fresh = self.ids.assign(ids, time=time)
        rows = self.residents.use(numbers)
        missing = np.flatnonzero((rows == 0) & (numbers > 0))
        distinct, first = np.unique(numbers[missing], return_index=True)
        placed, left, gone = self.residents.place(distinct)
        rows[missing] = self.residents.rows(numbers[missing])

        order = np.argsort(gone)
        moves = TableMoves(left[order], gone[order], self.record)
        new = np.isin(distinct, fresh)
        moves.fresh, moves.coming = placed[new], placed[~new]
        moves.first = self._first(ids[missing[first[new]]], ids.size)
        moves.values = np.zeros(ids.size, self.record)
        coming = distinct[~new]
        stored = moves.take(coming, earlier)
        moves.values[stored] = self.store.read(coming[stored])
        with_row = int(np.count_nonzero(numbers))
        return (
            rows,
            moves,
            {
                "lookups": with_row,
                "hits": with_row - len(missing),
                "new": len(moves.fresh),
                "moved_in": len(coming),
                "moved_out": len(left),
            },
        )

    def _first(self, ids: np.ndarray, length: int) -> dict[int, Any]:
        """The first weights of new ids, filled up to a length."""
        first: dict[int, Any] = {}
        for leaf, (init, shape) in self._inits.items():
            if callable(init):
                rows = np.asarray(init(ids, shape))
                if rows.shape != (len(ids), *shape):
                    raise ValueError(
                        f"init must return rows of shape {(len(ids), *shape)} for "
                        f"{len(ids)} ids of {self.name!r} and rows of shape {shape}, "
                        f"but it returned {rows.shape}."
                    )
                first[leaf] = np.zeros((length, *shape), rows.dtype)
                first[leaf][: len(ids)] = rows
            else:
                first[leaf] = np.float32(init)
        return first

    def expire(self, before: int) -> int:
        """Forgets ids that were last seen before a time; how many had a row."""
        numbers = self.ids.expire(before=before)
        self.residents.forget(numbers)
        return len(numbers)
