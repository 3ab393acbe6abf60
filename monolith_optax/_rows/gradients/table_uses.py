"""What leaves are used for, as it is noted while lookups are found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from monolith_optax._rows.gradients.gather import Lookup, ids_dtype
from monolith_optax._rows.gradients.image_facts import Facts, Known, Path, leaves_of
from monolith_optax._rows.gradients.lookup_tree import Found
from monolith_optax._rows.programs.jaxprs import Atom, type_of
from monolith_optax._rows.programs.varying import varying
from monolith_optax._rows.types import ArrayType, Shape


@dataclass
class Uses:
    """What some leaves are used for.

    Attributes:
      types: the types of all leaves.
      asked: the leaves to look for, and whether each was asked for. It then may be a
        stack of numbers, or be looked up by constants.
      expected: how many of a leaf's axes must be rows, if there is more than one.
      refused: for each leaf that is, what it is used for.
      row_axes: for each leaf that is looked up, how many of its axes are rows.
      more_row_axes: for leaves with more row axes than was expected, how many.
      by_data: the leaves that are looked up by data.
      constants: for leaves whose rows are taken by constants, where the first are.
      all_rows: for each image of a leaf that is used whole, how many rows it has.
    """

    types: Sequence[ArrayType]
    asked: Mapping[int, bool]
    expected: Mapping[int, int]
    refused: dict[int, str] = field(default_factory=dict)
    row_axes: dict[int, int] = field(default_factory=dict)
    more_row_axes: dict[int, int] = field(default_factory=dict)
    by_data: set[int] = field(default_factory=set)
    constants: dict[int, str] = field(default_factory=dict)
    all_rows: dict[tuple[int, Path], int] = field(default_factory=dict)

    def copy(self) -> "Uses":
        """The same notes, to which others are added."""
        return replace(
            self,
            refused={**self.refused},
            row_axes={**self.row_axes},
            more_row_axes={**self.more_row_axes},
            by_data={*self.by_data},
            constants={**self.constants},
            all_rows={**self.all_rows},
        )

    def refuse(self, values: Sequence[Known], what: str) -> None:
        """Notes what leaves are used for, so that they have no gradient of rows."""
        for leaf in leaves_of(values):
            self.refused.setdefault(leaf, what)

    def take(
        self,
        table: Facts,
        atom: Atom,
        lookup: Lookup,
        place: str,
        by_data: bool,
        varying: frozenset[str],
        active: bool,
    ) -> Found | None:
        """A lookup of an image, refused if its gradient is not one of rows.

        Args:
          table: the image.
          atom: the variable that is the image.
          lookup: which rows are taken.
          place: the operation and its line.
          by_data: whether the ids are data.
          varying: the mesh axes over which the rows differ.
          active: whether what is made of them has a gradient.
        """
        if not table.usable:
            self.refuse([table], f"is used by {place}")
            return None
        row_axes = self._row_axes(table, len(lookup.shape), lookup.row_axes)
        if row_axes is None:
            what = f"is computed with before the stacked lookup by {place}"
            self.refuse([table], what)
            return None
        more = lookup.row_axes < row_axes
        lookup = replace(lookup, row_axes=row_axes)
        if more and self._takes_most(lookup, table):
            self.refuse([table], f"has most of its rows taken for each id by {place}")
            return None
        if by_data:
            self.by_data |= table.leaves
        else:
            for leaf in table.leaves:
                self.constants.setdefault(leaf, place)
        found = self._found(table, atom, lookup, row_axes, lookup.ids_shape, place)
        has_gradient = active and not table.detached
        return found._replace(varying=varying, has_gradient=has_gradient)

    def take_all(
        self, image: Facts, atom: Atom, silent: bool, what: str, place: str
    ) -> Found | None:
        """All rows of an image that leaves out others, or else a refusal.

        Args:
          image: the image.
          atom: the variable that is the image.
          silent: whether no gradient comes back from its use.
          what: what it is used for.
          place: the operation and its line.
        """
        if silent or image.detached:
            return None
        axes = type_of(atom).ndim
        is_part = image.partial and image.usable
        row_axes = self._row_axes(image, axes, 0) if is_part else None
        if row_axes is None:
            self.refuse([image], what)
            return None
        shape = type_of(atom).shape[:row_axes]
        count = math.prod(shape)
        for source in image.sources:
            self.all_rows[source.leaf, source.path] = count
            self.constants.setdefault(source.leaf, place)
        place = f"{place} (all {count} rows of a slice)"
        return self._found(image, atom, None, row_axes, shape, place)

    def _takes_most(self, lookup: Lookup, table: Facts) -> bool:
        """Whether each id takes more than half of the rows of a table."""
        columns, taken = len(lookup.shape) - lookup.row_axes, math.prod(lookup.windows)
        return any(
            2 * taken
            > math.prod(self.types[each.leaf].shape[: each.rows_with(columns)])
            for each in table.sources
        )

    def _row_axes(self, image: Facts, axes: int, least: int) -> int | None:
        """How many of an image's axes are rows, at least so many, if it can be."""
        low, columns = image.columns
        columns = min(columns, axes - least)
        for source in image.sources:
            if source.row_axes is None and source.leaf in self.expected:
                columns = min(columns, source.axes - self.expected[source.leaf])
        return None if columns < low else axes - columns

    def _found(
        self,
        image: Facts,
        atom: Atom,
        lookup: Lookup | None,
        row_axes: int,
        ids_shape: Shape,
        place: str,
    ) -> Found:
        columns = type_of(atom).ndim - row_axes
        tables, most = [], math.prod(type_of(atom).shape[:row_axes])
        for source in sorted(image.sources):
            leaf, axes = source.leaf, source.rows_with(columns)
            self._count(leaf, axes, place)
            tables.append((leaf, axes))
            most = max(most, math.prod(self.types[leaf].shape[:axes]))
        dtype, axes_of_mesh = ids_dtype(most), varying(type_of(atom))
        return Found(lookup, tuple(tables), ids_shape, dtype, axes_of_mesh, True, place)

    def _count(self, leaf: int, row_axes: int, place: str) -> None:
        """Notes how many of a leaf's axes are rows: as many for each lookup."""
        if 1 < row_axes == len(self.types[leaf].shape) and not self.asked[leaf]:
            what = f"is looked up as a stack of numbers by {place}"
            self.refused.setdefault(leaf, what)
        before = self.row_axes.setdefault(leaf, row_axes)
        if before == row_axes:
            return
        most = max(before, row_axes)
        if self.expected.get(leaf) == most:
            what = f"is looked up both as one table and as a stack by {place}"
            self.refused.setdefault(leaf, what)
        self.more_row_axes[leaf] = most
