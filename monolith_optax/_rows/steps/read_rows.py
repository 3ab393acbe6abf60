"""read_rows and write_rows: some rows of tables, with all of their slots."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import PyTreeDef, keystr

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._rows.steps.named_rows import NamedRows, is_none, named_rows
from monolith_optax._rows.steps.slot_owners import slot_owners
from monolith_optax._rows.types import PyTree

Params = TypeVar("Params")
State = TypeVar("State")


def read_rows(
    tx: optax.GradientTransformation, params: PyTree, state: PyTree, rows: PyTree
) -> tuple[PyTree, PyTree]:
    """Some rows of tables, with the same rows of all of their slots.

    It is all that training knows of these rows, so that they can be kept elsewhere,
    moved to another table or written back by `write_rows`. Shapes depend only on the
    shapes of the arguments, and the cost is that of the rows, whatever the size of the
    tables.

    Args:
      tx: the optimizer, of any wrapping. Its `init` is traced, which computes nothing.
      params: the parameters.
      state: the optimizer's state.
      rows: a tree that is a prefix of params: for each table the numbers of its rows,
        integers of shape (k,), and None for leaves to leave out. Rows that are negative
        or beyond the table are padding. A table of three or more axes has rows of shape
        (k, n), where its first n axes count rows: (k, 1) for rows of its first axis,
        (k, 2) for pairs of a table and a row of a stack of tables.

    Returns:
      A pair of trees like params and state: for each table and slot an array of k rows,
      in its dtype, with zeros for padding; None for everything else.

    Raises:
      ValueError: rows are not a prefix of params or do not fit the leaf that the error
        names, or the state is not that of this optimizer for these params.
      TypeError: rows are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import embedding, read_rows
      >>> tx = embedding.adagrad(0.1, initial_accumulator_value=0.5)
      >>> params = {"items": jnp.ones((4, 2)), "bias": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> rows = {"items": jnp.array([3, -1]), "bias": None}
      >>> weights, slots = read_rows(tx, params, state, rows)
      >>> print(weights["items"], weights["bias"])
      [[1. 1.]
       [0. 0.]] None
      >>> print(slots.norm["items"])
      [[0.5 0.5]
       [0.  0. ]]
    """
    named = named_rows(rows, params)
    owners = slot_owners(tx, params, state, named)
    return _read(params, _of_params(named, params)), _read(state, owners)


def write_rows(
    tx: optax.GradientTransformation,
    params: Params,
    state: State,
    rows: PyTree,
    values: PyTree,
) -> tuple[Params, State]:
    """Puts rows with all of their slots into tables: what `read_rows` has read.

    Call it inside a jitted step that params and state are donated to: it then writes in
    place, and costs what its rows cost, whatever the size of the tables.

    Args:
      tx: the optimizer, of any wrapping.
      params: the parameters.
      state: the optimizer's state.
      rows: as for `read_rows`. Padding is not written. A row that is there several
        times gets the last of its values.
      values: a pair as `read_rows` gives it for rows of these shapes. Leaves that are
        None there stay as they are.

    Returns:
      The new params and state.

    Raises:
      ValueError: rows or values do not fit the leaf that the error names, or the state
        is not that of this optimizer for these params.
      TypeError: rows are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import embedding, read_rows, write_rows
      >>> tx = embedding.adagrad(0.1)
      >>> table = jnp.arange(6.0).reshape(3, 2)
      >>> state = tx.init(table)
      >>> values = read_rows(tx, table, state, jnp.array([2]))
      >>> table, state = write_rows(tx, table, state, jnp.array([0]), values)
      >>> print(table[:, 0])
      [4. 2. 4.]
    """
    named = named_rows(rows, params)
    owners = slot_owners(tx, params, state, named)
    return written(params, state, named, owners, values)


def written(
    params: Params,
    state: State,
    named: dict[int, NamedRows],
    owners: list[NamedRows | None],
    values: PyTree,
) -> tuple[Params, State]:
    """The params and the state with other values in some rows."""
    weights, slots = values
    once = {rows.name: rows.distinct() for rows in named.values()}

    def each_once(owners: list[NamedRows | None]) -> list[NamedRows | None]:
        return [once[owner.name] if owner else None for owner in owners]

    return (
        _written("params", params, each_once(_of_params(named, params)), weights),
        _written("state", state, each_once(owners), slots),
    )


def _of_params(named: dict[int, NamedRows], params: PyTree) -> list[NamedRows | None]:
    return [named.get(i) for i in range(len(jax.tree.leaves(params, is_leaf=is_none)))]


def _read(tree: PyTree, owners: list[NamedRows | None]) -> PyTree:
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    rows = [
        None if owner is None else owner.read(leaf)
        for leaf, owner in zip(leaves, owners, strict=True)
    ]
    return jax.tree.unflatten(structure, rows)


def _written(
    what: str, tree: PyTree, owners: list[NamedRows | None], values: PyTree
) -> PyTree:
    structure: PyTreeDef = jax.tree.structure(tree, is_leaf=is_none)
    given: PyTreeDef = jax.tree.structure(values, is_leaf=is_none)
    if given != structure:
        raise ValueError(
            f"The values for {what} must be a tree like {what}, as read_rows gives it, "
            f"but they are {given}, and {what} is {structure}."
        )
    written = []
    for (path, leaf), owner, rows in zip(
        jax.tree.leaves_with_path(tree, is_leaf=is_none),
        owners,
        jax.tree.leaves(values, is_leaf=is_none),
        strict=True,
    ):
        if owner is None or rows is None:
            written.append(leaf)
            continue
        shape, dtype = (len(owner.ids), *leaf.shape[len(owner.axes) :]), leaf.dtype
        if np.shape(rows) != shape or dtype_of(rows) != dtype:
            raise ValueError(
                f"The values for {what}{keystr(path)} must be an array of dtype "
                f"{dtype} and shape {shape}, but they are {describe(rows)}."
            )
        written.append(owner.write(leaf, jnp.asarray(rows)))
    return jax.tree.unflatten(structure, written)
