"""Which leaves of params have gradients of rows, and why others have not."""

import math
from collections.abc import Collection
from typing import NamedTuple

import jax.numpy as jnp

from monolith_optax._rows.gradients.constructs import CONSTRUCTS
from monolith_optax._rows.gradients.find_lookups import Finder
from monolith_optax._rows.gradients.gradient_flow import GradientFlow
from monolith_optax._rows.gradients.lookup_tree import Found, Tree, lookups_of
from monolith_optax._rows.gradients.table_uses import Uses
from monolith_optax._rows.gradients.trace_loss import Loss
from monolith_optax._rows.types import Shape


class Choice(NamedTuple):
    """The leaves that are tables, their lookups, and why other leaves are not.

    `row_axes` says for each table how many of its axes are rows.
    """

    row_axes: dict[int, int]
    tree: Tree
    refused: dict[int, str]

    @property
    def lookups(self) -> list[tuple[Found, int]]:
        """All lookups in any tables, and the leaf of each."""
        found = lookups_of(self.tree)
        return [(each, leaf) for each in found for leaf, _ in each.tables]

    @property
    def num_ids(self) -> dict[int, int]:
        """By how many ids each table is looked up."""
        ids = dict.fromkeys(self.row_axes, 0)
        for found, leaf in self.lookups:
            ids[leaf] += math.prod(found.ids_shape)
        return ids

    @property
    def tables(self) -> frozenset[int]:
        """The leaves that are tables."""
        return frozenset(self.row_axes)


def choose(loss: Loss, max_dense_rows: int | None) -> Choice:
    """The leaves that are tables: those that are asked for, and others by their use.

    Raises:
      ValueError: a leaf that is asked for is not a table, or one with more rows than
        `max_dense_rows` is not.
    """
    choice = _choose(loss)
    for leaf, why in choice.refused.items():
        shape = loss.types[leaf].shape
        too_many = max_dense_rows is not None and shape and shape[0] > max_dense_rows
        if too_many and why != _UNASKED:
            unused = "Say True for it in tables, and its gradient has no rows"
            way_out = unused if _UNUSED in why else "Only look it up in the model"
            raise ValueError(
                f"The gradient of {loss.names[leaf]}, which has {shape[0]} rows, is "
                f"dense, {why}, and max_dense_rows is {max_dense_rows}. {way_out}, or "
                "say False for it in tables."
            )
    return choice


def _choose(loss: Loss) -> Choice:
    types = loss.types
    flags = loss.asked.flags
    asked = [flag is True for flag in flags]
    refused = {
        leaf: "as it has no rows of floating point"
        for leaf, aval in enumerate(types)
        if flags[leaf] is None
        and not (aval.shape and jnp.issubdtype(aval.dtype, jnp.floating))
    }
    refused |= {leaf: _UNASKED for leaf, flag in enumerate(flags) if flag is False}
    row_axes: dict[int, int] = {}
    flow = GradientFlow()
    while True:
        left = {leaf: ask for leaf, ask in enumerate(asked) if leaf not in refused}
        finder = Finder(Uses(types, left, row_axes), flow, loss, CONSTRUCTS)
        tree, uses = finder.find(loss.program), finder.uses
        more = _not_tables(uses, finder.empty_shapes) | uses.refused
        if wrong := [leaf for leaf in sorted(more) if asked[leaf]]:
            leaf, why = wrong[0], more[wrong[0]]
            raise ValueError(
                f"Table {loss.names[leaf]} {why}, so {_FOLLOWS[loss.for_gradients]}, "
                "or only look it up in the model."
            )
        if not more and not uses.more_row_axes:
            axes = {
                leaf: uses.row_axes.get(leaf)
                or _axes_without_ids(types[leaf].shape, finder.empty_shapes)
                or 1
                for leaf in left
            }
            return Choice(axes, tree, refused)
        row_axes |= uses.more_row_axes
        refused |= {leaf: f"as it {why}" for leaf, why in more.items()}


_UNASKED = "as tables says"
_FOLLOWS = {
    True: "its gradient is not one of rows. Say False for it in tables to get a dense "
    "gradient",
    False: "its rows cannot be looked up by an exchange between devices. Say False for "
    "it in tables to leave this to JAX",
}
_UNUSED = "is never looked up"


def _not_tables(uses: Uses, empty_shapes: Collection[Shape]) -> dict[int, str]:
    """Leaves that are used as tables are, but not for reasons to be one."""
    reasons = {}
    whole = dict.fromkeys(uses.asked, 0)
    for (leaf, _), rows in uses.all_rows.items():
        whole[leaf] += rows
    for leaf, asked in uses.asked.items():
        if asked:
            continue
        shape, place = uses.types[leaf].shape, uses.constants.get(leaf)
        if leaf not in uses.row_axes:
            if _axes_without_ids(shape, empty_shapes) is None:
                reasons[leaf] = _UNUSED
        elif leaf not in uses.by_data:
            reasons[leaf] = f"is looked up by constants in {place}"
        elif 2 * whole[leaf] > math.prod(shape[: uses.row_axes[leaf]]):
            reasons[leaf] = f"has more than half of its rows used by {place}"
    return reasons


def _axes_without_ids(shape: Shape, empty_shapes: Collection[Shape]) -> int | None:
    """How many axes of a leaf are rows, if it may have been looked up by no ids.

    JAX makes an empty array of such a lookup without the table, and nothing else tells
    of it. So an empty array of rows like those of a leaf that is not used is taken for
    a lookup of it.
    """
    for axes in range(1, len(shape)):
        row_shape = shape[axes:]
        if any(empty[-len(row_shape) :] == row_shape for empty in empty_shapes):
            return axes
    return None
