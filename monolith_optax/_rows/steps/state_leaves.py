"""Which table a leaf of an optimizer's state belongs to."""

import itertools
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.tree_util import PyTreeDef

from monolith_optax._leaves import dtype_of
from monolith_optax._rows.programs.row_values import MixesRowsError, Rows, Value, Whole
from monolith_optax._rows.slices.row_access import Table, flattened
from monolith_optax._rows.types import ArrayType, PyTree


class Untold:
    """What `owners` says of a leaf that may have rows of a parameter, or may not."""


UNTOLD: Final = Untold()
Owner: TypeAlias = int | Untold | None


def check_kind(state: optax.OptState) -> None:
    """Refuses optimizers that move rows in steps that do not touch them.

    Raises:
      ValueError: the state is that of such an optimizer.
    """
    for node in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, tuple(_KINDS))):
        for kind, why in _KINDS.items():
            if isinstance(node, kind):
                raise MixesRowsError(f"{type(node).__name__} {why}")


_HOLDS_BACK = (
    "holds back updates of some steps, and a later step would apply only the rows it "
    "touches: accumulate gradients with monolith_optax.accumulate instead"
)
_KINDS: dict[type, str] = {
    optax.MultiStepsState: _HOLDS_BACK,
    optax.ApplyEvery: _HOLDS_BACK,
    optax.LookaheadState: _HOLDS_BACK,
    optax.contrib.SAMState: _HOLDS_BACK,
    optax.contrib.ScheduleFreeState: (
        "averages parameters over all steps, and a row would miss the steps that do "
        "not touch it: take averages outside the optimizer"
    ),
}


def owners(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    row_axes: Mapping[int, int] | None = None,
) -> list[Owner]:
    """Whose rows each leaf of the state of an optimizer has.

    `tx.init` is traced on parameters that have a few rows more, each another number of
    them: a leaf of the state that then has as many rows is theirs. So it does not
    matter which parameters have the same number of rows, or what a leaf's other axes
    are. Only types count, and nothing is computed.

    Args:
      tx: the optimizer.
      params: the parameters, or their types.
      state: a state of the optimizer, or its types.
      row_axes: the parameters to ask for, as indices of their leaves, and how many of
        their first axes are rows. None: the first one of each that has axes.

    Returns:
      For each leaf of the state, in order, the index of the parameter that it has one
      entry or more for each row of, on the same first axes; None if it has the same
      size however many rows there are; or UNTOLD. That is so of leaves that have rows
      in another way, and if `init` does not take such parameters, or gives another
      state for them, of all leaves but those for which `optax.tree.map_params` tells.
    """
    leaves, structure = jax.tree.flatten(params)
    if row_axes is None:
        row_axes = {i: 1 for i, leaf in enumerate(leaves) if np.ndim(leaf)}
    types: list[PyTree] = [
        jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for leaf in leaves
    ]
    grown = _with_more_rows(types, row_axes)
    try:
        after = jax.eval_shape(tx.init, jax.tree.unflatten(structure, grown))
    except Exception:  # the init of others may raise any
        after = None
    given: PyTreeDef = jax.tree.structure(state)
    if jax.tree.structure(after) != given:
        return _as_optax_says(tx, params, state, row_axes)
    return [
        _owner(np.shape(old), new.shape, grown, row_axes)
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    ]


def _with_more_rows(
    types: list[ArrayType], row_axes: Mapping[int, int]
) -> list[ArrayType]:
    """The types of parameters whose row axes all have different lengths."""
    lengths = {size for each in types for size in each.shape}

    def another(size: int) -> int:
        size = next(n for n in itertools.count(size + 1) if n not in lengths)
        lengths.add(size)
        return size

    grown = list(types)
    for i, count in row_axes.items():
        shape = types[i].shape
        grown[i] = types[i].update(shape=(*map(another, shape[:count]), *shape[count:]))
    return grown


def _owner(
    before: tuple[int, ...],
    after: tuple[int, ...],
    grown: list[ArrayType],
    row_axes: Mapping[int, int],
) -> Owner:
    if before == after:
        return None
    for i, count in row_axes.items():
        if after == (*grown[i].shape[:count], *before[count:]):
            return i
    return UNTOLD


def _as_optax_says(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    row_axes: Mapping[int, int],
) -> list[Owner]:
    indices = jax.tree.unflatten(
        jax.tree.structure(params), range(len(jax.tree.leaves(params)))
    )

    def owner(slot: PyTree, index: int, param: PyTree) -> PyTree:
        if isinstance(slot, optax.MaskedNode):
            return slot
        count = row_axes.get(index, 0)
        is_slot = np.shape(slot)[:count] == np.shape(param)[:count] != ()
        return index if is_slot else UNTOLD

    try:
        tree = optax.tree.map_params(
            tx,
            owner,
            state,
            indices,
            params,
            transform_non_params=lambda node: jax.tree.map(lambda _: UNTOLD, node),
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except Exception:  # an init that does not take optax's placeholders may raise any
        return [UNTOLD] * len(jax.tree.leaves(state))
    return jax.tree.leaves(tree)


class Leaf(NamedTuple):
    """A leaf of the parameters or of the state.

    Attributes:
      array: what it holds.
      name: its path.
      table: the table whose rows it has, if it has any of those that a step touches.
      is_told: whether it is known so; otherwise the program of the step may tell.
    """

    array: jax.Array
    name: str
    table: Table | None
    is_told: bool = True

    def value(self) -> Value:
        """What a program sees of it."""
        if self.table is None:
            return Whole(self.array)
        return Rows(self.table.gather_any(self.array), self.table)

    def written(self, new: Value, old: Value) -> jax.Array:
        """The leaf after a step that has made one value of another."""
        if new is old:
            return self.array
        if self.table is None:
            return self.all(new)
        flat = flattened(self.array, self.table.axes)
        written = self.table.scatter(flat, self.rows(new))
        return written.reshape(np.shape(self.array))

    def rows(self, value: Value) -> jax.Array:
        """Rows for the table that the leaf belongs to."""
        if isinstance(value, Rows) and value.table is not self.table:
            raise MixesRowsError(f"{self.name} depends on rows of {value.table.name}")
        return value.at(self.table)

    def all(self, value: Value) -> jax.Array:
        """All of an array, for a leaf that belongs to no table."""
        if isinstance(value, Rows):
            raise MixesRowsError(f"{self.name} depends on rows of {value.table.name}")
        return value.at(None)
