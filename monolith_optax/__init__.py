"""The optimizers of ByteDance's Monolith as optax gradient transformations.

Public names are imported on first use, so that `import monolith_optax` alone loads
neither JAX nor optax and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monolith_optax._ids.id_map import IdMap as IdMap
    from monolith_optax._ids.raw import split_ids as split_ids
    from monolith_optax._optimizers.adamom import AdamomState as AdamomState
    from monolith_optax._optimizers.adamom import adamom as adamom
    from monolith_optax._optimizers.rmsprop import RmspropState as RmspropState
    from monolith_optax._optimizers.rmsprop import rmsprop as rmsprop
    from monolith_optax._rows.gradients import value_and_row_grad as value_and_row_grad
    from monolith_optax._rows.lazy import lazy_rows as lazy_rows
    from monolith_optax._rows.slices import RowSlices as RowSlices

__version__ = "0.1.0"

_HOME = {
    "IdMap": "_ids.id_map",
    "split_ids": "_ids.raw",
    "AdamomState": "_optimizers.adamom",
    "adamom": "_optimizers.adamom",
    "RmspropState": "_optimizers.rmsprop",
    "rmsprop": "_optimizers.rmsprop",
    "RowSlices": "_rows.slices",
    "lazy_rows": "_rows.lazy",
    "value_and_row_grad": "_rows.gradients",
}

__all__ = [
    "AdamomState",
    "IdMap",
    "RmspropState",
    "RowSlices",
    "adamom",
    "lazy_rows",
    "rmsprop",
    "split_ids",
    "value_and_row_grad",
]


if not TYPE_CHECKING:  # type checkers are to find misspelt names

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
