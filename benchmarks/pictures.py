"""Draws the results: `python -m benchmarks.pictures FOLDER`, which has benchmarks.json.

- step_time.png: milliseconds of a step against the rows of the table.
- ratios.png: our time divided by that of a peer with the same optimizer.
- scaling.png: nanoseconds for an id as ids, columns, tables or rows become more.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import cases, ratios

OURS = "#1f6fd6"
# The same peer has one colour in all pictures.
COLORS = {
    "dense": "#c0392b",
    "PyTorch": "#e67e22",
    "FBGEMM": "#27815c",
    "TensorFlow": "#8e6bb0",
}


def draw(path: Path) -> None:
    """Draws all pictures for which there are results, beside their file."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        print(f"\nNo pictures: {error}")
        return
    plt.rcParams.update({"font.size": 13, "axes.grid": True, "grid.alpha": 0.3})
    results = json.loads(path.read_text())
    pictures: list[tuple[str, Callable[[Any], Any]]] = [
        ("step_time.png", step_time),
        ("ratios.png", ratio_bars),
        ("scaling.png", scaling),
    ]
    for name, picture in pictures:
        figure = picture(results)
        if figure is not None:
            figure.savefig(path.parent / name, dpi=110, facecolor="white")
            plt.close(figure)


def step_time(results: Any) -> Any:
    """Milliseconds against rows, a panel for each optimizer, log-log."""
    import matplotlib.pyplot as plt

    panels = {
        title: [
            case
            for case in cases(results, "rows", tables=1)
            if case["case"].startswith(f"{name},")
        ]
        for name, title in (("optax.adam", "Adam"), ("adagrad", "Adagrad"))
    }
    if not all(panels.values()):
        return None
    # Narrow, to be readable on a phone.
    figure, column = plt.subplots(
        len(panels), figsize=(7, 8), sharex=True, sharey=True, layout="constrained"
    )
    for axes, (title, panel) in zip(column, panels.items(), strict=True):
        sides = dict.fromkeys(side for case in panel for side in case["sides"])
        for side in sides:
            points = [
                (case["sizes"]["rows"], case["sides"][side]["median ms"])
                for case in panel
                if side in case["sides"]
            ]
            ours = side.startswith("lazy_rows")
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                linewidth=3 if ours else 1.8,
                color=color(side),
                label=f"{side} (ours)" if ours else side,
            )
        axes.set(xscale="log", yscale="log", title=title, ylabel="ms of a step")
        axes.legend(fontsize=12, loc="upper left")
    column[-1].set_xlabel("rows of the table")
    lower, upper = column[0].get_ylim()
    column[0].set_ylim(lower, 10 * upper)  # room for the legends
    sizes = next(iter(panels.values()))[0]["sizes"]
    figure.suptitle(f"A step on {sizes['ids']:,} ids of {sizes['dim']} columns, on CPU")
    return figure


def ratio_bars(results: Any) -> Any:
    """Our time divided by the peer's, a bar for each pair."""
    import matplotlib.pyplot as plt

    pairs = ratios(results)
    if not pairs:
        return None
    figure, axes = plt.subplots(
        figsize=(7, 1 + 0.72 * len(pairs)), layout="constrained"
    )
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0}  # no line through it
    values = [pair.ratio for pair in pairs]
    bars = axes.barh(range(len(pairs)), values, color=OURS, height=0.42)
    axes.bar_label(
        bars,
        [
            f"{pair.ratio:.2f}  ({pair.ours_ms:.3g} of {pair.peer_ms:.3g} ms)"
            for pair in pairs
        ],
        padding=3,
        bbox=plain,
    )
    for height, pair in enumerate(pairs):
        tables = f"{pair.tables} table{'s' * (pair.tables > 1)}"
        axes.text(0.01, height - 0.3, f"{pair.peer}, {tables}", bbox=plain)
    axes.axvline(1, color="gray", linewidth=2, zorder=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.65 * max(1, *values))
    axes.set_yticks([])
    axes.set_xlabel("\n".join(dict.fromkeys(pair.what for pair in pairs)))
    axes.set_title("Our time / a peer's with the same optimizer", loc="left")
    return figure


def scaling(results: Any) -> Any:
    """Nanoseconds for an id, a panel for each size that grows."""
    import matplotlib.pyplot as plt

    panels = cases(results, "scaling")
    if not panels:
        return None
    figure, grid = plt.subplots(
        -(-len(panels) // 2),
        2,
        figsize=(7, 6.5),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    labels = {"ids": "ids of a batch", "dim": "columns", "rows": "rows of the table"}
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, case in zip(grid.flat, panels, strict=False):
        size = case["case"].rsplit(" ", 1)[1]
        sides = case["sides"].values()
        axes.plot(
            [side[size] for side in sides],
            [side["ns for an id"] for side in sides],
            marker="o",
            linewidth=3,
            color=OURS,
        )
        axes.set(xscale="log", yscale="log", xlabel=labels.get(size, size))
    for axes in grid[:, 0]:
        axes.set_ylabel("ns for an id")
    lower, upper = grid[0, 0].get_ylim()
    grid[0, 0].set_ylim(lower / 3, 3 * upper)  # otherwise noise would look large
    figure.suptitle("lazy_rows(adagrad): what an id costs as one size grows")
    return figure


def color(side: str) -> str:
    """Ours is one colour everywhere."""
    return next((c for name, c in COLORS.items() if name in side), OURS)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) / "benchmarks.json")
