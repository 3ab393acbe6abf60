"""The law: value_and_row_grad gives the value and the gradients of jax.grad."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from op_by_op import op_by_op

from monolith_optax import RowSlices, value_and_row_grad


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def densified(gradients, params):
    """The gradients with arrays in the place of slices."""

    def dense(gradient, param):
        if not isinstance(gradient, RowSlices):
            return gradient
        row_shape = gradient.row_shape
        num_rows = int(np.prod(param.shape[: param.ndim - len(row_shape)]))
        return gradient.to_dense(num_rows).reshape(param.shape)

    return jax.tree.map(
        dense, gradients, params, is_leaf=lambda node: isinstance(node, RowSlices)
    )


def rows_of(gradients):
    """The paths of the gradients that are slices."""
    leaves = jax.tree.leaves_with_path(
        gradients, is_leaf=lambda node: isinstance(node, RowSlices)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if isinstance(leaf, RowSlices)
    }


def check(
    loss,
    params,
    *args,
    rows,
    tables=None,
    by=op_by_op,
    has_aux=False,
    rtol=1e-10,
    small=False,
):
    """Compares with the dense gradient.

    `rows` are the paths of the leaves whose gradients are rows. `by` runs both: the
    traced program op by op, or `jax.jit` on a mesh, or JAX itself outside of a trace.
    `small` says that the compiled program must need less memory than a table has.
    """
    grad = value_and_row_grad(loss, tables, has_aux=has_aux)
    dense_grad = by(jax.value_and_grad(loss, has_aux=has_aux))
    grad = jax.jit(grad).lower(params, *args).compile() if small else by(grad)
    value, gradients = grad(params, *args)
    actual = value, densified(gradients, params)
    expected = dense_grad(params, *args)
    assert rows_of(gradients) == set(rows)
    chex.assert_trees_all_close(actual, expected, rtol=rtol, atol=1e-12)
    chex.assert_trees_all_equal_dtypes(actual, expected)
    if small:
        table = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        memory = grad.memory_analysis()
        assert memory.argument_size_in_bytes >= table
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes < table // 4
    return gradients
