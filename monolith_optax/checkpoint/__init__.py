"""Moves Monolith's variables and slots into params and optax states, and back.

`import_slots` and `export_slots` convert between a mapping from TensorFlow's names to
arrays and `(params, state)`; `read_tensorflow` and `write_tensorflow` convert between
such a mapping and TensorFlow's files, and only writing needs TensorFlow.
`monolith-checkpoint` shows and converts these files.
`hash_tables`, `read_hash_table` and `write_hash_table` handle the hash tables beside
such a checkpoint, and need no TensorFlow; `import_hash_tables` and `export_hash_tables`
move them into `(params, state)` and back, and `read_cached_hash_tables` and
`write_cached_hash_tables` into a `RowCache` and back.
"""

from monolith_optax._exports import exports as _exports

__all__, __getattr__, __dir__ = _exports(__name__)
