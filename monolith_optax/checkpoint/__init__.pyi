# What the package exports, for type checkers and for __init__.py, which reads it.
from monolith_optax.checkpoint._cached_hash_tables import (
    read_cached_hash_tables as read_cached_hash_tables,
)
from monolith_optax.checkpoint._cached_hash_tables import (
    write_cached_hash_tables as write_cached_hash_tables,
)
from monolith_optax.checkpoint._export_hash_tables import (
    export_hash_tables as export_hash_tables,
)
from monolith_optax.checkpoint._hash_table import HashTable as HashTable
from monolith_optax.checkpoint._hash_table import Segment as Segment
from monolith_optax.checkpoint._import_hash_tables import (
    import_hash_tables as import_hash_tables,
)
from monolith_optax.checkpoint._list_hash_tables import HashTableInfo as HashTableInfo
from monolith_optax.checkpoint._list_hash_tables import hash_tables as hash_tables
from monolith_optax.checkpoint._read_hash_table import (
    read_hash_table as read_hash_table,
)
from monolith_optax.checkpoint._read_tensorflow import (
    TensorFlowCheckpoint as TensorFlowCheckpoint,
)
from monolith_optax.checkpoint._read_tensorflow import (
    read_tensorflow as read_tensorflow,
)
from monolith_optax.checkpoint._slots import export_slots as export_slots
from monolith_optax.checkpoint._slots import import_slots as import_slots
from monolith_optax.checkpoint._write_hash_table import (
    write_hash_table as write_hash_table,
)
from monolith_optax.checkpoint._write_tensorflow import (
    write_tensorflow as write_tensorflow,
)
