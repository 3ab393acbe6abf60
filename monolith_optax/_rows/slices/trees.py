"""Trees of arrays that contain RowSlices: sums, norms, sums over devices."""

from collections.abc import Hashable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from monolith_optax._rows.slices.duplicates import (
    at_least_float32,
    one_position,
    sum_rows,
)
from monolith_optax._rows.slices.row_access import row_axes
from monolith_optax._rows.slices.row_slices import RowSlices, is_slices
from monolith_optax._rows.types import KeyPath, PyTree
from monolith_optax._shardings import replicated

AxisName: TypeAlias = Hashable | tuple[Hashable, ...]
Leaf: TypeAlias = jax.Array | RowSlices

Params = TypeVar("Params")
Tree = TypeVar("Tree")


def apply_updates(params: Params, updates: PyTree) -> Params:
    """`optax.apply_updates`, which also adds `RowSlices` and rounds once.

    Sums are taken in float32, or in the dtype of the parameter if that is wider, and
    come back in the dtype of the parameter. So updates may be float32 for bfloat16 or
    float16 parameters, and no setting of JAX's type promotion is in the way. Where
    updates are None the parameters stay as they are, whatever they are: the parameters
    may be an Equinox module whose updates are those of its arrays.

    Args:
      params: floating-point arrays; where updates are None, anything.
      updates: for each parameter an array of its shape, `RowSlices` or None.

    Returns:
      The new parameters.

    Raises:
      ValueError: a parameter is not a floating-point array, or its update does not have
        its shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices, apply_updates
      >>> params = {"table": jnp.zeros((3, 2), jnp.bfloat16), "scale": jnp.ones(2)}
      >>> slices = RowSlices(jnp.array([1, 1]), jnp.ones((2, 2), jnp.float32))
      >>> params = apply_updates(params, {"table": slices, "scale": None})
      >>> print(params["table"].dtype, params["table"][:, 0], params["scale"])
      bfloat16 [0 2 0] [1. 1.]
    """

    def apply(path: KeyPath, update: PyTree, param: PyTree) -> PyTree:
        if update is None:
            return param
        shape, dtype = getattr(param, "shape", ()), getattr(param, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params{keystr(path)} is of {dtype or type(param)}, but only a "
                "floating-point array can be updated. Make its update None."
            )
        if is_slices(update):
            given = (
                *(row_axes(shape, update.row_shape) or shape[:1]),
                *update.row_shape,
            )
        else:
            given = np.shape(update)
        if given != shape:
            raise ValueError(
                f"updates{keystr(path)} is for a parameter of shape {given}, but its "
                f"parameter has the shape {shape}. They must be the same."
            )
        if is_slices(update):
            return param + update
        wide = at_least_float32(dtype)
        return (param.astype(wide) + jnp.asarray(update, wide)).astype(dtype)

    new: Params = jax.tree_util.tree_map_with_path(
        apply, updates, params, is_leaf=lambda node: node is None or is_slices(node)
    )
    return new


def global_norm(tree: PyTree) -> jax.Array:
    """The 2-norm of all gradients, as `optax.global_norm` of the dense ones gives it.

    Rows with the same id are summed before they are squared, and rows of negative ids
    are left out. Slices do not know how many rows their table has: ids beyond it count
    here, so use -1 for padding, as `value_and_row_grad` and `lazy_rows` do.

    Args:
      tree: floating-point arrays and `RowSlices`, those of different tables in
        different leaves.

    Returns:
      A scalar, float32 or wider.

    Raises:
      TypeError: the ids of slices have been replaced by a function that maps over
        leaves, or a leaf is not an array of numbers.
      ValueError: slices of a spread table have been reshaped.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import RowSlices, global_norm
      >>> slices = RowSlices(jnp.array([7, 7, -1]), jnp.array([[1.0], [2.0], [9.0]]))
      >>> print(global_norm({"table": slices, "dense": jnp.array([4.0])}))
      5.0
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_slices)
    arrays = [_sums(leaf) if is_slices(leaf) else jnp.asarray(leaf) for leaf in leaves]
    with jax.numpy_dtype_promotion("standard"):
        norm: jax.Array = jnp.sqrt(sum(map(_sum_of_squares, arrays), jnp.float32(0)))
    return norm


def _sums(slices: RowSlices) -> jax.Array:
    """The rows of slices, with those of one id added up, in their dtype.

    As in the dense gradient, a sum may be infinite in float16.
    """
    if slices.placement is not None:
        return slices.placement.sum_duplicates(slices.ids, slices.rows)[1]
    ids = replicated(slices.ids).reshape(-1)
    return sum_rows(one_position(ids, np.uint32(2**31)), slices.rows, slices.row_shape)


def _sum_of_squares(array: jax.Array) -> jax.Array:
    wide = array.astype(at_least_float32(array.dtype))
    return jnp.sum(jnp.real(wide * jnp.conj(wide)))


def psum(tree: Tree, axis_name: AxisName) -> Tree:
    """`jax.lax.psum` of gradients, some of which are `RowSlices`.

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

    Raises:
      ValueError: slices are those of a table that is spread over devices, whose
        gradient covers the whole batch already.
      NameError: there is no axis of this name.

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

    def total(leaf: Leaf) -> Leaf:
        if not is_slices(leaf):
            summed: jax.Array = jax.lax.psum(leaf, axis_name)
            return summed
        if leaf.placement is not None:
            raise ValueError(
                "The gradient of a table that is spread over devices is that of the "
                "whole batch, so there is nothing to sum: leave it out of psum and "
                "pmean."
            )
        rows = leaf.rows.reshape(leaf.ids.size, *leaf.row_shape)
        return RowSlices(
            _all_gather(leaf.ids.reshape(-1), axis_name), _all_gather(rows, axis_name)
        )

    totals: Tree = jax.tree.map(total, tree, is_leaf=is_slices)
    return totals


def pmean(tree: Tree, axis_name: AxisName) -> Tree:
    """`jax.lax.pmean` of gradients, some of which are `RowSlices`.

    Each device's gradient is that of the mean over its part of the batch. Their mean is
    then the gradient of the mean over the whole batch.

    Args:
      tree: arrays and `RowSlices`.
      axis_name: the name of an axis, or a tuple of names.

    Returns:
      The same tree, of means: those of slices are concatenated, as in `psum`, and
      divided by the number of devices.

    Raises:
      ValueError: slices are those of a table that is spread over devices, whose
        gradient covers the whole batch already.
      NameError: there is no axis of this name.

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

    def mean(leaf: Leaf) -> Leaf:
        if not is_slices(leaf):
            averaged: jax.Array = jax.lax.pmean(leaf, axis_name)
            return averaged
        return psum(leaf, axis_name) / jax.lax.axis_size(axis_name)

    means: Tree = jax.tree.map(mean, tree, is_leaf=is_slices)
    return means


def _all_gather(array: jax.Array, axis_name: AxisName) -> jax.Array:
    """The arrays of all devices, of a type that says they are the same on each."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    gather = getattr(jax.lax, "all_gather_invariant", jax.lax.all_gather)  # JAX 0.8
    options, at_once = {}, [names]
    if not set(names) <= set(jax.sharding.get_abstract_mesh().manual_axes):
        at_once = [(name,) for name in reversed(names)]  # vmap takes one at a time
    elif gather is jax.lax.all_gather:
        options = {"to": "invarying"}  # under vmap JAX 0.10 refuses it
    for each in at_once:
        array = gather(array, each, tiled=True, **options)
    return array
