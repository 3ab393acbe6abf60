"""Stacks of tables: their gradients are rows, and lazy_rows steps on those."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from law import check, normal

from monolith_optax import (
    RowSlices,
    adamom,
    apply_updates,
    embedding,
    lazy_rows,
    rmsprop,
    value_and_row_grad,
)

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes", "mixed_ranks")

T, N, D = 3, 2003, 4
IDS = jnp.array([[1, 5, 1], [0, N - 1, 7], [7, 2, 2]], jnp.int32)


def loss(params, ids):
    rows = jax.vmap(lambda table, i: table[i])(params["t"], ids)
    return jnp.sum(jnp.tanh(rows @ params["w"]) ** 2)


def params():
    return {"t": normal(T, N, D), "w": normal(D, seed=1)}


def test_the_gradient_of_a_stack_is_rows():
    gradients = check(loss, params(), IDS, rows={"t"}, small=True)
    dense = jax.grad(loss)(params(), IDS)["t"]
    np.testing.assert_allclose(gradients["t"].to_dense((T, N)), dense, rtol=1e-12)


def test_slices_add_to_a_stack():
    table = normal(2, 3, 2)
    slices = RowSlices(jnp.array([4, 0, 4, -1, 6]), normal(5, 2, seed=1))
    expected = np.array(table)
    for i, row in zip([4, 0, 4], slices.rows[:3], strict=True):
        expected[i // 3, i % 3] += row
    for total in (
        table + slices,
        slices + table,
        optax.apply_updates(table, slices),
        apply_updates(table, slices),
        table - -slices,
    ):
        np.testing.assert_allclose(total, expected, rtol=1e-12)
    for wrong in (normal(2, 3), normal(3, 2, 3), normal(2)):
        with pytest.raises(ValueError, match="shape"):
            wrong + slices
    numbers = RowSlices(jnp.array([1]), jnp.ones(1))
    with pytest.raises(ValueError, match="shape"):
        jnp.ones((3, 2)) + numbers


OPTIMIZERS = {
    "adamom": lambda: adamom(0.1, weight_decay=0.01),
    "rmsprop": lambda: rmsprop(0.1),
    "adagrad": lambda: optax.adagrad(0.1),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.masked(optax.sgd(0.1, 0.9), by_rank)
    ),
    "ftrl": lambda: embedding.ftrl(0.1),
    "norms of rows": lambda: optax.GradientTransformation(norms, normalised),
    "constant mask": lambda: optax.stateless(masked_rows),
}


def by_rank(tree):
    return jax.tree.map(lambda leaf: leaf.ndim == 3, tree)


def norms(params):
    return jax.tree.map(lambda p: jnp.zeros_like(p[..., :1]), params)


def normalised(updates, state, params):
    del params
    state = jax.tree.map(
        lambda g, s: s + jnp.mean(g**2, -1, keepdims=True), updates, state
    )
    return jax.tree.map(lambda g, s: -g / jnp.sqrt(s + 1e-3), updates, state), state


def masked_rows(updates, params):
    del params
    kept = jnp.arange(T * N).reshape(T, N, 1) % 2
    return {**updates, "t": -updates["t"] * kept.astype(float)}


def rates(*shape):
    """An optimizer whose rates differ along some axes of a stack."""
    numbers = jnp.linspace(0.1, 1.0, int(np.prod(shape))).reshape(shape)

    def update(g, _):
        return {**g, "t": -g["t"] * numbers}

    return optax.stateless(update)


def rules(rule):
    return optax.stateless(lambda g, p: {**g, "t": rule(g["t"], p["t"])})


def matrix():
    return jnp.arange(D * D, dtype=float).reshape(D, D)


OPTIMIZERS |= {
    "rates of columns": lambda: rates(D),
    "rates of columns of tables": lambda: rates(T, 1, D),
    "rates of rows": lambda: rates(N, 1),
    "rates of all rows": lambda: rates(T, N, 1),
    "rates of tables": lambda: rates(T, 1, 1),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "novograd": lambda: optax.novograd(0.1),
    "relu": lambda: rules(lambda g, p: jax.nn.relu(g) + jax.nn.softplus(p)),
    "matmul": lambda: rules(
        lambda g, p: g @ matrix() + jnp.einsum("enj,jk->enk", p, matrix())
    ),
    "argmax": lambda: rules(
        lambda g, _: g * (jnp.argmax(g, -1)[..., None] == jnp.arange(D)[None, None])
    ),
    "column norms": lambda: rules(
        lambda g, _: g / jnp.linalg.norm(g, axis=(0, 1), keepdims=True)
    ),
    "cumsum": lambda: rules(lambda g, p: jnp.cumsum(g, 2) + jnp.sort(p, 2)),
    "gram": lambda: rules(lambda g, p: g + p @ jnp.einsum("eni,enj->ij", g, p)),
    "cond": lambda: rules(
        lambda g, p: jax.lax.cond(jnp.sum(g) > 0, lambda: g + p, lambda: -g)
    ),
}


FAST = "adamom", "clipped", "constant mask", "rates of rows", "matmul", "column norms"


@pytest.mark.parametrize("name", sampled(OPTIMIZERS, *FAST))
def test_a_lazy_step_on_a_stack_is_the_dense_one_on_its_rows(name):
    """Rows that a step looks up move as they do in a dense first step, others stay."""
    inner = OPTIMIZERS[name]()
    lazy, before = lazy_rows(inner), params()
    state = inner.init(before)
    dense_gradients = jax.jit(jax.grad(loss))(before, IDS)
    expected, dense_state = jax.jit(inner.update)(dense_gradients, state, before)
    expected = optax.apply_updates(before, expected)

    @jax.jit
    def step(params, state, ids):
        _, gradients = value_and_row_grad(loss)(params, ids)
        assert isinstance(gradients["t"], RowSlices)
        updates, state = lazy.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    after, lazy_state = step(before, state, IDS)
    touched = np.zeros((T, N), bool)
    touched[np.arange(T)[:, None], IDS] = True
    assert jax.tree.structure(lazy_state) == jax.tree.structure(state)

    def compare(actual, dense, old):
        assert jnp.shape(actual) == jnp.shape(dense)
        if jnp.shape(actual)[:2] == (T, N):
            np.testing.assert_allclose(actual[~touched], old[~touched])
            actual, dense = actual[touched], dense[touched]
        np.testing.assert_allclose(actual, dense, rtol=1e-10)

    jax.tree.map(compare, (after, lazy_state), (expected, dense_state), (before, state))


def test_a_donated_step_on_a_stack_makes_nothing_of_its_size():
    lazy = lazy_rows(adamom(0.1))
    before = params()

    def step(params, state, ids):
        _, gradients = value_and_row_grad(loss)(params, ids)
        updates, state = lazy.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(before, lazy.init(before), IDS)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes < before["t"].nbytes // 4


def test_noise_is_drawn_for_the_rows_of_a_stack():
    lazy, before = lazy_rows(optax.add_noise(0.01, 0.55, 0)), {"t": normal(T, N, D)}
    slices = RowSlices(jnp.arange(1000), jnp.full((1000, D), 5.0))
    updates, _ = lazy.update({"t": slices}, lazy.init(before), before)
    rows = updates["t"].rows
    np.testing.assert_allclose(np.std(rows), 0.1, rtol=0.05)
    assert len(np.unique(rows)) > 3990


@pytest.mark.slow
def test_a_stack_beside_a_table_with_a_row_for_each_of_its_tables():
    """The numbers of the table's entries and of the stack's rows are the same."""
    before = {"t": normal(3, 5, 2), "u": normal(3, 5, seed=1)}
    inner = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
    gradients = {
        "t": RowSlices(jnp.array([7, 7, 0]), normal(3, 2)),
        "u": RowSlices(jnp.array([2, 0]), normal(2, 5)),
    }
    dense = {
        "t": gradients["t"].to_dense((3, 5)),
        "u": gradients["u"].to_dense(3),
    }
    lazy = lazy_rows(inner)
    updates, state = lazy.update(gradients, lazy.init(before), before)
    expected, dense_state = inner.update(dense, inner.init(before), before)
    for key, touched in ("t", ([1, 0], [2, 0])), ("u", ([2, 0],)):
        actual = updates[key].to_dense(before[key].shape[: len(touched)])
        np.testing.assert_allclose(actual[touched], expected[key][touched], rtol=1e-10)
        np.testing.assert_allclose(
            state[1][0].nu[key], dense_state[1][0].nu[key], rtol=1e-10
        )


def of_axes(*axes):
    return lambda: optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda g: -g / (1 + jnp.sum(g**2, axes, keepdims=True)), updates
        )
    )


@pytest.mark.parametrize("make", [of_axes(1, 2), of_axes(1), embedding.rowwise_adagrad])
def test_a_step_that_sees_tables_of_a_stack_is_an_error(make):
    lazy, before = lazy_rows(make()), {"t": normal(T, N, D)}
    slices = RowSlices(jnp.array([1, 2]), normal(2, D))
    with pytest.raises(ValueError, match="treats a stack of tables as more than"):
        lazy.update({"t": slices}, lazy.init(before), before)
