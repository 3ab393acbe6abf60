"""Conditionals on rows."""

from collections.abc import Callable
from typing import Any

from jax import lax

from monolith_optax._rows.programs import jaxprs, known_constants
from monolith_optax._rows.programs.jaxprs import Equation
from monolith_optax._rows.programs.row_values import (
    Pending,
    Run,
    Value,
    common_table,
    kinds,
    known_as,
)


def run_cond(run: Run, equation: Equation, operands: list[Value]) -> list[Value]:
    """Runs that branch of a `cond` which its index chooses.

    A result is rows of a table where it is that in one branch at least; the other
    branches then give the rows at the same positions.
    """
    index, *operands = operands
    programs = jaxprs.branches(equation)

    def switch(take: Callable[[list[Value]], Any]) -> Any:
        branches = [
            lambda program=program: take(run(program, operands)) for program in programs
        ]
        return lax.switch(index.at(None), branches)

    by_result = list(zip(*kinds(run, programs, operands), strict=True))
    tables = [common_table(equation, each) for each in by_result]
    known = [
        known_constants.joined([kind.constant for kind in each]) for each in by_result
    ]
    pending = [all(kind.type is Pending for kind in each) for each in by_result]
    ready = [i for i, is_pending in enumerate(pending) if not is_pending]
    arrays = switch(lambda values: [values[i].at(tables[i]) for i in ready])

    def result(i: int) -> Value:
        if pending[i]:
            return Pending(
                lambda t, _: switch(lambda values: values[i].at(t)), known[i]
            )
        return known_as(arrays[ready.index(i)], tables[i], known[i])

    return list(map(result, range(len(by_result))))
