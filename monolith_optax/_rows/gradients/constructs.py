"""What is done about equations that look tables up, or run programs that do.

Each kind of equation has one class here or in `loops.py`: `find` reads it, with what is
known of its operands, and `run` runs it with something added to what it looks up.
"""

from typing import Any, Protocol

import jax

from monolith_optax._rows.gradients import as_gather
from monolith_optax._rows.gradients.lookup_tree import Each, Found, Node
from monolith_optax._rows.gradients.loops import Cond, Scan, While
from monolith_optax._rows.gradients.positions import Added
from monolith_optax._rows.gradients.row_images import (
    is_data,
    is_image,
    is_table,
    which_tables,
    without_other_images,
)
from monolith_optax._rows.gradients.rule_lookups import NotRowsError, Rule
from monolith_optax._rows.gradients.split_tables import ShardMap
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, type_of


class Construct(Protocol):
    """A kind of equation that may be given tables."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        """What is known of the results, and the lookups.

        Args:
          finder: the `Finder`, which reads programs and refuses leaves.
          equation: the equation.
          operands: what is known of its operands; some are images of tables.
        """

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        """The results, and the ids of all rows that are looked up.

        Args:
          run: the `Run` that it belongs to.
          equation: the equation.
          operands: arrays; or images, where `node` says so.
          node: its lookups.
          zeros: what is added to their rows.
        """


class Lookup:
    """A gather, or another equation that takes rows."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        table, *indices = operands
        lookup = as_gather.lookup(equation)
        place = finder.place(equation)
        if isinstance(lookup, str) or not is_table(table):
            what = (
                f"is an index of {place}"
                if not is_table(table)
                else f"{lookup} by {place}"
            )
            return [True], Node(
                finder.otherwise(equation, operands, range(len(operands)), what)
            )
        rest = range(1, len(operands))
        finder.otherwise(equation, operands, rest, f"is an index of {place}")
        found = finder.take(
            equation,
            equation.invars[0],
            table,
            lookup,
            any(map(is_data, indices)),
            jaxprs.varying(type_of(equation.outvars[0])),
            any(finder.active(equation)),
        )
        return [True], Node(lookups=[found] if found else [], images=frozenset([0]))

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        [found], [its_zeros] = node.lookups, zeros.lookups
        added, lookup = Added(found, its_zeros), found.lookup
        assert lookup is not None
        with jaxprs.standing_at(equation):
            indices = as_gather.indices_of(equation, operands[1:])
            rows, valid = added.lookup(indices, operands[0], run.scope)
            result = lookup.result(rows, indices, valid)
            if equation.primitive.name == "slice":
                result = as_gather.sliced_columns(equation, result)
        return [result], Each({}, [added.ids()], [])


