"""Puts hash tables into params and state."""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from monolith_optax._ids.id_map import IdMap
from monolith_optax.checkpoint._entries import handed_over
from monolith_optax.checkpoint._hash_table import HashTable
from monolith_optax.checkpoint._segments import columns
from monolith_optax.checkpoint._table_leaves import Leaves, Part, parts_of

Params = TypeVar("Params")
State = TypeVar("State")


def import_hash_tables(
    tables: Mapping[str, HashTable],
    params: Params,
    state: State,
    *,
    leaves: Leaves,
    admit_after: int = 1,
) -> tuple[Params, State, dict[str, IdMap]]:
    """Params, state and maps of ids to train on with from Monolith's hash tables.

    Each segment of a table becomes one leaf of params, and its slots belong to an
    optimizer of `monolith_optax.embedding`, wherever it is in `state` (inside
    `lazy_rows`, `optax.chain`, `partition`, `masked`, `inject_hyperparams`, ...).
    Entries get the rows from 1 on, in the order of the table. Row 0, shared by unknown
    ids, rows beyond the entries, all other leaves and all counts of steps stay as they
    are. Adam's powers are taken as they are, one number for each row.

    Args:
      tables: the tables by name, as `read_hash_table` returns them.
      params: the parameters. The leaf of a segment is float32 of shape (rows, dim),
        with one row more than the table has entries or with room for new ids.
      state: a state of the optimizer for these params.
      leaves: for each table the paths of its segments' leaves, in order, with their
        optimizers: `{"user": {"user/bias": "ftrl", "user/vector": "adam"}}`. The path
        is `user/bias` for `params["user"]["bias"]`.
      admit_after: how often a new id must be seen before it gets a row.

    Returns:
      New params, a new state, and for each table an `IdMap` of as many rows as its
      leaves, where ids have been last seen when they were last updated. An entry
      without a time has the time 0, and is the first to expire.

    Raises:
      ValueError: a table and its leaves do not fit each other; the error names both.
        Nothing was imported.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> from monolith_optax import embedding, lazy_rows
      >>> from monolith_optax.checkpoint import HashTable, Segment, import_hash_tables
      >>> table = HashTable(
      ...     ids=np.array([5, 2**62]),
      ...     weights=np.ones((2, 3), np.float32),
      ...     segments=(Segment("momentum", 3, {"n": np.ones((2, 3), np.float32)}),),
      ...     last_update=np.array([1_700_000_000, 0]),
      ... )
      >>> params = {"items": jnp.zeros((100, 3))}
      >>> state = lazy_rows(embedding.momentum(0.1)).init(params)
      >>> params, state, ids = import_hash_tables(
      ...     {"item": table}, params, state, leaves={"item": {"items": "momentum"}}
      ... )
      >>> print(ids["item"].lookup([2**62, 6]), state.n["items"][:4, 0])
      [2 0] [0. 1. 1. 0.]
    """
    if tables.keys() != leaves.keys():
        raise ValueError(
            "leaves must name the same tables as tables does, but it names "
            f"{sorted(leaves)}, and tables has {sorted(tables)}."
        )
    parts = parts_of(leaves, params, state)
    for name, table in tables.items():
        _check(name, table, parts[name])
    arrays, structure = jax.tree.flatten((params, state))
    ids = {
        name: _id_map(name, table, parts[name][0].shape[0], admit_after)
        for name, table in tables.items()
    }
    for name, table in tables.items():
        first = 0
        for part, segment in zip(parts[name], table.segments, strict=True):
            weights = table.weights[:, first : first + segment.dim]
            arrays[part.weights] = _filled(arrays[part.weights], weights)
            for slot, index in part.slots.items():
                arrays[index] = _filled(arrays[index], segment.slots[slot])
            first += segment.dim
    params, state = jax.tree.unflatten(structure, arrays)
    return params, state, ids


def _check(name: str, table: HashTable, parts: list[Part]) -> None:
    """That a table fits its leaves."""
    segments = [(segment.optimizer, segment.dim) for segment in table.segments]
    given = [(part.optimizer, part.shape[1]) for part in parts]
    if segments != given:
        raise ValueError(
            f"Table {name!r} has the segments {segments}, but its leaves "
            f"{[part.path for part in parts]} have {given}: give leaves of these "
            "optimizers and dims in the table's order."
        )
    entries, rows = len(table.ids), parts[0].shape[0]
    if entries >= rows:
        raise ValueError(
            f"Table {name!r} has {entries} entries, but {parts[0].path!r} has {rows} "
            f"rows, and unknown ids share row 0: make it {entries + 1} rows or more."
        )
    arrays: dict[Any, Any] = {
        (k, slot): array
        for k, segment in enumerate(table.segments)
        for slot, array in segment.slots.items()
    } | {"ids": table.ids, "weights": table.weights, "last_update": table.last_update}
    expected = columns(segments)
    if arrays.keys() != expected.keys():
        raise ValueError(
            f"Table {name!r} must have the arrays {list(expected)}, but it has "
            f"{list(arrays)}."
        )
    for column, (dtype, shape) in expected.items():
        array = arrays[column]
        if array.dtype != dtype or array.shape != (entries, *shape):
            raise ValueError(
                f"{column} of table {name!r} must be of dtype {np.dtype(dtype)} and "
                f"shape {(entries, *shape)}, but it is {array.dtype} {array.shape}."
            )
        # JAX keeps steps in 32 bits.
        if dtype == np.int64 and not isinstance(column, str):
            steps = np.iinfo(np.int32)
            if np.any((array < steps.min) | (array > steps.max)):
                raise ValueError(
                    f"The steps {column} of table {name!r} do not fit into the 32 bits "
                    "of the state."
                )


def _id_map(name: str, table: HashTable, capacity: int, admit_after: int) -> IdMap:
    entries = len(table.ids)
    with_unknown = {
        "ids": np.concatenate([np.zeros(1, np.int64), table.ids]),
        "rows": np.arange(entries + 1, dtype=np.int32),
        "counts": np.zeros(entries + 1, np.int32),
        "last_seen": np.concatenate([np.zeros(1, np.int64), table.last_update]),
        "capacity": np.asarray(capacity, np.int64),
        "admit_after": np.asarray(admit_after, np.int64),
    }
    try:
        return IdMap.from_arrays(with_unknown)
    except ValueError as error:
        raise ValueError(f"The ids of table {name!r} make no IdMap: {error}") from error


def _filled(leaf: Any, entries: np.ndarray) -> Any:
    """The leaf with the entries of a table in the rows from 1 on."""
    array = np.array(leaf)
    array[1 : len(entries) + 1] = entries
    return handed_over(array, leaf)
