"""Checks of arguments that several functions take."""

from collections.abc import Iterable
from typing import Any

from monolith_optax.net._probe import Target, parse_target


def targets_of(addrs: Iterable[Any]) -> list[Target]:
    """The distinct addresses, in the order given, each parsed once."""
    addresses = list(check_iterable(addrs))
    try:
        distinct = dict.fromkeys(addresses)
    except TypeError as error:
        raise TypeError(
            f"Addresses must be strings, but they are {addresses!r}."
        ) from error
    return [parse_target(address) for address in distinct]


def check_iterable(addrs: Any) -> Iterable[Any]:
    if isinstance(addrs, str | bytes) or not isinstance(addrs, Iterable):
        raise TypeError(
            f"addrs must be a list of addresses such as ['host:2222'], but it is "
            f"{addrs!r}."
        )
    return addrs


def check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{name} must be a positive number, but it is {number!r}.")


def check_at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(
                f"{name} must be a whole number, at least 1, but it is {number!r}."
            )


def check_bound(**numbers: int | None) -> None:
    # None stands for the system's own bound.
    check_at_least_one(**{name: n for name, n in numbers.items() if n is not None})
