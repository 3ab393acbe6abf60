"""Devices to compile for: those of this machine, and descriptions of others."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


class Target(NamedTuple):
    """Devices of one kind."""

    name: str
    devices: list[Any]

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return str(self.devices[0].platform)

    def on_one(self) -> NamedSharding:
        """On the first device only."""
        return NamedSharding(self._mesh(1), PartitionSpec())

    def split(self) -> NamedSharding:
        """Split by rows over all devices."""
        return NamedSharding(self._mesh(len(self.devices)), PartitionSpec("x"))

    def everywhere(self) -> NamedSharding:
        """Whole on all devices."""
        return NamedSharding(self._mesh(len(self.devices)), PartitionSpec())

    def _mesh(self, count: int) -> Mesh:
        devices = np.array(self.devices[:count])
        return Mesh(devices, ("x",), axis_types=(AxisType.Auto,))


# The TPUs of a topology name; v5p has three dimensions.
TPUS = {"v5e:2x2": "v5e:2x2", "v5e:4x4": "v5e:4x4", "v5e:16x16": "v5e:16x16"}
TPUS["v5p"] = "v5p:2x2x1"
# Nodes x hosts x GPUs.
GPUS = {"h100": "1x1x1", "h100x8": "1x1x8"}
NAMES = "cpu", *GPUS, *TPUS

# One device of these is as one of h100 or v5e:2x2, so that only meshes are of interest.
ONLY_MESHES = "h100x8", "v5e:4x4", "v5e:16x16"

PLUGINS = {
    "gpu": "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12",
    "tpu": '"jax[tpu]"',
}


def target(name: str) -> Target:
    """The devices of a name.

    Raises:
      RuntimeError: the plugin that compiles for them is not installed.
    """
    if name == "cpu":
        return Target(name, jax.devices("cpu")[:8])
    kind = "gpu" if name in GPUS else "tpu"
    try:
        if kind == "gpu":
            found = topologies.get_topology_desc(
                topology_name="h100",
                platform="cuda",
                target_config=H100,
                topology=GPUS[name],
            )
        else:
            found = topologies.get_topology_desc(
                topology_name=TPUS[name], platform="tpu"
            )
    except Exception as error:  # which one depends on the plugin that is missing
        raise RuntimeError(
            f"{name} is left out, as nothing here compiles for it ({error}). Install "
            f"{PLUGINS[kind]} of JAX {jax.__version__}."
        ) from error
    return Target(name, list(found.devices))


# What XLA asks a device of this kind, from NVIDIA's data sheet and CUDA's properties.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  device_memory_size: 85899345920
  memory_bandwidth: 3350000000000
  clock_rate_ghz: 1.98
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 9 }
"""
