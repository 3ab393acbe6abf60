"""How an equation of whole arrays applies to the rows of a batch, or to one row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from monolith_optax._rows.programs.jaxprs import (
    Equation,
    bind,
    evaluate_now,
    shapes_of,
)
from monolith_optax._rows.programs.primitives import ELEMENTWISE
from monolith_optax._rows.programs.varying import alike
from monolith_optax._rows.types import EquationParams
from monolith_optax._shardings import with_row_axis

Entries = TypeVar("Entries", jax.Array, np.ndarray)


@dataclass(frozen=True)
class Plan:
    """How to apply an equation to some rows.

    Attributes:
      equation: the equation.
      by_row: which operands must have a row axis; the others are whole.
      sizes: the parameters that speak of rows or axes, for a number of rows.
      row_axes: how many axes of the equation's arrays are rows.
    """

    equation: Equation
    by_row: list[bool]
    sizes: Callable[[int], EquationParams] = lambda _: {}
    row_axes: int = 1

    def apply(
        self,
        num_rows: int,
        operands: Sequence[jax.Array],
        split: tuple[str, ...] | None = None,
    ) -> list[jax.Array]:
        """The rows of the results, for as many rows of the operands.

        `split` are the mesh axes over which these are split.
        """
        # Shardings in a program are those of whole tables.
        shardings = {
            name: with_row_axis(sharding, self.row_axes, split)
            for name, sharding in self._shardings().items()
        }
        changed = shardings | self.sizes(num_rows)
        return bind(self.equation, alike(self._fitting(operands)), **changed)

    def evaluate(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The results for numbers that all entries of the operands have."""
        no_shardings: EquationParams = dict.fromkeys(self._shardings())
        if self.equation.primitive.name in ELEMENTWISE:
            return evaluate_now(self.equation, values, **no_shardings)
        rows: Sequence[np.ndarray] = [
            np.full((1, *shape[self.row_axes :]) if row else shape, value)
            for row, shape, value in zip(
                self.by_row, shapes_of(self.equation), values, strict=True
            )
        ]
        rows = self._fitting(rows)
        return evaluate_now(self.equation, rows, **no_shardings | self.sizes(1))

    def _shardings(self) -> dict[str, NamedSharding]:
        params, names = (
            self.equation.params,
            ("sharding", "out_sharding", "dst_sharding"),
        )
        return {name: params[name] for name in names if params.get(name) is not None}

    def _fitting(self, operands: Sequence[Entries]) -> Sequence[Entries]:
        if self.row_axes == 1 or self.equation.primitive.name not in _BROADCASTING:
            return operands
        return [
            operand if row else self._with_one_row_axis(operand)
            for row, operand in zip(self.by_row, operands, strict=True)
        ]

    def _with_one_row_axis(self, operand: Entries) -> Entries:
        """A whole operand whose row axes all have the length 1, if it has any."""
        shape = np.shape(operand)
        ones = len(shape) >= self.row_axes and math.prod(shape[: self.row_axes]) == 1
        return operand.reshape(1, *shape[self.row_axes :]) if ones else operand


_BROADCASTING = ELEMENTWISE | {"broadcast_in_dim"}
