"""Trains in one of several processes, or in the test's own, and checks the shardings.

It runs the functions of `examples/train_multihost.py` at a smaller size.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from monolith_optax import adamom, lazy_rows, rmsprop

PATH = Path(__file__).parents[2] / "examples" / "train_multihost.py"
DIM, BATCH, STEPS = 4, 16, 4
# An epsilon that is not small beside the squared gradients: else a step has the same
# length for any gradient, and what differs in its last bit grows from step to step.
OPTIMIZERS = {
    "adamom": lambda: adamom(0.1, mom_decay=0.9, epsilon=1e-3),
    "compact_c": lambda: adamom(0.1, compact_c=True),
    "rmsprop": lambda: rmsprop(0.1, beta1=0.9, epsilon=1e-3),
}
CASES = [(name, dense) for name in ("adamom", "rmsprop") for dense in (False, True)]


def load_example():
    spec = importlib.util.spec_from_file_location("train_multihost", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


def mesh_of(devices):
    return Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))


def init():
    return example.init_params(DIM, 0)


def train(name, dense, devices, saved=None):
    """Params and state after a few steps, as they are spread over the devices."""
    mesh = mesh_of(devices)
    tx = lazy_rows(OPTIMIZERS[name]())
    like = example.carry_like(tx, init, mesh)
    done, carry = example.first_carry(tx, init, like, saved)
    check_shards(carry, len(devices))
    step = example.make_step(tx, like, dense=dense)
    data, _ = example.load_data()
    stream = example.batches(data, BATCH, mesh, seed=0, start=done)
    numbers = range(done + 1, STEPS + 1)
    old = jax.tree.leaves(carry)
    carry, _ = example.train(step, carry, stream, numbers, saved)
    if numbers:
        assert all(leaf.is_deleted() for leaf in old), "not donated"
    check_shards(carry, len(devices))
    return carry


def check_shards(carry, num_devices):
    """Every device has its rows of tables and of their slots, and no others."""
    params, state = carry
    for slot in params, *state[1:]:
        if isinstance(slot, jax.Array):  # c of compact_c
            assert slot.shape == ()
            assert slot.is_fully_replicated
            continue
        for table in slot["fields"], slot["pairs"]:
            rows = {shard.data.shape[0] for shard in table.addressable_shards}
            assert rows == {len(table) // num_devices}
            here = {shard.index[0].start or 0 for shard in table.addressable_shards}
            assert len(here) == len(table.addressable_shards)
            assert len(here) == num_devices // jax.process_count()
        assert slot["hidden"].is_fully_replicated


def train_and_restore(folder):
    """Trains, and checks that the last checkpoint is the same on the same devices."""
    both = []
    for _ in range(2):  # for the second time no step is left
        saved = example.open_checkpoints(folder, STEPS)
        both.append(train(*CASES[0], jax.devices(), saved))
        saved.close()
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        assert a.sharding == b.sharding
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert x.device == y.device
            np.testing.assert_array_equal(x.data, y.data)
    return both[1]


def whole(carry):
    """All numbers, on every process."""
    gathered = multihost_utils.process_allgather(carry, tiled=True)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(gathered)]


def main():
    parser = argparse.ArgumentParser()
    for option in "process-id", "num-processes", "cpu-devices", "heartbeat-timeout":
        parser.add_argument(f"--{option}", type=int)
    parser.add_argument("--deadline", type=float, default=60.0)
    parser.add_argument("--coordinator")
    parser.add_argument("--folder")
    args = parser.parse_args()
    example.join(args)
    carries = [train_and_restore(f"{args.folder}/checkpoints")]
    carries += [train(*case, jax.devices()) for case in CASES[1:]]
    results = {
        f"{case}-{i}": leaf
        for case, carry in zip(CASES, carries, strict=True)
        for i, leaf in enumerate(whole(carry))
    }
    if jax.process_index() == 0:
        np.savez(f"{args.folder}/results.npz", **results)


if __name__ == "__main__":
    sys.exit(main())
