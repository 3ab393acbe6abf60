"""States saved and restored with Orbax."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from monolith_optax import RowSlices, adamom, lazy_rows, rmsprop

OPTIMIZERS = {
    "adamom": lambda: adamom(0.1),
    "compact_c": lambda: adamom(0.1, compact_c=True),
    "rmsprop": lambda: rmsprop(0.1),
    "chained": lambda: optax.chain(optax.clip_by_global_norm(1.0), adamom(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_goes_on_to_the_bit(tmp_path, name):
    tx = lazy_rows(OPTIMIZERS[name]())
    params = {"table": jnp.ones((10, 2))}

    @jax.jit
    def step(params, state, ids):
        slices = RowSlices(ids, jnp.sin(jnp.arange(ids.size * 2.0).reshape(-1, 2)))
        updates, state = tx.update({"table": slices}, state, params)
        return optax.apply_updates(params, updates), state

    run = step(params, tx.init(params), jnp.array([1, 5, 1]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step-1", run)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step-1", run)
    chex.assert_trees_all_equal(restored, run)
    chex.assert_trees_all_equal(
        step(*restored, jnp.array([5, 7])), step(*run, jnp.array([5, 7]))
    )
