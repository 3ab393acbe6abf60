"""Importing a TensorFlow checkpoint of 1 GB: `python -m benchmarks.checkpoint`.

Prints the time and the peak memory, without what TensorFlow and JAX take by
themselves. Needs the extra 'tf'.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from monolith_optax import adamom
from monolith_optax.checkpoint import import_slots, read_tensorflow, write_tensorflow

SHAPES = {f"table{i}": (1_000_000, 16) for i in range(4)}
SLOTS = "", "/Adamom/m", "/Adamom/v", "/Adamom/c"


def main() -> None:
    """Writes the checkpoint, and measures in a separate process."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as folder:
        prefix = f"{folder}/model.ckpt-6"
        rng = np.random.default_rng(0)
        tensors = {
            name + slot: rng.random(shape, np.float32)
            for name, shape in SHAPES.items()
            for slot in SLOTS
        }
        write_tensorflow(prefix, tensors | {"global_step": np.int64(6)})
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"checkpoint: {size / 1e9:.3f} GB", flush=True)
        subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoint", prefix], check=True
        )


def measure(prefix: str) -> None:
    """Imports the checkpoint into shapes, which take no memory."""
    read_tensorflow(prefix)  # imports TensorFlow
    jnp.ones(1).block_until_ready()
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()
    }
    state = jax.eval_shape(adamom().init, params)
    before = peak()
    start = time.perf_counter()
    jax.block_until_ready(import_slots(read_tensorflow(prefix), params, state))
    seconds = time.perf_counter() - start
    print(f"import: {seconds:.2f} s, {peak() - before:.3f} GB of memory at the peak")


def peak() -> float:
    """The peak memory of this process in GB; only on Linux."""
    status = Path("/proc/self/status").read_text()
    [kilobytes] = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return int(kilobytes) / 1e6


if __name__ == "__main__":
    measure(sys.argv[1]) if sys.argv[1:] else main()
