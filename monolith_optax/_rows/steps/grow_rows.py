"""grow_rows and restack: larger tables that keep the slots they have."""

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import ArrayLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.slices.table_stack import TableStack
from monolith_optax._rows.steps.named_rows import broadcast, is_none, start_rows
from monolith_optax._rows.steps.state_leaves import Owner, owners
from monolith_optax._rows.types import KeyPath, PyTree

Params = TypeVar("Params")
State = TypeVar("State")

# For a leaf of the new params: its rows that were there before, and where they were.
Moves: TypeAlias = dict[int, tuple[np.ndarray, np.ndarray]]


def grow_rows(
    tx: optax.GradientTransformation,
    params: Params,
    state: State,
    rows: PyTree,
    init: PyTree = 0.0,
) -> tuple[Params, State]:
    """Adds rows to tables, and to all of their slots.

    Rows that are there keep their numbers, weights and slots. New ones come after them,
    with the slots that the optimizer begins with. What is one for all rows, such as
    Adam's count of steps, stays.

    The arrays have other shapes afterwards, so a jitted step is compiled again, and
    tables are copied once: grow by large parts. Each array comes back with the sharding
    it had, so that on a mesh the new numbers of rows must fit it.

    Args:
      tx: the optimizer, of any wrapping.
      params: the parameters.
      state: the optimizer's state.
      rows: a tree that is a prefix of params: the number of rows that each table is to
        have, and None for leaves that stay as they are.
      init: a tree that is a prefix of params: the weights of new rows, an array that
        broadcasts to `(new rows, ...)`, where `...` is the shape of a row, or a number.

    Returns:
      The larger params and the state that belongs to them.

    Raises:
      ValueError: rows or init are not a prefix of params or do not fit a leaf, a table
        would lose rows, or it is not known which rows a leaf of the state has.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import embedding, grow_rows
      >>> tx = embedding.adagrad(0.1, initial_accumulator_value=0.5)
      >>> params = {"items": jnp.ones((2, 1))}
      >>> state = tx.init(params)._replace(norm={"items": jnp.array([[3.0], [4.0]])})
      >>> params, state = grow_rows(tx, params, state, {"items": 4})
      >>> print(params["items"][:, 0], state.norm["items"][:, 0])
      [1. 1. 0. 0.] [3.  4.  0.5 0.5]
    """
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    paths = [keystr(p) for p, _ in jax.tree.leaves_with_path(params, is_leaf=is_none)]
    starts = broadcast("init", init, params)
    moves: Moves = {}
    for i, count in enumerate(broadcast("rows", rows, params)):
        if count is not None and leaves[i] is not None:
            kept = np.arange(_old_count(paths[i], leaves[i], count), dtype=np.int32)
            index = sum(leaf is not None for leaf in leaves[:i])
            moves[index] = kept, kept
            leaves[i] = _grown(paths[i], leaves[i], count, starts[i])
    new_params = jax.tree.unflatten(structure, leaves)
    return new_params, _carried_over(tx, state, new_params, moves)


