"""Values of a program that are made when somebody asks for them.

Where they are needed is known later than what they are made of. So each value has a
generator that makes it for one such place, and yields what it needs for that: other
values, and where. A chain of them may be longer than Python's stack, so that no value
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


def made(value: MadeLater[Where], where: Where, done: Done[Where]) -> jax.Array:
    """What is made of a value somewhere, once for each.

    Args:
      value: the value.
      where: where it is needed.
      done: what has been made already; all that this needs is added to it.
    """
    if (value, where) in done:
        return done[value, where]
    left = [((value, where), value.make(where))]
    sent = None
    while left:
        key, making = left[-1]
        try:
            needed = next(making) if sent is None else making.send(sent)
        except StopIteration as finished:
            done[key] = sent = finished.value
            left.pop()
            continue
        sent = done.get(needed)
        if sent is None:
            left.append((needed, needed[0].make(needed[1])))
    return done[value, where]
