"""Operations that keep the rows of a table apart.

A rule says how to apply an equation to other numbers of rows than those of its arrays:
to the rows of a batch, or to a single one. Row axes are the first ones throughout. A
stack of tables has several, which are a single axis in the rows of a batch.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from monolith_optax._rows.programs.jaxprs import Equation, shapes_of, type_of
from monolith_optax._rows.programs.plans import Plan as Plan
from monolith_optax._rows.programs.primitives import ELEMENTWISE as ELEMENTWISE
from monolith_optax._rows.programs.primitives import MAKERS


def plan(equation: Equation, by_row: Sequence[bool], row_axes: int = 1) -> Plan | None:
    """How to apply an equation whose operands have row axes, unless it mixes rows.

    Args:
      equation: the equation.
      by_row: which operands have row axes. None need have them if the equation makes
        rows that do not depend on each other, like a broadcast.
      row_axes: how many of their first axes are rows.
    """
    name = str(equation.primitive.name)
    if name in ELEMENTWISE:
        return _elementwise(equation, list(by_row), row_axes)
    if name not in RULES or not equation.outvars:
        return None
    if not any(by_row) and name not in MAKERS:
        return None
    return RULES[name](equation, list(by_row), row_axes)


def makes_rows(equation: Equation, row_axes: int = 1) -> bool:
    """Whether an equation makes rows that do not depend on each other, from nothing.

    What it makes them of has no row axes.
    """
    if equation.primitive.name not in MAKERS:
        return False
    return plan(equation, [False] * len(equation.invars), row_axes) is not None


def _later(axes: Sequence[int], count: int) -> tuple[int, ...]:
    """Axes that come after those of rows, once these are one."""
    return tuple(axis - count + 1 for axis in axes)


def _elementwise(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    """Operands have the shape of the results, but may have axes of 1, or none."""
    shapes = {type_of(result).shape for result in equation.outvars}
    if len(shapes) != 1:
        return None
    [shape] = shapes
    axes = shape[:count]
    needed = []
    for atom, row in zip(equation.invars, by_row, strict=True):
        operand = type_of(atom).shape
        first = operand[:count]
        if row and first != axes:
            return None
        needed.append(first == axes != () or math.prod(first) != 1)
    if len(axes) < count and any(needed):
        return None
    return Plan(equation, needed, row_axes=count)


def _broadcast_in_dim(
    equation: Equation, by_row: list[bool], count: int
) -> Plan | None:
    shape, before = equation.params["shape"], type_of(equation.invars[0]).shape
    axes = tuple(equation.params["broadcast_dimensions"])
    has_rows = axes[:count] == tuple(range(count)) and before[:count] == shape[:count]
    if len(shape) < count or by_row[0] != has_rows:
        return None
    on_rows = axes[:count] == tuple(range(count))
    if not on_rows and any(axis < count for axis in axes):
        return None
    needed = on_rows and (has_rows or math.prod(before[:count]) != 1)
    moved = (0, *_later(axes[count:], count)) if on_rows else _later(axes, count)
    return Plan(
        equation,
        [needed],
        lambda num_rows: {
            "shape": (num_rows, *shape[count:]),
            "broadcast_dimensions": moved,
        },
        count,
    )


def _of_axes(name: str) -> "Rule":
    """Operations along axes other than the rows', such as a row's sum."""

    def rule(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
        given = equation.params[name]
        is_one = np.ndim(given) == 0
        axes = (int(given),) if is_one else tuple(given)
        if any(axis < count for axis in axes):
            return None
        moved = _later(axes, count)
        new = moved[0] if is_one else moved
        needed = [any(by_row)] * len(by_row)
        return Plan(equation, needed, lambda _: {name: new}, count)

    return rule


def _dot_general(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    contracted, batch = equation.params["dimension_numbers"]
    rows = tuple(range(count))

    def moved(axes: Sequence[int]) -> tuple[int, ...]:
        return _later(axes, count)

    if tuple(batch[0][:count]) == tuple(batch[1][:count]) == rows:
        # Rows are a batch of products.
        numbers = (
            tuple(map(moved, contracted)),
            tuple((0, *moved(axes[count:])) for axes in batch),
        )
        needed = [True, True]
    else:
        if batch[0]:
            return None
        is_vector = len(contracted[0]) == len(shapes_of(equation)[0])
        if by_row[1] and not is_vector:
            return None  # the first axes would be those of the other operand
        if any(axis < count for axis in contracted[by_row.index(True)]):
            return None
        needed = by_row
        of_operands = zip(contracted, by_row, strict=True)
        numbers = (
            tuple(moved(axes) if row else tuple(axes) for axes, row in of_operands),
            ((), ()),
        )
    return Plan(equation, needed, lambda _: {"dimension_numbers": numbers}, count)


def _iota(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    """Indices of columns."""
    shape, axis = equation.params["shape"], equation.params["dimension"]
    if axis < count:
        return None
    return Plan(
        equation,
        by_row,
        lambda num_rows: {
            "shape": (num_rows, *shape[count:]),
            "dimension": axis - count + 1,
        },
        count,
    )


def _random_bits(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    """Bits of one key for all rows, or of a key for each."""
    shape, [keys] = equation.params["shape"], shapes_of(equation)
    if keys:
        return Plan(equation, by_row, row_axes=count) if by_row[0] else None
    if len(shape) < count:
        return None
    return Plan(
        equation, by_row, lambda num_rows: {"shape": (num_rows, *shape[count:])}, count
    )


def _reshape(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    shape, before = equation.params["new_sizes"], shapes_of(equation)[0]
    if equation.params["dimensions"] is not None or shape[:count] != before[:count]:
        return None
    return Plan(
        equation,
        by_row,
        lambda num_rows: {"new_sizes": (num_rows, *shape[count:])},
        count,
    )


def _slice(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    strides, [shape] = equation.params["strides"], shapes_of(equation)
    steps = tuple(strides or [1] * len(shape))
    if any(start[:count]) or limit[:count] != shape[:count]:
        return None
    if any(step != 1 for step in steps[:count]):
        return None
    return Plan(
        equation,
        by_row,
        lambda num_rows: {
            "start_indices": (0, *start[count:]),
            "limit_indices": (num_rows, *limit[count:]),
            "strides": strides and (1, *steps[count:]),
        },
        count,
    )


def _pad(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    """Columns beside those of the first operand; the second is one number."""
    config = tuple(equation.params["padding_config"])
    if any(any(sizes) for sizes in config[:count]):
        return None
    moved = ((0, 0, 0), *config[count:])
    return Plan(equation, by_row, lambda _: {"padding_config": moved}, count)


def _tile(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    repeats = tuple(equation.params["reps"])
    if any(times != 1 for times in repeats[:count]):
        return None
    moved = (1, *repeats[count:])
    return Plan(equation, by_row, lambda _: {"reps": moved}, count)


def _top_k(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    last = len(shapes_of(equation)[0]) - 1
    axis = equation.params.get("axis", last)
    if axis < count:
        return None
    moved = {"axis": axis - count + 1} if "axis" in equation.params else {}
    return Plan(equation, by_row, lambda _: moved, count)


def _transpose(equation: Equation, by_row: list[bool], count: int) -> Plan | None:
    permutation = tuple(equation.params["permutation"])
    if permutation[:count] != tuple(range(count)):
        return None
    moved = (0, *_later(permutation[count:], count))
    return Plan(equation, by_row, lambda _: {"permutation": moved}, count)


Rule = Callable[[Equation, list[bool], int], Plan | None]

RULES: dict[str, Rule] = {
    **dict.fromkeys(("reduce_sum", "reduce_prod", "reduce_max"), _of_axes("axes")),
    **dict.fromkeys(("reduce_min", "reduce_and", "reduce_or"), _of_axes("axes")),
    **dict.fromkeys(("reduce_xor", "argmax", "argmin"), _of_axes("axes")),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin"), _of_axes("axis")),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _of_axes("dimension"),
    "cumlogsumexp": _of_axes("axis"),
    "dot_general": _dot_general,
    "iota": _iota,
    "pad": _pad,
    "random_bits": _random_bits,
    "reshape": _reshape,
    "rev": _of_axes("dimensions"),
    "slice": _slice,
    "sort": _of_axes("dimension"),
    "split": _of_axes("axis"),
    "squeeze": _of_axes("dimensions"),
    "stack": _of_axes("axis"),
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
}
