"""What every optimizer shares: slots, dtypes and coupled weight decay."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._optimizers import checks


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype in which a slot of `dtype` is updated: float32 or wider."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def as_dtype(dtype: DTypeLike, *values: ArrayLike) -> list[Any]:
    """Casts hyperparameters first, so that `1 - decay` is rounded as in `dtype`."""
    return [
        x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)
        for x in values
    ]


def zeros(params: optax.Params, slot_dtype: DTypeLike | None) -> optax.Params:
    """Zeros with the shape and sharding of each parameter."""

    def zero(param: ArrayLike) -> jax.Array:
        wide = compute_dtype(checks.dtype_of(param))
        return jnp.zeros_like(param, dtype=wide if slot_dtype is None else slot_dtype)

    return jax.tree.map(zero, params)


def shared_zero(slots: optax.Params) -> jax.Array:
    """One scalar zero that can stand for a whole slot of the same dtype."""
    dtypes = {slot.dtype for slot in jax.tree.leaves(slots)}
    if len(dtypes) > 1:
        raise ValueError(
            "compact_c keeps one scalar for all parameters, which needs slots of one "
            f"dtype, but they would have {sorted(map(str, dtypes))}. Give slot_dtype, "
            "or leave compact_c out."
        )
    return jnp.zeros([], dtypes.pop() if dtypes else jnp.float32)


def learning_rate_at(learning_rate: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    """The learning rate of the step that follows `count` steps."""
    if not callable(learning_rate):
        return learning_rate
    rate = learning_rate(count)
    checks.check_scalar("learning_rate", rate)
    return rate


def step(
    rule: Callable[..., tuple[jax.Array, ...]],
    gradients: optax.Updates,
    slots: dict[str, Any],
    params: optax.Params | None,
    weight_decay: ArrayLike,
    mask: checks.Mask,
    shared: str = "",
) -> tuple[optax.Updates, dict[str, Any]]:
    """Runs `(update, *slots) = rule(weight_decay * w + grad, *slots)` on every leaf.

    The rule sees one dtype alone, the compute dtype of the first slot. Updates come
    back in the parameters' dtypes, or in the gradients' without params; slots in those
    that they had. The slot named `shared` is one scalar that all leaves update alike.
    """
    first = next(iter(slots.values()))
    checks.check_gradients(gradients, slots, params, shared)
    like = gradients if params is None else params
    g = jax.tree.map(
        lambda g, slot: jnp.asarray(g, compute_dtype(slot.dtype)), gradients, first
    )
    # A weight decay of 0 that has become an array would be multiplied all the same.
    if checks.concrete(weight_decay) != 0:
        g = _add_decayed_weights(g, params, weight_decay, mask)

    def leaf(g: jax.Array, like: ArrayLike, *old: jax.Array) -> tuple[jax.Array, ...]:
        update, *new = rule(g, *(jnp.asarray(slot, g.dtype) for slot in old))
        new = [n.astype(o.dtype) for n, o in zip(new, old, strict=True)]
        return update.astype(checks.dtype_of(like)), *new

    count = len(jax.tree.leaves(first))
    columns = [
        [slot] * count if name == shared else jax.tree.leaves(slot)
        for name, slot in slots.items()
    ]
    rows = zip(jax.tree.leaves(g), jax.tree.leaves(like), *columns, strict=True)
    results = [leaf(*row) for row in rows]
    updates, *new_slots = (
        jax.tree.unflatten(jax.tree.structure(first), [result[i] for result in results])
        for i in range(1 + len(slots))
    )
    new = dict(zip(slots, new_slots, strict=True))
    if shared:
        new[shared] = next(iter(jax.tree.leaves(new[shared])), slots[shared])
    return updates, new


def _add_decayed_weights(
    gradients: optax.Updates,
    params: optax.Params | None,
    weight_decay: ArrayLike,
    mask: checks.Mask,
) -> optax.Updates:
    if params is None:
        raise ValueError(
            "Weight decay needs the current parameters, but params is None: call "
            "update(gradients, state, params). Under optax.inject_hyperparams even a "
            "weight decay of 0 is an array, unless static_args names 'weight_decay'."
        )

    def decay(use: bool, g: jax.Array, param: ArrayLike) -> jax.Array:
        [rate] = as_dtype(g.dtype, weight_decay)
        return rate * jnp.asarray(param, g.dtype) + g if use else g

    return jax.tree.map(decay, _full_mask(mask, params), gradients, params)


def _full_mask(mask: checks.Mask, params: optax.Params) -> Any:
    """The mask as a bool for each parameter."""
    if callable(mask) and checks.is_leaf(mask):  # not a module that can be called
        mask = mask(params)
    try:
        full = jax.tree.broadcast(True if mask is None else mask, params)
    except ValueError as error:
        raise ValueError(
            "weight_decay_mask must be a prefix of the tree of the parameters."
        ) from error
    for path, use in jax.tree.leaves_with_path(full):
        if not isinstance(use, bool | np.bool_):
            raise ValueError(
                f"weight_decay_mask must hold bools, but {keystr(path)} is {use!r}."
            )
    return full
