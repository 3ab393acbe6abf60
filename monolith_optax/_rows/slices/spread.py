"""Tables whose rows are spread over devices, in blocks, and slices of such tables.

A `Spread` says over which axes of a mesh; that is static. Slices of a spread table are
arrays that are split over these axes, and a `Placement` says what a device's part of
them holds: the ids of its own rows or, if a batch has spilled, any ids. Everything here
is called with whole arrays, and works on each device's part in `jax.shard_map`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monolith_optax._rows.slices import exchange, ring
from monolith_optax._rows.slices.duplicates import at_least_float32
from monolith_optax._rows.slices.exchange import NOBODY, Axes, Route
from monolith_optax._shardings import rows_sharding


@dataclass(frozen=True)
class Spread:
    """How the rows of a table are spread.

    Attributes:
      mesh: the abstract mesh.
      axes: the mesh axes over which the rows are split, in blocks.
      num_rows: how many rows the table has.
    """

    mesh: Any
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

    def on_devices(self, local: Callable[..., Any], specs: Any, out: Any) -> Any:
        """A function of whole arrays that runs another one on each device's part.

        Args:
          local: the other one.
          specs: how its arguments are split.
          out: how its results are split.
        """
        mesh = jax.sharding.get_abstract_mesh() if self._is_explicit else self.mesh
        return jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False
        )

    def automatic(self, function: Callable[..., Any], out: Any) -> Any:
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
        return jax.sharding.auto_axes(function, out_sharding=placed)

    @property
    def _is_explicit(self) -> bool:
        return AxisType.Explicit in self.mesh.axis_types


def _is_spec(node: Any) -> bool:
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
        return _gather(jnp.asarray(array), ids, self.spilled, self.spread)

    def scatter(self, array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """The array with new rows at distinct ids."""
        return _scatter(jnp.asarray(array), ids, rows, self.spilled, self.spread, False)

    def add(self, array: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
        """The array with rows added, in a dtype that is wide enough for sums."""
        return _scatter(array, ids, rows, self.spilled, self.spread, True)

    def sum_duplicates(
        self, ids: jax.Array, rows: jax.Array
    ) -> tuple[jax.Array, jax.Array, "Placement"]:
        """The ids and rows in one dimension, with each id once on one of the devices.

        With them comes where they are: of several batches, one has become.
        """
        spilled = jnp.any(self.spilled)
        ids, rows = _sum_duplicates(ids, rows, spilled, self.spread)
        return ids, rows, Placement(spilled, self.spread)

    def concatenated(
        self, parts: Sequence[tuple[jax.Array, jax.Array]], spilled: jax.Array
    ) -> tuple[jax.Array, jax.Array, "Placement"]:
        """Several ids and rows of the same table as one, each part of a device apart."""
        ids, rows = _concatenate(tuple(parts), self.spread)
        return ids, rows, Placement(spilled, self.spread)


def look_up(
    spread: Spread, table: jax.Array, ids: Sequence[jax.Array]
) -> tuple[list[jax.Array], Route]:
    """Rows of a table for several arrays of ids, and the route that they took.

    The ids may have any shape; those outside of the table get zeros. For arrays of the
    same shape, `send` then brings gradients the same way back.
    """
    return _look_up(table, tuple(ids), spread)


def send(
    spread: Spread,
    route: Route,
    ids: Sequence[jax.Array],
    rows: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array, Placement]:
    """Gradients of rows that were looked up, as ids, rows and placement of slices.

    Args:
      spread: how the rows of the table are spread.
      route: that of the lookup.
      ids: the same ids, in the same arrays, or NOBODY for those without a gradient.
      rows: their gradients.
    """
    ids_, rows_, spilled = _send(route, tuple(ids), tuple(rows), spread)
    return ids_, rows_, Placement(spilled, spread)


@functools.partial(jax.jit, static_argnames="spread")
def _look_up(table: Any, ids: Any, spread: Spread) -> Any:
    split = PartitionSpec(spread.all_axes)

    def local(table: Any, ids: Any) -> Any:
        sizes = list(map(len, ids))
        found = _route(jnp.concatenate(ids), spread)
        rows = exchange.fetch(table, found, spread.axes)
        ringed = ring.gather(table, found.ids, found.spilled, spread.axes)
        rows = jnp.where(found.spilled, ringed, rows)
        rows = rows.at[found.positions].get(mode="fill", fill_value=0)
        return jnp.split(rows, np.cumsum(sizes)[:-1]), found

    def whole(table: Any, ids: Any) -> Any:
        shares = [_share(each, each.ndim, NOBODY, spread) for each in ids]
        run = spread.on_devices(
            local, (spread.by_rows, split), (split, _of_route(split))
        )
        parts, found = run(table, shares)
        rows = [
            part[: each.size].reshape(*each.shape, *table.shape[1:])
            for part, each in zip(parts, ids, strict=True)
        ]
        return rows, found

    specs = [rows_sharding(table, each) for each in ids]
    out = [PartitionSpec() if each is None else each.spec for each in specs]
    return spread.automatic(whole, (out, _of_route(split)))(table, ids)


@functools.partial(jax.jit, static_argnames="spread")
def _send(route: Any, ids: Any, rows: Any, spread: Spread) -> Any:
    split, dtype = PartitionSpec(spread.all_axes), rows[0].dtype

    def local(route: Any, ids: Any, rows: Any) -> Any:
        wide = jnp.concatenate(rows).astype(at_least_float32(dtype))
        sums = exchange.own_sums(route, jnp.concatenate(ids), wide)
        if others := spread.other_axes:  # the owners on the other axes need them, too
            gathered = [lax.all_gather(each, others, tiled=True) for each in sums]
            route = _route(gathered[0], spread)
            sums = exchange.own_sums(route, *gathered)
        sums = exchange.send(route, *sums, spread.axes)
        if wide.dtype != dtype:  # narrow rows are rounded once, at the owner
            sums = ring.sum_duplicates(
                *sums, spread.num_rows, route.spilled, spread.axes
            )
        return sums[0], sums[1].astype(dtype), route.spilled

    def whole(route: Any, ids: Any, rows: Any) -> Any:
        shares = [
            (
                _share(some, some.ndim, NOBODY, spread),
                _share(of_them, some.ndim, 0, spread),
            )
            for some, of_them in zip(ids, rows, strict=True)
        ]
        run = spread.on_devices(local, (_of_route(split), split, split), out)
        return run(route, *map(list, zip(*shares, strict=True)))

    out = spread.by_rows, spread.by_rows, PartitionSpec()
    return spread.automatic(whole, out)(route, ids, rows)


@functools.partial(jax.jit, static_argnames="spread")
def _gather(array: Any, ids: Any, spilled: Any, spread: Spread) -> Any:
    local = functools.partial(ring.gather, axes=spread.axes)
    specs = spread.by_rows, spread.by_rows, PartitionSpec()
    whole = spread.on_devices(local, specs, spread.by_rows)
    return spread.automatic(whole, spread.by_rows)(array, ids, spilled)


@functools.partial(jax.jit, static_argnames=("spread", "add"))
def _scatter(
    array: Any, ids: Any, rows: Any, spilled: Any, spread: Spread, add: bool
) -> Any:
    def local(array: Any, ids: Any, rows: Any, spilled: Any) -> Any:
        rows = rows.reshape(-1, *array.shape[1:])
        return ring.scatter(
            array, ids.reshape(-1), rows, jnp.any(spilled), spread.axes, add=add
        )

    specs = spread.by_rows, _of_slices(ids, spread), _of_slices(ids, spread)
    whole = spread.on_devices(local, (*specs, PartitionSpec()), spread.by_rows)
    return spread.automatic(whole, spread.by_rows)(array, ids, rows, spilled)


@functools.partial(jax.jit, static_argnames="spread")
def _sum_duplicates(ids: Any, rows: Any, spilled: Any, spread: Spread) -> Any:
    def local(ids: Any, rows: Any, spilled: Any) -> Any:
        flat = rows.reshape(ids.size, *rows.shape[ids.ndim :])
        return ring.sum_duplicates(
            ids.reshape(-1), flat, spread.num_rows, jnp.any(spilled), spread.axes
        )

    of_ids, out = _of_slices(ids, spread), (spread.by_rows, spread.by_rows)
    whole = spread.on_devices(local, (of_ids, of_ids, PartitionSpec()), out)
    return spread.automatic(whole, out)(ids, rows, spilled)


@functools.partial(jax.jit, static_argnames="spread")
def _concatenate(parts: Any, spread: Spread) -> Any:
    def local(*parts: Any) -> Any:
        return (
            jnp.concatenate([ids.reshape(-1) for ids, _ in parts]),
            jnp.concatenate(
                [rows.reshape(ids.size, *rows.shape[ids.ndim :]) for ids, rows in parts]
            ),
        )

    specs = tuple((_of_slices(ids, spread),) * 2 for ids, _ in parts)
    out = spread.by_rows, spread.by_rows
    return spread.automatic(spread.on_devices(local, specs, out), out)(*parts)


def _route(ids: Any, spread: Spread) -> Route:
    return exchange.route(ids, spread.num_rows, spread.axes, spread.all_axes)


def _of_route(split: PartitionSpec) -> Any:
    return Route(split, split, split, PartitionSpec())


def _of_slices(ids: Any, spread: Spread) -> PartitionSpec:
    """The spec of slices, whose last axis of ids is split; others stack batches."""
    return PartitionSpec(*[None] * (jnp.ndim(ids) - 1), spread.axes)


def _share(array: Any, axes: int, fill: Any, spread: Spread) -> Any:
    """An array whose first axes become one that can be split over all devices."""
    flat = array.reshape(-1, *array.shape[axes:])
    missing = -len(flat) % spread.mesh.size
    padding = [(0, missing)] + [(0, 0)] * (flat.ndim - 1)
    return jnp.pad(flat, padding, constant_values=fill) if missing else flat
