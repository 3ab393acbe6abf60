"""Which leaves of params and state hold the segments of hash tables."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax
from jax.tree_util import keystr

from monolith_optax import embedding
from monolith_optax._leaves import describe, dtype_of
from monolith_optax.checkpoint._own_states import is_ours, optimizer_of, own_states
from monolith_optax.checkpoint._paths import check_leaves, path_of
from monolith_optax.checkpoint._segments import KINDS, PER_WEIGHT, STEP

# For each table the paths of its segments' leaves, in order, with their optimizers.
Leaves: TypeAlias = Mapping[str, Mapping[str, str]]


class Part(NamedTuple):
    """Where a segment of a table is.

    Attributes:
      path: the path of its weights in params.
      optimizer: its optimizer.
      shape: of its weights.
      weights: the weights, as an index of the leaves of `(params, state)`.
      slots: the same of each slot.
    """

    path: str
    optimizer: str
    shape: tuple[int, int]
    weights: int
    slots: dict[str, int]


class _Slot(NamedTuple):
    """Whose slot a leaf of the state is."""

    path: str
    optimizer: str
    name: str


def parts_of(
    leaves: Leaves, params: optax.Params, state: optax.OptState
) -> dict[str, list[Part]]:
    """The segments of each table.

    Raises:
      ValueError: a leaf is missing or cannot be the segment that it is said to be.
    """
    check_leaves(params, state)
    uses = Counter(path for paths in leaves.values() for path in paths)
    if twice := [path for path, times in uses.items() if times > 1]:
        raise ValueError(
            f"leaves names {twice} for several tables: give each one leaf."
        )
    found = _Found(params, state)
    tables = {
        name: [found.part(name, *segment) for segment in paths.items()]
        for name, paths in leaves.items()
    }
    for name, parts in tables.items():
        if len({part.shape[0] for part in parts}) != 1:
            each = {part.path: part.shape[0] for part in parts}
            raise ValueError(
                f"The leaves of table {name!r} must have the same number of rows, and "
                f"there must be at least one leaf, but they have {each}."
            )
    return tables


class _Found:
    """The weights and slots in params and state, by path."""

    def __init__(self, params: optax.Params, state: optax.OptState) -> None:
        self._leaves = jax.tree.leaves((params, state))
        paths = [path_of(path) for path, _ in jax.tree.leaves_with_path(params)]
        self._weights = {path: index for index, path in enumerate(paths)}
        self._slots = [*(None for _ in paths), *_slots_of(state)]
        ours = filter(_is_embedding, own_states(state))
        self._kinds = {optimizer_of(node).lower() for node in ours}

    def part(self, table: str, path: str, optimizer: str) -> Part:
        """The segment of a table that is at a path."""
        where = f"The leaf {path!r} of table {table!r}"
        if optimizer not in KINDS or not hasattr(embedding, optimizer):
            known = [name for name in KINDS if hasattr(embedding, name)]
            raise ValueError(
                f"{where} has the optimizer {optimizer!r}, but it must be one of "
                f"monolith_optax.embedding that Monolith has as well: {known}."
            )
        if path not in self._weights:
            raise ValueError(
                f"{where} is not in params, whose leaves are {list(self._weights)}: "
                "give one of these paths in leaves."
            )
        index = self._weights[path]
        weights = self._leaves[index]
        if np.ndim(weights) != 2:
            raise ValueError(
                f"{where} must have the shape (rows, dim), but it is "
                f"{describe(weights)}."
            )
        rows, dim = np.shape(weights)
        slots = self._slots_at(path, optimizer, where)
        self._check(index, (rows, dim), np.float32, where)
        for name, slot in slots.items():
            kind = KINDS[optimizer].slots[name]
            shape = (rows, dim) if kind == PER_WEIGHT else (rows,)
            dtype = np.int32 if kind == STEP else np.float32
            self._check(slot, shape, dtype, f"The slot {name} of {path!r}")
        return Part(path, optimizer, (rows, dim), index, slots)

    def _slots_at(self, path: str, optimizer: str, where: str) -> dict[str, int]:
        there = [
            (slot, index)
            for index, slot in enumerate(self._slots)
            if slot is not None and slot.path == path
        ]
        expected = [_Slot(path, optimizer, name) for name in KINDS[optimizer].slots]
        if sorted(slot for slot, _ in there) != sorted(expected) or (
            _spelled(optimizer) not in self._kinds
        ):
            given = sorted({f"{slot.optimizer}.{slot.name}" for slot, _ in there})
            raise ValueError(
                f"{where} must have the slots of one embedding.{optimizer}, which are "
                f"{list(KINDS[optimizer].slots)}, but the state has {given} for it, "
                f"and has optimizers of the kinds {sorted(self._kinds)}: use this "
                "optimizer for the leaf, for instance with optax.partition."
            )
        return {slot.name: index for slot, index in there}

    def _check(
        self, index: int, shape: tuple[int, ...], dtype: Any, where: str
    ) -> None:
        leaf = self._leaves[index]
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(
                f"{where} must be an array, because rows without an id keep their "
                f"values, but it is {type(leaf).__name__}."
            )
        if leaf.shape != shape or dtype_of(leaf) != dtype:
            raise ValueError(
                f"{where} must be an array of dtype {np.dtype(dtype)} and shape "
                f"{shape}, as in Monolith, but it is {describe(leaf)}."
            )


def _spelled(optimizer: str) -> str:
    """An optimizer's name as in the name of its state."""
    return optimizer.replace("_", "")


def _is_embedding(node: Any) -> bool:
    return is_ours(node) and type(node).__module__ == embedding.__name__


def _slots_of(state: optax.OptState) -> Iterator[_Slot | None]:
    """Whose slot each leaf of the state is."""
    names = {_spelled(name): name for name in KINDS}
    for node in jax.tree.leaves(state, is_leaf=_is_embedding):
        if not _is_embedding(node):
            yield None
            continue
        spelled = optimizer_of(node).lower()
        for path, _ in jax.tree.leaves_with_path(node):
            field, inside = keystr(path[:1], simple=True), path_of(path[1:])
            if field == "count":
                yield None
            else:
                yield _Slot(inside, names.get(spelled, spelled), field)
