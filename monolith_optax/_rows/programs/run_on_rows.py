"""Running a traced program on some rows of its tables.

An optimizer's step is traced on whole tables, which costs no memory, and its program
then runs on the batch's rows. Each value in it is of one of three kinds: rows of a
table at the positions of the batch, an array that is whole, or rows that are nobody's
yet. An operation that keeps rows apart applies to rows of a batch as to those of a
table. Any other one needs the whole table, and is an error, unless it is a reduction to
which rows without a gradient add nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from monolith_optax._rows.programs import jaxprs, known_constants, row_rules
from monolith_optax._rows.programs.conditionals import run_cond
from monolith_optax._rows.programs.custom_rules import run_with_derivatives
from monolith_optax._rows.programs.jaxprs import Equation, Program
from monolith_optax._rows.programs.reductions import is_over_rows, reduce_rows
from monolith_optax._rows.programs.row_values import (
    MixesRowsError,
    Pending,
    Rows,
    Value,
    Whole,
    common_table,
)
from monolith_optax._rows.slices.row_access import Table


class Runner:
    """Runs programs on the rows of some tables."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._lengths = {table.num_rows for table in tables}
        self._claims: dict[Any, tuple[Table | None, str]] = {}

    def run(self, program: Program, operands: Sequence[Value]) -> list[Value]:
        """The results of a program."""
        return jaxprs.interpret(program, operands, self._step, self.whole)

    def whole(self, array: Any) -> Value:
        """An array of which, if it is as long as a table, rows may be all we need."""
        if jnp.ndim(array) == 0 or len(array) not in self._lengths:
            return Whole(array, known_constants.literal(array))
        return Pending(lambda table, _: Whole(array).at(table))

    def slot(self, array: Any, name: str) -> Value:
        """A leaf of the state, which is that table's with whose rows it is combined."""
        if jnp.ndim(array) == 0 or len(array) not in self._lengths:
            return Whole(array)

        def make(table: Table | None, _: Any) -> Any:
            if table is not None:
                self._claim(name, table, f"the state's {name}")
            return Whole(array).at(table)

        return Pending(make)

    def owner(self, name: str) -> Table | None:
        """The table with whose rows a leaf of the state was combined, if with any."""
        return self._claims.get(name, (None, ""))[0]

    def _claim(self, key: Any, table: Table | None, what: str) -> None:
        owner, _ = self._claims.setdefault(key, (table, what))
        if owner is not table:
            names = " and ".join(t.name if t else "all rows" for t in (owner, table))
            raise MixesRowsError(f"{what} belongs to {names} at once")

    def _step(self, equation: Equation, operands: list[Value]) -> Sequence[Value]:
        name = str(equation.primitive.name)
        if name in jaxprs.CALLS:
            program = jaxprs.called_program(equation)
            assert program is not None
            try:
                return self.run(program, operands)
            except MixesRowsError as error:
                error.equations.append(equation)
                raise
        by_row = any(not isinstance(value, Whole) for value in operands)
        if name in _HINTS and by_row:
            return operands
        if name in _WITH_PROGRAMS and by_row:
            return _WITH_PROGRAMS[name](self.run, equation, operands)
        table = common_table(equation, operands)
        if table is None:
            return self._without_rows(equation, operands)
        return self._on_rows(equation, operands, table)

    def _on_rows(
        self, equation: Equation, operands: list[Value], table: Table
    ) -> Sequence[Value]:
        known = [value.constant for value in operands]
        plan = row_rules.plan(equation, [isinstance(value, Rows) for value in operands])
        if plan is not None:
            results = plan.apply(table.batch_size, _arrays(plan, operands, table))
            after = known_constants.after(equation, known, _evaluation(plan))
            return [
                Rows(array, table, constant)
                for array, constant in zip(results, after, strict=True)
            ]
        if is_over_rows(equation):
            rows = [value.at(table) for value in operands]
            result = reduce_rows(equation, rows, known, table)
            if result is not None:
                return [Whole(result)]
        raise MixesRowsError(
            f"needs rows of {table.name} that the batch does not look up", equation
        )

    def _without_rows(
        self, equation: Equation, operands: list[Value]
    ) -> Sequence[Value]:
        plan = row_rules.plan(
            equation, [isinstance(value, Pending) for value in operands]
        )
        if plan is None or not (any(plan.by_row) or row_rules.needs_no_rows(equation)):
            return list(map(Whole, _bind_whole(equation, operands)))
        known = [value.constant for value in operands]
        after = known_constants.after(equation, known, _evaluation(plan))
        if self._as_long_as_a_table(equation, plan, operands):
            return [
                Pending(self._maker(plan, operands, index), constant)
                for index, constant in enumerate(after)
            ]
        return list(map(Whole, _bind_whole(equation, operands), after))

    def _as_long_as_a_table(
        self, equation: Equation, plan: row_rules.Plan, operands: list[Value]
    ) -> bool:
        if any(
            row and isinstance(value, Whole)
            for row, value in zip(plan.by_row, operands, strict=True)
        ):
            return False  # a whole array is already there, and so is the result
        shapes = [jaxprs.type_of(out).shape for out in equation.outvars]
        return all(shape and shape[0] in self._lengths for shape in shapes)

    def _maker(
        self, plan: row_rules.Plan, operands: list[Value], index: int
    ) -> Callable[[Table | None, dict[Any, Any]], Any]:
        noise = object()

        def make(table: Table | None, made: dict[Any, Any]) -> Any:
            if plan.equation.primitive.name == "random_bits":
                line = jaxprs.source_line(plan.equation)
                self._claim(noise, table, f"the noise of {line}")
            arrays = _arrays(plan, operands, table, made)
            if table is None:
                return jaxprs.bind(plan.equation, arrays)[index]
            return plan.apply(table.batch_size, arrays)[index]

        return make


_WITH_PROGRAMS = {"cond": run_cond} | dict.fromkeys(
    jaxprs.CUSTOM_DERIVATIVES, run_with_derivatives
)

# What these say of whole tables need not hold for rows of a batch.
_HINTS = ("sharding_constraint", "optimization_barrier")


def _arrays(
    plan: row_rules.Plan,
    operands: list[Value],
    table: Table | None,
    made: dict[Any, Any] | None = None,
) -> list[Any]:
    made = {} if made is None else made
    return [
        (value.at(table, made) if isinstance(value, Pending) else value.at(table))
        if row
        else value.at(None)
        for row, value in zip(plan.by_row, operands, strict=True)
    ]


def _evaluation(plan: row_rules.Plan) -> Callable[[list[Any]], list[Any]]:
    """Applies a plan to constants, which are those of a single row."""
    shapes = [jaxprs.type_of(operand).shape for operand in plan.equation.invars]
    if plan.equation.primitive.name in row_rules.ELEMENTWISE:
        return lambda values: jaxprs.bind(plan.equation, values)
    return lambda values: plan.apply(
        1,
        [
            jnp.full((1, *shape[1:]) if row else shape, value)
            for row, shape, value in zip(plan.by_row, shapes, values, strict=True)
        ],
    )


def _bind_whole(equation: Equation, operands: list[Value]) -> list[Any]:
    return jaxprs.bind(equation, [value.at(None) for value in operands])
