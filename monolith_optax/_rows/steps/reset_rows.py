"""reset_rows: rows with a new owner get new weights and initial slots."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._rows.programs.jaxprs import trace
from monolith_optax._rows.programs.row_values import MixesRowsError, Rows, Value
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.duplicates import LAST_ID
from monolith_optax._rows.slices.opaque_ids import int32_ids
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._shardings import explicit_sharding, replicated

Params = TypeVar("Params")
State = TypeVar("State")


def reset_rows(
    tx: optax.GradientTransformation, params: Params, state: State, rows: Any, init: Any
) -> tuple[Params, State]:
    """Gives rows of tables new weights and the slots that the optimizer begins with.

    A row whose owner has changed, as `IdMap.assign` returns them in `fresh`, must not
    train on with what the last owner has left. What is one for all rows, such as Adam's
    count of steps, does not change, nor does any other row.

    Call it inside a jitted step that params and state are donated to: it then writes in
    place, and costs what its rows cost, whatever the size of the tables.

    Args:
      tx: the optimizer, of any wrapping. Its `init` is traced on whole tables and runs
        on the rows.
      params: the parameters.
      state: the optimizer's state.
      rows: a tree that is a prefix of params: for each table the rows to reset,
        integers of shape (k,), and None for leaves that keep all of their rows. Rows
        that are negative or beyond the table are padding and do nothing. A row that is
        there twice gets either of its new weights.
      init: a tree that is a prefix of params: the new weights of each table, an array
        that broadcasts to (k, ...), where ... is the shape of a row, or a number.

    Returns:
      The params and the state after the reset.

    Raises:
      ValueError: rows or init are no prefix of params or do not fit the leaf that the
        error names, or the state is not that of this optimizer for these params, or
        `tx.init` computes the slots of a row from other rows.
      TypeError: rows are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import embedding, reset_rows
      >>> tx = embedding.adagrad(0.1, initial_accumulator_value=0.5)
      >>> params = {"items": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> rows = {"items": jnp.array([3, -1]), "bias": None}
      >>> params, state = reset_rows(tx, params, state, rows, 0.25)
      >>> print(params["items"][2:, 0], state.norm["items"][2:, 0])
      [1.   0.25] [1.5 0.5]
    """
    leaves, structure = jax.tree.flatten_with_path(params, is_leaf=_is_none)
    names = [f"params{keystr(path)}" for path, _ in leaves]
    weights = [leaf for _, leaf in leaves]
    tables: dict[int, Table] = {}
    news: dict[int, jax.Array] = {}
    starts = _broadcast("init", init, params)
    for i, ids in enumerate(_broadcast("rows", rows, params)):
        if ids is not None and weights[i] is not None:
            tables[i] = _table(names[i], weights[i], ids)
            news[i] = _new_rows(tables[i], weights[i], starts[i])
    try:
        slots = _slots(tx, weights, structure, state, tables, news)
    except MixesRowsError as error:
        error.needed_by, error.way_out = "reset_rows", "Begin with a new state"
        raise
    for i, table in tables.items():
        weights[i] = _written(weights[i], table, news[i])
    return jax.tree.unflatten(structure, weights), slots


def _is_none(node: Any) -> bool:
    return node is None


def _broadcast(what: str, prefix: Any, params: optax.Params) -> list[Any]:
    """What a prefix of params says of each leaf, of which None is one."""
    try:
        tree = jax.tree.broadcast(prefix, params, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(
            f"{what} must be a tree that is a prefix of the tree of params, with None "
            f"for leaves that are not reset, but it is {jax.tree.structure(prefix)}, "
            f"and that of params is {jax.tree.structure(params)}."
        ) from error
    return jax.tree.leaves(tree, is_leaf=_is_none)


def _table(name: str, weights: Any, ids: Any) -> Table:
    """The rows of a table to be reset; those of padding are beyond it."""
    if np.ndim(weights) == 0:
        raise ValueError(f"rows names {name}, but a scalar has no rows.")
    if not jnp.issubdtype(dtype_of(ids), jnp.integer):
        raise TypeError(f"The rows of {name} must be integers, not {describe(ids)}.")
    if np.ndim(ids) != 1:
        raise ValueError(
            f"The rows of {name} must have the shape (k,), but they are "
            f"{describe(ids)}."
        )
    ids, num_rows = replicated(int32_ids(ids)), len(weights)
    valid = (ids >= 0) & (ids < num_rows)
    return Table(name, num_rows, jnp.where(valid, ids, LAST_ID))


def _new_rows(table: Table, weights: Any, start: Any) -> jax.Array:
    shape = (table.batch_size, *np.shape(weights)[1:])
    try:
        if start is None or np.broadcast_shapes(np.shape(start), shape) != shape:
            raise ValueError
    except ValueError:
        given = "None" if start is None else describe(start)
        raise ValueError(
            f"The new weights of {table.name} must broadcast to {shape}, but init has "
            f"{given} for it."
        ) from None
    start = jnp.asarray(start, dtype_of(weights))
    return jnp.broadcast_to(start, shape)


def _written(array: Any, table: Table, new: jax.Array) -> jax.Array:
    array = jnp.asarray(array)
    new = new.astype(array.dtype)
    # Rows may repeat, so nothing is promised as in Table.scatter.
    written: jax.Array = array.at[table.ids].set(
        new, mode="drop", out_sharding=explicit_sharding(array)
    )
    return written


def _slots(
    tx: optax.GradientTransformation,
    weights: list[Any],
    structure: Any,
    state: optax.OptState,
    tables: dict[int, Table],
    news: dict[int, jax.Array],
) -> optax.OptState:
    """The state whose slots begin again in the rows of the tables."""

    def init(weights: list[Any]) -> optax.OptState:
        return tx.init(jax.tree.unflatten(structure, weights))

    types = jax.tree.map(jax.typeof, weights)
    program, shapes = trace(init, types)
    _check_state(state, shapes)
    runner = Runner(list(tables.values()))
    operands: list[Value] = [
        Rows(news[i], tables[i]) if i in tables else runner.whole(array)
        for i, array in enumerate(weights)
        if array is not None
    ]
    initial = runner.run(program, operands)
    owners = _owners(init, types, shapes, tables)
    written = []
    for (path, old), owner, value in zip(
        jax.tree.leaves_with_path(state), owners, initial, strict=True
    ):
        if owner is None:
            written.append(old)
            continue
        if isinstance(value, Rows) and value.table is not owner:
            name = f"state{keystr(path)}"
            raise MixesRowsError(f"{name} depends on rows of {value.table.name}")
        written.append(_written(old, owner, value.at(owner)))
    return jax.tree.unflatten(jax.tree.structure(state), written)


def _check_state(state: optax.OptState, shapes: Any) -> None:
    given: Any = jax.tree.structure(state)
    expected: Any = jax.tree.structure(shapes)
    if given != expected:
        raise ValueError(
            "The state must be that of the optimizer for these params, but it is "
            f"{given} instead of {expected}."
        )
    for (path, leaf), shape in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(shapes), strict=True
    ):
        if np.shape(leaf) != shape.shape:
            raise ValueError(
                f"state{keystr(path)} has the shape {np.shape(leaf)}, but the "
                f"optimizer gives it {shape.shape} for these params."
            )


def _owners(
    init: Any, types: list[Any], shapes: Any, tables: dict[int, Table]
) -> list[Table | None]:
    """The table of each leaf of the state: the one with which it grows.

    This needs no more of an optimizer than that `init` can be traced, and finds slots
    of one number per row as well as full ones.
    """
    owners: list[Table | None] = [None] * len(jax.tree.leaves(shapes))
    for i, table in tables.items():
        more = jax.ShapeDtypeStruct(
            (table.num_rows + 1, *types[i].shape[1:]), types[i].dtype
        )
        grown = jax.eval_shape(init, [*types[:i], more, *types[i + 1 :]])
        same: Any = jax.tree.structure(shapes)
        if jax.tree.structure(grown) != same:
            raise ValueError(
                f"The optimizer's state has another structure if {table.name} has one "
                "row more, so its slots cannot be told: let no mask or label depend on "
                "the exact number of rows."
            )
        before, after = jax.tree.leaves(shapes), jax.tree.leaves(grown)
        for leaf, (old, new) in enumerate(zip(before, after, strict=True)):
            if old.shape == new.shape:
                continue
            if new.shape != (table.num_rows + 1, *old.shape[1:]):
                raise MixesRowsError(
                    f"a leaf of the state, of shape {old.shape}, has rows of "
                    f"{table.name}, of shape {types[i].shape}, not on its first axis"
                )
            owners[leaf] = table
    return owners
