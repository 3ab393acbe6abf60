"""Operations that keep the rows of a table apart.

A rule says how to apply an equation to other numbers of rows than those of its arrays:
to the rows of a batch, or to a single one. Row axes are the first ones throughout.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from monolith_optax._rows.programs.jaxprs import Equation, bind, type_of
from monolith_optax._shardings import without_row_axis


class Plan(NamedTuple):
    """How to apply an equation to some rows.

    Attributes:
      equation: the equation.
      by_row: which operands must have a row axis; the others are whole.
      sizes: the parameters that speak of the number of rows, for such a number.
    """

    equation: Equation
    by_row: list[bool]
    sizes: Callable[[int], dict[str, Any]] = lambda _: {}

    def apply(self, num_rows: int, operands: Sequence[Any]) -> list[Any]:
        """The rows of the results, for as many rows of the operands."""
        # Shardings in a program are those of whole tables, rows of a batch have none.
        shardings = {
            name: without_row_axis(self.equation.params[name])
            for name in ("sharding", "out_sharding", "dst_sharding")
            if self.equation.params.get(name) is not None
        }
        return bind(self.equation, operands, **shardings | self.sizes(num_rows))


def plan(equation: Equation, by_row: Sequence[bool]) -> Plan | None:
    """How to apply an equation whose operands have row axes, unless it mixes rows.

    Args:
      equation: the equation.
      by_row: which operands have a row axis. None need have one if the equation
        makes rows that do not depend on each other, like a broadcast.
    """
    name = str(equation.primitive.name)
    if name in ELEMENTWISE:
        return _elementwise(equation, list(by_row))
    return RULES[name](equation, list(by_row)) if name in RULES else None


def needs_no_rows(equation: Equation) -> bool:
    """Whether an equation with a plan also has one for operands without rows."""
    makes_rows = ("broadcast_in_dim", "iota", "random_bits")
    return equation.primitive.name in ELEMENTWISE.union(makes_rows)


ELEMENTWISE = frozenset(
    {"abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"}
    | {"atanh", "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil"}
    | {"clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p"}
    | {"cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2"}
    | {"expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag"}
    | {"integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic"}
    | {"lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not", "or"}
    | {"one_minus_square", "optimization_barrier", "pcast", "polygamma", "polynomial"}
    | {"population_count", "pow", "pvary", "real", "reduce_precision", "rem", "reshard"}
    | {"round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic", "sign"}
    | {"shift_right_logical", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub"}
    | {"tan", "tanh", "xor", "zeta"}
)


def _shapes(equation: Equation) -> list[tuple[int, ...]]:
    return [type_of(operand).shape for operand in equation.invars]


def _elementwise(equation: Equation, by_row: list[bool]) -> Plan | None:
    """Operands have the shape of the results, but may have axes of 1, or none."""
    shapes = {type_of(result).shape for result in equation.outvars}
    if len(shapes) != 1:
        return None
    [shape] = shapes
    for operand in filter(None, _shapes(equation)):
        if any(a not in (1, b) for a, b in zip(operand, shape, strict=False)):
            return None
    needed = [bool(operand) and operand[0] == shape[0] for operand in _shapes(equation)]
    return Plan(equation, needed) if _all_in(by_row, needed) else None


def _all_in(by_row: list[bool], needed: list[bool]) -> bool:
    return all(need or not row for row, need in zip(by_row, needed, strict=True))


def _along_columns(equation: Equation, by_row: list[bool]) -> Plan | None:
    """Reductions of each row by itself."""
    return None if 0 in equation.params["axes"] else Plan(equation, by_row)


def _broadcast_in_dim(equation: Equation, by_row: list[bool]) -> Plan | None:
    shape = equation.params["shape"]
    axes = equation.params["broadcast_dimensions"]
    from_rows = bool(axes) and axes[0] == 0 and _shapes(equation)[0][0] == shape[0]
    if not shape or by_row[0] != from_rows:
        return None
    return Plan(equation, by_row, lambda num_rows: {"shape": (num_rows, *shape[1:])})


def _concatenate(equation: Equation, by_row: list[bool]) -> Plan | None:
    if equation.params["dimension"] == 0:
        return None
    return Plan(equation, [True] * len(by_row))


def _dot_general(equation: Equation, by_row: list[bool]) -> Plan | None:
    contracted, batch = equation.params["dimension_numbers"]
    if batch[0] and batch[0][0] == batch[1][0] == 0:  # rows are a batch of products
        return Plan(equation, [True, True])
    if batch[0] or all(by_row) or not any(by_row):
        return None
    is_vector = len(contracted[0]) == len(_shapes(equation)[0])
    if by_row[1] and not is_vector:
        return None  # the first axes would be those of the other operand
    return None if 0 in contracted[by_row.index(True)] else Plan(equation, by_row)


def _made(equation: Equation, by_row: list[bool]) -> Plan | None:
    """Numbers that come from nowhere: random bits, and indices of columns."""
    shape = equation.params["shape"]
    if any(by_row) or not shape or equation.params.get("dimension") == 0:
        return None
    return Plan(equation, by_row, lambda num_rows: {"shape": (num_rows, *shape[1:])})


def _reshape(equation: Equation, by_row: list[bool]) -> Plan | None:
    shape, [before] = equation.params["new_sizes"], _shapes(equation)
    if not shape or shape[0] != before[0] or equation.params["dimensions"] is not None:
        return None
    return Plan(
        equation, by_row, lambda num_rows: {"new_sizes": (num_rows, *shape[1:])}
    )


def _slice(equation: Equation, by_row: list[bool]) -> Plan | None:
    start, limit = equation.params["start_indices"], equation.params["limit_indices"]
    strides, [shape] = equation.params["strides"], _shapes(equation)
    if start[0] != 0 or limit[0] != shape[0] or (strides and strides[0] != 1):
        return None
    return Plan(
        equation, by_row, lambda num_rows: {"limit_indices": (num_rows, *limit[1:])}
    )


def _squeeze(equation: Equation, by_row: list[bool]) -> Plan | None:
    return None if 0 in equation.params["dimensions"] else Plan(equation, by_row)


def _transpose(equation: Equation, by_row: list[bool]) -> Plan | None:
    kept = equation.params["permutation"][:1] == (0,)
    return Plan(equation, by_row) if kept else None


RULES: dict[str, Callable[[Equation, list[bool]], Plan | None]] = {
    **dict.fromkeys(("reduce_sum", "reduce_prod", "reduce_max"), _along_columns),
    **dict.fromkeys(("reduce_min", "reduce_and", "reduce_or"), _along_columns),
    **dict.fromkeys(("reduce_xor", "argmax", "argmin"), _along_columns),
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "iota": _made,
    "random_bits": _made,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
