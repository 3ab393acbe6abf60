"""bag_lookup: one row for each bag of ids."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._rows.slices.duplicates import at_least_float32

Combiner = Literal["sum", "mean", "sqrtn", "max"]


def bag_lookup(
    table: jax.Array,
    ids: ArrayLike,
    offsets: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    *,
    segments: ArrayLike | None = None,
    num_bags: int | None = None,
    combiner: Combiner = "sum",
) -> jax.Array:
    """Looks up bags of ids and combines the rows of each, as an embedding bag does.

    A bag is a feature with any number of values: the genres of a film, the last films
    that somebody has seen. Bags of a batch follow one another in one array of ids, so
    that none of them is padded to the longest; `Bags` makes such arrays of lists.

    Ids that are negative or beyond the table are padding: they count for nothing, and
    neither do ids that belong to no bag. An empty bag gives zeros. Sums are taken in
    float32, or in the dtype of the table if that is wider. Gradients with respect to
    table and weights are those of the rows that were looked up: rows under
    `value_and_row_grad`.

    Args:
      table: an array of shape `(num_rows, *row_shape)`.
      ids: integers of shape `(n,)`. Or of shape `(num_bags, length)`: then each row is
        a bag, padded with -1.
      offsets: integers of shape `(num_bags + 1,)`: bag k has the ids from `offsets[k]`
        to before `offsets[k + 1]`.
      weights: a number for each id, of the shape of ids.
      segments: in place of offsets, the number of the bag of each id, of shape `(n,)`.
      num_bags: how many bags there are, with segments.
      combiner: "sum"; "mean", the sum divided by the sum of weights; "sqrtn", the sum
        divided by the square root of the sum of squared weights; or "max", the largest
        entry of each column. Without weights each id has weight 1.

    Returns:
      An array of shape `(num_bags, *row_shape)`, in the dtype of the table.

    Raises:
      ValueError: what says where bags begin is missing or there twice, shapes do not
        belong together, ids are not integers, combiner is not one of the four, or
        "max" is given weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import bag_lookup
      >>> table = jnp.array([[1.0], [2.0], [4.0]])
      >>> ids, offsets = jnp.array([0, 1, 2, 2]), jnp.array([0, 3, 3, 4])
      >>> print(bag_lookup(table, ids, offsets, combiner="mean")[:, 0])
      [2.3333333 0.        4.       ]
    """
    _check(ids, weights, combiner)
    ids, size = jnp.asarray(ids), np.size(ids)
    bags, num_bags = _bags(ids, offsets, segments, num_bags)
    ids, row_shape = ids.reshape(-1), table.shape[1:]
    valid = (ids >= 0) & (ids < len(table)) & (bags >= 0) & (bags < num_bags)
    # Sums drop padding, so its rows may be any, unless a gradient multiplies with them.
    # On a CPU, a lookup of bags then takes an eighth less time than with rows of 0.
    any_row = weights is None and len(table) > 0
    rows = table.at[jnp.where(valid, ids, -1)].get(
        mode="promise_in_bounds" if any_row else "fill",
        fill_value=0,
        wrap_negative_indices=False,
    )
    wide = at_least_float32(table.dtype)
    rows, bags = rows.astype(wide), jnp.where(valid, bags, num_bags)
    if combiner == "max":
        return _largest(rows, bags, num_bags).astype(table.dtype)
    scale = jnp.ones(size, wide) if weights is None else jnp.asarray(weights, wide)
    scale = scale.reshape(-1)
    if weights is not None:
        rows = rows * scale.reshape(-1, *[1] * len(row_shape))
    sums = _sum(rows, bags, num_bags)
    if combiner != "sum":
        total = _total(scale, bags, num_bags, combiner)
        sums = sums / total.reshape(-1, *[1] * len(row_shape))
    return sums.astype(table.dtype)


def _check(ids: ArrayLike, weights: ArrayLike | None, combiner: str) -> None:
    if not jnp.issubdtype(dtype_of(ids), jnp.integer):
        raise ValueError(f"ids must be integers, but they are {describe(ids)}.")
    if combiner not in ("sum", "mean", "sqrtn", "max"):
        raise ValueError(
            f'combiner must be "sum", "mean", "sqrtn" or "max", not {combiner!r}.'
        )
    if weights is not None and combiner == "max":
        raise ValueError('combiner "max" takes no weights.')
    if weights is not None and np.shape(weights) != np.shape(ids):
        raise ValueError(
            f"weights must have the shape of ids, {np.shape(ids)}, but they are "
            f"{describe(weights)}."
        )


def _bags(
    ids: jax.Array,
    offsets: ArrayLike | None,
    segments: ArrayLike | None,
    num_bags: int | None,
) -> tuple[jax.Array, int]:
    """The bag of each id, and how many bags there are."""
    here = jnp.arange(ids.size, dtype=jnp.int32)
    if ids.ndim == 2 and offsets is None and segments is None and num_bags is None:
        return here // max(ids.shape[1], 1), len(ids)
    if ids.ndim != 1 or (offsets is None) == (segments is None):
        raise ValueError(
            "ids must have the shape (n,), with either offsets or segments, or the "
            f"shape (num_bags, length) without both, but they are {describe(ids)}."
        )
    if segments is not None:
        if num_bags is None or np.shape(segments) != ids.shape:
            raise ValueError(
                f"segments must come with num_bags and have the shape of ids, "
                f"{ids.shape}, but they are {describe(segments)}."
            )
        return jnp.asarray(segments).astype(jnp.int32), num_bags
    starts = jnp.asarray(offsets).astype(jnp.int32)
    if starts.ndim != 1 or len(starts) < 1 or num_bags not in (None, len(starts) - 1):
        raise ValueError(
            f"offsets must have the shape (num_bags + 1,), but they are "
            f"{describe(starts)} and num_bags is {num_bags}."
        )
    # How many bags begin at or before an id; those before the first belong to none.
    begun = jnp.zeros(ids.size, jnp.int32).at[starts[:-1]].add(1, mode="drop")
    bags = jnp.cumsum(begun) - 1
    return jnp.where(here < starts[-1], bags, -1), len(starts) - 1


def _sum(rows: jax.Array, bags: jax.Array, num_bags: int) -> jax.Array:
    zeros = jnp.zeros((num_bags, *rows.shape[1:]), rows.dtype)
    return zeros.at[bags].add(rows, mode="drop", wrap_negative_indices=False)


def _total(
    scale: jax.Array, bags: jax.Array, num_bags: int, combiner: str
) -> jax.Array:
    """What the sums of bags are divided by; 1 for empty ones."""
    if combiner == "mean":
        total = _sum(scale, bags, num_bags)
        return jnp.where(total == 0, 1, total)
    total = _sum(scale * scale, bags, num_bags)
    return jnp.sqrt(jnp.where(total == 0, 1, total))


def _largest(rows: jax.Array, bags: jax.Array, num_bags: int) -> jax.Array:
    """The first of the largest entries, the only one that has a gradient."""
    shape = (num_bags, *rows.shape[1:])
    fixed = jax.lax.stop_gradient(rows)
    lowest = jnp.full(shape, -jnp.inf, rows.dtype)
    largest = lowest.at[bags].max(fixed, mode="drop", wrap_negative_indices=False)
    here = jnp.arange(len(rows), dtype=jnp.int32).reshape(-1, *[1] * (rows.ndim - 1))
    of_bag = largest.at[bags].get(mode="fill", fill_value=jnp.nan)
    is_largest = (fixed == of_bag) | jnp.isnan(fixed)
    nobody = jnp.full(shape, len(rows), jnp.int32)
    first = nobody.at[bags].min(
        jnp.where(is_largest, here, len(rows)),
        mode="drop",
        wrap_negative_indices=False,
    )
    columns = jnp.indices(shape, sparse=True)[1:]
    return rows.at[(first, *columns)].get(mode="fill", fill_value=0)
