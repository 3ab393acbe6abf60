"""What `monolith-checkpoint show` prints."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monolith_optax import _console
from monolith_optax.checkpoint._list_hash_tables import hash_tables
from monolith_optax.checkpoint._prefix import prefix_of
from monolith_optax.checkpoint._read_tensorflow import read_tensorflow


def show(path: str, *, as_json: bool, quiet: bool) -> None:
    """Prints the variables and the hash tables of a checkpoint."""
    assets, variables = Path(path), []
    if not _has_tables(assets):
        prefix = prefix_of(path)
        assets, variables = Path(f"{prefix}.assets"), _variables(prefix)
    tables = _tables(assets, quiet=quiet) if _has_tables(assets) else []
    if quiet:
        return
    if as_json:
        print(json.dumps([*variables, *tables], indent=1))
        return
    for rows in variables, tables:
        _print_table(rows)


def _has_tables(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("Monolith*HashTable_*"))


def _variables(prefix: str) -> list[dict[str, Any]]:
    checkpoint = read_tensorflow(prefix)
    return [
        {
            "name": name,
            "kind": "slot" if _is_slot(name, checkpoint) else "variable",
            "shape": list(checkpoint.shapes[name]),
            "dtype": checkpoint.dtypes[name].name,
        }
        for name in checkpoint
    ]


def _tables(folder: Path, *, quiet: bool) -> list[dict[str, Any]]:
    size = sum(file.stat().st_size for file in folder.glob("Monolith*HashTable_*"))
    with _progress(size, quiet=quiet) as on_bytes:
        tables = hash_tables(folder, on_bytes=on_bytes)
    return [
        {
            "name": table.name,
            "kind": "hash table",
            "entries": table.entries,
            "dim": table.dim,
            "segments": [list(segment) for segment in table.segments],
            "servers": table.servers,
            "shards": list(table.shards),
            "last_update": table.last_update,
        }
        for table in tables
    ]


@contextmanager
def _progress(size: int, *, quiet: bool) -> Iterator[Callable[[int], object] | None]:
    """A progress bar of so many bytes, for a person who looks at it."""
    if quiet or not _console.is_capable_terminal(sys.stderr):
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    lines = [[_cell(*item) for item in row.items()] for row in rows]
    table = [list(rows[0]), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _cell(name: str, value: Any) -> str:
    if name == "segments":
        return " ".join(f"{optimizer}:{dim or '?'}" for optimizer, dim in value)
    if name == "last_update" and 0 < value < 2**32:
        return datetime.fromtimestamp(value, UTC).isoformat()
    return _console.printable(str(value))


def _is_slot(name: str, names: Mapping[str, Any]) -> bool:
    match = re.fullmatch(r"(.+)/[^/]+/[^/]+", name)
    return match is not None and match[1] in names
