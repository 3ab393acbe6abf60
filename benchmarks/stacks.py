"""Steps on 26 tables and on a stack of them: `python -m benchmarks.stacks`.

The same model trains both ways with Adagrad, lookups and gradients included. Prints the
median milliseconds of a step and the median seconds of the processor for a first call
(tracing, compiling and running), of the stack also in units of the separate tables. The
two sides take turns, and JAX's caches are cleared before each first call.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.first_call import first_call
from benchmarks.measure import Side, interleave, machine
from benchmarks.steps import Step
from monolith_optax import TableStack, lazy_rows, slot_shardings, value_and_row_grad

NUM_TABLES, DIM = 26, 16

Loss = Callable[[Any, Any], jax.Array]


class WholeStep(Step):
    """A step from ids to new tables, jitted and donated."""

    def __init__(
        self, loss: Loss, params: Any, ids: Any, tables: Any = None, where: Any = None
    ) -> None:
        """Starts with copies of the tables; `where` is their shardings on a mesh."""
        tx = lazy_rows(optax.adagrad(0.1))

        def step(params: Any, state: Any, ids: Any) -> tuple[Any, Any]:
            _, gradients = value_and_row_grad(loss, tables)(params, ids)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, params)
        self.gradients = ids  # what the step takes beside its carry
        slots = None if where is None else slot_shardings(tx, params, where)
        state = jax.jit(tx.init, out_shardings=slots)(params)
        self.carry = jax.block_until_ready((params, state))
        places = None if where is None else (where, slots)
        self.jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=places)


def sides(rows: int, num_ids: int) -> dict[str, Callable[[], WholeStep]]:
    """What makes steps on separate tables and on their stack."""
    rng = np.random.default_rng(0)
    tables = {
        f"table{i:02}": jnp.asarray(rng.normal(size=(rows + 100 * i, DIM)), jnp.float32)
        for i in range(NUM_TABLES)
    }
    ids = {
        name: jnp.asarray(rng.integers(0, len(table), num_ids), jnp.int32)
        for name, table in tables.items()
    }
    kernel = jnp.asarray(rng.normal(size=NUM_TABLES * DIM), jnp.float32)
    stack = TableStack(tables)

    def loss(tables: Any, ids: Any) -> jax.Array:
        rows = [table[ids[name]] for name, table in tables.items()]
        return jnp.mean((jnp.concatenate(rows, axis=1) @ kernel - 1) ** 2)

    def of_stack(stacks: Any, ids: Any) -> jax.Array:
        return loss(stack.unpack(stacks), ids)

    return {
        "separate tables": lambda: WholeStep(loss, tables, ids),
        "a stack": lambda: WholeStep(of_stack, stack.pack(tables), ids),
    }


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small tables, few runs")
    quick = parser.parse_args().quick
    print(", ".join(f"{name}: {fact}" for name, fact in machine().items()))
    rows, batches = (1_000, (32,)) if quick else (100_000, (2048, 256))
    print(f"\n{NUM_TABLES} tables of {rows:,} x {DIM} and more\n")
    print("| | separate tables | a stack | ratio |\n|---|---:|---:|---:|")
    for num_ids in batches:
        steps, seconds = first_calls(rows, num_ids, 1 if quick else 4)
        each = f"{num_ids:,} ids for each table"
        line(f"first call, {each}, seconds of the processor", seconds)
        times = interleave(steps, 2 if quick else 40, runs=2)
        line(f"step, {each}, ms", {k: [1e3 * t for t in times[k]] for k in times})


def first_calls(
    rows: int, num_ids: int, rounds: int
) -> tuple[dict[str, Side], dict[str, list[float]]]:
    """The steps, and the processor's seconds of their first calls, in turns."""
    steps: dict[str, Side] = {}
    seconds: dict[str, list[float]] = {}
    makers = sides(rows, num_ids)
    for _ in range(rounds):
        for title, make in makers.items():
            step = make()
            jax.clear_caches()
            seconds.setdefault(title, []).append(first_call(step).processor)
            steps[title] = step.side()
    return steps, seconds


def line(what: str, figures: Mapping[str, list[float]]) -> None:
    """Prints a line of the table."""
    apart, stacked = map(statistics.median, figures.values())
    print(
        f"| {what} | {apart:.2f} | {stacked:.2f} | {stacked / apart:.2f} |", flush=True
    )


if __name__ == "__main__":
    main()
