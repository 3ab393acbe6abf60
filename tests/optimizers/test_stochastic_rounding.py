"""Stochastic rounding: to a neighbour, right on average, the same after a restart."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_dtypes import bfloat16

from monolith_optax import (
    RowSlices,
    adamom,
    apply_updates,
    check_in_place,
    embedding,
    lazy_rows,
    stochastic_rounding,
    value_and_row_grad,
)

DTYPES = {"bfloat16": bfloat16, "float16": np.float16}
NARROW = pytest.mark.parametrize("dtype", DTYPES)
DRAWS = 100_000


def stepped(w, steps, dtype, seed=0):
    """What is left of a sum of a 16-bit number and a step, in float64."""
    params = jnp.asarray(np.broadcast_to(np.asarray(w, DTYPES[dtype]), steps.shape))
    updates, new = step_of(seed)(jnp.float32(steps), params)
    assert updates.dtype == jnp.float32
    assert new.dtype == dtype
    return np.float64(new)


@functools.cache
def step_of(seed):
    """A step that is compiled once for all tests."""
    tx = stochastic_rounding(embedding.sgd(-1.0), seed)

    @jax.jit
    def step(gradients, params):
        updates, _ = tx.update(gradients, tx.init(params), params)
        return updates, apply_updates(params, updates)

    return step


def neighbours(target, dtype):
    """The numbers of a dtype below and above float64 numbers, by NumPy."""
    nearest = target.astype(DTYPES[dtype])
    step = np.where(nearest.astype(np.float64) < target, np.inf, -np.inf)
    other = np.nextafter(nearest, step.astype(DTYPES[dtype]))
    pair = np.float64(nearest), np.float64(other)
    other = np.where(pair[0] == target, pair[0], pair[1])
    return np.minimum(pair[0], other), np.maximum(pair[0], other)


@NARROW
@pytest.mark.parametrize("w", [1.0, -1.5, 0.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.28, 0.5, 0.99])
def test_it_is_right_on_average(dtype, w, share):
    """Monolith's noise makes 0.01, 0.1 and 0.28 go up with 0.037, 0.363 and 1."""
    low, high = neighbours(np.float64(w + 1e-3), dtype)
    step = np.float32(low + share * (high - low) - w)
    share = (np.float64(np.float32(w) + step) - low) / (high - low)
    result = stepped(w, np.full(DRAWS, step), dtype)
    assert {*np.unique(result)} == {low, high}
    error = np.mean(result == high) - share
    assert abs(error) <= 4 * np.sqrt(share * (1 - share) / DRAWS)


@NARROW
def test_every_step_reaches_a_neighbour_of_the_sum(dtype):
    rng = np.random.default_rng(0)
    w = np.float64(rng.normal(size=DRAWS).astype(DTYPES[dtype]))
    scale = 10.0 ** rng.uniform(-4, 1, DRAWS)
    steps = (rng.normal(size=DRAWS) * scale).astype(np.float32)
    steps[::5] = -(w[::5] * (1 + 1e-3 * rng.normal(size=len(w[::5]))))  # nearly cancel
    target = np.float64(np.float32(w) + steps)
    result = stepped(w, steps, dtype)
    low, high = neighbours(target, dtype)
    assert ((result == low) | (result == high)).all()
    assert (result != np.float64(target.astype(DTYPES[dtype]))).mean() > 0.05


@NARROW
def test_what_needs_no_rounding_gets_none(dtype):
    result = stepped(1.0, np.tile(np.float32([0.5, -1.0, 0.0, 3.0]), 1000), dtype)
    np.testing.assert_array_equal(result, np.tile([1.5, 0.0, 1.0, 4.0], 1000))


def test_numbers_at_the_ends():
    largest = float(jnp.finfo(jnp.float16).max)
    steps = np.float32([1e30, -1e30, 7.0, np.nan, np.inf])
    result = stepped(largest, steps, "float16")
    np.testing.assert_array_equal(result, [largest, -largest, largest, np.nan, largest])
    smallest = 2.0**-24
    result = stepped(0.0, np.full(DRAWS, smallest / 4, np.float32), "float16")
    assert {*np.unique(result)} == {0.0, smallest}
    assert abs(np.mean(result) / smallest - 0.25) < 0.01


@pytest.mark.usefixtures("mixed_dtypes")
@pytest.mark.parametrize("inner", [embedding.sgd(1e-3), optax.sgd(1e-3)])
def test_small_steps_are_not_lost(inner):
    def after(tx, add):
        def step(carry, _):
            params, state = carry
            grads = jnp.ones(10_000, jnp.bfloat16)
            updates, state = tx.update(grads, state, params)
            return (add(params, updates), state), None

        params = jnp.ones(10_000, jnp.bfloat16)
        carry = params, tx.init(params)
        return np.float32(jax.lax.scan(step, carry, length=100)[0][0])

    assert (after(inner, optax.apply_updates) == 1.0).all()
    rounded = after(stochastic_rounding(inner, 0), apply_updates)
    np.testing.assert_allclose(rounded.mean(), 0.9, atol=1e-3)
    theirs = after(stochastic_rounding(inner, 0), optax.apply_updates)
    np.testing.assert_array_equal(theirs, rounded)


def test_other_parameters_and_all_slots_are_the_inner_optimizers():
    params = {"w": jnp.ones(4), "table": jnp.ones((3, 2), jnp.bfloat16), "none": None}
    grads = jax.tree.map(lambda p: jnp.full_like(p, 0.3), params)
    tx = stochastic_rounding(adamom(0.1), 0)
    updates, state = tx.update(grads, tx.init(params), params)
    wide = params | {"table": params["table"].astype(jnp.float32)}
    expected, expected_state = adamom(0.1).update(grads, adamom(0.1).init(wide), wide)
    chex.assert_trees_all_equal(updates["w"], expected["w"])
    chex.assert_trees_all_equal(state.inner, expected_state)
    assert state.inner.v["table"].dtype == jnp.float32


def run(tx, params, batches):
    @jax.jit
    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state

    state = tx.init(params)
    for gradients in batches:
        params, state = step(params, state, gradients)
    return params, state


def row_batches():
    rng = np.random.default_rng(0)
    for ids in [3, 5, 3, -1], [5, 7, 12, 7]:
        rows = rng.normal(size=(4, 64)).astype(np.float32)
        yield {"table": RowSlices(jnp.array(ids), jnp.asarray(rows))}


def test_rows_of_a_batch_are_right_on_average_and_no_others_move():
    dim = DRAWS // 2
    tx = lazy_rows(stochastic_rounding(embedding.sgd(-1.0), 0))
    params = jnp.ones((12, dim), jnp.bfloat16)
    halves = jnp.full((4, dim), 5e-4)  # of row 3; the rest is 7 and padding
    slices = RowSlices(jnp.array([3, 3, 7, -1]), halves)
    new, state = run(tx, params, [slices])
    assert state.draws == 1
    others = np.setdiff1d(np.arange(12), [3, 7])
    np.testing.assert_array_equal(np.float32(new[others]), 1.0)
    for row, expected in (3, 1.001), (7, 1.0005):
        share = (expected - 1) * 128
        spread = np.sqrt(share * (1 - share) / dim) / 128
        assert abs(np.float64(new[row]).mean() - expected) <= 4 * spread
    assert not np.array_equal(new[3], new[7])


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the pass is that of CPUs")
def test_with_a_compiler_option_no_step_widens_a_bfloat16_table():
    """JAX 0.12 needs no option; what is computed is the same to the bit."""
    tx = lazy_rows(stochastic_rounding(embedding.rowwise_adagrad(0.05), seed=0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20_000, 64))

    def loss(table, ids):
        return jnp.sum(table[ids].astype(jnp.float32) ** 2)

    def step(table, state, ids):
        gradient = value_and_row_grad(loss)(table, ids)[1]
        updates, state = tx.update(gradient, state, table)
        return apply_updates(table, updates), state

    tables = []
    for options in None, {"xla_disable_hlo_passes": "float-normalization-bf16"}:
        table = jax.random.normal(jax.random.key(0), (20_000, 16), jnp.bfloat16)
        state = tx.init(table)
        jitted = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
        compiled = jitted.lower(table, state, ids).compile()
        if options is not None:
            assert "f32[20000,16]" not in compiled.as_text()
            check_in_place(compiled)
        for _ in range(3):
            table, state = compiled(table, state, ids)
        tables.append(np.asarray(table).view(np.uint16))
    np.testing.assert_array_equal(*tables)


def test_noise_is_drawn_only_for_the_rows_of_a_batch():
    rows = 100_000
    tx = lazy_rows(stochastic_rounding(embedding.rowwise_adagrad(0.1), 0))
    params = jnp.ones((rows, 16), jnp.bfloat16)
    slices = RowSlices(jnp.arange(64), jnp.ones((64, 16)))

    program = str(jax.make_jaxpr(tx.update)(slices, tx.init(params), params))
    assert "u32[64,16] = random_bits" in program
    assert f"u32[{rows}" not in program


@pytest.mark.slow
def test_a_restored_run_continues_to_the_bit(tmp_path):
    tx = lazy_rows(stochastic_rounding(embedding.adagrad(0.1), 7))
    first, second = row_batches()
    params = {"table": jnp.ones((12, 64), jnp.bfloat16)}
    saved = run(tx, params, [first])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", saved)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "step", saved)

    def continued(params, state):
        updates, state = tx.update(second, state, params)
        return apply_updates(params, updates), state

    chex.assert_trees_all_equal(continued(*restored), continued(*saved))
    again = run(tx, params, [first])
    chex.assert_trees_all_equal(again, saved)
    other = run(
        lazy_rows(stochastic_rounding(embedding.adagrad(0.1), 8)), params, [first]
    )
    assert not np.array_equal(other[0]["table"], saved[0]["table"])


@pytest.mark.slow
@pytest.mark.parametrize("is_lazy", [False, True])
def test_eight_devices_are_as_one(is_lazy):
    tx = stochastic_rounding(embedding.rowwise_adagrad(0.01), 0)
    params = jnp.ones((64, 4), jnp.bfloat16)
    grads = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
    if is_lazy:
        tx, grads = lazy_rows(tx), RowSlices(jnp.arange(16) * 3, grads[:16])
    expected = run(tx, params, [grads, grads])
    mesh = jax.make_mesh((8,), ("x",))
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec("x"))
        actual = run(tx, *jax.device_put((params, [grads, grads]), rows))
        assert actual[0].sharding.is_equivalent_to(rows, 2)
    chex.assert_trees_all_equal(jax.device_get(actual), jax.device_get(expected))


def test_two_leaves_and_two_steps_have_noise_of_their_own():
    params = {name: jnp.ones(1000, jnp.bfloat16) for name in "ab"}
    grads = {name: jnp.full(1000, -3e-3) for name in "ab"}
    tx = stochastic_rounding(embedding.sgd(1.0), 0)
    first, state = tx.update(grads, tx.init(params), params)
    second, _ = tx.update(grads, state, params)
    assert not np.array_equal(first["a"], first["b"])
    assert not np.array_equal(first["a"], second["a"])


def test_derivatives_go_through():
    tx = stochastic_rounding(embedding.sgd(0.1), 0)
    params = jnp.ones(3, jnp.bfloat16)

    def after(grad):
        return tx.update(grad, tx.init(params), params)[0].sum()

    np.testing.assert_allclose(jax.grad(after)(jnp.ones(3)), -0.1, rtol=1e-6)


def test_mistakes():
    for seed in 0.5, None, jnp.arange(2), "1":
        with pytest.raises(ValueError, match="seed must be one integer"):
            stochastic_rounding(adamom(), seed)
    tx = stochastic_rounding(lazy_rows(embedding.adagrad()), 0)
    table = jnp.ones((12, 2), jnp.bfloat16)
    with pytest.raises(ValueError, match="params is None"):
        tx.update(table, tx.init(table))
    slices = RowSlices(jnp.array([1]), jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"lazy_rows\(stochastic_rounding"):
        tx.update(slices, tx.init(table), table)
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float8_e4m3fn)}
    with pytest.raises(ValueError, match=r"params\['b'\] is float8_e4m3fn"):
        stochastic_rounding(adamom(), 0).init(params)
