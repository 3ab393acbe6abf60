"""Running a traced program with something added to every row that it looks up.

What is added are zeros: their gradients are those of the rows. The program otherwise
computes what it did, and its equations keep their places, policies and rules.
"""

from collections.abc import Collection, Sequence
from typing import Any

from monolith_optax._rows.gradients import follow_rows
from monolith_optax._rows.gradients.constructs import CONSTRUCTS
from monolith_optax._rows.gradients.lookup_tree import (
    NO_IDS,
    RESULTS,
    Arrays,
    Each,
    Node,
    Tree,
)
from monolith_optax._rows.gradients.positions import Added
from monolith_optax._rows.gradients.row_images import Scope
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program, type_of


def add(
    program: Program, operands: Sequence[Any], tree: Tree, zeros: Arrays
) -> tuple[list[Any], Arrays]:
    """Runs a program with zeros added to what it looks up.

    Args:
      program: the program.
      operands: its operands; tables are `Parameter`s.
      tree: the lookups that were found in it.
      zeros: what to add to their rows.

    Returns:
      The results, and for each lookup the ids of its rows.
    """
    return Run().inside(program, operands, tree, zeros)


class Run:
    """A run of a program, which may call others.

    Attributes:
      scope: whole arrays that were made in it.
    """

    def __init__(self) -> None:
        self.scope = Scope()

    def inside(
        self,
        program: Program,
        operands: Sequence[Any],
        tree: Tree,
        zeros: Arrays,
        left_out: Collection[int] = (),
    ) -> tuple[list[Any], Arrays]:
        """Runs a program in a trace of its own; some results are None."""
        run = Run()
        results, ids = run.program(program, operands, tree, zeros)
        whole = [
            None if i in left_out else run.scope.whole(value)
            for i, value in enumerate(results)
        ]
        return whole, ids

    def program(
        self, program: Program, operands: Sequence[Any], tree: Tree, zeros: Arrays
    ) -> tuple[list[Any], Arrays]:
        """Runs a program whose results may be images."""
        ids: Arrays = {}
        equations = iter(range(len(program.jaxpr.eqns)))

        def step(equation: Equation, operands: list[Any]) -> Sequence[Any]:
            index = next(equations)
            node = tree.get(index)
            if node is None:
                return jaxprs.bind(equation, list(map(self.scope.whole, operands)))
            results, ids[index] = self._node(equation, operands, node, zeros[index])
            return results

        results = jaxprs.interpret(program, operands, step, lambda constant: constant)
        if RESULTS in tree:
            node, atoms = tree[RESULTS], program.jaxpr.outvars
            results, taken = self._taken(atoms, results, node, zeros[RESULTS])
            ids[RESULTS] = NO_IDS._replace(taken=taken)
        return results, ids

    def _node(
        self, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        operands, taken = self._taken(equation.invars, operands, node, zeros)
        operands = [
            value if i in node.images else self.scope.whole(value)
            for i, value in enumerate(operands)
        ]
        if node.steps:
            images = follow_rows.images(equation, operands, node.steps)
            return images, NO_IDS._replace(taken=taken)
        if not node.lookups and not node.programs:
            arrays = list(map(self.scope.whole, operands))
            return jaxprs.bind(equation, arrays), NO_IDS._replace(taken=taken)
        construct = CONSTRUCTS[str(equation.primitive.name)]
        results, ids = construct.run(self, equation, operands, node, zeros)
        return results, ids._replace(taken=taken)

    def _taken(
        self, atoms: Sequence[Any], values: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], dict[int, Any]]:
        """Images that are used whole, with zeros added to their rows."""
        values, ids = list(values), {}
        for i, found in node.taken.items():
            added = Added(found, zeros.taken[i])
            values[i] = added.all(values[i], type_of(atoms[i]).shape, self.scope)
            ids[i] = added.ids()
        return values, ids
