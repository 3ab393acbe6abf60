"""Which leaves of a state have rows that a caller has named."""

import jax
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._rows.steps.named_rows import NamedRows, is_none
from monolith_optax._rows.steps.state_leaves import (
    check_structure,
    owners_by_init,
    owners_by_optax,
)
from monolith_optax._rows.types import KeyPath, PyTree


def slot_owners(
    tx: optax.GradientTransformation,
    params: PyTree,
    state: PyTree,
    named: dict[int, NamedRows],
) -> list[NamedRows | None]:
    """For each leaf of the state the named rows that it has a part for, or None.

    Leaves count as `jax.tree.leaves` does with None as a leaf.

    Raises:
      ValueError: the state is not that of the optimizer for these params, or it is not
        known which table a leaf belongs to.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    given = [i for i, leaf in enumerate(leaves) if leaf is not None]
    by_owner = {given.index(i): rows for i, rows in named.items()}
    row_axes = {i: len(rows.axes) for i, rows in by_owner.items()}
    found = owners_by_init(tx, params, state, row_axes)
    if found is None:
        _check_state(tx, params, state)
        found = owners_by_optax(tx, params, state, row_axes)
    slots = iter(found)

    def rows_of(path: KeyPath, slot: PyTree) -> NamedRows | None:
        owner = None if slot is None else next(slots)
        if owner is None:
            return None
        if isinstance(owner, int):
            rows = by_owner[owner]
            if np.shape(slot)[: len(rows.axes)] == rows.axes:
                return rows
        _check_state(tx, params, state)
        raise ValueError(
            f"It is not known which rows state{keystr(path)} of shape "
            f"{np.shape(slot)} has. Slots must have the rows of their table on their "
            "first axes, and no mask or label may depend on the number of rows."
        )

    every = jax.tree.leaves_with_path(state, is_leaf=is_none)
    return [rows_of(path, slot) for path, slot in every]


def _check_state(
    tx: optax.GradientTransformation, params: PyTree, state: optax.OptState
) -> None:
    """Says what is wrong with a state, for which `init` is traced once more."""
    types = jax.tree.leaves(check_structure(tx, params, state))
    paths = jax.tree.leaves_with_path(state)
    for (path, leaf), expected in zip(paths, types, strict=True):
        if np.shape(leaf) != expected.shape:
            raise ValueError(
                f"state{keystr(path)} has the shape {np.shape(leaf)}, but the "
                f"optimizer gives it {expected.shape} for these params."
            )
