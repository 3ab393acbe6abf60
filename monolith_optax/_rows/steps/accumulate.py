"""accumulate: gradients of micro-batches, one after another."""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from monolith_optax._rows.slices.duplicates import at_least_float32
from monolith_optax._rows.slices.row_slices import is_slices
from monolith_optax._rows.types import KeyPath, PyTree

Grad = TypeVar("Grad", bound=Callable[..., PyTree])


def accumulate(grad: Grad, num_batches: int) -> Grad:
    """Takes a gradient over micro-batches, so that one at a time is in memory.

    The batch is cut into `num_batches` equal parts, and the gradients of the parts are
    taken one after another in a loop. Dense gradients are summed on the way, so that
    there is only one of each. `RowSlices` keep the rows of all parts, which are as many
    as those of the whole batch. Value and gradients are means over the parts: for a
    loss that is a mean over examples, they are those of the whole batch.

    It takes the place of `optax.MultiSteps` and `optax.microbatch`, which cannot sum
    slices.

    Args:
      grad: a function of params and a batch that returns a value and gradients, as
        `value_and_row_grad` and `jax.value_and_grad` make it; or, with `has_aux`, a
        pair and gradients.
      num_batches: the number of micro-batches.

    Returns:
      A function of the same arguments. Arrays after params are cut along their first
      axis, which must be the same for all of them. A scalar random key is split, so
      that each part has its own. Everything without axes is the same for all parts.
      Auxiliary arrays come back stacked, those of each part at its index.

    Raises:
      ValueError: (when called) there is no array to cut, arrays differ in their first
        axis, or it cannot be divided by num_batches.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import accumulate, value_and_row_grad
      >>> def loss(params, ids):
      ...     return params["scale"] * params["table"][ids].sum(1).mean()
      >>> params = {"table": jnp.ones((1000, 2)), "scale": jnp.array(3.0)}
      >>> grad = accumulate(value_and_row_grad(loss), 2)
      >>> value, gradients = grad(params, jnp.array([7, 8, 9, 7]))
      >>> print(value, gradients["scale"])
      6.0 2.0
      >>> print(gradients["table"].ids)
      [[7 8]
       [9 7]]
    """

    @functools.wraps(grad)
    def accumulated(params: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten_with_path((args, kwargs))
        parts = _cut(leaves, num_batches)

        @jax.jit  # so that eval_shape and scan trace it only once
        def one(params: PyTree, part: dict[int, jax.Array]) -> PyTree:
            filled = [part.get(i, leaf) for i, (_, leaf) in enumerate(leaves)]
            args, kwargs = jax.tree.unflatten(structure, filled)
            return grad(params, *args, **kwargs)

        def add(sums: list[PyTree], part: dict[int, jax.Array]) -> PyTree:
            result, gradients = one(params, part)
            value, aux = _value_and_aux(result)
            flat = jax.tree.leaves(gradients, is_leaf=is_slices)
            dense = [value, *(x for x in flat if not is_slices(x))]
            sums = [x + y.astype(x.dtype) for x, y in zip(sums, dense, strict=True)]
            return sums, (aux, list(filter(is_slices, flat)))

        first = jax.tree.map(lambda x: x[0], parts)
        result, gradients = jax.eval_shape(one, params, first)
        flat, tree = jax.tree.flatten(gradients, is_leaf=is_slices)
        types = [_value_and_aux(result)[0], *(x for x in flat if not is_slices(x))]
        zeros = [jnp.zeros(x.shape, at_least_float32(x.dtype)) for x in types]
        sums, (aux, slices) = jax.lax.scan(add, zeros, parts)
        means = [
            (x / num_batches).astype(t.dtype) for x, t in zip(sums, types, strict=True)
        ]
        value, *dense = means
        left = iter(dense), iter(slices)
        flat = [
            next(left[1]) / num_batches if is_slices(x) else next(left[0]) for x in flat
        ]
        gradients = jax.tree.unflatten(tree, flat)
        return (value, aux) if isinstance(result, tuple) else value, gradients

    return accumulated  # type: ignore[return-value]


def _value_and_aux(result: PyTree) -> tuple[PyTree, PyTree]:
    return result if isinstance(result, tuple) else (result, None)


def _cut(
    leaves: list[tuple[KeyPath, PyTree]], num_batches: int
) -> dict[int, jax.Array]:
    """The leaves that differ between micro-batches, with an axis for these in front."""
    parts: dict[int, PyTree] = {}
    sizes: dict[str, int] = {}
    for i, (path, leaf) in enumerate(leaves):
        if not isinstance(leaf, jax.Array | np.ndarray):
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) and leaf.ndim == 0:
            parts[i] = jax.random.split(leaf, num_batches)
        elif leaf.ndim:
            sizes[keystr(path[1:])] = len(leaf)
            parts[i] = leaf
    if len({*sizes.values()}) != 1 or {*sizes.values()}.pop() % num_batches:
        raise ValueError(
            f"accumulate cuts arrays after params into {num_batches} micro-batches "
            "along their first axis, which must have one length that can be divided "
            f"by {num_batches}, but the lengths are {sizes}. Close over arrays that "
            "are not parts of the batch."
        )
    return {
        i: part
        if leaves[i][1].ndim == 0
        else jnp.reshape(part, (num_batches, -1, *part.shape[1:]))
        for i, part in parts.items()
    }
