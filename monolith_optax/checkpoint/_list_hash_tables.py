"""Listing hash tables."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from monolith_optax._public import public
from monolith_optax.checkpoint._entry_columns import read_column
from monolith_optax.checkpoint._entry_dump import groups
from monolith_optax.checkpoint._owners import divisor, multi_servers
from monolith_optax.checkpoint._table_files import (
    SINGLE,
    Files,
    OnBytes,
    assets_folder,
    split_server,
)
from monolith_optax.checkpoint._tfrecord import Records


@public("monolith_optax.checkpoint")
@dataclass(frozen=True)
class HashTableInfo:
    """What the files of a hash table say about it.

    Attributes:
      name: its name, as it is in the files.
      servers: how many servers wrote it, 0 if names of its files have no server.
      shards: how many files each of them wrote.
      entries: how many entries it has.
      dim: how many weights an entry has, 0 if there is no entry.
      segments: the optimizer and the dim of each segment, as far as the slots tell:
        the dim is None for `sgd` and `group_adagrad`, and a segment of
        `moving_average` does not show.
      last_update: the time of its newest entry, in seconds since 1970; 0 if unknown.
    """

    name: str
    servers: int
    shards: tuple[int, ...]
    entries: int
    dim: int
    segments: tuple[tuple[str, int | None], ...]
    last_update: int


def hash_tables(
    folder: str | os.PathLike[str], *, on_bytes: OnBytes = None
) -> list[HashTableInfo]:
    """The hash tables of a checkpoint of Monolith's.

    Reads all files once, and checks them. Needs
    `pip install "monolith_optax[hash-tables]"`.

    Args:
      folder: the checkpoint's folder of assets, such as `model.ckpt-1200.assets`, or
        its prefix, `model.ckpt-1200`.
      on_bytes: is told how many bytes have been read since it was told last.

    Returns:
      The tables, in the order of their names.

    Raises:
      FileNotFoundError: the folder, or one of several shards, is missing.
      ValueError: a file is damaged, or the entries of a table differ in their segments.
      ImportError: the packages of the extra are not installed.

    Example:
      >>> from monolith_optax.checkpoint import hash_tables
      >>> for table in hash_tables("tests/data/hash_tables/native/model.ckpt-1200"):
      ...     print(table.name, table.shards, table.entries, table.segments)
      context (1, 2) 58 (('ftrl', 1), ('adam', 4))
      item (1, 2) 89 (('adagrad', 4),)
      unused (1, 2) 0 ()
    """
    files = Files(assets_folder(folder))
    infos = [*_multi_tables(files, on_bytes), *_single_tables(files, on_bytes)]
    return sorted(infos, key=lambda info: info.name)


@dataclass
class _Tally:
    """What some files say about a table: the fields of its HashTableInfo."""

    shards: int = 0
    entries: int = 0
    dim: int = 0
    segments: tuple[tuple[str, int | None], ...] = ()
    last_update: int = 0
    divides: int = 0  # how many servers there may be; 0: any number

    def add(self, records: Records, path: Path, server: int) -> None:
        """Counts entries, of a server if they are one's."""
        for layout, entries, positions in groups(records, path):
            found, dim = tuple(layout.segments()[0]), len(layout.weights)
            if self.entries and (found, dim) != (self.segments, self.dim):
                raise ValueError(
                    f"{path}: entry {records.first + int(positions[0])} has {dim} "
                    f"weights and slots of {list(found)}, but those before have "
                    f"{self.dim} and {list(self.segments)}."
                )
            self.segments, self.dim = found, dim
            self.entries += len(positions)
            newest = int(read_column(entries, layout.last_update).max())
            self.last_update = max(self.last_update, newest)
            divides = divisor(read_column(entries, layout.id), server)
            self.divides = math.gcd(self.divides, divides)


def _info(name: str, tallies: Sequence[_Tally], servers: int) -> HashTableInfo:
    filled = next((tally for tally in tallies if tally.entries), tallies[0])
    return HashTableInfo(
        name=name,
        servers=servers,
        shards=tuple(tally.shards for tally in tallies),
        entries=sum(tally.entries for tally in tallies),
        dim=filled.dim,
        segments=filled.segments,
        last_update=max(tally.last_update for tally in tallies),
    )


def _multi_tables(files: Files, on_bytes: OnBytes) -> Iterator[HashTableInfo]:
    servers = multi_servers(files)
    tallies: dict[str, dict[int | None, _Tally]] = {}
    for server, shards in servers.items():
        for shard in shards:
            for name in shard.tables or {}:
                of_server = tallies.setdefault(name, {})
                of_server.setdefault(server, _Tally()).shards += 1
            for name, records in shard.entries(on_bytes):
                tallies[name][server].add(records, shard.path, server or 0)
    for name, of_server in tallies.items():
        yield _info(
            name, list(of_server.values()), 0 if None in servers else len(servers)
        )


def _single_tables(files: Files, on_bytes: OnBytes) -> Iterator[HashTableInfo]:
    tallies: dict[str, _Tally] = {}
    for suffix in files.suffixes(SINGLE):
        similar = split_server(suffix)
        shards = files.shards(SINGLE, suffix)
        tallies[suffix] = _Tally(len(shards))
        for shard in shards:
            for _, records in shard.entries(on_bytes):
                tallies[suffix].add(records, shard.path, similar[1] if similar else 0)
    for base in {similar[0] for similar in map(split_server, tallies) if similar}:
        names = list(takewhile(tallies.__contains__, (f"{base}_{k}" for k in count())))
        of_servers = [tallies[name] for name in names]
        kinds = {(tally.dim, tally.segments) for tally in of_servers if tally.entries}
        divides = math.gcd(*(tally.divides for tally in of_servers))
        if (
            names
            and base not in tallies
            and len(kinds) < 2
            and not divides % len(names)
        ):
            yield _info(base, of_servers, len(names))
            for name in names:
                del tallies[name]
    for name, tally in tallies.items():
        yield _info(name, [tally], 0)
