"""The command line of checkpoints: `monolith-checkpoint --help`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import monolith_optax
from monolith_optax import _console
from monolith_optax.checkpoint._list_hash_tables import hash_tables
from monolith_optax.checkpoint._read_tensorflow import read_tensorflow
from monolith_optax.checkpoint._write_tensorflow import write_tensorflow

EXIT_STATUS = (
    "Exit status: 0 done, 2 bad usage, 3 failure, 130 interrupted, 143 terminated."
)


def program() -> NoReturn:
    """Runs the command line as a program."""
    _console.program(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = _parser()
    failures = OSError, ValueError, ImportError
    return _console.status_of(
        parser.prog, lambda: _run(parser, argv), failures=failures
    )


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = parser.parse_args(argv)
    if args.command == "show":
        show(args.prefix, as_json=args.json, quiet=args.quiet)
    else:
        convert(args.source, args.target, quiet=args.quiet)
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--quiet", action="store_true", help="print nothing: the exit status tells"
    )
    parser = argparse.ArgumentParser(
        prog="monolith-checkpoint",
        description="Shows and converts TensorFlow checkpoints, and shows Monolith's "
        "hash tables. Needs pip install 'monolith_optax[hash-tables]' to show, and "
        "'monolith_optax[tf]' to convert.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"monolith_optax {monolith_optax.__version__}",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser(
        "show",
        parents=[common],
        help="list variables, slots and hash tables",
        epilog=EXIT_STATUS,
    )
    lister.add_argument(
        "prefix",
        metavar="PREFIX",
        help="the index file without '.index', such as model/model.ckpt-6; or the "
        "folder model/model.ckpt-6.assets, for hash tables only",
    )
    lister.add_argument("--json", action="store_true", help="print a JSON array")
    converter = commands.add_parser(
        "convert",
        parents=[common],
        help="convert a checkpoint to one that Orbax can restore, or back",
        description="Converts a TensorFlow checkpoint to an Orbax checkpoint, which "
        "holds one dictionary from TensorFlow's names to arrays. If SOURCE is the "
        "folder of such an Orbax checkpoint, converts it back.",
        epilog=EXIT_STATUS,
    )
    converter.add_argument(
        "source", metavar="SOURCE", help="a prefix, or an Orbax checkpoint's folder"
    )
    converter.add_argument(
        "target", metavar="OUT", help="a new folder, or a new prefix"
    )
    return parser


def show(path: str, *, as_json: bool, quiet: bool) -> None:
    """Prints the variables and the hash tables of a checkpoint."""
    of_tables, is_prefix = _assets(path), not Path(path).is_dir()
    variables = _variables(path) if is_prefix or of_tables is None else []
    tables = _tables(of_tables, quiet=quiet) if of_tables else []
    if quiet:
        return
    if as_json:
        print(json.dumps([*variables, *tables], indent=1))
        return
    for rows in variables, tables:
        _print_table(rows)


def _assets(path: str) -> Path | None:
    """The folder with hash tables."""
    for folder in Path(path), Path(f"{path}.assets"):
        if folder.is_dir() and any(folder.glob("Monolith*HashTable_*")):
            return folder
    return None


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


def convert(source: str, target: str, *, quiet: bool) -> None:
    """Converts a TensorFlow checkpoint to an Orbax checkpoint, or back."""
    to_tensorflow = Path(source).is_dir()
    if found := sorted(Path(source).glob("*.index")):
        raise ValueError(
            f"{source} is a folder of TensorFlow checkpoints: give a prefix, such as "
            f"{found[-1].with_suffix('')}."
        )
    written = Path(f"{target}.index") if to_tensorflow else Path(target)
    if written.exists():
        raise FileExistsError(f"{written} already exists: give another name.")
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Converting needs Orbax: pip install 'monolith_optax[tf]'."
        ) from error
    with ocp.StandardCheckpointer() as checkpointer:
        if to_tensorflow:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
            write_tensorflow(target, _tensors_in(checkpointer, source))
        else:
            tensors = dict(read_tensorflow(source))
            if bad := [
                k for k, x in tensors.items() if x.dtype == object or not x.size
            ]:
                raise ValueError(
                    f"Orbax can hold only numbers, but {bad} are strings or empty: "
                    "read the others with read_tensorflow."
                )
            checkpointer.save(Path(target).absolute(), tensors)
            checkpointer.wait_until_finished()
    if not quiet:
        print(f"Wrote {_console.printable(target)}")


def _tensors_in(checkpointer: Any, folder: str) -> dict[str, np.ndarray]:
    restored = checkpointer.restore(Path(folder).absolute())
    if not isinstance(restored, dict) or any(
        isinstance(value, dict | list) for value in restored.values()
    ):
        raise ValueError(
            f"{folder} must hold one dictionary of arrays, as 'convert' writes it, but "
            "it holds another tree. Restore it in Python, and use export_slots and "
            "write_tensorflow."
        )
    return {name: np.asarray(value) for name, value in restored.items()}


if __name__ == "__main__":
    program()
