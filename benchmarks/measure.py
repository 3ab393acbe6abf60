"""Times the sides in turns, and writes the times as a table, JSON and a picture."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

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
      bytes_moved: bytes that a side's rule must read and write in a run.
      bandwidth: bytes per second that a plain copy reads and writes on this machine.
      more: further columns, by name and then by side.
    """

    benchmark: str
    name: str
    times: Times
    bytes_moved: Mapping[str, int] = field(default_factory=dict)
    bandwidth: float = 0.0
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each side: milliseconds, ratios and shares."""
        ours = statistics.median(next(iter(self.times.values())))
        rows = []
        for side, seconds in self.times.items():
            median = statistics.median(seconds)
            row = {
                "side": side,
                "median ms": 1e3 * median,
                "min ms": 1e3 * min(seconds),
                "max ms": 1e3 * max(seconds),
                "x ours": median / ours,
            }
            if side in self.bytes_moved:
                moved = self.bytes_moved[side]
                row["MB to move"] = moved / 1e6
                row["of copy bandwidth"] = moved / median / self.bandwidth
            row |= {column: by_side.get(side) for column, by_side in self.more.items()}
            rows.append(row)
        return rows

    def table(self) -> str:
        """The rows in Markdown."""
        rows = self.rows()
        columns = list(dict.fromkeys(column for row in rows for column in row))
        lines = [columns, ["---", *["---:"] * (len(columns) - 1)]]
        lines += [[_text(row.get(column)) for column in columns] for row in rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"\n{self.benchmark}: {self.name}\n\n{table}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


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
    """The hardware and the packages that the figures were measured with."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    facts = {
        "processor": models[0] if models else platform.processor(),
        "cores": str(os.cpu_count()),
        "device": jax.devices()[0].device_kind,
    }
    packages = "jax", "optax", "torch", "fbgemm_gpu-cpu", "tensorflow_cpu"
    for package in packages:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return facts


def write(cases: list[Case], facts: dict[str, str], folder: Path) -> None:
    """Writes all figures as JSON, and a picture if Matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [
        {"benchmark": case.benchmark, "case": case.name, "sides": case.rows()}
        for case in cases
    ]
    text = json.dumps({"machine": facts, "results": results}, indent=1)
    (folder / "benchmarks.json").write_text(text + "\n")
    try:
        draw(cases, facts, folder / "benchmarks.png")
    except ImportError as error:
        print(f"\nNo picture: {error}")


def draw(cases: list[Case], facts: dict[str, str], path: Path) -> None:
    """A panel for each case: how long each side takes, as a ratio to ours."""
    import matplotlib.pyplot as plt

    columns = 2
    panels = -(-len(cases) // columns)
    figure, grid = plt.subplots(
        panels, columns, figsize=(13, 2.6 * panels), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(cases) :]:
        axes.remove()
    for axes, case in zip(grid.flat, cases, strict=False):
        rows = case.rows()[::-1]
        ratios = [row["x ours"] for row in rows]
        colors = ["tab:gray"] * (len(rows) - 1) + ["tab:blue"]
        bars = axes.barh([row["side"] for row in rows], ratios, color=colors)
        labels = [f" {_text(row['median ms'])} ms" for row in rows]
        axes.bar_label(bars, labels)
        axes.margins(x=0.2)
        axes.set_title(f"{case.benchmark}: {case.name}", fontsize=10)
        axes.axvline(1, color="tab:blue", linewidth=0.8)
    figure.suptitle(
        f"Time relative to ours (blue). {facts['processor']}, {facts['cores']} cores"
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)
