"""Makes hash tables of params and state."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from monolith_optax._ids.id_map import IdMap
from monolith_optax.checkpoint._hash_table import HashTable, Segment
from monolith_optax.checkpoint._segments import KINDS, STEP
from monolith_optax.checkpoint._table_leaves import Leaves, Part, parts_of


def export_hash_tables(
    params: Any,
    state: Any,
    ids: Mapping[str, IdMap],
    *,
    leaves: Leaves,
) -> dict[str, HashTable]:
    """Monolith's hash tables from params, state and maps of ids.

    The reverse of `import_hash_tables`, bit for bit. Each id that has a row becomes an
    entry, in ascending order; row 0, which unknown ids share, is left out, as Monolith
    has no such row.

    Args:
      params: the parameters.
      state: the optimizer's state, which may be nested in others.
      ids: the ids of each table.
      leaves: as in `import_hash_tables`.

    Returns:
      The tables by name, for `write_hash_table`. An entry's `last_update` is when its
      id was last seen, which is in seconds since 1970 if the times given to
      `IdMap.assign` are.

    Raises:
      ValueError: a map and the leaves of its table do not fit each other; the error
        names both.

    Example:
      >>> import jax.numpy as jnp
      >>> from monolith_optax import IdMap, embedding
      >>> from monolith_optax.checkpoint import export_hash_tables
      >>> params = {"items": jnp.ones((100, 3))}
      >>> state = embedding.adagrad(0.1).init(params)
      >>> ids = IdMap(100)
      >>> rows, fresh = ids.assign([2**62, 7], time=1_700_000_000)
      >>> tables = export_hash_tables(
      ...     params, state, {"item": ids}, leaves={"item": {"items": "adagrad"}}
      ... )
      >>> print(tables["item"].ids, tables["item"].segments[0].slots["norm"][0])
      [                  7 4611686018427387904] [0.1 0.1 0.1]
    """
    if ids.keys() != leaves.keys():
        raise ValueError(
            "leaves must name the same tables as ids does, but it names "
            f"{sorted(leaves)}, and ids has {sorted(ids)}."
        )
    tables = parts_of(leaves, params, state)
    for name, parts in tables.items():
        if ids[name].capacity != parts[0].shape[0]:
            raise ValueError(
                f"The ids of table {name!r} are for {ids[name].capacity} rows, but "
                f"{parts[0].path!r} has {parts[0].shape[0]}: give the map of this "
                "table."
            )
    arrays = jax.tree.leaves((params, state))
    return {name: _table(arrays, ids[name], parts) for name, parts in tables.items()}


def _table(arrays: list[Any], ids: IdMap, parts: list[Part]) -> HashTable:
    entries = ids.to_arrays()
    with_row = np.flatnonzero(entries["rows"])
    order = with_row[np.argsort(entries["ids"][with_row])]
    rows = entries["rows"][order]

    def slot(part: Part, name: str) -> np.ndarray:
        steps = KINDS[part.optimizer].slots[name] == STEP
        array: np.ndarray = np.asarray(arrays[part.slots[name]])[rows]
        return array.astype(np.int64) if steps else array

    weights = [np.asarray(arrays[part.weights])[rows] for part in parts]
    segments = [
        Segment(
            part.optimizer,
            part.shape[1],
            {x: slot(part, x) for x in KINDS[part.optimizer].slots},
        )
        for part in parts
    ]
    return HashTable(
        ids=entries["ids"][order],
        weights=np.concatenate(weights, axis=1),
        segments=tuple(segments),
        last_update=entries["last_seen"][order],
    )
