"""lazy_rows: an optimizer step on a table that touches the rows of a batch alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._rows.duplicates import sum_duplicates
from monolith_optax._rows.rowwise import (
    ALL,
    Places,
    check_rowwise,
    scatter,
    update_rows,
)
from monolith_optax._rows.slices import RowSlices, is_slices


def lazy_rows(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes an elementwise optimizer step on the rows of a batch alone.

    Where the gradient of a table is a `RowSlices`, duplicate ids are summed, the rows
    that they touch are gathered from the table and from every slot of it, the inner
    optimizer steps once on these rows and on all dense leaves, and the rows of the
    slots are written back. The update of the table is a `RowSlices` too, which
    `optax.apply_updates` adds. The cost is that of the batch, whatever the size of the
    table, if parameters and state are donated to a jitted step and come back in the
    order in which they went in: JAX reuses buffers of one shape in this order, and
    copies whole tables where it does not fit.

    The semantics are lazy. A row that is not touched does not move: its momentum does
    not carry it on, its slots do not decay, weight decay does not shrink it. Counts
    that are one for all rows, as in Adam's bias correction, count every step; the
    slot `c` of `adamom` counts the steps of its row. Where every step touches every
    row, all of this is the dense optimizer. Gradients that are arrays, also those of
    tables, take the dense step.

    Args:
      inner: the optimizer: any one that treats each row by itself, as adamom, rmsprop,
        adam, adamw, adagrad, sgd and lion do, also chained with clipping by the global
        norm, or inside `optax.partition` or `optax.inject_hyperparams`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is the inner one's.

    Raises:
      ValueError: (`update`) the inner optimizer mixes rows or has slots that are not
        shaped as the table (adafactor, sm3, novograd, LAMB, LARS, Muon), or slices do
        not fit their table, or params are missing.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import RowSlices, adamom, lazy_rows
      >>> tx = lazy_rows(adamom(learning_rate=0.1))
      >>> params = {"table": jnp.ones((1000, 2))}
      >>> state = tx.init(params)
      >>> gradients = {"table": RowSlices(jnp.array([7, 7]), jnp.ones((2, 2)))}
      >>> updates, state = tx.update(gradients, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["table"][6:8], state.c["table"][6:8, 0])
      [[1.    1.   ]
       [0.999 0.999]] [0. 1.]
    """
    inner = optax.with_extra_args_support(inner)
    checked = set()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if not any(map(is_slices, jax.tree.leaves(updates, is_leaf=is_slices))):
            dense: tuple[Any, Any] = inner.update(updates, state, params, **extra_args)
            return dense
        _check_slices(updates, params)
        summed = jax.tree.map(
            lambda g, p: _summed(g, len(p)) if is_slices(g) else g,
            updates,
            params,
            is_leaf=is_slices,
        )
        places = jax.tree.map(
            lambda g: Places(g.ids) if is_slices(g) else ALL, summed, is_leaf=is_slices
        )
        gradients = jax.tree.map(
            lambda g: g.rows if is_slices(g) else g, summed, is_leaf=is_slices
        )
        layout = _layout(params, places)
        if layout not in checked:
            check_rowwise(inner, params, places, extra_args)
            checked.add(layout)
        few, new_rows, state_places = update_rows(
            inner, gradients, state, params, places, extra_args
        )
        new_state = jax.tree.map(scatter, state_places, state, new_rows)
        return jax.tree.map(_as_slices, places, few, params), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _summed(slices: RowSlices, num_rows: int) -> RowSlices:
    [(ids, rows)] = sum_duplicates([slices.ids], [slices.rows], [num_rows])
    return RowSlices(ids, rows)


def _as_slices(place: Any, updates: jax.Array, param: jax.Array) -> Any:
    if place is ALL:
        return updates
    # -1 is padding also where nobody knows how many rows there are, as in norms.
    return RowSlices(jnp.where(place.ids < len(param), place.ids, -1), updates)


def _layout(params: optax.Params, places: Any) -> Any:
    """What the check of the inner optimizer depends on."""
    leaves = [
        (np.ndim(param), place is ALL)
        for param, place in zip(
            jax.tree.leaves(params), jax.tree.leaves(places), strict=True
        )
    ]
    return jax.tree.structure(params), tuple(leaves)


def _check_slices(updates: optax.Updates, params: optax.Params | None) -> None:
    if params is None:
        raise ValueError(
            "lazy_rows needs the current parameters, but params is None: call "
            "update(gradients, state, params)."
        )
    given: Any = jax.tree.structure(updates, is_leaf=is_slices)
    if given != jax.tree.structure(params):
        raise ValueError(
            f"The gradients have the structure {given}, but the parameters "
            f"{jax.tree.structure(params)}."
        )
    for (path, slices), table in zip(
        jax.tree.leaves_with_path(updates, is_leaf=is_slices),
        jax.tree.leaves(params),
        strict=True,
    ):
        if is_slices(slices) and (
            np.ndim(table) == 0 or np.shape(table)[1:] != slices.row_shape
        ):
            raise ValueError(
                f"gradients{keystr(path)} has rows of shape {slices.row_shape}, but "
                f"its parameter of shape {np.shape(table)} is no table of such rows."
            )
