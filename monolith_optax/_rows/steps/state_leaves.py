"""Which table a leaf of an optimizer's state belongs to."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from monolith_optax._rows.programs.row_values import MixesRowsError, Rows, Value, Whole
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.slices.row_slices import flattened

WHOLE = object()  # leaves of dense parameters
ANYBODY = object()  # leaves of which only the program can say whose they are


def check_kind(state: optax.OptState) -> None:
    """Refuses optimizers that move rows in steps that do not touch them.

    Raises:
      ValueError: the state is that of such an optimizer.
    """
    for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, _ACCUMULATORS)):
        if isinstance(node, _ACCUMULATORS):
            raise MixesRowsError(
                f"{type(node).__name__} holds back updates of some steps, of which "
                "a later one would apply only the rows it touches: accumulate "
                "gradients with RowSlices.concatenate instead"
            )


_ACCUMULATORS = (
    optax.MultiStepsState,
    optax.ApplyEvery,
    optax.LookaheadState,
    optax.contrib.SAMState,
)


def owners(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: optax.Params,
    tables: Any,
) -> list[Any]:
    """For each leaf of the state its table, WHOLE or ANYBODY.

    Args:
      inner: the optimizer.
      state: its state.
      params: the parameters.
      tables: a tree like the parameters, of tables and WHOLE.
    """

    def owner(slot: Any, table: Any, param: Any) -> Any:
        if isinstance(slot, optax.MaskedNode):
            return slot
        is_slot = table is WHOLE or np.shape(slot) == np.shape(param)
        return table if is_slot else ANYBODY

    try:
        tree = optax.tree.map_params(
            inner,
            owner,
            state,
            tables,
            params,
            transform_non_params=lambda node: jax.tree.map(lambda _: ANYBODY, node),
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except Exception:  # an init that does not take optax's placeholders may raise any
        return [ANYBODY] * len(jax.tree.leaves(state))
    return jax.tree.leaves(tree)


class Leaf(NamedTuple):
    """A leaf of the parameters or of the state.

    Attributes:
      array: what it holds.
      name: its path.
      owner: the table whose rows it has, WHOLE or ANYBODY.
      row_axes: its first axes, if they all are rows of a stack of tables.
    """

    array: Any
    name: str
    owner: Any
    row_axes: tuple[int, ...] = ()

    @property
    def flat(self) -> Any:
        """What it holds, of a stack of tables as of one table."""
        return flattened(self.array, self.row_axes)

    def of_a_stack(self, stacks: Iterable[tuple[int, ...]]) -> "Leaf":
        """The leaf with its first axes as rows, where they are those of a stack."""
        if self.owner is WHOLE:
            return self
        shape = np.shape(self.array)
        found = [axes for axes in stacks if shape[: len(axes)] == axes]
        return self._replace(row_axes=found[0]) if found else self

    def value(self, runner: Runner) -> Value:
        """What a program sees of it."""
        if isinstance(self.owner, Table):
            return Rows(self.owner.gather(self.flat), self.owner)
        if self.owner is WHOLE:
            return Whole(self.array)
        return runner.slot(self.flat, self.name)

    def written(self, new: Value, old: Value, runner: Runner) -> Any:
        """The leaf after a step that has made one value of another."""
        if new is old:
            return self.array
        owner = self.owner
        if owner is ANYBODY:
            owner = new.table if isinstance(new, Rows) else runner.owner(self.name)
        if not isinstance(owner, Table):
            return self.all(new)
        rows = self._replace(owner=owner).rows(new)
        return owner.scatter(self.flat, rows).reshape(np.shape(self.array))

    def rows(self, value: Value) -> jax.Array:
        """Rows for the table that the leaf belongs to."""
        if isinstance(value, Rows) and value.table is not self.owner:
            raise MixesRowsError(f"{self.name} depends on rows of {value.table.name}")
        return value.at(self.owner)

    def all(self, value: Value) -> Any:
        """All of an array, for a leaf that is no table's."""
        if isinstance(value, Rows):
            raise MixesRowsError(f"{self.name} depends on rows of {value.table.name}")
        array = value.at(None)
        return array.reshape(np.shape(self.array)) if self.row_axes else array
