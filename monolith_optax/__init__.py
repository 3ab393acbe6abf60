"""The optimizers of ByteDance's Monolith as optax gradient transformations.

Public names are imported on first use, so that `import monolith_optax` alone loads
neither JAX nor optax and touches no device.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monolith_optax._optimizers.adamom import AdamomState as AdamomState
    from monolith_optax._optimizers.adamom import adamom as adamom
    from monolith_optax._optimizers.rmsprop import RmspropState as RmspropState
    from monolith_optax._optimizers.rmsprop import rmsprop as rmsprop
    from monolith_optax._rows.apply_updates import apply_updates as apply_updates
    from monolith_optax._rows.collectives import pmean as pmean
    from monolith_optax._rows.collectives import psum as psum
    from monolith_optax._rows.gradients import value_and_row_grad as value_and_row_grad
    from monolith_optax._rows.lazy import lazy_rows as lazy_rows
    from monolith_optax._rows.norms import global_norm as global_norm
    from monolith_optax._rows.slices import RowSlices as RowSlices

__version__ = "0.1.0"

_HOME = {
    "AdamomState": "_optimizers.adamom",
    "adamom": "_optimizers.adamom",
    "RmspropState": "_optimizers.rmsprop",
    "rmsprop": "_optimizers.rmsprop",
    "RowSlices": "_rows.slices",
    "apply_updates": "_rows.apply_updates",
    "global_norm": "_rows.norms",
    "lazy_rows": "_rows.lazy",
    "pmean": "_rows.collectives",
    "psum": "_rows.collectives",
    "value_and_row_grad": "_rows.gradients",
}

__all__ = [
    "AdamomState",
    "RmspropState",
    "RowSlices",
    "adamom",
    "apply_updates",
    "global_norm",
    "lazy_rows",
    "pmean",
    "psum",
    "rmsprop",
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
