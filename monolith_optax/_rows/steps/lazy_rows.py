"""lazy_rows: an optimizer step on a table that touches only the rows of a batch."""

import functools
import warnings
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import PyTreeDef, keystr

from monolith_optax._rows.programs.jaxprs import Program, trace
from monolith_optax._rows.programs.known_constants import ZERO
from monolith_optax._rows.programs.row_values import (
    Rows,
    Value,
    Whole,
)
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.row_access import row_axes, touched
from monolith_optax._rows.slices.row_slices import RowSlices, is_slices
from monolith_optax._rows.steps.check_step import (
    check_extra_args,
    check_results,
    check_slices,
)
from monolith_optax._rows.steps.find_slots import slots_of_program, unchanged_slots
from monolith_optax._rows.steps.state_leaves import (
    Leaf,
    check_kind,
    check_structure,
    owners,
)
from monolith_optax._rows.types import PyTree

Arrays: TypeAlias = list[jax.Array]


def lazy_rows(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Makes an optimizer step on only the rows of a batch.

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
    tables, take the dense step; if all of them are, a warning says so once.

    Without a surrounding `jax.jit` the step is jitted by itself. What `inner` reads
    from Python, such as a list that a schedule looks at, is then what it was in the
    first step.

    Args:
      inner: the optimizer: any one that treats each row by itself, as adamom, rmsprop,
        adam, adamw, adagrad, sgd and lion do, also with masks, schedules, noise, or
        clipping by a norm of gradients. Its step is traced on whole tables, and runs on
        the rows of the batch if each of its operations allows that.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is the inner one's. Its
      `update(updates, state, params, **extra_args)` takes the gradients, a tree like
      params with a `RowSlices` for each table and arrays for other leaves, the state
      and the params. It returns the updates, of the same kinds, and the new state.
      Extra arguments reach `inner` as they are and must not hold slices.

    Raises:
      ValueError: (`update`) an operation of the inner optimizer needs rows that are not
        in the batch (adafactor, LAMB, LARS, Muon; the error names the operation and its
        line), or it holds updates back for later steps (MultiSteps, lookahead, SAM), or
        slices do not fit their table, or params are missing.

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
    # So that calls outside a jit trace only once, too.
    jitted = jax.jit(functools.partial(_step, inner))
    warn = functools.cache(_warn_of_dense_gradients)  # once

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: PyTree,
    ) -> tuple[optax.Updates, optax.OptState]:
        step = inner.update
        leaves = jax.tree.leaves(updates, is_leaf=is_slices)
        if any(map(is_slices, leaves)):
            check_kind(state)
            check_slices(updates, params)
            check_extra_args(extra_args)
            only_arrays = all(map(_is_array, jax.tree.leaves(extra_args)))
            step = jitted if only_arrays else functools.partial(_step, inner)
        elif any(np.ndim(leaf) > 1 for leaf in leaves):
            warn()
        result: tuple[optax.Updates, optax.OptState] = step(
            updates, state, params, **extra_args
        )
        return result

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _warn_of_dense_gradients() -> None:
    warnings.warn(
        "All gradients given to lazy_rows are arrays, so its step is the dense one and "
        "costs as much as the tables. Take gradients with value_and_row_grad, whose "
        "explain says which leaves have gradients of rows.",
        stacklevel=3,
    )


def _is_array(leaf: object) -> bool:
    """Whether a leaf may be traced; functions, strings and flags may not."""
    kinds = jax.Array, np.ndarray, np.generic, int, float, complex
    return isinstance(leaf, kinds) and not isinstance(leaf, bool)


