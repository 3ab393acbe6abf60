"""The rules of embedding tables against float64 transcriptions, and at their edges."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from monolith_optax import embedding

GRADS = np.random.default_rng(0).normal(size=(5, 6, 11))
TABLE = np.random.default_rng(1).normal(size=(6, 11))


def run(tx, params=TABLE, grads=GRADS):
    with jax.enable_x64(True):
        params = jnp.asarray(params)
        state = tx.init(params)
        for grad in jnp.asarray(grads):
            updates, state = tx.update(grad, state, params)
            params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_rowwise_adagrad_is_the_float64_transcription(decay):
    w, sum_square = TABLE, np.zeros(6)
    for grad in GRADS:
        d = grad + decay * w
        sum_square = sum_square + (d**2).mean(axis=1)
        w = w - 0.1 * d / (np.sqrt(sum_square) + 1e-3)[:, None]
    params, state = run(embedding.rowwise_adagrad(0.1, 1e-3, decay))
    np.testing.assert_allclose(params, w, rtol=1e-12)
    np.testing.assert_allclose(state.sum_square, sum_square, rtol=1e-12)


@pytest.mark.parametrize("bugs", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adagrad_is_the_float64_transcription(decay, bugs):
    w, norm = TABLE, np.full_like(TABLE, 0.5)
    for grad in GRADS:
        d = grad + decay * w
        norm = norm + d**2
        moves = np.concatenate([grad[:, :8], d[:, 8:]], axis=1) if bugs else d
        w = w - 0.1 / np.sqrt(norm) * moves
    tx = embedding.adagrad(0.1, 0.5, decay, bug_compatible=bugs)
    params, state = run(tx)
    np.testing.assert_allclose(params, w, rtol=1e-12)
    np.testing.assert_allclose(state.norm, norm, rtol=1e-12)


@pytest.mark.parametrize("shape", [(), (4,), (3, 2), (2, 3, 4)])
def test_a_row_is_an_index_of_the_leading_axis(shape):
    rng = np.random.default_rng(2)
    params, grad = rng.normal(size=(2, *shape))
    _, state = run(embedding.rowwise_adagrad(1.0, 0.0), params, grad[None])
    mean = (grad**2).mean(axis=tuple(range(1, grad.ndim)))
    assert state.sum_square.shape == shape[:1]
    np.testing.assert_allclose(state.sum_square, mean, rtol=1e-12)


def test_adagrad_leaves_alone_what_never_had_a_gradient():
    tx = embedding.adagrad(0.1, initial_accumulator_value=0.0)
    params = jnp.ones((2, 3))
    grad = jnp.zeros((2, 3)).at[0].set(1.0)
    updates, state = jax.jit(tx.update)(grad, tx.init(params), params)
    chex.assert_tree_all_finite((updates, state))
    np.testing.assert_array_equal(updates[1], 0)
    np.testing.assert_allclose(updates[0], -0.1, rtol=1e-6)


@pytest.mark.parametrize("name", ["adagrad", "rowwise_adagrad"])
def test_a_step_with_a_zero_gradient_has_finite_derivatives(name):
    tx = getattr(embedding, name)(0.1)
    params = jnp.ones((2, 3))

    def after(grad):
        return tx.update(grad, tx.init(params), params)[0].sum()

    chex.assert_tree_all_finite(jax.grad(after)(jnp.zeros((2, 3))))
