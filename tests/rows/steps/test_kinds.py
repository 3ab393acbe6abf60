"""The kinds of steps in which a lazy step could silently differ from the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense_rows import (
    DIM,
    NUM_ROWS,
    assert_lazy_is_dense,
    assert_refused,
    batches,
    dense_step,
    parameters,
    stateless,
)
from optax import contrib

from monolith_optax import RowSlices, lazy_rows

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")


def large(params):
    """True for a table of more than ten rows."""
    return jax.tree.map(lambda x: x.size > 10 * DIM, params)


MASKS = {
    "masked": lambda: optax.masked(optax.sgd(0.1), large),
    "decay": lambda: optax.adamw(0.1, weight_decay=0.5, mask=large),
    "labels": lambda: optax.partition(
        {True: optax.sgd(0.1), False: optax.adam(0.1)}, large
    ),
    "by_shape": lambda: optax.stateless_with_tree_map(lambda g, p: g / p.shape[0]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_see_whole_tables(name):
    assert_lazy_is_dense(MASKS[name]())


def test_a_mask_by_size_as_in_a_training_run():
    tx = lazy_rows(
        optax.masked(optax.sgd(0.1), lambda p: jax.tree.map(lambda x: x.size > 1000, p))
    )
    table = jnp.zeros((1000, 8))
    slices = RowSlices(jnp.arange(4), jnp.ones((4, 8)))
    updates, _ = tx.update(slices, tx.init(table), table)
    np.testing.assert_allclose(updates.to_dense(1000)[:4], -0.1)


@pytest.mark.parametrize("size", [1.0, 1000.0, 1e5])
def test_every_regime_of_clipping(size):
    """Whether a norm is clipped depends on rows that the batch does not have."""
    tx = lazy_rows(optax.chain(optax.clip_by_block_rms(100.0), optax.sgd(1.0)))
    table = jnp.zeros((1000, 1))
    slices = RowSlices(jnp.array([7]), jnp.full((1, 1), size))
    updates, _ = tx.update(slices, tx.init(table), table)
    expected = -min(size, 100 * 1000**0.5)
    np.testing.assert_allclose(updates.to_dense(1000)[7], expected, rtol=1e-12)


def test_slots_of_padding_and_duplicates_enter_no_sum():
    assert_lazy_is_dense(
        optax.chain(
            optax.scale_by_rms(eps=0.0, initial_scale=1.0),
            optax.clip_by_global_norm(0.1),
        )
    )


ACCUMULATING = {
    "SAMState": lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2),
    "MultiStepsState": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "ApplyEvery": lambda: optax.chain(optax.sgd(0.1), optax.apply_every(2)),
}


@pytest.mark.parametrize("name", ACCUMULATING)
def test_steps_that_must_undo_or_apply_earlier_ones(name):
    assert_refused(ACCUMULATING[name](), name)


def test_lookahead():
    tx = lazy_rows(optax.lookahead(optax.sgd(0.1), 2, 0.5))
    params = optax.LookaheadParams.init_synced(parameters())
    gradients = next(batches())
    with pytest.raises(ValueError, match="LookaheadState"):
        tx.update(gradients, tx.init(params), params)


def loss(params):
    return jnp.sum(params["table"] ** 2) + jnp.sum(params["dense"])


def test_functions_of_params_see_whole_tables():
    """They may look at rows that the batch does not have, which is an error."""
    assert_refused(contrib.sophia(0.1), " at ", obj_fn=loss)


def test_a_function_that_is_not_used_hurts_nobody():
    assert_lazy_is_dense(optax.sgd(0.1), value_fn=loss, name="run", flag=True)


def test_line_searches():
    gradients = next(batches())
    extra = {"value": 1.0, "grad": gradients, "value_fn": loss}
    for inner in optax.lbfgs(), optax.scale_by_backtracking_linesearch(5):
        assert_refused(inner, "", gradients, **extra)


def test_zero_nans():
    inner = optax.chain(optax.zero_nans(), optax.sgd(0.1))
    assert_lazy_is_dense(inner)
    params = parameters()
    slices = RowSlices(jnp.array([1, 2]), jnp.ones((2, DIM)).at[0, 0].set(jnp.nan))
    gradients = {"table": slices, "dense": jnp.ones(2)}
    tx = lazy_rows(inner)
    updates, state = tx.update(gradients, tx.init(params), params)
    expected, expected_state = dense_step(
        inner.update, gradients, inner.init(params), params
    )
    np.testing.assert_array_equal(
        updates["table"].to_dense(NUM_ROWS), expected["table"]
    )
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)


def test_constants_with_one_entry_per_row():
    frozen = np.arange(NUM_ROWS) % 2 == 0
    rates = jnp.linspace(0.1, 1.0, NUM_ROWS)[:, None]

    assert_lazy_is_dense(
        stateless(lambda g, _: jnp.where(frozen[:, None], 0.0, (2 * rates) * g))
    )


def test_extra_arguments_with_one_entry_per_row():
    def update(g, state, _, *, rates):
        return g | {"table": rates[:, None] * g["table"]}, state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    assert_lazy_is_dense(inner, rates=jnp.linspace(0.1, 1.0, NUM_ROWS))


def noisy_updates(seed, gradients, num_rows=100_000):
    tx = lazy_rows(optax.add_noise(0.01, 0.55, seed))
    table = jnp.zeros((num_rows, DIM))
    state = tx.init(table)
    updates, state = tx.update(gradients, state, table)
    again, _ = tx.update(gradients, state, table)
    return updates.rows, again.rows


@pytest.mark.slow
def test_noise_is_drawn_for_the_rows_of_the_batch():
    slices = RowSlices(jnp.arange(4000), jnp.full((4000, DIM), 5.0))
    rows, again = noisy_updates(1, slices)
    np.testing.assert_allclose(np.mean(rows), 5, atol=4 * 0.1 / 12000**0.5)
    np.testing.assert_allclose(np.std(rows), 0.1, rtol=0.03)
    assert len(np.unique(rows)) > 11_900  # each row anew
    assert not np.any(rows == again)
    np.testing.assert_array_equal(rows, noisy_updates(1, slices)[0])
    assert not np.any(rows == noisy_updates(2, slices)[0])
    program = jax.make_jaxpr(lambda s: noisy_updates(1, s)[0])(slices)
    assert "100000,3" not in str(program).split("let", 1)[1].replace(
        "f64[100000,3]", ""
    )


def test_what_an_optimizer_prints_of_norms(capfd):
    def update(g, state, _):
        jax.debug.print("norm {:.2f}", jnp.linalg.norm(g))
        return g, state

    tx = lazy_rows(optax.GradientTransformation(lambda _: optax.EmptyState(), update))
    slices = RowSlices(jnp.array([1, 1]), jnp.full((2, 1), 1.5))
    jax.jit(tx.update)(slices, (), jnp.zeros((9, 1)))
    jax.effects_barrier()
    assert capfd.readouterr().out == "norm 3.00\n"


@pytest.mark.parametrize("traced", [True, False])
def test_verdicts_do_not_depend_on_numbers(traced):
    """A shift of gradients by 0 is still a shift."""

    def with_shift(shift):
        return stateless(lambda g, _: g / jnp.sqrt(jnp.sum((g + shift) ** 2)))

    if traced:
        with pytest.raises(ValueError, match="lazy_rows needs"):
            jax.jit(lambda shift: refused_step(with_shift(shift)))(0.0)
    else:
        assert_refused(with_shift(jnp.zeros(())), "reduce_sum at")


def refused_step(inner):
    params = parameters()
    return lazy_rows(inner).update(next(batches()), inner.init(params), params)
