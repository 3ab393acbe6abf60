"""What `monolith-checkpoint convert` does."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from monolith_optax import _console
from monolith_optax.checkpoint._prefix import has_index, prefix_of
from monolith_optax.checkpoint._read_tensorflow import read_tensorflow
from monolith_optax.checkpoint._write_tensorflow import write_tensorflow


def convert(source: str, target: str, *, quiet: bool) -> None:
    """Converts a TensorFlow checkpoint to an Orbax checkpoint, or back."""
    to_tensorflow = Path(source).is_dir() and not has_index(source)
    written = Path(f"{target}.index") if to_tensorflow else Path(target)
    if written.exists():
        raise FileExistsError(f"{written} already exists: give another name.")
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "Converting needs Orbax: pip install orbax-checkpoint."
        ) from error
    with ocp.StandardCheckpointer() as checkpointer:
        if to_tensorflow:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no start-up messages
            write_tensorflow(target, _tensors_in(checkpointer, source))
        else:
            tensors = dict(read_tensorflow(prefix_of(source)))
            if bad := [
                k for k, x in tensors.items() if x.dtype == object or not x.size
            ]:
                raise ValueError(
                    f"Orbax can hold only numbers, but {bad} are strings or empty: "
                    "read the others with read_tensorflow."
                )
            checkpointer.save(Path(target).absolute(), tensors)
            checkpointer.wait_until_finished()
    if not quiet:
        print(f"Wrote {_console.printable(target)}")


def _tensors_in(checkpointer: Any, folder: str) -> dict[str, np.ndarray]:
    restored = checkpointer.restore(Path(folder).absolute())
    if not isinstance(restored, dict) or any(
        isinstance(value, dict | list) for value in restored.values()
    ):
        raise ValueError(
            f"{folder} must hold one dictionary of arrays, as 'convert' writes it, but "
            "it holds another tree. Restore it in Python, and use export_slots and "
            "write_tensorflow."
        )
    return {name: np.asarray(value) for name, value in restored.items()}
