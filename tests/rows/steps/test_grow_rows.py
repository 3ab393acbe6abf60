"""grow_rows and restack: what is there stays, what is new is as at the beginning."""

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
    TableStack,
    embedding,
    grow_rows,
    lazy_rows,
    restack,
    value_and_row_grad,
)

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

SAMPLES = "adamom", "rowwise_adagrad"
OLD, NEW, DIM = 5, 8, 3
BY_NAME = sampled((name for name, v in VARIANTS.items() if v.row.for_rows), *SAMPLES)


def label(params):
    return jax.tree.map(lambda x: "rows" if x.ndim == 2 else "rest", params)


WRAPPED = {
    "lazy": lazy_rows,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale(2)),
    "partition": lambda tx: optax.partition(
        {"rows": lazy_rows(tx), "rest": optax.adam(0.1)}, label
    ),
}


def trained(tx, params):
    state, update = tx.init(params), op_by_op(tx.update)
    for _ in range(2):
        gradients = jax.tree.map(lambda x: jnp.sin(x) + 1, params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def parameters(num_rows=OLD):
    table = np.random.default_rng(0).normal(size=(num_rows, DIM))
    return {"table": jnp.asarray(table, jnp.float32), "dense": jnp.ones(2)}


def assert_grown(tx):
    params, state = trained(tx, parameters())
    new, new_state = grow_rows(tx, params, state, {"table": NEW, "dense": None}, 0.5)
    assert (new["table"][OLD:] == 0.5).all()
    np.testing.assert_array_equal(new["table"][:OLD], params["table"])
    np.testing.assert_array_equal(new["dense"], params["dense"])
    start = tx.init(new)
    assert jax.tree.structure(new_state) == jax.tree.structure(start)
    for after, before, initial in zip(
        *map(jax.tree.leaves, (new_state, state, start)), strict=True
    ):
        assert after.dtype == before.dtype
        if np.shape(before)[:1] != (OLD,):
            np.testing.assert_array_equal(after, before)
            continue
        np.testing.assert_array_equal(after[:OLD], before)
        np.testing.assert_array_equal(after[OLD:], initial[OLD:])


@pytest.mark.parametrize("name", BY_NAME)
def test_every_optimizer(name):
    assert_grown(VARIANTS[name].make())


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_every_wrapping(wrapping):
    assert_grown(WRAPPED[wrapping](embedding.group_adagrad(0.1)))


def test_a_grown_table_trains_on_as_one_that_was_as_large_from_the_start():
    tx = lazy_rows(optax.adam(0.1))
    large = parameters(NEW)
    small = large | {"table": large["table"][:OLD]}

    def step(params, state, ids):
        slices = RowSlices(ids, jnp.ones((len(ids), DIM)))
        gradients = {"table": slices, "dense": jnp.ones(2)}
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    large_state, small_state = tx.init(large), tx.init(small)
    large, large_state = step(large, large_state, jnp.array([1, 4, 1]))
    small, small_state = step(small, small_state, jnp.array([1, 4, 1]))
    rows, init = (
        {"table": NEW, "dense": None},
        {"table": large["table"][OLD:], "dense": 0},
    )
    small, small_state = grow_rows(tx, small, small_state, rows, init)
    large, large_state = step(large, large_state, jnp.array([1, 7]))
    small, small_state = step(small, small_state, jnp.array([1, 7]))
    for a, b in zip(
        *map(jax.tree.leaves, ((large, large_state), (small, small_state))), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "axis_type", sampled([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_a_sharded_table_keeps_its_sharding(axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    place = NamedSharding(mesh, PartitionSpec("x"))
    tx = lazy_rows(embedding.adam(0.1))
    with jax.set_mesh(mesh):
        table = jax.device_put(jnp.ones((16, 2)), place)
        new, state = grow_rows(tx, table, tx.init(table), 24, 0.5)
    assert new[:, 0].tolist() == [1] * 16 + [0.5] * 8
    for array in new, state.m:
        assert array.shape == (24, 2)
        assert array.sharding.is_equivalent_to(place, 2)


@pytest.mark.slow
def test_a_spread_table_grows_between_steps():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec("x"))
    tx = lazy_rows(embedding.adagrad(0.1))

    def trained(table, tables):
        @jax.jit
        def step(table, state, ids):
            def loss(table):
                return jnp.sin(table[ids]).sum()

            _, gradient = value_and_row_grad(loss, tables)(table)
            updates, state = tx.update(gradient, state, table)
            return optax.apply_updates(table, updates), state

        table, state = step(table, tx.init(table), jnp.arange(8) * 3 % 16)
        table, state = grow_rows(tx, table, state, 24, 0.5)
        return step(table, state, jnp.arange(8) * 5 % 24)

    start = jnp.linspace(0, 1, 32).reshape(16, 2)
    expected = jax.tree.leaves(trained(start, True))
    actual = jax.tree.leaves(trained(jax.device_put(start, place), PartitionSpec("x")))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_bad_rows():
    tx = embedding.adagrad(0.1)
    params = parameters()
    state = tx.init(params)
    for rows, match in [
        (
            {"table": 4, "dense": None},
            r"params\['table'\] has 5 rows and cannot be .* 4",
        ),
        ({"table": 0.5, "dense": None}, r"params\['table'\] a number of rows.* 0.5"),
        ({"table": 6}, "rows must be .* prefix"),
    ]:
        with pytest.raises(ValueError, match=match):
            grow_rows(tx, params, state, rows)
    with pytest.raises(ValueError, match=r"must broadcast to \(3, 3\).*\(2, 3\)"):
        grow_rows(tx, params, state, {"table": 8, "dense": None}, jnp.ones((2, 3)))
    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.transpose, params), optax.identity().update
    )
    with pytest.raises(ValueError, match=r"state\['table'\] of shape \(3, 5\)"):
        grow_rows(tx, params, tx.init(params), {"table": 8, "dense": None})


@pytest.mark.parametrize(
    ("shards", "new_shards"), sampled([(1, 1), (1, 2), (4, 2)], (4, 2))
)
@pytest.mark.parametrize("name", BY_NAME)
def test_a_table_is_added_and_another_grows(name, shards, new_shards):
    tx = lazy_rows(VARIANTS[name].make())
    sizes = {"a": (5, 3), "b": (4, 3), "c": (3, 2)}
    more = {"a": (7, 3), "aa": (2, 3), "b": (4, 3), "c": (3, 2), "d": (6, 1)}

    def ones(sizes):
        return {name: jnp.ones(shape) for name, shape in sizes.items()}

    old, new = TableStack(ones(sizes), shards), TableStack(ones(more), new_shards)
    params = {"tables": old.pack(ones(sizes)), "dense": jnp.ones(2)}
    params, state = trained(tx, params)
    grown, grown_state = restack(tx, params, state, old, new, 0.25)
    start = tx.init(grown)
    assert jax.tree.structure(grown_state) == jax.tree.structure(start)
    np.testing.assert_array_equal(grown["dense"], params["dense"])
    before, after = old.unpack(params["tables"]), new.unpack(grown["tables"])
    for table, (num_rows, _) in sizes.items():
        np.testing.assert_array_equal(after[table][:num_rows], before[table])
        assert (after[table][num_rows:] == 0.25).all()
    for field in tx.init(params)._fields:
        slot, slot_before = getattr(grown_state, field), getattr(state, field)
        if not isinstance(slot, dict):
            np.testing.assert_array_equal(slot, slot_before)
            continue
        tables, then = new.unpack(slot["tables"]), old.unpack(slot_before["tables"])
        initial = new.unpack(getattr(start, field)["tables"])
        for table in more:
            count = len(then[table]) if table in then else 0
            if count:
                np.testing.assert_array_equal(tables[table][:count], then[table])
            np.testing.assert_array_equal(tables[table][count:], initial[table][count:])


def test_a_stack_that_loses_something():
    tables = {"a": jnp.ones((5, 3)), "b": jnp.ones((4, 3))}
    old, tx = TableStack(tables), embedding.adagrad(0.1)
    params = old.pack(tables)
    for new in {"a": jnp.ones((5, 3))}, tables | {"b": jnp.ones((3, 3))}:
        with pytest.raises(ValueError, match=r"tables\['b'\] has 4 rows of float32_3"):
            restack(tx, params, tx.init(params), old, TableStack(new))
    with pytest.raises(ValueError, match="params must have a dict of the arrays"):
        restack(tx, tables, tx.init(tables), old, old)
