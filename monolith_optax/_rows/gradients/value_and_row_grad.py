"""Gradients of lookups as RowSlices, without a dense gradient of any table.

The loss is traced, its lookups are found (`find_lookups.py`), and its program is run
with a zero added to each row that they take (`run_loss.py`, `add_zeros.py`). The
gradients of the zeros are those of the rows.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from monolith_optax._public import public
from monolith_optax._rows.gradients.automatic_axes import (
    SplitIdsError,
    gradients,
    on_any_axes,
    results,
)
from monolith_optax._rows.gradients.choose_tables import Choice, choose
from monolith_optax._rows.gradients.run_loss import LossRun
from monolith_optax._rows.gradients.trace_loss import Loss, trace_loss
from monolith_optax._rows.slices.row_slices import RowSlices
from monolith_optax._rows.types import PyTree

Params = TypeVar("Params")
Others = ParamSpec("Others")
Result = TypeVar("Result")


def value_and_row_grad(
    fun: Callable[Concatenate[Params, Others], Result],
    tables: PyTree = None,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    max_dense_rows: int | None = None,
) -> "ValueAndRowGrad[Params, Others, Result]":
    """`jax.value_and_grad` in which the gradients of tables are `RowSlices`.

    JAX's gradient of `table[ids]` is as large as the table. Here the function is
    traced, as by `jax.jit`, its lookups of tables are found, and the gradient is taken
    with respect to the rows that they yield. Value and gradients are those of
    `jax.value_and_grad`, also if they are differentiated again. So ids outside a
    table do what the lookup's mode says, and negative ones count from its end; where
    a lookup gives nothing for an id, the id is padding in the slices.

    The model needs no changes. Lookups may be `[]`, `jnp.take`, `.at[].get` in any
    mode, `jnp.take_along_axis`, `jax.lax.dynamic_slice`, of whole rows or of some
    columns, under `jax.vmap` (also of a stack of tables), inside `jit`, `checkpoint`,
    `scan`, `cond`, `while_loop`, `map` and `shard_map`. What is done to a table before
    it is looked up, row by row (casts, scaling, normalised rows), is done to the rows.
    A function with a `custom_vjp` or `custom_jvp` rule may be given tables if the rule
    adds rows to zeros for their gradient.

    Inside `jax.shard_map` slices are those of the device. Their sum over devices is
    the gradient.

    Args:
      fun: a function from params, as its first argument, and others to a scalar. As
        under `jax.jit`, it cannot branch on values of params. Other arguments reach it
        as they are.
      tables: a tree of bools that is a prefix of params: which leaves are tables. If
        it is None, these are the leaves that the function looks up by ids that are
        data and uses for nothing else that has a gradient, but for some of its rows,
        such as `table[10:20]`, if they are at most half of them. A leaf
        whose rows are taken only by constants, such as `layers[0]`, is not a table. The
        number of ids does not matter. In the slices of a stack of tables, ids count
        through all of its rows. A leaf for which it says None is treated so too. A
        `PartitionSpec` or a `NamedSharding` in place of True says that the rows are
        spread over mesh axes, such as `PartitionSpec("x")`: devices then exchange only
        the ids and rows that they need, and steps happen where the rows are. On
        explicit axes `table[ids]` needs no `out_sharding` then.
      argnums: which argument params are, or which ones: then params are a tuple of
        them, and so are the gradients. By default the first, as in `jax.grad`.
      has_aux: whether the function returns a pair, whose second part is passed on.
      max_dense_rows: leaves with more rows than this must have gradients of rows, or
        be False in `tables`; by default any gradient may be dense.

    Returns:
      A `ValueAndRowGrad`: a function of the same arguments that returns the value, or
      the pair, and the gradients. Its method `explain`, of the same arguments, says of
      each leaf of params whether its gradient is rows or dense, and why.

    Raises:
      ValueError: (when called) tables is not a prefix of params, or names a scalar, or
        a leaf that is used for more than lookups; or the gradient of a leaf with more
        than `max_dense_rows` is dense.
      TypeError: (when called) the function does not return a scalar, or a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import value_and_row_grad
      >>> params = {"table": jnp.ones((1000, 2)), "scale": jnp.array(3.0)}
      >>> def loss(params, ids):
      ...     return params["scale"] * params["table"][ids].sum()
      >>> grad = value_and_row_grad(loss)
      >>> value, gradients = grad(params, jnp.array([5, -1]))
      >>> print(value, gradients["scale"], gradients["table"].ids)
      12.0 4.0 [  5 999]
      >>> print(gradients["table"].rows)
      [[3. 3.]
       [3. 3.]]
    """
    return ValueAndRowGrad(fun, tables, argnums, has_aux, max_dense_rows)


@public("monolith_optax")
class ValueAndRowGrad(Generic[Params, Others, Result]):
    """The function that `value_and_row_grad` makes.

    It has the name, the docstring and the signature of the function whose gradients it
    takes, as those of `jax.value_and_grad` do. Make it with `value_and_row_grad`.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import value_and_row_grad
      >>> def loss(table, ids):
      ...     return table[ids].sum()
      >>> grad = value_and_row_grad(loss)
      >>> value, gradients = grad(jnp.ones((4, 1)), jnp.array([3]))
      >>> print(grad.__name__, value, gradients.ids)
      loss 1.0 [3]
    """

    def __init__(
        self,
        fun: Callable[Concatenate[Params, Others], Result],
        tables: PyTree,
        argnums: int | Sequence[int],
        has_aux: bool,
        max_dense_rows: int | None,
    ) -> None:
        functools.update_wrapper(self, fun, updated=())
        self._fun, self._tables, self._argnums = fun, tables, argnums
        self._has_aux, self._max_dense_rows = has_aux, max_dense_rows

    def _chosen(self, args: PyTree, kwargs: PyTree) -> tuple[Loss, Choice]:
        loss = self._traced(args, kwargs)
        return loss, choose(loss, self._max_dense_rows)

    def _traced(self, args: PyTree, kwargs: PyTree) -> Loss:
        return trace_loss(
            self._fun, self._argnums, self._has_aux, self._tables, args, kwargs
        )

    # The gradients are any tree, as JAX's are: it is that of params, but no type can
    # say which of its leaves are slices.
    def __call__(
        self, params: Params, *args: Others.args, **kwargs: Others.kwargs
    ) -> tuple[Result, PyTree]:
        """The value of the function, or the pair, and the gradients.

        Args:
          params: a tree of arrays, some of which are tables. With several `argnums`,
            params are these arguments.
          *args: what the function takes besides params.
          **kwargs: what it takes by name.

        Returns:
          A pair of the value, or the pair that the function returns, and a tree like
          params: `RowSlices` for tables, arrays for other leaves.

        Raises:
          ValueError: `tables` or `max_dense_rows` do not fit what the function does.
          TypeError: the function does not return a scalar, or a pair.
        """
        back, args_ = _back_from_automatic_axes, (params, *args)
        loss, (value, *aux), found = on_any_axes(self._results, back, args_, kwargs)
        result: PyTree = (value, loss.with_arrays(aux)) if self._has_aux else value
        return result, jax.tree.unflatten(loss.structure, found)

    def _results(self, args: PyTree, kwargs: PyTree) -> "_Results":
        loss, choice = self._chosen(args, kwargs)
        (value, aux), found = _differentiate(loss, choice)
        return _Results(loss, [value, *aux], found)

    def explain(
        self, params: Params, *args: Others.args, **kwargs: Others.kwargs
    ) -> str:
        """Which leaves have gradients of rows, which have dense ones, and why.

        Of a table that is spread over devices it also says what they exchange in a step
        whose batch fits the buffers.

        Args:
          params: as for the gradients, as are all other arguments.
          *args: what the function takes besides params.
          **kwargs: what it takes by name.

        Returns:
          A line for each leaf of params.

        Raises:
          ValueError: `tables` does not fit what the function does.
          TypeError: the function does not return a scalar, or a pair.

        Example:
          >>> import jax.numpy as jnp
          >>> from monolith_optax import value_and_row_grad
          >>> def loss(params, ids):
          ...     return (params["items"][ids] @ params["scale"]).sum()
          >>> params = {"items": jnp.ones((1000, 2)), "scale": jnp.ones(2)}
          >>> grad = value_and_row_grad(loss)
          >>> print(grad.explain(params, jnp.array([5, 7])))  # doctest: +ELLIPSIS
          items: rows, looked up by gather at ...
          scale: dense, as it is used by dot_general at ...
        """
        return on_any_axes(self._explained, _as_it_is, (params, *args), kwargs)

    def _explained(self, args: PyTree, kwargs: PyTree) -> str:
        loss = self._traced(args, kwargs)
        choice = choose(loss, None)
        places: dict[int, dict[str, None]] = {leaf: {} for leaf in choice.tables}
        ids = choice.num_ids
        for found, leaf in choice.lookups:
            places[leaf][found.place] = None

        def exchange(leaf: int) -> str:
            if leaf not in loss.asked.spread:
                return ""
            row = loss.types[leaf].shape[choice.row_axes[leaf] :]
            axis, dtype = loss.asked.spread[leaf], loss.types[leaf].dtype
            return f"; {axis.exchange(ids[leaf], row, dtype)}"

        return "\n".join(
            f"{name}: rows, looked up by {', '.join(places[leaf]) or 'nothing'}"
            + exchange(leaf)
            if leaf in choice.tables
            else f"{name}: dense, {choice.refused[leaf]}"
            for leaf, name in enumerate(loss.names)
        )


class _Results(NamedTuple):
    """The loss, the arrays that it returns, and the gradients of its leaves."""

    loss: Loss
    arrays: list[Any]
    gradients: list[PyTree]


def _back_from_automatic_axes(found: _Results, error: SplitIdsError) -> _Results:
    arrays = results(found.arrays, error)
    return _Results(found.loss, arrays, gradients(found.gradients, error))


def _as_it_is(text: str, _: SplitIdsError) -> str:
    return text


def _differentiate(
    loss: Loss, choice: Choice
) -> tuple[tuple[PyTree, PyTree], list[PyTree]]:
    types, tables, asked = loss.types, choice.tables, loss.asked.spread
    run = LossRun(loss, choice)
    grad = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (value, (aux, ids)), (gradients, rows) = grad(run.dense, run.rows)
    ids, rows = map(jax.tree.leaves, (ids, rows))
    parts: dict[int, list[RowSlices]] = {leaf: [] for leaf in tables - asked.keys()}
    for (found, leaf), *part in zip(run.lookups, ids, rows, strict=True):
        if leaf in parts and found.has_gradient:
            parts[leaf].append(RowSlices(*part))
    for leaf in tables:
        if leaf in parts:
            gradients[leaf] = _total(parts[leaf], types[leaf], choice.row_axes[leaf])
        elif run.spread is not None:
            gradients[leaf] = run.spread.slices(leaf, rows)
    return (value, aux), gradients


def _total(parts: list[RowSlices], table: Any, row_axes: int) -> RowSlices:
    if not parts:
        empty = jnp.zeros((0, *table.shape[row_axes:]), table.dtype)
        return RowSlices(jnp.zeros(0, jnp.int32), empty)
    total = parts[0] if len(parts) == 1 else RowSlices.concatenate(parts)
    return RowSlices(jnp.maximum(total.ids, -1), total.rows)
