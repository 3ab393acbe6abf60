"""read_rows and write_rows against NumPy's indexing of every leaf that has rows."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from op_by_op import op_by_op
from registry import VARIANTS

from monolith_optax import (
    RowSlices,
    embedding,
    lazy_rows,
    read_rows,
    stochastic_rounding,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

NUM_ROWS, DIM = 50, 3
ROWS = np.array([40, 3, -1, NUM_ROWS, 0, 3])
SAMPLES = "adamom", "rowwise_adagrad"
VALID = np.array([True, True, False, False, True, True])


def label(params):
    return jax.tree.map(lambda x: "rows" if x.ndim == 2 else "rest", params)


WRAPPED = {
    "lazy": lazy_rows,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(2)),
    "partition": lambda tx: optax.partition(
        {"rows": lazy_rows(tx), "rest": optax.adam(0.1)}, label
    ),
    "injected": lambda tx: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(tx, optax.scale(learning_rate))
    )(learning_rate=0.1),
}


def trained(tx, seed=0):
    """Params, and a state with other numbers in each row of each slot."""
    rng = np.random.default_rng(seed)
    params = {
        "table": jnp.asarray(rng.normal(size=(NUM_ROWS, DIM)), jnp.float32),
        "dense": jnp.asarray(rng.normal(size=2), jnp.float32),
    }
    state = tx.init(params)
    gradients = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )
    updates, state = op_by_op(tx.update)(gradients, state, params)
    return optax.apply_updates(params, updates), state


def has_rows(leaf):
    return np.shape(leaf)[:1] == (NUM_ROWS,)


def assert_reads_and_writes(tx):
    params, state = trained(tx)
    rows = {"table": jnp.asarray(ROWS), "dense": None}
    values = op_by_op(functools.partial(read_rows, tx))(params, state, rows)
    of_leaves = jax.tree.leaves(values, is_leaf=lambda x: x is None)
    for leaf, read in zip(jax.tree.leaves((params, state)), of_leaves, strict=True):
        if not has_rows(leaf):
            assert read is None
            continue
        expected = np.where(
            VALID.reshape(-1, *[1] * (leaf.ndim - 1)), np.asarray(leaf)[ROWS % 50], 0
        )
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == leaf.dtype
    other_params, other_state = trained(tx, seed=1)
    to = np.array([7, 9, 11, 12, -5, NUM_ROWS])
    written = op_by_op(functools.partial(write_rows, tx))(
        other_params, other_state, {"table": jnp.asarray(to), "dense": None}, values
    )
    assert jax.tree.structure(written) == jax.tree.structure((params, state))
    for new, old, read in zip(
        *map(jax.tree.leaves, (written, (other_params, other_state))),
        of_leaves,
        strict=True,
    ):
        expected = np.array(old)
        if read is not None:
            expected[to[:4]] = read[:4]
        np.testing.assert_array_equal(new, expected)
        assert new.dtype == old.dtype


@pytest.mark.parametrize(
    "name",
    sampled((name for name, v in VARIANTS.items() if v.row.for_rows), *SAMPLES),
)
def test_every_optimizer(name):
    assert_reads_and_writes(VARIANTS[name].make())


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_every_wrapping(wrapping):
    assert_reads_and_writes(WRAPPED[wrapping](embedding.group_adagrad(0.1)))


def test_rows_that_are_moved_train_on_as_they_would_have():
    tx = lazy_rows(optax.adam(0.1))
    params, state = trained(tx)
    rows = {"table": jnp.array([4]), "dense": None}
    values = read_rows(tx, params, state, rows)
    moved = write_rows(
        tx, params, state, {"table": jnp.array([9]), "dense": None}, values
    )
    gradients = {
        "table": RowSlices(jnp.array([4, 9]), jnp.ones((2, DIM))),
        "dense": jnp.ones(2),
    }
    updates, state = tx.update(gradients, moved[1], moved[0])
    table = optax.apply_updates(moved[0], updates)["table"]
    np.testing.assert_array_equal(table[4], table[9])


def test_a_row_that_is_there_twice_gets_the_last_of_its_values():
    tx = embedding.adagrad(0.1)
    table = jnp.arange(8.0).reshape(4, 2)
    state = tx.init(table)
    values = read_rows(tx, table, state, jnp.array([0, 3, 1]))
    new, _ = write_rows(tx, table, state, jnp.array([2, 2, 0]), values)
    assert new[:, 0].tolist() == [2, 2, 6, 6]


def test_rows_of_a_stack_of_tables():
    tx = embedding.adagrad(0.1)
    stack = jnp.arange(24.0).reshape(2, 4, 3)
    state = tx.init(stack)._replace(norm=stack + 100)
    pairs = jnp.array([[1, 0], [0, 4], [0, 3]])
    weights, slots = read_rows(tx, stack, state, pairs)
    np.testing.assert_array_equal(weights, [stack[1, 0], [0, 0, 0], stack[0, 3]])
    np.testing.assert_array_equal(slots.norm[:, 0], [112, 0, 109])
    new, _ = write_rows(tx, stack, state, pairs[::-1], (weights, slots))
    np.testing.assert_array_equal(new[0, 3], stack[1, 0])


def test_sixteen_bits_and_noise():
    tx = lazy_rows(stochastic_rounding(embedding.adagrad(0.1), seed=0))
    table = jnp.arange(8, dtype=jnp.bfloat16).reshape(4, 2)
    state = tx.init(table)
    values = read_rows(tx, table, state, jnp.array([3]))
    assert values[0].dtype == jnp.bfloat16
    new, _ = write_rows(tx, table, state, jnp.array([0]), values)
    np.testing.assert_array_equal(new[0], table[3])


def test_nothing_as_large_as_the_table_is_made():
    tx = lazy_rows(optax.chain(embedding.adam(0.1), optax.trace(0.9)))
    table = jnp.zeros((100_000, 16))
    state, rows = tx.init(table), jnp.arange(64)
    values = read_rows(tx, table, state, rows)
    write = jax.jit(functools.partial(write_rows, tx), donate_argnums=(0, 1))
    memory = write.lower(table, state, rows, values).compile().memory_analysis()
    assert memory.temp_size_in_bytes < table.nbytes / 10
    assert memory.alias_size_in_bytes >= 4 * table.nbytes
    read = jax.jit(functools.partial(read_rows, tx)).lower(table, state, rows)
    assert read.compile().memory_analysis().temp_size_in_bytes < table.nbytes / 10


@pytest.mark.parametrize(
    "axis_type", sampled([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_a_sharded_table_keeps_its_sharding(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    place = NamedSharding(mesh, PartitionSpec("x"))
    tx = lazy_rows(embedding.adam(0.1))
    with jax.set_mesh(mesh):
        table = jax.device_put(jnp.arange(32.0).reshape(16, 2), place)
        state = tx.init(table)
        values = jax.jit(functools.partial(read_rows, tx))(
            table, state, jnp.array([3, -1, 15])
        )
        new, slots = jax.jit(functools.partial(write_rows, tx))(
            table, state, jnp.array([0, 1, 8]), values
        )
    assert values[0][:, 0].tolist() == [6, 0, 30]
    assert new[:, 0].tolist()[:2] == [6, 0]
    for array in new, slots.m:
        assert array.sharding.is_equivalent_to(place, array.ndim)


def test_bad_values():
    tx = embedding.adagrad(0.1)
    table = jnp.ones((4, 2))
    state, rows = tx.init(table), jnp.array([1, 2])
    weights, slots = read_rows(tx, table, state, rows)
    with pytest.raises(ValueError, match=r"params must be an array .* shape \(2, 2\)"):
        write_rows(tx, table, state, rows, (weights[:1], slots))
    with pytest.raises(ValueError, match=r"state.norm must be .* float32"):
        write_rows(
            tx,
            table,
            state,
            rows,
            (weights, slots._replace(norm=np.ones((2, 2), np.float16))),
        )
    with pytest.raises(ValueError, match="state must be a tree like state"):
        write_rows(tx, table, state, rows, (weights, None))
    with pytest.raises(ValueError, match="must be that of the optimizer"):
        read_rows(embedding.adam(0.1), table, state, rows)


def test_values_are_a_tree_of_arrays():
    tx = lazy_rows(optax.adam(0.1))
    params, state = trained(tx)
    values = read_rows(tx, params, state, {"table": jnp.array([1]), "dense": None})
    chex.assert_tree_all_finite(values)
    assert len(jax.tree.leaves(values)) == 3
