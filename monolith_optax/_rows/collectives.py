"""Sums and means of gradients over devices, of which some are RowSlices."""

from typing import Any, TypeVar

import jax

from monolith_optax._rows.slices import RowSlices, is_slices

Tree = TypeVar("Tree")


def psum(tree: Tree, axis_name: Any) -> Tree:
    """`jax.lax.psum` of gradients of which some are `RowSlices`.

    Slices of all devices are concatenated, which is their sum: each device then has as
    many ids as all of them had together. It works where `jax.lax.psum` does, inside
    `jax.shard_map` and `jax.vmap` with a named axis, and the results are the same on
    all devices of the axis.

    By default (`check_vma=True`), a gradient taken inside `jax.shard_map` with respect
    to a dense parameter that all devices share is summed by JAX already. Give this
    function only the slices there, or turn the check off.

    Args:
      tree: arrays and `RowSlices`.
      axis_name: the name of an axis, or a tuple of names.

    Returns:
      The same tree, of sums.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices, psum
      >>> slices = RowSlices(jnp.array([[7], [8]]), jnp.ones((2, 1, 1)))
      >>> total = jax.vmap(lambda s: psum(s, "data"), axis_name="data")(slices)
      >>> print(total.ids)
      [[7 8]
       [7 8]]
    """

    def total(leaf: Any) -> Any:
        if not is_slices(leaf):
            return jax.lax.psum(leaf, axis_name)
        rows = leaf.rows.reshape(leaf.ids.size, *leaf.row_shape)
        return RowSlices(
            _all_gather(leaf.ids.reshape(-1), axis_name), _all_gather(rows, axis_name)
        )

    totals: Tree = jax.tree.map(total, tree, is_leaf=is_slices)
    return totals


def pmean(tree: Tree, axis_name: Any) -> Tree:
    """`jax.lax.pmean` of gradients of which some are `RowSlices`.

    Each device's gradient is that of the mean over its part of the batch. Their mean is
    then the gradient of the mean over the whole batch.

    Args:
      tree: arrays and `RowSlices`.
      axis_name: the name of an axis, or a tuple of names.

    Returns:
      The same tree, of means: those of slices are concatenated, as in `psum`, and
      divided by the number of devices.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices, pmean
      >>> slices = RowSlices(jnp.array([[7], [8]]), jnp.ones((2, 1, 1)))
      >>> mean = jax.vmap(lambda s: pmean(s, "data"), axis_name="data")(slices)
      >>> print(mean.rows[0])
      [[0.5]
       [0.5]]
    """

    def mean(leaf: Any) -> Any:
        if not is_slices(leaf):
            return jax.lax.pmean(leaf, axis_name)
        return psum(leaf, axis_name) / jax.lax.axis_size(axis_name)

    means: Tree = jax.tree.map(mean, tree, is_leaf=is_slices)
    return means


def _all_gather(array: jax.Array, axis_name: Any) -> jax.Array:
    """The arrays of all devices, of a type that says they are the same on each."""
    lax: Any = jax.lax
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    gather, options = lax.all_gather, {}
    if hasattr(lax, "all_gather_invariant"):  # JAX 0.8
        gather = lax.all_gather_invariant
    elif set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        options = {"to": "invarying"}  # under vmap JAX 0.10 refuses it
    gathered: jax.Array = gather(array, axis_name, tiled=True, **options)
    return gathered
