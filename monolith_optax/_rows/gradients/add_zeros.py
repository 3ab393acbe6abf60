"""Running a traced program with something added to every row that it looks up.

What is added are zeros: their gradients are those of the rows. The program otherwise
computes what it did, and its equations keep their places, policies and rules.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, cast

import jax

from monolith_optax._rows.gradients.fetch_rows import Added
from monolith_optax._rows.gradients.follow_rows import PLACEMENTS, Step
from monolith_optax._rows.gradients.lookup_tree import (
    RESULTS,
    Arrays,
    Each,
    EachOf,
    Ids,
    Node,
    Tree,
    Zeros,
)
from monolith_optax._rows.gradients.row_images import (
    Image,
    Parameter,
    Scope,
    Value,
    Values,
)
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Atom, Equation, Program, type_of


class AddsZeros(Protocol):
    """What runs an equation that is given tables (`constructs.py`)."""

    def run(
        self, run: "Run", equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        """The results, and the ids of all rows that are looked up.

        Args:
          run: the run that it belongs to.
          equation: the equation.
          operands: arrays; or images, where `node` says so.
          node: its lookups.
          zeros: what is added to their rows.
        """


class Run:
    """A run of a program, which may call others.

    Attributes:
      scope: what was made of images in it.
    """

    def __init__(self, constructs: Mapping[str, AddsZeros]) -> None:
        """Gives the equations that may be given tables."""
        self.scope, self._constructs = Scope(), constructs

    def inside(
        self,
        program: Program,
        operands: Sequence[Value],
        tree: Tree,
        zeros: EachOf[Arrays],
        left_out: Collection[int] = (),
    ) -> tuple[list[jax.Array], EachOf[Arrays]]:
        """Runs a program in a trace of its own, with zeros added to what it looks up.

        Args:
          program: the program.
          operands: its operands; tables are `Parameter`s.
          tree: the lookups that were found in it.
          zeros: what to add to their rows.
          left_out: results that are not needed.

        Returns:
          The other results, and for each lookup the ids of its rows.
        """
        run = Run(self._constructs)
        results, ids = run.program(program, operands, tree, zeros)
        needed = [value for i, value in enumerate(results) if i not in left_out]
        return list(map(run.scope.whole, needed)), ids

    def program(
        self,
        program: Program,
        operands: Sequence[Value],
        tree: Tree,
        zeros: EachOf[Arrays],
    ) -> tuple[Values, EachOf[Arrays]]:
        """Runs a program whose results may be images."""
        ids: EachOf[Arrays] = {}
        equations = iter(range(len(program.jaxpr.eqns)))

        def step(equation: Equation, operands: Values) -> Sequence[Value]:
            index = next(equations)
            node = tree.get(index)
            if node is None:
                return jaxprs.bind(equation, self._whole(operands))
            results, ids[index] = self._node(equation, operands, node, zeros[index])
            return results

        results = jaxprs.interpret(
            program, operands, step, lambda constant: cast(jax.Array, constant)
        )
        if RESULTS in tree:
            node, atoms = tree[RESULTS], program.jaxpr.outvars
            results, taken = self._taken(atoms, results, node, zeros[RESULTS])
            ids[RESULTS] = Each(taken, [], [])
        return results, ids

    def _node(
        self, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        operands, taken = self._taken(equation.invars, operands, node, zeros)
        operands = [
            value if i in node.images else self.scope.whole(value)
            for i, value in enumerate(operands)
        ]
        if node.lookups or node.programs:
            construct = self._constructs[str(equation.primitive.name)]
            results, ids = construct.run(self, equation, operands, node, zeros)
            return results, ids._replace(taken=taken)
        if node.steps:
            return _images(equation, operands, node.steps), Each(taken, [], [])
        arrays = jaxprs.bind(equation, self._whole(operands))
        return arrays, Each(taken, [], [])

    def _whole(self, values: Values) -> list[jax.Array]:
        # Without a call for each: nearly all are arrays.
        return [
            self.scope.whole(value) if isinstance(value, Image | Parameter) else value
            for value in values
        ]

    def _taken(
        self, atoms: Sequence[Atom], values: Values, node: Node, zeros: Zeros
    ) -> tuple[Values, dict[int, Arrays]]:
        """Images that are used whole, with zeros added to their rows."""
        values, ids = list(values), {}
        for i, found in node.taken.items():
            added = Added(found, zeros.taken[i])
            values[i] = added.all(values[i], type_of(atoms[i]).shape, self.scope)
            ids[i] = added.ids()
        return values, ids


def _images(
    equation: Equation, operands: Sequence[Value], steps: Sequence[Step]
) -> Values:
    """The results of an equation that keeps rows apart."""
    return [
        _placed(equation, operands[index])
        if step.way is None
        else Image(step.way, equation, operands, index)
        for index, step in enumerate(steps)
    ]


def _placed(equation: Equation, value: Value) -> Value:
    """An operand after an equation that says on which devices it is."""
    if not isinstance(value, Parameter) or equation.primitive.name not in PLACEMENTS:
        return value
    [array] = jaxprs.bind(equation, [value.array])
    return replace(value, array=array)
