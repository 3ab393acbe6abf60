"""Running a traced program with something added to every row that it looks up.

What is added are zeros: their gradients are those of the rows. The program otherwise
computes what it did, and its equations keep their places, policies and rules.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from monolith_optax._rows.gradients import row_images
from monolith_optax._rows.gradients.find_lookups import LOOKUPS
from monolith_optax._rows.gradients.look_up import look_up, run_rule
from monolith_optax._rows.gradients.lookup_tree import (
    Found,
    Inside,
    Tree,
    device_axes,
    for_each,
)
from monolith_optax._rows.gradients.row_images import Leaf, is_image, leaves_of, whole
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program

# For each lookup of a tree, its zeros or its ids: one array for each of its tables.
Arrays = list[Any]


def add(
    program: Program,
    operands: Sequence[Any],
    tree: Tree,
    zeros: Arrays,
    num_rows: frozenset[int],
) -> tuple[list[Any], Arrays]:
    """Runs a program with zeros added to what it looks up.

    Args:
      program: the program.
      operands: its operands; tables are `Leaf`s.
      tree: the lookups that were found in it.
      zeros: what to add to their rows.
      num_rows: the numbers of rows that tables have.

    Returns:
      The results, and for each lookup the ids of its rows.
    """
    lookups_left: Iterator[Any] = iter(zip(tree, zeros, strict=True))
    ids: Arrays = []

    def step(equation: Equation, operands: list[Any]) -> Sequence[Any]:
        tracked = leaves_of(operands)
        if (
            tracked
            or any(map(is_image, operands))
            or row_images.made(equation, num_rows)
        ):
            results = row_images.mapped(equation, operands)
            if results is not None:
                return results
        if not tracked:
            return jaxprs.bind(equation, list(map(whole, operands)))
        node, added = next(lookups_left)
        name = str(equation.primitive.name)
        if name in LOOKUPS:
            results, looked_up = look_up(equation, operands, node, added)
        elif name in jaxprs.CALLS - jaxprs.CHECKPOINTS:
            called = jaxprs.called_program(equation)
            assert called is not None
            results, looked_up = add(called, operands, node.tree, added, num_rows)
        elif name in jaxprs.CUSTOM_DERIVATIVES:
            results, looked_up = run_rule(equation, operands, node.tree, added)
        else:
            operands = [v if leaves_of([v]) else whole(v) for v in operands]
            run = _BODIES[name]
            results, looked_up = run(equation, operands, node, added, num_rows)
        ids.append(looked_up)
        return results

    return jaxprs.interpret(program, operands, step, lambda constant: constant), ids


def _checkpoint(
    equation: Equation, operands: list[Any], node: Inside, zeros: Arrays, num_rows: Any
) -> tuple[list[Any], Arrays]:
    called = jaxprs.called_program(equation)
    assert called is not None
    leaving: list[Any] = []

    def body(arrays: list[Any], zeros: Arrays) -> Any:
        values = _with_tables(arrays, operands)
        results, ids = add(called, values, node.tree, zeros, num_rows)
        leaving[:] = results
        return _without_tables(results), ids

    body = jax.checkpoint(
        body,
        prevent_cse=equation.params["prevent_cse"],
        policy=equation.params["policy"],
    )
    results, ids = body(_without_tables(operands), zeros)
    return _with_tables(results, leaving), ids


def _cond(
    equation: Equation, operands: list[Any], node: Inside, zeros: Arrays, num_rows: Any
) -> tuple[list[Any], Arrays]:
    index, *operands = operands
    programs = jaxprs.branches(equation)

    def branch(which: int) -> Any:
        def run(arrays: list[Any], zeros: Arrays) -> Any:
            values = _with_tables(arrays, operands)
            results, ids = add(
                programs[which], values, node.tree[which], zeros[which], num_rows
            )
            padding = [_padding(tree) for tree in node.tree]
            padding[which] = ids
            return list(map(whole, results)), padding

        return run

    run = [branch(which) for which in range(len(programs))]
    results, ids = lax.switch(index, run, _without_tables(operands), zeros)
    return results, ids


def _scan(
    equation: Equation, operands: list[Any], node: Inside, zeros: Arrays, num_rows: Any
) -> tuple[list[Any], Arrays]:
    parts, params = jaxprs.scan_parts(equation), equation.params
    end = parts.num_consts + parts.num_carry
    constants, carry = operands[: parts.num_consts], operands[parts.num_consts : end]

    def body(carry: list[Any], inputs: Any) -> Any:
        slices, zeros = inputs
        values = [*constants, *carry, *slices]
        results, ids = add(parts.body, values, node.tree, zeros, num_rows)
        results = list(map(whole, results))
        return results[: parts.num_carry], (results[parts.num_carry :], ids)

    carry, (results, ids) = lax.scan(
        body,
        carry,
        (operands[end:], zeros),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *results], ids


def _while(
    equation: Equation, operands: list[Any], node: Inside, zeros: Arrays, num_rows: Any
) -> tuple[list[Any], Arrays]:
    loop = jaxprs.while_parts(equation)
    end = loop.num_condition_consts + loop.num_body_consts
    constants = (
        operands[: loop.num_condition_consts],
        operands[loop.num_condition_consts : end],
    )

    def run(which: int, program: Program, carry: list[Any]) -> list[Any]:
        values = [*constants[which], *carry]
        results, _ = add(program, values, node.tree[which], zeros[which], num_rows)
        return list(map(whole, results))

    results = lax.while_loop(
        lambda carry: run(0, loop.condition, carry)[0],
        lambda carry: run(1, loop.body, carry),
        operands[end:],
    )
    return results, list(map(_padding, node.tree))


def _shard_map(
    equation: Equation, operands: list[Any], node: Inside, zeros: Arrays, num_rows: Any
) -> tuple[list[Any], Arrays]:
    parts = jaxprs.shard_map_parts(equation)

    def first_axis(found: Found) -> list[PartitionSpec]:
        return [PartitionSpec(device_axes(parts, found))] * len(found.leaves)

    first = for_each(node.tree, first_axis)

    def body(arrays: list[Any], zeros: Arrays) -> Any:
        values = [
            Leaf(value.index, array, _first_row(spec, array))
            if is_image(value)
            else array
            for value, array, spec in zip(operands, arrays, parts.in_specs, strict=True)
        ]
        zeros = jax.tree.map(lambda array: array[0], zeros)
        results, ids = add(parts.body, values, node.tree, zeros, num_rows)
        return list(map(whole, results)), jax.tree.map(lambda array: array[None], ids)

    run = jax.shard_map(
        body,
        mesh=parts.mesh,
        in_specs=(list(parts.in_specs), first),
        out_specs=(list(parts.out_specs), first),
        axis_names=parts.axes,
        check_vma=parts.check_vma,
    )
    results, ids = run(list(map(whole, operands)), zeros)
    return results, ids


def _first_row(spec: PartitionSpec, array: jax.Array) -> Any:
    """The row of a table with which a device's part of it begins."""
    if not len(spec) or spec[0] is None:
        return 0
    return lax.axis_index(spec[0]) * len(array)


def _padding(tree: Tree) -> Arrays:
    """Ids of no rows, for lookups that are not done."""

    def ids(found: Found) -> Any:
        padding = jnp.full(found.ids_shape, -1, found.lookup.ids_dtype)
        return [jaxprs.as_varying(padding, found.varying)] * len(found.leaves)

    return for_each(tree, ids)


def _without_tables(values: Sequence[Any]) -> list[Any]:
    return [None if leaves_of([value]) else whole(value) for value in values]


def _with_tables(arrays: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    return [
        value if leaves_of([value]) else array
        for array, value in zip(arrays, values, strict=True)
    ]


_BODIES = {
    **dict.fromkeys(jaxprs.CHECKPOINTS, _checkpoint),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
}
