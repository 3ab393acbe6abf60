"""Steps on a spread table in one of several processes: ADDRESS, COUNT, NUMBER, FILE."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from monolith_optax import embedding, lazy_rows, value_and_row_grad

DEVICES, NUM_ROWS, DIM, IDS = 8, 1024, 4, 384


def join(address, count, number):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, count, number)


def batches():
    """Ids that fit their buffers, and those of one owner, which do not."""
    rng = np.random.default_rng(0)
    for most in (NUM_ROWS, NUM_ROWS // DEVICES, NUM_ROWS):
        yield rng.integers(0, most, IDS).astype("int32"), most < NUM_ROWS


def train():
    """The table, its slots and the values of the loss after a step for each batch."""
    mesh = jax.make_mesh((DEVICES,), ("x",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("x"))
    tx = lazy_rows(embedding.adagrad(0.1))

    def place(array):
        return jax.make_array_from_callback(array.shape, rows, lambda i: array[i])

    def loss(table, ids):
        return jnp.mean(jnp.tanh(table[ids]) ** 2)

    @jax.jit
    def step(table, state, ids):
        value, gradient = value_and_row_grad(loss, P("x"))(table, ids)
        updates, state = tx.update(gradient, state, table)
        spilled = gradient.placement.spilled
        return optax.apply_updates(table, updates), state, value, spilled

    start = np.random.default_rng(1).normal(size=(NUM_ROWS, DIM)).astype("float32")
    table = place(start)
    state, values = jax.jit(tx.init)(table), []
    for ids, spills in batches():
        table, state, value, spilled = step(table, state, place(ids))
        values.append(float(value))  # with Gloo two steps in flight can hang
        assert bool(spilled) is spills
    trained = multihost_utils.process_allgather((table, state), tiled=True)
    return [*map(np.asarray, jax.tree.leaves(trained)), np.array(values)]


def main(address, count, number, file):
    join(address, int(count), int(number))
    results = train()
    if number == "0":
        np.savez(file, *results)


if __name__ == "__main__":
    main(*sys.argv[1:])
