"""Slices of tables whose rows are spread over devices, in every operation on them.

They are made as `value_and_row_grad` makes them, but of gradients that a test gives,
and without a loss to trace.
"""

import functools
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from op_by_op import op_by_op

from monolith_optax import RowSlices, adamom, global_norm, lazy_rows, psum
from monolith_optax._rows.slices.spread import Spread
from monolith_optax._rows.slices.spread_lookups import look_up, send

pytestmark = pytest.mark.usefixtures("float64")

NUM_ROWS, DIM = 1024, 3
KINDS = {
    "auto": ((4,), ("x",), ("x",), AxisType.Auto),
    "explicit": ((4,), ("x",), ("x",), AxisType.Explicit),
    "two_axes": ((2, 4), ("host", "chip"), ("host", "chip"), AxisType.Auto),
    "replicas": ((2, 4), ("data", "table"), ("table",), AxisType.Auto),
    "explicit_replicas": ((2, 4), ("data", "table"), ("table",), AxisType.Explicit),
}
# An odd number of ids, which no number of devices divides; 48 of 8 devices spill if
# they all have one owner.
BATCHES = {"fits": (33, NUM_ROWS, False), "spills": (384, 128, True)}


def mesh_of(kind):
    sizes, names, axes, axis_type = KINDS[kind]
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(
        sizes, names, axis_types=(axis_type,) * len(sizes), devices=devices
    )
    return mesh, Spread(mesh.abstract_mesh, axes, NUM_ROWS)


def slices_of(spread, table, ids, gradients):
    _, route = look_up(spread, table, [ids])
    return RowSlices.placed(*send(spread, route, [ids], [gradients]))


@functools.cache
def data(name):
    size, most, spills = BATCHES[name]
    rng = np.random.default_rng(0)
    ids = rng.integers(-2, most, size).astype("int32")
    return rng.normal(size=(NUM_ROWS, DIM)), ids, rng.normal(size=(size, DIM)), spills


def placed(kind, name):
    mesh, spread = mesh_of(kind)
    table, ids, gradients, spills = data(name)
    table = jax.device_put(table, NamedSharding(mesh, P(spread.axes)))
    ids, gradients = jax.device_put((ids, gradients), NamedSharding(mesh, P()))
    return spread, (table, ids, gradients), spills


def dense(ids, gradients):
    total = np.zeros((NUM_ROWS, DIM))
    np.add.at(total, ids[ids >= 0], gradients[ids >= 0])
    return total


ALL = sampled(itertools.product(KINDS, BATCHES), ("replicas", "spills"))


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_rows_and_slices_are_those_of_one_device(kind, name):
    spread, args, spills = placed(kind, name)
    table, ids, gradients, _ = data(name)

    @jax.jit
    def run(table, ids, gradients):
        [rows], _ = look_up(spread, table, [ids])
        slices = slices_of(spread, table, ids, gradients)
        twice = slices + 2 * slices
        return (
            rows,
            slices,
            twice,
            [
                slices.to_dense(NUM_ROWS),
                table - slices,
                twice.to_dense(NUM_ROWS),
                (table.astype("bfloat16") + slices).astype("float64"),
                global_norm([slices, table]),
            ],
        )

    rows, slices, twice, results = run(*args)
    assert bool(slices.placement.spilled) is spills
    assert bool(twice.placement.spilled) is spills
    expected = np.where((ids >= 0)[:, None], table[ids], 0)
    np.testing.assert_array_equal(rows, expected)
    total = dense(ids, gradients)
    rounded = jnp.asarray(table, "bfloat16").astype("float64") + total
    for actual, wanted, rtol in zip(
        results,
        [
            total,
            table - total,
            3 * total,
            rounded,
            np.sqrt((total**2).sum() + (table**2).sum()),
        ],
        [1e-12, 1e-12, 1e-12, 1e-2, 1e-12],
        strict=True,
    ):
        np.testing.assert_allclose(actual, wanted, rtol=rtol, atol=1e-12)
    # Without their placement they are slices like any others.
    plain = RowSlices(np.asarray(slices.ids), np.asarray(slices.rows))
    np.testing.assert_allclose(plain.to_dense(NUM_ROWS), total, atol=1e-12)
    copy = pickle.loads(pickle.dumps(jax.device_get(slices)))
    np.testing.assert_allclose(copy.to_dense(NUM_ROWS), total, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), ALL)
