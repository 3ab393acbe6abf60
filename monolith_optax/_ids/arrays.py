"""The arrays that a checkpoint has of an IdMap."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# What an entry is, by array; entry 0 has no id and stands for the unknown row.
DTYPES = {"ids": np.int64, "rows": np.int32, "counts": np.int32, "last_seen": np.int64}


def problems(arrays: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the arrays of a map; only the first message is reliable."""
    names = [*DTYPES, "capacity", "admit_after"]
    # Maps that were saved by older versions do not say whether they spread rows.
    names += ["spread"] if "spread" in arrays else []
    if missing := [name for name in names if name not in arrays]:
        yield f"{missing} are missing."
    shape = np.shape(arrays["ids"])
    for name, dtype in DTYPES.items():
        array = np.asarray(arrays[name])
        if array.shape != shape or array.ndim != 1 or not array.size:
            yield f"{name} has the shape {array.shape}, and ids has {shape}."
        if array.dtype != dtype:
            yield f"{name} has the dtype {array.dtype} instead of {np.dtype(dtype)}."
    if wrong := [name for name in names[len(DTYPES) :] if np.shape(arrays[name])]:
        yield f"{wrong} are not single numbers."
    if "spread" in arrays and int(arrays["spread"]) not in (0, 1):
        yield f"spread is {arrays['spread']} instead of 0 or 1."
    ids, rows, counts = (np.asarray(arrays[name]) for name in ("ids", "rows", "counts"))
    for name, array, end in (
        ("rows", rows, int(arrays["capacity"])),
        ("counts", counts, int(arrays["admit_after"])),
    ):
        if np.any((array < 0) | (array >= end)):
            yield f"{name} has numbers that are not from 0 to {end - 1}."
    if np.any((rows > 0) & (counts > 0)):
        yield "There are ids with both a row and a count."
    for name, array in (
        ("ids", ids[(rows > 0) | (counts > 0)]),
        ("rows", rows[rows > 0]),
    ):
        distinct, times = np.unique(array, return_counts=True)
        if twice := distinct[times > 1].tolist():
            yield f"{name} has {twice[0]} more than once."
