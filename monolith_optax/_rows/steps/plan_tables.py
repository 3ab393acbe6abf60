"""plan_tables: what tables cost on a mesh, before anything runs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from monolith_optax._public import public
from monolith_optax._rows.slices.exchange import axes_of_rows
from monolith_optax._rows.slices.exchange_cost import exchange_of, in_bytes
from monolith_optax._rows.slices.spread import check_rows
from monolith_optax._rows.steps.slot_shardings import shardings_of
from monolith_optax._rows.steps.state_leaves import owners
from monolith_optax._rows.types import PyTree

# How many rows a step holds at its peak for each place of its buffers, besides those of
# the slots, in programs that were compiled for CPUs and H100. TPUs need less.
_ROWS_AT_ONCE = 6


@public("monolith_optax")
class LeafPlan(NamedTuple):
    """What a leaf of params costs each device, in bytes.

    Attributes:
      spread: whether its rows are spread over the devices; if not, all have it.
      held: its weights and slots.
      sent: in a step whose batch fits the buffers. An array that is summed over devices
        counts twice, as in a ring.
      needed: about what a step needs besides, without what the model computes.
    """

    spread: bool
    held: int
    sent: int
    needed: int


@public("monolith_optax")
class TablePlan(NamedTuple):
    """What `plan_tables` recommends.

    Attributes:
      tables: what to say in `tables` of `value_and_row_grad`.
      where: the sharding of each leaf of params.
      leaves: what each leaf costs, by its path.
    """

    tables: PyTree
    where: PyTree
    leaves: dict[str, LeafPlan]

    def __str__(self) -> str:
        total = [sum(column) for column in zip(*self.leaves.values(), strict=True)][1:]
        rows: list[tuple[str, ...]] = [("", "", "held", "sent", "needed")]
        for name, (spread, *numbers) in self.leaves.items():
            kind = "spread" if spread else "on every device"
            rows.append((name, kind, *map(in_bytes, numbers)))
        rows.append(("each device", "", *map(in_bytes, total)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            )
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)


def plan_tables(
    tx: optax.GradientTransformation, params: PyTree, ids: PyTree, spread: NamedSharding
) -> TablePlan:
    """Which tables to spread over the devices of a mesh, and what each device pays.

    It looks at shapes only: nothing is allocated, compiled or run, and the devices need
    not be there. A table is spread, unless the sum of its dense gradient over devices
    sends less than the exchange of its rows does. Such a table is small: it is left on
    every device, with a dense gradient. Optimizers with momentum then move its rows in
    steps that do not look them up, too.

    Args:
      tx: the optimizer.
      params: the parameters, or the shapes that `jax.eval_shape` returns.
      ids: a tree like params: how many ids of the whole batch look up each table, and 0
        for what is not a table. Of several lookups, the sum.
      spread: how a table is spread, such as `NamedSharding(mesh, PartitionSpec("x"))`;
        the mesh may be a `jax.sharding.AbstractMesh`.

    Returns:
      The tables to spread, and the bytes that each device holds, sends and needs. Print
      it to read them.

    Raises:
      ValueError: ids is not a tree like params, or the sharding splits no rows, or a
        table that is spread has rows that cannot be divided among the devices.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec
      >>> from monolith_optax import embedding, lazy_rows, plan_tables
      >>> mesh = AbstractMesh((256,), ("x",))
      >>> params = {
      ...     "items": jax.ShapeDtypeStruct((2**30, 64), jnp.float32),
      ...     "days": jax.ShapeDtypeStruct((7, 64), jnp.float32),
      ... }
      >>> tx = lazy_rows(embedding.rowwise_adagrad(0.1))
      >>> ids = {"items": 2**21, "days": 2**16}
      >>> plan = plan_tables(
      ...     tx, params, ids, NamedSharding(mesh, PartitionSpec("x"))
      ... )
      >>> print(plan)
                                    held     sent     needed
      days         on every device  1.82 kB  3.58 kB  3.58 kB
      items        spread           1.09 GB  10.5 MB  31.1 MB
      each device                   1.09 GB  10.5 MB  31.1 MB
      >>> print(plan.tables["days"])
      False
    """
    mesh, axes = spread.mesh, _axes(spread)
    number = math.prod(mesh.shape[axis] for axis in axes)
    structure: PyTree  # whose class has no public type
    paths, structure = jax.tree.flatten_with_path(params)
    names = [keystr(path, simple=True, separator=".") or "params" for path, _ in paths]
    counts = structure.flatten_up_to(ids)
    slots = _Slots(tx, params)
    is_spread, costs = [], []
    for index, ((_, leaf), count) in enumerate(zip(paths, counts, strict=True)):
        # The sum of a dense gradient, which a step keeps beside its updates.
        cost, rowwise = (2 * _nbytes(leaf), 2 * _nbytes(leaf)), False
        if count:
            copies = mesh.size // number
            found = exchange_of(count, leaf.shape[1:], leaf.dtype, number, copies)
            rowwise = found.sent < cost[0]
        if rowwise:
            check_rows(names[index], leaf.shape[0], number)
            at_once = _ROWS_AT_ONCE * _nbytes(leaf) + slots.nbytes(index)
            cost = found.sent, found.places * at_once // leaf.shape[0]
        is_spread.append(rowwise)
        costs.append(cost)
    whole = NamedSharding(mesh, PartitionSpec())
    where = structure.unflatten([spread if each else whole for each in is_spread])
    held = slots.held(where)
    plans = map(LeafPlan, is_spread, held, *zip(*costs, strict=True))
    return TablePlan(
        structure.unflatten([spread.spec if each else False for each in is_spread]),
        where,
        dict(zip(names, plans, strict=True)),
    )


def _axes(spread: NamedSharding) -> tuple[str, ...]:
    if not (axes := axes_of_rows(spread.spec)):
        raise ValueError(f"spread must split rows over mesh axes, but it is {spread}.")
    return axes


class _Slots:
    """The slots of an optimizer, and whose they are."""

    def __init__(self, tx: optax.GradientTransformation, params: PyTree) -> None:
        self._params, self._state = params, jax.eval_shape(tx.init, params)
        self._leaves = jax.tree.leaves(self._state)
        self._owners = owners(tx, params, self._state)

    def nbytes(self, index: int) -> int:
        """The bytes of all slots of a leaf of params."""
        pairs = zip(self._leaves, self._owners, strict=True)
        return sum(_nbytes(slot) for slot, owner in pairs if owner == index)

    def held(self, where: PyTree) -> list[int]:
        """The bytes of a device's part of each leaf of params and of its slots."""
        leaves = jax.tree.leaves(self._params)
        found = [*map(_part, leaves, jax.tree.leaves(where))]
        places = jax.tree.leaves(
            shardings_of(self._state, self._owners, self._params, where)
        )
        for slot, place, owner in zip(self._leaves, places, self._owners, strict=True):
            if isinstance(owner, int):
                found[owner] += _part(slot, place)
        return found


def _part(leaf: PyTree, sharding: NamedSharding) -> int:
    shape = sharding.shard_shape(leaf.shape)
    return _nbytes(jax.ShapeDtypeStruct(shape, leaf.dtype))


def _nbytes(leaf: PyTree) -> int:
    return int(math.prod(leaf.shape)) * int(jnp.dtype(leaf.dtype).itemsize)
