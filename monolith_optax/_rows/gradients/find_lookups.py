"""Finding the lookups of tables in a traced program, and the leaves that are tables.

The program is read, not run: all that is known of a value is whose image it is
(`row_images.py`), or else whether it depends on data. A loss that casts half of a table
`t` before it looks ids up, and multiplies the rows by `w`, has this program:

    d:f32[100,4] = mul t 0.5
    e:bf16[100,4] = convert_element_type[new_dtype=bfloat16] d
    i:i32[3,1] = broadcast_in_dim[broadcast_dimensions=(0,)] ids
    j:bf16[3,4] = gather[slice_sizes=(1, 4)] e i
    k:bf16[3] = dot_general[dimension_numbers=(([1], [0]), ([], []))] j w

- `t` and `w` may both be tables, so both are `Parameter`s. The ids are True: data.
- `mul` keeps rows apart, so `d` is an `Image` of `t`, and so is `e`. The tree of
  lookups gets a `Node` for each of them, which says how their rows follow.
- `broadcast_in_dim` is given no image. All there is to say of `i` is that it is data.
- `gather` looks `e` up: it is a construct, and `constructs.Lookup` describes which
  rows it takes. The indices are data, so `t` may be a table. The tree gets a `Node`
  with this lookup, and `j` is True, data like any other.
- `dot_general` is not known to keep rows of `w` apart, so `w` is refused, and this is
  the reason that `explain` gives. `choose_tables.py` searches again without it.

`add_zeros.py` runs the program by this tree: it computes neither `d` nor `e`, fetches
the rows of `t` in place of `j`, adds zeros, and halves and casts only these rows.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from monolith_optax._rows.gradients import follow_rows
from monolith_optax._rows.gradients.constructs import CONSTRUCTS
from monolith_optax._rows.gradients.gather import Lookup
from monolith_optax._rows.gradients.gradient_flow import GradientFlow
from monolith_optax._rows.gradients.lookup_tree import RESULTS, Found, Node, Tree
from monolith_optax._rows.gradients.row_images import (
    Facts,
    Image,
    Known,
    Parameter,
    Source,
    is_data,
    is_image,
    is_table,
    leaves_of,
    which_tables,
)
from monolith_optax._rows.gradients.trace_loss import Loss
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of
from monolith_optax._rows.programs.primitives import MAKERS


class Finder:
    """Finds the lookups of some leaves, and which leaves are used otherwise.

    Attributes:
      refused: for each leaf that is, what it is used for.
      row_axes: for each leaf that is looked up, how many of its axes are rows.
      more_row_axes: for leaves with more row axes than was expected, how many.
      by_data: the leaves that are looked up by data.
      constants: for leaves whose rows are taken by constants, where the first are.
      all_rows: for leaves with images that are used whole, how many rows those have.
      keeps_rules: whether functions keep their derivative rules.
    """

    def __init__(
        self,
        types: Sequence[Any],
        tables: Mapping[int, bool],
        row_axes: Mapping[int, int],
        flow: GradientFlow,
        loss: Loss,
    ) -> None:
        """Gives the types of the leaves, and those to look for.

        Each comes with whether it was asked for, and then may be a stack of numbers, or
        be looked up by constants. `row_axes` says how many of a leaf's axes must be
        rows, if there is more than one.
        """
        self._types, self._tables, self._expected = types, tables, row_axes
        self._num_rows = frozenset(types[leaf].shape[0] for leaf in tables)
        self._callers: list[Equation] = []
        self.flow, self._from_numpy = flow, loss.from_numpy
        self.keeps_rules = loss.for_gradients
        self._active: Collection[Any] = ()
        self.refused: dict[int, str] = {}
        self.row_axes: dict[int, int] = {}
        self.more_row_axes: dict[int, int] = {}
        self.by_data: set[int] = set()
        self.constants: dict[int, str] = {}
        self.all_rows: dict[int, dict[Any, int]] = {}
        self.empty_shapes: set[tuple[int, ...]] = set()

    def find(self, program: Program) -> Tree:
        """The lookups in the program whose operands are the leaves."""
        operands = [
            self.parameter(index) if index in self._tables else True
            for index in range(len(self._types))
        ]
        active = [True] + [False] * (len(program.jaxpr.outvars) - 1)
        results, tree = self.program(program, operands, active)
        self.results(program, results, active, tree, None)
        return tree

    def parameter(self, leaf: int, part: Any = None) -> Parameter:
        """A leaf, or a device's part of it."""
        axes = len(self._types[leaf].shape)
        source = Source(leaf, axes, part)
        return Parameter(leaf, facts=Facts(frozenset([source]), (0, axes - 1)))

    def program(
        self, program: Program, operands: Sequence[Any], active: Sequence[bool]
    ) -> tuple[list[Any], Tree]:
        """Results of a program, and its lookups.

        Args:
          program: the program.
          operands: its operands.
          active: which of the results have a gradient.
        """
        outside, self._active = self._active, self.flow.through(program, active)
        tree: Tree = {}
        equations = iter(range(len(program.jaxpr.eqns)))

        def step(equation: Equation, operands: list[Any]) -> Sequence[Any]:
            return self._step(equation, operands, tree, next(equations))

        results = jaxprs.interpret(program, operands, step, self._constant)
        self._active = outside
        return results, tree

    def _constant(self, value: Any) -> Any:
        """What is known of an array that is part of a program."""
        if self.is_data(value):
            return True
        is_number = np.ndim(value) == 0
        if is_number and np.issubdtype(np.asarray(value).dtype, np.integer):
            return Known(None, [value])
        return False

    def is_data(self, constant: Any) -> bool:
        """Whether an array in a program is data and not only written in it."""
        return isinstance(constant, jax.Array) or (
            self._from_numpy and np.ndim(constant) > 0
        )

    def inside(self, equation: Equation, find: Callable[[], Any]) -> Any:
        """What is found inside an equation that runs programs."""
        self._callers.insert(0, equation)
        found = find()
        self._callers.pop(0)
        return found

    def active(self, equation: Equation) -> list[bool]:
        """Which results of an equation have a gradient."""
        return [out in self._active for out in equation.outvars]

    def _step(
        self, equation: Equation, operands: list[Any], tree: Tree, index: int
    ) -> Sequence[Any]:
        # Without calls: this is asked of each operand of a program.
        images = [each for each in operands if isinstance(each, Parameter | Image)]
        tables = any(each.facts.sources for each in images)
        steps = None
        if images:
            steps = follow_rows.follow(equation, operands)
        elif equation.primitive.name in MAKERS:
            steps = follow_rows.made(equation, self._num_rows)
        if steps:
            tree[index] = Node(steps=steps, images=_images(operands))
            return follow_rows.images(equation, operands, steps)
        if not tables:
            return self._without_tables(equation, operands)
        construct = CONSTRUCTS.get(str(equation.primitive.name))
        if construct is not None:
            results, tree[index] = construct.find(self, equation, operands)
        else:
            what = f"is used by {self.place(equation)}"
            reasons = dict.fromkeys(which_tables(operands), what)
            results, tree[index] = self.follow_one(equation, operands, reasons)
        return results

    def _without_tables(self, equation: Equation, operands: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        if name == "broadcast_in_dim":
            shape = type_of(equation.outvars[0]).shape
            if 0 in shape:
                self.empty_shapes.add(shape)
        are_known = operands and all(isinstance(v, Known) for v in operands)
        if are_known and jaxprs.result_shapes(equation) == [()]:
            return [Known(equation, operands)]
        from_data = any(value is True or is_data(value) for value in operands)
        if not from_data and name in jaxprs.CALLS | jaxprs.CUSTOM_DERIVATIVES:
            called = jaxprs.called_program(equation)
            assert called is not None
            from_data = any(self.is_data(each) for each in called.consts)
        return [from_data] * len(equation.outvars)

    def follow_one(
        self, equation: Equation, operands: list[Any], reasons: Mapping[int, str]
    ) -> tuple[list[Any], Node]:
        """An equation that keeps rows apart of one of its operands at most.

        `reasons` say what it does with each that is an image of a table.
        """
        for kept in sorted(reasons) if len(reasons) > 1 else ():
            others = [i for i in reasons if i != kept]
            alone = [True if i in others else v for i, v in enumerate(operands)]
            steps = follow_rows.follow(equation, alone)
            if steps:
                taken = self._each_otherwise(equation, operands, others, reasons)
                results = follow_rows.images(equation, operands, steps)
                return results, Node(taken, steps=steps, images=_images(operands))
        taken = self._each_otherwise(equation, operands, reasons, reasons)
        return [True] * len(equation.outvars), Node(taken)

    def _each_otherwise(
        self,
        equation: Equation,
        operands: list[Any],
        which: Collection[int],
        reasons: Mapping[int, str],
    ) -> dict[int, Found]:
        taken: dict[int, Found] = {}
        for i in which:
            taken |= self.otherwise(equation, operands, [i], reasons[i])
        return taken

    def otherwise(
        self,
        equation: Equation,
        operands: list[Any],
        which: Collection[int],
        what: str,
    ) -> dict[int, Found]:
        """What is looked up for operands when an equation uses all of their rows.

        They are not images any more then. Leaves whose rows these all are, are
        refused, unless no gradient comes back.
        """
        taken: dict[int, Found] = {}
        silent = not any(self.active(equation))
        for i in which:
            if is_table(operands[i]):
                found = self._all_of(
                    equation.invars[i], operands[i], silent, what, self.place(equation)
                )
                taken |= {i: found} if found else {}
                operands[i] = True
        return taken

    def results(
        self,
        program: Program,
        results: list[Any],
        active: Sequence[bool],
        tree: Tree,
        caller: Equation | None,
    ) -> None:
        """Looks up images that are results of a program, which has to give them."""
        place = self.place(caller) if caller else "the function"
        taken: dict[int, Found] = {}
        for i, (atom, value) in enumerate(
            zip(program.jaxpr.outvars, results, strict=True)
        ):
            if is_table(value):
                what = f"is a result of {place}"
                found = self._all_of(atom, value, not active[i], what, place)
                taken |= {i: found} if found else {}
                results[i] = True
            elif is_image(value):
                results[i] = is_data(value)
        if taken:
            tree[RESULTS] = Node(taken)

    def _all_of(
        self, atom: Any, value: Any, silent: bool, what: str, place: str
    ) -> Found | None:
        """All rows of an image that leaves out others, or else a refusal."""
        facts: Facts = value.facts
        if silent or facts.detached:
            return None
        if not facts.partial or not facts.usable:
            self.refuse([value], what)
            return None
        row_axes = self._row_axes(value, type_of(atom).ndim, 0)
        if row_axes is None:
            self.refuse([value], what)
            return None
        shape = type_of(atom).shape[:row_axes]
        for source in facts.sources:
            rows = self.all_rows.setdefault(source.leaf, {})
            rows[source.path] = math.prod(shape)
            self.constants.setdefault(source.leaf, place)
        varying = jaxprs.varying(type_of(atom))
        place = f"{place} (all {math.prod(shape)} rows of a slice)"
        return self._found(None, value, atom, row_axes, shape, varying, place)

    def take(
        self,
        equation: Equation,
        atom: Any,
        table: Any,
        lookup: Lookup,
        by_data: bool,
        varying: frozenset[str],
        active: bool,
    ) -> Found | None:
        """A lookup of an image, refused if its gradient is not one of rows."""
        place = self.place(equation)
        facts: Facts = table.facts
        if not facts.usable:
            self.refuse([table], f"is used by {place}")
            return None
        row_axes = self._row_axes(table, len(lookup.shape), lookup.row_axes)
        if row_axes is None:
            what = f"is computed with before the stacked lookup by {place}"
            self.refuse([table], what)
            return None
        more = lookup.row_axes < row_axes
        lookup = dataclasses.replace(lookup, row_axes=row_axes)
        if more and self._takes_most(lookup, facts):
            self.refuse([table], f"has most of its rows taken for each id by {place}")
            return None
        if by_data:
            self.by_data |= facts.leaves
        else:
            for leaf in facts.leaves:
                self.constants.setdefault(leaf, place)
        found = self._found(
            lookup, table, atom, row_axes, lookup.ids_shape, varying, place
        )
        return found._replace(has_gradient=active and not facts.detached)

    def _takes_most(self, lookup: Lookup, facts: Facts) -> bool:
        """Whether each id takes more than half of the rows of a table."""
        columns, taken = len(lookup.shape) - lookup.row_axes, math.prod(lookup.windows)
        return any(
            2 * taken
            > math.prod(self._types[each.leaf].shape[: each.rows_with(columns)])
            for each in facts.sources
        )

    def _row_axes(self, image: Any, axes: int, least: int) -> int | None:
        """How many of an image's axes are rows, at least so many, if it can be."""
        facts: Facts = image.facts
        low, columns = facts.columns
        columns = min(columns, axes - least)
        for source in facts.sources:
            if source.row_axes is None and source.leaf in self._expected:
                columns = min(columns, source.axes - self._expected[source.leaf])
        return None if columns < low else axes - columns

    def _found(
        self,
        lookup: Lookup | None,
        image: Any,
        atom: Any,
        row_axes: int,
        ids_shape: tuple[int, ...],
        varying: frozenset[str],
        place: str,
    ) -> Found:
        columns = type_of(atom).ndim - row_axes
        tables, most = [], math.prod(type_of(atom).shape[:row_axes])
        for source in sorted(image.facts.sources):
            leaf, axes = source.leaf, source.rows_with(columns)
            self._count(leaf, axes, place)
            tables.append((leaf, axes))
            most = max(most, math.prod(self._types[leaf].shape[:axes]))
        dtype = np.dtype(np.int32 if most <= np.iinfo(np.int32).max else np.int64)
        return Found(lookup, tuple(tables), ids_shape, dtype, varying, True, place)

    def _count(self, leaf: int, row_axes: int, place: str) -> None:
        """Notes how many of a leaf's axes are rows: as many for each lookup."""
        if 1 < row_axes == len(self._types[leaf].shape) and not self._tables[leaf]:
            self._refuse_leaf(leaf, f"is looked up as a stack of numbers by {place}")
        before = self.row_axes.setdefault(leaf, row_axes)
        if before == row_axes:
            return
        most = max(before, row_axes)
        if self._expected.get(leaf) == most:
            what = f"is looked up both as one table and as a stack by {place}"
            self._refuse_leaf(leaf, what)
        self.more_row_axes[leaf] = most

    def refuse(self, values: Sequence[Any], what: str) -> None:
        """Notes what leaves are used for, so that they have no gradient of rows."""
        for leaf in leaves_of(values):
            self._refuse_leaf(leaf, what)

    def _refuse_leaf(self, leaf: int, what: str) -> None:
        self.refused.setdefault(leaf, what)

    def place(self, equation: Equation) -> str:
        """The operation and the user's line."""
        return jaxprs.source_line(equation, *self._callers)

    def notes(self) -> Any:
        """What has been noted so far, to be given to `restore`."""
        return {
            name: {**value} if isinstance(value, dict) else {*value}
            for name, value in vars(self).items()
            if name in _NOTES
        }

    def restore(self, notes: Any) -> None:
        """Forgets what has been noted since."""
        vars(self).update(notes)


def _images(operands: Sequence[Any]) -> frozenset[int]:
    return frozenset(i for i, value in enumerate(operands) if is_image(value))


_NOTES = ("refused", "row_axes", "more_row_axes", "by_data", "constants", "all_rows")
