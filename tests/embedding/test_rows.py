"""The optimizers of embedding tables inside lazy_rows: in place, and on devices."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import sampled
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from registry import VARIANTS

from monolith_optax import (
    RowSlices,
    apply_updates,
    check_in_place,
    embedding,
    lazy_rows,
    stochastic_rounding,
)

TABLES = [name for name, variant in VARIANTS.items() if not variant.row.is_dense]
EVERY_TABLE = pytest.mark.parametrize("name", TABLES)
SAMPLES = [("sgd", False, "float16"), ("adagrad", True, "bfloat16")]


def step_of(tx):
    def step(params, state, slices, **extra):
        updates, state = tx.update(slices, state, params, **extra)
        return apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", sampled(TABLES, "adagrad", "rowwise_adagrad"))
def test_nothing_as_large_as_the_table_is_copied(name):
    tx = lazy_rows(VARIANTS[name].make())
    num_rows = 100_000
    params = jnp.ones((num_rows, 16))
    slices = RowSlices(jnp.arange(64), jnp.ones((64, 16)))
    jitted = jax.jit(step_of(tx), donate_argnums=(0, 1))
    check_in_place(jitted, params, tx.init(params), slices)


@pytest.mark.parametrize(
    ("name", "rounds", "dtype"),
    sampled(
        itertools.product(["sgd", "adagrad"], [False, True], ["float16", "bfloat16"]),
        *SAMPLES,
    ),
)
def test_16_bit_tables_need_no_more_than_a_scatter(name, rounds, dtype):
    inner = VARIANTS[name].make()
    tx = lazy_rows(stochastic_rounding(inner, seed=0) if rounds else inner)
    params = jnp.ones((100_000, 16), dtype)
    slices = RowSlices(jnp.arange(64), jnp.ones((64, 16), dtype))

    def scatter(params, ids, rows):
        return params.at[ids].set(rows, mode="drop", unique_indices=True)

    def memory(step, donated, *args):
        jitted = jax.jit(step, donate_argnums=donated)
        return jitted.lower(*args).compile().memory_analysis()

    # XLA for CPUs before JAX 0.12 widens every bfloat16 table that it scatters to.
    least = memory(scatter, 0, params, jnp.arange(64), slices.rows)
    used = memory(step_of(tx), (0, 1), params, tx.init(params), slices)
    tenth = params.nbytes / 10
    assert used.temp_size_in_bytes < least.temp_size_in_bytes + tenth
    assert used.alias_size_in_bytes >= params.nbytes
    if dtype == "float16":
        assert used.temp_size_in_bytes < tenth


@pytest.mark.slow
@EVERY_TABLE
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_eight_devices_are_as_one(name, axis_type):
    rng = np.random.default_rng(0)
    tx = lazy_rows(VARIANTS[name].make())

    def trained(params, batches):
        step = jax.jit(step_of(tx))
        state = tx.init(params)
        for slices in batches:
            params, state = step(params, state, slices)
        return params, state

    with jax.enable_x64(True):
        params = jnp.asarray(rng.normal(size=(64, 4)))
        batches = [
            RowSlices(
                jnp.asarray(rng.integers(-1, 64, 16), jnp.int32),
                jnp.asarray(rng.normal(size=(16, 4))),
            )
            for _ in range(2)
        ]
        expected = trained(params, batches)
        mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, PartitionSpec("x"))
            actual = trained(*jax.device_put((params, batches), rows))
            for leaf in jax.tree.leaves(actual):
                if leaf.ndim:
                    assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
        chex.assert_trees_all_close(
            jax.device_get(actual), jax.device_get(expected), rtol=1e-12, atol=1e-14
        )


def test_delay_compensation_reads_only_the_batchs_rows_of_latest():
    rng = np.random.default_rng(0)
    table, latest = jnp.asarray(rng.normal(size=(2, 9, 3)), jnp.float32)
    dense = jnp.zeros((9, 3)).at[jnp.array([2, 5])].set(1.5)
    slices = RowSlices(jnp.array([5, 2, -1]), jnp.full((3, 3), 1.5))
    tx = embedding.delay_compensation(embedding.sgd(0.1), 0.5)
    expected, _ = tx.update(dense, tx.init(table), table, latest=latest)
    poisoned = latest.at[jnp.array([0, 8])].set(jnp.nan)
    step = jax.jit(step_of(lazy_rows(tx)))
    new, _ = step(table, tx.init(table), slices, latest=poisoned)
    np.testing.assert_allclose(new, table + expected, rtol=1e-6)


def test_each_row_has_its_own_bias_correction():
    tx = lazy_rows(embedding.adam(0.1, beta1=0.5, beta2=0.25))
    params = jnp.ones((4, 2))
    state = tx.init(params)
    for ids in [1, 2], [2, -1], [2, 2]:
        slices = RowSlices(jnp.array(ids), jnp.ones((2, 2)))
        _, state = tx.update(slices, state, params)
    np.testing.assert_array_equal(state.beta1_power, 0.5 ** np.array([1, 2, 4, 1]))
    np.testing.assert_array_equal(state.beta2_power, 0.25 ** np.array([1, 2, 4, 1]))
