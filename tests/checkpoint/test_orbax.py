"""States saved and restored with Orbax, also after a kill in the middle of a save."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import orbax_worker
import pytest
from registry import VARIANTS

from monolith_optax import RowSlices, lazy_rows

OPTIMIZERS = {name: variant.make for name, variant in VARIANTS.items()}
OPTIMIZERS["chained"] = lambda: optax.chain(
    optax.clip_by_global_norm(1.0), OPTIMIZERS["adamom"]()
)
DENSE = {name for name, variant in VARIANTS.items() if not variant.row.for_rows}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_restored_run_continues_to_the_bit(tmp_path, name):
    tx = OPTIMIZERS[name]() if name in DENSE else lazy_rows(OPTIMIZERS[name]())
    params = {"table": jnp.ones((10, 2))}

    @jax.jit
    def step(params, state, ids):
        slices = RowSlices(ids, jnp.sin(jnp.arange(ids.size * 2.0).reshape(-1, 2)))
        gradient = slices.to_dense(10) if name in DENSE else slices
        updates, state = tx.update({"table": gradient}, state, params)
        return optax.apply_updates(params, updates), state

    run = step(params, tx.init(params), jnp.array([1, 5, 1]))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step-1", run)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step-1", run)
    chex.assert_trees_all_equal(restored, run)
    ids = jnp.array([5, 7, 5])
    chex.assert_trees_all_equal(step(*restored, ids), step(*run, ids))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_the_middle_of_a_save_it_continues_to_the_bit(tmp_path):
    """Sharded and row by row. The one that is killed is a process of its own."""
    folder = tmp_path / "killed"
    while not half_saved(folder):  # a save may end just before the kill
        kill_in_a_save(folder)
    complete = max(int(step.name) for step in folder.iterdir() if step.name.isdigit())
    steps = complete + 3
    done, resumed = orbax_worker.train(folder, steps)
    assert done == complete
    _, straight = orbax_worker.train(tmp_path / "straight", steps)
    chex.assert_trees_all_equal(resumed, straight)


def kill_in_a_save(folder):
    victim = subprocess.Popen([sys.executable, orbax_worker.__file__, folder])
    with victim:
        try:
            while not ((folder / "2").exists() and half_saved(folder)):
                assert victim.poll() is None
        finally:
            victim.kill()


def half_saved(folder):
    """Whether there is a save that is not complete."""
    return any("tmp" in step.name for step in folder.glob("*"))
