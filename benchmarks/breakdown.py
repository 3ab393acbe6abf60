"""Where the time of a row-sparse step goes, by operation, from JAX's profiler.

The compiled program names each of its operations after the JAX code that it comes from.
The profiler says how long each took. Operations on two threads at once count twice.
Beside them is the time in which a plain copy moves as many bytes as the step must: it
reads each gradient, and reads and writes each distinct row of the table and its slots.
"""

import re
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks.measure import Case, Side, Times, interleave
from benchmarks.rows import OPTIMIZERS, side, slices
from benchmarks.steps import Step, copy
from benchmarks.workload import Workload, batches
from monolith_optax import lazy_rows

STEPS = 20  # in a trace
# The first that is found in the names that XLA and JAX give to an operation.
PARTS = {
    "search for duplicates": r"_search",
    "sum of duplicates": r"_step\)/scatter-add|wrapped_broadcast",  # into zeros
    "gather of slots": r"_step\)/gather",
    "scatter of slots": r"_step\)/scatter$",
    "add to the tables": r"scatter-add",
    "rule and the rest": r"",
}


def main(*, quick: bool) -> list[Case]:
    """One table and 26, with one slot and with three."""
    works = [Workload(1, 1_000_000, 16, 8192), Workload(26, 100_000, 16, 2048)]
    if quick:
        works = [Workload(2, 1_000, 16, 64)]
    return [
        compare(name, work, 2 if quick else 8)
        for work in works
        for name in ("adagrad", "adamom")
    ]


def compare(name: str, work: Workload, rounds: int) -> Case:
    """Times whole steps and the copy in turns, then traces steps."""
    data = batches(work)
    gradients = slices(data)
    step = Step(lazy_rows(OPTIMIZERS[name].ours), work.ones(), gradients[0])
    ours = side(step, gradients)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(step.carry))
    copying = copy(2 * held)  # of arrays as large, which no cache holds either
    sides = {"whole step": ours, "copy": copying.side()}
    times = interleave(sides, rounds, runs=4)
    bandwidth = copying.bytes_moved() / statistics.median(times.pop("copy"))

    distinct = statistics.mean(
        sum(len(np.unique(ids)) for ids in batch) for batch in data.ids
    )
    arrays = held // (4 * work.tables * work.num_rows * work.dim)
    touched = 4 * work.dim * (2 * arrays * distinct + work.tables * work.batch)
    parts = traces(step, ours, rounds)
    limit = {"copy of as many bytes": [touched / bandwidth]}
    return Case("breakdown", f"{name}, {work}", times | parts | limit)


def traces(step: Step, prepare: Side, rounds: int) -> Times:
    """Seconds of each part of a step; each the mean of the steps in a trace."""
    part_of = parts_of(step)
    times: Times = {part: [] for part in PARTS}
    for _ in range(rounds):
        seconds = dict.fromkeys(PARTS, 0.0)
        for operation, duration in profile(prepare):
            if operation in part_of:  # not those inside a loop
                seconds[part_of[operation]] += duration / STEPS
        if not any(seconds.values()):
            raise RuntimeError("The profiler saw no operation of the compiled step.")
        for part in PARTS:
            times[part].append(seconds[part])
    return times


def parts_of(step: Step) -> dict[str, str]:
    """To which part each operation of a compiled step belongs."""
    compiled = step.jitted.lower(*step.carry, step.gradients).compile()
    program = str(compiled.as_text())
    entry = program[program.index("\nENTRY") :]
    return {
        operation: next(
            part
            for part, names in PARTS.items()
            if re.search(names, f"{operation} {name}")
        )
        for operation, name in re.findall(
            r'^ *%(\S+) = .*?metadata={op_name="([^"]*)"', entry, re.MULTILINE
        )
    }


def profile(prepare: Side) -> Iterator[tuple[str, float]]:
    """The operations that a few steps run, and their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                prepare()()
        [file] = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        yield str(operation), event.duration_ns / 1e9
