"""Moves Monolith's variables and slots into params and optax states, and back.

`import_slots` and `export_slots` convert between a mapping from TensorFlow's names to
arrays and `(params, state)`; `read_tensorflow` and `write_tensorflow` convert between
such a mapping and TensorFlow's files. `python -m monolith_optax.checkpoint` shows and
converts these files.
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
