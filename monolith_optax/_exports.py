"""Public names, which packages import when they are first used."""

import ast
import importlib
import pkgutil
from collections.abc import Callable
from types import FunctionType
from typing import Any


def exports(
    package: str,
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` of a package.

    Its `__init__.pyi` is the list of its names, for type checkers too. Importing the
    package imports nothing that the list names.
    """
    stub = ast.parse(pkgutil.get_data(package, "__init__.pyi") or b"")
    homes = {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def get(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if home == package:
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(home), name)
        if isinstance(value, FunctionType):  # classes: see `public`
            value.__module__ = package
        setattr(importlib.import_module(package), name, value)
        return value

    names = sorted(homes)
    return names, get, lambda: sorted({*vars(importlib.import_module(package)), *names})
