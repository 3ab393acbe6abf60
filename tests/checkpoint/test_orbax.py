"""States saved and restored with Orbax, also after a kill in the middle of a save."""

import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
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


def worker(folder, steps, result):
    script = Path(__file__).parents[1] / "helpers" / "orbax_worker.py"
    command = [sys.executable, script, folder, str(steps), result]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process):
    with process:
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    return output


def test_killed_in_the_middle_of_a_save_it_goes_on_to_the_bit(tmp_path):
    """Sharded, row by row, and each run in a process of its own."""
    folder = tmp_path / "killed"
    while not half_saved(folder):  # a save may end just before the kill
        kill_in_a_save(folder)
    complete = max(int(step.name) for step in folder.iterdir() if step.name.isdigit())
    steps = complete + 3
    resumed = finish(worker(folder, steps, tmp_path / "resumed.npz"))
    assert resumed == f"resumes after {complete}\n"
    finish(worker(tmp_path / "straight", steps, tmp_path / "straight.npz"))
    with (
        np.load(tmp_path / "resumed.npz") as a,
        np.load(tmp_path / "straight.npz") as b,
    ):
        assert a.files == b.files
        for name in a.files:
            np.testing.assert_array_equal(a[name], b[name])


def kill_in_a_save(folder):
    with worker(folder, 10_000, folder / "never.npz") as victim:
        try:
            while not ((folder / "2").exists() and half_saved(folder)):
                assert victim.poll() is None
        finally:
            victim.kill()


def half_saved(folder):
    """Whether there is a save that is not complete."""
    return any("tmp" in step.name for step in folder.glob("*"))
