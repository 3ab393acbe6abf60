"""What is done about equations that look tables up, or run programs that do.

Each kind of equation has one class here or in `loops.py`: `find` reads it, with what is
known of its operands, and `run` runs it with something added to what it looks up.
"""

from collections.abc import Sequence
from typing import Protocol

import jax

from monolith_optax._rows.gradients import as_gather
from monolith_optax._rows.gradients.add_zeros import AddsZeros, Run
from monolith_optax._rows.gradients.fetch_rows import Added
from monolith_optax._rows.gradients.find_lookups import Finder, FindsLookups
from monolith_optax._rows.gradients.image_facts import (
    Known,
    is_data,
    is_table,
    which_images,
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
    Zeros,
)
from monolith_optax._rows.gradients.loops import Cond, Scan, While, apart
from monolith_optax._rows.gradients.row_images import Value, Values
from monolith_optax._rows.gradients.rule_lookups import NotRowsError, Rule
from monolith_optax._rows.gradients.split_tables import ShardMap
from monolith_optax._rows.programs import jaxprs
from monolith_optax._rows.programs.jaxprs import Equation, type_of
from monolith_optax._rows.programs.varying import varying


class Construct(FindsLookups, AddsZeros, Protocol):
    """A kind of equation that may be given tables."""


class Lookup:
    """A gather, or another equation that takes rows."""

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        table, *indices = operands
        lookup = as_gather.lookup(equation)
        place = finder.place(equation)
        index = f"is an index of {place}"
        if isinstance(lookup, str) or not is_table(table):
            what = f"{lookup} by {place}" if is_table(table) else index
            uses = dict.fromkeys(range(len(operands)), what)
            return [True], Node(finder.otherwise(equation, operands, uses))
        rest = range(1, len(operands))
        finder.otherwise(equation, operands, dict.fromkeys(rest, index))
        found = finder.uses.take(
            table,
            equation.invars[0],
            lookup,
            place,
            by_data=any(map(is_data, indices)),
            varying=varying(type_of(equation.outvars[0])),
            active=any(finder.active(equation)),
        )
        return [True], Node(lookups=[found] if found else [], images=frozenset([0]))

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        [found], [its_zeros] = node.lookups, zeros.lookups
        added, lookup = Added(found, its_zeros), found.lookup
        assert lookup is not None
        arrays = list(map(run.scope.whole, operands[1:]))
        with jaxprs.standing_at(equation):
            indices = as_gather.indices_of(equation, arrays)
            rows, valid = added.lookup(indices, operands[0], run.scope)
            result = lookup.result(rows, indices, valid)
            if equation.primitive.name == "slice":
                result = as_gather.sliced_columns(equation, result)
        return [result], Each({}, [added.ids()], [])


class Call:
    """A call of a program."""

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        [program] = jaxprs.programs_of(equation)
        active = finder.active(equation)
        with finder.inside(equation):
            results, tree = finder.program(program, operands, active)
        return results, Node(programs=[tree], images=which_images(operands))

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        [program] = jaxprs.programs_of(equation)
        results, ids = run.program(
            program, operands, node.programs[0], zeros.programs[0]
        )
        return results, Each({}, [], [ids])


class Ruled:
    """A function whose derivative rule says what the gradients of tables are.

    Where no gradients are taken, it is a call like any other.
    """

    def find(
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
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
            return finder.follow_one(equation, operands, reasons)
        taken = finder.otherwise(equation, operands, reasons)
        lookups: list[Found] = []
        for i in sorted(scatters):
            for scatter in scatters[i]:
                sources, constants = rule.sources(scatter.indices)
                by_data = any(is_data(operands[j]) for j in sources) or any(
                    finder.is_data(each) for each in constants
                )
                table = operands[i]
                assert is_table(table)
                found = finder.uses.take(
                    table,
                    equation.invars[i],
                    scatter.lookup,
                    finder.place(equation),
                    by_data,
                    varying=varying(type_of(scatter.updates)),
                    active=True,
                )
                lookups += [found] if found else []
        node = Node(taken, lookups, images=frozenset(scatters))
        return [True] * len(equation.outvars), node

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
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
        self, finder: Finder, equation: Equation, operands: list[Known]
    ) -> tuple[Sequence[Known], Node]:
        [program], active = jaxprs.programs_of(equation), finder.active(equation)
        operands = without_other_images(operands)

        with finder.inside(equation):
            found, tree = finder.program(program, operands, active)
            passed = {
                i: operands.index(v)
                for i, v in enumerate(found)
                if is_table(v) and v in operands
            }
            results = [i not in passed and v for i, v in enumerate(found)]
            finder.results(program, results, active, tree, equation)
        for i, operand in passed.items():
            results[i] = operands[operand]
        return results, Node(
            programs=[tree], images=which_tables(operands), passed=passed
        )

    def run(
        self, run: Run, equation: Equation, operands: Values, node: Node, zeros: Zeros
    ) -> tuple[Sequence[Value], Ids]:
        [program], [tree] = jaxprs.programs_of(equation), node.programs
        arrays, all_of = apart(run, operands, node.images)

        def body(
            arrays: dict[int, jax.Array], zeros: EachOf[Arrays]
        ) -> tuple[list[jax.Array], EachOf[Arrays]]:
            return run.inside(program, all_of(arrays), tree, zeros, node.passed)

        body = jax.checkpoint(
            body,
            prevent_cse=equation.params["prevent_cse"],
            policy=equation.params["policy"],
        )
        some, ids = body(arrays, zeros.programs[0])
        others = iter(some)
        results = [
            operands[node.passed[i]] if i in node.passed else next(others)
            for i in range(len(equation.outvars))
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
