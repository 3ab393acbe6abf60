"""Reading hash tables."""

import math
import os
from pathlib import Path

import numpy as np

from monolith_optax.checkpoint._entry_columns import read_column
from monolith_optax.checkpoint._entry_dump import Layout, groups
from monolith_optax.checkpoint._hash_table import HashTable, Segment
from monolith_optax.checkpoint._owners import Source, find
from monolith_optax.checkpoint._protobuf import named
from monolith_optax.checkpoint._segments import (
    KINDS,
    Column,
    Segments,
    checked,
    columns,
)
from monolith_optax.checkpoint._table_files import Files, assets_folder, saved_counts
from monolith_optax.checkpoint._tfrecord import Records

Arrays = dict[Column, np.ndarray]


def read_hash_table(
    folder: str | os.PathLike[str],
    name: str,
    *,
    segments: Segments,
    servers: int | None = None,
) -> HashTable:
    """Reads one hash table from a checkpoint of Monolith's, to the bit.

    The shards of all servers are joined, and left-overs of interrupted saves are
    ignored. Needs `pip install "monolith_optax[hash-tables]"`, but not TensorFlow.

    Args:
      folder: the checkpoint's folder of assets, such as `model.ckpt-1200.assets`, or
        its prefix, `model.ckpt-1200`.
      name: the table's name. `hash_tables` lists them.
      segments: the optimizer and the dim of each segment of the table, in order, such
        as `[("ftrl", 1), ("adam", 3)]`. The files do not say how weights divide into
        segments; the model's configuration does.
      servers: how many servers wrote the table, 0 if names of its files have no
        server. None: as the files' names and the ids say. Give it where these leave
        a doubt, which is an error.

    Raises:
      FileNotFoundError: the folder, the table, or some of its files are missing.
      ValueError: a file is damaged, its entries do not fit the segments or the numbers
        that other files give, there are ids twice, a server seems to be missing, or
        the segments are not known ones. The message names file and entry.
      ImportError: the packages of the extra are not installed.

    Example:
      >>> from monolith_optax.checkpoint import read_hash_table
      >>> folder = "tests/data/hash_tables/single/model.ckpt-1200"
      >>> table = read_hash_table(folder, "user", segments=[("ftrl", 1), ("adam", 3)])
      >>> print(table.weights.shape, table.segments[1].slots["beta1_power"].shape)
      (302, 4) (302,)
    """
    segments = checked(segments)
    files = Files(assets_folder(folder))
    source = find(files, name, servers)
    reader, ids_of = Reader(segments), dict[int | None, slice]()
    for server, shards in source.shards.items():
        start = reader.size
        for shard in shards:
            for table, records in shard.entries():
                if table == source.table:
                    reader.add(records, shard.path)
        ids_of[server] = slice(start, reader.size)
    counted = bool(source.table) and check_count(source, files.folder, reader.size)
    ids = reader.arrays["ids"]
    source.check_owners(
        {server: ids[these] for server, these in ids_of.items()},
        reader.where,
        sure=counted or servers is not None,
    )
    return as_table(segments, reader.sorted())


def check_count(source: Source, folder: Path, size: int) -> bool:
    """Compares the number of entries with `ckpt.info`, if it has one."""
    counts = saved_counts(folder)
    if counts is None:
        return False
    if size != counts.get(source.table, 0):
        raise ValueError(
            f"{source.name!r} has {size} entries in {folder}, but ckpt.info counts "
            f"{counts.get(source.table, 0)}: are files of a server missing?"
        )
    return True


class Reader:
    """The columns of a table, which grow while its files are read."""

    def __init__(self, segments: Segments) -> None:
        self.segments, self.size = segments, 0
        self.arrays: Arrays = {
            column: np.empty((0, *shape), dtype)
            for column, (dtype, shape) in columns(segments).items()
        }
        self._parts: list[tuple[int, int, Path]] = []

    def add(self, records: Records, path: Path) -> None:
        """Adds entries."""
        self._check_lengths(records, path)
        self._parts.append((self.size, records.first, path))
        self._grow(self.size + len(records.starts))
        for layout, entries, positions in groups(records, path):
            with named(path, records.first + int(positions[0])):
                places = layout.places(self.segments)
            for column, array in self.arrays.items():
                part = array[self.size : self.size + len(records.starts)]
                values = read_column(entries, places[column])
                part[positions] = values.reshape(len(entries), *array.shape[1:])
        self.size += len(records.starts)

    def _check_lengths(self, records: Records, path: Path) -> None:
        """Refuses entries too short for their numbers, before these take memory."""
        least = 4 * self.arrays["weights"].shape[1]
        for short in np.flatnonzero(records.lengths < least)[:1]:
            with named(path, records.first + int(short)):
                Layout(records.one(int(short))).places(self.segments)

    def _grow(self, size: int) -> None:
        """Makes room in place: copies would take as much memory again."""
        if size > len(self.arrays["ids"]):
            self._resize(max(size, size + size // 8))

    def _resize(self, size: int) -> None:
        for array in self.arrays.values():
            array.resize((size, *array.shape[1:]), refcheck=False)

    def columns(self) -> Arrays:
        """The columns in the order of the files."""
        self._resize(self.size)
        return self.arrays

    def sorted(self) -> Arrays:
        """The columns in the order of ids, which must be distinct."""
        self.columns()
        order = np.argsort(self.arrays["ids"], kind="stable")
        for array in self.arrays.values():
            _reorder(array, order)
        ids = self.arrays["ids"]
        if len(twice := np.flatnonzero(ids[1:] == ids[:-1])):
            first, second = (self.where(int(order[twice[0] + i])) for i in (0, 1))
            raise ValueError(
                f"The id {ids[twice[0]]} occurs twice, as {first} and as {second}."
            )
        return self.arrays

    def where(self, position: int) -> str:
        """The file and the entry that something was read from."""
        start, first, path = next(
            part for part in reversed(self._parts) if part[0] <= position
        )
        return f"{path}: entry {first + position - start}"


def _reorder(array: np.ndarray, order: np.ndarray) -> None:
    """Puts rows in another order, a quarter of the columns at a time.

    So it takes the memory of half of the array: `take` makes a copy of its own.
    """
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    quarter = max(1, rows.shape[1] // 4)
    for first in range(0, rows.shape[1], quarter):
        some = rows[:, first : first + quarter]
        some[:] = some.take(order, axis=0)


def as_table(segments: Segments, arrays: Arrays) -> HashTable:
    """The table of some columns."""
    return HashTable(
        ids=arrays["ids"],
        weights=arrays["weights"],
        segments=tuple(
            Segment(name, dim, {slot: arrays[k, slot] for slot in KINDS[name].slots})
            for k, (name, dim) in enumerate(segments)
        ),
        last_update=arrays["last_update"],
    )
