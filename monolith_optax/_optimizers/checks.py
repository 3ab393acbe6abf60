"""Checks of what users pass in.

They look only at shapes, dtypes and concrete numbers, so they happen while JAX traces
and cost the compiled step nothing.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike, DTypeLike

from monolith_optax._leaves import concrete, describe, dtype_of, is_leaf
from monolith_optax._optimizers.slots import Slot

_FULL = Slot()


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
            f"{name} must be float32 or wider, but it is {dtype}: 0.9999 is 1 in "
            "bfloat16, and 1e-8 is 0 in float16. Give a Python number or a float32 "
            "array; pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams."
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
        f"is {slot_dtype!r}. With optax.inject_hyperparams, name 'slot_dtype' in "
        "static_args; otherwise optax takes the dtype for a schedule."
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
            problems.append(f"params{keystr(path)} is {describe(param)}: {advice}.")
    _raise_listed("Parameters must be real floating-point arrays.", problems)


def check_trees(
    gradients: optax.Updates,
    params: optax.Params | None,
    slots: dict[str, Any],
    kinds: dict[str, Slot],
) -> None:
    """Accepts dense gradients, and params and slots that match them."""
    reference = _reference(gradients, params, slots, kinds)
    problems = _mismatches("gradients", gradients, reference)
    if params is not None:
        problems += _mismatches("params", params, reference)
    for name, kind in kinds.items():
        if kind.per == "tree":
            problems += _mismatches(f"state.{name}", slots[name], 0.0)
        else:
            problems += _mismatches(f"state.{name}", slots[name], reference, kind)
    _raise_listed("Gradients, params and state do not match.", problems)


def check_like(params: optax.Params, **trees: Any) -> None:
    """Accepts trees of floating-point arrays with the shapes of the parameters."""
    problems = [x for name in trees for x in _mismatches(name, trees[name], params)]
    _raise_listed(f"Params and {' and '.join(trees)} do not match.", problems)


def _reference(
    gradients: optax.Updates,
    params: optax.Params | None,
    slots: dict[str, Any],
    kinds: dict[str, Slot],
) -> Any:
    """The tree whose structure and shapes the others must have."""
    trees = [gradients] if params is None else [params, gradients]
    for name, kind in kinds.items():
        if kind.per == "entry":
            return slots[name]
        if kind.per == "row":
            trees.sort(key=lambda t: bool(_mismatches(name, slots[name], t, kind)))
    return trees[0]


def _mismatches(name: str, tree: Any, reference: Any, kind: Slot = _FULL) -> list[str]:
    """How a tree differs from arrays of the reference's shapes."""
    given: Any = jax.tree.structure(tree)
    if given != jax.tree.structure(reference):
        return _structure_mismatches(name, tree, reference)
    shapes = [kind.shape(np.shape(leaf)) for leaf in jax.tree.leaves(reference)]
    family = jnp.floating if kind.is_real else jnp.integer
    numbers = "a real floating-point" if kind.is_real else "an integer"
    return [
        f"{name}{keystr(path)}: expected {numbers} array of shape {shape}, "
        f"got {describe(leaf)}."
        for (path, leaf), shape in zip(
            jax.tree.leaves_with_path(tree), shapes, strict=True
        )
        if np.shape(leaf) != shape or not jnp.issubdtype(dtype_of(leaf), family)
    ]


def _structure_mismatches(name: str, tree: Any, reference: Any) -> list[str]:
    expected: Any = jax.tree.structure(reference)
    paths = [keystr(path) for path, _ in jax.tree.leaves_with_path(reference)]
    try:
        nodes = dict(zip(paths, expected.flatten_up_to(tree), strict=True))
    except ValueError:  # it differs above the leaves
        nodes = {keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}
    missing = [f"{name}{path} is missing." for path in paths if nodes.get(path) is None]
    unknown = [f"{name}{path} is unexpected." for path in nodes if path not in paths]
    other = [
        f"{name}{path}: expected an array, got {type(node).__name__}. For RowSlices, "
        "wrap the optimizer in lazy_rows; convert JAX's sparse arrays with todense()."
        for path, node in nodes.items()
        if node is not None and not is_leaf(node)
    ]
    structures = (
        f"{name}: expected the structure {expected}, got {jax.tree.structure(tree)}."
    )
    return missing + unknown + other or [structures]


def check_scalar(name: str, value: ArrayLike) -> None:
    """Accepts a real scalar that is finite, as far as that is known."""
    dtype = dtype_of(value)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real or np.shape(value) != ():
        raise ValueError(f"{name} must be a real scalar, but it is {describe(value)}.")
    number = concrete(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, but it is {value}.")


def _raise_listed(summary: str, problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join([summary, *problems]))
