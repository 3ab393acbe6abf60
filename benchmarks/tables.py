"""Writes the figures of published runs into the pages on speed.

`python -m benchmarks.tables` fills what stands between `<!-- benchmarks: NAME -->` and
`<!-- end -->`; with `--check` it changes nothing and fails if a page is out of date.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.results import cases, markdown, ratios, text

DOCS = ROOT / "docs"
RESULTS = DOCS / "benchmarks.json"
PAGES = {DOCS / "speed.md": RESULTS, DOCS / "gpu.md": DOCS / "benchmarks_gpu.json"}
MARKED = re.compile(r"(<!-- benchmarks: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Fills the pages, or checks them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables")
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    for page, results in PAGES.items():
        before = page.read_text()
        after = filled(before, _run(results))
        if check and after != before:
            sys.exit(
                f"{page.name} does not have the figures of {results.name}: run "
                "python -m benchmarks.tables."
            )
        page.write_text(after)


def filled(page: str, results: Any) -> str:
    """A page with all of its tables made anew."""

    def fill(match: re.Match[str]) -> str:
        start, name, end = match.groups()
        given = results
        if name == "overview":
            given = [_run(path) for path in PAGES.values()]
        return f"{start}\n{TABLES[name](given)}\n\n{end}"

    return MARKED.sub(fill, page)


def _run(path: Path) -> Any:
    return json.loads(path.read_text())


def machine(results: Any) -> str:
    """The machine and the versions, in a sentence."""
    facts = dict(results["machine"])
    processor, cores = facts.pop("processor"), facts.pop("cores")
    device, commit = facts.pop("device"), facts.pop("commit")
    quick, vectors = facts.pop("quick", ""), facts.pop("vectors", "")
    versions = ", ".join(f"{name} {version}" for name, version in facts.items())
    return (
        f"Measured on {cores} cores of an {processor}{vectors and f' with {vectors}'} "
        f"(JAX's device: {device}), "
        f"commit {commit}: {versions}."
        + (f" **Only a quick run: {quick}.**" if quick else "")
    )


def overview(runs: list[Any]) -> str:
    """Our time and that of each other side, on all devices that were measured."""
    lines = []
    for results in runs:
        device = results["machine"]["device"]
        lines += [
            [
                "CPU" if device == "cpu" else device,
                pair.what,
                pair.ours,
                pair.peer,
                text(pair.ours_ms),
                text(pair.peer_ms),
                f"{pair.ratio:.2f}",
            ]
            for pair in ratios(results, dense=True)
        ]
    columns = ["device", "case", "ours", "peer", "ours, ms", "peer, ms", "ratio"]
    return markdown(columns, lines)


def growing(results: Any) -> str:
    """A step on one table by its rows."""
    return pivot(
        (f"{case['sizes']['rows']:,} rows", case)
        for case in cases(results, "rows", tables=1)
    )


def tables(results: Any) -> str:
    """A step on many tables."""
    many = [c for c in cases(results, "rows") if c["sizes"]["tables"] > 1]
    return pivot(("ms", case) for case in many)


def dense(results: Any) -> str:
    """Dense steps, also on many leaves."""
    some = cases(results, "dense") + cases(results, "many_leaves")
    return pivot((case["case"], case) for case in some)


def bandwidth(results: Any) -> str:
    """How much of a copy's bandwidth dense steps reach."""
    some = cases(results, "dense")
    return pivot(((case["case"], case) for case in some), "of copy bandwidth")


def breakdown(results: Any) -> str:
    """Where the time of a row-sparse step goes."""
    return pivot((case["case"], case) for case in cases(results, "breakdown"))


def first_call(results: Any) -> str:
    """Seconds of the first call, on the clock."""
    some = cases(results, "first_call")
    return pivot(((case["case"], case) for case in some), scale=1e-3)


def dlrm(results: Any) -> str:
    """Whole training steps, and their parts."""
    return pivot((case["case"], case) for case in cases(results, "dlrm"))


def small_tables(results: Any) -> str:
    """The time of a step on rows divided by that of a dense step."""
    cells: dict[str, dict[str, str]] = {}
    for case in cases(results, "small_tables"):
        title, _, _ = case["case"].rpartition(", ")
        ids, rows = (case["sizes"][name] for name in ("ids", "rows"))
        by_rows, dense = (side["median ms"] for side in case["sides"].values())
        cells.setdefault(title, {})[f"{rows / ids:g}"] = f"{by_rows / dense:.2f}"
    shares = dict.fromkeys(share for line in cells.values() for share in line)
    lines = [[title, *line.values()] for title, line in cells.items()]
    return markdown(["rows for each id", *shares], lines)


def net(results: Any) -> str:
    """The node checker and ten threads."""
    some = [case for case in cases(results, "net") if len(case["sides"]) > 1]
    return pivot((case["case"], case) for case in some)


def pivot(
    columns: Iterable[tuple[str, Any]], figure: str = "median ms", scale: float = 1.0
) -> str:
    """A line for each side, a column for each title; cases may share a title."""
    cells: dict[tuple[str, str], str] = {}
    for title, case in columns:
        for side, figures in case["sides"].items():
            if figure in figures:
                cells[side, title] = text(scale * figures[figure])
    sides = dict.fromkeys(side for side, _ in cells)
    titles = dict.fromkeys(title for _, title in cells)
    return markdown(
        ["timed", *titles],
        [[side, *(cells.get((side, title), "") for title in titles)] for side in sides],
    )


TABLES: dict[str, Callable[[Any], str]] = {
    make.__name__: make
    for make in (
        machine,
        overview,
        growing,
        tables,
        dense,
        bandwidth,
        breakdown,
        first_call,
        dlrm,
        small_tables,
        net,
    )
}

if __name__ == "__main__":
    main()
