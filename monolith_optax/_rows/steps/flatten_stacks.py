"""Steps on stacks of tables, as steps on tables whose rows are those of all of them.

An optimizer's step is traced on the true shapes of parameters. Where these are stacks,
the first axes of what the program computes become one. Elementwise operations do not
see this, nor do reductions of each row or of everything. Any other operation on a stack
may treat its tables as a unit, and is an error.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from monolith_optax._rows.programs import jaxprs, row_rules
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of
from monolith_optax._rows.programs.row_values import MixesRowsError
from monolith_optax._rows.slices.row_slices import flattened

# The first axes that become one; those of what is not a stack stay.
Axes = tuple[int, ...]


class _Flat(NamedTuple):
    """An array whose first axes have become one."""

    array: Any
    axes: Axes


def flat_program(
    program: Program, operands: Sequence[Axes], results: Sequence[Axes]
) -> Program:
    """The program on flattened operands, with flattened results.

    Raises:
      MixesRowsError: an operation does not treat each row of a stack by itself.
    """
    if not any(len(axes) > 1 for axes in [*operands, *results]):
        return program
    stacks = {axes for axes in operands if len(axes) > 1}

    def run(program: Program, values: Sequence[Any]) -> list[Any]:
        return jaxprs.interpret(program, values, step, lambda constant: constant)

    def step(equation: Equation, values: list[Any]) -> Sequence[Any]:
        if equation.primitive.name in jaxprs.CALLS:
            called = jaxprs.called_program(equation)
            assert called is not None
            return run(called, values)
        shapes = [type_of(out).shape for out in equation.outvars]
        found = {value.axes for value in values if isinstance(value, _Flat)}
        if not found:
            found = {a for a in stacks if _makes(equation, a)}
            if not found:
                return jaxprs.bind(equation, values)
        axes = next(iter(found))
        changed = _changed(equation, len(axes)) if len(found) == 1 else None
        if changed is None:
            raise MixesRowsError("treats a stack of tables as more than rows", equation)
        arrays = [_array(value, axes) for value in values]
        after = jaxprs.bind(equation, arrays, **changed)
        return [
            _Flat(array, axes) if shape[: len(axes)] == axes else array
            for array, shape in zip(after, shapes, strict=True)
        ]

    def flat(*arrays: Any) -> list[Any]:
        values = [
            _Flat(array, axes) if len(axes) > 1 else array
            for array, axes in zip(arrays, operands, strict=True)
        ]
        after = run(program, values)
        return [_array(value, axes) for value, axes in zip(after, results, strict=True)]

    types = [
        _flat_type(type_of(operand), axes)
        for operand, axes in zip(program.jaxpr.invars, operands, strict=True)
    ]
    return jaxprs.trace(flat, *types)[0]


def _flat_type(aval: Any, axes: Axes) -> Any:
    if len(axes) < 2:
        return aval
    return aval.update(shape=(math.prod(axes), *aval.shape[len(axes) :]))


def _array(value: Any, axes: Axes) -> Any:
    """An operand or result of a flat program, of which these axes are one."""
    if not isinstance(value, _Flat):
        is_stack = jax.numpy.shape(value)[: len(axes)] == axes
        return flattened(value, axes) if is_stack else value
    if value.axes == axes:
        return value.array
    return value.array.reshape(*value.axes, *value.array.shape[1:])


def _makes(equation: Equation, axes: Axes) -> bool:
    """Whether an equation makes a stack of such axes from nothing as large."""
    if equation.primitive.name not in ("broadcast_in_dim", "random_bits"):
        return False
    shape = type_of(equation.outvars[0]).shape
    changed = _changed(equation, len(axes))
    return shape[: len(axes)] == axes and changed is not None


def _changed(equation: Equation, count: int) -> dict[str, Any] | None:
    """The parameters that are others if the first axes are one; None if it cannot be.

    Args:
      equation: the equation.
      count: how many axes become one.
    """
    name, params = str(equation.primitive.name), equation.params
    if name in row_rules.ELEMENTWISE:
        return {}
    shapes = [type_of(operand).shape for operand in equation.invars]
    [after, *_] = [type_of(out).shape for out in equation.outvars]
    kept = tuple(range(count))
    if name in ("broadcast_in_dim", "random_bits", "reshape"):
        sizes = "new_sizes" if name == "reshape" else "shape"
        changed = {sizes: (math.prod(after[:count]), *after[count:])}
        if name != "broadcast_in_dim":
            same = name != "reshape" or after[:count] == shapes[0][:count]
            return changed if same else None
        dims = tuple(params["broadcast_dimensions"])
        first = dims[:count] == kept and shapes[0][:count] == after[:count]
        if not first and dims and min(dims) < count:
            return None
        moved = tuple(axis - count + 1 for axis in (dims[count:] if first else dims))
        return {**changed, "broadcast_dimensions": (0, *moved) if first else moved}
    axes_of = {"squeeze": "dimensions"}.get(name, "axes")
    if name == "squeeze" or (name.startswith("reduce_") and axes_of in params):
        axes = tuple(params[axes_of])
        first = set(kept) <= set(axes)
        if not first and min(axes) < count:
            return None
        moved = tuple(axis - count + 1 for axis in axes if axis >= count)
        return {axes_of: (0, *moved) if first else moved}
    return None