def test_steps_are_those_of_one_device(kind, name):
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(0.5), adamom(0.1)))
    spread, args, _ = placed(kind, name)
    table, ids, gradients, _ = data(name)

    def step(params, state, slices):
        updates, state = tx.update({"t": slices}, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def spread_step(params, state, ids, gradients):
        return step(params, state, slices_of(spread, params["t"], ids, gradients))

    params = {"t": args[0]}
    state = jax.tree.map(
        lambda x: jax.device_put(x, args[0].sharding) if np.ndim(x) else x,
        tx.init({"t": jnp.asarray(table)}),
    )
    one_params = {"t": jnp.asarray(table)}
    one_state = tx.init(one_params)
    for _ in range(2):
        with jax.set_mesh(mesh_of(kind)[0]):
            params, state = spread_step(params, state, *args[1:])
        slices = RowSlices(jnp.asarray(ids), jnp.asarray(gradients))
        one_params, one_state = op_by_op(step)(one_params, one_state, slices)
    assert params["t"].sharding.is_equivalent_to(args[0].sharding, 2)
    chex.assert_trees_all_close(
        jax.device_get((params, state)),
        jax.device_get((one_params, one_state)),
        rtol=1e-11,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(BATCHES, "fits"))
def test_stacked_batches(name):
    """As a scan over micro-batches gives them."""
    spread, (table, ids, gradients), spills = placed("auto", name)

    @jax.jit
    def run(table, ids, gradients):
        def one(_, batch):
            return None, slices_of(spread, table, *batch)

        pairs = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), (ids, gradients))
        _, slices = jax.lax.scan(one, None, pairs)
        return slices, slices.to_dense(NUM_ROWS), global_norm(slices), slices + slices

    slices, total, norm, twice = run(table, ids, gradients)
    assert slices.ids.ndim == 2
    assert slices.placement.spilled.tolist() == [spills] * 2
    expected = 2 * dense(*data(name)[1:3])
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    np.testing.assert_allclose(norm, np.linalg.norm(expected), rtol=1e-12)
    np.testing.assert_allclose(twice.to_dense(NUM_ROWS), 2 * expected, rtol=1e-12)


@pytest.mark.slow
def test_narrow_rows_are_rounded_once():
    """By each device, 256 and 1 would be 256, and 1 more nothing."""
    spread, (table, *_), _ = placed("auto", "fits")
    ids = jnp.full(8, 60, "int32")
    gradients = jnp.repeat(jnp.array([[256.0]] + [[1.0]] * 7), DIM, axis=1)
    table, gradients = table.astype("bfloat16"), gradients.astype("bfloat16")
    make = jax.jit(functools.partial(slices_of, spread), keep_unused=True)
    slices = make(table, ids, gradients)
    assert slices.rows.dtype == "bfloat16"
    assert set(np.asarray(slices.to_dense(NUM_ROWS)[60], "float32")) == {264.0}


def test_what_loses_the_placement_is_refused():
    spread, args, _ = placed("auto", "fits")
    slices = jax.jit(functools.partial(slices_of, spread), keep_unused=True)(*args)
    with pytest.raises(ValueError, match="can only be added to others of the same"):
        slices + RowSlices(jnp.array([1]), jnp.ones((1, DIM)))
    with pytest.raises(ValueError, match="can only be added to others of the same"):
        RowSlices(jnp.array([1]), jnp.ones((1, DIM))) + slices
    with pytest.raises(ValueError, match="nothing to sum: leave it out of psum"):
        psum(slices, "x")
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), slices)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stacked)
    with pytest.raises(ValueError, match="nothing tells which device has which ids"):
        flat.to_dense(NUM_ROWS)


def test_a_table_of_another_length_takes_them_as_any_others():
    spread, args, _ = placed("auto", "fits")
    slices = jax.jit(functools.partial(slices_of, spread), keep_unused=True)(*args)
    total = dense(*data("fits")[1:3])
    longer = jnp.zeros((NUM_ROWS + 5, DIM)) + jax.device_get(slices)
    np.testing.assert_allclose(longer[:NUM_ROWS], total, atol=1e-12)
