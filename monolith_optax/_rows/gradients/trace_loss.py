"""The loss as a traced program, from the leaves of params to its results."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from monolith_optax._rows.gradients.asked_tables import Asked, read
from monolith_optax._rows.gradients.automatic_axes import (
    SplitIdsError,
    is_of_split_ids,
)
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.types import PyTree


class Loss(NamedTuple):
    """A traced loss.

    Attributes:
      program: from leaves to the value and the arrays of the auxiliary output.
      leaves: the leaves of params.
      names: what they are called.
      structure: the tree of params.
      with_arrays: makes the auxiliary output of its arrays.
      from_numpy: whether arrays that are written in the program may be data, as there
        are NumPy arrays among the arguments.
      asked: which leaves are to be tables.
      for_gradients: whether gradients are to be taken, not only results.
    """

    program: jaxprs.Program
    leaves: list[PyTree]
    names: list[str]
    structure: PyTree
    with_arrays: Callable[[list[PyTree]], PyTree]
    from_numpy: bool
    asked: Asked
    for_gradients: bool = True

    @property
    def types(self) -> list[Any]:
        """The types of the leaves."""
        return list(map(jax.typeof, self.leaves))


def trace_loss(
    fun: Callable[..., PyTree],
    argnums: int | Sequence[int],
    has_aux: bool,
    tables: PyTree,
    args: Sequence[PyTree],
    kwargs: PyTree,
) -> Loss:
    """Traces a function of its arguments with some numbers, for others as they are.

    To it, tables that are spread look like those that are not.

    Raises:
      SplitIdsError: JAX refuses a lookup by split ids, and some tables are spread.
      ValueError: an argument means nothing.
    """
    which = [argnums] if isinstance(argnums, int) else list(argnums)
    if any(not -len(args) <= number < len(args) for number in which):
        raise ValueError(
            f"argnums is {argnums!r}, but there are {len(args)} positional arguments."
        )
    which = [number % len(args) for number in which]
    params = (
        args[which[0]] if isinstance(argnums, int) else tuple(args[i] for i in which)
    )
    asked = read(tables, params)
    paths, structure = jax.tree.flatten_with_path(params)
    aux: list[PyTree] = []
    aux_structure: Any = None

    def flat(*leaves: PyTree) -> list[PyTree]:
        nonlocal aux, aux_structure
        given, traced = list(args), jax.tree.unflatten(structure, leaves)
        of_each = [traced] if isinstance(argnums, int) else traced
        for number, value in zip(which, of_each, strict=True):
            given[number] = value
        result = fun(*given, **kwargs)
        value, rest = _pair(result) if has_aux else (_scalar(result), None)
        aux, aux_structure = jax.tree.flatten(rest)
        arrays = [leaf for leaf in aux if isinstance(leaf, jax.Array)]
        aux = [_ARRAY if isinstance(leaf, jax.Array) else leaf for leaf in aux]
        return [value, *arrays]

    leaves = [leaf for _, leaf in paths]
    types = [_unsplit(x) if i in asked.spread else x for i, x in enumerate(leaves)]
    try:
        program, _ = jaxprs.trace(flat, *types)
    except Exception as error:
        if asked.spread and is_of_split_ids(error):
            mesh = next(iter(asked.spread.values())).mesh
            raise SplitIdsError(mesh, list(map(jax.typeof, leaves))) from error
        raise

    def with_arrays(arrays: list[PyTree]) -> PyTree:
        rest = iter(arrays)
        filled = [next(rest) if leaf is _ARRAY else leaf for leaf in aux]
        return jax.tree.unflatten(aux_structure, filled)

    keystr = jax.tree_util.keystr
    names = [keystr(p, simple=True, separator=".") or "params" for p, _ in paths]
    rest = [each for i, each in enumerate(args) if i not in which]
    arrays = list(filter(_is_numpy, jax.tree.leaves((rest, kwargs))))
    for array in arrays:
        _check_uncut(array, program)
    return Loss(program, leaves, names, structure, with_arrays, bool(arrays), asked)


def _unsplit(leaf: PyTree) -> PyTree:
    """The type of a table without the axes over which it is spread."""
    kind = jax.typeof(leaf)
    whole = NamedSharding(kind.sharding.mesh, PartitionSpec(*[None] * kind.ndim))
    return kind.update(sharding=whole)


# Stands for an array of the auxiliary output.
_ARRAY = object()


def _pair(result: PyTree) -> PyTree:
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "With has_aux=True the function must return a pair of a scalar and what is "
            f"passed on, but it returned {result!r}."
        )
    return _scalar(result[0]), result[1]


def _scalar(value: PyTree) -> PyTree:
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(value)):
        raise TypeError(
            f"Gradients are those of a scalar, but the function returned {value!r}. If "
            "the rest of it is to be passed on, return a pair and say has_aux=True."
        )
    return value


def _is_numpy(leaf: PyTree) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf"


def _check_uncut(array: np.ndarray, program: jaxprs.Program) -> None:
    """Raises an error if JAX has cut integers of an argument to 32 bits."""
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    cut = array.astype(dtype)
    changed = array[cut != array]
    if array.dtype.kind in "iu" and changed.size and jaxprs.holds(program, cut):
        raise ValueError(
            f"A batch has the integer {changed[0]} of 64 bits, which JAX would cut "
            "to 32 bits: as an id, it would look up the row of another. Give rows "
            "that monolith_optax.IdMap has made of ids, or leave out integers that "
            "are not ids."
        )
