"""Gradients of lookups as RowSlices, without a dense gradient of any table."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from monolith_optax._rows.opaque_ids import int32_ids
from monolith_optax._rows.shardings import rows_sharding
from monolith_optax._rows.slices import RowSlices


def value_and_row_grad(
    fun: Callable[..., Any], tables: Any, *, has_aux: bool = False
) -> Callable[..., tuple[Any, optax.Updates]]:
    """`jax.value_and_grad` in which the gradients of tables are `RowSlices`.

    JAX's gradient of `table[ids]` is as large as the table. Here the function is given,
    in the place of each table, a stand-in that can be indexed by integer ids and by
    nothing else. The gradient is then taken with respect to the rows that were looked
    up: to each of them a zero is added, and it is the zero's gradient. A table may be
    looked up any number of times; the slices are concatenated.

    Rows of ids outside of the table, negative ones included, are zeros: padding. A
    plain array takes negative ids from its end instead, so a loss that is to serve both
    has to mask them. The lookups must not be inside of a `jax.vmap`, `jax.lax.scan` or
    other transformation that is itself inside of the function: look up whole batches,
    before it.

    Args:
      fun: a function from params, as its first argument, and others to a scalar.
      tables: a tree of bools that is a prefix of params: which leaves are tables.
      has_aux: whether the function returns a pair, of which the second is passed on.

    Returns:
      A function of the same arguments that returns the value, or the pair, and the
      gradients.

    Raises:
      ValueError: tables is no prefix of params, or a table has no rows, or is indexed
        by something other than integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import value_and_row_grad
      >>> params = {"table": jnp.ones((1000, 2)), "scale": jnp.array(3.0)}
      >>> def loss(params, ids):
      ...     return params["scale"] * params["table"][ids].sum()
      >>> grad = value_and_row_grad(loss, {"table": True, "scale": False})
      >>> value, gradients = grad(params, jnp.array([5, 8]))
      >>> print(value, gradients["scale"], gradients["table"].ids)
      12.0 4.0 [5 8]
      >>> print(gradients["table"].rows)
      [[3. 3.]
       [3. 3.]]
    """

    def value_and_grad(
        params: optax.Params, *args: Any, **kwargs: Any
    ) -> tuple[Any, optax.Updates]:
        is_table = _table_flags(tables, params)
        leaves, treedef = jax.tree.flatten(params)

        def run(dense: list[Any], zeros: list[list[Any]] | None) -> Any:
            views = [
                _Table(table, zeros and zeros[i]) if flag else dense[i]
                for i, (table, flag) in enumerate(zip(leaves, is_table, strict=True))
            ]
            result = fun(jax.tree.unflatten(treedef, views), *args, **kwargs)
            value, aux = result if has_aux else (result, None)
            ids = [view.ids if isinstance(view, _Table) else [] for view in views]
            return value, (aux, ids)

        dense = [None if flag else x for x, flag in zip(leaves, is_table, strict=True)]
        # Which lookups there are is found out by tracing the function once.
        _, (_, ids) = jax.eval_shape(lambda dense: run(dense, None), dense)
        zeros = [
            [jnp.zeros((*i.shape, *table.shape[1:]), table.dtype) for i in looked_up]
            for table, looked_up in zip(leaves, ids, strict=True)
        ]
        (value, (aux, ids)), (dense_grads, row_grads) = jax.value_and_grad(
            run, argnums=(0, 1), has_aux=True
        )(dense, zeros)
        gradients = [
            _slices(table, i, rows) if flag else gradient
            for table, flag, gradient, i, rows in zip(
                leaves, is_table, dense_grads, ids, row_grads, strict=True
            )
        ]
        return (value, aux) if has_aux else value, jax.tree.unflatten(
            treedef, gradients
        )

    return value_and_grad


class _Table:
    """A table that remembers what is looked up, and adds a zero to each result."""

    __iter__ = None  # Python would index it by 0, 1, 2 and never stop

    def __init__(self, table: jax.Array, zeros: list[Any] | None) -> None:
        self.table = jnp.asarray(table)
        self.shape, self.dtype = self.table.shape, self.table.dtype
        self.zeros = zeros
        self.ids: list[jax.Array] = []

    def __getitem__(self, ids: Any) -> jax.Array:
        if not isinstance(ids, tuple | slice):
            ids = ids if isinstance(ids, jax.Array) else np.asarray(ids)
        if not hasattr(ids, "dtype") or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"A table is looked up by an array of integer ids, not by {ids!r}."
            )
        ids, num_rows = int32_ids(ids), len(self.table)
        valid = (ids >= 0) & (ids < num_rows)
        self.ids.append(jnp.where(valid, ids, -1))
        places = jnp.where(valid, ids, num_rows)
        rows = self.table.at[places].get(
            mode="fill", fill_value=0, out_sharding=rows_sharding(self.table, ids)
        )
        if self.zeros is not None:
            rows = jnp.add(rows, self.zeros[len(self.ids) - 1])
        return rows


def _slices(table: jax.Array, ids: list[jax.Array], rows: list[jax.Array]) -> RowSlices:
    if not ids:
        empty = jnp.zeros((0, *table.shape[1:]), table.dtype)
        return RowSlices(jnp.zeros(0, jnp.int32), empty)
    parts = [RowSlices(*part) for part in zip(ids, rows, strict=True)]
    return parts[0] if len(parts) == 1 else RowSlices.concatenate(parts)


def _table_flags(tables: Any, params: optax.Params) -> list[bool]:
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(tables, params))
    except ValueError as error:
        raise ValueError("tables must be a prefix of the tree of params.") from error
    for flag, param in zip(flags, jax.tree.leaves(params), strict=True):
        if flag and np.ndim(param) == 0:
            raise ValueError("tables names a scalar, which has no rows.")
    return [bool(flag) for flag in flags]
