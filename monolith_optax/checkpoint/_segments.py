"""The optimizers of a hash table's segments, and what they keep for each entry."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Segments: TypeAlias = Sequence[tuple[str, int]]

# A column of a table: "ids", "weights", "last_update" or a slot of a segment.
Column: TypeAlias = str | tuple[int, str]

# What a slot has for each entry: a number per weight, one number, or an integer.
PER_WEIGHT, PER_ROW, STEP = "per weight", "per row", "step"


class Kind(NamedTuple):
    """An optimizer's slots: its number among them, and each field's kind, in order."""

    number: int | None  # None: nothing is written, not even an empty message
    slots: Mapping[str, str]


_POWERS = {"beta1_power": PER_ROW, "beta2_power": PER_ROW}
KINDS = {
    "adagrad": Kind(1, {"norm": PER_WEIGHT}),
    "sgd": Kind(2, {}),
    "ftrl": Kind(3, {"zero": PER_WEIGHT, "norm": PER_WEIGHT}),
    "dynamic_wd_adagrad": Kind(4, {"norm": PER_WEIGHT, "last_update_step": STEP}),
    "adadelta": Kind(6, {"accum": PER_WEIGHT, "accum_update": PER_WEIGHT}),
    "adam": Kind(7, {"m": PER_WEIGHT, "v": PER_WEIGHT, **_POWERS}),
    "amsgrad": Kind(
        8, {"m": PER_WEIGHT, "v": PER_WEIGHT, "vhat": PER_WEIGHT, **_POWERS}
    ),
    "momentum": Kind(9, {"n": PER_WEIGHT}),
    "rmsprop": Kind(11, {"n": PER_WEIGHT}),
    "rmspropv2": Kind(12, {"n": PER_WEIGHT}),
    "group_ftrl": Kind(13, {"zero": PER_WEIGHT, "norm": PER_WEIGHT}),
    "batch_softmax": Kind(14, {"global_step": STEP}),
    "group_adagrad": Kind(15, {"grad_square_sum": PER_ROW}),
    "moving_average": Kind(None, {}),
}
NAMES = {kind.number: name for name, kind in KINDS.items()}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types in use


def checked(segments: Segments) -> Segments:
    """Segments, after checking that all are known."""
    for segment in segments:
        name, dim = segment
        if name not in KINDS:
            raise ValueError(
                f"There is no optimizer {name!r}; there are {list(KINDS)}."
            )
        if dim < 1:
            raise ValueError(
                f"A segment's dim must be at least 1, but it is {segment}."
            )
    if not segments:
        raise ValueError("A table has at least one segment, but none is given.")
    return [(name, int(dim)) for name, dim in segments]


def columns(
    segments: Segments,
) -> dict[Column, tuple[type[np.generic], tuple[int, ...]]]:
    """The dtype and the shape for an entry of each column of a table."""
    found: dict[Column, tuple[type[np.generic], tuple[int, ...]]] = {
        "ids": (np.int64, ()),
        "weights": (np.float32, (sum(dim for _, dim in segments),)),
        "last_update": (np.int64, ()),
    }
    for k, (name, dim) in enumerate(segments):
        for slot, kind in KINDS[name].slots.items():
            shape = (dim,) if kind == PER_WEIGHT else ()
            found[k, slot] = np.int64 if kind == STEP else np.float32, shape
    return found
