"""Compiles steps for devices that are not here: `python -m benchmarks.compiled`."""

import argparse
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

# Read when JAX is first imported. Nothing runs on a TPU or GPU, so nothing is tuned.
os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-16",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TF_CPP_MIN_LOG_LEVEL="3",
    XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0 "
    "--xla_force_host_platform_device_count=8",
)

from benchmarks.compiled.cases import cases
from benchmarks.compiled.page import publish, table
from benchmarks.compiled.read import figures
from benchmarks.compiled.targets import NAMES, ONLY_MESHES, Target, target


def main() -> None:
    """Prints the figures of each target, and writes them as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled",
        description="Compiles steps and reads what they copy, allocate, send and "
        "start. Nothing runs. Targets whose plugin is not installed are left out.",
    )
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=", ".join(NAMES))
    parser.add_argument("--all", action="store_true", help="all optimizers of tables")
    parser.add_argument(
        "--group", action="append", help="compile only this group; may be repeated"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out what takes long to compile"
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSON to write")
    parser.add_argument(
        "--publish",
        action="store_true",
        help="replace what docs/compiled.json and the pages say of these targets",
    )
    args = parser.parse_args()
    if unknown := set(args.targets) - set(NAMES):
        parser.error(f"expected targets out of {NAMES}, got {sorted(unknown)}")
    results: dict[str, Any] = {}
    for name in args.targets or NAMES:
        try:
            devices = target(name)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            continue
        results[name] = compiled_for(devices, args)
        print(f"\n{name}\n\n{table(results[name])}", flush=True)
        if args.publish:
            publish({name: results[name]}, versions())
    if args.output:
        args.output.write_text(json.dumps({"targets": results}))


def compiled_for(devices: Target, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of all cases that make sense there."""
    found = []
    least = 2 if devices.name in ONLY_MESHES else 1
    for case in cases(everything=args.all):
        fits = least <= case.needs <= len(devices.devices)
        takes_long = args.quick and devices.platform in case.slow
        wanted = args.group is None or case.group in args.group
        if wanted and fits and devices.platform in case.platforms and not takes_long:
            start = time.perf_counter()
            compiled = case.lowered(devices).compile()
            took = f"{time.perf_counter() - start:.0f} s"
            print(f"{devices.name}: {case.group}, {case.name}: {took}", file=sys.stderr)
            found.append({"group": case.group, "case": case.name} | figures(compiled))
    return found


def versions() -> dict[str, str]:
    """What compiled."""
    packages = "jax", "jaxlib", "optax", "libtpu", "jax-cuda12-plugin"
    installed = {d.name for d in metadata.distributions()}
    return {name: metadata.version(name) for name in packages if name in installed}


if __name__ == "__main__":
    main()
