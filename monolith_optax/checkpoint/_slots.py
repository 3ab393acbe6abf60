"""Converts tensors under TensorFlow's names to params and optax states, and back."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey, keystr

from monolith_optax._leaves import is_leaf
from monolith_optax.checkpoint._entries import (
    GLOBAL_STEP,
    Count,
    Entry,
    Kept,
    MismatchError,
    Shared,
    Tensor,
)
from monolith_optax.checkpoint._own_states import (
    is_ours,
    optimizer_of,
    own_states,
)
from monolith_optax.checkpoint._paths import check_leaves, path_of

VariableNames: TypeAlias = Callable[[str], str] | Mapping[str, str] | None

# States whose count is the number of all steps and drives a schedule.
_SCHEDULES = (
    optax.ScaleByScheduleState,
    optax.InjectHyperparamsState,
    optax.InjectStatefulHyperparamsState,
)


def import_slots(
    tensors: Mapping[str, Any],
    params: Any,
    state: Any,
    *,
    name: str | None = None,
    variable_names: VariableNames = None,
    strict: bool = True,
) -> tuple[Any, Any]:
    """Params and optimizer state from the variables and slots of a checkpoint.

    Every parameter and every slot of an optimizer of this package, wherever it is in
    `state` (inside `optax.chain`, `named_chain`, `partition`, `masked`,
    `inject_hyperparams`, `lazy_rows`, ...), is replaced. Their step counts, and the
    counts of optax's schedules, are set to `global_step`. Everything else, such as
    hyperparameters or the state of other optimizers, is left unchanged.

    Args:
      tensors: arrays by TensorFlow's names, as `read_tensorflow` returns them: a
        variable `VAR`, its slots `VAR/Adamom/m`, `/v` and `/c`, `VAR/Rmsprop/m` and
        `/v`, or `VAR/Shampoo/s0` and so on, and `global_step`.
      params: parameters of the shapes, dtypes and shardings you want. Arrays, or the
        shapes that `jax.eval_shape` returns, which take no memory.
      state: a state of the optimizer for these parameters, or its shapes if nothing
        in it is left unchanged.
      name: the name of the optimizer in TensorFlow. None: the name of the state's
        class, such as Adamom for an `AdamomState`.
      variable_names: from the path of a parameter to the name of its variable: a
        function, or a mapping of the paths whose names differ. The path is
        `mlp/dense/kernel` for `params["mlp"]["dense"]["kernel"]`.
      strict: whether tensors that no leaf needs are an error.

    Returns:
      New params and a new state, which share no memory with `tensors`.

    Raises:
      ValueError: tensors are missing, left over, or of another shape or dtype (all
        are listed by name), or a slot that the state keeps as one number (`compact_c`)
        is not uniform, or `state` contains no state of an optimizer of this package,
        or JAX traces a leaf, or a sharding has neither devices nor the current mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from monolith_optax import rmsprop
      >>> from monolith_optax.checkpoint import import_slots
      >>> params = {"mlp": {"bias": jnp.zeros(2)}}
      >>> tensors = {
      ...     "mlp/bias": np.array([1, 2], np.float32),
      ...     "mlp/bias/Rmsprop/m": np.array([3, 4], np.float32),
      ...     "mlp/bias/Rmsprop/v": np.array([5, 6], np.float32),
      ...     "global_step": np.array(7, np.int64),
      ... }
      >>> params, state = import_slots(tensors, params, rmsprop().init(params))
      >>> print(params["mlp"]["bias"], state.v["mlp"]["bias"], state.count)
      [1. 2.] [5. 6.] 7
    """
    entries = _entries(params, state, name, variable_names)
    leaves, treedef = jax.tree.flatten((params, state))
    problems, new = [], []
    for entry, leaf in zip(entries, leaves, strict=True):
        try:
            new.append(entry.read(tensors, leaf))
        except MismatchError as mismatch:
            problems += str(mismatch).splitlines()
    if strict:
        used = {used for entry in entries for used in entry.names}
        problems += [f"{extra} is left over." for extra in sorted(set(tensors) - used)]
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise ValueError(
            "The tensors do not match params and state; nothing was imported. "
            f"(strict=False ignores tensors that are left over.)\n  {listed}"
        )
    restored: tuple[Any, Any] = jax.tree.unflatten(treedef, new)
    return restored


def export_slots(
    params: Any,
    state: Any,
    *,
    name: str | None = None,
    variable_names: VariableNames = None,
) -> dict[str, np.ndarray]:
    """The variables and slots of a checkpoint from params and optimizer state.

    The reverse of `import_slots`, bit for bit. Slots are always written in full, even
    those that `compact_c` keeps as one number.

    Args:
      params: the parameters.
      state: the optimizer's state, which may be nested in others.
      name: the name of the optimizer in TensorFlow. None: the name of the state's
        class, such as Adamom for an `AdamomState`.
      variable_names: as in `import_slots`.

    Returns:
      Arrays by TensorFlow's names.

    Raises:
      ValueError: `state` contains no state of an optimizer of this package, two leaves
        have the same name, counts of steps differ, or JAX traces a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import adamom
      >>> from monolith_optax.checkpoint import export_slots
      >>> params = {"bias": jnp.zeros(2)}
      >>> sorted(export_slots(params, adamom().init(params)))
      ['bias', 'bias/Adamom/c', 'bias/Adamom/m', 'bias/Adamom/v', 'global_step']
    """
    tensors: dict[str, np.ndarray] = {}
    entries = _entries(params, state, name, variable_names)
    for entry, leaf in zip(entries, jax.tree.leaves((params, state)), strict=True):
        written = entry.write(leaf)
        step = tensors.get(GLOBAL_STEP)
        if step is not None and written.get(GLOBAL_STEP, step) != step:
            raise ValueError(
                f"The state has different step counts, {step} and "
                f"{written[GLOBAL_STEP]}, but a checkpoint has only one {GLOBAL_STEP}. "
                "Export the state of one optimizer at a time."
            )
        tensors |= written
    return tensors


def _entries(
    params: Any,
    state: Any,
    name: str | None,
    variable_names: VariableNames,
) -> list[Entry]:
    """The entry of each leaf of `(params, state)`."""
    check_leaves(params, state)
    shapes = {
        path_of(path): np.shape(leaf)
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    variable = _variable_namer(variable_names, list(shapes))

    def of_state(path: Any, node: Any) -> Any:
        if is_ours(node):
            return _entries_of(node, name or optimizer_of(node), variable, shapes)
        if isinstance(node, _SCHEDULES):
            return _entries_of_schedule(node, of_tree)
        return Kept(keystr(path))

    def of_tree(tree: Any) -> Any:
        return jax.tree.map_with_path(of_state, tree, is_leaf=_is_known)

    variables = jax.tree.map_with_path(
        lambda p, _: Tensor(variable(path_of(p))), params
    )
    slots = of_tree(state)
    if not own_states(state):
        raise ValueError(
            "state must contain the state of an optimizer of monolith_optax, but it is "
            f"{jax.tree.structure(state)}."
        )
    entries: list[Entry] = jax.tree.leaves((variables, slots))
    uses = Counter(
        used
        for entry in entries
        if not isinstance(entry, Count)
        for used in entry.names
    )
    uses[GLOBAL_STEP] += 1
    if twice := [used for used, times in uses.items() if times > 1]:
        raise ValueError(
            f"Several leaves of params and state have the same name: {twice}. Give "
            "variable_names, or the state of one optimizer at a time."
        )
    return entries


def _entries_of(
    state: Any,
    optimizer: str,
    variable: Callable[[str], str],
    shapes: dict[str, tuple[int, ...]],
) -> Any:
    """The entry of each leaf of one optimizer's own state."""
    slots = {field: getattr(state, field) for field in state._fields[1:]}
    axes = slots.pop("axes", None)  # shampoo's slots by their names, or a number
    full = [tree for tree in slots.values() if not _is_scalar(tree)]
    like_params = full[0] if full else next(iter(slots.values()), ())
    paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(like_params)]
    if unknown := [path for path in paths if path not in shapes]:
        raise ValueError(
            f"state has slots for {unknown}, but the parameters are {list(shapes)}. "
            "Give a state that was made for these parameters, without optax.flatten."
        )

    def tensors(slot: str, tree: Any) -> Any:
        return jax.tree.map_with_path(
            lambda p, _: Tensor(f"{variable(path_of(p))}/{optimizer}/{slot}"), tree
        )

    def of_slot(slot: str, tree: Any) -> Any:
        if full and _is_scalar(tree):
            names = {f"{variable(p)}/{optimizer}/{slot}": shapes[p] for p in paths}
            return Shared(names)
        return tensors(slot, tree)

    entries = {slot: of_slot(slot, tree) for slot, tree in slots.items()}
    if isinstance(axes, dict):
        entries["axes"] = {slot: tensors(slot, tree) for slot, tree in axes.items()}
    elif axes is not None:
        entries["axes"] = Kept(".axes")
    return state._replace(count=Count(), **entries)


