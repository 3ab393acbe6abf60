"""The loss as a traced program, from the leaves of params to its results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._rows.programs import jaxprs


class Loss(NamedTuple):
    """A traced loss.

    Attributes:
      program: from leaves to the value and the arrays of the auxiliary output.
      leaves: the leaves of params.
      names: what they are called.
      structure: the tree of params.
      with_arrays: makes the auxiliary output of its arrays.
    """

    program: jaxprs.Program
    leaves: list[Any]
    names: list[str]
    structure: Any
    with_arrays: Callable[[list[Any]], Any]

    @property
    def types(self) -> list[Any]:
        """The types of the leaves."""
        return list(map(jax.typeof, self.leaves))


def trace(
    fun: Callable[..., Any], has_aux: bool, params: Any, args: Any, kwargs: Any
) -> Loss:
    paths, structure = jax.tree.flatten_with_path(params)
    args = tuple(map(_as_data, args))
    kwargs = {name: _as_data(value) for name, value in kwargs.items()}
    aux: list[Any] = []
    aux_structure: Any = None

    def flat(*leaves: Any) -> list[Any]:
        nonlocal aux, aux_structure
        result = fun(jax.tree.unflatten(structure, leaves), *args, **kwargs)
        value, rest = result if has_aux else (result, None)
        aux, aux_structure = jax.tree.flatten(rest)
        arrays = [leaf for leaf in aux if isinstance(leaf, jax.Array)]
        aux = [_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in aux]
        return [value, *arrays]

    leaves = [leaf for _, leaf in paths]
    program, _ = jaxprs.trace(flat, *leaves)

    def with_arrays(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if leaf is _ARRAY else leaf for leaf in aux]
        return jax.tree.unflatten(aux_structure, filled)

    keystr = jax.tree_util.keystr
    names = [keystr(p, simple=True, separator=".") or "params" for p, _ in paths]
    return Loss(program, leaves, names, structure, with_arrays)


# Stands for an array of the auxiliary output.
_ARRAY = object()


def _as_data(argument: Any) -> Any:
    """An argument with JAX's arrays for NumPy's, which are constants of a program.

    Raises:
      ValueError: JAX would cut an integer to 32 bits, and look up another row.
    """

    def is_numbers(leaf: Any) -> bool:
        return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biufc"

    if not any(map(is_numbers, jax.tree.leaves(argument))):
        return argument
    return jax.tree.map(lambda x: _uncut(x) if is_numbers(x) else x, argument)


def _uncut(array: np.ndarray) -> jax.Array:
    result = jnp.asarray(array)
    if array.dtype.itemsize > result.dtype.itemsize and array.dtype.kind in "iu":
        changed = array[np.asarray(result) != array]
        if changed.size:
            raise ValueError(
                f"A batch has the integer {changed[0]} of 64 bits, which JAX would cut "
                "to 32 bits: as an id, it would look up the row of another. Give rows "
                "that monolith_optax.IdMap has made of ids, or leave out integers that "
                "are not ids."
            )
    return result
