"""Tables whose rows are spread over devices, in blocks, and slices of such tables.

A `Spread` says over which axes of a mesh; that is static. Slices of a spread table are
arrays that are split over these axes, and a `Placement` says what a device's part of
them holds: the ids of its own rows or, if a batch has spilled, any ids. Everything here
is called with whole arrays, and works on each device's part in `jax.shard_map`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax._rows.slices import ring
from monolith_optax._rows.slices.exchange import Axes
from monolith_optax._rows.slices.no_derivatives import forward_only
from monolith_optax._rows.types import PyTree

Result = TypeVar("Result")

Pair: TypeAlias = tuple[jax.Array, jax.Array]  # ids and their rows


@dataclass(frozen=True)
class Spread:
    """How the rows of a table are spread.

    Attributes:
      mesh: the abstract mesh.
      axes: the mesh axes over which the rows are split, in blocks.
      num_rows: how many rows the table has.
    """

    mesh: jax.sharding.AbstractMesh
    axes: Axes
    num_rows: int

    @property
    def all_axes(self) -> Axes:
        """All axes of the mesh, those of the rows last: a batch is split over them."""
        others = [axis for axis in self.mesh.axis_names if axis not in self.axes]
        return (*others, *self.axes)

    @property
    def other_axes(self) -> Axes:
        """The axes over which each row is on several devices."""
        return self.all_axes[: -len(self.axes)]

    @property
    def by_rows(self) -> PartitionSpec:
        """The sharding of arrays that are split as the table's rows are."""
        return PartitionSpec(self.axes)

    def of_slices(self, ids: jax.Array) -> PartitionSpec:
        """The sharding of slices: ids are split along the last axis, after batches."""
        return PartitionSpec(*[None] * (jnp.ndim(ids) - 1), self.axes)

    def on_devices(
        self, local: Callable[..., Result], specs: PyTree, out: PyTree
    ) -> Callable[..., Result]:
        """A function of whole arrays that runs another one on each device's part.

        Args:
          local: the other one.
          specs: how its arguments are split.
          out: how its results are split.
        """

        def whole(*args: PyTree) -> Result:
            # Where axes are explicit, this runs inside `automatic`.
            mesh = jax.sharding.get_abstract_mesh() if self._is_explicit else self.mesh
            mapped: Callable[..., Result] = jax.shard_map(
                local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
            )
            return mapped(*args)

        return whole

    def automatic(
        self, function: Callable[..., Result], out: PyTree
    ) -> Callable[..., Result]:
        """The function, on automatic axes.

        Args:
          function: a function of whole arrays.
          out: how its results are split, where axes are explicit.
        """
        if not self._is_explicit:
            return function
        placed = jax.tree.map(
            lambda spec: NamedSharding(self.mesh, spec), out, is_leaf=_is_spec
        )
        automatic: Callable[..., Result] = jax.sharding.auto_axes(
            function, out_sharding=placed
        )
        return automatic

    @property
    def _is_explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types


def check_rows(name: str, num_rows: int, devices: int) -> None:
    """Raises an error if the rows of a table cannot be spread evenly."""
    if num_rows % devices or not num_rows:
        more = devices * max(-(-num_rows // devices), 1)
        raise ValueError(
            f"{name} is to be spread over {devices} devices, but it has {num_rows} "
            f"rows, which cannot be divided among them: make it {more}."
        )


def _is_spec(node: object) -> bool:
    return isinstance(node, PartitionSpec)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Placement:
    """Where slices of a spread table are.

    Attributes:
      spilled: whether ids may be on any device. If not, each is on the one that owns
        its row. Several batches that are stacked have one of these each.
      spread: how the rows of the table are spread.
    """

    spilled: jax.Array
    spread: Spread = field(metadata={"static": True})

    def gather(self, array: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of distinct ids, of an array that is as long as the table."""
        rows = _gather(jnp.asarray(array), ids, self.spilled, self.spread)
        return forward_only(rows)

    def scatter(self, array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """The array with new rows at distinct ids."""
        array = jnp.asarray(array)
        array = _scatter(array, ids, rows, self.spilled, self.spread, False)
        return forward_only(array)

    def add(self, array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """The array with rows added, in a dtype that is wide enough for sums."""
        array = _scatter(array, ids, rows, self.spilled, self.spread, True)
        return forward_only(array)

    def sum_duplicates(
        self, ids: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array, "Placement"]:
        """The ids and rows in one dimension, with each id once on one of the devices.

        With them comes where they are: of several batches, one has become.
        """
        spilled = jnp.any(self.spilled)
        ids, rows = _sum_duplicates(ids, rows, spilled, self.spread)
        return ids, forward_only(rows), Placement(spilled, self.spread)

    def check_batches(self, ids_shape: tuple[int, ...]) -> None:
        """Checks that slices are still those of these batches."""
        if ids_shape[:-1] != self.spilled.shape:
            raise ValueError(
                f"The row ids of a spread table have the shape {ids_shape}, but there "
                f"are placements for {self.spilled.shape or 'one'} of its batches: "
                "slices have been reshaped, and nothing tells which device has which "
                "ids. Use RowSlices.concatenate or `+` to join them."
            )


@functools.partial(jax.jit, static_argnames="spread")
def _gather(
    array: jax.Array, ids: jax.Array, spilled: jax.Array, spread: Spread
) -> jax.Array:
    local = functools.partial(ring.gather, axes=spread.axes)
    specs = spread.by_rows, spread.by_rows, PartitionSpec()
    whole = spread.on_devices(local, specs, spread.by_rows)
    return spread.automatic(whole, spread.by_rows)(array, ids, spilled)


@functools.partial(jax.jit, static_argnames=("spread", "add"))
def _scatter(
    array: jax.Array,
    ids: jax.Array,
    rows: jax.Array,
    spilled: jax.Array,
    spread: Spread,
    add: bool,
) -> jax.Array:
    def local(
        array: jax.Array, ids: jax.Array, rows: jax.Array, spilled: jax.Array
    ) -> jax.Array:
        rows = rows.reshape(-1, *array.shape[1:])
        return ring.scatter(
            array, ids.reshape(-1), rows, jnp.any(spilled), spread.axes, add=add
        )

    specs = spread.by_rows, spread.of_slices(ids), spread.of_slices(ids)
    whole = spread.on_devices(local, (*specs, PartitionSpec()), spread.by_rows)
    return spread.automatic(whole, spread.by_rows)(array, ids, rows, spilled)


@functools.partial(jax.jit, static_argnames="spread")
def _sum_duplicates(
    ids: jax.Array, rows: jax.Array, spilled: jax.Array, spread: Spread
) -> Pair:
    def local(ids: jax.Array, rows: jax.Array, spilled: jax.Array) -> Pair:
        flat = rows.reshape(ids.size, *rows.shape[ids.ndim :])
        return ring.sum_duplicates(
            ids.reshape(-1), flat, spread.num_rows, jnp.any(spilled), spread.axes
        )

    of_ids, out = spread.of_slices(ids), (spread.by_rows, spread.by_rows)
    whole = spread.on_devices(local, (of_ids, of_ids, PartitionSpec()), out)
    return spread.automatic(whole, out)(ids, rows, spilled)
