"""Runs the benchmarks: `python -m benchmarks [NAME ...] [--quick]`."""

import argparse
import importlib

NAMES = ["net", "rows"]


def main() -> None:
    """Runs the ones that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small sizes, once")
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there is {NAMES}")
    for name in args.names or NAMES:
        importlib.import_module(f"benchmarks.{name}").main(quick=args.quick)


if __name__ == "__main__":
    main()
