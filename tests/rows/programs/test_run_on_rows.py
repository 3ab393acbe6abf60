"""Operations of an optimizer: kept apart by rows, reduced over them, or refused."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from choosing import sampled
from dense_rows import (
    DIM,
    IDS,
    NUM_ROWS,
    assert_lazy_is_dense,
    assert_refused,
    batches,
    densely,
    parameters,
    stateless,
    touched,
)

from monolith_optax import RowSlices, lazy_rows

pytestmark = pytest.mark.usefixtures("float64", "mixed_dtypes")


REDUCTIONS = {
    "sum": lambda x: jnp.sum(x),
    "sum_of_columns": lambda x: jnp.sum(jnp.sum(x**2, 1)),
    "mean": lambda x: jnp.mean(jnp.abs(x)),
    "rows_then_columns": lambda x: jnp.sum(jnp.sum(x, axis=0) ** 2),
    "max": lambda x: jnp.max(x),
    "min": lambda x: jnp.min(x),
    "max_of_shifted": lambda x: jnp.max(jnp.abs(x - 9.0)),
    "prod": lambda x: jnp.prod(jnp.exp(x)),
    "all": lambda x: jnp.where(jnp.all(jnp.isfinite(x)), 2.0, 3.0),
    "any": lambda x: jnp.where(jnp.any(x > 1e6), 2.0, 3.0),
    "all_not": lambda x: jnp.where(jnp.all(x == 0), 2.0, 3.0),
    "integers": lambda x: jnp.sum(x > 0).astype(x.dtype),
    "largest_integer": lambda x: jnp.max(jnp.floor(x).astype("int32")).astype(x.dtype),
    "dot": lambda x: jnp.vdot(x[:, 0], x[:, 1]),
    "gram": lambda x: jnp.sum(jnp.abs(jnp.einsum("ni,nj->ij", x, jnp.cos(x)))),
    "of_products": lambda x: jnp.sum(x @ jnp.ones((DIM, 2), x.dtype)),
}


@pytest.mark.parametrize("ids", [IDS[:2], [[*range(NUM_ROWS), 0, -1]]])
def test_reductions_over_rows_without_gradients(ids):
    """Also where there are none: then nothing is known of any row."""

    def update(gradients, state, params):
        del params
        return {k: g * REDUCTIONS[k](g) for k, g in gradients.items()}, state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    tx = lazy_rows(inner)
    params = dict.fromkeys(REDUCTIONS, parameters()["table"])
    for gradients in batches(ids=ids):
        slices = dict.fromkeys(REDUCTIONS, gradients["table"])
        updates, _ = jax.jit(tx.update)(slices, tx.init(params), params)
        arrays = dict.fromkeys(REDUCTIONS, densely(gradients)["table"])
        expected, _ = jax.jit(inner.update)(arrays, inner.init(params), params)
        rows = touched(gradients)[:, None]
        for key, update in updates.items():
            np.testing.assert_allclose(
                update.to_dense(NUM_ROWS),
                jnp.where(rows, expected[key], 0),
                rtol=1e-11,
                err_msg=key,
            )


UNKNOWN = {
    "norm of params": (lambda g, p: g / jnp.linalg.norm(p), "reduce_sum at"),
    "sum of cosines": (lambda g, _: g + jnp.sum(jnp.cos(g)), "reduce_sum at"),
    "sorted": (lambda g, _: jnp.sort(g, axis=0), "sort at"),
    "neighbour": (lambda g, _: jnp.roll(g, 1, axis=0), " at "),
    "lookup": (lambda g, p: g + p[:1], "slice at"),
    "flat": (lambda g, _: jnp.sort(g.reshape(-1)).reshape(g.shape), "reshape at"),
    "loop": (
        lambda g, _: jax.lax.fori_loop(0, 2, lambda _, x: x + g, g),
        "(while|scan) at",
    ),
    "argmax": (lambda g, _: g + jnp.argmax(g).astype(g.dtype), "(reshape|argmax) at"),
    "matrix": (lambda g, p: g @ jnp.einsum("ni,nj->ij", p, p), "dot_general at"),
    "gram": (lambda g, p: (p @ p.T) @ g, "transpose at"),
    "printed": (lambda g, _: jax.debug.print("{}", g) or g, "(debug|callback).* at"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_operations_across_rows_are_refused_with_their_line(name):
    if jax.__version_info__ < (0, 10):  # its own functions keep their first call's line
        jax.clear_caches()
    rule, operation = UNKNOWN[name]
    line = r"test_run_on_rows\.py:\d+"
    why = "is not known to keep" if name in ("loop", "printed") else "needs"
    assert_refused(
        stateless(rule), rf"{operation}.*{line} {why} rows of params\['table'\]"
    )


KEEPING = {
    "transposed": lambda g, _: (g[:, :, None] + 1).transpose(0, 2, 1)[:, 0],
    "reshaped": lambda g, _: g.reshape(-1, DIM, 1).reshape(g.shape) * 2,
    "norm of each row": lambda g, p: g / jnp.linalg.norm(p, axis=1, keepdims=True),
    "products": lambda g, p: g @ jnp.diag(jnp.arange(DIM, dtype=g.dtype)) + p,
    "products of rows": lambda g, p: (
        g * jnp.einsum("ni,nij->nj", g, p[:, :, None] * p[:, None])
    ),
    "columns": lambda g, p: jnp.concatenate([g[:, :1], p[:, 1:]], axis=1),
    "sign bits": lambda g, p: jnp.where(jnp.signbit(g), g, p),
    "largest of a row": lambda g, _: (
        g * (jnp.arange(DIM)[None] == jnp.argmax(jnp.abs(g), axis=1, keepdims=True))
    ),
    "integers": lambda g, _: (g * 100).astype("int32").astype(g.dtype),
    "jit": lambda g, _: jax.jit(lambda g: jnp.where(g > 0, g, 0.0))(g),
    "checkpoint": lambda g, _: jax.checkpoint(jnp.sin)(g),
    "relu": lambda g, p: jax.nn.relu(g) + jax.nn.softplus(p),
    "constraint": lambda g, p: jax.lax.optimization_barrier((g, p))[0],
    "constant": lambda _, p: jnp.full_like(p, 0.5),
    "vmap": lambda g, p: jax.vmap(lambda g, p: g * jnp.max(p))(g, p),
    "cond": lambda g, p: jax.lax.cond(
        jnp.all(jnp.isfinite(g)), lambda: g + p, lambda: jnp.zeros_like(g)
    ),
    "cond of zeros": lambda g, _: jax.lax.cond(
        jnp.sum(g) > 0, lambda: jnp.zeros_like(g), lambda: jnp.ones_like(g)
    ),
    "switch": lambda g, p: jax.lax.switch(
        jnp.sum(g > 0) % 3, [lambda g: g, lambda _: 2 * p, lambda g: g**2 + 1], g
    ),
    "clipped cond": lambda g, _: jax.lax.cond(
        jnp.sum(g) > 0,
        lambda g: g / jnp.sqrt(jnp.sum(g**2)),
        lambda g: jnp.where(g > 0, g, 0.0),
        g,
    ),
    "cond of a cond of rows made later": lambda g, p: jax.lax.cond(
        jnp.sum(g) > 0,
        lambda zeros: g + zeros,
        lambda zeros: g - zeros,
        jax.lax.cond(
            jnp.sum(g) > 1, lambda: jnp.zeros_like(p), lambda: jnp.ones_like(p)
        ),
    ),
    "norm of chosen": lambda g, _: (
        g / jnp.linalg.norm(jax.lax.cond(jnp.sum(g) > 0, lambda: g, lambda: 2 * g))
    ),
}


SAMPLE = (
    "cond of a cond of rows made later",
    "reshaped",
    "products of rows",
    "norm of each row",
    "cond",
    "clipped cond",
)


@pytest.mark.parametrize("name", sampled(KEEPING, *SAMPLE))
def test_operations_that_keep_rows_apart(name):
    assert_lazy_is_dense(stateless(KEEPING[name]))


def test_zero_times_anything_counts_as_zero():
    """Where the dense step has NaN in untouched rows, this one takes no notice."""
    params = {"table": jnp.ones((NUM_ROWS, 1)).at[9].set(jnp.inf)}

    inner = stateless(lambda g, p: g * p / jnp.sqrt(jnp.sum((g * p) ** 2)))
    slices = {"table": RowSlices(jnp.array([2, 3]), jnp.full((2, 1), 3.0))}
    updates, _ = lazy_rows(inner).update(slices, inner.init(params), params)
    np.testing.assert_allclose(
        updates["table"].to_dense(NUM_ROWS)[2:4], 0.5**0.5, rtol=1e-12
    )


class RowAdagrad(NamedTuple):
    sums: dict


def row_adagrad(keepdims, decay=1.0):
    """One sum of squares per row, of shape (rows,) or (rows, 1)."""

    def square(g):
        return jnp.mean(g**2, axis=-1, keepdims=keepdims)

    def init(params):
        return RowAdagrad(jax.tree.map(lambda p: jnp.zeros_like(square(p)), params))

    def update(g, state, _):
        sums = jax.tree.map(lambda s, g: decay * s + square(g), state.sums, g)
        updates = jax.tree.map(
            lambda g, s: (
                -0.1 * g / jnp.sqrt(s if keepdims or g.ndim == 1 else s[:, None])
            ),
            g,
            sums,
        )
        return updates, RowAdagrad(sums)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize("keepdims", [True, False])
@pytest.mark.parametrize("decay", sampled([1.0, 0.9], 0.9))
def test_slots_with_one_entry_per_row(keepdims, decay):
    assert_lazy_is_dense(row_adagrad(keepdims, decay))


def test_one_slot_for_two_tables_is_an_error():
    def update(g, count, _):
        count = count + 1 + 0 * g["a"][:, 0]
        return jax.tree.map(lambda g: g / count[:, None], g), count

    inner = optax.GradientTransformation(lambda _: jnp.zeros(9), update)
    params = {"a": jnp.ones((9, 2)), "b": jnp.ones((9, 2))}
    slices = RowSlices(jnp.array([1]), jnp.ones((1, 2)))
    tx = lazy_rows(inner)
    both = r"state belongs to params\['a'\] and params\['b'\] at once"
    with pytest.raises(ValueError, match=both):
        tx.update({"a": slices, "b": slices}, tx.init(params), params)


def test_a_state_that_optax_cannot_read_is_read_from_the_program():
    def init(params):
        return [jnp.zeros(params["table"].shape), jnp.zeros(2), jnp.zeros(NUM_ROWS)]

    def update(g, state, _):
        m, n, count = state
        m, n, count = 0.9 * m + g["table"], n + g["dense"], count + 1 + 0 * m[:, 0]
        return {"table": m / count[:, None], "dense": n}, [m, n, count]

    assert_lazy_is_dense(optax.GradientTransformation(init, update))
