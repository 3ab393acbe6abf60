"""Times the sides of a comparison in turns, and writes the results as JSON."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from benchmarks import ROOT
from benchmarks.results import markdown, text

# Prepares a run. Only the run is timed; it returns when its results are ready.
Side = Callable[[], Callable[[], object]]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """One comparison: the seconds of each side, ours first.

    Attributes:
      benchmark: the module that made it.
      name: what was compared.
      times: seconds of each run of each side.
      sizes: the numbers that pictures and tables need, by name.
      bytes_moved: bytes that a side's rule must read and write in a run.
      bandwidth: bytes per second that a plain copy reads and writes on this machine.
      more: further columns, by name and then by side.
    """

    benchmark: str
    name: str
    times: Times
    sizes: Mapping[str, int] = field(default_factory=dict)
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    bandwidth: float = 0.0
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def sides(self) -> dict[str, dict[str, Any]]:
        """The figures of each side; those that are None are left out."""
        ours = statistics.median(next(iter(self.times.values())))
        sides = {}
        for side, seconds in self.times.items():
            median = statistics.median(seconds)
            figures: dict[str, Any] = {
                "median ms": 1e3 * median,
                "quartiles ms": [1e3 * quartile for quartile in quartiles(seconds)],
                "runs": len(seconds),
                "x first": median / ours,
            }
            if side in self.bytes_moved:
                moved = self.bytes_moved[side]
                figures["MB to move"] = moved / 1e6
                figures["of copy bandwidth"] = moved / median / self.bandwidth
            figures |= {
                column: by_side.get(side) for column, by_side in self.more.items()
            }
            sides[side] = {k: v for k, v in figures.items() if v is not None}
        return sides

    def as_json(self) -> dict[str, Any]:
        """What the pictures, the tables and `--baseline` read."""
        return {
            "benchmark": self.benchmark,
            "case": self.name,
            "sizes": dict(self.sizes),
            "sides": self.sides(),
        }

    def table(self) -> str:
        """All figures in Markdown."""
        sides = self.sides()
        columns = list(
            dict.fromkeys(key for figures in sides.values() for key in figures)
        )
        cells = [
            [side, *(text(figures.get(column)) for column in columns)]
            for side, figures in sides.items()
        ]
        return (
            f"\n{self.benchmark}: {self.name}\n\n{markdown(['side', *columns], cells)}"
        )


def quartiles(seconds: list[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(seconds) == 1:
        return seconds[0], seconds[0]
    lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return lower, upper


def interleave(
    sides: Mapping[str, Side], rounds: int, runs: int = 1, *, warm_up: bool = True
) -> Times:
    """Seconds of each side's runs; the sides take turns, `runs` at a time.

    With `warm_up`, there is one more round, and one more run in each turn; the first
    of each are not counted.
    """
    times: Times = {title: [] for title in sides}
    extra = int(warm_up)
    for number in range(rounds + extra):
        for title, prepare in sides.items():
            for run_number in range(runs + extra):
                run = prepare()
                start = time.perf_counter()
                run()
                end = time.perf_counter()
                if number >= extra and run_number >= extra:
                    times[title].append(end - start)
    return times


def machine() -> dict[str, str]:
    """The hardware, the commit and the packages that the figures were measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    flags = set(" ".join(line for line in lines if line.startswith("flags")).split())
    facts = {
        "processor": models[0] if models else platform.processor(),
        # FBGEMM's kernels depend on them.
        "vectors": next((v for v in ("avx512f", "avx2") if v in flags), "unknown"),
        "cores": str(os.cpu_count()),
        "device": jax.devices()[0].device_kind,
        "commit": commit(),
        "Python": platform.python_version(),
    }
    packages = {
        "JAX": "jax",
        "jaxlib": "jaxlib",
        "optax": "optax",
        "NumPy": "numpy",
        "PyTorch": "torch",
        "FBGEMM": "fbgemm_gpu-cpu",
        "TensorFlow": "tensorflow",
    }
    for name, package in packages.items():
        try:
            facts[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def commit(folder: Path = ROOT) -> str:
    """The commit of a clone, with '-dirty' where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
    try:
        result = subprocess.run(
            command, cwd=folder, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def write(cases: list[Case], facts: dict[str, str], path: Path) -> None:
    """Writes all figures as JSON."""
    results = {"machine": facts, "cases": [case.as_json() for case in cases]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
