"""What the leaves of params are called, and which leaves can be moved."""

from typing import Any

import jax
import optax
from jax.tree_util import keystr


def path_of(path: Any) -> str:
    """The keys of a leaf, with / between them."""
    return keystr(path, simple=True, separator="/")


def check_leaves(params: optax.Params, state: optax.OptState) -> None:
    """Checks that parameters have paths of their own, and that all leaves have values.

    Raises:
      ValueError: they have not.
    """
    where: dict[str, str] = {}
    for path, _ in jax.tree.leaves_with_path(params):
        this, text = f"params{keystr(path)}", path_of(path)
        if (other := where.setdefault(text, this)) != this:
            raise ValueError(
                f"{other} and {this} have the same path, {text!r}, so they would "
                "have the same name: rename a key of one of them."
            )
    for tree, leaves in ("params", params), ("state", state):
        for path, leaf in jax.tree.leaves_with_path(leaves):
            if isinstance(leaf, jax.core.Tracer):
                raise ValueError(
                    f"{tree}{keystr(path)} is traced by JAX and has no value yet: "
                    "import and export outside jax.jit and other transformations."
                )
