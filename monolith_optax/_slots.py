"""What every optimizer shares: slots, dtypes, checks and coupled weight decay.

The checks look at shapes, dtypes and concrete numbers alone: they happen while JAX
traces and cost nothing when the compiled step runs.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike, DTypeLike

Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype in which a slot of `dtype` is updated: float32 or wider."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def as_dtype(dtype: DTypeLike, *values: ArrayLike) -> tuple[Any, ...]:
    """Casts hyperparameters first, so that `1 - decay` is rounded as in `dtype`."""
    return tuple(
        value.astype(dtype) if isinstance(value, jax.Array) else np.asarray(value, dtype)
        for value in values
    )


def zero_slots(params: optax.Params, slot_dtype: DTypeLike | None) -> optax.Params:
    """Zeros with the shape and sharding of each parameter."""

    def zeros(param: jax.Array) -> jax.Array:
        wide = compute_dtype(jnp.result_type(param))
        return jnp.zeros_like(param, dtype=wide if slot_dtype is None else slot_dtype)

    return jax.tree.map(zeros, params)


def shared_zero(slots: optax.Params) -> jax.Array:
    """One scalar zero that can stand for a whole slot of the same dtype."""
    dtypes = {slot.dtype for slot in jax.tree.leaves(slots)}
    if len(dtypes) > 1:
        msg = (
            "compact_c keeps one scalar for all parameters, which needs slots of one "
            f"dtype, but they would have {sorted(map(str, dtypes))}. Give slot_dtype, "
            "or leave compact_c out."
        )
        raise ValueError(msg)
    return jnp.zeros([], dtypes.pop() if dtypes else jnp.float32)


def step(
    rule: Callable[..., tuple[jax.Array, ...]],
    gradients: optax.Updates,
    slots: tuple[optax.Params, ...],
    params: optax.Params | None,
    weight_decay: ArrayLike,
    mask: Mask,
) -> tuple[Any, ...]:
    """Runs `(update, *slots) = rule(weight_decay * w + grad, *slots)` on every leaf.

    The rule sees one dtype alone, the compute dtype of the first slot. Updates come
    back in the parameters' dtypes, or in the gradients' without params; slots in those
    that they had.
    """
    check_gradients(gradients, slots[0], params)
    like = gradients if params is None else params
    g = jax.tree.map(
        lambda g, slot: jnp.asarray(g, compute_dtype(slot.dtype)), gradients, slots[0]
    )
    # A weight decay of 0 that has become an array would be multiplied all the same.
    if not _is_concrete(weight_decay) or float(weight_decay) != 0:
        g = _add_decayed_weights(g, params, weight_decay, mask)

    def leaf(g: jax.Array, like: ArrayLike, *old: jax.Array) -> tuple[jax.Array, ...]:
        update, *new = rule(g, *(slot.astype(g.dtype) for slot in old))
        new = [n.astype(o.dtype) for n, o in zip(new, old, strict=True)]
        return update.astype(jnp.result_type(like)), *new

    leaves = map(jax.tree.leaves, (g, like, *slots))
    rows = [leaf(*row) for row in zip(*leaves, strict=True)]
    treedef = jax.tree.structure(gradients)
    return tuple(
        treedef.unflatten([row[i] for row in rows]) for i in range(1 + len(slots))
    )


def _add_decayed_weights(
    gradients: optax.Updates,
    params: optax.Params | None,
    weight_decay: ArrayLike,
    mask: Mask,
) -> optax.Updates:
    if params is None:
        msg = (
            "Weight decay needs the current parameters, but params is None: call "
            "update(gradients, state, params)."
        )
        raise ValueError(msg)

    def decay(g: jax.Array, param: ArrayLike) -> jax.Array:
        (rate,) = as_dtype(g.dtype, weight_decay)
        return rate * jnp.asarray(param, g.dtype) + g

    return jax.tree.map(
        lambda use, g, param: jax.tree.map(decay, g, param) if use else g,
        _weight_decay_mask(mask, params),
        gradients,
        params,
    )


# Checks of what users pass in.


def check_learning_rate(value: optax.ScalarOrSchedule) -> None:
    """Accepts a schedule, a traced scalar, or a finite number."""
    if not callable(value):
        _check_scalar("learning_rate", value, -math.inf, math.inf)


def check_hyperparameter(name: str, value: ArrayLike, high: float = math.inf) -> None:
    """Accepts a scalar that is float32 or wider and, where concrete, in [0, high]."""
    _check_scalar(name, value, 0, high)
    dtype = getattr(value, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        msg = (
            f"{name} was given in {dtype}, which is too coarse for it (0.9999 is 1 in "
            "bfloat16, 1e-8 is 0 in float16). Give a number, or a float32 array; "
            "optax.inject_hyperparams takes hyperparam_dtype=jnp.float32."
        )
        raise ValueError(msg)


def check_slot_dtype(slot_dtype: DTypeLike | None) -> None:
    """Accepts None and floating-point dtypes."""
    try:
        valid = slot_dtype is None or jnp.issubdtype(jnp.dtype(slot_dtype), jnp.floating)
    except TypeError:
        valid = False
    if not valid:
        msg = (
            "slot_dtype must be None or a floating-point dtype such as jnp.float32, but "
            f"{slot_dtype!r} was given. optax.inject_hyperparams takes a dtype for a "
            "schedule unless static_args names 'slot_dtype'."
        )
        raise ValueError(msg)


def check_params(params: optax.Params) -> None:
    """Accepts trees of real floating-point arrays."""
    problems = []
    for path, param in jax.tree.leaves_with_path(params):
        kind = _kind(param)
        if kind == "complex":
            advice = "wrap the optimizer in optax.contrib.split_real_and_imaginary"
        else:
            advice = "keep it out of the optimizer with optax.masked or optax.partition"
        if kind != "floating":
            problems.append(f"params{keystr(path)} is {_describe(param)}: {advice}.")
    _raise_listed("Parameters must be real floating-point arrays.", problems)


def check_gradients(
    gradients: optax.Updates, slots: optax.Params, params: optax.Params | None
) -> None:
    """Accepts dense gradients, and params where given, that match the slots exactly."""
    problems = _mismatches("gradients", gradients, slots)
    if params is not None:
        problems += _mismatches("params", params, slots)
    _raise_listed("Gradients, params and state do not belong together.", problems)


def _mismatches(name: str, tree: optax.Updates, slots: optax.Params) -> list[str]:
    if jax.tree.structure(tree) != jax.tree.structure(slots):
        return _structure_mismatches(name, tree, slots)
    leaves = jax.tree.leaves_with_path(tree)
    return [
        f"{name}{keystr(path)} is {_describe(leaf)}, but the state was made for a "
        f"real array of shape {slot.shape}."
        for (path, leaf), slot in zip(leaves, jax.tree.leaves(slots), strict=True)
        if _kind(leaf) != "floating" or jnp.shape(leaf) != slot.shape
    ]


def _structure_mismatches(
    name: str, tree: optax.Updates, slots: optax.Params
) -> list[str]:
    from jax.experimental.sparse import JAXSparse  # slow, and only errors need it

    def is_sparse(node: Any) -> bool:
        return isinstance(node, JAXSparse)

    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_sparse)
    given = {keystr(path): leaf for path, leaf in leaves}
    expected = {keystr(path) for path, _ in jax.tree.leaves_with_path(slots)}
    return [
        *(
            f"{name}{path} is a sparse {type(leaf).__name__}: give its todense()."
            for path, leaf in given.items()
            if is_sparse(leaf)
        ),
        *(f"{name}{path} is missing." for path in sorted(expected - set(given))),
        *(f"{name}{path} is unknown to the state." for path in given if path not in expected),
    ] or [f"{name} is a {jax.tree.structure(tree)}, but the state was made for a {jax.tree.structure(slots)}."]


def _weight_decay_mask(mask: Mask, params: optax.Params) -> Any:
    """The mask as a tree of bools that is a prefix of the parameters."""
    if mask is None:
        return True
    mask = mask(params) if callable(mask) else mask
    if all(isinstance(use, bool | np.bool_) for use in jax.tree.leaves(mask)):
        return mask
    msg = (
        "weight_decay_mask must be a tree of bools, or a function from params to one, "
        f"but it is {mask!r}. optax.inject_hyperparams takes a function for a schedule "
        "unless static_args names 'weight_decay_mask'."
    )
    raise ValueError(msg)


def _check_scalar(name: str, value: ArrayLike, low: float, high: float) -> None:
    if jnp.shape(value) != () or _kind(value) not in ("floating", "integer"):
        msg = f"{name} must be a real scalar, but it is {_describe(value)}."
        raise ValueError(msg)
    if _is_concrete(value) and not (low <= value <= high and math.isfinite(value)):
        msg = f"{name} must be a finite number in [{low}, {high}], but it is {value}."
        raise ValueError(msg)


def _is_concrete(value: ArrayLike) -> bool:
    return not isinstance(value, jax.core.Tracer)


def _kind(leaf: Any) -> str:
    """What a leaf holds: 'floating', 'integer', 'complex' or 'other'."""
    try:
        dtype = jnp.result_type(leaf)
    except TypeError:
        return "other"
    kinds = {"floating": jnp.floating, "integer": jnp.integer, "complex": jnp.complexfloating}
    return next((k for k, t in kinds.items() if jnp.issubdtype(dtype, t)), "other")


def _describe(leaf: Any) -> str:
    if hasattr(leaf, "dtype"):
        return f"an array of dtype {leaf.dtype} and shape {jnp.shape(leaf)}"
    return f"{leaf!r}"


def _raise_listed(summary: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([summary, *problems]))
