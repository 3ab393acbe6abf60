"""Reading hash tables some entries at a time."""

import os
from collections.abc import Iterator

import numpy as np

from monolith_optax.checkpoint._hash_table import HashTable
from monolith_optax.checkpoint._owners import find
from monolith_optax.checkpoint._read_hash_table import Reader, as_table, check_count
from monolith_optax.checkpoint._segments import Segments, checked
from monolith_optax.checkpoint._table_files import Files, assets_folder


def hash_table_parts(
    folder: str | os.PathLike[str],
    name: str,
    *,
    segments: Segments,
    servers: int | None = None,
) -> Iterator[HashTable]:
    """What `read_hash_table` returns, in parts, in the order of the files.

    An id that is there twice is not noticed. What must hold of all ids is checked after
    the last part, so use none of them before.
    """
    segments = checked(segments)
    files = Files(assets_folder(folder))
    source = find(files, name, servers)
    ids_of: dict[int | None, np.ndarray] = {}
    for server, shards in source.shards.items():
        found = [np.zeros(0, np.int64)]
        for shard in shards:
            for table, records in shard.entries():
                if table == source.table:
                    reader = Reader(segments)
                    reader.add(records, shard.path)
                    part = as_table(segments, reader.columns())
                    found.append(part.ids)
                    yield part
        ids_of[server] = np.concatenate(found)
    size = sum(map(len, ids_of.values()))
    counted = bool(source.table) and check_count(source, files.folder, size)
    source.check_owners(
        ids_of,
        lambda position: f"Entry {position} of {name!r}",
        sure=counted or servers is not None,
    )
