"""What a snapshot of a RowCache consists of: ids, rows, and everything else."""

import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._ids.cached_ids import CachedIds
from monolith_optax._ids.device_tables import DeviceTables
from monolith_optax._ids.id_map import IdMap
from monolith_optax._ids.snapshot_folders import last_snapshot, new_snapshot
from monolith_optax._leaves import dtype_of
from monolith_optax._rows.steps.named_rows import is_none

Ids = dict[str, CachedIds]


def save(
    folder: str | os.PathLike[str],
    tables: DeviceTables,
    ids: Ids,
    params: Any,
    state: Any,
    batches: int,
) -> None:
    """Writes a snapshot of ids whose stores have all rows."""
    dense = {path: _on_host(leaf) for path, leaf in _dense(tables, params, state)}
    layout = {
        **_layout(tables, ids, params, state),
        "batches": batches,
        "numbers": {name: cached.numbers for name, cached in ids.items()},
    }
    with new_snapshot(folder) as path:
        for k, cached in enumerate(ids.values()):
            arrays: dict[str, Any] = cached.ids.to_arrays()
            np.savez(path / f"ids-{k}.npz", **arrays)
            with (path / f"rows-{k}.bin").open("wb") as file:
                for part in cached.store.parts(cached.numbers):
                    file.write(part.view(np.uint8).data)
        with (path / "dense.bin").open("wb") as file:
            for array in dense.values():
                file.write(array.tobytes())
        (path / "layout.json").write_text(json.dumps(layout))


def restore(
    folder: str | os.PathLike[str],
    tables: DeviceTables,
    ids: Ids,
    params: Any,
    state: Any,
) -> tuple[Any, Any, int]:
    """Fills new ids with the last snapshot; returns params, state and the batches.

    Raises:
      FileNotFoundError: there is no complete snapshot.
      ValueError: the snapshot is of another layout.
    """
    path = last_snapshot(folder)
    saved = json.loads((path / "layout.json").read_text())
    for what, expected in _layout(tables, ids, params, state).items():
        if saved[what] != expected:
            raise ValueError(
                f"The snapshot {path} has other {what}: {saved[what]}, and not "
                f"{expected}."
            )
    for k, (name, cached) in enumerate(ids.items()):
        with np.load(path / f"ids-{k}.npz") as arrays:
            cached.ids = IdMap.from_arrays(arrays)
        cached.grow(saved["numbers"][name])
        with (path / f"rows-{k}.bin").open("rb") as file:
            for part in cached.store.parts(saved["numbers"][name]):
                _fill(file, part)
    leaves, structure = jax.tree.flatten((params, state), is_leaf=is_none)
    with (path / "dense.bin").open("rb") as file:
        for i in tables.dense():
            if leaves[i] is not None:
                array = _on_host(leaves[i]).copy()
                _fill(file, array)
                leaves[i] = _on_device(array, leaves[i])
    params, state = jax.tree.unflatten(structure, leaves)
    zero = np.zeros(1, np.int32)
    for name, cached in ids.items():
        record = cached.store.read(zero)
        values = {field: record[field] for field in tables.fields[name]}
        params, state = tables.write(params, state, {name: zero}, {name: values})
    return params, state, saved["batches"]


def _dense(tables: DeviceTables, params: Any, state: Any) -> list[tuple[str, Any]]:
    leaves = jax.tree.leaves((params, state), is_leaf=is_none)
    return [
        (tables.paths[i], leaves[i]) for i in tables.dense() if leaves[i] is not None
    ]


def _layout(tables: DeviceTables, ids: Ids, params: Any, state: Any) -> dict[str, Any]:
    """What must be the same when a snapshot is read."""

    def types(leaves: Any, first_axis: int) -> dict[str, Any]:
        return {
            path: [str(dtype_of(leaf)), *np.shape(leaf)[first_axis:]]
            for path, leaf in leaves
        }

    def rows(name: str) -> dict[str, Any]:
        fields = tables.fields[name].items()
        return types([(tables.paths[int(field)], leaf) for field, leaf in fields], 1)

    return {
        "tables": {name: rows(name) for name in ids},
        "leaves": types(_dense(tables, params, state), 0),
        "numbers of sights": {n: cached.ids.admit_after for n, cached in ids.items()},
    }


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(dtype_of(leaf), jax.dtypes.prng_key)


def _on_host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _on_device(array: np.ndarray, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(
            jnp.asarray(array), impl=jax.random.key_impl(like)
        )
    is_array = isinstance(like, jax.Array)
    return jax.device_put(array, like.sharding) if is_array else array


def _fill(file: Any, array: np.ndarray) -> None:
    wanted = array.reshape(-1).view(np.uint8)
    if file.readinto(wanted.data) != wanted.size:
        raise ValueError(f"{file.name} is shorter than it must be.")
