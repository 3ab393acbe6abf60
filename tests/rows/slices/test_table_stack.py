"""TableStack against NumPy, and steps on a stack against steps on its tables."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from jax.sharding import NamedSharding, PartitionSpec
from registry import VARIANTS

from monolith_optax import (
    RowSlices,
    TableStack,
    lazy_rows,
    read_rows,
    value_and_row_grad,
    write_rows,
)

SIZES = {"a": (7, 3), "b": {"c": (2, 3), "d": (5, 2)}, "e": (1, 3)}
SHARDS = sampled([1, 2, 4], 4)
SAMPLES = "adamom", "rowwise_adagrad"


def is_shape(node):
    return isinstance(node, tuple)


def tables(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        SIZES,
        is_leaf=is_shape,
    )


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shards", SHARDS)
def test_each_shard_holds_its_share_of_every_table(shards):
    stack = TableStack(tables(), shards)
    stacks = stack.pack(tables())
    assert set(stacks) == {"float32_3", "float32_2"}
    for key, array in stacks.items():
        assert (array.shape, array.dtype) == (stack.shapes[key].shape, jnp.float32)
    numbered = stack.pack(
        jax.tree.map(lambda shape: jnp.full(shape[0], 1), SIZES, is_leaf=is_shape)
    )
    for key, array in numbered.items():
        parts = np.asarray(array).reshape(shards, -1).sum(axis=1)
        tables_there = {"float32_3": 3, "float32_2": 1}[key]
        assert parts.max() - parts.min() <= tables_there * -(-7 // shards)
    assert_same(stack.unpack(stacks), tables())


@pytest.mark.parametrize("shards", SHARDS)
def test_slots_of_any_shape_and_dtype(shards):
    stack = TableStack(jax.eval_shape(tables), shards)
    for slots in (
        tables(np.float16),
        jax.tree.map(lambda x: x[:, 0], tables()),
        jax.tree.map(lambda x: x[:, :1], tables()),
    ):
        assert_same(stack.unpack(stack.pack(slots)), slots)


@pytest.mark.parametrize("shards", SHARDS)
def test_ids_of_rows(shards):
    stack = TableStack(tables(), shards)
    ids = {
        "a": jnp.array([[6, 0], [-1, 7]]),
        "b": {"c": None, "d": np.array([4, 2**32 + 1])},
        "e": jnp.array([0, 1], jnp.uint8),
    }
    found = stack.row_ids(ids)
    values = stack.concatenate(
        {
            "a": tables()["a"][ids["a"]],
            "b": {"c": None, "d": tables()["b"]["d"][np.array([4, 1])]},
            "e": tables()["e"][np.array([0, 0])],
        }
    )
    valid = {"float32_3": [1, 1, 0, 0, 1, 0], "float32_2": [1, 0]}
    for key, array in stack.pack(tables()).items():
        inside = np.array(valid[key], bool)
        assert found[key].dtype == jnp.int32
        np.testing.assert_array_equal(found[key] >= 0, inside)
        assert (np.asarray(found[key])[~inside] == -1).all()
        rows = np.asarray(array)[found[key]]
        np.testing.assert_array_equal(rows[inside], np.asarray(values[key])[inside])
    assert (
        stack.row_ids({"a": None, "b": {"c": None, "d": ids["a"]}, "e": None})[
            "float32_3"
        ]
        is None
    )


@pytest.mark.parametrize("shards", sampled([1, 2], 2))
@pytest.mark.parametrize(
    "name",
    sampled((name for name, v in VARIANTS.items() if v.row.for_rows), *SAMPLES),
)
def test_steps_on_a_stack_are_steps_on_its_tables(name, shards):
    assert_steps_agree(VARIANTS[name].make(), shards)


def looked_up(tables, ids):
    """A loss of each of the tables, as a model would have it."""
    return sum(
        (jnp.sin(table[i]) * (1 + k)).sum()
        for k, (table, i) in enumerate(
            zip(*map(jax.tree.leaves, (tables, ids)), strict=True)
        )
    )


@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("jit", sampled([False, True], True))
def test_lookups_in_its_tables_are_lookups_in_its_arrays(shards, jit):
    stack = TableStack(tables(), shards)
    stacks = stack.pack(tables())
    ids = jax.tree.map(
        lambda shape: jnp.array([0, -1, shape[0] - 1, shape[0] + 2, 0]),
        SIZES,
        is_leaf=is_shape,
    )

    def loss(stacks, ids):
        return looked_up(stack.unpack(stacks), ids)

    grad = value_and_row_grad(loss)
    value, gradients = (jax.jit(grad) if jit else grad)(stacks, ids)
    expected = jax.jit(jax.value_and_grad(loss))(stacks, ids)
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    for key, dense in expected[1].items():
        assert isinstance(gradients[key], RowSlices)
        assert gradients[key].ids.size == 5 * {"float32_3": 3, "float32_2": 1}[key]
        np.testing.assert_allclose(
            gradients[key].to_dense(len(dense)), dense, rtol=1e-6, atol=1e-7
        )


def test_a_table_that_is_used_as_a_whole_leaves_the_others_sparse():
    stack = TableStack(tables())
    stacks = stack.pack(tables())

    def loss(stacks, ids):
        tables = stack.unpack(stacks)
        return (tables["b"]["c"] ** 2).sum() + jnp.sin(tables["a"][ids]).sum()

    ids = jnp.array([1, 1, 6])
    grad = value_and_row_grad(loss)
    assert "all 2 rows of a slice" in grad.explain(stacks, ids)
    slices = jax.jit(grad)(stacks, ids)[1]["float32_3"]
    dense = jax.jit(jax.grad(loss))(stacks, ids)["float32_3"]
    assert slices.ids.size == 3 + 2
    np.testing.assert_allclose(slices.to_dense(len(dense)), dense, rtol=1e-6)


def test_a_global_norm_is_over_all_tables():
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adagrad(0.1))
    assert_steps_agree(tx, 2)


def assert_steps_agree(inner, shards, tolerance=1e-6):
    """Three steps with other ids each, from the loss's gradients by hand.

    Compilers contract products and sums differently in arrays of other lengths.
    """
    tx, stack = lazy_rows(inner), TableStack(tables(), shards)
    params = tables()
    stacks = stack.pack(params)
    state, stacked_state = tx.init(params), tx.init(stacks)
    step = jax.jit(tx.update)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ids = jax.tree.map(
            lambda shape: jnp.asarray(rng.integers(-1, shape[0] + 1, 6)),  # noqa: B023
            SIZES,
            is_leaf=is_shape,
        )
        rows = jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=(6, shape[1])), jnp.float32),  # noqa: B023
            SIZES,
            is_leaf=is_shape,
        )
        updates, state = step(jax.tree.map(RowSlices, ids, rows), state, params)
        params = optax.apply_updates(params, updates)
        slices = jax.tree.map(RowSlices, stack.row_ids(ids), stack.concatenate(rows))
        updates, stacked_state = step(slices, stacked_state, stacks)
        stacks = optax.apply_updates(stacks, updates)
    for a, b in zip(*map(jax.tree.leaves, (stack.unpack(stacks), params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_a_state_moves_to_another_number_of_shards():
    tx = lazy_rows(optax.trace(0.9))
    one, two = TableStack(tables(), 1), TableStack(tables(), 2)
    stacks = one.pack(tables())
    state = tx.init(stacks)
    _, state = tx.update(jax.tree.map(jnp.ones_like, stacks), state, stacks)
    moved = jax.tree.map(
        lambda slot: two.pack(one.unpack(slot)) if isinstance(slot, dict) else slot,
        state,
        is_leaf=lambda slot: isinstance(slot, dict),
    )
    assert_same(two.unpack(moved.trace), one.unpack(state.trace))
    assert jax.tree.structure(moved) == jax.tree.structure(tx.init(two.pack(tables())))


def test_rows_of_a_stack_are_read_and_written():
    stack = TableStack(tables(), 2)
    tx, stacks = lazy_rows(optax.adagrad(0.1)), stack.pack(tables())
    state = tx.init(stacks)
    none = {"a": None, "b": {"c": None, "d": None}, "e": None}
    values = read_rows(tx, stacks, state, stack.row_ids(none | {"a": jnp.array([6])}))
    np.testing.assert_array_equal(values[0]["float32_3"][0], tables()["a"][6])
    new, _ = write_rows(
        tx, stacks, state, stack.row_ids(none | {"e": jnp.array([0])}), values
    )
    np.testing.assert_array_equal(stack.unpack(new)["e"][0], tables()["a"][6])


def test_huge_tables_are_made_on_their_devices():
    mesh = jax.make_mesh((8,), ("x",))
    place = NamedSharding(mesh, PartitionSpec("x"))
    shapes = {"a": jax.ShapeDtypeStruct((80, 3), jnp.float32)}
    stack = TableStack(shapes, shards=8)

    def make(key):
        return stack.pack({"a": jax.random.normal(key, (80, 3))})

    stacks = jax.jit(make, out_shardings=place)(jax.random.key(0))
    assert stacks["float32_3"].sharding.is_equivalent_to(place, 2)
    assert stacks["float32_3"].addressable_shards[0].data.shape == (10, 3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"tables\['b'\] must be a table .*\(3,\)"):
        TableStack({"a": jnp.ones((2, 2)), "b": jnp.ones(3)})
    with pytest.raises(ValueError, match="shards must be at least 1, but it is 0"):
        TableStack({"a": jnp.ones((2, 2))}, 0)
    with pytest.raises(ValueError, match="too large for int32"):
        TableStack({"a": jax.ShapeDtypeStruct((2**31, 2), jnp.float32)})
    stack = TableStack(tables(), 2)
    with pytest.raises(ValueError, match=r"tables\['b'\]\['c'\], .*\['e'\] is missing"):
        stack.pack({"a": jnp.ones((7, 3))})
    with pytest.raises(ValueError, match=r"the stack has no tables\['f'\]\."):
        stack.pack(tables() | {"f": jnp.ones((7, 3))})
    with pytest.raises(ValueError, match=r"tables\['a'\] must have 7 rows"):
        stack.pack(tables() | {"a": jnp.ones((8, 3))})
    with pytest.raises(ValueError, match="rows of one dtype and shape"):
        stack.pack(tables() | {"a": jnp.ones((7, 3), jnp.float16)})
    with pytest.raises(ValueError, match="dict with the keys"):
        stack.unpack([])
    stacks = stack.pack(tables())
    with pytest.raises(ValueError, match=r"stacks\['float32_2'\] must have 6 rows"):
        stack.unpack(stacks | {"float32_2": jnp.ones((7, 2))})
    with pytest.raises(ValueError, match="must be integers"):
        stack.row_ids(tables())
    with pytest.raises(ValueError, match=r"rows\['a'\] must have rows of shape \(3,\)"):
        stack.concatenate(tables() | {"a": jnp.ones((4, 2))})


def test_a_stack_is_traced_without_arrays():
    stack = TableStack(jax.eval_shape(tables), 4)
    types = jax.eval_shape(stack.pack, jax.eval_shape(tables))
    assert jax.tree.map(lambda t: t.shape, types) == {
        key: each.shape for key, each in stack.shapes.items()
    }
    assert "4 tables" in repr(stack)
    unpack = functools.partial(jax.eval_shape, stack.unpack)
    shapes = jax.tree.map(lambda t: t.shape, unpack(types))
    assert shapes == SIZES
