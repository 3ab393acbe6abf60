"""Derivatives through a lazy step are those of the dense one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from dense_rows import (
    DIM,
    NUM_ROWS,
    batches,
    parameters,
)

from monolith_optax import RowSlices, lazy_rows

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")


@jax.custom_jvp
def straight(x):
    return jnp.round(x)


@straight.defjvp
def _straight_jvp(primals, tangents):
    return straight(*primals), 3 * tangents[0]


@jax.custom_vjp
def gated(x, gate):
    return jnp.where(gate, x, 0.0)


gated.defvjp(
    lambda x, gate: (gated(x, gate), x), lambda x, c: (5 * c * jnp.cos(x), None)
)


def rules(rate):
    """An optimizer with derivative rules of its own, of both kinds."""

    def update(g, state, params):
        def leaf(g, p):
            return -rate * straight(g) * gated(p, g > 0) + g**2

        return jax.tree.map(leaf, g, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


DIFFERENTIABLE = {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "adagrad": lambda rate: optax.adagrad(rate),
    "adam": lambda rate: optax.adam(rate),
    "clipped": lambda rate: optax.chain(
        optax.clip_by_global_norm(0.5), optax.sgd(rate)
    ),
    "if_finite": lambda rate: optax.apply_if_finite(optax.sgd(rate), 3),
    "rules": rules,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(DIFFERENTIABLE, "rules"))
def test_derivatives_through_a_step(name):
    """As in hypergradients, with respect to rate, rows and parameters."""
    params, [gradients] = parameters(), [next(batches(ids=[[3, 5, 3, 9]]))]
    slices = gradients["table"]

    def lazy(rate, rows, params):
        tx = lazy_rows(DIFFERENTIABLE[name](rate))
        g = gradients | {"table": RowSlices(slices.ids, rows)}
        updates, state = tx.update(g, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    def dense(rate, rows, params):
        inner = DIFFERENTIABLE[name](rate)
        table = jnp.zeros((NUM_ROWS, DIM)).at[slices.ids].add(rows)
        g = gradients | {"table": table}
        updates, state = inner.update(g, inner.init(params), params)
        return optax.apply_updates(params, updates), state

    def objective(step):
        def of(*args):
            leaves = jax.tree.leaves(step(*args))
            touched = [
                x[slices.ids] if x.shape == (NUM_ROWS, DIM) else x for x in leaves
            ]
            return sum(
                jnp.sum(jnp.sin(x))
                for x in touched
                if jnp.issubdtype(x.dtype, "float64")
            )

        return of

    arguments = 0.1, slices.rows, params
    actual = jax.grad(objective(lazy), (0, 1, 2))(*arguments)
    expected = jax.grad(objective(dense), (0, 1, 2))(*arguments)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
        actual,
        expected,
    )


def test_forward_derivatives_of_rules():
    params, gradients = parameters(), next(batches(ids=[[3, 5, 3, 9]]))
    slices = gradients["table"]

    def lazy(rows):
        tx = lazy_rows(jvp_only(0.1))
        g = gradients | {"table": RowSlices(slices.ids, rows)}
        return tx.update(g, tx.init(params), params)[0]["table"].to_dense(NUM_ROWS)

    def dense(rows):
        table = jnp.zeros((NUM_ROWS, DIM)).at[slices.ids].add(rows)
        return jvp_only(0.1).update(gradients | {"table": table}, (), params)[0][
            "table"
        ]

    tangent = jnp.cos(slices.rows)
    for a, b in zip(
        jax.jvp(lazy, [slices.rows], [tangent]),
        jax.jvp(dense, [slices.rows], [tangent]),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def jvp_only(rate):
    def update(g, state, _):
        return jax.tree.map(lambda g: -rate * straight(g) * g, g), state

    return optax.GradientTransformation(lambda _: (), update)
