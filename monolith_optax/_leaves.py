"""What optimizers and checkpoints ask of a leaf: its dtype, its value, its kind."""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a shape or a Python number, as JAX would hold it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(type(leaf))
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


def concrete(value: ArrayLike) -> float | None:
    """The number that a scalar holds; None while JAX traces it."""
    return None if isinstance(value, jax.core.Tracer) else float(np.asarray(value))


def is_leaf(tree: Any) -> bool:
    """Whether JAX takes a tree for one leaf."""
    return jax.tree_util.all_leaves([tree])


def describe(leaf: Any) -> str:
    """What a leaf is, for an error."""
    if hasattr(leaf, "dtype"):
        return f"an array of dtype {leaf.dtype} and shape {np.shape(leaf)}"
    return f"{leaf!r}"
