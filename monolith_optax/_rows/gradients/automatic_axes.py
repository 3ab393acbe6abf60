"""Functions of arrays on explicit axes that run on automatic ones.

On explicit axes JAX refuses a lookup by split ids, `table[ids]`, as it does not know
where the rows go; it says so of any table, also of one that is on every device. Rows of
a spread table need no such answer: they are there before the loss runs. So what JAX
refuses is done on automatic axes, where nothing is asked, and its results are put back.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax._rows.slices.row_slices import RowSlices
from monolith_optax._rows.slices.spread import Placement
from monolith_optax._rows.types import ArrayType, PyTree
from monolith_optax._shardings import split_evenly

Result = TypeVar("Result")


class SplitIdsError(ValueError):
    """JAX refuses a lookup by split ids, of a function with spread tables.

    Attributes:
      mesh: the mesh of the tables.
      types: the types of the leaves of params, on explicit axes.
    """

    def __init__(
        self, mesh: jax.sharding.AbstractMesh, types: Sequence[ArrayType]
    ) -> None:
        super().__init__(
            "On explicit axes JAX has to be told where rows of split ids go, and a "
            "lookup does not say it by out_sharding. So the function is traced again, "
            "on automatic axes."
        )
        self.mesh, self.types = mesh, types


def is_of_split_ids(error: Exception) -> bool:
    """Whether it is JAX's for a lookup by split ids; its type has no public name."""
    return type(error).__name__ == "ShardingTypeError" and "gather" in str(error)


def on_any_axes(
    function: Callable[..., Result],
    back: Callable[[Result, SplitIdsError], Result],
    *args: PyTree,
) -> Result:
    """What a function returns, on automatic axes if it raises a `SplitIdsError`.

    Args:
      function: the function. Its own errors come through.
      back: puts what it returns there back on explicit axes.
      *args: trees of arrays. Other leaves, such as flags, stay what they are.
    """
    try:
        return function(*args)
    except SplitIdsError as error:
        names = error.mesh.axis_names
        mesh = error.mesh.update_axis_types(dict.fromkeys(names, AxisType.Auto))
        with jax.sharding.use_abstract_mesh(mesh):
            result = function(*jax.tree.map(functools.partial(_there, mesh), args))
        return back(result, error)


def _there(mesh: jax.sharding.AbstractMesh, leaf: PyTree) -> PyTree:
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))


def results(arrays: Sequence[jax.Array], error: SplitIdsError) -> list[jax.Array]:
    """What a function returns, back on explicit axes.

    Nothing says where arrays go. Most have something for each example of the batch.
    """
    mesh = error.mesh
    specs = [split_evenly(jnp.shape(array), mesh) for array in arrays]
    return [
        jax.sharding.reshard(array, NamedSharding(mesh, spec))
        for array, spec in zip(arrays, specs, strict=True)
    ]


def gradients(arrays: Sequence[PyTree], error: SplitIdsError) -> list[PyTree]:
    """The gradients of the leaves of params, back on explicit axes."""
    pairs = zip(arrays, error.types, strict=True)
    return [_gradient(array, kind, error.mesh) for array, kind in pairs]


def _gradient(array: PyTree, of: ArrayType, mesh: jax.sharding.AbstractMesh) -> PyTree:
    everywhere = NamedSharding(mesh, PartitionSpec())
    if not isinstance(array, RowSlices):
        its = everywhere if of.sharding.mesh.empty else of.sharding
        return jax.sharding.reshard(array, its)
    (ids, rows, *_), placement = jax.tree.leaves(array), array.placement
    if placement is None:
        where = everywhere
    else:
        spread = dataclasses.replace(placement.spread, mesh=mesh)
        where = NamedSharding(mesh, spread.by_rows)
        spilled = jax.sharding.reshard(placement.spilled, everywhere)
        placement = Placement(spilled, spread)
    ids, rows = jax.sharding.reshard((ids, rows), where)
    return RowSlices.tree_unflatten(None, (ids, rows, placement))
