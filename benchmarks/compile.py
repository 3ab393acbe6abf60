"""How long JAX takes to trace and to compile a step."""

import time
from typing import Any

import jax.numpy as jnp
import optax

from benchmarks.dense import transformer
from benchmarks.measure import Case, Times
from benchmarks.steps import OPTIMIZERS, Step


def main(*, quick: bool) -> list[Case]:
    """A transformer's 196 leaves, and 2,000 leaves of 32 numbers."""
    count = 20 if quick else 2000
    many = {f"leaf{i:04}": jnp.ones(32) for i in range(count)}
    flat = {"optax.flatten(adamom)": lambda: optax.flatten(OPTIMIZERS["adamom"]())}
    return [
        compare("196 leaves", transformer(True, jnp.float32), rounds=1 if quick else 3),
        compare(f"{count} leaves", many, rounds=1, more=flat),
    ]


def compare(name: str, params: Any, rounds: int, more: Any = None) -> Case:
    """Times tracing by itself, and tracing, lowering and compiling together."""
    makers = OPTIMIZERS | (more or {})
    traces: Times = {title: [] for title in makers}
    totals: Times = {title: [] for title in makers}
    for _ in range(rounds):
        for title, make in makers.items():
            step = Step(make(), params, params)
            start = time.perf_counter()
            traced = step.jitted.trace(*step.carry, params)
            middle = time.perf_counter()
            traced.lower().compile()
            traces[title].append(middle - start)
            totals[title].append(time.perf_counter() - start)
    more = {"tracing ms": {title: 1e3 * min(times) for title, times in traces.items()}}
    return Case("compile", f"{name}: to trace and compile", totals, more=more)
