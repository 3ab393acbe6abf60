"""Row-sparse training of tables sharded over eight devices, against one device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax import RowSlices, adamom, lazy_rows, rmsprop, value_and_row_grad

pytestmark = pytest.mark.usefixtures("float64")

NUM_ROWS, DIM, BATCH = 64, 4, 16
MESHES = {
    "rows": ((8,), ("x",), PartitionSpec("x", None)),
    "rows_and_columns": ((4, 2), ("x", "y"), PartitionSpec("x", "y")),
}


def look_up(table, ids):
    """What explicit axes want to know, as for any lookup in JAX."""
    sharding = jax.typeof(ids).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return table[ids]
    spec = PartitionSpec(*sharding.spec, None)
    return table.at[ids].get(out_sharding=NamedSharding(sharding.mesh, spec))


def loss(params, users, pairs):
    user, items = params["user"], params["item"]
    both = look_up(items, pairs).sum(1) * look_up(items, users)
    return jnp.mean(((look_up(user, users) * both) @ params["scale"]) ** 2)


def train(tx, params, users, pairs, *, jit=True, steps=3):
    grad = value_and_row_grad(loss, {"user": True, "item": True, "scale": False})

    def step(params, state):
        value, gradients = grad(params, users, pairs)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for _ in range(steps):
        params, state, value = step(params, state)
    return params, state, value


@pytest.fixture
def data():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    params = {
        "user": normal(NUM_ROWS, DIM),
        "item": normal(NUM_ROWS, DIM),
        "scale": normal(DIM),
    }
    users = jnp.asarray(rng.integers(0, NUM_ROWS, BATCH), jnp.int32).at[3].set(-1)
    return params, users, jnp.asarray(rng.integers(0, 9, (BATCH, 2)), jnp.int32)


@pytest.mark.parametrize(
    ("make", "mesh_name", "batch_spec"),
    sampled(
        [
            (adamom, "rows", PartitionSpec("x")),
            (rmsprop, "rows", PartitionSpec()),
            (adamom, "rows_and_columns", PartitionSpec("x")),
        ],
        (adamom, "rows", PartitionSpec("x")),
    ),
)
@pytest.mark.parametrize(
    "axis_type", sampled([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_eight_devices_are_as_one(data, make, mesh_name, batch_spec, axis_type):
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), make(0.1)))
    expected = train(tx, *data)
    sizes, names, spec = MESHES[mesh_name]
    mesh = jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))
    table, batch = NamedSharding(mesh, spec), NamedSharding(mesh, batch_spec)
    with jax.set_mesh(mesh):
        params, users, pairs = jax.device_get(data)
        scale = NamedSharding(mesh, PartitionSpec())
        params = jax.device_put(params, {"user": table, "item": table, "scale": scale})
        actual = train(tx, params, *jax.device_put((users, pairs), batch))
    slots = actual[1][1]
    for tree in actual[0], slots.m, slots.v:
        assert tree["user"].sharding.is_equivalent_to(table, 2)
        assert tree["item"].sharding.is_equivalent_to(table, 2)
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(expected), rtol=1e-12, atol=1e-14
    )


@pytest.mark.slow
def test_explicit_mesh_without_jit(data):
    tx = lazy_rows(adamom(0.1))
    expected = train(tx, *data, steps=1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    shard = NamedSharding(mesh, PartitionSpec("x"))
    params, users, pairs = data
    whole = NamedSharding(mesh, PartitionSpec())
    params = jax.device_put(params, {"user": shard, "item": shard, "scale": whole})
    with jax.set_mesh(mesh):
        users, pairs = jax.device_put((users, pairs), shard)
        actual = train(tx, params, users, pairs, jit=False, steps=1)
    chex.assert_trees_all_close(
        jax.device_get(actual), jax.device_get(expected), rtol=1e-12, atol=1e-14
    )


def test_slices_of_an_explicit_mesh_add_to_a_table():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    shard = NamedSharding(mesh, PartitionSpec("x"))
    table = jax.device_put(jnp.zeros((8, 2)), shard)
    slices = jax.device_put(
        RowSlices(jnp.array([1, 1, 7, -1, 8, 2, 1, 3]), jnp.ones((8, 2))), shard
    )
    total = table + slices
    assert total.sharding.is_equivalent_to(shard, 2)
    assert total[:, 0].tolist() == [0, 3, 1, 1, 0, 0, 0, 1]
    assert slices.to_dense(8)[:, 1].tolist() == [0, 3, 1, 1, 0, 0, 0, 1]


def on_whole_tables(constrain):
    """An optimizer that says where whole tables and slots are to be."""

    def update(gradients, slot, params):
        slot = jax.tree.map(
            lambda s, g: constrain(0.9 * s + constrain(g**2)), slot, gradients
        )
        scale = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients))
        updates = jax.tree.map(
            lambda g, s, p: -g / jnp.sqrt(s + scale) + constrain(jnp.full_like(p, 0.1)),
            gradients,
            slot,
            params,
        )
        return updates, slot

    init = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    "axis_type", sampled([AxisType.Auto, AxisType.Explicit], AxisType.Explicit)
)
def test_shardings_in_an_optimizer_are_those_of_whole_tables(axis_type):
    """No axis of the mesh divides the number of ids."""
    params = {"table": jnp.arange(8.0 * NUM_ROWS).reshape(NUM_ROWS, 8)}
    ids = jnp.array([3, 5, 3, -1, 63])
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8)))
    tx = lazy_rows(on_whole_tables(lambda x: x))
    expected = tx.update({"table": RowSlices(ids, rows)}, tx.init(params), params)

    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    by_both = NamedSharding(mesh, PartitionSpec("x", "y"))
    constrain = {
        AxisType.Auto: lambda x: jax.lax.with_sharding_constraint(x, by_both),
        AxisType.Explicit: lambda x: jax.sharding.reshard(x, PartitionSpec("x", "y")),
    }[axis_type]
    tx = lazy_rows(on_whole_tables(constrain))
    with jax.set_mesh(mesh):
        params = jax.device_put(jax.device_get(params), by_both)
        state = tx.init(params)
        place = NamedSharding(mesh, PartitionSpec())
        slices = jax.device_put(RowSlices(ids, rows), place)
        updates, new_state = jax.jit(tx.update)({"table": slices}, state, params)
        total = params["table"] + updates["table"]
    assert jax.typeof(new_state["table"]) == jax.typeof(state["table"])
    np.testing.assert_allclose(
        jax.device_get(new_state["table"]), expected[1]["table"], rtol=1e-12
    )
    np.testing.assert_allclose(
        jax.device_get(total) - jax.device_get(params["table"]),
        expected[0]["table"].to_dense(NUM_ROWS),
        rtol=1e-9,
        atol=1e-11,
    )
