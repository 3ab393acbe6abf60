"""Which equations keep the rows of images apart, and how rows then follow.

`follow` decides it from what is known of images. A way, one for each kind of
equation, gives the rows of a result where they are looked up.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp

from monolith_optax._rows.gradients import as_gather, row_maps
from monolith_optax._rows.gradients.image_facts import (
    VARYING,
    Facts,
    Known,
    Number,
    Source,
    is_data,
    is_table,
    leaves_of,
)
from monolith_optax._rows.gradients.linear_rules import check_rule
from monolith_optax._rows.gradients.row_images import Way
from monolith_optax._rows.gradients.ways import (
    Changed,
    Concatenated,
    Moved,
    Planned,
    Ruled,
    Turned,
)
from monolith_optax._rows.programs import jaxprs, row_rules
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of
from monolith_optax._rows.programs.primitives import HINTS
from monolith_optax._rows.programs.row_values import MixesRowsError


class Step(NamedTuple):
    """How a result follows, and what is known of it; no way if it is its operand.

    Of results that are operands the facts are those of the operands themselves.
    """

    way: Way | None
    facts: Facts


Steps = list[Step]


def follow(equation: Equation, values: Sequence[Known]) -> Steps | None:
    """How the results are images, or None if an equation does not keep rows apart.

    Operands that are images are known by what they are, and of others all that is
    known is whether they are data.
    """
    images = [value for value in values if isinstance(value, Facts)]
    if not all(image.usable for image in images):
        return None
    name, [first, *_] = str(equation.primitive.name), values
    if name in PLACEMENTS and isinstance(first, Facts) and first.is_leaf:
        return [Step(None, first)]
    if name in HINTS and len(images) == len(values):
        return [Step(None, image) for image in images]
    way = _way(equation, values)
    facts = _combined(equation, values) if way else None
    if facts:
        return [Step(way, replace(facts)) for _ in equation.outvars]
    return _moved(equation, values) or _turned(equation, values)


def from_nothing(equation: Equation, num_rows: frozenset[int]) -> Steps | None:
    """How an equation makes as many rows as a table has, from nothing as large."""
    if not row_rules.makes_rows(equation) or _is_random(equation):
        return None
    shape = type_of(equation.outvars[0]).shape
    if not shape or shape[0] not in num_rows:
        return None
    plan = row_rules.plan(equation, [False] * len(equation.invars))
    if plan is None:
        return None
    facts = Facts(frozenset(), (len(shape) - 1, len(shape) - 1), is_data=False)
    return [Step(Planned(plan), facts)]


def _is_random(equation: Equation) -> bool:
    """Whether some rows of what an equation makes depend on the other rows."""
    return bool(equation.primitive.name == "random_bits")


PLACEMENTS = ("sharding_constraint", "reshard", *VARYING)


def _way(equation: Equation, values: Sequence[Known]) -> Way | None:
    if equation.primitive.name in jaxprs.CUSTOM_DERIVATIVES:
        if not _rule_keeps_rows(equation, values):
            return None
        return Ruled(tuple(map(is_table, values)))
    if equation.primitive.name in as_gather.CHANGES:
        only_first = isinstance(values[0], Facts) and not leaves_of(values[1:])
        row = as_gather.changed_row(equation) if only_first else None
        return Changed(row) if row else None
    if _is_concatenation(equation):
        return Concatenated()
    by_row = list(map(is_table, values))
    if not any(by_row):
        by_row = [isinstance(value, Facts) for value in values]
    plan = row_rules.plan(equation, by_row)
    return Planned(plan) if plan else None


def _is_concatenation(equation: Equation) -> bool:
    """Whether an equation puts rows after one another."""
    name = equation.primitive.name
    return bool(name == "concatenate" and equation.params["dimension"] == 0)


def _combined(equation: Equation, values: Sequence[Known]) -> Facts | None:
    """What is known of an image whose rows are made of those of all operands."""
    operands = list(zip(equation.invars, values, strict=True))
    shape = type_of(equation.outvars[0]).shape
    images = [value for value in values if isinstance(value, Facts)]
    entries_apart = equation.primitive.name in row_rules.ELEMENTWISE and all(
        type_of(atom).shape == (shape if isinstance(value, Facts) else ())
        for atom, value in operands
    )
    tables = [image for image in images if image.sources]
    sources: set[Source] = set()
    if entries_apart:
        lows, highs = zip(*(image.columns for image in images), strict=True)
        columns = max(lows), min(highs)
        if columns[0] > columns[1]:
            return None
        sources.update(*(image.sources for image in tables))
    else:  # a row for each index of the first axis
        columns = (len(shape) - 1,) * 2
        first_row, together = 0, _is_concatenation(equation)
        for atom, value in operands:
            if is_table(value):
                low, high = value.columns
                count = len(type_of(atom).shape) - 1
                if not low <= count == high:
                    return None  # more of its axes are rows, or it is a single one
                sources |= {_fixed(each, count, first_row) for each in value.sources}
            if together:
                first_row += type_of(atom).shape[0]
    if len(sources) > len({source.leaf for source in sources}):
        return None  # several rows of one table in one
    return Facts(
        frozenset(sources),
        columns,
        is_data=any(map(is_data, values)),
        detached=_is_cut(equation)
        or (bool(tables) and all(image.detached for image in tables)),
    )


def _is_cut(equation: Equation) -> bool:
    if equation.primitive.name == "stop_gradient":
        return True
    types = [type_of(out).dtype for out in equation.outvars]
    return not any(jnp.issubdtype(dtype, jnp.inexact) for dtype in types)


def _fixed(source: Source, columns: int, first_row: int) -> Source:
    """A source of an image whose other axes are columns from now on."""
    path = (*source.path, first_row) if first_row else source.path
    return source._replace(row_axes=source.rows_with(columns), path=path)


def _moved(equation: Equation, values: Sequence[Known]) -> Steps | None:
    """Steps for rows that are only taken, by slices or into another shape."""
    facts, *others = values
    if not isinstance(facts, Facts) or any(isinstance(v, Facts) for v in others):
        return None
    starts = [value.value() for value in others if isinstance(value, Number)]
    steps = []
    for index in range(len(equation.outvars)):
        known = starts if len(starts) == len(others) else None
        row_map = row_maps.row_map(equation, index, known)
        if row_map is None:
            return None
        low, before = facts.columns
        high = min(before, row_map.columns)
        if high < low or 0 == high < before:
            return None
        sources = frozenset(
            source._replace(
                path=(*source.path, row_map),
                partial=source.partial or not row_map.takes_all,
            )
            for source in facts.sources
        )
        moved = replace(facts, sources=sources, columns=(low, high), is_leaf=False)
        steps.append(Step(Moved(row_map), moved))
    return steps


def _turned(equation: Equation, values: Sequence[Known]) -> Steps | None:
    """An image, with nothing known except where it comes from."""
    facts = values[0]
    if equation.primitive.name != "transpose" or not is_table(facts) or facts.partial:
        return None
    return [Step(Turned(), replace(facts, usable=False, is_leaf=False))]


def _rule_keeps_rows(equation: Equation, values: Sequence[Known]) -> bool:
    [program] = jaxprs.programs_of(equation)
    tables = [i for i, value in enumerate(values) if is_table(value)]
    if any(type_of(equation.invars[i]).shape == () for i in tables):
        return False
    results = _results(program, values)
    return (
        results is not None
        and all(map(is_table, results))
        and check_rule(equation, values)
    )


def _results(program: Program, operands: Sequence[Known]) -> list[Known] | None:
    """What a program makes of images, or None if it does not keep rows apart."""

    def step(equation: Equation, operands: list[Known]) -> Sequence[Known]:
        if not any(map(is_table, operands)):
            return [True] * len(equation.outvars)
        name = equation.primitive.name
        results: list[Known] | None = None
        if name in jaxprs.CALLS:
            [called] = jaxprs.programs_of(equation)
            results = _results(called, operands)
        else:
            facts = _combined(equation, operands) if _way(equation, operands) else None
            results = [facts] * len(equation.outvars) if facts else None
        if not results or _is_concatenation(equation) or name in as_gather.CHANGES:
            raise MixesRowsError("mixes rows", equation)
        return results

    try:
        return jaxprs.interpret(program, operands, step, lambda _: True)
    except MixesRowsError:
        return None
