"""The tables on the device, and the two jitted functions that touch their rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax._rows.steps.named_rows import broadcast, is_none
from monolith_optax._rows.steps.read_rows import read_rows, write_rows
from monolith_optax._rows.steps.reset_rows import reset_rows

Rows = dict[str, Any]  # by name of ids
# By name of ids, and by field: the number of a leaf of (params, state), as a string.
Values = dict[str, dict[str, Any]]


class DeviceTables:
    """The leaves of params and state that are rows, and whose ids' rows they are.

    Args:
      tx: the optimizer.
      params: the parameters.
      tables: a prefix of params: what the ids of each table are called, or None.

    Attributes:
      names: for each leaf of params what its ids are called, or None.
      paths: the path of each leaf of params and of the state.
      capacities: by name, the rows of the tables.
      fields: by name, what one row of each leaf is.
    """

    def __init__(
        self, tx: optax.GradientTransformation, params: Any, tables: Any
    ) -> None:
        """Looks at types only; nothing is computed."""
        self._tx = tx
        params_leaves, self._structure = jax.tree.flatten(params, is_leaf=is_none)
        state = jax.eval_shape(tx.init, params)
        leaves = jax.tree.leaves_with_path((params, state), is_leaf=is_none)
        self.paths = [_path(path) for path, _ in leaves]
        self._ndims = [np.ndim(leaf) for leaf in params_leaves]
        self.names: list[str | None] = broadcast("tables", tables, params)
        self.capacities: dict[str, int] = {}
        for path, leaf, name in zip(
            self.paths, params_leaves, self.names, strict=False
        ):
            if name is not None:
                self._check(path, leaf, name)
        if not self.capacities:
            raise ValueError("tables must name the ids of one leaf of params at least.")
        self.fields = {
            name: self._fields_of(name, params, state) for name in self.capacities
        }
        self.read = jax.jit(self._read)
        self.write = jax.jit(self._write, donate_argnums=(0, 1))
        self.move = jax.jit(self._move, donate_argnums=(0, 1))

    def check_sizes(self, params: Any) -> None:
        """That tables have the rows that the cache gives out.

        Raises:
          ValueError: one has not.
        """
        leaves = jax.tree.leaves(params, is_leaf=is_none)
        for path, leaf, name in zip(self.paths, leaves, self.names, strict=False):
            if name is not None and len(leaf) != self.capacities[name]:
                raise ValueError(
                    f"{path} has {len(leaf)} rows, but the cache was made for "
                    f"{self.capacities[name]}. To change the size, save a snapshot and "
                    "restore it into a cache for tables of the new size."
                )

    def inits(self, init: Any, params: Any) -> dict[str, dict[int, Any]]:
        """By name and leaf of params, what init has for it, and the shape of a row."""
        leaves = jax.tree.leaves(params, is_leaf=is_none)
        found: dict[str, dict[int, Any]] = {name: {} for name in self.capacities}
        for i, given in enumerate(broadcast("init", init, params)):
            if (name := self.names[i]) is None:
                continue
            if not callable(given) and np.shape(given) != ():
                raise ValueError(
                    f"init must have a number or a function of ids for {self.paths[i]},"
                    f" but it has {given!r}."
                )
            found[name][i] = given, np.shape(leaves[i])[1:]
        return found

    def dense(self) -> list[int]:
        """The leaves of params and state that have no rows of ids."""
        with_rows = {int(field) for fields in self.fields.values() for field in fields}
        return [i for i in range(len(self.paths)) if i not in with_rows]

    def _check(self, path: str, leaf: Any, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(
                f"tables must have the name of ids or None for {path}, not {name!r}."
            )
        if not np.ndim(leaf):
            raise ValueError(f"tables names {path}, but a scalar has no rows.")
        rows = self.capacities.setdefault(name, len(leaf))
        if len(leaf) != rows or rows < 2:
            raise ValueError(
                f"All tables of the ids {name!r} must have the same number of rows, "
                f"and at least 2, but {path} has {len(leaf)}, and another one {rows}."
            )
        if isinstance(leaf, jax.Array) and not leaf.sharding.is_fully_replicated:
            raise ValueError(
                f"{path} is divided over several devices, and a cache of rows is for "
                "tables that each device has all of: use a cache in each process for "
                "the ids that split_ids gives it, or IdMap with a table that holds "
                "everything."
            )

    def _rows(self, by_name: Rows) -> Any:
        """A prefix of params as read_rows takes it."""

        def of(name: str | None, ndim: int) -> Any:
            if name not in by_name:
                return None
            rows = jnp.asarray(by_name[name])
            return rows if ndim < 3 else rows[:, None]

        found = map(of, self.names, self._ndims)
        return jax.tree.unflatten(self._structure, list(found))

    def _fields_of(self, name: str, params: Any, state: Any) -> dict[str, Any]:
        def read(params: Any, state: Any, rows: Any) -> Any:
            return read_rows(self._tx, params, state, self._rows({name: rows}))

        pair = jax.eval_shape(read, params, state, np.zeros(1, np.int32))
        leaves = jax.tree.leaves(pair, is_leaf=is_none)
        return {str(i): leaf for i, leaf in enumerate(leaves) if leaf is not None}

    def _read(self, params: Any, state: Any, rows: Rows) -> Values:
        pair = read_rows(self._tx, params, state, self._rows(rows))
        leaves = jax.tree.leaves(pair, is_leaf=is_none)
        return {
            name: {field: leaves[int(field)] for field in self.fields[name]}
            for name in rows
        }

    def _write(
        self, params: Any, state: Any, rows: Rows, values: Values
    ) -> tuple[Any, Any]:
        structure = jax.tree.structure((params, state), is_leaf=is_none)
        leaves: list[Any] = [None] * len(self.paths)
        for name in rows:
            for field, value in values[name].items():
                leaves[int(field)] = value
        pair = jax.tree.unflatten(structure, leaves)
        return write_rows(self._tx, params, state, self._rows(rows), pair)

    def _move(
        self, params: Any, state: Any, moves: dict[str, dict[str, Any]]
    ) -> tuple[Any, Any, Values]:
        def every(what: str) -> dict[str, Any]:
            return {name: each[what] for name, each in moves.items()}

        left = self._read(params, state, every("leaving"))
        values, first = every("values"), every("first")
        for name, rows in every("coming").items():
            values[name] = _after(left[name], values[name], rows)
        params, state = self._write(params, state, every("coming"), values)
        starts: list[Any] = [None] * len(self._ndims)
        for by_leaf in first.values():
            for leaf, weights in by_leaf.items():
                starts[leaf] = weights
        params, state = reset_rows(
            self._tx,
            params,
            state,
            self._rows(every("fresh")),
            jax.tree.unflatten(self._structure, starts),
        )
        return params, state, left


def _after(left: dict[str, Any], values: dict[str, Any], rows: Any) -> dict[str, Any]:
    """Values that cannot be written before others have been read.

    XLA keeps a copy of a table that it may write to before it reads it, whatever
    `optimization_barrier` says. What is selected here for padding is not written.
    """

    def one(read: Any, value: Any) -> Any:
        padding = jnp.expand_dims(rows < 0, tuple(range(1, value.ndim)))
        return jnp.where(padding, read, value)

    return {field: one(left[field], values[field]) for field in values}


def _path(path: Any) -> str:
    return ("params", "state")[path[0].idx] + keystr(path[1:])
