"""Parameters plus updates of which some are RowSlices."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from monolith_optax._rows.duplicates import at_least_float32
from monolith_optax._rows.slices import is_slices, row_axes

Params = TypeVar("Params")


def apply_updates(params: Params, updates: Any) -> Params:
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

    def apply(path: Any, update: Any, param: Any) -> Any:
        if update is None:
            return param
        shape, dtype = getattr(param, "shape", ()), getattr(param, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(
                f"params{keystr(path)} is of {dtype or type(param)}, but only a "
                "floating-point array can be updated. Make its update None."
            )
        if is_slices(update):
            given = (*(row_axes(shape, update) or shape[:1]), *update.row_shape)
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
