"""The public place of a class that is defined in a private module."""

from collections.abc import Callable
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def public(module: str) -> Callable[[Class], Class]:
    """Makes a class name `module` as its own, in pickles and wherever it is printed."""

    def place(cls: Class) -> Class:
        cls.__module__ = module
        return cls

    return place
