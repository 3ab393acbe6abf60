"""Our row-sparse steps as one size grows and the others stay: ids, columns, tables.

Twice the ids may take twice the time, but an id should cost the same.
"""

import gc
from typing import Any

import numpy as np

from benchmarks.measure import Case, interleave
from benchmarks.rows import OPTIMIZERS, side, slices
from benchmarks.steps import Step
from benchmarks.workload import Workload, batches
from monolith_optax import lazy_rows

# Each list grows one size.
IDS = [Workload(1, 1_000_000, 16, n) for n in (1024, 8192, 65_536, 262_144, 1_048_576)]
DIMS = [Workload(1, 1_000_000, dim, 8192) for dim in (8, 16, 32, 64, 128, 256)]
TABLES = [Workload(count, 50_000, 16, 2048) for count in (1, 5, 26, 100, 200)]
ROWS = [Workload(1, num_rows, 4, 8192) for num_rows in (10**4, 10**6, 10**8)]
QUICK = [Workload(1, 1000, 8, n) for n in (64, 128)]


def main(*, quick: bool) -> list[Case]:
    """One case for each list, whose sides are the sizes."""
    lists = {"ids": IDS, "dim": DIMS, "tables": TABLES, "rows": ROWS}
    if quick:
        lists = {"ids": QUICK}
    return [grow(size, works, quick) for size, works in lists.items()]


def grow(size: str, works: list[Workload], quick: bool) -> Case:
    """Times the steps of one list."""
    gc.collect()
    tx = lazy_rows(OPTIMIZERS["adagrad"].ours)
    sides = {}
    for work in works:
        gradients = slices(batches(work))
        sides[str(work)] = side(Step(tx, work.ones(), gradients[0]), gradients)
    times = interleave(sides, rounds=2 if quick else 8, runs=2 if quick else 4)
    columns: dict[str, dict[str, Any]] = {
        size: {str(work): work.sizes()[size] for work in works},
        "ns for an id": {
            str(work): 1e9
            * float(np.median(times[str(work)]))
            / work.tables
            / work.batch
            for work in works
        },
    }
    return Case("scaling", f"adagrad, growing {size}", times, more=columns)
