"""What depends on what in a traced program, and running only what is needed."""

from collections.abc import Callable, Container, Mapping, Sequence

import jax
from jax.typing import ArrayLike

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import (
    Atom,
    Equation,
    Literal,
    Program,
    Variable,
    is_variable,
)

Sources = frozenset[int]


def sources(program: Program, operands: Sequence[Sources]) -> list[Sources]:
    """For each result what it depends on, given that of each operand.

    Inside calls, loops and conditionals each value counts by itself.
    """

    def step(equation: Equation, values: list[Sources]) -> Sequence[Sources]:
        return _INSIDE.get(str(equation.primitive.name), _together)(equation, values)

    return jaxprs.interpret(program, operands, step, lambda _: Sources())


def _together(equation: Equation, values: list[Sources]) -> list[Sources]:
    return [Sources().union(*values)] * len(equation.outvars)


def _call(equation: Equation, values: list[Sources]) -> list[Sources]:
    [program] = jaxprs.programs_of(equation)
    return sources(program, values)


def _cond(equation: Equation, values: list[Sources]) -> list[Sources]:
    index, *operands = values
    found = [sources(branch, operands) for branch in jaxprs.branches(equation)]
    return [index.union(*each) for each in zip(*found, strict=True)]


def _scan(equation: Equation, values: list[Sources]) -> list[Sources]:
    body, num_consts, num_carry = jaxprs.scan_parts(equation)
    constants, inputs = values[:num_consts], values[num_consts + num_carry :]
    carry = values[num_consts : num_consts + num_carry]
    while True:
        results = sources(body, [*constants, *carry, *inputs])
        after = [a | b for a, b in zip(carry, results, strict=False)]
        if after == carry:
            return [*carry, *results[num_carry:]]
        carry = after


_INSIDE: dict[str, Callable[[Equation, list[Sources]], list[Sources]]] = {
    **dict.fromkeys(jaxprs.CALLS | jaxprs.CUSTOM_DERIVATIVES, _call),
    "cond": _cond,
    "scan": _scan,
}


def needed(
    program: Program, wanted: Sequence[Atom], given: Container[Variable]
) -> set[Variable]:
    """The variables of a program on which some depend, and those themselves.

    What is before a variable that is given is not looked at.
    """
    found = set(filter(is_variable, wanted))
    for equation in reversed(program.jaxpr.eqns):
        if any(out in found and out not in given for out in equation.outvars):
            found.update(filter(is_variable, equation.invars))
    return found


def evaluate(
    program: Program, given: Mapping[Variable, ArrayLike], wanted: Sequence[Atom]
) -> list[jax.Array]:
    """Runs as much of a program as some of its variables need.

    Args:
      program: the program.
      given: the values of its operands, or of other variables.
      wanted: variables.
    """
    values = dict(zip(program.jaxpr.constvars, program.consts, strict=True)) | {**given}
    variables = needed(program, wanted, given)

    def read(atom: Atom) -> jax.Array:
        value: jax.Array = atom.val if isinstance(atom, Literal) else values[atom]
        return value

    for equation in program.jaxpr.eqns:
        if any(out in variables and out not in given for out in equation.outvars):
            results = jaxprs.bind(equation, [read(atom) for atom in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in wanted]
