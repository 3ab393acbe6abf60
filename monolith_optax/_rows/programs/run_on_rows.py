"""Running a traced program on some rows of its tables.

An optimizer's step is traced on whole tables, which costs no memory, and its program
then runs on the batch's rows. Each value in it is of one of three kinds: rows of a
table at the positions of the batch, an array that is whole, or rows that are nobody's
yet. An operation that keeps rows apart applies to rows of a batch as to those of a
table. All others need the whole table, and are errors, unless they are reductions to
which rows without a gradient add nothing.
"""

from collections.abc import Callable, Sequence
from typing import cast

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from monolith_optax._rows.programs import (
    jaxprs,
    known_constants,
    primitives,
    reductions,
    row_rules,
)
from monolith_optax._rows.programs.custom_rules import run_with_derivatives
from monolith_optax._rows.programs.inner_programs import InnerPrograms
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of
from monolith_optax._rows.programs.row_values import (
    Chosen,
    Given,
    Kind,
    Later,
    Made,
    MixesRowsError,
    Rows,
    Value,
    Whole,
    known_as,
)
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.types import PyTree


def _common_table(
    equation: Equation, values: Sequence[Value] | Sequence[Kind]
) -> Table | None:
    """The one table whose rows are among the values of an equation, if any are.

    Raises:
      MixesRowsError: there are rows of several tables.
    """
    found = [v.table for v in values if not isinstance(v, Whole | Later)]
    tables = list(dict.fromkeys(table for table in found if table is not None))
    if len(tables) > 1:
        raise MixesRowsError(
            f"combines rows of {' and '.join(table.name for table in tables)}",
            equation,
        )
    return tables[0] if tables else None


