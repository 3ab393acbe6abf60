"""Finding the lookups of tables in a traced program, and the leaves that are tables.

The program is read, not run: all that is known of a value is whose image it is, or
else whether it depends on data (`image_facts.py`). A loss that casts half of a table
`t` before it looks ids up, and multiplies the rows by `w`, has this program:

    d:f32[100,4] = mul t 0.5
    e:bf16[100,4] = convert_element_type[new_dtype=bfloat16] d
    i:i32[3,1] = broadcast_in_dim[broadcast_dimensions=(0,)] ids
    j:bf16[3,4] = gather[slice_sizes=(1, 4)] e i
    k:bf16[3] = dot_general[dimension_numbers=(([1], [0]), ([], []))] j w

- `t` and `w` may both be tables, so there are `Facts` of both. The ids are True: data.
- `mul` keeps rows apart, so `d` is an image of `t`, with `Facts` of its own, and so is
  `e`. The tree of lookups gets a `Node` for each, which says how their rows follow.
- `broadcast_in_dim` is given no image. All there is to say of `i` is that it is data.
- `gather` looks `e` up: it is a construct, and `constructs.Lookup` describes which
  rows it takes. The indices are data, so `t` may be a table. The tree gets a `Node`
  with this lookup, and `j` is True, data like any other.
- `dot_general` is not known to keep rows of `w` apart, so `w` is refused, and this is
  the reason that `explain` gives. `choose_tables.py` searches again without it.

`add_zeros.py` runs the program by this tree: it computes neither `d` nor `e`, fetches
the rows of `t` in place of `j`, adds zeros, and halves and casts only these rows.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax.typing import ArrayLike

from monolith_optax._rows.gradients import follow_rows
from monolith_optax._rows.gradients.gradient_flow import GradientFlow
from monolith_optax._rows.gradients.image_facts import (
    Facts,
    Known,
    Number,
    Source,
    Split,
    is_data,
    is_table,
    which_images,
    which_tables,
)
from monolith_optax._rows.gradients.lookup_tree import RESULTS, Found, Node, Tree
from monolith_optax._rows.gradients.table_uses import Uses
from monolith_optax._rows.gradients.trace_loss import Loss
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, Program, Variable, type_of
from monolith_optax._rows.programs.primitives import MAKERS
from monolith_optax._rows.types import Shape


class FindsLookups(Protocol):
    """What is known of an equation that may be given tables (`constructs.py`)."""

    def find(
        self, finder: "Finder", equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        """What is known of the results, and the lookups.

        Args:
          finder: reads programs, and notes what leaves are used for.
          equation: the equation.
          operands: what is known of its operands; some are images of tables.
        """


class Finder:
    """Finds the lookups of some leaves, and which leaves are used otherwise.

    Attributes:
      uses: what the leaves are used for.
      flow: which values get a gradient.
      keeps_rules: whether functions keep their derivative rules.
      empty_shapes: the shapes of empty arrays that are made.
    """

    def __init__(
        self,
        uses: Uses,
        flow: GradientFlow,
        loss: Loss,
        constructs: Mapping[str, FindsLookups],
    ) -> None:
        """Gives the leaves to look for, and the equations that may be given them."""
        self.uses, self.flow, self._constructs = uses, flow, constructs
        self.keeps_rules, self._from_numpy = loss.for_gradients, loss.from_numpy
        self._num_rows = frozenset(uses.types[leaf].shape[0] for leaf in uses.asked)
        self._callers: list[Equation] = []
        self._active: Collection[Variable] = ()
        self.empty_shapes: set[Shape] = set()

    def find(self, program: Program) -> Tree:
        """The lookups in the program whose operands are the leaves."""
        operands = [
            self.parameter(leaf) if leaf in self.uses.asked else True
            for leaf in range(len(self.uses.types))
        ]
        active = [True] + [False] * (len(program.jaxpr.outvars) - 1)
        results, tree = self.program(program, operands, active)
        self.results(program, results, active, tree, None)
        return tree

    def parameter(self, leaf: int, part: Split = None) -> Facts:
        """A leaf, or a device's part of it."""
        axes = len(self.uses.types[leaf].shape)
        source = Source(leaf, axes, part)
        return Facts(frozenset([source]), (0, axes - 1), is_leaf=True)

    def program(
        self, program: Program, operands: Sequence[Known], active: Sequence[bool]
    ) -> tuple[list[Known], Tree]:
        """Results of a program, and its lookups.

        Args:
          program: the program.
          operands: its operands.
          active: which of the results have a gradient.
        """
        outside, self._active = self._active, self.flow.through(program, active)
        tree: Tree = {}
        equations = iter(range(len(program.jaxpr.eqns)))

        def step(equation: Equation, operands: list[Known]) -> Sequence[Known]:
            return self._step(equation, operands, tree, next(equations))

        results = jaxprs.interpret(program, operands, step, self._constant)
        self._active = outside
        return results, tree

    def _constant(self, value: ArrayLike) -> Known:
        """What is known of an array that is part of a program."""
        if self.is_data(value):
            return True
        is_number = np.ndim(value) == 0
        if is_number and np.issubdtype(np.asarray(value).dtype, np.integer):
            return Number(value)
        return False

    def is_data(self, constant: ArrayLike) -> bool:
        """Whether an array in a program is data and not only written in it."""
        return isinstance(constant, jax.Array) or (
            self._from_numpy and np.ndim(constant) > 0
        )

    @contextlib.contextmanager
    def inside(self, equation: Equation) -> Iterator[None]:
        """While programs inside an equation are read."""
        self._callers.insert(0, equation)
        yield
        self._callers.pop(0)

    def active(self, equation: Equation) -> list[bool]:
        """Which results of an equation have a gradient."""
        return [out in self._active for out in equation.outvars]

    def _step(
        self, equation: Equation, operands: list[Known], tree: Tree, index: int
    ) -> Sequence[Known]:
        images = [each for each in operands if isinstance(each, Facts)]
        steps = None
        if images:
            steps = follow_rows.follow(equation, operands)
        elif equation.primitive.name in MAKERS:
            steps = follow_rows.from_nothing(equation, self._num_rows)
        if steps:
            tree[index] = Node(steps=steps, images=which_images(operands))
            return [step.facts for step in steps]
        if not any(image.sources for image in images):
            return self._without_tables(equation, operands)
        construct = self._constructs.get(str(equation.primitive.name))
        if construct is not None:
            results, tree[index] = construct.find(self, equation, operands)
        else:
            what = f"is used by {self.place(equation)}"
            reasons = dict.fromkeys(which_tables(operands), what)
            results, tree[index] = self.follow_one(equation, operands, reasons)
        return results

    def _without_tables(
        self, equation: Equation, operands: list[Known]
    ) -> Sequence[Known]:
        name = equation.primitive.name
        if name == "broadcast_in_dim":
            shape = type_of(equation.outvars[0]).shape
            if 0 in shape:
                self.empty_shapes.add(shape)
        numbers = [value for value in operands if isinstance(value, Number)]
        are_numbers = operands and len(numbers) == len(operands)
        if are_numbers and [type_of(out).shape for out in equation.outvars] == [()]:
            return [Number(None, equation, numbers)]
        from_data = any(value is True or is_data(value) for value in operands)
        if not from_data and name in jaxprs.CALLS | jaxprs.CUSTOM_DERIVATIVES:
            [called] = jaxprs.programs_of(equation)
            from_data = any(self.is_data(each) for each in called.consts)
        return [from_data] * len(equation.outvars)

    def follow_one(
        self, equation: Equation, operands: list[Known], reasons: Mapping[int, str]
    ) -> tuple[Sequence[Known], Node]:
        """An equation that keeps rows apart of one of its operands at most.

        `reasons` say what it does with each that is an image of a table.
        """
        for kept in sorted(reasons) if len(reasons) > 1 else ():
            others = {i: what for i, what in reasons.items() if i != kept}
            alone = [i in others or value for i, value in enumerate(operands)]
            steps = follow_rows.follow(equation, alone)
            if steps:
                taken = self.otherwise(equation, operands, others)
                node = Node(taken, steps=steps, images=which_images(operands))
                return [step.facts for step in steps], node
        taken = self.otherwise(equation, operands, reasons)
        return [True] * len(equation.outvars), Node(taken)

    def otherwise(
        self, equation: Equation, operands: list[Known], uses: Mapping[int, str]
    ) -> dict[int, Found]:
        """What is looked up for operands when an equation uses all of their rows.

        They are not images any more then. Leaves whose rows these all are, are
        refused, unless no gradient comes back. `uses` say what it does with each.
        """
        taken: dict[int, Found] = {}
        silent = not any(self.active(equation))
        for i, what in uses.items():
            if is_table(value := operands[i]):
                place, atom = self.place(equation), equation.invars[i]
                found = self.uses.take_all(value, atom, silent, what, place)
                taken |= {i: found} if found else {}
                operands[i] = True
        return taken

    def results(
        self,
        program: Program,
        results: list[Known],
        active: Sequence[bool],
        tree: Tree,
        caller: Equation | None,
    ) -> None:
        """Looks up images that are results of a program, which has to give them."""
        place = self.place(caller) if caller else "the function"
        taken: dict[int, Found] = {}
        for i, (atom, value) in enumerate(
            zip(program.jaxpr.outvars, results, strict=True)
        ):
            if is_table(value):
                what = f"is a result of {place}"
                found = self.uses.take_all(value, atom, not active[i], what, place)
                taken |= {i: found} if found else {}
                results[i] = True
            elif isinstance(value, Facts):
                results[i] = value.is_data
        if taken:
            tree[RESULTS] = Node(taken)

    def whole(
        self,
        equation: Equation,
        program: Program,
        operands: Sequence[Known],
        active: Sequence[bool],
    ) -> tuple[list[bool], Tree]:
        """A program inside an equation that gives all of its results.

        Returns:
          Which results are data, and the lookups.
        """
        results, tree = self.program(program, operands, active)
        self.results(program, results, active, tree, equation)
        return list(map(is_data, results)), tree

    def place(self, equation: Equation) -> str:
        """The operation and the user's line."""
        return jaxprs.source_line(equation, *self._callers)
