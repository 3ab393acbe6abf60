"""Running a traced program on some rows of its tables.

An optimizer's step is traced on whole tables, which costs no memory, and its program
then runs on the batch's rows. Each value in it is of one of three kinds: rows of a
table at the positions of the batch, an array that is whole, or rows that are nobody's
yet. An operation that keeps rows apart applies to rows of a batch as to those of a
table. Any other one needs the whole table, and is an error, unless it is a reduction to
which rows without a gradient add nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from monolith_optax._rows import constants, jaxprs, rules
from monolith_optax._rows.constants import UNKNOWN, Constant
from monolith_optax._rows.jaxprs import Equation, Program
from monolith_optax._rows.reductions import is_over_rows, reduce_rows
from monolith_optax._rows.tables import Table


class MixesRowsError(ValueError):
    """A step would need rows of a table that the batch does not have."""

    def __init__(self, what: str) -> None:
        super().__init__(
            "lazy_rows needs an optimizer that treats each row by itself, but in this "
            f"one {what}. Step on it densely, or give its tables to another optimizer "
            "with optax.partition."
        )


@dataclass(frozen=True, eq=False)
class Whole:
    """An array; `constant` is what is known of its entries."""

    array: Any
    constant: Constant = UNKNOWN

    def at(self, table: Table | None) -> Any:
        """The rows of a table's batch; or all there are."""
        return self.array if table is None else table.gather(self.array)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a table at the batch's positions.

    `constant` is what is known of the rows without a gradient.
    """

    array: jax.Array
    table: Table
    constant: Constant = UNKNOWN

    def at(self, table: Table | None) -> jax.Array:
        """The rows; there are none of another table, and nobody has all."""
        assert table is self.table
        return self.array


@dataclass(frozen=True, eq=False)
class Pending:
    """As many rows as a table has, not made before it is known where they are needed.

    `make` makes them at the positions of a table's batch, or all of them. `constant` is
    what is known of all of their entries.
    """

    make: Callable[[Table | None, dict[Any, Any]], Any]
    constant: Constant = UNKNOWN

    def at(self, table: Table | None, made: dict[Any, Any] | None = None) -> Any:
        """The rows of a table's batch; or all there are."""
        made = {} if made is None else made
        if self not in made:
            made[self] = self.make(table, made)
        return made[self]


Value = Whole | Rows | Pending


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
            return Whole(array, constants.literal(array))
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
            return self.run(program, operands)
        tables = {value.table: None for value in operands if isinstance(value, Rows)}
        by_row = any(not isinstance(value, Whole) for value in operands)
        if name in _HINTS and by_row:
            return operands
        if name == "cond" and by_row:
            return self._cond(equation, operands)
        if not tables:
            return self._without_rows(equation, operands)
        if len(tables) > 1:
            raise MixesRowsError(
                f"{jaxprs.source_line(equation)} combines rows of "
                f"{' and '.join(table.name for table in tables)}"
            )
        [table] = tables
        return self._on_rows(equation, operands, table)

    def _on_rows(
        self, equation: Equation, operands: list[Value], table: Table
    ) -> Sequence[Value]:
        known = [value.constant for value in operands]
        plan = rules.plan(equation, [isinstance(value, Rows) for value in operands])
        if plan is not None:
            results = plan.apply(table.batch_size, _arrays(plan, operands, table))
            after = constants.after(equation, known, _evaluation(plan))
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
            f"{jaxprs.source_line(equation)} needs rows of {table.name} that the "
            "batch does not look up"
        )

    def _without_rows(
        self, equation: Equation, operands: list[Value]
    ) -> Sequence[Value]:
        plan = rules.plan(equation, [isinstance(value, Pending) for value in operands])
        if plan is None or not (any(plan.by_row) or rules.makes_rows(equation)):
            return list(map(Whole, _bind_whole(equation, operands)))
        known = [value.constant for value in operands]
        after = constants.after(equation, known, _evaluation(plan))
        if self._as_long_as_a_table(equation, plan, operands):
            return [
                Pending(self._maker(plan, operands, index), constant)
                for index, constant in enumerate(after)
            ]
        return list(map(Whole, _bind_whole(equation, operands), after))

    def _as_long_as_a_table(
        self, equation: Equation, plan: rules.Plan, operands: list[Value]
    ) -> bool:
        if any(
            row and isinstance(value, Whole)
            for row, value in zip(plan.by_row, operands, strict=True)
        ):
            return False  # a whole array is already there, and so is the result
        shapes = [jaxprs.type_of(out).shape for out in equation.outvars]
        return all(shape and shape[0] in self._lengths for shape in shapes)

    def _maker(
        self, plan: rules.Plan, operands: list[Value], index: int
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

    def _cond(self, equation: Equation, operands: list[Value]) -> Sequence[Value]:
        index, *operands = operands
        programs = jaxprs.branches(equation)

        def switch(take: Callable[[list[Value]], Any]) -> Any:
            branches = [
                lambda program=program: take(self.run(program, operands))
                for program in programs
            ]
            return lax.switch(index.at(None), branches)

        kinds = list(zip(*self._abstractly(programs, operands), strict=True))
        tables = [_table_of(equation, alternatives) for alternatives in kinds]
        known = [constants.joined([k.constant for k in each]) for each in kinds]
        ready = [
            i
            for i, each in enumerate(kinds)
            if any(kind.type is not Pending for kind in each)
        ]
        arrays = switch(lambda values: [values[i].at(tables[i]) for i in ready])

        def result(i: int) -> Value:
            if i not in ready:
                return Pending(lambda t, _: switch(lambda v: v[i].at(t)), known[i])
            array, table = arrays[ready.index(i)], tables[i]
            if table is None:
                return Whole(array, known[i])
            return Rows(array, table, known[i])

        return list(map(result, range(len(kinds))))

    def _abstractly(
        self, programs: list[Program], operands: list[Value]
    ) -> "list[list[_Kind]]":
        """The kinds of the results of some programs."""
        kinds: list[list[_Kind]] = []

        def run() -> None:
            for program in programs:
                values = self.run(program, operands)
                kinds.append([_Kind.of(value) for value in values])

        jax.eval_shape(run)
        return kinds


class _Kind(NamedTuple):
    type: type[Value]
    table: Table | None
    constant: Constant

    @classmethod
    def of(cls, value: Value) -> "_Kind":
        table = value.table if isinstance(value, Rows) else None
        return cls(type(value), table, value.constant)


# What these say of whole tables need not hold for rows of a batch.
_HINTS = ("sharding_constraint", "optimization_barrier")


def _arrays(
    plan: rules.Plan,
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


def _evaluation(plan: rules.Plan) -> Callable[[list[Any]], list[Any]]:
    """Applies a plan to constants, which are those of a single row."""
    shapes = [jaxprs.type_of(operand).shape for operand in plan.equation.invars]
    if plan.equation.primitive.name in rules.ELEMENTWISE:
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


def _table_of(equation: Equation, alternatives: Sequence[_Kind]) -> Table | None:
    """The table whose rows one of several values is."""
    tables = {kind.table: None for kind in alternatives if kind.table is not None}
    if len(tables) > 1:
        raise MixesRowsError(
            f"{jaxprs.source_line(equation)} gives rows of "
            f"{' or '.join(table.name for table in tables)}"
        )
    return next(iter(tables), None)
