"""Writing TensorFlow's checkpoint files, with TensorFlow."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_tensorflow(
    prefix: str | os.PathLike[str], tensors: Mapping[str, Any]
) -> None:
    """Writes a checkpoint that TensorFlow's `Saver` and this module can read.

    Needs TensorFlow: `pip install "monolith_optax[tf]"`.

    Args:
      prefix: the path of its index file without `.index`. Missing folders are made.
      tensors: arrays by name.

    Raises:
      ValueError: there are no tensors, or one has no name, or TensorFlow is in graph
        mode.
      OSError: the files cannot be written.
      ImportError: TensorFlow is not installed.
    """
    tf = _tensorflow()
    if not tensors or "" in tensors:
        what = "There are no tensors" if not tensors else "A tensor has no name"
        raise ValueError(f"{what}: nothing was written to {os.fspath(prefix)}.")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    try:
        with tf.init_scope(), tf.device("CPU"):
            if not tf.executing_eagerly():  # nothing would be written, without an error
                raise ValueError(
                    "TensorFlow is in graph mode here: call write_tensorflow outside a "
                    "tf.Graph, with eager execution enabled."
                )
            tf.raw_ops.SaveV2(
                prefix=os.fspath(prefix),
                tensor_names=list(tensors),
                shape_and_slices=[""] * len(tensors),
                tensors=[tf.constant(np.asarray(value)) for value in tensors.values()],
            )
    except tf.errors.OpError as error:
        raise OSError(f"{os.fspath(prefix)} cannot be written: {error}") from error


def _tensorflow() -> Any:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "Writing TensorFlow's checkpoints needs TensorFlow: "
            'pip install "monolith_optax[tf]".'
        ) from error
    return tf
