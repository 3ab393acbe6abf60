"""Trains in one of several processes, or in the test's own, and checks the shardings.

It runs the functions of `examples/train_multihost.py` at a smaller size.
"""

import functools
import importlib.util
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from monolith_optax import adamom, rmsprop

PATH = Path(__file__).parents[2] / "examples" / "train_multihost.py"
DIM, BATCH, STEPS = 4, 16, 4
# An epsilon that is not small beside the squared gradients. Otherwise a step has the
# same length for any gradient, and a difference in the last bit grows with every step.
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


def train(name, dense, devices):
    """Params and state after a few steps, as they are spread over the devices."""
    mesh = mesh_of(devices)
    tx = example.clipped(OPTIMIZERS[name]())
    like = example.carry_like(tx, init, mesh)
    _, carry = example.first_carry(tx, init, like, None)
    check_shards(carry, len(devices))
    step = example.make_step(tx, like, dense=dense)
    data, _ = example.load_data()
    stream = example.batches(data, BATCH, mesh, seed=0, start=0)
    old = jax.tree.leaves(carry)
    carry, _ = example.train(step, carry, stream, range(1, STEPS + 1), None)
    assert all(leaf.is_deleted() for leaf in old), "not donated"
    check_shards(carry, len(devices))
    return carry


def restore(folder, devices=None):
    """The last step of the example with adamom, and its checkpoint on some devices."""
    devices = devices or jax.devices()
    make, rate = example.OPTIMIZERS["adamom"]
    tx = example.clipped(make(rate))
    like = example.carry_like(tx, init, mesh_of(devices))
    saved = example.open_checkpoints(folder, 1)
    done, carry = example.first_carry(tx, init, like, saved)
    saved.close()
    check_shards(carry, len(devices))
    return done, carry


def check_shards(carry, num_devices):
    """Every device has its rows of the stack and of its slots, and no others."""
    (params, _), leaves = carry, jax.tree.leaves(carry)
    [stack] = params["stacks"].values()
    stacks = [leaf for leaf in leaves if leaf.shape == stack.shape]
    assert len(stacks) >= 3
    for table in stacks:
        rows = {shard.data.shape[0] for shard in table.addressable_shards}
        assert rows == {len(table) // num_devices}
        here = {shard.index[0].start or 0 for shard in table.addressable_shards}
        assert len(here) == len(table.addressable_shards)
        assert len(here) == num_devices // jax.process_count()
    assert all(leaf.is_fully_replicated for leaf in leaves if leaf.shape != stack.shape)


def check_restored(folder, steps, carry):
    """The last checkpoint has these numbers, on the same devices."""
    done, restored = restore(folder)
    assert done == steps
    for a, b in zip(*map(jax.tree.leaves, (restored, carry)), strict=True):
        assert a.sharding == b.sharding
        for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert x.device == y.device
            np.testing.assert_array_equal(x.data, y.data)


def check_all_reduces_are_not_combined():
    """A combined one makes Gloo blame the program for a process that was lost."""
    mesh, spec = mesh_of(jax.devices()), PartitionSpec("x")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def total(arrays):
        return jax.tree.map(lambda x: x + jax.lax.psum(x, "x"), arrays)

    numbers = np.ones(8, np.float32)
    program = total.lower((numbers, numbers[:, None])).compile().as_text()
    assert program.count(" all-reduce(") == 2, program


def whole(carry):
    """All numbers, on every process."""
    gathered = multihost_utils.process_allgather(carry, tiled=True)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(gathered)]


def main():
    """Runs the example to its end, and then all cases, whose numbers it saves."""
    args = example.parse_args()
    example.join(args.addresses.split(","), args)
    check_all_reduces_are_not_combined()
    carry = example.run(args)
    check_restored(args.checkpoint_dir, args.steps, carry)
    results = {
        f"{case}-{i}": leaf
        for case in CASES
        for i, leaf in enumerate(whole(train(*case, jax.devices())))
    }
    if jax.process_index() == 0:
        np.savez(Path(args.checkpoint_dir).with_suffix(".npz"), **results)


if __name__ == "__main__":
    sys.exit(main())
