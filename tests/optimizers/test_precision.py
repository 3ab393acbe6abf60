"""Training in low precision."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import with_argument
from registry import VARIANTS


@pytest.mark.parametrize("name", [name for name in VARIANTS if "adamom" in name])
def test_bfloat16_parameters_do_not_coarsen_the_slots(name):
    # With bfloat16 slots, c stops at 256 and v with it.
    variant, steps = VARIANTS[name], 2000
    tx = variant.make(learning_rate=1e-3)
    rng = np.random.default_rng(0)
    grads = jnp.asarray(rng.normal(size=(steps, 64)), jnp.float32)

    @jax.jit
    def train(params):
        def step(carry, grad):
            params, state = carry
            updates, state = tx.update(grad.astype(params.dtype), state, params)
            return (optax.apply_updates(params, updates), state), None

        grads_seen = grads.astype(jnp.bfloat16).astype(jnp.float32)
        return jax.lax.scan(step, (params, tx.init(params)), grads_seen)[0][1]

    coarse, fine = train(jnp.zeros(64, jnp.bfloat16)), train(jnp.zeros(64))
    rounding = float(jnp.finfo(jnp.bfloat16).eps)
    chex.assert_trees_all_close((coarse.c, coarse.v), (fine.c, fine.v), rtol=rounding)
    decays = 0.9999 ** np.arange(steps)
    np.testing.assert_allclose(np.mean(coarse.c), decays.sum(), rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_zero_gradients_never_give_nan(variant, dtype):
    params = {"w": jnp.zeros(4, dtype), "x": jnp.ones(4, dtype)}
    tx = variant.make()
    update = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(3):
        updates, state = update(optax.tree.zeros_like(params), state, params)
        chex.assert_tree_all_finite((updates, state))
        params = optax.apply_updates(params, updates)
    if variant.row.descends and not variant.decays:
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))


def test_derivatives_at_a_zero_gradient_are_finite(variant):
    params = {"w": jnp.ones((2, 3))}
    tx = variant.make()

    def after(grad):
        updates, _ = tx.update({"w": grad}, tx.init(params), params)
        return updates["w"].sum()

    chex.assert_tree_all_finite(jax.grad(after)(jnp.zeros((2, 3))))


@with_argument("epsilon")
def test_smallest_gradients_of_float16_still_move_parameters(variant):
    tiny = jnp.full(3, jnp.finfo(jnp.float16).smallest_subnormal)
    tx = variant.make(learning_rate=10.0, epsilon=1e-16, **variant.no_decay)
    params = jnp.ones(3, jnp.float16)
    updates, _ = jax.jit(tx.update)(tiny.astype(jnp.float16), tx.init(params), params)
    assert (updates < 0).all()
