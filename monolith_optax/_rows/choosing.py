"""Which leaves of params have gradients of rows, and why others have not."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from monolith_optax._rows.finding import Finder
from monolith_optax._rows.found import Found, Tree, for_each
from monolith_optax._rows.losses import Loss


class Choice(NamedTuple):
    """The leaves that are tables, their lookups, and why other leaves are not."""

    tables: frozenset[int]
    tree: Tree
    refused: dict[int, str]


def choose(loss: Loss, tables: Any) -> Choice:
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
        more = dict(finder.refused)
        if tables is None:
            for leaf in left.keys() - finder.row_axes.keys():
                more.setdefault(leaf, "is never looked up")
        elif more:
            leaf, why = min(more.items())
            raise ValueError(
                f"Table {loss.names[leaf]} {why}, so its gradient is not one of rows. "
                "Say False for it in tables to get a dense gradient, or only look it "
                "up in the model."
            )
        if not more:
            return Choice(frozenset(left), tree, refused)
        refused |= {leaf: f"as it {why}" for leaf, why in more.items()}


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


def tables_of(tree: Tree) -> list[tuple[int, Found]]:
    """The tables of all lookups, in the order of their zeros and ids."""
    pairs: list[tuple[int, Found]] = []
    for_each(tree, lambda found: pairs.extend((leaf, found) for leaf in found.leaves))
    return pairs
