"""sparse_tables: which tables are large enough for gradients of rows."""

import math
from collections.abc import Callable

import jax

from monolith_optax._rows.gradients.choose_tables import choose
from monolith_optax._rows.gradients.trace_loss import trace_loss
from monolith_optax._rows.types import PyTree


def sparse_tables(
    fun: Callable[..., PyTree],
    params: PyTree,
    *args: PyTree,
    has_aux: bool = False,
    **kwargs: PyTree,
) -> PyTree:
    """The tables with more rows than a batch has ids, to be given as `tables`.

    A step on rows searches for repeated ids, gathers and scatters. Where a batch looks
    up as many ids as a table has rows, a dense gradient is cheaper: days, countries,
    genres. Both take the same time where a table has one to two rows for each id, by
    `python -m benchmarks small_tables`. Call this once, before training, with a batch
    as large as those to come. The answer depends only on shapes, and what it says of a
    table does not change with later batches, as the choice must not: a dense step and a
    step on rows differ for many optimizers.

    With `lazy_rows`, dense gradients take the dense step. For optimizers that leave a
    row without a gradient where it is, such as SGD and Adagrad, both steps are the
    same. With momentum, with decaying slots (Adam, RMSprop, adamom) or with weight
    decay, a dense step also moves the rows that are not in the batch.

    Args:
      fun: the loss, as for `value_and_row_grad`.
      params: its first argument.
      *args: its other arguments: a batch.
      has_aux: whether it returns a pair.
      **kwargs: what it takes by name.

    Returns:
      A tree of bools like params: True for tables whose gradients should be rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import sparse_tables, value_and_row_grad
      >>> params = {"item": jnp.ones((1000, 2)), "weekday": jnp.ones((7, 2))}
      >>> def loss(params, items, days):
      ...     return (params["item"][items] * params["weekday"][days]).sum()
      >>> ids = jnp.zeros(32, jnp.int32)
      >>> tables = sparse_tables(loss, params, ids, ids)
      >>> print(tables)
      {'item': True, 'weekday': False}
      >>> grad = value_and_row_grad(loss, tables)
    """
    loss = trace_loss(fun, 0, has_aux, None, (params, *args), kwargs)
    choice = choose(loss, None)
    ids = choice.num_ids
    large = [
        leaf in ids and ids[leaf] < math.prod(aval.shape[: choice.row_axes[leaf]])
        for leaf, aval in enumerate(loss.types)
    ]
    return jax.tree.unflatten(loss.structure, large)
