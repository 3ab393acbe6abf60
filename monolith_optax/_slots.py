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

from monolith_optax._rows import RowSlices

Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """The dtype in which a slot of `dtype` is updated: float32 or wider."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a shape or a Python number, as JAX would hold it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(type(leaf))
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


def as_dtype(dtype: DTypeLike, *values: ArrayLike) -> list[Any]:
    """Casts hyperparameters first, so that `1 - decay` is rounded as in `dtype`."""
    return [
        x.astype(dtype) if isinstance(x, jax.Array) else np.asarray(x, dtype)
        for x in values
    ]


def zeros(params: optax.Params, slot_dtype: DTypeLike | None) -> optax.Params:
    """Zeros with the shape and sharding of each parameter."""

    def zero(param: ArrayLike) -> jax.Array:
        wide = compute_dtype(dtype_of(param))
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
    _check_scalar("learning_rate", rate)
    return rate


def step(
    rule: Callable[..., tuple[jax.Array, ...]],
    gradients: optax.Updates,
    slots: dict[str, Any],
    params: optax.Params | None,
    weight_decay: ArrayLike,
    mask: Mask,
    shared: str = "",
) -> tuple[optax.Updates, dict[str, Any]]:
    """Runs `(update, *slots) = rule(weight_decay * w + grad, *slots)` on every leaf.

    The rule sees one dtype alone, the compute dtype of the first slot. Updates come
    back in the parameters' dtypes, or in the gradients' without params; slots in those
    that they had. The slot named `shared` is one scalar that all leaves update alike.
    """
    first = next(iter(slots.values()))
    check_gradients(gradients, slots, params, shared)
    like = gradients if params is None else params
    g = jax.tree.map(
        lambda g, slot: jnp.asarray(g, compute_dtype(slot.dtype)), gradients, first
    )
    # A weight decay of 0 that has become an array would be multiplied all the same.
    if _concrete(weight_decay) != 0:
        g = _add_decayed_weights(g, params, weight_decay, mask)

    def leaf(g: jax.Array, like: ArrayLike, *old: jax.Array) -> tuple[jax.Array, ...]:
        update, *new = rule(g, *(jnp.asarray(slot, g.dtype) for slot in old))
        new = [n.astype(o.dtype) for n, o in zip(new, old, strict=True)]
        return update.astype(dtype_of(like)), *new

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
    mask: Mask,
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


# Checks of what users pass in.


def check_learning_rate(value: optax.ScalarOrSchedule) -> None:
    """Accepts a schedule, a traced scalar, or a finite number."""
    if not callable(value):
        _check_scalar("learning_rate", value)


def check_hyperparameter(name: str, value: ArrayLike, high: float = math.inf) -> None:
    """Accepts a scalar that is float32 or wider and, where concrete, in [0, high]."""
    _check_scalar(name, value)
    number = _concrete(value)
    if number is not None and not 0 <= number <= high:
        bounds = "at least 0" if high == math.inf else f"in [0, {high}]"
        raise ValueError(f"{name} must be {bounds}, but it is {value}.")
    dtype = dtype_of(value)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4:
        raise ValueError(
            f"{name} was given in {dtype}, which is too coarse for it (0.9999 is 1 in "
            "bfloat16, 1e-8 is 0 in float16). Give a number or a float32 array; "
            "optax.inject_hyperparams takes hyperparam_dtype=jnp.float32."
        )


def check_slot_dtype(slot_dtype: DTypeLike | None) -> None:
    """Accepts None and floating-point dtypes."""
    if slot_dtype is None:
        return
    try:
        # inject_hyperparams turns a dtype into an array of that dtype.
        if not isinstance(slot_dtype, jax.Array) and jnp.issubdtype(
            np.dtype(slot_dtype), jnp.floating
        ):
            return
    except TypeError:
        pass
    raise ValueError(
        "slot_dtype must be None or a floating-point dtype such as jnp.float32, but it "
        f"is {slot_dtype!r}. optax.inject_hyperparams takes a dtype for a schedule "
        "unless static_args names 'slot_dtype'."
    )


def check_weight_decay_mask(mask: Mask) -> None:
    """Accepts None, functions and trees, but no bare value."""
    if mask is not None and not callable(mask) and _is_leaf(mask):
        raise ValueError(
            "weight_decay_mask must be a tree of bools, or a function from params to "
            f"one, but it is {mask!r}. optax.inject_hyperparams takes a function for a "
            "schedule unless static_args names 'weight_decay_mask'."
        )


def check_params(params: optax.Params) -> None:
    """Accepts trees of real floating-point arrays."""
    problems = []
    for path, param in jax.tree.leaves_with_path(params):
        dtype = dtype_of(param)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            advice = "wrap the optimizer in optax.contrib.split_real_and_imaginary"
        else:
            advice = "keep it out of the optimizer with optax.masked or optax.partition"
        if not jnp.issubdtype(dtype, jnp.floating):
            problems.append(f"params{keystr(path)} is {_describe(param)}: {advice}.")
    _raise_listed("Parameters must be real floating-point arrays.", problems)


def check_gradients(
    gradients: optax.Updates,
    slots: dict[str, Any],
    params: optax.Params | None,
    shared: str,
) -> None:
    """Accepts dense gradients, params where given, and slots that match exactly."""
    first, *others = (name for name in slots if name != shared)
    trees = {"gradients": gradients} | {f"state.{name}": slots[name] for name in others}
    if params is not None:
        trees["params"] = params
    problems = []
    for name, tree in trees.items():
        problems += _mismatches(name, tree, slots[first])
    if shared and not (_is_leaf(slots[shared]) and np.shape(slots[shared]) == ()):
        problems.append(f"state.{shared} is not one scalar, as compact_c has it.")
    _raise_listed("Gradients, params and state do not belong together.", problems)


def _mismatches(name: str, tree: optax.Updates, slots: optax.Params) -> list[str]:
    given: Any = jax.tree.structure(tree)
    if given != jax.tree.structure(slots):
        return _structure_mismatches(name, tree, slots)
    leaves = jax.tree.leaves_with_path(tree)
    return [
        f"{name}{keystr(path)} is {_describe(leaf)}, but the state was made for a "
        f"real floating-point array of shape {slot.shape}."
        for (path, leaf), slot in zip(leaves, jax.tree.leaves(slots), strict=True)
        if np.shape(leaf) != slot.shape
        or not jnp.issubdtype(dtype_of(leaf), jnp.floating)
    ]


def _structure_mismatches(
    name: str, tree: optax.Updates, slots: optax.Params
) -> list[str]:
    # Slow to import, and only errors need it.
    from jax.experimental.sparse import JAXSparse

    def is_sparse(node: Any) -> bool:
        return isinstance(node, JAXSparse | RowSlices)

    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_sparse)
    given = {keystr(path): leaf for path, leaf in leaves}
    expected = {keystr(path): None for path, _ in jax.tree.leaves_with_path(slots)}
    missing = [f"{name}{path} is missing." for path in expected if path not in given]
    unknown = [f"{name}{path} is unexpected." for path in given if path not in expected]
    sparse = [
        f"{name}{path} is {type(leaf).__name__}: wrap the optimizer in lazy_rows."
        if isinstance(leaf, RowSlices)
        else f"{name}{path} is a sparse {type(leaf).__name__}: give its todense()."
        for path, leaf in given.items()
        if is_sparse(leaf)
    ]
    other_nodes = (
        f"{name} has the structure {jax.tree.structure(tree)}, but the state was made "
        f"for {jax.tree.structure(slots)}."
    )
    return missing + unknown + sparse or [other_nodes]


def _full_mask(mask: Mask, params: optax.Params) -> Any:
    """The mask as a bool for each parameter."""
    if callable(mask) and _is_leaf(mask):  # not a module that can be called
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


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def _check_scalar(name: str, value: ArrayLike) -> None:
    dtype = dtype_of(value)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real or np.shape(value) != ():
        raise ValueError(f"{name} must be a real scalar, but it is {_describe(value)}.")
    number = _concrete(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, but it is {value}.")


def _concrete(value: ArrayLike) -> float | None:
    return None if isinstance(value, jax.core.Tracer) else float(np.asarray(value))


def _describe(leaf: Any) -> str:
    if hasattr(leaf, "dtype"):
        return f"an array of dtype {leaf.dtype} and shape {np.shape(leaf)}"
    return f"{leaf!r}"


def _raise_listed(summary: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([summary, *problems]))
