"""The oracle of row-sparse steps: dense steps, with untouched rows put back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from op_by_op import op_by_op

from monolith_optax import RowSlices, lazy_rows

NUM_ROWS, DIM = 41, 3
# With duplicates, padding on both sides, and a row twice at the same position.
IDS = [[3, 5, 3, -1], [5, 7, NUM_ROWS, 7], [3, 3, 3, 3], [0, NUM_ROWS - 1, 5, -7]]


def parameters(dtype="float64"):
    """A table and a dense leaf."""
    rng = np.random.default_rng(1)
    return {
        "table": jnp.asarray(rng.normal(size=(NUM_ROWS, DIM)), dtype),
        "dense": jnp.asarray(rng.normal(size=2), dtype),
    }


def batches(scale=1.0, dtype="float64", ids=IDS):
    """Gradients of a few steps; rows of padding are NaN."""
    rng = np.random.default_rng(0)
    for some in map(np.array, ids):
        rows = scale * rng.normal(size=(*some.shape, DIM))
        rows[(some < 0) | (some >= NUM_ROWS)] = np.nan
        slices = RowSlices(jnp.asarray(some, "int32"), jnp.asarray(rows, dtype))
        yield {"table": slices, "dense": jnp.asarray(scale * rng.normal(size=2), dtype)}


def summed(ids, rows, num_rows):
    """The dense gradient of a batch, and which rows are in it, by NumPy in float64."""
    ids, rows = np.asarray(ids), np.asarray(rows, "float64")
    table = np.zeros((num_rows, *rows.shape[ids.ndim :]))
    valid = (ids >= 0) & (ids < num_rows)
    np.add.at(table, ids[valid], rows[valid])
    return table, np.isin(np.arange(num_rows), ids)


def touched(gradients):
    """Which rows of the table are in a batch."""
    return summed(gradients["table"].ids, gradients["table"].rows, NUM_ROWS)[1]


def densely(gradients, num_rows=NUM_ROWS, dtype="float64"):
    """The same gradients as arrays."""
    table, _ = summed(gradients["table"].ids, gradients["table"].rows, num_rows)
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype), gradients | {"table": jnp.asarray(table)}
    )


def put_back(new, old, touched, has_rows=None):
    """A tree of arrays with the old rows where none is touched.

    `has_rows` says by the path which leaves have rows; without it, those do that are as
    long as the table.
    """

    def leaf(path, new, old):
        if jnp.ndim(new) == 0:
            return new
        named = has_rows and has_rows(jax.tree_util.keystr(path))
        if not (named if has_rows else len(new) == len(touched)):
            return new
        return jnp.where(touched.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree_util.tree_map_with_path(leaf, new, old)


def by_operations(tx, **extra):
    """The optimizer's update, of which XLA compiles nothing as a whole."""
    update = optax.with_extra_args_support(tx).update
    return op_by_op(lambda *args: update(*args, **extra))


def dense_step(update, gradients, state, params):
    """Updates and state of the dense step, where the table has a batch's rows."""
    updates, new_state = update(densely(gradients), state, params)
    rows = touched(gradients)
    zeros = jax.tree.map(np.zeros_like, updates)
    return put_back(updates, zeros, rows), put_back(new_state, state, rows)


def stateless(rule):
    """An optimizer that applies a rule to gradient and parameter of the table."""

    def update(g, state, params):
        return g | {"table": rule(g["table"], params["table"])}, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def assert_lazy_is_dense(inner, *, scale=1.0, dtype="float64", rtol=1e-11, **extra):
    """Takes a few steps both ways; call it with 64 bits enabled."""
    lazy = lazy_rows(inner)
    update = by_operations(lazy, **extra)
    dense_update = by_operations(inner, **extra)
    ours = parameters(dtype)
    dense = jax.tree.map(lambda x: x.astype("float64"), ours)
    state, dense_state = lazy.init(ours), inner.init(dense)
    for gradients in batches(scale, dtype):
        updates, new_state = update(gradients, state, ours)
        jax.tree.map(assert_same_type, new_state, state)
        assert updates["table"].rows.shape == (4, DIM)
        state, ours = new_state, optax.apply_updates(ours, updates)
        dense_updates, dense_state = dense_step(
            dense_update, gradients, dense_state, dense
        )
        dense = optax.apply_updates(dense, dense_updates)
    for actual, expected in zip(
        jax.tree.leaves((ours, state)),
        jax.tree.leaves((dense, dense_state)),
        strict=True,
    ):
        # Relative to the leaf: what cancels out in one entry does not in another.
        size = np.max(np.abs(np.asarray(expected, "float64")), initial=0.0)
        np.testing.assert_allclose(
            np.asarray(actual, "float64"), expected, rtol=rtol, atol=rtol * size
        )


def assert_same_type(new, old):
    """Shape, dtype and sharding; weak types may become strong."""
    new, old = jax.typeof(new), jax.typeof(old)
    assert (new.shape, new.dtype, new.sharding) == (old.shape, old.dtype, old.sharding)


def assert_refused(inner, match, gradients=None, **extra):
    """The lazy step is refused with a message that matches."""
    params = parameters()
    tx = lazy_rows(inner)
    with pytest.raises(ValueError, match=rf"lazy_rows needs .*{match}"):
        tx.update(gradients or next(batches()), tx.init(params), params, **extra)
