"""Finding the lookups of tables in a traced program, and the leaves that are tables.

The program is read, not run: of each value all that is known is of which tables it is
an image (`row_images.py`), or else whether it depends on data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from monolith_optax._rows.gradients import as_gather, row_images
from monolith_optax._rows.gradients.gather import Lookup
from monolith_optax._rows.gradients.lookup_tree import Found, Inside, Tree, device_axes
from monolith_optax._rows.gradients.row_images import Leaf, is_image, leaves_of
from monolith_optax._rows.gradients.rule_lookups import NotRowsError, Rule
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of

LOOKUPS = ("gather", "dynamic_slice", "slice")


class Finder:
    """Finds the lookups of some leaves, and which leaves are used otherwise.

    Attributes:
      refused: for each leaf that is, what it is used for.
      row_axes: for each leaf that is looked up, how many of its axes are rows.
      empty_shapes: those of arrays without entries that the program makes.
    """

    def __init__(self, types: Sequence[Any], tables: Mapping[int, bool]) -> None:
        """Gives the types of the leaves, and those to look for.

        Each comes with whether it was asked for, and then may be a stack of numbers, or
        be looked up by constants.
        """
        self._types, self._tables = types, tables
        self._num_rows = frozenset(types[leaf].shape[0] for leaf in tables)
        self._callers: list[Equation] = []
        self.refused: dict[int, str] = {}
        self.row_axes: dict[int, int] = {}
        self.empty_shapes: set[tuple[int, ...]] = set()

    def find(self, program: Program) -> Tree:
        """The lookups in the program whose operands are the leaves."""
        operands = [
            Leaf(index) if index in self._tables else True
            for index in range(len(self._types))
        ]
        return self._run(program, operands)[1]

    def _run(self, program: Program, operands: Sequence[Any]) -> tuple[list[Any], Tree]:
        tree: Tree = []

        def step(equation: Equation, operands: list[Any]) -> Sequence[Any]:
            if not leaves_of(operands):
                return self._without_tables(equation, operands)
            results = row_images.mapped(equation, operands)
            if results is not None:
                return results
            return self._with_tables(equation, operands, tree)

        results = jaxprs.interpret(program, operands, step, _constant)
        return results, tree

    def _without_tables(self, equation: Equation, operands: list[Any]) -> Sequence[Any]:
        if any(map(is_image, operands)) or row_images.made(equation, self._num_rows):
            results = row_images.mapped(equation, operands)
            if results is not None:
                return results
        shape = type_of(equation.outvars[0]).shape if equation.outvars else ()
        if 0 in shape and equation.primitive.name == "broadcast_in_dim":
            self.empty_shapes.add(shape)
        called = jaxprs.called_program(equation)
        from_data = any(map(row_images.is_data, operands)) or (
            called is not None and any(map(_constant, called.consts))
        )
        return [from_data] * len(equation.outvars)

    def _with_tables(
        self, equation: Equation, operands: list[Any], tree: Tree
    ) -> Sequence[Any]:
        name = str(equation.primitive.name)
        if name in LOOKUPS:
            return self._lookup(equation, operands, tree)
        if name in jaxprs.CALLS - jaxprs.CHECKPOINTS:
            self._callers.insert(0, equation)
            program = jaxprs.called_program(equation)
            assert program is not None
            results, inner = self._run(program, operands)
            self._callers.pop(0)
            tree.append(Inside(inner))
            return results
        if name in jaxprs.CUSTOM_DERIVATIVES:
            return self._rule(equation, operands, tree)
        if name in as_gather.CHANGES and leaves_of(operands[1:]):
            what = f"is written into others by {self._place(equation)}"
            return self._refuse(operands[1:], what, equation)
        if name not in _BODIES:
            return self._refuse(
                operands, f"is used by {self._place(equation)}", equation
            )
        # Images of no tables are no longer images inside a body.
        operands = [v if leaves_of([v]) else row_images.is_data(v) for v in operands]
        self._callers.insert(0, equation)
        results, inside = _BODIES[name](self, equation, operands)
        self._callers.pop(0)
        tree.append(inside)
        leaving = [v for v in results if leaves_of([v]) and v not in operands]
        if leaving:
            self._refuse(leaving, f"is a result of {self._place(equation)}", equation)
        return [v if v in operands else row_images.is_data(v) for v in results]

    def _lookup(
        self, equation: Equation, operands: list[Any], tree: Tree
    ) -> Sequence[Any]:
        table, *indices = operands
        found = as_gather.lookup(equation)
        if not is_image(table) or leaves_of(indices):
            what = f"is an index of {self._place(equation)}"
            return self._refuse(operands, what, equation)
        if isinstance(found, str):
            what = f"{found} by {self._place(equation)}"
            return self._refuse(operands, what, equation)
        varying = jaxprs.varying(type_of(equation.outvars[0]))
        by_data = any(map(row_images.is_data, indices))
        tree.append(self._take(equation, table, found, by_data, varying))
        return [True]

    def _rule(
        self, equation: Equation, operands: list[Any], tree: Tree
    ) -> Sequence[Any]:
        """A function whose derivative rule says what the gradients of tables are."""
        rule, found = Rule(equation), []
        for operand, table in enumerate(operands):
            if not leaves_of([table]):
                continue
            try:
                scatters = rule.scatters(operand)
            except NotRowsError as error:
                what = f"{error} in the derivative rule of {self._place(equation)}"
                self._refuse([table], what, equation)
                continue
            for scatter in scatters:
                which, constants = rule.sources(scatter.indices)
                by_data = any(row_images.is_data(operands[i]) for i in which)
                by_data = by_data or any(map(_constant, constants))
                varying = jaxprs.varying(type_of(scatter.updates))
                found.append(
                    self._take(equation, table, scatter.lookup, by_data, varying)
                )
        tree.append(Inside(found))
        return [True] * len(equation.outvars)

    def _take(
        self,
        equation: Equation,
        table: row_images.Image,
        found: Lookup,
        by_data: bool,
        varying: frozenset[str],
    ) -> Found:
        """A lookup of a table, refused if its gradient is not one of rows."""
        place = self._place(equation)
        if not table.rows_first:
            self._refuse([table], f"is used by {place}", equation)
        if found.row_axes > 1 and not table.elementwise:
            what = f"is computed with before the stacked lookup by {place}"
            self._refuse([table], what, equation)
        not_asked = [Leaf(leaf) for leaf in table.leaves if not self._tables[leaf]]
        if 1 < found.row_axes == len(found.shape):
            what = f"is looked up as a stack of numbers by {place}"
            self._refuse(not_asked, what, equation)
        if not by_data:
            self._refuse(not_asked, f"is looked up by constants in {place}", equation)
        for leaf in table.leaves:
            if self.row_axes.setdefault(leaf, found.row_axes) != found.row_axes:
                what = f"is looked up both as one table and as a stack by {place}"
                self._refuse([table], what, equation)
        leaves = tuple(sorted(table.leaves))
        return Found(found, leaves, found.ids_shape, varying, True, place)

    def _refuse(
        self, values: Sequence[Any], what: str, equation: Equation
    ) -> Sequence[Any]:
        for leaf in leaves_of(values):
            self.refused.setdefault(leaf, what)
        return [True] * len(equation.outvars)

    def _place(self, equation: Equation) -> str:
        return jaxprs.source_line(equation, *self._callers)

    def _checkpoint(
        self, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Inside]:
        program = jaxprs.called_program(equation)
        assert program is not None
        results, tree = self._run(program, operands)
        return results, Inside(tree)

    def _cond(
        self, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Inside]:
        index, *operands = operands
        found = [self._run(branch, operands) for branch in jaxprs.branches(equation)]
        results = []
        for each in zip(*(results for results, _ in found), strict=True):
            if leaves_of(each):
                self._refuse(each, f"is a result of {self._place(equation)}", equation)
            results.append(index or any(map(row_images.is_data, each)))
        return results, Inside([tree for _, tree in found])

    def _scan(
        self, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Inside]:
        body, num_consts, num_carry = jaxprs.scan_parts(equation)
        operands = self._only_constants(equation, operands, num_consts)
        carry = slice(num_consts, num_consts + num_carry)
        results, tree = self._loop(body, operands, carry)
        length = equation.params["length"]
        return results, Inside(tree, lambda found: found.stacked(length))

    def _while(
        self, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Inside]:
        loop = jaxprs.while_parts(equation)
        num_consts = loop.num_condition_consts + loop.num_body_consts
        operands = self._only_constants(equation, operands, num_consts)
        body_operands = operands[loop.num_condition_consts :]
        carry = slice(loop.num_body_consts, len(body_operands))
        results, body = self._loop(loop.body, body_operands, carry)
        given = operands[: loop.num_condition_consts] + results
        _, condition = self._run(loop.condition, given)
        # JAX takes no gradient through a while loop, and says so where it is asked to.
        silent = lambda found: found._replace(has_gradient=False)  # noqa: E731
        return results, Inside([condition, body], silent)

    def _only_constants(
        self, equation: Equation, operands: list[Any], num_consts: int
    ) -> list[Any]:
        changing = operands[num_consts:]
        self._refuse(changing, f"changes in {self._place(equation)}", equation)
        return operands[:num_consts] + [bool(row_images.is_data(v)) for v in changing]

    def _loop(
        self, body: Program, operands: list[Any], carry: slice
    ) -> tuple[list[Any], Tree]:
        """A body whose carry is the same before and after it."""
        operands = list(operands)
        while True:
            refused, row_axes = dict(self.refused), dict(self.row_axes)
            results, tree = self._run(body, operands)
            after = results[: carry.stop - carry.start]
            joined = [
                a or row_images.is_data(b)
                for a, b in zip(operands[carry], after, strict=True)
            ]
            if joined == operands[carry]:
                return results, tree
            self.refused, self.row_axes = refused, row_axes
            operands[carry] = joined

    def _shard_map(
        self, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Inside]:
        parts = jaxprs.shard_map_parts(equation)
        inner: list[Any] = []
        for value, spec in zip(operands, parts.in_specs, strict=True):
            split_columns = any(names is not None for names in spec[1:])
            if leaves_of([value]) and (not isinstance(value, Leaf) or split_columns):
                what = "is split by columns" if split_columns else "is computed with"
                why = f"{what} before {self._place(equation)}"
                self._refuse([value], why, equation)
                value = True
            inner.append(value)
        results, tree = self._run(parts.body, inner)
        sizes = dict(parts.mesh.shape)

        def of_all_devices(found: Found) -> Found:
            axes = device_axes(parts, found)
            devices = int(np.prod([sizes[axis] for axis in axes], dtype=int))
            outside = found.varying - parts.axes
            return found.stacked(devices)._replace(varying=outside)

        return results, Inside(tree, of_all_devices)


_BODIES: dict[str, Any] = {
    **dict.fromkeys(jaxprs.CHECKPOINTS, Finder._checkpoint),
    "cond": Finder._cond,
    "scan": Finder._scan,
    "while": Finder._while,
    "shard_map": Finder._shard_map,
}


def _constant(value: Any) -> bool:
    """Whether an array in a program is data: NumPy's and numbers are written in it."""
    return isinstance(value, jax.Array)
