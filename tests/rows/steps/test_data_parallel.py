"""Data parallelism on automatic axes, without a word in the step about shardings."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from compiled_programs import collectives, copies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from monolith_optax import (
    RowSlices,
    adamom,
    apply_updates,
    lazy_rows,
    reset_rows,
    value_and_row_grad,
)

NUM_ROWS, DIM, BATCH = 4096, 8, 64
TABLE = NUM_ROWS * DIM * 4
MESHES = {
    "replicated": ((8,), ("d",), P(), P("d")),
    "split": ((8,), ("d",), P("d"), P("d")),
    "split_over_one_of_two": ((2, 4), ("d", "t"), P("t"), P("d")),
    "batch_over_both": ((2, 4), ("d", "t"), P("t"), P(("d", "t"))),
}
TX = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), adamom(0.1)))


def loss(params, ids, targets):
    found = jnp.take(params["table"], ids, axis=0) + params["other"][ids // 2]
    return jnp.mean((found @ params["weight"] - targets) ** 2)


def step(carry, ids, targets):
    params, state = carry
    value, gradients = value_and_row_grad(loss)(params, ids, targets)
    updates, state = TX.update(gradients, state, params)
    return (optax.apply_updates(params, updates), state), value


def start(dtype="float32"):
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in {
            "table": (NUM_ROWS, DIM),
            "other": (NUM_ROWS // 2, DIM),
            "weight": (DIM,),
        }.items()
    }
    ids = jnp.asarray(rng.integers(-9, NUM_ROWS, BATCH), jnp.int32)
    return (params, TX.init(params)), ids, jnp.asarray(rng.normal(size=BATCH), dtype)


def placed(name, carry, *batch):
    sizes, axes, table, split = MESHES[name]
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(sizes))
    carry = jax.tree.map(
        lambda x: jax.device_put(
            x, NamedSharding(mesh, table if jnp.ndim(x) == 2 else P())
        ),
        carry,
    )
    return carry, *jax.device_put(batch, NamedSharding(mesh, split))


def assert_no_table_is_sent(compiled, memory=TABLE):
    assert max(size for _, size in collectives(compiled)) <= BATCH * DIM * 4
    assert compiled.memory_analysis().temp_size_in_bytes < memory


@pytest.mark.parametrize("name", sampled(MESHES, "split_over_one_of_two"))
def test_no_table_is_sent(name):
    args = placed(name, *start())
    compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
    assert_no_table_is_sent(compiled)
    shape = jax.tree.leaves(args[0])[0].addressable_shards[0].data.shape
    assert copies(compiled, shape) == []


@pytest.mark.parametrize("name", sampled(MESHES, "batch_over_both"))
def test_numbers_are_those_of_one_device(name):
    with jax.enable_x64(True):
        data = start("float64")
        actual, expected = placed(name, *data), data
        for _ in range(2):
            actual, expected = (
                (jax.jit(step)(*args)[0], *args[1:]) for args in (actual, expected)
            )
        chex.assert_trees_all_close(
            jax.device_get(actual[0]), jax.device_get(expected[0]), rtol=1e-11
        )


@pytest.mark.parametrize("dtype", sampled(["float32", "bfloat16"], "float32"))
@pytest.mark.parametrize("name", ["replicated", "split_over_one_of_two"])
def test_slices_of_a_split_batch_are_added_without_sending_the_table(name, dtype):
    """Their ids come from the pipeline, so nothing shows their mesh but the table."""

    def add(carry, ids, targets):
        rows = jnp.broadcast_to(targets[:, None], (BATCH, DIM)).astype(dtype)
        return apply_updates(carry, {"table": RowSlices(ids, rows)})

    (params, _), ids, targets = start()
    params = {"table": params["table"].astype(dtype)}
    compiled = jax.jit(add, donate_argnums=0).lower(*placed(name, params, ids, targets))
    # A CPU computes with tables of 16 bits in float32, also on one device.
    assert_no_table_is_sent(compiled.compile(), 2 * TABLE)


@pytest.mark.parametrize("name", ["replicated", "split_over_one_of_two"])
def test_rows_are_reset_without_sending_the_table(name):
    def reset(carry, ids, targets):
        rows = {"table": ids, "other": None, "weight": None}
        return reset_rows(TX, *carry, rows, {**rows, "table": targets[:, None]})

    compiled = jax.jit(reset, donate_argnums=0).lower(*placed(name, *start()))
    assert_no_table_is_sent(compiled.compile())


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [functools.partial(jax.jit), lambda f: f])
def test_derivatives_through_a_step_on_a_mesh(wrap):
    """Traces outside of jit hold arrays that may be on one device."""
    tx = lazy_rows(optax.sgd(0.1, momentum=0.9))

    def through(carry, scale, ids, targets):
        params, _ = carry
        slices = RowSlices(ids, scale * jnp.ones((BATCH, DIM)))
        updates, _ = tx.update({"table": slices}, tx.init(params), params)
        return jnp.sum(apply_updates(params, updates)["table"] * targets[0])

    (params, _), ids, targets = start()
    data = {"table": params["table"]}, None
    carry, *_ = placed("split", data)
    actual = wrap(jax.grad(through, 1))(carry, 3.0, ids, targets)
    expected = jax.grad(through, 1)(data, 3.0, ids, targets)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
