"""The update rules against a float64 transcription and against optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import monolith_optax

RATES = st.floats(0, 1)
VALUES = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))
# A few shapes alone: each new one is compiled anew, operation by operation.
SHAPES = st.sampled_from([(), (0,), (1,), (5,), (3, 4), (2, 0, 3), (2, 1, 3)])
ADAMOM = {"ada_decay": RATES, "mom_decay": RATES}
RMSPROP = {"beta1": RATES, "beta2": RATES}
COMMON = {
    "learning_rate": st.floats(1e-6, 1.0),
    "epsilon": st.floats(1e-8, 1.0),
    "weight_decay": st.just(0.0) | st.floats(1e-6, 1.0),
    "use_v2": st.booleans(),
}


def problems(decays):
    """Parameters, the gradients of a few steps, and hyperparameters."""

    def arrays(shape_and_steps):
        shape, steps = shape_and_steps
        return st.tuples(
            hnp.arrays(np.float64, shape, elements=VALUES),
            hnp.arrays(np.float64, (steps, *shape), elements=VALUES),
            st.fixed_dictionaries(decays | COMMON),
        )

    return st.tuples(SHAPES, st.integers(1, 4)).flatmap(arrays)


def run(tx, params, grads):
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_matches(actual, expected):
    scale = max(1.0, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["adamom", "rmsprop"])
def test_rule_is_the_float64_transcription(name):
    @given(problems({"adamom": ADAMOM, "rmsprop": RMSPROP}[name]))
    def check(problem):
        params, grads, hyperparameters = problem
        tx = getattr(monolith_optax, name)(**hyperparameters)
        with jax.enable_x64(True):
            w, state = run(tx, jnp.asarray(params), jnp.asarray(grads))
        expected = getattr(oracle, name)(grads, params, **hyperparameters)
        assert_matches(w, expected.pop("var"))
        for slot, value in expected.items():
            assert_matches(getattr(state, slot), value)

    check()


@pytest.mark.parametrize("use_v2", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_compact_c_changes_no_bit(jit, use_v2):
    def step(compact_c, grad, state, params, decays):
        tx = monolith_optax.adamom(1.0, *decays, use_v2=use_v2, compact_c=compact_c)
        return tx.update(grad, state, params)

    if jit:
        step = jax.jit(step, static_argnums=0)
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(100, 7)), jnp.float32)
    full_state = monolith_optax.adamom().init(params)
    compact_state = monolith_optax.adamom(compact_c=True).init(params)
    for _ in range(50):
        decays = tuple(jnp.asarray(rng.uniform(size=2), jnp.float32))
        grad = jnp.asarray(rng.normal(size=params.shape), jnp.float32)
        full, full_state = step(False, grad, full_state, params, decays)
        compact, compact_state = step(True, grad, compact_state, params, decays)
        chex.assert_trees_all_equal(full, compact)
        chex.assert_trees_all_equal(full_state[:3], compact_state[:3])
        assert (full_state.c == compact_state.c).all()


@pytest.mark.parametrize("learning_rate", [0.1, optax.linear_schedule(0.1, 0.0, 10)])
def test_rmsprop_is_an_optax_composition(learning_rate):
    rng = np.random.default_rng(0)
    params, grads = rng.normal(size=(3, 4)), rng.normal(size=(20, 3, 4))
    tx = monolith_optax.rmsprop(learning_rate, 0.9, 0.99, 1e-6, weight_decay=0.01)
    twin = optax.chain(
        optax.add_decayed_weights(0.01),
        optax.rmsprop(learning_rate, decay=0.99, eps=1e-6, momentum=0.9),
    )
    with jax.enable_x64(True):
        ours, state = run(tx, jnp.asarray(params), jnp.asarray(grads))
        theirs, twin_state = run(twin, jnp.asarray(params), jnp.asarray(grads))
        chex.assert_trees_all_close(ours, theirs, rtol=1e-12)
        chex.assert_trees_all_close(
            state.m, -optax.tree.get(twin_state, "trace"), rtol=1e-12
        )
