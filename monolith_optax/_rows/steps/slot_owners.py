"""Which leaves of a state have rows that a caller has named."""

import jax
import numpy as np
import optax
from jax.tree_util import PyTreeDef, keystr

from monolith_optax._rows.steps.named_rows import NamedRows, is_none
from monolith_optax._rows.steps.state_leaves import UNTOLD, owners
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
    _check_state(state, jax.eval_shape(tx.init, params))
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    given = [i for i, leaf in enumerate(leaves) if leaf is not None]
    row_axes = {given.index(i): len(rows.axes) for i, rows in named.items()}
    found = iter(owners(tx, params, state, row_axes))

    def owner(path: KeyPath, leaf: PyTree) -> NamedRows | None:
        index = None if leaf is None else next(found)
        if index is None or np.ndim(leaf) == 0:
            return None
        if index is UNTOLD:
            raise ValueError(
                f"It is not known which rows state{keystr(path)} of shape "
                f"{np.shape(leaf)} has. Slots must have the rows of their table on "
                "their first axes, and no mask or label may depend on the number of "
                "rows."
            )
        assert isinstance(index, int)
        return named[given[index]]

    return [
        owner(path, leaf)
        for path, leaf in jax.tree.leaves_with_path(state, is_leaf=is_none)
    ]


def _check_state(state: optax.OptState, shapes: PyTree) -> None:
    given: PyTreeDef = jax.tree.structure(state)
    expected: PyTreeDef = jax.tree.structure(shapes)
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
