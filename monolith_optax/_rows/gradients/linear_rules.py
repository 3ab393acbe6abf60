"""Derivative rules that may be applied to some rows of a table.

A `custom_vjp` rule may do anything with the cotangent that it is given. JAX gives it
the cotangent of a whole image: zero in rows that are not looked up, and a sum in those
that are looked up twice. Given those of single lookups instead, it gives the same only
if it is linear: zero for zero, and for a sum the sum. And what it gives for a row may
follow only from that row: a sum over rows, as the cotangent of a scale is, must not go
back to rows. Both are proved from its program.
"""

from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax._rows.gradients.image_facts import Known, is_table, which_tables
from monolith_optax._rows.gradients.rule_lookups import Rule
from monolith_optax._rows.programs import dependencies, jaxprs, row_rules
from monolith_optax._rows.programs.custom_rules import (
    differentiable,
    run_with_derivatives,
)
from monolith_optax._rows.programs.jaxprs import (
    Atom,
    Equation,
    Literal,
    Program,
    Variable,
    is_variable,
    type_of,
)
from monolith_optax._rows.programs.primitives import HINTS
from monolith_optax._rows.programs.row_values import MixesRowsError, Rows, Whole
from monolith_optax._rows.programs.run_on_rows import Runner
from monolith_optax._rows.slices.row_access import Table
from monolith_optax._rows.types import ArrayType

# What a value is as a function of the cotangents.
_FREE, _ZERO, _LINEAR, _OTHER = range(4)


def check_rule(equation: Equation, values: Sequence[Known]) -> bool:
    """Whether a function with a rule can be given some rows of its operands."""
    is_jvp = equation.primitive.name == "custom_jvp_call"  # linear as JAX asks for it
    if not is_jvp and equation.params.get("symbolic_zeros"):
        return False
    if not is_jvp:
        rule = Rule(equation)
        if not (_is_linear(rule) and _keeps_rows(rule, which_tables(values))):
            return False
    try:
        with jaxprs.standing_at(equation):
            jax.eval_shape(lambda: _on_two_rows(equation, values))
    except MixesRowsError:
        return False
    return True


def _on_two_rows(equation: Equation, values: Sequence[Known]) -> list[jax.Array]:
    """Function and rule on rows; what is computed with them does not matter."""
    types = list(map(type_of, equation.invars))
    shape = next(t.shape for t, v in zip(types, values, strict=True) if is_table(v))
    ids = jnp.zeros(2, jnp.int32)
    inputs = differentiable(equation.invars)

    def zeros(value: Known, aval: ArrayType) -> jax.Array:
        size = (2, *aval.shape[1:]) if is_table(value) else aval.shape
        return jnp.zeros(size, aval.dtype)

    given = [zeros(v, t) for v, t in zip(values, types, strict=True)]

    def function(*some: jax.Array) -> list[jax.Array]:
        table = Table("the table", shape[0], ids)
        runner = Runner([table])
        changed = dict(zip(inputs, some, strict=True))
        operands = [changed.get(i, array) for i, array in enumerate(given)]
        results = run_with_derivatives(
            runner.run,
            equation,
            [
                Rows(array, table) if is_table(value) else Whole(array)
                for value, array in zip(values, operands, strict=True)
            ],
        )
        return [results[i].at(table) for i in differentiable(equation.outvars)]

    results, pull = jax.vjp(function, *(given[i] for i in inputs))
    cotangents: list[jax.Array] = pull(results)
    return cotangents


def _keeps_rows(rule: Rule, tables: Collection[int]) -> bool:
    """Whether the cotangent of a table in each row follows from that row."""
    wanted = [atom for i, atom in rule.gradients.items() if i in tables]
    by_row = {*rule.cotangents, *(rule.operands[i] for i in tables)}
    return _keeps(rule.program, wanted, by_row)


def _keeps(program: Program, wanted: Sequence[Atom], by_row: set[Variable]) -> bool:
    """Whether some variables of a program have rows that follow from those of others.

    Those that have rows are added to `by_row`.
    """
    needed = dependencies.needed(program, wanted, ())
    for equation in program.jaxpr.eqns:
        rows = [is_variable(atom) and atom in by_row for atom in equation.invars]
        if not any(rows):
            continue
        called = jaxprs.called_program(equation)
        if called is not None:
            inner = zip(called.jaxpr.invars, rows, strict=True)
            kept = _keeps(called, called.jaxpr.outvars, {v for v, row in inner if row})
        else:
            is_hint = equation.primitive.name in HINTS
            kept = is_hint or row_rules.plan(equation, rows) is not None
        if kept:
            by_row.update(equation.outvars)
        elif not needed.isdisjoint(equation.outvars):
            return False
    return True


def _is_linear(rule: Rule) -> bool:
    """Whether all cotangents that a rule gives are linear in those that it gets."""
    if rule.program.effects:
        return False
    values: dict[Variable, int] = dict.fromkeys(rule.cotangents, _LINEAR)

    def read(atom: Atom) -> int:
        if isinstance(atom, Literal):
            return _FREE if np.any(atom.val) else _ZERO
        return values.get(atom, _FREE)

    for equation in rule.program.jaxpr.eqns:
        kind = _kind(equation, [read(atom) for atom in equation.invars])
        values.update(dict.fromkeys(equation.outvars, kind))
    return all(read(atom) in (_LINEAR, _ZERO) for atom in rule.gradients.values())


def _kind(equation: Equation, kinds: list[int]) -> int:
    name = str(equation.primitive.name)
    kind = _RULES[name](kinds) if name in _RULES else _of_any(kinds)
    rounded = not differentiable(equation.outvars)  # as by a cast to integers
    return _OTHER if rounded and kind == _LINEAR else kind


def _of_any(kinds: list[int]) -> int:
    return _FREE if set(kinds) <= {_FREE, _ZERO} else _OTHER


def _each(kinds: list[int]) -> int:
    """Of what is linear in all of its operands together."""
    if _FREE in kinds:
        return _of_any(kinds)
    return max(kinds)


def _first(kinds: list[int]) -> int:
    """Of what is linear in the first operand for any others."""
    if set(kinds[1:]) <= {_FREE, _ZERO}:
        return kinds[0]
    return _OTHER


def _product(kinds: list[int]) -> int:
    if _OTHER in kinds or kinds == [_LINEAR, _LINEAR]:
        return _OTHER
    return max(kinds)


def _select(kinds: list[int]) -> int:
    return _each(kinds[1:]) if kinds[0] in (_FREE, _ZERO) else _OTHER


_RULES: dict[str, Callable[[list[int]], int]] = {
    **dict.fromkeys(("add", "add_any", "sub", "neg", "concatenate"), _each),
    **dict.fromkeys(("convert_element_type", "copy", "reduce_precision"), _first),
    **dict.fromkeys(("broadcast_in_dim", "reshape", "squeeze"), _first),
    **dict.fromkeys(("transpose", "rev", "slice", "reduce_sum", "cumsum"), _first),
    **dict.fromkeys(("gather", "dynamic_slice", "real", "imag", "conj"), _first),
    **dict.fromkeys(("div", "pvary", "sharding_constraint"), _first),
    **dict.fromkeys(("optimization_barrier", "split", "stop_gradient"), _each),
    **dict.fromkeys(("mul", "dot_general"), _product),
    "select_n": _select,
}
