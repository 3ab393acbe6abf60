"""Reads and writes TensorFlow's checkpoint files, with TensorFlow itself."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from monolith_optax._public import public


def read_tensorflow(prefix: str | os.PathLike[str]) -> "TensorFlowCheckpoint":
    """The tensors of a TensorFlow checkpoint, each read when you ask for it.

    Needs TensorFlow: `pip install "monolith_optax[tf]"`.

    Args:
      prefix: the path of its index file without `.index`, such as `model/model.ckpt-6`.

    Raises:
      FileNotFoundError: there is no such checkpoint, or one of its files is missing.
      ValueError: a file is damaged; damaged tensors are found when they are read.
      ImportError: TensorFlow is not installed.
    """
    return TensorFlowCheckpoint(prefix)


@public("monolith_optax.checkpoint")
class TensorFlowCheckpoint(Mapping[str, np.ndarray]):
    """A mapping from the names in a TensorFlow checkpoint to arrays.

    Nothing is cached: an array is read again each time you ask for it, so that
    importing a checkpoint takes little more memory than its result.

    Attributes:
      prefix: the path of its index file without `.index`.
      shapes: the shape of each tensor.
      dtypes: the NumPy dtype of each tensor.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        """Reads names, shapes and dtypes."""
        self.prefix = os.fspath(prefix)
        index = Path(f"{self.prefix}.index")
        if not index.is_file():
            raise FileNotFoundError(
                f"There is no file {index}. The prefix of a checkpoint ends before "
                "'.index', as in 'model/model.ckpt-6'."
            )
        tf = _tensorflow()
        # What TensorFlow raises for damaged files depends on the damage.
        self._errors = tf.errors.OpError, LookupError, RuntimeError, ValueError
        try:
            self._reader = tf.train.load_checkpoint(self.prefix)
            shapes = self._reader.get_variable_to_shape_map()
            dtypes = self._reader.get_variable_to_dtype_map()
        except self._errors as error:
            raise ValueError(f"{index} is damaged: {_line(error)}") from error
        self.shapes = {name: tuple(shapes[name]) for name in sorted(shapes)}
        self.dtypes = {name: np.dtype(dtypes[name].as_numpy_dtype) for name in shapes}
        self._files = _data_files(self.prefix)

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor."""
        if name not in self.shapes:
            raise KeyError(name)
        try:
            return np.asarray(self._reader.get_tensor(name))
        except self._errors as error:
            files = " or ".join(self._files)
            raise ValueError(
                f"{files} is damaged: {name} cannot be read: {_line(error)}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        """The names in alphabetical order."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """How many tensors there are."""
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor, without reading it."""
        return name in self.shapes


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
        what = "are no tensors" if not tensors else "is a tensor without a name"
        raise ValueError(f"There {what} to write to {os.fspath(prefix)}.")
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


def _data_files(prefix: str) -> list[str]:
    """The data files that belong to a prefix, all of which must exist."""
    pattern = re.compile(re.escape(Path(prefix).name) + r"\.data-\d{5}-of-(\d{5})")
    there = (file.name for file in Path(prefix).parent.iterdir())
    matches = map(pattern.fullmatch, there)
    count = max((int(match[1]) for match in matches if match), default=1)
    files = [f"{prefix}.data-{i:05}-of-{count:05}" for i in range(count)]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"There is no file {file}, but there is {prefix}.index."
            )
    return files


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _tensorflow() -> Any:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "Reading and writing TensorFlow's checkpoints needs TensorFlow: "
            'pip install "monolith_optax[tf]".'
        ) from error
    return tf
