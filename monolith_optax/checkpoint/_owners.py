"""Whose files a table's are: parameter servers, or tables with similar names.

Server k of n has the ids with `id mod n == k`, and `_k` in the names of its files. But
`item_1` may also be a table of that name, and that the last servers are missing does
not show in names. The ids show it: less k, the ids of server k are multiples of n.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from monolith_optax.checkpoint._table_files import (
    MULTI,
    SINGLE,
    Files,
    Shard,
    file_name,
    split_server,
)


@dataclass(frozen=True)
class Source:
    """The files of a table.

    Attributes:
      name: the table's name.
      shards: its files by server, in order; None where names have no server.
      table: its name inside the files, "" where they have one table only.
    """

    name: str
    shards: Mapping[int | None, list[Shard]]
    table: str

    def check_owners(
        self,
        ids_of: Mapping[int | None, np.ndarray],
        where: Callable[[int], str],
        *,
        sure: bool,
    ) -> None:
        """Checks that the ids belong to these servers, and to all of them.

        Args:
          ids_of: the ids in each server's files, in the order of `shards`.
          where: says from which file and entry the id at a position came.
          sure: whether it is known otherwise that no server is missing.

        Raises:
          ValueError: they do not, or it is uncertain.
        """
        if None in ids_of:
            if not sure:
                self._check_table(ids_of[None])
            return
        count, divides, start = len(ids_of), 0, 0
        for server, ids in ids_of.items():
            divides = math.gcd(divides, divisor(ids, server or 0))
        if divides == count or not any(map(len, ids_of.values())):
            return
        if divides % count == 0:
            if sure:
                return
            raise ValueError(
                f"Is a server of {self.name!r} missing? There are files of {count}, "
                f"but its ids would also fit {divides or 'any number of'} servers. If "
                f"none is missing, give servers={count}."
            )
        if divides > count:
            raise ValueError(
                f"Servers of {self.name!r} are missing: there are files of {count}, "
                f"but its ids come from {divides} servers."
            )
        for server, ids in ids_of.items():
            for wrong in np.flatnonzero(ids % count != server)[:1]:
                raise ValueError(
                    f"{where(start + int(wrong))} has the id {ids[wrong]}, which does "
                    f"not belong to server {server} of {count}: its remainder is "
                    f"{ids[wrong] % count}. If '{file_name(self.name)}_{server}' is a "
                    "table of its own, read it by that name."
                )
            start += len(ids)

    def _check_table(self, ids: np.ndarray) -> None:
        """Checks that a table is not another's server, as its name would allow."""
        similar = split_server(file_name(self.name)) if not self.table else None
        if similar is None or not len(ids):
            return
        other, server = similar
        divides = divisor(ids, server)
        if divides == 0 or divides > max(server, 1):
            raise ValueError(
                f"{self.name!r} may be a table, or server {server} of {other!r}: its "
                f"ids would fit server {server} of {divides or 'any number'}. Read "
                f"{other!r}, or give servers=0 if it is a table."
            )


def find(files: Files, name: str, servers: int | None) -> Source:
    """The files of a table.

    Raises:
      FileNotFoundError: there are none, or one is missing.
      ValueError: it is not clear which ones.
    """
    single = {
        server: files.shards(SINGLE, suffix)
        for server, suffix in _single_servers(files, name, servers).items()
    }
    multi = multi_servers(files)
    without = [
        shard.path
        for shards in multi.values()
        for shard in shards
        if name not in (shard.tables or {})
    ]
    in_multi = len(without) < sum(map(len, multi.values()))
    if single and in_multi:
        raise ValueError(
            f"{files.folder} has {name!r} both in a file of its own and in files of "
            "several tables: it holds two saves."
        )
    if in_multi and without:
        raise ValueError(
            f"{without[0]} has no table {name!r}, but other files have one."
        )
    source = Source(name, multi, name) if in_multi else Source(name, single, "")
    if not source.shards:
        tables = {
            name for shards in multi.values() for s in shards for name in s.tables or ()
        }
        raise FileNotFoundError(
            f"There is no table {name!r} in {files.folder}; there are "
            f"{sorted({*files.suffixes(SINGLE), *tables})}."
        )
    _check_numbers(source, servers)
    return source


def multi_servers(files: Files) -> dict[int | None, list[Shard]]:
    """The files of several tables, by server."""
    suffixes = files.suffixes(MULTI)
    numbers = sorted(int(suffix) for suffix in suffixes if suffix.isdecimal())
    if numbers and "" in suffixes:
        raise ValueError(
            f"{files.folder} has files {MULTI}_* with and without a server in their "
            "names: it holds two saves."
        )
    if numbers:
        return {number: files.shards(MULTI, str(number)) for number in numbers}
    return {None: files.shards(MULTI, "")} if "" in suffixes else {}


def _single_servers(
    files: Files, name: str, servers: int | None
) -> dict[int | None, str]:
    """The suffixes of a table's own files, by server."""
    base, suffixes = file_name(name), files.suffixes(SINGLE)
    if base in suffixes and not servers:
        return {None: base}
    numbers = [s[1] for s in map(split_server, suffixes) if s and s[0] == base]
    return {} if servers == 0 else {n: f"{base}_{n}" for n in sorted(numbers)}


def _check_numbers(source: Source, servers: int | None) -> None:
    there = [server for server in source.shards if server is not None]
    if servers is None:
        servers = max(there) + 1 if there else 0
    missing = next((k for k in range(servers) if k not in there), None)
    if missing is not None:
        raise FileNotFoundError(
            f"Files of server {missing} of {source.name!r} are missing; the files are "
            f"of the servers {there}. If these are separate tables, read them by their "
            f"names, such as '{file_name(source.name)}_{max(there, default=0)}'."
        )
    if len(there) > servers:
        raise ValueError(
            f"{source.name!r} has files of the servers {there}, not of {servers} only."
        )


def divisor(ids: np.ndarray, server: int) -> int:
    """The greatest number of servers that ids of one server fit; 0: any number."""
    # Differences of 64-bit integers need 65 bits, but their absolute values do not.
    unsigned, k = ids.view(np.uint64), np.uint64(server)
    distance = np.where(ids >= server, unsigned - k, k - unsigned)
    return int(np.gcd.reduce(distance, initial=0))
