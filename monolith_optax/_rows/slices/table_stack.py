"""TableStack: several tables in one array for each shape and dtype of rows.

Each step of training then searches, gathers, computes and scatters once for all tables
of an array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jax.typing import ArrayLike

from monolith_optax._leaves import describe, dtype_of
from monolith_optax._public import public
from monolith_optax._rows.slices.parts import int32_ids
from monolith_optax._rows.slices.stack_layout import Part, StackLayout
from monolith_optax._rows.types import PyTree


@public("monolith_optax")
class TableStack:
    """Several tables as one array for each shape and dtype of their rows.

    A step on 26 tables searches for duplicates, gathers, computes and scatters 26
    times; on one array it does so once. `pack` makes the arrays, which are what is
    trained. Inside the loss `unpack` gives the tables back, for a model of any library,
    and `value_and_row_grad` sees a lookup in such a table as one in the array:

        def loss(stacks, batch):
            return model_loss(stack.unpack(stacks), batch)

    A stack knows only shapes. It holds no arrays, and can be made again whenever a
    program starts.

    What an optimizer does to a parameter as a whole, such as
    `optax.clip_by_block_rms`, it does to the whole array. To treat tables differently,
    make two stacks and give them to two optimizers with `optax.partition`.

    Args:
      tables: a tree of tables, each of shape `(num_rows, ...)` with at least two axes,
        as arrays or as types, such as `jax.eval_shape` gives them.
      shards: how many equal parts an array has that hold a share of every table each:
        the number of devices over which it is split. Rows are added to a table so that
        they can be divided by it.

    Attributes:
      shapes: a dict of the types of the arrays.

    Raises:
      ValueError: a leaf is not a table, shards is not positive, or an array has too
        many rows for int32 row ids.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import TableStack, value_and_row_grad
      >>> tables = {"item": jnp.ones((5, 2)), "user": jnp.zeros((3, 2))}
      >>> stack = TableStack(tables)
      >>> stacks = stack.pack(tables)
      >>> print({key: array.shape for key, array in stacks.items()})
      {'float32_2': (8, 2)}
      >>> print(stack.unpack(stacks)["item"].shape)
      (5, 2)
      >>> ids = stack.row_ids({"item": jnp.array([4, 9]), "user": jnp.array([0])})
      >>> print(ids["float32_2"])
      [ 4 -1  5]
    """

    def __init__(self, tables: PyTree, shards: int = 1) -> None:
        if shards < 1:
            raise ValueError(f"shards must be at least 1, but it is {shards}.")
        leaves, self._structure = jax.tree.flatten_with_path(tables)
        types = []
        for path, table in leaves:
            name, shape = keystr(path), np.shape(table)
            if len(shape) < 2:
                raise ValueError(
                    f"tables{name} must be a table of rows, with at least two axes, "
                    f"but it is {describe(table)}."
                )
            types.append((name, jax.ShapeDtypeStruct(shape, dtype_of(table))))
        self.layout = StackLayout(types, shards)
        self.shapes = self.layout.shapes

    def pack(self, tables: PyTree) -> dict[str, jax.Array]:
        """The arrays that hold these tables.

        Call it inside `jax.jit` with `out_shardings` to make tables that no single
        device can hold.

        Args:
          tables: a tree like the one of this stack, of arrays with as many rows: the
            tables, or their slots.

        Returns:
          A dict of arrays. Rows that only fill up a shard are zeros.

        Raises:
          ValueError: the tree or a number of rows is another, or arrays that belong
            together have rows of different shapes or dtypes.
        """
        parts: dict[str, list[jax.Array]] = {key: [] for key in self.shapes}
        for part, table in self._leaves("tables", tables):
            if np.shape(table)[:1] != (part.num_rows,):
                raise ValueError(
                    f"tables{part.name} must have {part.num_rows} rows, but it is "
                    f"{describe(table)}."
                )
            parts[part.key].append(self.layout.in_shards(part, jnp.asarray(table)))
        return {key: self._joined(key, arrays) for key, arrays in parts.items()}

    def unpack(self, stacks: PyTree) -> PyTree:
        """The tables that these arrays hold.

        Args:
          stacks: a dict of arrays as `pack` gives it, or of their slots, such as
            `state.m`, with one entry or more for each row.

        Returns:
          A tree like the one of this stack: for each table its part of the array, by
          slices and reshapes.

        Raises:
          ValueError: stacks is not a dict of these keys, or an array has another number
            of rows.
        """
        if not isinstance(stacks, dict) or stacks.keys() != self.shapes.keys():
            given = list(stacks) if isinstance(stacks, dict) else type(stacks).__name__
            raise ValueError(
                f"stacks must be a dict with the keys {list(self.shapes)}, but it is "
                f"{given}."
            )
        for key, array in stacks.items():
            if np.shape(array)[:1] != self.shapes[key].shape[:1]:
                raise ValueError(
                    f"stacks[{key!r}] must have {self.shapes[key].shape[0]} rows, but "
                    f"it is {describe(array)}."
                )
        tables = [
            self.layout.table(part, stacks[part.key]) for part in self.layout.parts
        ]
        return jax.tree.unflatten(self._structure, tables)

    def row_ids(self, ids: PyTree) -> dict[str, jax.Array]:
        """Rows of the tables as rows of the arrays.

        Args:
          ids: a tree like the one of this stack, of integers of any shape; None for
            tables without ids.

        Returns:
          For each array int32 ids of one dimension, those of its tables one after
          another, in the order of leaves; None if there are none. Negative ids and ids
          beyond their table are -1, padding.

        Raises:
          ValueError: the tree is another, or ids are not integers.
        """
        return self._concatenated("ids", ids, self._row_ids)

    def concatenate(self, rows: PyTree) -> dict[str, jax.Array]:
        """Values for the rows of `row_ids`, in the same order.

        Args:
          rows: a tree like the one of this stack, of arrays of shape
            `ids.shape + row_shape`; None for tables without ids.

        Returns:
          For each array the rows of its tables, of shape `(number of ids, *row_shape)`.

        Raises:
          ValueError: the tree is another, or rows do not have the shape of their table.
        """
        return self._concatenated("rows", rows, self._rows)

    def start(self, init: PyTree) -> dict[str, jax.Array]:
        """The arrays of new tables.

        Args:
          init: a number, or a tree of tables.
        """
        if np.ndim(init) == 0 and jax.tree_util.all_leaves([init]):
            return {
                key: jnp.full(each.shape, init, each.dtype)
                for key, each in self.shapes.items()
            }
        return self.pack(init)

    def _leaves(self, what: str, tree: PyTree) -> list[tuple[Part, PyTree]]:
        pairs: list[tuple[Part, PyTree]] = []
        parts = jax.tree.unflatten(self._structure, self.layout.parts)
        try:
            jax.tree.map(lambda part, leaf: pairs.append((part, leaf)), parts, tree)
        except ValueError as error:
            raise ValueError(
                f"{what} must be a tree like the one of this stack, but "
                f"{self._difference(what, tree)}."
            ) from error
        return pairs

    def _difference(self, what: str, tree: PyTree) -> str:
        """Why a tree is not like the one of this stack."""
        leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
        given = dict.fromkeys(keystr(path) for path, _ in leaves)
        ours = dict.fromkeys(part.name for part in self.layout.parts)
        missing, others = (
            [what + name for name in some if name not in than]
            for some, than in ((ours, given), (given, ours))
        )
        if missing:
            return f"{', '.join(missing)} is missing"
        if others:
            return f"the stack has no {', '.join(others)}"
        return f"it is {jax.tree.structure(tree)} and not {self._structure}"

    def _joined(self, key: str, tables: list[jax.Array]) -> jax.Array:
        kinds = {(str(table.dtype), table.shape[2:]) for table in tables}
        if len(kinds) > 1:
            names = [part.name for part in self.layout.parts if part.key == key]
            raise ValueError(
                f"The arrays for tables{', tables'.join(names)} must have rows of one "
                f"dtype and shape, but they have {sorted(kinds)}."
            )
        joined = jnp.concatenate(tables, axis=1)
        return joined.reshape(-1, *joined.shape[2:])

    def _concatenated(
        self, what: str, tree: PyTree, flat: Callable[[Part, ArrayLike], jax.Array]
    ) -> dict[str, PyTree]:
        found: dict[str, list[jax.Array]] = {key: [] for key in self.shapes}
        for part, leaf in self._leaves(what, tree):
            if leaf is not None:
                found[part.key].append(flat(part, leaf))
        return {
            key: jnp.concatenate(arrays) if arrays else None
            for key, arrays in found.items()
        }

    def _row_ids(self, part: Part, ids: ArrayLike) -> jax.Array:
        ids = int32_ids(ids).reshape(-1)
        inside = (ids >= 0) & (ids < part.num_rows)
        return jnp.where(inside, self.layout.positions(part, ids), -1)

    def _rows(self, part: Part, rows: ArrayLike) -> jax.Array:
        row_shape = self.shapes[part.key].shape[1:]
        if np.shape(rows)[-len(row_shape) :] != row_shape:
            raise ValueError(
                f"rows{part.name} must have rows of shape {row_shape}, but it is "
                f"{describe(rows)}."
            )
        return jnp.asarray(rows).reshape(-1, *row_shape)

    def __repr__(self) -> str:
        arrays = ", ".join(f"{key}: {each.shape}" for key, each in self.shapes.items())
        return f"TableStack({len(self.layout.parts)} tables in {{{arrays}}})"
