"""Loops and conditionals given tables (`constructs.py` says what that means)."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from monolith_optax._rows.gradients.add_zeros import Run
from monolith_optax._rows.gradients.find_lookups import Finder
from monolith_optax._rows.gradients.image_facts import (
    Known,
    is_data,
    which_tables,
    without_other_images,
)
from monolith_optax._rows.gradients.lookup_tree import (
    Arrays,
    Each,
    EachOf,
    Found,
    Ids,
    Node,
    Tree,
    Zeros,
    for_each,
)
from monolith_optax._rows.gradients.row_images import Value, Values
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program
from monolith_optax._rows.programs.varying import as_varying

# The results of a branch, and the ids of the rows that each branch looks up.
Branch: TypeAlias = tuple[Arrays, list[EachOf[Arrays]]]


class Cond:
    """A choice between programs."""

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        what = f"is an index of {finder.place(equation)}"
        taken = finder.otherwise(equation, operands, {0: what})
        index, *operands = without_other_images(operands)
        trees, results = [], [[is_data(index)] * len(equation.outvars)]
        active = finder.active(equation)
        with finder.inside(equation):
            for branch in jaxprs.branches(equation):
                found, tree = finder.whole(equation, branch, operands, active)
                results.append(found)
                trees.append(tree)
        images = frozenset(i + 1 for i in which_tables(operands))
        together = list(map(any, zip(*results, strict=True)))
        return together, Node(taken, programs=trees, images=images)

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        index, *operands = operands
        arrays, all_of = apart(run, operands, [i - 1 for i in node.images])
        padding = [_padding(tree) for tree in node.programs]

        def branch(which: int, program: Program) -> Callable[..., Branch]:
            def run_branch(
                arrays: dict[int, jax.Array], zeros: list[EachOf[Arrays]]
            ) -> Branch:
                values, tree = all_of(arrays), node.programs[which]
                results, ids = run.inside(program, values, tree, zeros[which])
                return results, [*padding[:which], ids, *padding[which + 1 :]]

            return run_branch

        branches = [branch(*each) for each in enumerate(jaxprs.branches(equation))]
        results, ids = lax.switch(index, branches, arrays, zeros.programs)
        return results, Each({}, [], ids)


class Scan:
    """A loop whose length is known."""

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        body, num_consts, num_carry = jaxprs.scan_parts(equation)
        end = num_consts + num_carry
        operands, taken = _with_constants(finder, equation, operands, num_consts)
        active = finder.flow.of_scan(equation, finder.active(equation))
        carry = slice(num_consts, end)
        with finder.inside(equation):
            results, tree = _loop(finder, equation, body, operands, carry, active)
        length = equation.params["length"]
        node = Node(
            taken,
            programs=[tree],
            images=which_tables(operands),
            all_runs=lambda found: found.stacked(length),
        )
        return results, node

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        body, num_consts, num_carry = jaxprs.scan_parts(equation)
        params, end = equation.params, num_consts + num_carry
        constants, whole = operands[:num_consts], run.scope.whole

        def step(
            carry: Arrays, inputs: tuple[Arrays, EachOf[Arrays]]
        ) -> tuple[Arrays, tuple[Arrays, EachOf[Arrays]]]:
            slices, zeros = inputs
            values = [*constants, *carry, *slices]
            results, ids = run.inside(body, values, node.programs[0], zeros)
            return results[:num_carry], (results[num_carry:], ids)

        carry, (results, ids) = lax.scan(
            step,
            list(map(whole, operands[num_consts:end])),
            (list(map(whole, operands[end:])), zeros.programs[0]),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *results], Each({}, [], [ids])


class While:
    """A loop whose length is not known. JAX takes no gradient through it."""

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        loop = jaxprs.while_parts(equation)
        start = loop.num_condition_consts
        end = start + loop.num_body_consts
        operands, taken = _with_constants(finder, equation, operands, end)
        active = [any(finder.active(equation))] * len(equation.outvars)

        carry, given = slice(loop.num_body_consts, None), operands[start:]
        with finder.inside(equation):
            results, body = _loop(finder, equation, loop.body, given, carry, active)
            given = [*operands[:start], *results]
            _, condition = finder.program(loop.condition, given, [False])
        node = Node(
            taken,
            programs=[condition, body],
            images=which_tables(operands),
            # JAX says where a gradient is asked for that there is none.
            all_runs=lambda found: found._replace(has_gradient=False),
        )
        return results, node

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        loop = jaxprs.while_parts(equation)
        start = loop.num_condition_consts
        end = start + loop.num_body_consts
        constants = operands[:start], operands[start:end]

        def of(which: int, program: Program) -> Callable[[Arrays], Arrays]:
            def run_once(carry: Arrays) -> Arrays:
                values = [*constants[which], *carry]
                tree, added = node.programs[which], zeros.programs[which]
                return run.inside(program, values, tree, added)[0]

            return run_once

        carry = list(map(run.scope.whole, operands[end:]))
        condition, body = of(0, loop.condition), of(1, loop.body)
        results = lax.while_loop(lambda carry: condition(carry)[0], body, carry)
        return results, Each({}, [], list(map(_padding, node.programs)))


def _with_constants(
    finder: Finder, equation: Equation, operands: list[Known], num_consts: int
) -> tuple[list[Known], dict[int, Found]]:
    """Operands of a loop; only its constants are images of tables."""
    what = f"changes in {finder.place(equation)}"
    changing = dict.fromkeys(range(num_consts, len(operands)), what)
    taken = finder.otherwise(equation, operands, changing)
    constants = without_other_images(operands[:num_consts])
    return [*constants, *map(is_data, operands[num_consts:])], taken


def _loop(
    finder: Finder,
    equation: Equation,
    body: Program,
    operands: list[Known],
    carry: slice,
    active: list[bool],
) -> tuple[list[bool], Tree]:
    """A body whose carry is the same before and after it."""
    operands = list(operands)
    while True:
        uses = finder.uses.copy()
        results, tree = finder.whole(equation, body, operands, active)
        before = operands[carry]
        after = results[: len(before)]
        joined = [a or b for a, b in zip(before, after, strict=True)]
        if joined == before:
            return results, tree
        finder.uses = uses
        operands[carry] = joined


def apart(
    run: Run, operands: Values, images: Collection[int]
) -> tuple[dict[int, jax.Array], Callable[[dict[int, jax.Array]], Values]]:
    """Operands that are arrays, and what puts such arrays back among the images."""

    def all_of(arrays: dict[int, jax.Array]) -> Values:
        return [arrays.get(i, operand) for i, operand in enumerate(operands)]

    arrays = {i: run.scope.whole(v) for i, v in enumerate(operands) if i not in images}
    return arrays, all_of


def _padding(tree: Tree) -> EachOf[Arrays]:
    """Ids of no rows, for lookups that are not done."""

    def ids(found: Found) -> Arrays:
        padding = jnp.full(found.ids_shape, -1, found.ids_dtype)
        return [as_varying(padding, found.varying)] * len(found.tables)

    return for_each(tree, ids)
