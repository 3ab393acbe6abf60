"""The lookups that are found in a program, as a tree like that of its calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from monolith_optax._rows.gradients.follow_rows import Step
from monolith_optax._rows.gradients.gather import Lookup
from monolith_optax._rows.types import Shape

One = TypeVar("One")


class Found(NamedTuple):
    """A lookup that has been found.

    Attributes:
      lookup: which rows and columns it takes. None for all rows of an image that
        leaves out rows of its tables.
      tables: the tables whose rows are looked up, and how many of their axes are rows:
        several tables, if it is in an image of several.
      ids_shape: the shape of the ids, all iterations and devices included.
      ids_dtype: their dtype, which is 32 bits wide if that is enough.
      varying: the mesh axes over which the rows differ.
      has_gradient: whether a gradient can come back from it.
      place: the operation and its line.
    """

    lookup: Lookup | None
    tables: tuple[tuple[int, int], ...]
    ids_shape: Shape
    ids_dtype: np.dtype
    varying: frozenset[str]
    has_gradient: bool
    place: str

    def stacked(self, *sizes: int) -> "Found":
        """The lookup, with as many of them in new first axes."""
        return self._replace(ids_shape=(*sizes, *self.ids_shape))


class Each(NamedTuple, Generic[One]):
    """Something for each lookup of an equation.

    Attributes:
      taken: for operands that are used whole.
      lookups: for what the equation itself looks up.
      programs: for the lookups in each of the programs that it runs.
    """

    taken: dict[int, One]
    lookups: list[One]
    programs: list["EachOf[One]"]


# Something for each lookup of a program, by equations.
EachOf: TypeAlias = dict[int, Each[One]]

# Arrays of one lookup: one for each of its tables.
Arrays: TypeAlias = list[jax.Array]

# What is added to the rows that an equation looks up, and the ids of these rows.
Zeros: TypeAlias = Each[Arrays]
Ids: TypeAlias = Each[Arrays]


@dataclass(frozen=True)
class Node:
    """What is done about an equation that is given tables.

    Attributes:
      taken: images whose rows it uses all, by operand.
      lookups: what it looks up itself.
      programs: what each of its programs looks up in one run.
      images: which operands are images in its programs too.
      passed: which results are such operands, by result.
      steps: how its results are images, if they are.
      all_runs: makes of a lookup in a program all of those that the equation does.
    """

    taken: Mapping[int, Found] = field(default_factory=dict)
    lookups: Sequence[Found] = ()
    programs: Sequence["Tree"] = ()
    images: frozenset[int] = frozenset()
    passed: Mapping[int, int] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    all_runs: Callable[[Found], Found] = lambda found: found


# By the index of an equation in its program what is done about it. At RESULTS are
# images that are results of the program.
Tree = dict[int, Node]
RESULTS = -1


def for_each(tree: Tree, make: Callable[[Found], One]) -> EachOf[One]:
    """What is made of each lookup; a lookup in a loop is all of its runs."""

    def of_equation(node: Node) -> Each[One]:
        return Each(
            {operand: make(node.taken[operand]) for operand in sorted(node.taken)},
            list(map(make, node.lookups)),
            inside(node, lambda found: make(node.all_runs(found))),
        )

    return {index: of_equation(tree[index]) for index in sorted(tree)}


def inside(node: Node, make: Callable[[Found], One]) -> list[EachOf[One]]:
    """What is made of each lookup in one run of the programs of an equation."""
    return [for_each(tree, make) for tree in node.programs]


def lookups_of(tree: Tree) -> list[Found]:
    """All lookups, in the order of the leaves of their arrays."""
    found: list[Found] = []
    for_each(tree, found.append)
    return found
