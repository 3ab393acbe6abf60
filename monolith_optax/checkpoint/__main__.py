"""The command line of checkpoints: `monolith-checkpoint --help`."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

import monolith_optax
from monolith_optax import _console

EXIT_STATUS = (
    "Exit status: 0 done, 2 bad usage, 3 failure, 130 interrupted, 143 terminated."
)


def program() -> NoReturn:
    """Runs the command line as a program."""
    _console.program(main)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    options = parser()
    failures = OSError, ValueError, ImportError
    return _console.status_of(
        options.prog, lambda: _run(options, argv), failures=failures
    )


def _run(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    args = options.parse_args(argv)
    try:
        from monolith_optax.checkpoint._convert import convert
        from monolith_optax.checkpoint._show import show
    except ModuleNotFoundError as error:
        missing = (error.name or "A package").partition(".")[0]
        raise ImportError(
            f"{missing} is not installed: pip install 'monolith_optax[hash-tables]'."
        ) from error
    if args.command == "show":
        show(args.prefix, as_json=args.json, quiet=args.quiet)
    else:
        convert(args.source, args.target, quiet=args.quiet)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--quiet", action="store_true", help="print nothing: only set the exit status"
    )
    parser = argparse.ArgumentParser(
        prog="monolith-checkpoint",
        description="Shows and converts TensorFlow checkpoints, and shows Monolith's "
        "hash tables. Needs pip install 'monolith_optax[hash-tables]'.",
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
        help="a checkpoint, such as model/model.ckpt-6: its prefix, its index file, "
        "or its folder if there is only one in it; or the folder "
        "model/model.ckpt-6.assets, for hash tables only",
    )
    lister.add_argument("--json", action="store_true", help="print a JSON array")
    converter = commands.add_parser(
        "convert",
        parents=[common],
        help="convert a checkpoint to one that Orbax can restore, or back",
        description="Converts a TensorFlow checkpoint to an Orbax checkpoint, which "
        "holds one dictionary from TensorFlow's names to arrays. If SOURCE is the "
        "folder of such an Orbax checkpoint, converts it back. Needs pip install "
        "orbax-checkpoint; only converting back needs TensorFlow: pip install "
        "'monolith_optax[tf]'.",
        epilog=EXIT_STATUS,
    )
    converter.add_argument(
        "source",
        metavar="SOURCE",
        help="as PREFIX of show, or an Orbax checkpoint's folder",
    )
    converter.add_argument(
        "target", metavar="OUT", help="a new folder, or a new prefix"
    )
    return parser


if __name__ == "__main__":
    program()