def restack(
    tx: optax.GradientTransformation,
    params: Params,
    state: State,
    old: TableStack,
    new: TableStack,
    init: PyTree = 0.0,
) -> tuple[Params, State]:
    """Moves trained tables from one stack to another, with all of their slots.

    The new stack may have more tables, more rows in a table, or another number of
    shards. Tables are matched by their paths in the trees of the two stacks.

    Args:
      tx: the optimizer, of any wrapping.
      params: the parameters: the dict of arrays that `old.pack` has made, or a tree
        that contains it.
      state: the optimizer's state.
      old: the stack of params.
      new: the stack that they are to have.
      init: the weights of new rows: a number, or a tree like the tables of `new`,
        whose new rows are taken.

    Returns:
      The params and the state with the arrays of the new stack. New rows have the slots
      that the optimizer begins with.

    Raises:
      ValueError: params has no arrays of the old stack, a table would lose rows or has
        rows of another shape or dtype, or it is not known which rows a leaf of the
        state has.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from monolith_optax import TableStack, restack
      >>> tables = {"item": jnp.ones((2, 1)), "user": jnp.ones((1, 1))}
      >>> old, tx = TableStack(tables), optax.adam(0.1)
      >>> params = {"tables": old.pack(tables)}
      >>> new = TableStack({"item": jnp.ones((3, 1)), "user": jnp.ones((1, 1))})
      >>> params, state = restack(tx, params, tx.init(params), old, new)
      >>> print(new.unpack(params["tables"])["item"][:, 0])
      [1. 1. 0.]
    """
    before, after = old.layout.moves_to(new.layout)

    def is_stack(node: PyTree) -> bool:
        return isinstance(node, dict) and node.keys() == old.shapes.keys()

    def restacked(node: PyTree) -> PyTree:
        if not is_stack(node):
            return node
        start = new.start(init)
        return start | {
            key: _moved(start[key], array, before[key], after[key])
            for key, array in node.items()
        }

    new_params = jax.tree.map(restacked, params, is_leaf=is_stack)
    marked = jax.tree.map(
        lambda node: {key: _Array(key) for key in new.shapes} if is_stack(node) else 0,
        params,
        is_leaf=is_stack,
    )
    moves = {
        i: (before[mark.key], after[mark.key])
        for i, mark in enumerate(jax.tree.leaves(marked))
        if isinstance(mark, _Array) and mark.key in before
    }
    if not moves:
        raise ValueError(
            f"params must have a dict of the arrays {list(old.shapes)} of the old "
            f"stack, but it is {jax.tree.structure(params)}."
        )
    return new_params, _carried_over(tx, state, new_params, moves)


@dataclass(frozen=True)
class _Array:
    """Stands for an array of a stack."""

    key: str


def _carried_over(
    tx: optax.GradientTransformation, state: PyTree, new_params: PyTree, moves: Moves
) -> PyTree:
    """The state of the new params, with all that the old state knows."""
    new_state = tx.init(new_params)
    before = dict(jax.tree.leaves_with_path(state))

    def carried(path: KeyPath, start: jax.Array, owner: Owner) -> PyTree:
        if path not in before:
            return start
        old = before[path]
        if owner in moves and np.ndim(start):
            return _moved(start, old, *moves[owner])
        if np.shape(old) != np.shape(start):
            raise ValueError(
                f"It is not known which rows state{keystr(path)} of shape "
                f"{np.shape(old)} has, whose shape would become {np.shape(start)}. "
                "Slots must have the rows of their table on their first axis."
            )
        return old

    leaves = jax.tree.leaves_with_path(new_state)
    found = owners(tx, new_params, new_state)
    after = [
        carried(path, start, owner)
        for (path, start), owner in zip(leaves, found, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(new_state), after)


def _moved(
    start: ArrayLike, old: ArrayLike, rows_before: np.ndarray, rows_after: np.ndarray
) -> jax.Array:
    """An array with some rows of an old one, placed as it was."""
    start, old = _placed_as(old, jnp.asarray(start)), jnp.asarray(old)
    rows = Table("", len(old), jnp.asarray(rows_before)).gather(old)
    return Table("", len(start), jnp.asarray(rows_after)).scatter(start, rows)


def _placed_as(old: ArrayLike, new: jax.Array) -> jax.Array:
    if isinstance(old, jax.core.Tracer) or not isinstance(old, jax.Array):
        return new
    placed: jax.Array = jax.device_put(new, old.sharding)
    return placed


def _old_count(name: str, leaf: PyTree, count: object) -> int:
    if not isinstance(count, int | np.integer) or np.ndim(leaf) == 0:
        raise ValueError(
            f"rows must give params{name} a number of rows, and params{name} must have "
            f"some, but it gives {count!r} to {describe(leaf)}."
        )
    if count < len(leaf):
        raise ValueError(
            f"params{name} has {len(leaf)} rows and cannot be given {count}: rows are "
            "only added."
        )
    return len(leaf)


def _grown(name: str, leaf: PyTree, count: int, start: PyTree) -> jax.Array:
    shape = (count - len(leaf), *np.shape(leaf)[1:])
    what = f"The new rows of params{name}"
    rows = start_rows(what, start, shape, dtype_of(leaf))
    zeros = jnp.zeros((count, *shape[1:]), rows.dtype)
    kept, added = np.arange(len(leaf)), jnp.arange(len(leaf), count, dtype=jnp.int32)
    with_old = _moved(zeros, leaf, kept.astype(np.int32), kept.astype(np.int32))
    return Table("", count, added).scatter(with_old, rows)
