"""Which files of a folder are which hash table's, and what is said about them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from monolith_optax.checkpoint._protobuf import message_fields, named
from monolith_optax.checkpoint._tfrecord import Records, read_records

SINGLE, MULTI = "MonolithHashTable", "MonolithMultiHashTable"

_FILE = re.compile(
    rf"(?P<kind>{SINGLE}|{MULTI})_(?P<suffix>.*)-(?P<shard>\d{{5}})-of-(?P<count>\d{{5}})",
    re.DOTALL,
)
_SERVER = re.compile(r"(?P<name>.+)_(?P<server>0|[1-9]\d{0,8})", re.DOTALL)
_COUNT = re.compile(
    rb'\s*feature_counts\s*{\s*key:\s*"((?:[^"\\]|\\.)*)"\s*value:\s*(\d{1,19})\s*}'
)

OnBytes = Callable[[int], object] | None


@dataclass(frozen=True)
class Shard:
    """One file with entries.

    Attributes:
      path: the file.
      tables: the names of the tables in it and how many entries of each follow one
        another, as the `.meta` file beside it says. None: one table, whole.
    """

    path: Path
    tables: Mapping[str, int] | None = None

    def entries(self, on_bytes: OnBytes = None) -> Iterator[tuple[str, Records]]:
        """The entries with the name of their table, "" where there is one only.

        Raises:
          ValueError: the file is damaged, or has not as many entries as is said.
        """
        counts = self.tables
        records = read_records(self.path, snappy=counts is not None, on_bytes=on_bytes)
        if counts is None:
            yield from (("", some) for some in records)
            return
        total = 0
        for some in records:
            total, begin = some.first + len(some.starts), 0
            for name, count in counts.items():
                these = slice(
                    max(begin - some.first, 0), max(begin + count - some.first, 0)
                )
                if len(some.starts[these]):
                    yield name, some.part(these)
                begin += count
        if total != sum(counts.values()):
            raise ValueError(
                f"{self.path} has {total} entries, but its .meta file counts "
                f"{sum(counts.values())}: {dict(counts)}."
            )


@dataclass
class Files:
    """The hash tables' files in a folder.

    Attributes:
      folder: the folder.
      found: paths by the kind of file and the suffix of its name, then by how many
        shards there should be and the number of the shard.
    """

    folder: Path
    found: dict[tuple[str, str], dict[int, dict[int, Path]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """Lists the folder."""
        for path in sorted(self.folder.iterdir()):
            if match := _FILE.fullmatch(path.name):
                saves = self.found.setdefault((match["kind"], match["suffix"]), {})
                saves.setdefault(int(match["count"]), {})[int(match["shard"])] = path

    def suffixes(self, kind: str) -> list[str]:
        """The suffixes of the names of one kind of files with entries."""
        return [
            suffix
            for of_kind, suffix in self.found
            if of_kind == kind and not (kind == MULTI and suffix.endswith(".meta"))
        ]

    def shards(self, kind: str, suffix: str) -> list[Shard]:
        """The shards behind one suffix, after checking that none is missing."""
        paths = self._paths(kind, suffix)
        if kind == SINGLE:
            return [Shard(path) for path in paths]
        metas = self._paths(kind, f"{suffix}.meta")
        if len(metas) != len(paths):
            raise ValueError(
                f"{self.folder / f'{kind}_{suffix}'} has {len(paths)} shards, but "
                f"{len(metas)} .meta files."
            )
        return [
            Shard(path, _meta(meta)) for path, meta in zip(paths, metas, strict=True)
        ]

    def _paths(self, kind: str, suffix: str) -> list[Path]:
        base = self.folder / f"{kind}_{suffix}"
        saves = self.found.get((kind, suffix))
        if not saves:
            raise FileNotFoundError(f"There are no files {base}-*.")
        if len(saves) > 1:
            counts = " and ".join(f"{count:05}" for count in sorted(saves))
            raise ValueError(
                f"{base} has files of several saves, with -of-{counts} in their names: "
                "remove the older ones."
            )
        [(count, of_shard)] = saves.items()
        for shard in range(count):
            if shard not in of_shard:
                raise FileNotFoundError(
                    f"There is no file {base}-{shard:05}-of-{count:05}, but others of "
                    "its shards."
                )
        if len(of_shard) > count:
            raise ValueError(f"{of_shard[max(of_shard)]} is beyond the last shard.")
        return [of_shard[shard] for shard in range(count)]


def assets_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder of the files, which may be given as the prefix of its checkpoint."""
    for path in Path(folder), Path(f"{os.fspath(folder)}.assets"):
        if path.is_dir():
            return path
    raise FileNotFoundError(
        f"There is no folder {os.fspath(folder)}, and none with .assets behind it."
    )


def file_name(name: str) -> str:
    """The name of a table as Monolith has it in names of files."""
    return name.replace(":", "-").replace("/", "-")


def shard_name(kind: str, suffix: str, shard: int, shards: int) -> str:
    """The name of a file."""
    return f"{kind}_{suffix}-{shard:05}-of-{shards:05}"


def is_left_over(file: str, suffix: str) -> bool:
    """Whether a file is one of a single table, or was to become one."""
    match = _FILE.fullmatch(re.sub(r"-tmp-\d+$", "", file))
    return match is not None and (match["kind"], match["suffix"]) == (SINGLE, suffix)


def split_server(suffix: str) -> tuple[str, int] | None:
    """`("item", 1)` for `"item_1"`, which may also be the name of a table."""
    match = _SERVER.fullmatch(suffix)
    return (match["name"], int(match["server"])) if match else None


def saved_counts(folder: Path) -> dict[str, int] | None:
    """How many entries each table has on all servers, from `ckpt.info` if there is one.

    Raises:
      ValueError: the file is not what Monolith writes.
    """
    step = re.fullmatch(r".*-(\d+)\.assets", folder.absolute().name)
    path = folder.absolute().parent / f"ckpt.info-{step[1] if step else ''}"
    if not step or not path.is_file():
        return None
    text, counts, at = path.read_bytes(), dict[str, int](), 0
    while match := _COUNT.match(text, at):
        counts[_unescaped(match[1])] = int(match[2])
        at = match.end()
    if text[at:].strip():
        raise ValueError(f"{path} is not a list of feature_counts, from byte {at} on.")
    return counts


def _unescaped(key: bytes) -> str:
    """A string of protocol buffers' text format."""
    plain = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}

    def character(match: re.Match[bytes]) -> bytes:
        octal, letter = match.groups()
        return bytes([int(octal, 8) & 0xFF]) if octal else plain.get(letter, letter)

    key = re.sub(rb"\\(?:([0-7]{1,3})|(.))", character, key)
    return key.decode("utf-8", "surrogateescape")


def _meta(path: Path) -> dict[str, int]:
    """The tables in a shard, and their numbers of entries."""
    tables: dict[str, int] = {}
    for records in read_records(path):
        for position in range(len(records.starts)):
            number = records.first + position
            with named(path, number):
                fields = message_fields(records.one(position))
            name, count = fields.get(1), fields.get(2, 0)
            if not isinstance(name, bytes) or not isinstance(count, int):
                raise ValueError(f"{path}: record {number} is not a table and a count.")
            key = name.decode("utf-8", "surrogateescape")
            if key in tables:
                raise ValueError(f"{path} lists {key!r} more than once.")
            tables[key] = count
    return tables