class Call:
    """A call of a program."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        program = jaxprs.called_program(equation)
        results, tree = finder.inside(
            equation, lambda: finder.program(program, operands, finder.active(equation))
        )
        which = frozenset(i for i, value in enumerate(operands) if is_image(value))
        return results, Node(programs=[tree], images=which)

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        program = jaxprs.called_program(equation)
        results, ids = run.program(
            program, operands, node.programs[0], zeros.programs[0]
        )
        return results, Each({}, [], [ids])


class Ruled:
    """A function whose derivative rule says what the gradients of tables are.

    Where no gradients are taken, it is a call like any other.
    """

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        if not finder.keeps_rules:
            return CALL.find(finder, equation, operands)
        rule, active = Rule(equation), any(finder.active(equation))
        scatters, reasons = {}, {}
        for i in which_tables(operands):
            try:
                scatters[i] = rule.scatters(i) if active else []
            except NotRowsError as error:
                place = finder.place(equation)
                reasons[i] = f"{error} in the derivative rule of {place}"
        if not scatters:
            result: tuple[list[Any], Node] = finder.follow_one(
                equation, operands, reasons
            )
            return result
        taken: dict[int, Found] = {}
        lookups: list[Found] = []
        for i, what in reasons.items():
            taken |= finder.otherwise(equation, operands, [i], what)
        for i in sorted(scatters):
            for scatter in scatters[i]:
                sources, constants = rule.sources(scatter.indices)
                by_data = any(is_data(operands[j]) for j in sources) or any(
                    finder.is_data(each) for each in constants
                )
                found = finder.take(
                    equation,
                    equation.invars[i],
                    operands[i],
                    scatter.lookup,
                    by_data,
                    jaxprs.varying(type_of(scatter.updates)),
                    True,
                )
                lookups += [found] if found else []
        node = Node(taken, lookups, images=frozenset(scatters))
        return [True] * len(equation.outvars), node

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        """Adds zeros to the rows that get a gradient, as if they were looked up."""
        if node.programs:
            return CALL.run(run, equation, operands, node, zeros)
        rule, arrays = Rule(equation), list(map(run.scope.whole, operands))
        tables = sorted(node.images)
        scatters = [(i, scatter) for i in tables for scatter in rule.scatters(i)]
        indices = rule.indices(arrays, [scatter for _, scatter in scatters])
        rows, ids = [], []
        for (i, _), found, where, added in zip(
            scatters, node.lookups, indices, zeros.lookups, strict=True
        ):
            its = Added(found, added)
            rows.append(its.lookup(where, operands[i], run.scope)[0])
            ids.append(its.ids())
        results = rule.run(arrays, tables, rows, [scatter for _, scatter in scatters])
        return results, Each({}, ids, [])


class Checkpoint:
    """A call that does not save what its gradient needs."""

    def find(
        self, finder: Any, equation: Equation, operands: list[Any]
    ) -> tuple[list[Any], Node]:
        program, active = jaxprs.called_program(equation), finder.active(equation)
        operands = without_other_images(operands)

        def find() -> Any:
            results, tree = finder.program(program, operands, active)
            passed = {
                i: operands.index(v)
                for i, v in enumerate(results)
                if is_table(v) and v in operands
            }
            values = [False if i in passed else v for i, v in enumerate(results)]
            finder.results(program, values, active, tree, equation)
            return passed, values, tree

        passed, results, tree = finder.inside(equation, find)
        for i, operand in passed.items():
            results[i] = operands[operand]
        return results, Node(
            programs=[tree], images=which_tables(operands), passed=passed
        )

    def run(
        self, run: Any, equation: Equation, operands: list[Any], node: Node, zeros: Each
    ) -> tuple[list[Any], Each]:
        program = jaxprs.called_program(equation)
        images = {i: operands[i] for i in node.images}

        def body(arrays: list[Any], zeros: Any) -> Any:
            values = [images.get(i, array) for i, array in enumerate(arrays)]
            return run.inside(program, values, node.programs[0], zeros, node.passed)

        body = jax.checkpoint(
            body,
            prevent_cse=equation.params["prevent_cse"],
            policy=equation.params["policy"],
        )
        arrays = [None if i in images else v for i, v in enumerate(operands)]
        results, ids = body(arrays, zeros.programs[0])
        results = [
            operands[node.passed[i]] if i in node.passed else v
            for i, v in enumerate(results)
        ]
        return results, Each({}, [], [ids])


CALL = Call()
CONSTRUCTS: dict[str, Construct] = {
    **dict.fromkeys(("gather", "dynamic_slice", "slice"), Lookup()),
    **dict.fromkeys(jaxprs.CUSTOM_DERIVATIVES, Ruled()),
    **dict.fromkeys(jaxprs.CALLS - jaxprs.CHECKPOINTS, CALL),
    **dict.fromkeys(jaxprs.CHECKPOINTS, Checkpoint()),
    "cond": Cond(),
    "scan": Scan(),
    "while": While(),
    "shard_map": ShardMap(),
}
