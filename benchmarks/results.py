"""What pictures and tables read from benchmarks.json, and how they write figures."""

from typing import Any, NamedTuple


class Ratio(NamedTuple):
    """Our median and that of another side with the same optimizer."""

    tables: int
    what: str
    ours: str
    ours_ms: float
    peer: str
    peer_ms: float

    @property
    def ratio(self) -> float:
        """Below 1, ours is faster."""
        return self.ours_ms / self.peer_ms


def cases(results: Any, benchmark: str, **sizes: int) -> list[Any]:
    """The cases of a benchmark that have these sizes."""
    return [
        case
        for case in results["cases"]
        if case["benchmark"] == benchmark and sizes.items() <= case["sizes"].items()
    ]


def ratios(results: Any, *, dense: bool = False) -> list[Ratio]:
    """All pairs of one table in the middle of its sizes, and all pairs of many tables.

    A case of 'rows' has one optimizer, so its sides are like for like. Dense sides are
    not peers: they are here only if asked for.
    """
    of_one = sorted(
        {case["sizes"]["rows"] for case in cases(results, "rows", tables=1)}
    )
    if not of_one:
        return []
    middle = of_one[(len(of_one) - 1) // 2]
    pairs = []
    for case in cases(results, "rows"):
        sizes = case["sizes"]
        if sizes["tables"] == 1 and sizes["rows"] != middle:
            continue
        (ours, figures_of_ours), *others = case["sides"].items()
        ms = figures_of_ours["median ms"]
        what = case["case"].partition(", ")[2]  # what stands before is the optimizer
        pairs += [
            Ratio(sizes["tables"], what, ours, ms, peer, figures["median ms"])
            for peer, figures in others
            if dense or not peer.endswith("dense")
        ]
    return sorted(pairs, key=lambda pair: pair.peer)


def markdown(columns: list[str], cells: list[list[str]]) -> str:
    """A table whose first column is text."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(value: Any) -> str:
    """A figure with three digits, or more before the decimal point."""
    if isinstance(value, list):
        return " to ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
