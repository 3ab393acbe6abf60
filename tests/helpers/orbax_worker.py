"""Trains a sharded table row by row and saves every step, until it is killed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from monolith_optax import RowSlices, adamom, lazy_rows

NUM_ROWS, DIM, BATCH = 80_000, 16, 64


def train(folder, steps):
    """Returns the step it continued from, and all numbers after so many steps."""
    mesh = jax.make_mesh((8,), ("x",))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("x", None))
        tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), adamom(0.1)))

        @jax.jit
        def step(params, state, number):
            key = jax.random.key(number)
            ids = jax.random.randint(key, (BATCH,), 0, NUM_ROWS)
            slices = RowSlices(ids, jax.random.normal(key, (BATCH, DIM)))
            updates, state = tx.update({"table": slices}, state, params)
            return optax.apply_updates(params, updates), state

        params = {"table": jax.device_put(jnp.ones((NUM_ROWS, DIM)), rows)}
        run = params, tx.init(params)
        with ocp.CheckpointManager(folder) as manager:
            done = manager.latest_step() or 0
            if done:
                run = manager.restore(done, args=ocp.args.StandardRestore(run))
                assert run[0]["table"].sharding.is_equivalent_to(rows, 2)
            for number in range(done + 1, steps + 1):
                run = step(*run, number)
                manager.save(number, args=ocp.args.StandardSave(run))
            manager.wait_until_finished()
        return done, [np.asarray(leaf) for leaf in jax.tree.leaves(run)]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    train(sys.argv[1], sys.maxsize)
