"""What `lazy_rows` asks of the arguments of a step, and of what it returns."""

import jax
import numpy as np
import optax
from jax.tree_util import PyTreeDef, keystr

from monolith_optax._rows.programs.row_values import MixesRowsError
from monolith_optax._rows.slices.row_access import row_axes
from monolith_optax._rows.slices.row_slices import is_slices
from monolith_optax._rows.steps.state_leaves import Leaf
from monolith_optax._rows.types import PyTree


def check_results(shapes: PyTree, given: PyTree, leaves: list[Leaf]) -> None:
    structure: PyTreeDef = jax.tree.structure(given, is_leaf=is_slices)
    if jax.tree.structure(shapes) != structure:
        raise MixesRowsError("updates or state change their structure")
    for leaf, after in zip(leaves, jax.tree.leaves(shapes), strict=True):
        if np.shape(leaf.array) != after.shape and (leaf.table or not leaf.is_told):
            raise MixesRowsError(
                f"what is {np.shape(leaf.array)} for {leaf.name} becomes {after.shape}"
            )


def check_extra_args(extra_args: dict[str, PyTree]) -> None:
    for name, value in extra_args.items():
        if any(map(is_slices, jax.tree.leaves(value, is_leaf=is_slices))):
            raise MixesRowsError(f"the extra argument {name} holds RowSlices")


def check_slices(updates: optax.Updates, params: optax.Params | None) -> None:
    if params is None:
        raise ValueError(
            "lazy_rows needs the current parameters, but params is None: call "
            "update(gradients, state, params)."
        )
    given: PyTreeDef = jax.tree.structure(updates, is_leaf=is_slices)
    if given != jax.tree.structure(params):
        raise ValueError(
            f"The gradients have the structure {given}, but the parameters "
            f"{jax.tree.structure(params)}."
        )
    for (path, slices), table in zip(
        jax.tree.leaves_with_path(updates, is_leaf=is_slices),
        jax.tree.leaves(params),
        strict=True,
    ):
        if is_slices(slices) and row_axes(np.shape(table), slices.row_shape) is None:
            raise ValueError(
                f"gradients{keystr(path)} has rows of shape {slices.row_shape}, but "
                f"its parameter has the shape {np.shape(table)}."
            )
