"""What the argument `tables` asks for each leaf of params."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax._rows.slices.exchange import Axes, axes_of_rows
from monolith_optax._rows.slices.exchange_cost import exchange_of, in_bytes
from monolith_optax._rows.slices.spread import Spread, check_rows
from monolith_optax._rows.types import PyTree


class Axis(NamedTuple):
    """The mesh axes over which the rows of a table are to be spread."""

    mesh: Any
    axes: Axes

    def spread(self, name: str, shape: tuple[int, ...], row_axes: int) -> Spread:
        """How a table of a shape is spread, whose first axes are rows."""
        check_rows(name, shape[0], self.owners)
        return Spread(self.mesh, self.axes, math.prod(shape[:row_axes]))

    @property
    def owners(self) -> int:
        """Over how many devices the rows are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def exchange(self, ids: int, row_shape: tuple[int, ...], dtype: Any) -> str:
        """What devices send for the ids of a batch, in words."""
        owners = self.owners
        found = exchange_of(ids, row_shape, dtype, owners, self.mesh.size // owners)
        return (
            f"spread over {owners} devices, each of which sends {in_bytes(found.sent)} "
            f"for its {found.ids} ids, and has room for {found.limit} of each owner"
        )


class Asked(NamedTuple):
    """What is asked for.

    Attributes:
      flags: for each leaf of params, whether it is to be a table; None: find out.
      spread: the leaves that are spread over devices.
    """

    flags: list[bool | None]
    spread: dict[int, Axis]


def read(tables: PyTree, params: PyTree) -> Asked:
    """What is asked for the leaves of params.

    Raises:
      ValueError: tables is not a prefix of params, a value means nothing, or a table
        cannot be spread as it says.
    """
    paths, structure = jax.tree.flatten_with_path(params)
    if tables is None:
        return Asked([None] * len(paths), {})
    try:
        tree = jax.tree.broadcast(tables, params, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(
            "tables must be a tree of bools that is a prefix of the tree of params, "
            f"but it is {tables!r}, and that of params is {structure}."
        ) from error
    flags: list[bool | None] = []
    spread: dict[int, Axis] = {}
    values = jax.tree.leaves(tree, is_leaf=_is_none)
    for index, ((path, leaf), value) in enumerate(zip(paths, values, strict=True)):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "params"
        if not (value is None or value is False or np.shape(leaf)):
            raise ValueError(f"tables names {name}, but a scalar has no rows.")
        axis = _axis(name, value, leaf)
        flag = True if axis or _is_spec(value) else value
        flags.append(None if flag is None else bool(flag))
        if axis:
            spread[index] = axis
    return Asked(flags, spread)


def _is_none(node: PyTree) -> bool:
    return node is None


def _is_spec(value: PyTree) -> bool:
    return isinstance(value, PartitionSpec | NamedSharding)


def _axis(name: str, value: PyTree, leaf: PyTree) -> Axis | None:
    if value is None or isinstance(value, bool | np.bool_):
        return None
    if not _is_spec(value):
        raise ValueError(
            f"tables says {value!r} for {name}, but it must be True, False, None, a "
            "PartitionSpec or a NamedSharding."
        )
    given = value.mesh if isinstance(value, NamedSharding) else None
    spec = value.spec if isinstance(value, NamedSharding) else value
    mesh = _mesh(name, given, leaf)
    if any(each is not None for each in spec[1:]):
        raise ValueError(
            f"tables says {spec} for {name}, but only rows can be spread: give an axis "
            "for the first dimension only."
        )
    axes = axes_of_rows(spec)
    _check_type(name, spec, axes, leaf)
    if not axes:
        return None
    if mesh is None:
        raise ValueError(
            f"tables says {spec} for {name}, but it is on no mesh: put it on one with "
            "jax.device_put and a NamedSharding, give a NamedSharding in tables, or "
            "call jax.set_mesh."
        )
    if unknown := [axis for axis in axes if axis not in mesh.axis_names]:
        raise ValueError(
            f"tables says {spec} for {name}, but the axes of its mesh are "
            f"{mesh.axis_names}, without {unknown[0]!r}."
        )
    return Axis(mesh, axes)


def _mesh(name: str, given: PyTree, leaf: PyTree) -> Any:
    """The abstract mesh of a table, or None if nothing shows it."""
    context = jax.sharding.get_abstract_mesh()
    its = jax.typeof(leaf).sharding.mesh
    if AxisType.Manual in (*context.axis_types, *its.axis_types):
        raise ValueError(
            f"tables gives a sharding for {name} inside jax.shard_map, where each "
            "device has only its part of the table. Spread tables are for functions "
            "of whole arrays: call this one under jax.jit, outside it."
        )
    if given is not None:
        given = given.abstract_mesh if hasattr(given, "abstract_mesh") else given
        if not its.empty and dict(its.shape) != dict(given.shape):
            raise ValueError(
                f"tables gives {name} the mesh {dict(given.shape)}, but it is on "
                f"{dict(its.shape)}."
            )
    known = [each for each in (its, given, context) if each is not None]
    return next((each for each in known if not each.empty), None)


def _check_type(name: str, spec: Any, axes: Axes, leaf: PyTree) -> None:
    """On explicit axes the type says how a table is split."""
    sharding = jax.typeof(leaf).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return
    others = sharding.spec[1:]
    if axes_of_rows(sharding.spec) != axes or any(each is not None for each in others):
        raise ValueError(
            f"tables says {spec} for {name}, but its type says {sharding.spec}. They "
            "must be the same."
        )
