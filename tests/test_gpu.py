"""What must hold on a GPU: steps there have the numbers of steps on CPU."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from registry import VARIANTS

from monolith_optax import (
    RowSlices,
    apply_updates,
    check_in_place,
    lazy_rows,
    reset_rows,
    stochastic_rounding,
    value_and_row_grad,
)

pytestmark = pytest.mark.gpu

try:
    GPU = jax.devices("gpu")[0]
except RuntimeError:
    pytest.skip(
        "JAX has no GPU here, or JAX_PLATFORMS is not cuda,cpu", allow_module_level=True
    )

NUM_ROWS, DIM, BATCH = 1000, 8, 256
OF_ROWS = [
    name
    for name, variant in VARIANTS.items()
    if variant.row.for_rows and variant.row.learning_rate and variant.row.descends
]


def train(tx, device, gradients, params):
    """The parameters and the state after steps on a device."""

    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state

    params = jax.device_put(params, device)
    state = jax.jit(tx.init)(params)
    for gradient in gradients:
        params, state = step(params, state, jax.device_put(gradient, device))
        assert jax.tree.leaves(params)[0].devices() == {device}
    return jax.device_get((params, state))


def assert_as_on_cpu(tx, gradients, params, rtol=1e-5, atol=1e-6, slots=True):
    expected = train(tx, jax.devices("cpu")[0], gradients, params)
    actual = train(tx, GPU, gradients, params)
    if not slots:
        expected, actual = expected[0], actual[0]
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=atol)


def slices(seed, dtype=np.float32):
    """Many duplicates, and padding on both sides of the table."""
    rng = np.random.default_rng(seed)
    ids = (NUM_ROWS * rng.power(0.2, BATCH)).astype(np.int32)
    ids[:4] = -1, NUM_ROWS, NUM_ROWS + 7, 2**31 - 1
    return RowSlices(ids, rng.normal(size=(BATCH, DIM)).astype(dtype))


@pytest.mark.parametrize("name", VARIANTS)
def test_dense_steps(name):
    rng = np.random.default_rng(0)
    gradients = [{"w": rng.normal(size=(40, 16)).astype(np.float32)} for _ in range(5)]
    params = {"w": rng.normal(size=(40, 16)).astype(np.float32)}
    with jax.default_matmul_precision("highest"):
        # Shampoo's slots have eigenvectors, whose signs may differ.
        slots = name != "shampoo"
        assert_as_on_cpu(VARIANTS[name].make(), gradients, params, slots=slots)


@pytest.mark.parametrize("name", OF_ROWS)
def test_steps_on_rows(name):
    table = np.random.default_rng(1).normal(size=(NUM_ROWS, DIM)).astype(np.float32)
    tx = lazy_rows(VARIANTS[name].make())
    assert_as_on_cpu(tx, [slices(seed) for seed in range(5)], table)


def test_rows_of_a_batch_are_summed_exactly():
    with jax.enable_x64(True):
        tx = lazy_rows(optax.sgd(1.0))
        gradients = [slices(seed, np.float64) for seed in range(3)]
        table = np.zeros((NUM_ROWS, DIM))
        assert_as_on_cpu(tx, gradients, table, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_tables_of_16_bits(dtype):
    tx = lazy_rows(stochastic_rounding(optax.sgd(0.1), seed=0))
    table = np.ones((NUM_ROWS, DIM), dtype)
    gradients = [slices(seed, dtype) for seed in range(3)]
    # A float32 sum that differs may be rounded to the other neighbour, at each step.
    rtol = 4 * float(jnp.finfo(dtype).eps)
    assert_as_on_cpu(tx, gradients, table, rtol=rtol, atol=rtol)


def test_row_gradients_are_those_of_jax():
    ids = jnp.asarray(np.random.default_rng(2).integers(0, NUM_ROWS, BATCH))
    params = jax.device_put({"table": jnp.ones((NUM_ROWS, DIM))}, GPU)

    weights = jnp.linspace(0.0, 1.0, BATCH)[:, None]

    def loss(params):
        return jnp.sum(jnp.sin(params["table"][ids] * weights))

    expected = jax.jit(jax.value_and_grad(loss))(params)
    value, gradient = jax.jit(value_and_row_grad(loss))(params)
    assert isinstance(gradient["table"], RowSlices)
    actual = value, {"table": gradient["table"].to_dense(NUM_ROWS)}
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_nothing_as_large_as_the_table_is_copied():
    tx = lazy_rows(VARIANTS["adamom"].make())
    table = jax.device_put(jnp.zeros((100_000, 16)), GPU)

    def step(table, state, gradients):
        updates, state = tx.update(gradients, state, table)
        return optax.apply_updates(table, updates), state

    gradients = RowSlices(jnp.arange(64, dtype=jnp.int32), jnp.ones((64, 16)))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    check_in_place(jitted, table, tx.init(table), jax.device_put(gradients, GPU))


def test_rows_are_reset():
    tx = lazy_rows(VARIANTS["adagrad"].make())
    table = jax.device_put(jnp.ones((NUM_ROWS, DIM)), GPU)
    state = tx.init(table)
    _, state = tx.update(jax.device_put(slices(0), GPU), state, table)
    table, state = reset_rows(tx, table, state, jnp.array([3, 5]), jnp.zeros((2, DIM)))
    assert not np.asarray(table)[[3, 5]].any()
    assert np.asarray(table)[4].all()
