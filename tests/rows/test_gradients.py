"""value_and_row_grad against JAX's own gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import RowSlices, adamom, lazy_rows, value_and_row_grad

TABLES = {"user": True, "items": {"item": True}, "mlp": False}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        "user": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32),
        "items": {"item": jnp.asarray(rng.normal(size=(11, 4)), jnp.float32)},
        "mlp": jnp.asarray(rng.normal(size=(4,)), jnp.float32),
    }


def loss(params, users, pairs, scale=1.0):
    """Several lookups of one table, two tables, and a dense parameter."""
    user = params["user"][users]
    left = params["items"]["item"][pairs[:, 0]]
    both = params["items"]["item"][pairs]
    score = jnp.tanh(user * left + both.sum(1)) @ params["mlp"]
    return scale * jnp.mean(score**2)


USERS, PAIRS = jnp.array([0, 6, 0]), jnp.array([[1, 2], [1, 1], [10, 0]])


def densified(gradients, params):
    return jax.tree.map(
        lambda g, p: g.to_dense(len(p)) if isinstance(g, RowSlices) else g,
        gradients,
        params,
        is_leaf=lambda node: isinstance(node, RowSlices),
    )


@pytest.mark.parametrize("jit", [False, True])
def test_gradients_are_jaxs(params, jit):
    with jax.enable_x64(True):
        params = optax.tree.cast(params, jnp.float64)
        grad = value_and_row_grad(loss, TABLES)
        grad = jax.jit(grad) if jit else grad
        value, gradients = grad(params, USERS, PAIRS, scale=2.0)
        expected = jax.value_and_grad(loss)(params, USERS, PAIRS, scale=2.0)
        assert gradients["user"].ids.tolist() == [0, 6, 0]
        assert gradients["items"]["item"].rows.shape == (9, 4)
        actual = value, densified(gradients, params)
        chex.assert_trees_all_close(actual, expected, rtol=1e-10, atol=1e-14)


def test_no_gradient_as_large_as_a_table_is_made():
    params = {"table": jnp.zeros((123_457, 8))}

    def square(params, ids):
        return jnp.sum((params["table"][ids] - 1.0) ** 2)

    def operations(function):
        jaxpr = jax.make_jaxpr(function)(params, jnp.arange(5)).jaxpr
        return [str(eqn.outvars) for eqn in jaxpr.eqns]

    table = "123457,8"
    assert any(table in out for out in operations(jax.grad(square)))
    sparse = operations(value_and_row_grad(square, {"table": True}))
    assert not any(table in out for out in sparse)


def test_auxiliary_output_passes_through(params):
    def with_aux(params, *batch):
        return loss(params, *batch), {"users": batch[0]}

    grad = value_and_row_grad(with_aux, TABLES, has_aux=True)
    (value, aux), gradients = grad(params, USERS, PAIRS)
    plain = value_and_row_grad(loss, TABLES)(params, USERS, PAIRS)
    chex.assert_trees_all_equal((value, gradients), plain)
    assert aux["users"].tolist() == USERS.tolist()


def test_padding_looks_up_zeros_and_gets_no_gradient(params):
    def total(params, ids):
        return jnp.sum(params["user"][ids] @ params["mlp"])

    ids = jnp.array([3, -1, 7, 3])
    value, gradients = value_and_row_grad(total, TABLES)(params, ids)
    np.testing.assert_allclose(value, 2 * params["user"][3] @ params["mlp"], rtol=1e-6)
    dense = gradients["user"].to_dense(7)
    np.testing.assert_allclose(dense[3], 2 * params["mlp"], rtol=1e-6)
    assert not dense.at[3].set(0).any()


def test_a_table_that_is_not_looked_up(params):
    def of_users(params, ids):
        return jnp.sum(params["user"][ids])

    _, gradients = value_and_row_grad(of_users, TABLES)(params, USERS)
    assert gradients["items"]["item"].ids.shape == (0,)
    assert not gradients["mlp"].any()


def test_a_model_is_trained(params):
    tx = lazy_rows(optax.chain(optax.clip_by_global_norm(1.0), adamom(0.05)))

    @jax.jit
    def step(params, state):
        value, gradients = value_and_row_grad(loss, TABLES)(params, USERS, PAIRS)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    before, state, values = params, tx.init(params), []
    for _ in range(50):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    chex.assert_trees_all_equal(params["user"][1:6], before["user"][1:6])


@pytest.mark.parametrize(
    ("tables", "lookup", "message"),
    [
        ({"user": True}, lambda p: p["user"][USERS], "prefix of the tree"),
        (TABLES, lambda p: p["user"][0.5], "integer ids"),
        (TABLES, lambda p: p["user"][1:3], "integer ids"),
        (TABLES, lambda p: p["user"][USERS, 0], "integer ids"),
        (TABLES, lambda p: p["user"][USERS > 1], "integer ids"),
    ],
)
def test_bad_use(params, tables, lookup, message):
    with pytest.raises(ValueError, match=message):
        value_and_row_grad(lambda p: jnp.sum(lookup(p)), tables)(params)


def test_a_scalar_is_no_table():
    with pytest.raises(ValueError, match="scalar"):
        value_and_row_grad(lambda p: p, True)(jnp.zeros(()))
