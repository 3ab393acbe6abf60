"""lazy_rows: an optimizer step on a table that touches the rows of a batch alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._rows import RowSlices, sum_duplicates


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
            lambda g, p: sum_duplicates(g, len(p)) if is_slices(g) else g,
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
        return jax.tree.map(_as_slices, places, few), new_state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def is_slices(node: Any) -> bool:
    """Whether a node of a tree is a `RowSlices`."""
    return isinstance(node, RowSlices)


class Places:
    """Where a step looks in a table: at these distinct, ascending ids."""

    def __init__(self, ids: jax.Array) -> None:
        self.ids = ids


ALL = object()  # a leaf that a step takes as a whole


def update_rows(
    inner: optax.GradientTransformationExtraArgs,
    gradients: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    places: Any,
    extra_args: dict[str, Any],
) -> tuple[optax.Updates, optax.OptState, Any]:
    """Steps on gathered rows; returns updates, state and the places of its leaves."""
    state_places = places_in_state(inner, state, params, places)
    updates, new_state = inner.update(
        gradients,
        jax.tree.map(gather, state_places, state),
        jax.tree.map(gather, places, params),
        **extra_args,
    )
    return updates, new_state, state_places


def places_in_state(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    places: Any,
) -> Any:
    """For each leaf of the state, the places of the table that it is a slot of."""
    problems = []
    if any(map(_is_accumulator, jax.tree.leaves(state, is_leaf=_is_accumulator))):
        problems.append(
            "gradients of several steps, of which one would apply only the rows it "
            "touches: accumulate with RowSlices.concatenate instead"
        )

    def slot_places(slot: Any, place: Any, path: str, param: jax.Array) -> Any:
        if isinstance(slot, optax.MaskedNode):
            return slot
        if place is not ALL and np.shape(slot) != np.shape(param):
            problems.append(f"one of shape {np.shape(slot)} for params{path}")
        return place

    paths = jax.tree_util.tree_map_with_path(lambda path, _: keystr(path), params)
    try:
        state_places = optax.tree.map_params(
            inner,
            slot_places,
            state,
            places,
            paths,
            params,
            transform_non_params=lambda _: ALL,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except (TypeError, ValueError) as error:
        problems.append(f"a state that optax.tree.map_params cannot read ({error})")
    if problems:
        raise ValueError(
            "lazy_rows needs slots that are shaped as their tables, but this optimizer "
            f"keeps {', '.join(problems)}. Step on it densely, or give its tables to "
            "another one with optax.partition."
        )
    return state_places


def _is_accumulator(node: Any) -> bool:
    return isinstance(node, optax.MultiStepsState | optax.ApplyEvery)


def gather(place: Any, table: jax.Array) -> jax.Array:
    """The rows at some places, zeros beyond the table; or all of an array."""
    if place is ALL:
        return table
    return (
        jnp.asarray(table)
        .at[place.ids]
        .get(mode="fill", fill_value=0, unique_indices=True, indices_are_sorted=True)
    )


def scatter(place: Any, table: jax.Array, rows: jax.Array) -> jax.Array:
    """The table with new rows at some places; or all of a new array."""
    if place is ALL:
        return rows
    return (
        jnp.asarray(table)
        .at[place.ids]
        .set(rows, mode="drop", unique_indices=True, indices_are_sorted=True)
    )


def _as_slices(place: Any, updates: jax.Array) -> Any:
    return updates if place is ALL else RowSlices(place.ids, updates)


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


def check_rowwise(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    places: Any,
    extra_args: dict[str, Any],
) -> None:
    """Refuses an optimizer whose step on some rows depends on others.

    It is tried out on small tables of random numbers: a step in which a few rows have
    gradients, taken as a whole and on these rows alone. Norms of the gradients are the
    same in both, norms of parameters or of slots are not.
    """
    with jax.ensure_compile_time_eval():
        both = jax.jit(lambda: _step_both_ways(inner, params, places, extra_args))()
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(both)):
        return  # made inside of a jit, of traced hyperparameters: nothing to look at
    whole, alone = jax.device_get(both)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(whole), jax.tree.leaves(alone), strict=True
    ):
        if np.shape(a) != np.shape(b) or not np.allclose(a, b, rtol=1e-4, atol=0):
            raise ValueError(
                "lazy_rows needs an optimizer that treats each row by itself, but this "
                f"one's {keystr(path)} of a row depends on other rows of the table. "
                "Step on it densely, or give its tables to another one with "
                "optax.partition."
            )


def _step_both_ways(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    places: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    some = Places(jnp.array([1, 2, 4]))
    places = jax.tree.map(lambda place: ALL if place is ALL else some, places)
    extra_args = jax.tree.map(
        lambda x: jnp.ones(x.shape, x.dtype) if isinstance(x, jax.Array) else x,
        extra_args,
    )

    def sample(place: Any, param: jax.Array) -> jax.Array:
        shape = tuple(min(size, 3) for size in np.shape(param))
        shape = shape if place is ALL else (6, *shape[1:])
        return jnp.asarray(10 * rng.normal(size=shape), jnp.float32)

    def touch(place: Any, gradient: jax.Array) -> jax.Array:
        return scatter(place, jnp.zeros_like(gradient), gather(place, gradient))

    def warm_up(_: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        params, state = carry
        updates, state = inner.update(gradients, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(sample, places, params)
    gradients = jax.tree.map(sample, places, params)
    # Long enough that what an optimizer estimates on the way is no longer at its start.
    params, state = jax.lax.fori_loop(0, 30, warm_up, (params, inner.init(params)))
    gradients = jax.tree.map(touch, places, gradients)
    updates, new_state = inner.update(gradients, state, params, **extra_args)
    few, few_state, state_places = update_rows(
        inner,
        jax.tree.map(gather, places, gradients),
        state,
        params,
        places,
        extra_args,
    )
    whole = {
        "update": jax.tree.map(gather, places, updates),
        "state": jax.tree.map(gather, state_places, new_state),
    }
    alone = {"update": few, "state": few_state}
    return jax.tree.map(_plain, whole), jax.tree.map(_plain, alone)


def _plain(leaf: jax.Array) -> jax.Array:
    """Numbers, also of a random key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf
