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
      state for them, of all arrays but those for which `optax.tree.map_params` tells.
    """
    if row_axes is None:
        leaves = jax.tree.leaves(params)
        row_axes = {i: 1 for i, leaf in enumerate(leaves) if np.ndim(leaf)}
    found = owners_by_init(tx, params, state, row_axes)
    return owners_by_optax(tx, params, state, row_axes) if found is None else found


def owners_by_init(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    row_axes: Mapping[int, int],
) -> list[Owner] | None:
    """What `init` shows of the owners; None if it gives another state than this one."""
    leaves, structure = jax.tree.flatten(params)
    types: list[PyTree] = [
        jax.ShapeDtypeStruct(np.shape(leaf), dtype_of(leaf)) for leaf in leaves
    ]
    slots = jax.tree.leaves(state)
    lengths = {size for each in (*leaves, *slots) for size in np.shape(each)}
    grown = _with_more_rows(types, row_axes, lengths)
    try:
        after = jax.eval_shape(tx.init, jax.tree.unflatten(structure, grown))
    except Exception:  # the init of others may raise any
        return None
    given: PyTreeDef = jax.tree.structure(state)
    if jax.tree.structure(after) != given:
        return None
    return [
        _owner(np.shape(old), new.shape, grown, row_axes)
        for old, new in zip(slots, jax.tree.leaves(after), strict=True)
    ]


def check_structure(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    cause: Exception | None = None,
) -> PyTree:
    """The types of the state that the optimizer has for these params.

    Raises:
      ValueError: the state has another structure.
    """
    types = jax.eval_shape(tx.init, params)
    given: PyTreeDef = jax.tree.structure(state)
    expected: PyTreeDef = jax.tree.structure(types)
    if given != expected:
        raise ValueError(
            "The state must be that of the optimizer for these params, but it is "
            f"{given} instead of {expected}. If it was restored as lists or dicts, put "
            "its leaves into a new state: jax.tree.unflatten(jax.tree.structure("
            "tx.init(params)), jax.tree.leaves(restored))."
        ) from cause
    return types


def _with_more_rows(
    types: list[ArrayType], row_axes: Mapping[int, int], lengths: set[int]
) -> list[ArrayType]:
    """The types of parameters whose row axes have lengths that nothing has yet."""

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


def owners_by_optax(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    row_axes: Mapping[int, int],
) -> list[Owner]:
    """What `optax.tree.map_params` says of the owners."""
    slots = jax.tree.leaves(state)
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
        found = jax.tree.leaves(tree)
    except Exception:  # an init that does not take optax's placeholders may raise any
        found = [UNTOLD] * len(slots)
    return [
        owner if np.ndim(slot) else None
        for slot, owner in zip(slots, found, strict=True)
    ]


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
