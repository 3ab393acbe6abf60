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


def public_state(module: str) -> Callable[[Class], Class]:
    """The same for a state of an optimizer, which `jax.export` then can serialize."""

    def place(cls: Class) -> Class:
        from jax import export  # only where JAX is loaded already

        name = f"{module}.{cls.__name__}"
        export.register_namedtuple_serialization(cls, serialized_name=name)
        return public(module)(cls)

    return place
