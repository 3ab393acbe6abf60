"""The programs inside equations: where they stand, and what kinds of results they have.

Branches and functions with derivative rules must know the kinds of their results before
they run. So their programs run abstractly first, all levels of them at once: what is
found inside stays known, and programs inside programs do not run more and more often.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import jax

from monolith_optax._rows.programs.jaxprs import Equation
from monolith_optax._rows.programs.row_values import Kind, Rows, Value, kind

# Where a program stands inside others: equations, and numbers of their branches.
Path: TypeAlias = tuple[tuple[Equation, int], ...]

# Identities, and what has them.
_Key: TypeAlias = tuple[int | tuple[int, int], ...]
_Alive: TypeAlias = tuple[Path, Equation, list[Value]]


class InnerPrograms:
    """What a run of programs knows of those inside equations.

    Attributes:
      path: where the program that runs now stands.
      only_kinds: whether it runs for the kinds of its results only.
    """

    def __init__(self) -> None:
        # By the identity of what leads there, which lives as long as its key.
        self._kinds: dict[_Key, tuple[_Alive, list[list[Kind]]]] = {}
        self.path: Path = ()
        self.only_kinds = False

    @contextlib.contextmanager
    def at(self, path: Path) -> Iterator[None]:
        """While a program runs that stands there."""
        before, self.path = self.path, path
        try:
            yield
        finally:
            self.path = before

    def find_kinds(
        self,
        equation: Equation,
        operands: list[Value],
        run: Callable[[Equation, list[Value]], Sequence[Value]],
    ) -> None:
        """Runs an equation's programs for the kinds of their results, but only once."""
        if self._key(equation, operands) in self._kinds:
            return

        def abstractly() -> None:
            run(equation, operands)

        self.only_kinds = True
        try:
            jax.eval_shape(abstractly)
        finally:
            self.only_kinds = False

    def keep(
        self, equation: Equation, operands: list[Value], results: list[list[Value]]
    ) -> None:
        """Keeps the kinds of the results of an equation's programs."""
        kinds = [list(map(kind, each)) for each in results]
        self._kinds[self._key(equation, operands)] = (
            (self.path, equation, operands),
            kinds,
        )

    def kinds(self, equation: Equation, operands: list[Value]) -> list[list[Kind]]:
        """The kinds of the results of each of an equation's programs."""
        return self._kinds[self._key(equation, operands)][1]

    def _key(self, equation: Equation, operands: list[Value]) -> _Key:
        tables = (value.table for value in operands if isinstance(value, Rows))
        path = ((id(each), which) for each, which in self.path)
        return (*path, id(equation), *map(id, tables))
