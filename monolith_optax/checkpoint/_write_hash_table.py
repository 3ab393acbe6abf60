"""Writing hash tables."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from monolith_optax.checkpoint._entry_columns import (
    blank,
    varint_lengths,
    write_column,
)
from monolith_optax.checkpoint._entry_dump import Layout
from monolith_optax.checkpoint._hash_table import HashTable
from monolith_optax.checkpoint._segments import (
    KINDS,
    Column,
    Segments,
    checked,
    columns,
)
from monolith_optax.checkpoint._table_files import (
    SINGLE,
    file_name,
    is_left_over,
    shard_name,
)
from monolith_optax.checkpoint._tfrecord import framed

# As many entries at a time as keep their bytes in the processor's cache.
_BATCH = 2_048


def write_hash_table(
    folder: str | os.PathLike[str], name: str, table: HashTable, *, shards: int = 1
) -> None:
    """Writes one hash table as Monolith's restore of single tables takes it.

    Each entry has the very bytes that Monolith would write; `read_hash_table` gives
    the same bits back. The files get their names when all of them are complete, and
    then an older save of the table is removed. Needs
    `pip install "monolith_optax[hash-tables]"`.

    Args:
      folder: the checkpoint's folder of assets, such as `model.ckpt-1200.assets`. It is
        made if there is none.
      name: the table's name. Colons and slashes become `-` in the names of files.
      table: the table. Its ids may have any order.
      shards: into how many files it is divided.

    Raises:
      ValueError: an array is not of the dtype and shape that a table of these segments
        has, an id is there twice, a time does not fit into 32 bits, a segment is not
        known, or the name cannot be one of a file. Nothing was written.
      OSError: the files cannot be written. An older save is as it was.
      ImportError: the packages of the extra are not installed.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from monolith_optax.checkpoint import HashTable, Segment
      >>> from monolith_optax.checkpoint import read_hash_table, write_hash_table
      >>> norm = np.full((2, 3), 0.1, np.float32)
      >>> table = HashTable(
      ...     ids=np.array([5, 2**62]),
      ...     weights=np.zeros((2, 3), np.float32),
      ...     segments=(Segment("adagrad", 3, {"norm": norm}),),
      ...     last_update=np.array([1_700_000_000, 0]),
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_hash_table(folder, "item", table)
      ...     print(read_hash_table(folder, "item", segments=[("adagrad", 3)]).ids)
      [                  5 4611686018427387904]
    """
    if not 1 <= shards <= 99_999:
        raise ValueError(f"There are from 1 to 99999 shards, but {shards} are given.")
    names = _names(name, shards)
    segments = _segments(table)
    arrays = _arrays(table, segments)
    ends = [len(table.ids) * shard // shards for shard in range(shards + 1)]
    _write(
        Path(folder),
        name,
        {
            file: _records(segments, arrays, ends[shard], ends[shard + 1])
            for shard, file in enumerate(names)
        },
    )


def write_hash_table_parts(
    folder: str | os.PathLike[str], name: str, shards: Sequence[Iterable[HashTable]]
) -> None:
    """What `write_hash_table` does, of parts of a table for each file.

    Ids must be distinct; only ids of the same part are compared.
    """

    def records(parts: Iterable[HashTable]) -> Iterator[np.ndarray]:
        for part in parts:
            segments = _segments(part)
            arrays = _arrays(part, segments)
            yield from _records(segments, arrays, 0, len(part.ids))

    names = _names(name, len(shards))
    _write(Path(folder), name, dict(zip(names, map(records, shards), strict=True)))


def _names(name: str, shards: int) -> list[str]:
    suffix = file_name(name)
    names = [shard_name(SINGLE, suffix, shard, shards) for shard in range(shards)]
    if not name or "\0" in name or Path(names[0]).name != names[0] or "\\" in name:
        raise ValueError(f"A table's name becomes one of a file, but this is {name!r}.")
    return names


def _segments(table: HashTable) -> Segments:
    return checked([(segment.optimizer, segment.dim) for segment in table.segments])


def _write(folder: Path, name: str, files: dict[str, Iterator[np.ndarray]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # Monolith's restore counts what begins with the table's name, as this does not.
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as unfinished:
        for file, records in files.items():
            with Path(unfinished, file).open("wb") as out:
                for some in records:
                    out.write(some.data)
                out.flush()
                os.fsync(out.fileno())
        for file in files:
            Path(unfinished, file).replace(folder / file)
    for path in folder.iterdir():
        if path.name not in files and is_left_over(path.name, file_name(name)):
            path.unlink()


def _arrays(table: HashTable, segments: Segments) -> dict[Column, np.ndarray]:
    """The columns of a table, all of them checked."""
    arrays: dict[Column, np.ndarray] = {
        "ids": table.ids,
        "weights": table.weights,
        "last_update": table.last_update,
    }
    for k, segment in enumerate(table.segments):
        names = list(KINDS[segment.optimizer].slots)
        if set(segment.slots) != set(names):
            raise ValueError(
                f"Segment {k}, {segment.optimizer}, has the slots "
                f"{sorted(segment.slots)}, but Monolith's are {names}."
            )
        arrays |= {(k, slot): array for slot, array in segment.slots.items()}
    arrays = {column: np.asarray(array) for column, array in arrays.items()}
    for column, (dtype, shape) in columns(segments).items():
        array, expected = arrays[column], (arrays["ids"].size, *shape)
        if array.shape != expected or array.dtype != dtype:
            where = column if isinstance(column, str) else f"segments[{column[0]}]"
            what = where if column == where else f"{where}.slots[{column[1]!r}]"
            raise ValueError(
                f"{what} has dtype {array.dtype} and shape {array.shape}, but must "
                f"have {np.dtype(dtype)} and {expected}."
            )
    distinct, times = np.unique(arrays["ids"], return_counts=True)
    if len(twice := distinct[times > 1]):
        raise ValueError(f"The id {twice[0]} is there more than once.")
    times = arrays["last_update"]
    if len(wrong := times[(times < 0) | (times >= 2**32)]):
        raise ValueError(
            f"Monolith keeps times as unsigned 32-bit integers, but one is {wrong[0]}."
        )
    return arrays


def _records(
    segments: Segments, arrays: dict[Column, np.ndarray], start: int, stop: int
) -> Iterator[np.ndarray]:
    """Entries as they are in a file, grouped by length."""
    integers = [
        column
        for column, (dtype, _) in columns(segments).items()
        if dtype == np.int64 and column != "ids"
    ]
    for first in range(start, stop, _BATCH):
        some = slice(first, min(first + _BATCH, stop))
        part = {column: array[some] for column, array in arrays.items()}
        lengths = np.stack(
            [varint_lengths(part[column]) for column in integers], axis=1
        )
        distinct, kind = np.unique(lengths, axis=0, return_inverse=True)
        for k, of_kind in enumerate(distinct):
            these = np.flatnonzero(kind.reshape(-1) == k)
            template = blank(
                segments, dict(zip(integers, of_kind.tolist(), strict=True))
            )
            entries = np.tile(np.frombuffer(template, np.uint8), (len(these), 1))
            for column, place in Layout(template).places(segments).items():
                write_column(entries, place, part[column][these])
            yield framed(entries)
