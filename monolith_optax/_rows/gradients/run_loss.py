"""A traced loss that runs with something added to the rows that it looks up."""

import jax
import jax.numpy as jnp

from monolith_optax._rows.gradients.add_zeros import Run
from monolith_optax._rows.gradients.choose_tables import Choice
from monolith_optax._rows.gradients.constructs import CONSTRUCTS
from monolith_optax._rows.gradients.lookup_tree import (
    Arrays,
    Found,
    for_each,
)
from monolith_optax._rows.gradients.row_images import Parameter
from monolith_optax._rows.gradients.spread_rows import (
    SpreadRows,
    SpreadTable,
    check_inside,
)
from monolith_optax._rows.gradients.trace_loss import Loss
from monolith_optax._rows.programs.varying import as_varying
from monolith_optax._rows.types import ArrayType, PyTree


class LossRun:
    """Runs a loss, whose rows of spread tables are looked up when this is made.

    Attributes:
      lookups: all lookups in any tables, and the leaf of each.
      dense: the leaves that are not tables, and None for those that are.
      rows: what is added to the rows of each lookup: zeros, or the rows themselves if
        the table is spread over devices.
      spread: the rows of spread tables; None if there are no such tables.
    """

    def __init__(self, loss: Loss, choice: Choice) -> None:
        self._loss, self._choice = loss, choice
        tree, tables = choice.tree, choice.tables
        self.lookups = choice.lookups
        self.dense = [None if i in tables else x for i, x in enumerate(loss.leaves)]
        self.rows: PyTree = for_each(tree, self._zeros)
        self.spread: SpreadRows | None = None
        if loss.asked.spread:
            check_inside(loss.program, tree, loss.asked.spread.keys(), loss.names)
            self._look_up()

    def __call__(
        self, dense: list[PyTree], rows: PyTree
    ) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        """The value, and a pair of the auxiliary results and the ids of all lookups."""
        operands = [
            Parameter(i, leaf, is_spread=i in self._loss.asked.spread)
            if i in self._choice.tables
            else dense[i]
            for i, leaf in enumerate(self._loss.leaves)
        ]
        (value, *aux), ids = Run(CONSTRUCTS).inside(
            self._loss.program, operands, self._choice.tree, rows
        )
        return value, (aux, ids)

    def _zeros(self, found: Found) -> Arrays:
        def zeros(table: ArrayType, row_axes: int) -> jax.Array:
            shape = *found.ids_shape, *table.shape[row_axes:]
            # Minus zero: plus zero would make plus zeros of rows of minus zeros.
            return as_varying(-jnp.zeros(shape, table.dtype), found.varying)

        types = self._loss.types
        return [zeros(types[leaf], row_axes) for leaf, row_axes in found.tables]

    def _look_up(self) -> None:
        zeros, structure = jax.tree.flatten(self.rows)

        def ids_of(rows: Arrays) -> Arrays:
            _, (_, ids) = self(self.dense, jax.tree.unflatten(structure, rows))
            return jax.tree.leaves(ids)

        self.spread = SpreadRows(self._spread_tables(), self.lookups, ids_of, zeros)
        self.rows = jax.tree.unflatten(structure, self.spread.rows)

    def _spread_tables(self) -> dict[int, SpreadTable]:
        tables, loss = {}, self._loss
        for leaf, axis in loss.asked.spread.items():
            array, count = loss.leaves[leaf], self._choice.row_axes[leaf]
            spread = axis.spread(loss.names[leaf], array.shape, count)
            tables[leaf] = SpreadTable(array, array.shape[:count], spread)
        return tables
