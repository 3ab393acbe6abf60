"""Loops and conditionals given tables (`constructs.py` says what that means)."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from monolith_optax._rows.gradients.lookup_tree import (
    Arrays,
    Each,
    Found,
    Node,
    Tree,
    for_each,
)
from monolith_optax._rows.gradients.row_images import (
    is_data,
    which_tables,
    without_other_images,
)
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program


class Cond:
    """A choice between programs."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        what = f"is an index of {finder.place(equation)}"
        taken = finder.otherwise(equation, operands, [0], what)
        index, *operands = without_other_images(operands)
        trees, results = [], [[is_data(index)] * len(equation.outvars)]
        for branch in jaxprs.branches(equation):

            def find(branch: Program = branch) -> Any:
                active = finder.active(equation)
                found, tree = finder.program(branch, operands, active)
                finder.results(branch, found, active, tree, equation)
                return list(map(is_data, found)), tree

            found, tree = finder.inside(equation, find)
            results.append(found)
            trees.append(tree)
        images = frozenset(i + 1 for i in which_tables(operands))
        together = list(map(any, zip(*results, strict=True)))
        return together, Node(taken, programs=trees, images=images)

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        index, *operands = operands
        images = {i - 1: operands[i - 1] for i in node.images if i}
        padding = [_padding(tree) for tree in node.programs]

        def branch(which: int, program: Program) -> Any:
            def run_branch(arrays: list[Any], zeros: list[Arrays]) -> Any:
                values = [images.get(i, array) for i, array in enumerate(arrays)]
                tree = node.programs[which]
                results, ids = run.inside(program, values, tree, zeros[which])
                return results, [*padding[:which], ids, *padding[which + 1 :]]

            return run_branch

        arrays = [None if i in images else v for i, v in enumerate(operands)]
        branches = [branch(*each) for each in enumerate(jaxprs.branches(equation))]
        results, ids = lax.switch(index, branches, arrays, zeros.programs)
        return results, Each({}, [], ids)


class Scan:
    """A loop whose length is known."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        body, num_consts, num_carry = jaxprs.scan_parts(equation)
        end = num_consts + num_carry
        operands, taken = _with_constants(finder, equation, operands, num_consts)
        active = finder.flow.of_scan(equation, finder.active(equation))
        results, tree = finder.inside(
            equation,
            lambda: _loop(
                finder, equation, body, operands, slice(num_consts, end), active
            ),
        )
        length = equation.params["length"]
        node = Node(
            taken,
            programs=[tree],
            images=which_tables(operands),
            all_runs=lambda found: found.stacked(length),
        )
        return results, node

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        body, num_consts, num_carry = jaxprs.scan_parts(equation)
        params, end = equation.params, num_consts + num_carry
        constants, carry = operands[:num_consts], operands[num_consts:end]

        def step(carry: list[Any], inputs: Any) -> Any:
            slices, zeros = inputs
            values = [*constants, *carry, *slices]
            results, ids = run.inside(body, values, node.programs[0], zeros)
            return results[:num_carry], (results[num_carry:], ids)

        carry, (results, ids) = lax.scan(
            step,
            carry,
            (operands[end:], zeros.programs[0]),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *results], Each({}, [], [ids])


class While:
    """A loop whose length is not known. JAX takes no gradient through it."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        loop = jaxprs.while_parts(equation)
        start = loop.num_condition_consts
        end = start + loop.num_body_consts
        operands, taken = _with_constants(finder, equation, operands, end)
        active = [any(finder.active(equation))] * len(equation.outvars)

        def find() -> Any:
            carry = slice(loop.num_body_consts, len(operands) - start)
            results, body = _loop(
                finder, equation, loop.body, operands[start:], carry, active
            )
            given = operands[:start] + results
            _, condition = finder.program(loop.condition, given, [False])
            return results, [condition, body]

        results, trees = finder.inside(equation, find)
        node = Node(
            taken,
            programs=trees,
            images=which_tables(operands),
            # JAX says where a gradient is asked for that there is none.
            all_runs=lambda found: found._replace(has_gradient=False),
        )
        return results, node

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        loop = jaxprs.while_parts(equation)
        start = loop.num_condition_consts
        end = start + loop.num_body_consts
        constants = operands[:start], operands[start:end]

        def of(which: int, program: Program) -> Callable[[list[Any]], list[Any]]:
            def run_once(carry: list[Any]) -> list[Any]:
                values = [*constants[which], *carry]
                tree, added = node.programs[which], zeros.programs[which]
                results: list[Any] = run.inside(program, values, tree, added)[0]
                return results

            return run_once

        condition, body = of(0, loop.condition), of(1, loop.body)
        results = lax.while_loop(
            lambda carry: condition(carry)[0], body, operands[end:]
        )
        return results, Each({}, [], list(map(_padding, node.programs)))


def _with_constants(
    finder: Any, equation: Equation, operands: list[Any], num_consts: int
) -> tuple[list[Any], Any]:
    """Operands of a loop; only its constants are images of tables."""
    what = f"changes in {finder.place(equation)}"
    changing = range(num_consts, len(operands))
    taken = finder.otherwise(equation, operands, changing, what)
    constants = without_other_images(operands[:num_consts])
    return [*constants, *map(is_data, operands[num_consts:])], taken


def _loop(
    finder: Any,
    equation: Equation,
    body: Program,
    operands: list[Any],
    carry: slice,
    active: list[bool],
) -> tuple[list[Any], Tree]:
    """A body whose carry is the same before and after it."""
    operands = list(operands)
    while True:
        notes = finder.notes()
        results, tree = finder.program(body, operands, active)
        finder.results(body, results, active, tree, equation)
        results = list(map(is_data, results))
        before = operands[carry]
        after = results[: len(before)]
        joined = [a or b for a, b in zip(before, after, strict=True)]
        if joined == before:
            return results, tree
        finder.restore(notes)
        operands[carry] = joined


def _padding(tree: Tree) -> Arrays:
    """Ids of no rows, for lookups that are not done."""

    def ids(found: Found) -> Any:
        padding = jnp.full(found.ids_shape, -1, found.ids_dtype)
        return [jaxprs.as_varying(padding, found.varying)] * len(found.tables)

    return for_each(tree, ids)
