"""The update rules against a float64 transcription and against optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from choosing import sampled
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


GRADS = np.random.default_rng(0).normal(size=(4, 300, 7)).astype(np.float32)


def steps(grads, ada_decay=0.7, **options):
    """The updates and the state after each step of a scan."""
    tx = monolith_optax.adamom(1.0, ada_decay, 0.9, **options)

    def step(state, grad):
        updates, state = tx.update(grad, state, grad)
        return state, (updates, state)

    return jax.lax.scan(step, tx.init(grads[0]), grads)[1]


def unrolled(grads, ada_decay=0.7, **options):
    """The same, written out."""
    tx = monolith_optax.adamom(1.0, ada_decay, 0.9, **options)
    state, history = tx.init(grads[0]), []
    for grad in grads:
        updates, state = tx.update(grad, state, grad)
        history.append((updates, state))
    return history


WAYS = {
    "scan": steps,
    "eager": unrolled,
    "one program": jax.jit(
        unrolled, static_argnames=("ada_decay", "compact_c", "use_v2", "slot_dtype")
    ),
    "ensemble": lambda grads, **options: jax.vmap(lambda g: steps(g, **options))(
        jnp.stack([grads, 2 * grads])
    ),
}


@pytest.mark.parametrize("way", sampled(WAYS, "scan"))
@pytest.mark.parametrize(
    "options",
    [{}, {"use_v2": True}, {"weight_decay": 0.1}, {"slot_dtype": jnp.bfloat16}],
    ids=["v1", "v2", "decay", "bfloat16"],
)
def test_compact_c_changes_only_rounding(way, options):
    full = WAYS[way](GRADS, **options)
    compact = WAYS[way](GRADS, **options, compact_c=True)
    eps = float(jnp.finfo(options.get("slot_dtype", jnp.float32)).eps)
    is_state = lambda node: isinstance(node, monolith_optax.AdamomState)  # noqa: E731

    def without_c(tree):
        return jax.tree.map(
            lambda x: x._replace(c=None) if is_state(x) else x, tree, is_leaf=is_state
        )

    def assert_rounded(actual, expected):
        actual, expected = np.float32(actual), np.float32(expected)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * eps * largest)

    jax.tree.map(assert_rounded, without_c(compact), without_c(full))


def float32_kernel(name, grads, w, rate, decay, momentum, epsilon, weight_decay):
    """use_v2 in NumPy float32, one rounding at a time in the kernels' order.

    The other version needs a reciprocal square root, which NumPy does not have.
    """
    rate, decay, momentum, epsilon, weight_decay = np.float32(
        [rate, decay, momentum, epsilon, weight_decay]
    )
    one = np.float32(1)
    m, v, c = (np.zeros_like(w) for _ in range(3))
    for grad in grads:
        g = weight_decay * w + grad
        v = decay * v + g * g
        if name == "adamom":
            m = momentum * m + (one - momentum) * g
            c = decay * c + one
            w = w - m * rate / (np.sqrt(v / c) + epsilon)
        else:
            m = momentum * m + g * rate / (np.sqrt(v) + epsilon)
            w = w - m
    return w, m, v


@pytest.mark.parametrize("name", ["adamom", "rmsprop"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_every_rounding_is_the_kernels(name, weight_decay):
    rng = np.random.default_rng(0)
    w = rng.normal(size=5000).astype(np.float32)
    grads = rng.normal(size=(10, 5000)).astype(np.float32)
    if name == "adamom":
        tx = monolith_optax.adamom(0.01, 0.99, 0.9, 1e-6, weight_decay, use_v2=True)
    else:
        tx = monolith_optax.rmsprop(0.01, 0.9, 0.99, 1e-6, weight_decay, use_v2=True)
    # Operation by operation: compiled as a whole, a product and a sum may become one.
    params, state = run(tx, jnp.asarray(w), jnp.asarray(grads))
    expected = float32_kernel(name, grads, w, 0.01, 0.99, 0.9, 1e-6, weight_decay)
    chex.assert_trees_all_equal((params, state.m, state.v), expected)


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
