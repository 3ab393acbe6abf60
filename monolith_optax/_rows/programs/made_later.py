"""Values of a program that are made when somebody asks for them.

Where they are needed is known later than what they are made of. So each value has a
generator that makes it for one such place, and yields what it needs for that: other
values, and where. A chain of them may be longer than Python's stack, so no value
calls another.
"""

from collections.abc import Generator
from typing import Protocol, TypeAlias, TypeVar

import jax

Where = TypeVar("Where")

# Yields values and where they are needed, is sent what was made, returns a result.
Making: TypeAlias = Generator[tuple["MadeLater[Where]", Where], jax.Array, jax.Array]
Done: TypeAlias = dict[tuple["MadeLater[Where]", Where], jax.Array]


class MadeLater(Protocol[Where]):
    """A value that is made where it is needed; equal only to itself."""

    def make(self, where: Where) -> Making[Where]:
        """Makes it for one place, from other values."""


def made(making: Making[Where], done: Done[Where]) -> jax.Array:
    """What a generator returns; what it needs is made once for each place.

    Args:
      making: the generator.
      done: what has been made already; all that this needs is added to it.
    """
    left, sent = [making], None
    keys: list[tuple[MadeLater[Where], Where]] = []
    while True:
        try:
            needed = next(left[-1]) if sent is None else left[-1].send(sent)
        except StopIteration as finished:
            result: jax.Array = finished.value
            left.pop()
            if not left:
                return result
            done[keys.pop()] = sent = result
        else:
            sent = done.get(needed)
            if sent is None:
                value, where = needed
                keys.append(needed)
                left.append(value.make(where))
