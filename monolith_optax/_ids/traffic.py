"""Traffic: batches and their moves between the store and the device, in order."""

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from monolith_optax._ids.cached_ids import CachedIds
from monolith_optax._ids.device_tables import DeviceTables
from monolith_optax._ids.moves import Moves, TableMoves, as_records
from monolith_optax._ids.raw import as_int64
from monolith_optax._public import public

_CHUNK = 2**16  # rows at a time are copied where it may be all of them


@public("monolith_optax")
class CacheCounts(NamedTuple):
    """What a `RowCache` has done, since it was made, in all tables.

    Attributes:
      batches: the batches that `assign` has seen.
      lookups: the positions of batches that had a row of their own.
      hits: the lookups whose row was on the device.
      new: the ids that got a row.
      moved_in: the rows that came from the store.
      moved_out: the rows that left the device.
    """

    batches: int = 0
    lookups: int = 0
    hits: int = 0
    new: int = 0
    moved_in: int = 0
    moved_out: int = 0


class Traffic:
    """Plans the moves of each batch, and makes them in the order of the batches.

    One thread plans, and another one may move what has been planned. They meet in two
    queues: batches whose moves are planned, and moves that have not reached the store.

    Attributes:
      tables: the tables on the device.
      ids: the ids, by name.
      counts: what was done.
      planner: the thread that plans, if another one moves.
    """

    def __init__(self, tables: DeviceTables, ids: dict[str, CachedIds]) -> None:
        """No batches."""
        self.tables, self.ids = tables, ids
        self.counts = CacheCounts()
        self.planner: int | None = None
        self._planned: deque[Moves] = deque()  # but not moved
        self._unsettled: deque[Moves] = deque()  # have not reached the store
        self._number = 0  # of the last batch
        self._half_planned = False

    def plan(
        self, ids: Mapping[str, Any], time: int | None
    ) -> tuple[dict[str, Any], Moves]:
        """The rows of a batch, and its moves."""
        self.check_thread("assign and lookup")
        if self._half_planned:
            raise RuntimeError(
                "An error has stopped this cache amid a batch, so it no longer knows "
                "which rows are where. Continue from the last snapshot."
            )
        if ids.keys() != self.ids.keys():
            raise ValueError(
                f"The batch must have ids of {sorted(self.ids)}, but it has "
                f"{sorted(ids)}."
            )
        batch = {name: _BatchIds(ids[name]) for name in self.ids}
        for name, cached in self.ids.items():
            cached.check(batch[name].flat)
        self._half_planned = True
        self._settle()
        rows: dict[str, Any] = {}
        moves: dict[str, TableMoves] = {}
        for name, cached in self.ids.items():
            earlier = [each.tables[name] for each in reversed(self._unsettled)]
            flat, moves[name], counts = cached.plan(batch[name].flat, time, earlier)
            rows[name] = batch[name].like(flat)
            self._count(counts)
        self._count({"batches": time is not None})
        self._number += 1
        planned = Moves(self._number, moves)
        self._planned.append(planned)
        self._unsettled.append(planned)
        self._half_planned = False
        return rows, planned

    def _count(self, counts: dict[str, int]) -> None:
        more = {name: getattr(self.counts, name) + n for name, n in counts.items()}
        self.counts = self.counts._replace(**more)

    def _settle(self) -> None:
        """Puts into the store what has left the device."""
        while self._unsettled and self._unsettled[0].done:
            moves = self._unsettled.popleft()
            for name, table in moves.tables.items():
                self.ids[name].store.write(table.numbers, table.records())

    def move(self, params: Any, state: Any, moves: Moves) -> tuple[Any, Any]:
        """Makes the moves of the next batch."""
        if not self._planned or self._planned[0] is not moves:
            first = self._planned[0].number if self._planned else "none"
            raise ValueError(
                "Batches must be moved in the order in which assign has seen them, and "
                f"each once: the next one is {first}, but these are the moves of batch "
                f"{moves.number}."
            )
        self.tables.check_sizes(params)
        arrays = {}
        for name, table in moves.tables.items():
            table.fill()
            arrays[name] = table.arrays()
        params, state, left = self.tables.move(params, state, arrays)
        for name, table in moves.tables.items():
            table.hand_back(left[name])
        moves.done = True
        self._planned.popleft()
        return params, state

    def drain(self, params: Any, state: Any) -> tuple[Any, Any]:
        """Makes all moves that are planned."""
        self.check_thread("drain")
        while self._planned:
            params, state = self.move(params, state, self._planned[0])
        return params, state

    def write_back(self, params: Any, state: Any) -> None:
        """Copies the rows on the device into the store, which then has all rows.

        Raises:
          RuntimeError: batches have been assigned and not moved.
        """
        self.check_thread("Saving")
        if self._planned:
            raise RuntimeError(
                f"{len(self._planned)} batches have been assigned but not moved: "
                "train on them, or call drain, before you save."
            )
        self._settle()
        for name, cached in self.ids.items():
            rows, numbers = cached.residents.all()
            for start in range(0, len(rows), _CHUNK):
                some = slice(start, start + _CHUNK)
                padded = np.full(min(_CHUNK, cached.capacity), -1, np.int32)
                padded[: len(rows[some])] = rows[some]
                values = self.tables.read(params, state, {name: padded})[name]
                records = as_records(values, len(rows[some]), cached.record)
                cached.store.write(numbers[some], records)

    def check_thread(self, what: str) -> None:
        """Refuses what would happen at no certain batch."""
        if self.planner not in (None, threading.get_ident()):
            raise RuntimeError(
                f"{what} would meet batches that prefetch is preparing, at no certain "
                "one of them. Call it where the batches come from, or after the loop."
            )

    def check_new(self, what: str) -> None:
        """Refuses what needs a cache without batches and ids."""
        if self._number or any(len(cached.ids) for cached in self.ids.values()):
            raise RuntimeError(f"{what} needs a new cache, but this one was used.")


class _BatchIds:
    """Arrays of ids in a tree, as one array."""

    def __init__(self, tree: Any) -> None:
        leaves, self._structure = jax.tree.flatten(
            tree, is_leaf=lambda node: isinstance(node, list)
        )
        arrays = list(map(as_int64, leaves))
        self._shapes = [array.shape for array in arrays]
        self._ends = np.cumsum([array.size for array in arrays])[:-1]
        self.flat = np.concatenate([np.zeros(0, np.int64), *map(np.ravel, arrays)])

    def like(self, rows: np.ndarray) -> Any:
        """The tree with rows in the place of ids."""
        leaves = map(np.reshape, np.split(rows, self._ends), self._shapes)
        return jax.tree.unflatten(self._structure, list(leaves))
