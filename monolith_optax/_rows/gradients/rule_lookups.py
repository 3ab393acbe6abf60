"""Functions with derivative rules of their own that are given whole tables.

What such a function looks up says nothing of its gradient: the rule does. Function and
rule are traced as one program, from operands and cotangents of the results to results
and cotangents of the operands. Where the cotangent of a table there is a sum of rows
that are added to zeros, these rows are its gradient, and the zeros need not be made.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._rows.gradients import as_gather
from monolith_optax._rows.gradients.gather import Lookup
from monolith_optax._rows.programs import dependencies, jaxprs
from monolith_optax._rows.programs.custom_rules import differentiable, of_inexact
from monolith_optax._rows.programs.jaxprs import (
    Atom,
    Equation,
    Literal,
    Variable,
    is_variable,
    type_of,
)

Arrays: TypeAlias = Sequence[jax.Array]

# What a function keeps for its rule: of its own, and the rows that get a gradient.
Residuals: TypeAlias = tuple[Arrays, Arrays]


class Scatter(NamedTuple):
    """An equation that adds rows to the cotangent of a table.

    Attributes:
      lookup: which rows it adds to.
      indices: the variable that says where these are.
      updates: the variable that is added.
    """

    lookup: Lookup
    indices: Atom
    updates: Atom


class NotRowsError(Exception):
    """The cotangent of a table is not rows added to zeros, and why."""


class Rule:
    """A function and its derivative rule, as one program.

    Attributes:
      program: from operands and cotangents of results to results and cotangents of
        operands.
      operands: the variables of the operands.
      cotangents: the variables of the cotangents that it gets.
      gradients: for each operand that has a derivative, the cotangent that it gets.
    """

    def __init__(self, equation: Equation) -> None:
        """Traces the rule of an equation that has one."""
        self.program = jaxprs.inlined(_both(equation))
        jaxpr = self.program.jaxpr
        count = len(equation.invars)
        self.operands, self.cotangents = jaxpr.invars[:count], jaxpr.invars[count:]
        self._outputs = differentiable(equation.outvars)
        count = len(equation.outvars)
        self._results = jaxpr.outvars[:count]
        self.gradients = dict(
            zip(differentiable(equation.invars), jaxpr.outvars[count:], strict=True)
        )
        self._made_by = {out: each for each in jaxpr.eqns for out in each.outvars}
        self._from_cotangents = set(self.cotangents)
        for each in jaxpr.eqns:
            if any(is_variable(x) and x in self._from_cotangents for x in each.invars):
                self._from_cotangents.update(each.outvars)

    def scatters(self, operand: int) -> list[Scatter]:
        """What is added to the cotangent of an operand, which else is zeros.

        Raises:
          NotRowsError: the cotangent is anything else.
        """
        if self.program.effects:
            raise NotRowsError("goes with prints or sums over devices")
        return self._added_to(self.gradients[operand], set())

    def sources(self, variable: Atom) -> tuple[list[int], list[ArrayLike]]:
        """The operands and the constants on which a variable depends."""
        needed = dependencies.needed(self.program, [variable], ())
        constants = zip(self.program.jaxpr.constvars, self.program.consts, strict=True)
        return (
            [i for i, operand in enumerate(self.operands) if operand in needed],
            [value for constant, value in constants if constant in needed],
        )

    def indices(self, operands: Arrays, scatters: Sequence[Scatter]) -> list[jax.Array]:
        """Where the rows are, for each of some scatters."""
        given = dict(zip(self.operands, operands, strict=True))
        wanted = [scatter.indices for scatter in scatters]
        return dependencies.evaluate(self.program, given, wanted)

    def run(
        self,
        operands: Arrays,
        tables: Sequence[int],
        rows: Arrays,
        scatters: Sequence[Scatter],
    ) -> list[jax.Array]:
        """The results of the function, with gradients of rows in place of tables.

        Args:
          operands: its operands.
          tables: which of them have no gradient.
          rows: for each scatter the rows that get a gradient instead.
          scatters: what is added to the cotangents of the tables.
        """
        wanted = [atom for i, atom in self.gradients.items() if i not in tables]
        others = [i for i in self.gradients if i not in tables]
        wanted += [each.updates for each in scatters]
        wanted += [each.indices for each in scatters]
        kept = self._kept(wanted)

        def forward(operands: Arrays, rows: Arrays) -> tuple[Arrays, Residuals]:
            given = dict(zip(self.operands, operands, strict=True))
            all_wanted = [*self._results, *kept]
            values = dependencies.evaluate(self.program, given, all_wanted)
            count = len(self._results)
            return values[:count], (values[count:], rows)

        def backward(
            residuals: Residuals, cotangents: Arrays
        ) -> tuple[list[jax.Array | None], Arrays]:
            values, rows = residuals
            given = dict(zip(kept, values, strict=True))
            some = [cotangents[i] for i in self._outputs]
            given.update(zip(self.cotangents, some, strict=True))
            found = iter(dependencies.evaluate(self.program, given, wanted))
            of_operands: list[jax.Array | None] = [None] * len(self.operands)
            for i in others:
                of_operands[i] = next(found)
            updates = [next(found) for _ in scatters]
            of_rows = map(_cotangent_of_rows, scatters, rows, updates, found)
            return of_operands, list(of_rows)

        function = jax.custom_vjp(lambda operands, rows: forward(operands, rows)[0])
        function.defvjp(forward, backward)
        results: Sequence[jax.Array] = function(list(operands), list(rows))
        return list(results)

    def _added_to(self, atom: Atom, summed: set[int]) -> list[Scatter]:
        """What is added to zeros; some of its axes are then summed over."""
        if self._is_zero(atom):
            return []
        equation = self._made_by.get(atom)
        if equation is None:
            raise NotRowsError("gets a part of it as its gradient")
        name, operands = str(equation.primitive.name), equation.invars
        if name in ("add", "add_any"):
            return [each for part in operands for each in self._added_to(part, summed)]
        if name == "convert_element_type":
            return self._added_to(operands[0], summed)
        if name == "reduce_sum":
            axes = set(equation.params["axes"])
            kept = [i for i in range(type_of(operands[0]).ndim) if i not in axes]
            return self._added_to(operands[0], axes | {kept[axis] for axis in summed})
        if name != "scatter-add":
            raise NotRowsError(f"gets its gradient from {name}")
        before, indices, updates = operands
        lookup = as_gather.scattered(equation, summed)
        if isinstance(lookup, str):
            raise NotRowsError(lookup)
        if indices in self._from_cotangents:
            raise NotRowsError("gets its gradient in rows that depend on gradients")
        return [*self._added_to(before, summed), Scatter(lookup, indices, updates)]

    def _is_zero(self, atom: Atom) -> bool:
        if isinstance(atom, Literal):
            return not np.any(atom.val)
        equation = self._made_by.get(atom)
        return (
            equation is not None
            and equation.primitive.name in _SPREAD
            and self._is_zero(equation.invars[0])
        )

    def _kept(self, wanted: Sequence[Atom]) -> list[Variable]:
        """The variables that the function keeps for its rule."""
        needed = dependencies.needed(self.program, wanted, ())
        kept = dict.fromkeys(filter(is_variable, wanted))
        for equation in self.program.jaxpr.eqns:
            if self._from_cotangents.intersection(equation.outvars) & needed:
                kept.update(dict.fromkeys(filter(is_variable, equation.invars)))
        return [each for each in kept if each not in self._from_cotangents]


# What gives zeros for a zero.
_SPREAD = ("broadcast_in_dim", "convert_element_type", "copy", "pvary")


def _both(equation: Equation) -> jaxprs.Program:
    """From operands and cotangents to results and cotangents."""
    inputs, outputs = differentiable(equation.invars), differentiable(equation.outvars)

    def both(operands: Arrays, cotangents: Arrays) -> tuple[Arrays, Arrays]:
        some = [operands[i] for i in inputs]
        function = of_inexact(equation, operands)
        _, pull, results = jax.vjp(function, *some, has_aux=True)
        return results, pull(cotangents)

    operands = list(map(type_of, equation.invars))
    cotangents = [type_of(equation.outvars[i]) for i in outputs]
    return jaxprs.trace(both, operands, cotangents)[0]


def _cotangent_of_rows(
    scatter: Scatter, rows: jax.Array, updates: jax.Array, indices: jax.Array
) -> jax.Array:
    _, valid = scatter.lookup.ids(indices)
    result, pull = jax.vjp(
        lambda rows: scatter.lookup.result(rows, indices, valid), rows
    )
    [cotangent] = pull(updates.astype(result.dtype))
    found: jax.Array = cotangent
    return found
