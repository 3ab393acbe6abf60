"""The states of this package's optimizers, wherever they are in a state: by structure.

Whoever reads a checkpoint gives no optimizer, so no `init` can be traced. But in the
state of an optimizer of this package each field is named as a slot, and holds a tree
like the parameters.
"""

from typing import Any

import jax
import optax

# The modules that the states belong to.
_PUBLIC = "monolith_optax", "monolith_optax.embedding"


def is_ours(node: Any) -> bool:
    """Whether a node is the state of one of this package's optimizers."""
    fields = getattr(node, "_fields", ())
    return type(node).__module__ in _PUBLIC and fields[:1] == ("count",)


def own_states(state: optax.OptState) -> list[Any]:
    """All of these nodes."""
    return list(filter(is_ours, jax.tree.leaves(state, is_leaf=is_ours)))


def optimizer_of(node: Any) -> str:
    """The name of its optimizer, such as Adamom."""
    return type(node).__name__.removesuffix("State")
