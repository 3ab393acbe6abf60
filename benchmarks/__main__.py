"""Runs the benchmarks: `python -m benchmarks [NAME ...] [--quick] [--output DIR]`."""

import argparse
import importlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks import pictures
from benchmarks.baseline import slower
from benchmarks.measure import machine, write

NAMES = (
    "rows",
    "breakdown",
    "scaling",
    "dlrm",
    "small_tables",
    "first_call",
    "dense",
    "many_leaves",
    "net",
)


def main() -> None:
    """Runs the benchmarks that are named, or all, and writes the results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Compares each part with its peers. PyTorch, FBGEMM and TensorFlow "
        "are left out if they are not installed (extra 'bench').",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small sizes, few runs")
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("build/benchmarks"),
        help="where benchmarks.json and the pictures go (default: %(default)s)",
    )
    parser.add_argument(
        "--baseline",
        metavar="OLD.json",
        type=Path,
        help="print what got slower than there by more than the noise of both",
    )
    args = parser.parse_args()
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"expected names out of {NAMES}, got {sorted(unknown)}")
    # Before anything is measured, in case the file is missing or is overwritten.
    baseline = json.loads(args.baseline.read_text()) if args.baseline else None
    # PyTorch's threads spin while they wait. Without enough idle cores they would slow
    # down every side, and their own most of all. Where they meet often, they are one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    cases = []
    # Each benchmark has its own process, because frameworks keep the memory they used.
    with ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        facts = pool.submit(machine).result()
        if args.quick:
            facts["quick"] = "the sizes are too small for meaningful figures"
        print(", ".join(f"{name}: {fact}" for name, fact in facts.items()))
        for name in args.names or NAMES:
            module = importlib.import_module(f"benchmarks.{name}")
            for case in pool.submit(module.main, quick=args.quick).result():
                print(case.table(), flush=True)
                cases.append(case)
    path = args.output / "benchmarks.json"
    write(cases, facts, path)
    pictures.draw(path)
    print(f"\nWrote the results to {args.output}")
    if baseline:
        print("", *slower(baseline, json.loads(path.read_text())), sep="\n")


if __name__ == "__main__":
    main()
