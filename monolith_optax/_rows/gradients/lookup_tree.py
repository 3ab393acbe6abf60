"""The lookups that are found in a program, as a tree like that of its calls."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from monolith_optax._rows.gradients.gather import Lookup
from monolith_optax._rows.programs.jaxprs import ShardMap


class Found(NamedTuple):
    """A lookup that has been found.

    Attributes:
      lookup: which rows and columns it takes.
      leaves: the tables whose rows are looked up: several, if it is in an image of
        several.
      ids_shape: the shape of the ids, all iterations and devices included.
      varying: the mesh axes over which the rows differ.
      has_gradient: whether a gradient can come back from it.
      place: the operation and its line.
    """

    lookup: Lookup
    leaves: tuple[int, ...]
    ids_shape: tuple[int, ...]
    varying: frozenset[str]
    has_gradient: bool
    place: str

    def zeros_shapes(self, types: Sequence[Any]) -> list[tuple[int, ...]]:
        """For each of the tables, the shape of the rows."""
        row_axes = self.lookup.row_axes
        return [
            (*self.ids_shape, *types[leaf].shape[row_axes:]) for leaf in self.leaves
        ]

    def stacked(self, *sizes: int) -> "Found":
        """The lookup, with as many of them in new first axes."""
        return self._replace(ids_shape=(*sizes, *self.ids_shape))


class Inside(NamedTuple):
    """The lookups inside a call, a loop or another equation that runs programs.

    Attributes:
      tree: the lookups, as they are in one run of the program; or for several programs
        several of these.
      all_runs: makes of such a lookup all of those that the equation does.
    """

    tree: list[Any]
    all_runs: Callable[[Found], Found] = lambda found: found

    def outside(self) -> "Tree":
        """The lookups that the equation does, as a tree of lists."""
        return for_each(self.tree, self.all_runs)


# Lookups in the order of the program; `Found`, `Inside` or further trees.
Tree = list[Any]


def for_each(tree: Tree, make: Callable[[Found], Any]) -> list[Any]:
    """What is made of each lookup; of those of a call as a list."""

    def at(node: Any) -> Any:
        if isinstance(node, Found):
            return make(node)
        return for_each(node.outside() if isinstance(node, Inside) else node, make)

    return list(map(at, tree))


def device_axes(parts: ShardMap, found: Found) -> tuple[str, ...]:
    """The mesh axes over which a lookup inside a `shard_map` is another one."""
    axes = parts.axes & found.varying if parts.check_vma else parts.axes
    return tuple(axis for axis in parts.mesh.axis_names if axis in axes)


def tables_of(tree: Tree) -> list[tuple[int, Found]]:
    """The tables of all lookups, in the order of their zeros and ids."""
    pairs: list[tuple[int, Found]] = []
    for_each(tree, lambda found: pairs.extend((leaf, found) for leaf in found.leaves))
    return pairs
