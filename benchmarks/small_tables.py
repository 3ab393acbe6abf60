"""Steps on rows and dense steps on tables of few rows: where the one gets cheaper.

A step is the gradient of a lookup, the optimizer and `apply_updates`, jitted and
donated: with `value_and_row_grad(loss, True)` and with `value_and_row_grad(loss,
False)`. `sparse_tables` decides by what this shows.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.measure import Case, Side, interleave
from benchmarks.steps import RATE
from monolith_optax import apply_updates, embedding, lazy_rows, value_and_row_grad

OPTIMIZERS = {
    "adagrad": embedding.adagrad(RATE),
    "rowwise_adagrad": embedding.rowwise_adagrad(RATE),
    "optax.adam": optax.adam(RATE),
}
# Rows for each id of the batch.
SHARES = 0.25, 0.5, 1.0, 2.0, 4.0


def main(*, quick: bool) -> list[Case]:
    """Two batches and two widths for each optimizer."""
    sizes = [(64, 4)] if quick else [(2048, 16), (8192, 16), (2048, 64)]
    return [
        compare(name, ids, dim, share, quick)
        for name in OPTIMIZERS
        for ids, dim in sizes
        for share in (SHARES[:2] if quick else SHARES)
    ]


def compare(name: str, num_ids: int, dim: int, share: float, quick: bool) -> Case:
    """Times both steps in turns."""
    num_rows = int(share * num_ids)
    rng = np.random.default_rng(0)
    ids = jnp.array(rng.integers(0, num_rows, num_ids), jnp.int32)
    target = jnp.array(rng.normal(size=(num_ids, dim)), jnp.float32)
    tx = lazy_rows(OPTIMIZERS[name])

    def loss(table: jax.Array, ids: jax.Array) -> jax.Array:
        return (table[ids] * target).sum()

    def side(is_sparse: bool) -> Side:
        def step(table: Any, state: Any, ids: Any) -> tuple[Any, Any]:
            _, gradient = value_and_row_grad(loss, is_sparse)(table, ids)
            updates, state = tx.update(gradient, state, table)
            return apply_updates(table, updates), state

        jitted = jax.jit(step, donate_argnums=(0, 1))
        table = jnp.ones((num_rows, dim))
        carry = [(table, tx.init(table))]

        def run() -> None:
            carry[0] = jax.block_until_ready(jitted(*carry[0], ids))

        return lambda: run

    sides = {"rows": side(True), "dense": side(False)}
    times = interleave(sides, rounds=2 if quick else 4, runs=2 if quick else 8)
    return Case(
        "small_tables",
        f"{name}, {dim} columns, {num_ids:,} ids, {num_rows:,} rows",
        times,
        sizes={"rows": num_rows, "dim": dim, "ids": num_ids},
    )
