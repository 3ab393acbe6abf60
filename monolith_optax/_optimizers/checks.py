"""Checks of what users pass in.

They look at shapes, dtypes and concrete numbers alone: they happen while JAX traces
and cost nothing when the compiled step runs.
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

from monolith_optax._rows.slices import RowSlices

Mask: TypeAlias = Any | Callable[[optax.Params], Any] | None


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, a shape or a Python number, as JAX would hold it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.dtype(type(leaf))
    return jax.dtypes.canonicalize_dtype(dtype, allow_extended_dtype=True)


def check_learning_rate(value: optax.ScalarOrSchedule) -> None:
    """Accepts a schedule, a traced scalar, or a finite number."""
    if not callable(value):
        check_scalar("learning_rate", value)


def check_hyperparameter(name: str, value: ArrayLike, high: float = math.inf) -> None:
    """Accepts a scalar that is float32 or wider and, where concrete, in [0, high]."""
    check_scalar(name, value)
    number = concrete(value)
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
    if mask is not None and not callable(mask) and is_leaf(mask):
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
    if shared and not (is_leaf(slots[shared]) and np.shape(slots[shared]) == ()):
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


def is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def check_scalar(name: str, value: ArrayLike) -> None:
    dtype = dtype_of(value)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real or np.shape(value) != ():
        raise ValueError(f"{name} must be a real scalar, but it is {_describe(value)}.")
    number = concrete(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, but it is {value}.")


def concrete(value: ArrayLike) -> float | None:
    return None if isinstance(value, jax.core.Tracer) else float(np.asarray(value))


def _describe(leaf: Any) -> str:
    if hasattr(leaf, "dtype"):
        return f"an array of dtype {leaf.dtype} and shape {np.shape(leaf)}"
    return f"{leaf!r}"


def _raise_listed(summary: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([summary, *problems]))
