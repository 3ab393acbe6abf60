"""Which results of a traced program depend on which of its operands."""

from collections.abc import Callable, Sequence

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program

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