def _entries_of_schedule(state: Any, of_tree: Callable[[Any], Any]) -> Any:
    """The entry of each leaf of optax's schedules and what they hold."""

    def of_hyperparameter(path: Any, _: Any) -> Entry:
        counts = path[-1:] == (GetAttrKey("count"),)
        return Count() if counts else Kept(keystr(path))

    def of_field(field: str) -> Any:
        value = getattr(state, field)
        if field == "hyperparams_states":
            return jax.tree.map_with_path(of_hyperparameter, value)
        return Count() if field == "count" else of_tree(value)

    return state._replace(**{field: of_field(field) for field in state._fields})


def _variable_namer(names: VariableNames, paths: list[str]) -> Callable[[str], str]:
    if names is None:
        return lambda path: path
    if isinstance(names, Mapping):
        if unknown := sorted(set(names) - set(paths)):
            raise ValueError(
                f"variable_names has {unknown}, but the parameters are {paths}: give "
                "paths of parameters."
            )
        return lambda path: names.get(path, path)
    return names


def _is_scalar(tree: Any) -> bool:
    """Whether a slot is one number for all parameters."""
    return is_leaf(tree) and np.shape(tree) == ()


def _is_known(node: Any) -> bool:
    return is_ours(node) or isinstance(node, _SCHEDULES)
