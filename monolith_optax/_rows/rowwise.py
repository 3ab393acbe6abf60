"""Steps on some rows of tables, and a trial of whether an optimizer allows them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._rows.shardings import explicit_sharding, rows_sharding


class Places:
    """Where a step looks in a table: at these distinct ids, some of them beyond it."""

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
    if len(table) == 0:
        return jnp.zeros((len(place.ids), *table.shape[1:]), table.dtype)
    return (
        jnp.asarray(table)
        .at[place.ids]
        .get(
            mode="fill",
            fill_value=0,
            unique_indices=True,
            out_sharding=rows_sharding(table, place.ids),
        )
    )


def scatter(place: Any, table: jax.Array, rows: jax.Array) -> jax.Array:
    """The table with new rows at some places; or all of a new array."""
    if place is ALL:
        return rows
    return (
        jnp.asarray(table)
        .at[place.ids]
        .set(
            rows,
            mode="drop",
            unique_indices=True,
            out_sharding=explicit_sharding(table),
        )
    )


def check_rowwise(
    inner: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    places: Any,
    extra_args: dict[str, Any],
) -> None:
    """Refuses an optimizer whose step on some rows depends on others.

    It is tried out on small tables of random numbers: steps in which a few rows have
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

    params = jax.tree.map(sample, places, params)
    gradients = jax.tree.map(sample, places, params)
    touched = jax.tree.map(touch, places, gradients)
    few = jax.tree.map(gather, places, touched)

    def both(carry: tuple[Any, Any], _: None) -> tuple[Any, Any]:
        params, state = carry
        updates, new_state = inner.update(touched, state, params, **extra_args)
        few_updates, few_state, state_places = update_rows(
            inner, few, state, params, places, extra_args
        )
        whole = {
            "update": jax.tree.map(gather, places, updates),
            "state": jax.tree.map(gather, state_places, new_state),
        }
        alone = {"update": few_updates, "state": few_state}
        updates, state = inner.update(gradients, state, params, **extra_args)
        carry = optax.apply_updates(params, updates), state
        return carry, (jax.tree.map(_plain, whole), jax.tree.map(_plain, alone))

    # At many points of a run, as what an optimizer estimates on the way may matter at
    # its beginning alone, or from some step on.
    pair: tuple[Any, Any]
    _, pair = jax.lax.scan(both, (params, inner.init(params)), length=30)
    return pair


def _plain(leaf: jax.Array) -> jax.Array:
    """Numbers, also of a random key."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf
