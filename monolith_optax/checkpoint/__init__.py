"""Monolith's variables and slots in and out of params and optax states.

`import_slots` and `export_slots` go between a mapping of TensorFlow's names to arrays
and `(params, state)`; `read_tensorflow` and `write_tensorflow` between such a mapping
and TensorFlow's files. `python -m monolith_optax.checkpoint` shows and converts them.
"""

from monolith_optax.checkpoint._slots import export_slots as export_slots
from monolith_optax.checkpoint._slots import import_slots as import_slots
from monolith_optax.checkpoint._tensorflow import (
    TensorFlowCheckpoint as TensorFlowCheckpoint,
)
from monolith_optax.checkpoint._tensorflow import read_tensorflow as read_tensorflow
from monolith_optax.checkpoint._tensorflow import write_tensorflow as write_tensorflow

__all__ = [
    "TensorFlowCheckpoint",
    "export_slots",
    "import_slots",
    "read_tensorflow",
    "write_tensorflow",
]
