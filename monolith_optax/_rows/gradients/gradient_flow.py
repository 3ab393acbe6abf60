"""Which values of a program the gradient of its result flows through.

What is only compared, cut off by `stop_gradient`, or part of an auxiliary output gets
no gradient, whatever is done with it.
"""

from collections.abc import Sequence
from typing import TypeGuard

import jax.numpy as jnp

from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import (
    Atom,
    Equation,
    Jaxpr,
    Literal,
    Program,
    Variable,
    type_of,
)

# For each of some values whether gradients flow through it.
Flags = tuple[bool, ...]


class GradientFlow:
    """Follows gradients backwards through programs; each program is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Jaxpr, Flags], set[Variable]] = {}

    def through(self, program: Program, results: Sequence[bool]) -> set[Variable]:
        """The variables of a program that get a gradient, if some results do."""
        key = program.jaxpr, tuple(results)
        if key not in self._known:
            self._known[key] = self._read(*key)
        return self._known[key]

    def operands(self, program: Program, results: Sequence[bool]) -> list[bool]:
        """Which operands of a program get a gradient, if some results do."""
        found = self.through(program, results)
        return [variable in found for variable in program.jaxpr.invars]

    def _read(self, jaxpr: Jaxpr, results: Flags) -> set[Variable]:
        pairs = zip(jaxpr.outvars, results, strict=True)
        found = {atom for atom, flows in pairs if flows and _may_have_gradient(atom)}
        for equation in reversed(jaxpr.eqns):
            if not found.isdisjoint(equation.outvars):
                flags = self._into(equation, [out in found for out in equation.outvars])
                for atom, flows in zip(equation.invars, flags, strict=True):
                    if flows and _may_have_gradient(atom):
                        found.add(atom)
        return found

    def _into(self, equation: Equation, results: list[bool]) -> list[bool]:
        """Which operands of an equation get a gradient from some of its results."""
        name = str(equation.primitive.name)
        if name == "stop_gradient":
            return [False]
        if name == "scan":
            results = self.of_scan(equation, results)
        if name in _PROGRAMS:
            programs = jaxprs.programs_of(equation)
            flags = [self.operands(program, results) for program in programs]
            into = map(any, zip(*flags, strict=True))
            return [False, *into] if name == "cond" else list(into)
        if name == "shard_map":
            return self.operands(jaxprs.shard_map_parts(equation).body, results)
        return [True] * len(equation.invars)

    def of_scan(self, equation: Equation, results: Sequence[bool]) -> list[bool]:
        """Which results of a scan's body get a gradient, from itself or from later."""
        body, num_consts, num_carry = jaxprs.scan_parts(equation)
        flags = list(results)
        while True:
            before = self.operands(body, flags)[num_consts : num_consts + num_carry]
            carry = [a or b for a, b in zip(flags[:num_carry], before, strict=True)]
            if carry == flags[:num_carry]:
                return flags
            flags[:num_carry] = carry


# What runs programs whose results are its own.
_PROGRAMS = jaxprs.CALLS | {"cond", "scan"}


def _may_have_gradient(atom: Atom) -> TypeGuard[Variable]:
    return not isinstance(atom, Literal) and jnp.issubdtype(
        type_of(atom).dtype, jnp.inexact
    )
