"""Hash tables into a RowCache and out of it, some entries at a time."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from monolith_optax._ids.cached_ids import CachedIds
from monolith_optax._ids.id_map import IdMap
from monolith_optax._ids.row_cache import RowCache
from monolith_optax.checkpoint._hash_table import HashTable, Segment
from monolith_optax.checkpoint._hash_table_parts import hash_table_parts
from monolith_optax.checkpoint._segments import KINDS, STEP
from monolith_optax.checkpoint._table_leaves import Leaves, Part, parts_of
from monolith_optax.checkpoint._write_hash_table import write_hash_table_parts

_CHUNK = 2**16  # entries at a time


def read_cached_hash_tables(
    folder: str | os.PathLike[str],
    cache: RowCache,
    params: Any,
    state: Any,
    *,
    leaves: Leaves,
    servers: int | None = None,
) -> None:
    """Reads Monolith's hash tables into the store of a new `RowCache`.

    Entries go from the files to the store some at a time, so that tables may be larger
    than memory: besides the store and its ids, it takes about 100 bytes for each entry
    of a table while the table's ids are put in order, and some megabytes. Ids have been
    last seen when they were last updated. Nothing moves to the device: params and state
    stay as they are. Needs `pip install "monolith_optax[hash-tables]"`.

    Args:
      folder: the checkpoint's folder of assets, as for `read_hash_table`.
      cache: a cache that has seen no batch. Its tables have float32 rows of two axes.
      params: the parameters; only their types are used.
      state: a state of the optimizer for these params; the same.
      leaves: for each table the paths of its segments' leaves, in order, with their
        optimizers, as for `import_hash_tables`. They must be all leaves that share
        their ids in the cache.
      servers: how many servers wrote the tables, as for `read_hash_table`.

    Raises:
      ValueError: a table and its leaves do not fit each other, a file is damaged, or an
        id is there twice. The cache has no ids then.
      FileNotFoundError: files are missing.
      RuntimeError: the cache has been used before.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowCache, embedding
      >>> from monolith_optax.checkpoint import read_cached_hash_tables
      >>> folder = "tests/data/hash_tables/single/model.ckpt-1200"
      >>> tx = embedding.adagrad(0.1)
      >>> params = {"item": jnp.zeros((100, 8))}
      >>> cache, state = RowCache(tx, params, {"item": "item"}), tx.init(params)
      >>> leaves = {"item": {"item": "adagrad"}}
      >>> read_cached_hash_tables(folder, cache, params, state, leaves=leaves)
      >>> print(cache.num_ids)
      {'item': 495}
    """
    cache._traffic.check_new("read_cached_hash_tables")
    ids: dict[str, IdMap] = {}
    tables = _tables(cache, params, state, leaves)
    for name, table in tables.items():
        segments = [(part.optimizer, part.shape[1]) for part in table.parts]
        seen, updated, size = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 1
        for some in hash_table_parts(folder, name, segments=segments, servers=servers):
            numbers = np.arange(size, size + len(some.ids))
            table.cached.grow(size + len(some.ids))
            table.cached.store.write(numbers, table.records(name, some))
            seen.append(some.ids)
            updated.append(some.last_update)
            size += len(some.ids)
        admit_after = table.cached.ids.admit_after
        ids[name] = _id_map(name, seen, updated, admit_after)
    for name, table in tables.items():
        table.cached.ids = ids[name]


def write_cached_hash_tables(
    folder: str | os.PathLike[str],
    cache: RowCache,
    params: Any,
    state: Any,
    *,
    leaves: Leaves,
    shards: int = 1,
) -> None:
    """Writes the rows of a `RowCache`, on the device and in the store, as hash tables.

    The files are what `write_hash_table` writes, some entries at a time:
    it takes some megabytes besides the cache. Each id that has a row becomes an entry,
    whose `last_update` is when the id was last seen; row 0 is left out. Call it between
    batches, as `RowCache.save`.

    Args:
      folder: the checkpoint's folder of assets. It is made if there is none.
      cache: the cache.
      params: the parameters after the last batch.
      state: the optimizer's state.
      leaves: as for `read_cached_hash_tables`.
      shards: into how many files each table is divided.

    Raises:
      ValueError: a table and its leaves do not fit each other, or a time does not fit
        into 32 bits.
      RuntimeError: batches have been assigned and not moved.
      OSError: the files cannot be written. Tables of an older save are as they were, or
        are replaced as a whole.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowCache, embedding
      >>> from monolith_optax.checkpoint import read_hash_table
      >>> from monolith_optax.checkpoint import write_cached_hash_tables
      >>> tx = embedding.adagrad(0.1)
      >>> params = {"item": jnp.zeros((3, 2))}
      >>> state = tx.init(params)
      >>> cache = RowCache(tx, params, "item", init=0.5)
      >>> for batch in [1, 2], [2**62, 3]:
      ...     rows, moves = cache.assign({"item": batch}, time=1_700_000_000)
      ...     params, state = cache.move(params, state, moves)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_cached_hash_tables(
      ...         folder, cache, params, state, leaves={"item": {"item": "adagrad"}}
      ...     )
      ...     table = read_hash_table(folder, "item", segments=[("adagrad", 2)])
      >>> print(table.ids[:3], table.weights[:, 0])
      [1 2 3] [0.5 0.5 0.5 0.5]
    """
    tables = _tables(cache, params, state, leaves)
    cache._traffic.write_back(params, state)
    for name, table in tables.items():
        write_hash_table_parts(folder, name, table.shards(shards))


class _Table(NamedTuple):
    """The leaves of a table, and the ids whose records have them.

    Attributes:
      cached: the ids.
      parts: the segments.
      fields: for each segment the fields of a record: of the weights, and of the slots
        by name.
    """

    cached: CachedIds
    parts: list[Part]
    fields: list[tuple[str, dict[str, str]]]

    def records(self, name: str, table: HashTable) -> np.ndarray:
        """Entries as records."""
        records, first = np.zeros(len(table.ids), self.cached.record), 0
        for segment, (weights, slots) in zip(table.segments, self.fields, strict=True):
            records[weights] = table.weights[:, first : first + segment.dim]
            first += segment.dim
            for slot, field in slots.items():
                values = segment.slots[slot]
                records[field] = values
                if np.any(records[field] != values) and values.dtype == np.int64:
                    raise ValueError(
                        f"The steps {slot} of table {name!r} do not fit into the 32 "
                        "bits of the state."
                    )
        return records

    def shards(self, count: int) -> list[Iterator[HashTable]]:
        """The entries, some at a time, in shards of the same size."""
        entries = np.flatnonzero(self.cached.ids.views()[1] > 0)
        return [self._some(part) for part in np.array_split(entries, count)]

    def _some(self, entries: np.ndarray) -> Iterator[HashTable]:
        ids, rows, last_seen = self.cached.ids.views()
        for start in range(0, max(len(entries), 1), _CHUNK):
            these = entries[start : start + _CHUNK]
            records = self.cached.store.read(rows[these])
            segments = [
                Segment(
                    part.optimizer,
                    part.shape[1],
                    {
                        slot: _as_monolith(records[field], part.optimizer, slot)
                        for slot, field in slots.items()
                    },
                )
                for part, (_, slots) in zip(self.parts, self.fields, strict=True)
            ]
            weights = [records[weights] for weights, _ in self.fields]
            yield HashTable(
                ids=ids[these],
                weights=np.concatenate(weights, axis=1),
                segments=tuple(segments),
                last_update=last_seen[these],
            )


def _as_monolith(rows: np.ndarray, optimizer: str, slot: str) -> np.ndarray:
    steps = KINDS[optimizer].slots[slot] == STEP
    return rows.astype(np.int64) if steps else rows


def _tables(
    cache: RowCache, params: Any, state: Any, leaves: Leaves
) -> dict[str, _Table]:
    every = jax.tree.leaves((params, state), is_leaf=lambda node: node is None)
    # Segments count leaves without None, and fields with it.
    field_of = [str(i) for i, leaf in enumerate(every) if leaf is not None]
    tables = {
        name: _table(cache, name, parts, field_of)
        for name, parts in parts_of(leaves, params, state).items()
    }
    if len(tables) < len(cache._traffic.ids):
        raise ValueError(
            "leaves must name the tables of all ids of the cache, "
            f"{list(cache._traffic.ids)}, but it has only {list(leaves)}."
        )
    return tables


def _table(
    cache: RowCache, name: str, parts: list[Part], field_of: list[str]
) -> _Table:
    fields = [
        (field_of[part.weights], {k: field_of[i] for k, i in part.slots.items()})
        for part in parts
    ]
    given = {field for weights, slots in fields for field in (weights, *slots.values())}
    for cached in cache._traffic.ids.values():
        names = set(cached.record.names or ())
        if names == given:
            return _Table(cached, parts, fields)
        if names & given:
            paths = cache._traffic.tables.paths
            single = [paths[int(field)] for field in sorted(names ^ given)]
            raise ValueError(
                f"The segments of table {name!r} must be all that the cache has for "
                f"the ids {cached.name!r}, but {single} are only in one of them."
            )
    raise ValueError(f"The leaves of table {name!r} have no ids in the cache.")


def _id_map(
    name: str,
    ids: list[np.ndarray],
    updated: list[np.ndarray],
    admit_after: int,
) -> IdMap:
    zero = np.zeros(1, np.int64)
    every = np.concatenate([zero, *ids])
    arrays = {
        "ids": every,
        "rows": np.arange(len(every), dtype=np.int32),
        "counts": np.zeros(len(every), np.int32),
        "last_seen": np.concatenate([zero, *updated]),
        "capacity": np.asarray(2**31 - 1, np.int64),
        "admit_after": np.asarray(admit_after, np.int64),
    }
    try:
        return IdMap.from_arrays(arrays)
    except ValueError as error:
        raise ValueError(f"The ids of table {name!r} make no IdMap: {error}") from error
