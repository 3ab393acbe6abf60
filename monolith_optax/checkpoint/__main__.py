"""The command line: `python -m monolith_optax.checkpoint show|convert`."""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from monolith_optax.checkpoint._tensorflow import read_tensorflow, write_tensorflow

# As the node checker's command line has them; argparse ends with 2 for bad usage.
DONE, FAILED, INTERRUPTED = 0, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its own talk at start-up
    try:
        if args.command == "show":
            show(args.prefix, as_json=args.json)
        else:
            convert(args.source, args.target)
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m monolith_optax.checkpoint",
        description="Looks into TensorFlow's checkpoints and converts them. Needs "
        "pip install 'monolith_optax[tf]'.",
        epilog="Exit status: 0 done, 2 bad usage, 3 failure.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    lister = commands.add_parser("show", help="list variables and slots")
    lister.add_argument("prefix", metavar="PREFIX", help="such as model/model.ckpt-6")
    lister.add_argument("--json", action="store_true", help="print a JSON array")
    converter = commands.add_parser(
        "convert",
        help="write what Orbax can restore, or the way back",
        description="A TensorFlow checkpoint becomes an Orbax checkpoint: one "
        "dictionary from TensorFlow's names to arrays. If SOURCE is the folder of such "
        "a checkpoint, it becomes TensorFlow's again.",
    )
    converter.add_argument(
        "source", metavar="SOURCE", help="a prefix, or Orbax's folder"
    )
    converter.add_argument(
        "target", metavar="OUT", help="a new folder, or a new prefix"
    )
    return parser


def show(prefix: str, *, as_json: bool) -> None:
    """Prints what is in a TensorFlow checkpoint."""
    checkpoint = read_tensorflow(prefix)
    rows = [
        {
            "name": name,
            "kind": "slot" if _is_slot(name, checkpoint) else "variable",
            "shape": list(checkpoint.shapes[name]),
            "dtype": checkpoint.dtypes[name].name,
        }
        for name in checkpoint
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    lines = [[str(cell) for cell in row.values()] for row in rows]
    table = [["name", "kind", "shape", "dtype"], *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _is_slot(name: str, names: Mapping[str, Any]) -> bool:
    match = re.fullmatch(r"(.+)/[^/]+/[^/]+", name)
    return match is not None and match[1] in names


def convert(source: str, target: str) -> None:
    """Writes a checkpoint of one kind as one of the other."""
    to_tensorflow = Path(source).is_dir()
    if found := sorted(Path(source).glob("*.index")):
        raise ValueError(
            f"{source} is a folder of TensorFlow checkpoints: give a prefix, such as "
            f"{found[-1].with_suffix('')}."
        )
    written = Path(f"{target}.index") if to_tensorflow else Path(target)
    if written.exists():
        raise FileExistsError(f"{written} exists already: name a new one.")
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Converting needs Orbax: pip install 'monolith_optax[tf]'."
        ) from error
    with ocp.StandardCheckpointer() as checkpointer:
        if to_tensorflow:
            write_tensorflow(target, _tensors_in(checkpointer, source))
        else:
            tensors = dict(read_tensorflow(source))
            if bad := [
                k for k, x in tensors.items() if x.dtype == object or not x.size
            ]:
                raise ValueError(f"Orbax holds numbers, but {bad} are texts or empty.")
            checkpointer.save(Path(target).absolute(), tensors)
            checkpointer.wait_until_finished()
    print(f"Wrote {target}")


def _tensors_in(checkpointer: Any, folder: str) -> dict[str, np.ndarray]:
    restored = checkpointer.restore(Path(folder).absolute())
    if not isinstance(restored, dict) or any(
        isinstance(value, dict | list) for value in restored.values()
    ):
        raise ValueError(
            f"{folder} is not one dictionary of arrays, as 'convert' writes it: write "
            "it yourself, with export_slots and write_tensorflow."
        )
    return {name: np.asarray(value) for name, value in restored.items()}


if __name__ == "__main__":
    sys.exit(main())
