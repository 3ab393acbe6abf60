"""Whole training steps of a DLRM, and their parts, beside PyTorch and FBGEMM.

All sides train the same model on the same batches from the same numbers, on one core,
with temporary arrays in huge pages; that their losses are the same is checked before
anything is timed. Each step is timed until its results are ready. The parts:

- lookups: the sums of the bags of all tables.
- MLPs: the loss, its gradients with respect to the sums and the MLPs, and Adam's step.
- update: from the gradients of the sums to new tables, with Adagrad's step.
"""

import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from benchmarks.measure import Case, Side, interleave

SIZES = tuple(int(size) for size in np.geomspace(10, 5_000_000, 26))


def main(*, quick: bool) -> list[Case]:
    """One id in each table, and bags of ids."""
    # A process inherits these, and must have them before it begins.
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        lengths = (None, 3.2)
        found = [pool.submit(compare, length, quick).result() for length in lengths]
    return [case for cases in found for case in cases]


def compare(length: float | None, quick: bool) -> list[Case]:
    """Times the whole step of each side, and its parts, in turns."""
    # JAX asks how many cores it has when it begins.
    from benchmarks.dlrm_data import Job, batches
    from benchmarks.dlrm_ours import Ours
    from benchmarks.dlrm_peers import Fbgemm, Peer, PyTorch

    job = Job((10, 100, 3000), 4, 64, length) if quick else Job(SIZES, 16, 2048, length)
    data = batches(job, 4 if quick else 16)
    steps: dict[str, Any] = {"ours": Ours(job, data)}
    peers: dict[str, type[Peer]] = {"PyTorch": PyTorch, "FBGEMM": Fbgemm}
    for title, peer in peers.items():
        try:
            steps[title] = peer(job, data)
        except ImportError as error:
            print(f"{title} is left out: {error}")
    first = {
        title: [step.first_loss() for _ in range(3)] for title, step in steps.items()
    }
    for title, losses in first.items():
        np.testing.assert_allclose(losses, first["ours"], 1e-5, err_msg=title)
    by_title = {title: sides_of(step) for title, step in steps.items()}
    parts = list(by_title["ours"])
    sides = {
        f"{part}, {title}": by_title[title][part] for part in parts for title in steps
    }
    times = interleave(sides, rounds=2 if quick else 8, runs=2 if quick else 3)
    ids = round(statistics.mean(sum(map(len, batch.ids)) for batch in data))
    return [
        Case(
            "dlrm",
            f"{job}, {part}",
            {title: times[f"{part}, {title}"] for title in steps},
            sizes={"tables": len(job.sizes), "dim": job.dim, "ids": ids},
        )
        for part in parts
    ]


def sides_of(step: Any) -> dict[str, Side]:
    """The whole step and its parts."""
    return {
        "whole step": step.whole,
        "lookups": step.only_lookups,
        "MLPs": step.only_mlps,
        "update": step.only_update,
    }
