"""How long the first call of a step takes, which traces and compiles it.

JAX's caches are cleared before each, so that nothing is known of an earlier step.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.dense import transformer
from benchmarks.measure import Case
from benchmarks.rows import OPTIMIZERS as ROW_OPTIMIZERS
from benchmarks.steps import OPTIMIZERS, Step
from monolith_optax import RowSlices, lazy_rows


class FirstCall(NamedTuple):
    """Seconds on the clock for tracing, for all, and of the processor for all."""

    tracing: float
    total: float
    processor: float


def main(*, quick: bool) -> list[Case]:
    """26 tables of one size and of many, and a transformer's 196 leaves."""
    count, rounds = (3, 1) if quick else (26, 5)
    lazy = {
        f"lazy_rows({name})": lazy_rows(ROW_OPTIMIZERS[name].ours)
        for name in ("adagrad", "optax.adam", "adamom")
    }
    slices = [RowSlices(jnp.zeros(2048, jnp.int32), jnp.ones((2048, 16)))] * count
    cases = []
    for kind, more in ("of one size", 0), ("of different sizes", 100):
        tables = [jnp.ones((10_000 + more * i, 16)) for i in range(count)]
        cases.append(compare(f"{count} tables {kind}", lazy, tables, slices, rounds))
    params = transformer(16, 2 if quick else 12, jnp.float32)
    leaves = {title: make() for title, make in OPTIMIZERS.items()}
    name = f"{len(jax.tree.leaves(params))} leaves"
    return [*cases, compare(name, leaves, params, params, min(rounds, 3))]


def compare(
    name: str,
    optimizers: Mapping[str, optax.GradientTransformation],
    params: Any,
    gradients: Any,
    rounds: int,
) -> Case:
    """The first calls of the optimizers, in turns."""
    calls: dict[str, list[FirstCall]] = {title: [] for title in optimizers}
    for _ in range(rounds):
        for title, tx in optimizers.items():
            step = Step(tx, params, gradients)
            jax.clear_caches()
            calls[title].append(first_call(step))
    return case(name, calls)


def first_call(step: Step) -> FirstCall:
    """Times it; the run itself is part of it, a thousandth."""
    start, start_of_processor = time.perf_counter(), time.process_time()
    step.jitted.trace(*step.carry, step.gradients)
    tracing = time.perf_counter() - start
    step()
    total = time.perf_counter() - start
    return FirstCall(tracing, total, time.process_time() - start_of_processor)


def case(name: str, calls: Mapping[str, list[FirstCall]]) -> Case:
    """The case of such calls."""

    def least(part: Callable[[FirstCall], float]) -> dict[str, float]:
        return {title: 1e3 * min(map(part, some)) for title, some in calls.items()}

    return Case(
        "first_call",
        name,
        {title: [call.total for call in some] for title, some in calls.items()},
        more={
            "tracing ms": least(lambda call: call.tracing),
            "processor ms": least(lambda call: call.processor),
        },
    )
