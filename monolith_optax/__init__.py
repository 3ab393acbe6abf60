"""The optimizers of ByteDance's Monolith as optax gradient transformations.

Public names and submodules are imported on first use, so that `import monolith_optax`
loads neither JAX nor optax and touches no device. `__init__.pyi` lists them.
"""

import ast
import pkgutil

__version__ = "0.2.0"


def _exports() -> dict[str, str]:
    """Where each public name comes from."""
    stub = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
    return {
        alias.name: f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


_HOMES = _exports()
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = pkgutil.resolve_name(_HOMES[name])
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
