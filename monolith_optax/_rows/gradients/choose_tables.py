"""Which leaves of params have gradients of rows, and why others have not."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from monolith_optax._rows.gradients.find_lookups import Finder
from monolith_optax._rows.gradients.lookup_tree import Tree
from monolith_optax._rows.gradients.trace_loss import Loss


class Choice(NamedTuple):
    """The leaves that are tables, their lookups, and why other leaves are not.

    `row_axes` says for each table how many of its axes are rows.
    """

    row_axes: dict[int, int]
    tree: Tree
    refused: dict[int, str]

    @property
    def tables(self) -> frozenset[int]:
        """The leaves that are tables."""
        return frozenset(self.row_axes)


def choose(loss: Loss, tables: Any) -> Choice:
    """The leaves that are tables, or those that `tables` asks for.

    Raises:
      ValueError: tables does not fit params, or a leaf that it names is no table.
    """
    types = loss.types
    if tables is None:
        asked = [False] * len(types)
        refused = {
            leaf: "as it has no rows of floating point"
            for leaf, aval in enumerate(types)
            if not aval.shape or not jnp.issubdtype(aval.dtype, jnp.floating)
        }
    else:
        asked = _flags(tables, loss)
        refused = {leaf: "as tables says" for leaf, ask in enumerate(asked) if not ask}
    while True:
        left = {leaf: ask for leaf, ask in enumerate(asked) if leaf not in refused}
        finder = Finder(types, left)
        tree = finder.find(loss.program)
        row_axes, more = dict(finder.row_axes), dict(finder.refused)
        if not more:
            for leaf in left.keys() - row_axes.keys():
                axes = _axes_without_ids(types[leaf].shape, finder.empty_shapes)
                if axes is not None or tables is not None:
                    row_axes[leaf] = axes or 1
                else:
                    more[leaf] = "is never looked up"
        if tables is not None and more:
            leaf, why = min(more.items())
            raise ValueError(
                f"Table {loss.names[leaf]} {why}, so its gradient is not one of rows. "
                "Say False for it in tables to get a dense gradient, or only look it "
                "up in the model."
            )
        if not more:
            return Choice(row_axes, tree, refused)
        refused |= {leaf: f"as it {why}" for leaf, why in more.items()}


def _axes_without_ids(
    shape: tuple[int, ...], empty_shapes: Collection[tuple[int, ...]]
) -> int | None:
    """How many axes of a leaf are rows, if it may have been looked up by no ids.

    JAX makes an empty array of such a lookup without the table, and nothing else tells
    of it. So this is taken for the cause where a leaf is not used.
    """
    for axes in range(1, len(shape)):
        row_shape = shape[axes:]
        if any(empty[-len(row_shape) :] == row_shape for empty in empty_shapes):
            return axes
    return 1 if empty_shapes else None


def _flags(tables: Any, loss: Loss) -> list[bool]:
    params = jax.tree.unflatten(loss.structure, loss.leaves)
    try:
        flags = jax.tree.leaves(jax.tree.broadcast(tables, params))
    except ValueError as error:
        raise ValueError(
            "tables must be a tree of bools that is a prefix of the tree of params, "
            f"but it is {tables!r}, and that of params is {loss.structure}."
        ) from error
    for flag, aval, name in zip(flags, loss.types, loss.names, strict=True):
        if flag and not aval.shape:
            raise ValueError(f"tables names {name}, but a scalar has no rows.")
    return [bool(flag) for flag in flags]