class Runner:
    """Runs programs on the rows of some tables."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._axes: dict[int, list[tuple[int, ...]]] = {}  # by the first of them
        for axes in dict.fromkeys(table.axes for table in tables):
            self._axes.setdefault(axes[0], []).append(axes)
        self._inner = InnerPrograms()

    def run(self, program: Program, operands: Sequence[Value]) -> list[Value]:
        """The results of a program."""
        return jaxprs.interpret(program, operands, self._step, self.whole)

    def whole(self, array: ArrayLike) -> Value:
        """An array; if it is as long as a table, its rows may be all we need."""
        if self._as_long(np.shape(array)):
            return Given(array)
        return Whole(array, known_constants.literal(array))

    def _as_long(self, *shapes: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The row axes of tables that arrays of all of these shapes have."""
        first = shapes[0][0] if shapes and shapes[0] else -1
        return [
            axes
            for axes in self._axes.get(first, ())
            if all(shape[: len(axes)] == axes for shape in shapes)
        ]

    def _step(self, equation: Equation, operands: list[Value]) -> Sequence[Value]:
        name = str(equation.primitive.name)
        if name in jaxprs.CALLS:
            [program] = jaxprs.programs_of(equation)
            try:
                return self._inside(equation, 0, program, operands)
            except MixesRowsError as error:
                raise error.inside(equation) from None
        by_row = any(not isinstance(value, Whole) for value in operands)
        if name in primitives.HINTS and by_row:
            return operands
        if name == "cond" and by_row:
            return self._cond(equation, operands)
        table = _common_table(equation, operands)
        if table is None:
            return self._without_rows(equation, operands)
        if name in jaxprs.CUSTOM_DERIVATIVES:
            return self._with_derivatives(equation, operands)
        return self._on_rows(equation, operands, table)

    def _on_rows(
        self, equation: Equation, operands: list[Value], table: Table
    ) -> Sequence[Value]:
        known, count = [value.constant for value in operands], len(table.axes)
        by_row = [isinstance(value, Rows) for value in operands]
        plan = row_rules.plan(equation, by_row, count)
        if plan is not None:
            arrays = [
                _array(value, table if row else None)
                for row, value in zip(plan.by_row, operands, strict=True)
            ]
            results = plan.apply(table.ids.shape[0], arrays, table.split)
            after = known_constants.after(equation, known, plan.evaluate)
            return [
                Rows(array, table, constant)
                for array, constant in zip(results, after, strict=True)
            ]
        if reductions.is_over_rows(equation, count):
            rows = [value.at(table) for value in operands]
            result = reductions.reduce_rows(equation, rows, known, table)
            if result is not None:
                return [Whole(result)]
        raise MixesRowsError(_why_not(equation, table), equation)

    def _without_rows(
        self, equation: Equation, operands: list[Value]
    ) -> Sequence[Value]:
        by_row = [isinstance(value, Later) for value in operands]
        may_be_rows = any(by_row) or equation.primitive.name in primitives.MAKERS
        plans = self._plans(equation, by_row) if may_be_rows else []
        if not plans:
            return self._whole_results(equation, operands)
        known = [value.constant for value in operands]
        after = known_constants.after(equation, known, plans[0].evaluate)
        if self._is_there(operands):
            return list(map(Whole, _bind_whole(equation, operands), after))
        return [
            Made(equation, operands, index, constant=constant)
            for index, constant in enumerate(after)
        ]

    def _is_there(self, operands: list[Value]) -> bool:
        """Whether one is a whole array as long as a table: then results may be, too."""
        arrays = [value.array for value in operands if isinstance(value, Whole)]
        return any(self._as_long(np.shape(array)) for array in arrays)

    def _plans(self, equation: Equation, by_row: list[bool]) -> list[row_rules.Plan]:
        """Ways to make results that are as long as tables of rows, or from nothing."""
        shapes = [type_of(result).shape for result in equation.outvars]
        found = [
            row_rules.plan(equation, by_row, len(axes))
            for axes in self._as_long(*shapes)
        ]
        return [
            plan
            for plan in found
            if plan
            and (any(plan.by_row) or row_rules.makes_rows(equation, plan.row_axes))
        ]

    def _whole_results(
        self, equation: Equation, operands: list[Value]
    ) -> Sequence[Value]:
        arrays = _bind_whole(equation, operands)
        if equation.primitive.name in _WITH_CONSTANTS:
            plan = row_rules.plan(equation, [False] * len(operands))
            if plan is not None:
                known = [value.constant for value in operands]
                after = known_constants.after(equation, known, plan.evaluate)
                return list(map(Whole, arrays, after))
        is_long = [bool(self._as_long(np.shape(array))) for array in arrays]
        is_there = any(is_long) and self._is_there(operands)
        return [
            Given(array) if long and not is_there else Whole(array)
            for array, long in zip(arrays, is_long, strict=True)
        ]

    def _cond(self, equation: Equation, operands: list[Value]) -> Sequence[Value]:
        """Runs that branch of a `cond` which its index chooses.

        A result is rows of a table where it is that in one branch at least; the other
        branches then give the rows at the same positions.
        """
        index, *others = operands
        path, programs = self._inner.path, jaxprs.branches(equation)

        def run(which: int) -> list[Value]:
            with self._inner.at(path):
                return self._inside(equation, which, programs[which], others)

        results: list[list[Value]] = []
        if self._inner.only_kinds:
            results = list(map(run, range(len(programs))))
            self._inner.keep(equation, operands, results)
        else:
            self._inner.find_kinds(equation, operands, self._cond)

        def switch(take: Callable[[list[Value]], PyTree]) -> PyTree:
            if results:
                return take(results[0])
            branches = [lambda which=w: take(run(which)) for w in range(len(programs))]
            return lax.switch(index.at(None), branches)

        by_result = list(zip(*self._inner.kinds(equation, operands), strict=True))
        tables = [_common_table(equation, each) for each in by_result]
        known = [
            known_constants.joined([k.constant for k in each]) for each in by_result
        ]
        later = [all(kind.is_later for kind in each) for each in by_result]
        ready = [i for i, is_later in enumerate(later) if not is_later]
        take_ready = lambda values: [values[i].at(tables[i]) for i in ready]  # noqa: E731
        arrays = iter(switch(take_ready) if ready else [])

        def result(i: int) -> Value:
            if not later[i]:
                return known_as(next(arrays), tables[i], known[i])
            choose = lambda table: switch(lambda values: values[i].at(table))  # noqa: E731
            return Chosen(choose, constant=known[i])

        return list(map(result, range(len(by_result))))

    def _with_derivatives(
        self, equation: Equation, operands: list[Value]
    ) -> Sequence[Value]:
        """Runs a `custom_jvp` or `custom_vjp` function so that it keeps its rule."""
        [program] = jaxprs.programs_of(equation)
        table = _common_table(equation, operands)
        operands = [
            Rows(value.at(table), table, value.constant)
            if table and isinstance(value, Later)
            else value
            for value in operands
        ]
        if self._inner.only_kinds:
            results = self._inside(equation, 0, program, operands)
            self._inner.keep(equation, operands, [results])
            return results
        self._inner.find_kinds(equation, operands, self._with_derivatives)
        [kinds] = self._inner.kinds(equation, operands)
        path = self._inner.path

        def run(program: Program, operands: Sequence[Value]) -> list[Value]:
            with self._inner.at(path):
                return self._inside(equation, 0, program, operands)

        return run_with_derivatives(run, equation, operands, kinds)

    def _inside(
        self,
        equation: Equation,
        which: int,
        program: Program,
        operands: Sequence[Value],
    ) -> list[Value]:
        """Runs one of the programs in an equation."""
        with self._inner.at((*self._inner.path, (equation, which))):
            return self.run(program, operands)


# What is known of their operands tells what is known of their results.
_WITH_CONSTANTS = primitives.ELEMENTWISE | primitives.MAKERS


def _why_not(equation: Equation, table: Table) -> str:
    name = equation.primitive.name
    if len(table.axes) > 1:
        return "treats a stack of tables as more than rows"
    if name in reductions.NAMES or name in row_rules.RULES:
        return f"needs rows of {table.name} that the batch does not look up"
    return (
        f"is not known to keep rows of {table.name} apart, so it may need rows that "
        "the batch does not look up"
    )


def _bind_whole(equation: Equation, operands: list[Value]) -> list[jax.Array]:
    return jaxprs.bind(equation, [_array(value, None) for value in operands])


def _array(value: Value, table: Table | None) -> jax.Array:
    """`value.at(table)`, which needs no call where the array is there."""
    if isinstance(value, Rows) and value.table is table:
        return value.array
    if isinstance(value, Whole) and table is None:
        return cast(jax.Array, value.array)
    return value.at(table)