def _step(
    inner: optax.GradientTransformationExtraArgs,
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    **extra_args: PyTree,
) -> tuple[optax.Updates, optax.OptState]:
    """One step on the rows that the slices name, and on all of the dense leaves."""
    structure = jax.tree.structure(params)
    gradients, weights = _gradients_and_weights(updates, params)
    slots, slots_structure = _slots(inner, state, params, weights)
    extra, extra_structure = jax.tree.flatten(extra_args)
    arrays = [leaf for leaf in extra if _is_array(leaf)]

    def whole_step(
        gradients: Arrays, slots: Arrays, weights: Arrays, arrays: Arrays
    ) -> PyTree:
        left = iter(arrays)
        leaves = [next(left) if _is_array(leaf) else leaf for leaf in extra]
        return inner.update(
            jax.tree.unflatten(structure, gradients),
            jax.tree.unflatten(slots_structure, slots),
            jax.tree.unflatten(structure, weights),
            **jax.tree.unflatten(extra_structure, leaves),
        )

    def traced(values: list[Value]) -> tuple[Program, PyTree]:
        return trace(
            whole_step,
            list(map(_whole_type, gradients, weights)),
            list(map(_whole_type, values, slots)),
            list(map(_whole_type, of_weights, weights)),
            list(map(jax.typeof, arrays)),
        )

    of_weights = [leaf.value() for leaf in weights]
    of_slots = [leaf.value() for leaf in slots]
    try:
        program, shapes = traced(of_slots)
    except Exception as error:
        check_structure(inner, params, state, error)
        raise
    if jax.tree.structure(shapes[1]) != slots_structure:
        check_structure(inner, params, state)
    check_results(shapes, (updates, state), [*weights, *slots])
    found = slots_of_program(program, weights, slots)
    if found != slots:
        slots = found
        of_slots = [leaf.value() for leaf in slots]
        program, _ = traced(of_slots)

    runner = Runner([leaf.table for leaf in weights if leaf.table])
    unchanged = unchanged_slots(program, weights)
    old = [
        runner.whole(leaf.array) if is_same and leaf.table else value
        for leaf, value, is_same in zip(slots, of_slots, unchanged, strict=True)
    ]
    others = map(runner.whole, arrays)
    results = runner.run(program, [*gradients, *old, *of_weights, *others])
    new_updates, new = results[: len(weights)], results[len(weights) :]
    return (
        jax.tree.unflatten(structure, map(_update, new_updates, weights)),
        jax.tree.unflatten(slots_structure, map(Leaf.written, slots, new, old)),
    )


def _gradients_and_weights(
    updates: optax.Updates, params: optax.Params
) -> tuple[list[Value], list[Leaf]]:
    given = jax.tree.leaves(updates, is_leaf=is_slices)
    weights = [
        Leaf(param, f"params{keystr(path)}", None)
        for path, param in jax.tree.leaves_with_path(params)
    ]
    gradients: list[Value] = []
    for i, gradient in enumerate(given):
        if not is_slices(gradient):
            gradients.append(Whole(gradient))
            continue
        axes = row_axes(np.shape(weights[i].array), gradient.row_shape) or ()
        table, rows = touched(
            *(weights[i].name, weights[i].array, axes),
            *(gradient.ids, gradient.rows, gradient.placement),
        )
        gradients.append(Rows(rows, table, ZERO))
        weights[i] = weights[i]._replace(table=table)
    return gradients, weights


def _slots(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    weights: list[Leaf],
) -> tuple[list[Leaf], PyTreeDef]:
    leaves, structure = jax.tree.flatten_with_path(state)
    axes = {
        i: len(weight.table.axes) if weight.table else 1
        for i, weight in enumerate(weights)
        if np.ndim(weight.array)
    }
    found = owners(inner, params, state, axes)
    return [
        Leaf(slot, f"state{keystr(path)}", weights[owner].table)
        if isinstance(owner, int)
        else Leaf(slot, f"state{keystr(path)}", None, is_told=False)
        for (path, slot), owner in zip(leaves, found, strict=True)
    ], structure


def _whole_type(value: Value, leaf: Leaf) -> PyTree:
    """The type of what a value is in the whole step."""
    if not isinstance(value, Rows):
        return jax.typeof(value.at(None))
    whole_type = jax.typeof(leaf.array)
    # Rows vary over devices as ids do, so this is not the type of what is whole.
    return jax.typeof(value.array).update(
        shape=whole_type.shape, sharding=whole_type.sharding
    )


def _update(value: Value, weight: Leaf) -> jax.Array | RowSlices:
    table = weight.table
    if table is None:
        return weight.all(value)
    # -1 is padding also where nobody knows how many rows there are, as in norms.
    ids = jnp.where(table.valid, table.ids, -1)
    return RowSlices.placed(ids, weight.rows(value), table.placement)
