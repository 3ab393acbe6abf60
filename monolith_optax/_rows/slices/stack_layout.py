"""Where the tables of a `TableStack` are in its arrays.

An array of n shards is n equal parts, and each of them holds an n-th of every table:

    shard 0: rows of a, rows of b, rows of c; shard 1: more rows of a, b and c; ...

so an array that is split over n devices gives each of them a share of every table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._rows.slices.duplicates import check_size

Integers = TypeVar("Integers", np.ndarray, jax.Array)

# By the key of an array, where rows of its tables are.
Positions: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class Part:
    """Where a table is in its array.

    Attributes:
      name: its path in the tree of tables.
      key: of its array.
      num_rows: how many rows it has.
      first: where its rows begin in each shard.
      per_shard: how many rows it has in each shard, with those that fill it up.
    """

    name: str
    key: str
    num_rows: int
    first: int
    per_shard: int


class StackLayout:
    """The tables in the arrays of a stack.

    Attributes:
      shards: how many equal parts an array has.
      parts: where each table is, in the order of leaves.
      shapes: the types of the arrays.
    """

    def __init__(
        self, tables: Sequence[tuple[str, jax.ShapeDtypeStruct]], shards: int
    ) -> None:
        """Lays out tables, given their paths and types."""
        self.shards, self.parts = shards, list[Part]()
        self.shapes: dict[str, jax.ShapeDtypeStruct] = {}
        per_shard: dict[str, int] = {}
        for name, table in tables:
            num_rows, *columns = table.shape
            key = f"{table.dtype}_{'x'.join(map(str, columns))}"
            first, rows = per_shard.setdefault(key, 0), -(-num_rows // shards)
            self.parts.append(Part(name, key, num_rows, first, rows))
            per_shard[key] += rows
            shape = shards * per_shard[key], *columns
            self.shapes[key] = jax.ShapeDtypeStruct(shape, table.dtype)
        for each in self.shapes.values():
            check_size(each.shape[0], 0)

    def positions(self, part: Part, rows: Integers) -> Integers:
        """Where rows of a table are in its array."""
        per_shard = self.shapes[part.key].shape[0] // self.shards
        shard, row = divmod(rows, np.int32(max(part.per_shard, 1)))
        return shard * np.int32(per_shard) + np.int32(part.first) + row

    def in_shards(self, part: Part, table: jax.Array) -> jax.Array:
        """A table of shape (shards, rows in each of them, ...)."""
        missing = self.shards * part.per_shard - part.num_rows
        if missing:
            table = jnp.pad(table, [(0, missing)] + [(0, 0)] * (table.ndim - 1))
        return table.reshape(self.shards, part.per_shard, *table.shape[1:])

    def table(self, part: Part, array: jax.Array) -> jax.Array:
        """A table of its array."""
        if self.shards == 1:
            return array[part.first : part.first + part.num_rows]
        row_shape = np.shape(array)[1:]
        shards = array.reshape(self.shards, -1, *row_shape)
        table = shards[:, part.first : part.first + part.per_shard]
        return table.reshape(-1, *row_shape)[: part.num_rows]

    def moves_to(self, new: "StackLayout") -> tuple[Positions, Positions]:
        """Where rows of the tables are, and where they are in another layout.

        Raises:
          ValueError: a table is not in the new stack, or has fewer rows there, or rows
            of another shape or dtype.
        """
        others = {part.name: part for part in new.parts}
        before: dict[str, list[np.ndarray]] = {key: [] for key in self.shapes}
        after: dict[str, list[np.ndarray]] = {key: [] for key in self.shapes}
        for part in self.parts:
            other = others.get(part.name)
            if other is None or other.key != part.key or other.num_rows < part.num_rows:
                there = f"{other.num_rows} of {other.key}" if other else "none"
                raise ValueError(
                    f"tables{part.name} has {part.num_rows} rows of {part.key} in the "
                    "old stack, so it must have at least as many of this kind in the "
                    f"new one, but there it has {there}."
                )
            rows = np.arange(part.num_rows, dtype=np.int32)
            before[part.key].append(self.positions(part, rows))
            after[part.key].append(new.positions(other, rows))
        return _joined(before), _joined(after)


def _joined(positions: dict[str, list[np.ndarray]]) -> Positions:
    return {key: np.concatenate(each) for key, each in positions.items()}
