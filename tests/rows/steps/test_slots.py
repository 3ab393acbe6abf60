"""Slots that are one number per row, however a step makes their new values."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from dense_rows import (
    DIM,
    NUM_ROWS,
    assert_lazy_is_dense,
    assert_refused,
    batches,
    parameters,
)

from monolith_optax import RowSlices, lazy_rows

pytestmark = pytest.mark.usefixtures("float64")


def from_shape(params):
    return jnp.ones(params["table"].shape[0])


def from_number(_):
    return jnp.ones(NUM_ROWS)


def with_slot(init, new, use=lambda g, c: g / c[:, None]):
    """An optimizer with one number per row."""

    def update(g, c, _):
        c = new(c, g["table"])
        return g | {"table": use(g["table"], c)}, c

    return optax.GradientTransformation(init, update)


ROWS = jnp.arange(NUM_ROWS)
# What each row's new number is, from the old one.
KEEPING = {
    "relu": lambda c, _: jax.nn.relu(c) + 1,
    "logaddexp": lambda c, _: jnp.logaddexp(c, 1.0),
    "where": lambda c, _: jnp.where(ROWS < 3, c + 1, c + 2),
    "gradient": lambda c, g: c + jnp.sum(g**2, 1),
    "cond": lambda c, g: jax.lax.cond(
        jnp.sum(g) > 0, lambda: c + 1, lambda: jax.nn.relu(c)
    ),
}
MIXING = {
    "set": lambda c, _: c.at[0].add(1),
    "loop": lambda c, _: jax.lax.fori_loop(0, 2, lambda _, x: x + 1, c),
    "sort": lambda c, _: jnp.sort(c),
    "mean": lambda c, _: c + jnp.mean(c),
    "roll": lambda c, _: jnp.roll(c, 1),
}


@pytest.mark.parametrize("init", sampled([from_shape, from_number], from_shape))
@pytest.mark.parametrize("name", KEEPING)
def test_only_touched_rows_change(name, init):
    assert_lazy_is_dense(with_slot(init, KEEPING[name]))


@pytest.mark.parametrize("init", [from_shape, from_number])
@pytest.mark.parametrize("name", MIXING)
def test_what_needs_other_rows_is_refused(name, init):
    assert_refused(with_slot(init, MIXING[name]), "")


def test_a_slot_that_becomes_a_constant():
    def constant(init):
        return with_slot(init, lambda c, _: jnp.full_like(c, 3.0))

    assert_lazy_is_dense(constant(from_shape))
    assert_refused(constant(from_number), "state changes and is as long as params")


def test_a_slot_that_is_not_used():
    def only_counts(init):
        return with_slot(init, lambda c, _: c + 1, lambda g, _: g)

    assert_lazy_is_dense(only_counts(from_shape))
    assert_refused(only_counts(from_number), "state changes and is as long as params")


@pytest.mark.parametrize(("age", "rate"), [("x", "y"), ("y", "x")])
def test_the_order_of_fields_does_not_matter(age, rate):
    def init(_):
        return {age: jnp.ones(NUM_ROWS), rate: jnp.ones(NUM_ROWS)}

    def update(g, state, _):
        new_age = state[age] + 1
        new_rate = state[rate] + 1 / new_age
        updates = g | {"table": g["table"] * new_rate[:, None]}
        return updates, {age: new_age, rate: new_rate}

    assert_lazy_is_dense(optax.GradientTransformation(init, update))


def test_an_array_that_does_not_change_serves_two_tables():
    def init(params):
        return {"a": jnp.linspace(1.0, 2.0, len(params["a"])), "n": jnp.ones(9)}

    def update(g, rates, _):
        rate = (rates["a"] * rates["n"])[:, None]
        return jax.tree.map(lambda g: g * rate, g), rates

    inner = optax.GradientTransformation(init, update)
    params = {"a": jnp.ones((9, 2)), "b": jnp.ones((9, 2))}
    slices = {
        "a": RowSlices(jnp.array([1, 3]), jnp.ones((2, 2))),
        "b": RowSlices(jnp.array([2, 8]), jnp.ones((2, 2))),
    }
    state = inner.init(params)
    updates, after = lazy_rows(inner).update(slices, state, params)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    for key, ids in {"a": [1, 3], "b": [2, 8]}.items():
        expected = np.zeros((9, 2))
        expected[ids] = np.linspace(1, 2, 9)[ids, None]
        np.testing.assert_allclose(updates[key].to_dense(9), expected, rtol=1e-12)


def test_a_shared_number_beside_a_table_of_one_row():
    """Its shape (1, 1) may be that of rows, but it is not made from the table."""
    params = {"table": jnp.ones((1, 1))}

    def update(g, scale, _):
        return jax.tree.map(lambda g: g * scale, g), scale + 1

    inner = optax.GradientTransformation(lambda _: jnp.ones((1, 1)), update)
    tx, state = lazy_rows(inner), inner.init(params)
    for ids in [0, 0], [-1, 5]:
        slices = {"table": RowSlices(jnp.array(ids), jnp.ones((2, 1)))}
        updates, state = tx.update(slices, state, params)
    assert state == 3
    np.testing.assert_array_equal(updates["table"].to_dense(1), 0)


def test_a_dense_leaf_as_long_as_the_table():
    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(g, state, _):
        state = jax.tree.map(lambda m, g: jax.nn.softplus(m) + g, state, g)
        return state, state

    inner = optax.GradientTransformation(init, update)
    params = {"dense": jnp.ones(5), "table": jnp.ones((5, 2))}
    slices = RowSlices(jnp.array([1]), jnp.ones((1, 2)))
    gradients = {"dense": jnp.ones(5), "table": slices}
    _, state = lazy_rows(inner).update(gradients, inner.init(params), params)
    np.testing.assert_allclose(state["dense"], np.log(2) + 1, rtol=1e-12)
    expected = np.zeros((5, 2))
    expected[1] = np.log(2) + 1
    np.testing.assert_allclose(state["table"], expected, rtol=1e-12)


# Keys of its own for each row: what is drawn for a row is what the dense step draws.
def own_noise(g, _):
    keys = jax.random.split(jax.random.key(7), NUM_ROWS)
    noise = jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(keys)
    return g + noise


def own_folded_noise(g, _):
    def noise(row):
        return jax.random.normal(jax.random.fold_in(jax.random.key(7), row), (DIM,))

    return g + jax.vmap(noise)(jnp.arange(NUM_ROWS))


@pytest.mark.parametrize("rule", [own_noise, own_folded_noise])
def test_noise_with_a_key_for_each_row(rule):
    inner = optax.stateless(lambda g, p: g | {"table": rule(g["table"], p["table"])})
    assert_lazy_is_dense(inner)


def test_noise_with_a_key_for_each_row_of_a_square_table():
    """As many rows as positions in the batch, and as columns."""
    size = 4

    def update(g, _):
        keys = jax.random.split(jax.random.key(7), size)
        noise = jax.vmap(lambda key: jax.random.normal(key, (size,)))(keys)
        return jax.tree.map(lambda g: g + noise, g)

    inner = optax.stateless(update)
    params = {"table": jnp.zeros((size, size))}
    slices = RowSlices(jnp.array([2, 1, -1, 2]), jnp.ones((size, size)))
    updates, _ = lazy_rows(inner).update({"table": slices}, inner.init(params), params)
    dense = {"table": slices.to_dense(size)}
    expected, _ = inner.update(dense, inner.init(params), params)
    expected = np.asarray(expected["table"]) * np.array([0, 1, 1, 0])[:, None]
    np.testing.assert_allclose(updates["table"].to_dense(size), expected, rtol=1e-12)


def test_a_batch_of_padding_changes_no_slot():
    inner = with_slot(from_shape, KEEPING["relu"])
    params = parameters()
    state = inner.init(params)
    gradients = next(batches(ids=[[-1, NUM_ROWS, -1, -1]]))
    _, after = lazy_rows(inner).update(gradients, state, params)
    np.testing.assert_array_equal(after, state)


def test_a_long_chain_of_operations_on_rows_that_are_made_later():
    """Longer than Python's stack allows functions that call each other to be."""

    def update(g, _):
        rates = jnp.linspace(0.5, 1.0, NUM_ROWS)
        for _ in range(600):
            rates = rates * 1.0001
        return g | {"table": g["table"] * rates[:, None]}

    inner, params = optax.stateless(update), parameters()
    gradients = next(batches())
    jax.eval_shape(lazy_rows(inner).update, gradients, inner.init(params), params)
