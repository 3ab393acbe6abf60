"""Functions with derivative rules of their own, on rows.

Such a rule was written for whole arrays. When a derivative is taken, the rule is traced
on whole arrays, and then run on rows as any other program.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of
from monolith_optax._rows.programs.known_constants import ZERO, Constant
from monolith_optax._rows.programs.row_values import (
    Kind,
    MixesRowsError,
    Rows,
    Run,
    Value,
    kind,
    known_as,
)
from monolith_optax._rows.programs.varying import alike
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.types import PyTree

Arrays: TypeAlias = Sequence[jax.Array]
Function: TypeAlias = Callable[..., Arrays]


def run_with_derivatives(
    run: Run,
    equation: Equation,
    operands: list[Value],
    kinds: Sequence[Kind] | None = None,
) -> list[Value]:
    """Runs a `custom_jvp` or `custom_vjp` function so that it keeps its rule.

    Args:
      run: runs its program, and others that are made of its rule.
      equation: the equation.
      operands: its operands, whole or rows.
      kinds: the kinds of its results, if they are known.
    """
    [program] = jaxprs.programs_of(equation)
    if kinds is None:
        kinds = _kinds(run, program, operands)
    table = next(value.table for value in operands if isinstance(value, Rows))
    on_rows = [kind.table is not None for kind in kinds]

    # JAX may run a rule after the trace in which it was made, so it takes all arrays as
    # arguments, ids too.
    def function(ids: jax.Array, *arrays: jax.Array) -> Arrays:
        here = table.with_ids(ids)
        values = run(program, _values(arrays, operands, here))
        return [
            value.at(here if by_row else None)
            for value, by_row in zip(values, on_rows, strict=True)
        ]

    add_rule = _with_jvp if equation.primitive.name == "custom_jvp_call" else _with_vjp
    given = [table.ids, *(value.at(_table(value)) for value in operands)]
    if all(on_rows):  # the rule gives operands what varies as rows do
        given = alike(given)
    arrays = add_rule(function, run, equation, operands, table, on_rows)(*given)
    return [
        known_as(array, kind.table, kind.constant)
        for array, kind in zip(arrays, kinds, strict=True)
    ]


def _kinds(run: Run, program: Program, operands: list[Value]) -> list[Kind]:
    """The kinds of the results of a program."""
    found: list[Kind] = []

    def abstractly() -> None:
        found.extend(map(kind, run(program, operands)))

    jax.eval_shape(abstractly)
    return found


def _with_jvp(
    function: Function,
    run: Run,
    equation: Equation,
    operands: list[Value],
    table: Table,
    on_rows: list[bool],
) -> Function:
    ours: jax.custom_jvp[Arrays] = jax.custom_jvp(function)
    inputs, outputs = differentiable(equation.invars), differentiable(equation.outvars)

    def whole_tangents(primals: Arrays, tangents: Arrays) -> Arrays:
        some = [primals[i] for i in inputs]
        function = of_inexact(equation, primals)
        _, results, _ = jax.jvp(function, some, tangents, has_aux=True)
        found: Arrays = results
        return found

    @ours.defjvp
    def rule(primals: Arrays, tangents: Arrays) -> tuple[Arrays, PyTree]:
        (ids, *primals), (_, *tangents) = primals, tangents
        here = table.with_ids(ids)
        types = list(map(type_of, equation.invars))
        program, _ = jaxprs.trace(whole_tangents, types, [types[i] for i in inputs])
        tangent_values = [
            known_as(
                tangents[i],
                here if isinstance(operands[i], Rows) else None,
                _of_tangent(operands[i]),
            )
            for i in inputs
        ]
        found = run(program, [*_values(primals, operands, here), *tangent_values])
        results = ours(ids, *primals)
        after: list[jax.Array | np.ndarray] = [
            np.zeros(jnp.shape(result), jax.dtypes.float0) for result in results
        ]
        for i, value in zip(outputs, found, strict=True):
            after[i] = value.at(here if on_rows[i] else None)
        return results, after

    return ours


def _with_vjp(
    function: Function,
    run: Run,
    equation: Equation,
    operands: list[Value],
    table: Table,
    on_rows: list[bool],
) -> Function:
    ours: jax.custom_vjp[Arrays] = jax.custom_vjp(function)
    inputs, outputs = differentiable(equation.invars), differentiable(equation.outvars)

    def whole_cotangents(primals: Arrays, cotangents: Arrays) -> Arrays:
        some = [primals[i] for i in inputs]
        _, pull, _ = jax.vjp(of_inexact(equation, primals), *some, has_aux=True)
        results: Arrays = pull(cotangents)
        return results

    def forward(*primals: jax.Array) -> tuple[Arrays, tuple[jax.Array, ...]]:
        return ours(*primals), primals

    def backward(primals: Arrays, cotangents: Arrays) -> tuple[jax.Array | None, ...]:
        ids, *primals = primals
        here = table.with_ids(ids)
        types = list(map(type_of, equation.invars))
        result_types = [type_of(equation.outvars[i]) for i in outputs]
        program, _ = jaxprs.trace(whole_cotangents, types, result_types)
        # No row of the table but those of the batch has a result.
        some = [
            known_as(cotangents[i], here if on_rows[i] else None, ZERO) for i in outputs
        ]
        found = run(program, [*_values(primals, operands, here), *some])
        after: list[jax.Array | None] = [None] * len(operands)
        for i, value in zip(inputs, found, strict=True):
            by_row = isinstance(operands[i], Rows)
            if not by_row and isinstance(value, Rows):
                raise MixesRowsError(
                    f"has a derivative that depends on rows of {value.table.name}",
                    equation,
                )
            after[i] = value.at(here if by_row else None)
        return (None, *after)

    ours.defvjp(forward, backward)
    return ours


def _table(value: Value) -> Table | None:
    return value.table if isinstance(value, Rows) else None


def _values(
    arrays: Sequence[jax.Array], operands: list[Value], here: Table
) -> list[Value]:
    return [
        known_as(array, here if isinstance(value, Rows) else None, value.constant)
        for array, value in zip(arrays, operands, strict=True)
    ]


def _of_tangent(value: Value) -> Constant:
    """What is known of tangents: those of constants are zero."""
    constant = value.constant
    return Constant(lambda: None if constant.value is None else ZERO.value, [constant])


def differentiable(atoms: Sequence[jaxprs.Atom]) -> list[int]:
    """The indices of atoms that have derivatives."""
    return [
        i for i, a in enumerate(atoms) if jnp.issubdtype(type_of(a).dtype, jnp.inexact)
    ]


def of_inexact(
    equation: Equation, operands: Arrays
) -> Callable[..., tuple[Arrays, Arrays]]:
    """The equation as a function only of what has derivatives.

    It returns the results that have derivatives, and all of them.
    """
    inputs, outputs = differentiable(equation.invars), differentiable(equation.outvars)

    def function(*inexact: jax.Array) -> tuple[Arrays, Arrays]:
        changed = dict(zip(inputs, inexact, strict=True))
        arrays = [changed.get(i, operand) for i, operand in enumerate(operands)]
        results = jaxprs.bind(equation, arrays)
        return [results[i] for i in outputs], results

    return function
