"""RowCache: tables larger than the device."""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import optax

from monolith_optax._ids import snapshots
from monolith_optax._ids.cached_ids import CachedIds
from monolith_optax._ids.device_tables import DeviceTables
from monolith_optax._ids.moves import Moves
from monolith_optax._ids.residents import Policy
from monolith_optax._ids.row_store import record_of
from monolith_optax._ids.run_ahead import run_ahead
from monolith_optax._ids.traffic import CacheCounts, Traffic
from monolith_optax._public import public

Params = TypeVar("Params")
State = TypeVar("State")
Batch = TypeVar("Batch")


@public("monolith_optax")
class RowCache:
    """Embedding tables larger than the device, by 64-bit ids.

    The tables in params are on the device: they hold the rows in use, with all
    slots of the optimizer. A store in host memory, or in files, holds all others. For
    each batch `assign` gives ids their rows, and says which rows must come and which
    leave; `move` does that, before the batch is trained on.

    Training ends with the bits of tables that hold everything, whatever the size of
    those on the device, if the optimizer treats rows by themselves and the batches are
    the same. Ids get rows as `IdMap` gives them: unknown ids share row 0, on the
    device as well.

    A cache is for one thread at a time; `prefetch` has a thread of its own.

    Args:
      tx: the optimizer.
      params: the parameters, with tables of the size that the device shall have: more
        rows than a batch has distinct ids. Row 0 begins as it is here.
      tables: a tree that is a prefix of params: what the ids are called that look up a
        table, and None for leaves that are not such tables. Tables with the same name
        share their ids.
      init: a tree that is a prefix of params: how rows of new ids begin. A number, or a
        function as `uniform_rows` makes them, which takes ids, int64 of shape (k,), and
        the shape of a row, and returns k rows that depend on nothing else.
      admit_after: how often an id must be seen before it gets a row, as in `IdMap`.
      policy: which rows leave first: "lru", those not used for the longest time, or
        "lfu", those used in the fewest batches lately.
      folder: a folder for the store, for more rows than fit in memory. None: in memory.

    Raises:
      ValueError: a tree is not a prefix of params, tables that share their ids have
        different numbers of rows, or a table is divided over devices.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowCache, embedding, lazy_rows, uniform_rows
      >>> tx = lazy_rows(embedding.adagrad(0.1))
      >>> params = {"items": jnp.zeros((3, 2)), "bias": jnp.zeros(())}
      >>> state = tx.init(params)
      >>> cache = RowCache(
      ...     tx, params, {"items": "item", "bias": None}, init=uniform_rows(0.05)
      ... )
      >>> for batch in [2**60, 7], [8, 7], [2**60, 7]:
      ...     rows, moves = cache.assign({"item": batch})
      ...     params, state = cache.move(params, state, moves)
      ...     print(rows["item"], cache.counts.moved_in, cache.counts.moved_out)
      [1 2] 0 0
      [1 2] 0 1
      [1 2] 1 2
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        params: Any,
        tables: Any,
        *,
        init: Any = 0.0,
        admit_after: int = 1,
        policy: Policy = "lru",
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        """A cache of no ids."""
        if policy not in ("lru", "lfu"):
            raise ValueError(f'policy must be "lru" or "lfu", but it is {policy!r}.')
        on_device = DeviceTables(tx, params, tables)
        inits = on_device.inits(init, params)
        ids = {
            name: CachedIds(
                name,
                capacity,
                record_of(on_device.fields[name]),
                inits[name],
                admit_after=admit_after,
                policy=policy,
                folder=folder,
            )
            for name, capacity in on_device.capacities.items()
        }
        self._traffic = Traffic(on_device, ids)

    def assign(
        self, ids: Mapping[str, Any], *, time: int = 0
    ) -> tuple[dict[str, Any], Moves]:
        """The rows of the ids of a batch, after giving rows to those that are due.

        Args:
          ids: by name, 64-bit ids, signed or unsigned: an array of any shape, or a
            dictionary or tuple of such arrays.
          time: when the batch was seen, as for `IdMap.assign`.

        Returns:
          `rows`: the same with int32 rows, which the model looks up. `moves`: what
          `move` must do before this batch is trained on.

        Raises:
          ValueError: there are more distinct ids than rows on the device. Nothing has
            changed, and training may continue with another batch.
        """
        return self._traffic.plan(ids, time)

    def lookup(self, ids: Mapping[str, Any]) -> tuple[dict[str, Any], Moves]:
        """The rows of ids, for batches that are not trained on.

        As `assign`, but ids without a row get none, and their times stay. Rows move to
        the device all the same, so `move` must be called.
        """
        return self._traffic.plan(ids, None)

    def move(self, params: Params, state: State, moves: Moves) -> tuple[Params, State]:
        """Brings rows to the device, before their batch is trained on.

        One jitted function, whose shapes depend only on the shapes of the batch, reads
        the rows that leave and writes the rows that come, also for new ids.

        Args:
          params: the parameters. They and the state are donated: use what is returned.
          state: the optimizer's state.
          moves: of the first batch that has been assigned and not moved. Each
            batch must be moved, and trained on, in the order of `assign`.

        Returns:
          The params and state to train the batch on.

        Raises:
          ValueError: the moves of another batch must be made first, or these have been
            made before.
        """
        moved: tuple[Params, State] = self._traffic.move(params, state, moves)
        return moved

    def drain(self, params: Params, state: State) -> tuple[Params, State]:
        """Moves all batches that have been assigned and not moved.

        After leaving a `prefetch` early, so that the cache can be used further. Ids of
        these batches count as seen, but nothing was trained on them.

        Args:
          params: the parameters, which are donated with the state.
          state: the optimizer's state.

        Returns:
          The params and the state.
        """
        drained: tuple[Params, State] = self._traffic.drain(params, state)
        return drained

    def expire(self, *, before: int) -> dict[str, int]:
        """Forgets the ids that were last seen before a time.

        Batches that have been assigned keep their rows until they are trained on, since
        moves keep the order. With `prefetch`, call it where the batches come from.

        Args:
          before: ids seen at this time or later stay.

        Returns:
          By name, how many ids have lost their row.
        """
        self._traffic.check_thread("expire")
        return {name: ids.expire(before) for name, ids in self._traffic.ids.items()}

    def prefetch(
        self,
        batches: Iterable[Batch],
        ids: Callable[[Batch], Mapping[str, Any]],
        *,
        time: Callable[[Batch], int] | None = None,
        depth: int = 2,
    ) -> Iterator[tuple[Batch, dict[str, Any], Moves]]:
        """Prepares the next batches in a thread while one is trained on.

        Batches come in order, and an error, of `batches` too, is raised in the place of
        the batch that it belongs to. The thread ends with the loop, also by `break` or
        Ctrl-C; batches that were ready by then are for `drain`.

        Args:
          batches: what to train on. It is iterated over in the thread.
          ids: the ids of a batch, as for `assign`.
          time: the time of a batch, as for `assign`. None: always 0.
          depth: how many batches are ready at most.

        Returns:
          An iterator over batches with their rows and moves.

        Raises:
          ValueError: depth is less than 1.

        Example:
          >>> import jax.numpy as jnp
          >>> import numpy as np
          >>> from monolith_optax import RowCache, embedding, lazy_rows
          >>> tx = lazy_rows(embedding.sgd(0.1))
          >>> table = jnp.zeros((3, 2))
          >>> state = tx.init(table)
          >>> cache = RowCache(tx, table, "item")
          >>> batches = np.arange(6).reshape(3, 2)
          >>> for batch, rows, moves in cache.prefetch(batches, lambda b: {"item": b}):
          ...     table, state = cache.move(table, state, moves)
          ...     print(batch, rows["item"])
          [0 1] [1 2]
          [2 3] [1 2]
          [4 5] [1 2]
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, but it is {depth}.")

        def planned() -> Generator[tuple[Batch, dict[str, Any], Moves], None, None]:
            self._traffic.check_thread("prefetch")
            self._traffic.planner = threading.get_ident()
            try:
                for batch in batches:
                    now = 0 if time is None else time(batch)
                    yield batch, *self.assign(ids(batch), time=now)
            finally:
                self._traffic.planner = None

        return run_ahead(planned(), depth)

    def save(self, folder: str | os.PathLike[str], params: Any, state: Any) -> None:
        """Saves all rows, those on the device included, and everything else.

        Call it between batches, when no `prefetch` is running: give it as many batches
        as there are between snapshots. `restore` continues to the same bits. The
        snapshot takes the place of the last one in its folder when all of it is on the
        disk, so a process may be killed at any moment. It needs room for two, and, for
        the time of saving, 24 bytes of memory for each id.

        Args:
          folder: where snapshots are. It is made if there is none.
          params: the parameters after the last batch.
          state: the optimizer's state.

        Raises:
          RuntimeError: batches have been assigned and not moved.
          OSError: the snapshot cannot be written. The last one is as it was.
        """
        self._traffic.write_back(params, state)
        snapshots.save(
            folder,
            self._traffic.tables,
            self._traffic.ids,
            params,
            state,
            self.counts.batches,
        )

    def restore(
        self, folder: str | os.PathLike[str], params: Params, state: State
    ) -> tuple[Params, State]:
        """Continues from the last complete snapshot of a folder.

        Tables on the device may have another number of rows than when it was saved, and
        begin without any. `counts.batches` is what it was; all other counts begin anew.

        Args:
          folder: where snapshots are.
          params: the parameters; only their types and row 0 are used. They and the
            state are donated.
          state: the optimizer's state.

        Returns:
          The params and the state after the last batch before the snapshot.

        Raises:
          FileNotFoundError: there is no complete snapshot.
          RuntimeError: this cache has been used before.
          ValueError: the snapshot is of other tables or another optimizer.
        """
        self._traffic.check_new("restore")
        params, state, batches = snapshots.restore(
            folder, self._traffic.tables, self._traffic.ids, params, state
        )
        self._traffic.counts = CacheCounts(batches=batches)
        return params, state

    @property
    def counts(self) -> CacheCounts:
        """What was done so far."""
        return self._traffic.counts

    @property
    def num_ids(self) -> dict[str, int]:
        """By name, how many ids have a row."""
        return {name: len(cached.ids) for name, cached in self._traffic.ids.items()}

    @property
    def nbytes(self) -> int:
        """The memory of ids and store on the host, or in the folder, in bytes."""
        return sum(cached.nbytes for cached in self._traffic.ids.values())
