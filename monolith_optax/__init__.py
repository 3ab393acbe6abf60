"""The optimizers of ByteDance's Monolith as optax gradient transformations.

Public names and submodules are imported on first use, so that `import monolith_optax`
loads neither JAX nor optax and touches no device. `__init__.pyi` lists them.
"""

import ast
import pkgutil

__version__ = "0.1.0"


def _exports() -> dict[str, str]:
    """Where each public name is: `module:name`, or a module."""
    stub = pkgutil.get_data(__name__, "__init__.pyi")
    homes = {}
    for node in ast.parse(stub or b"").body:
        if isinstance(node, ast.Import):
            homes |= {str(alias.asname): alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            homes |= {alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    return homes


_HOMES = _exports()
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = pkgutil.resolve_name(_HOMES[name])
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
