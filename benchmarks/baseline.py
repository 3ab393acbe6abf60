"""What got slower than in an earlier run: `python -m benchmarks --baseline OLD.json`.

Half of a side's runs lie between its quartiles. This spread is the noise: a side is
slower if its lower quartile is now above the upper quartile of before. A side with
fewer than `LEAST_RUNS` runs has no spread to speak of and is not judged.
"""

from collections.abc import Iterator
from typing import Any

LEAST_RUNS = 3
# If one of these differs, it may be the reason that something is slower.
CONDITIONS = "processor", "cores", "device", "quick"


def slower(old: Any, new: Any) -> Iterator[str]:
    """Lines about what is slower in one file of results than in an older one."""
    for fact in CONDITIONS:
        before, now = old["machine"].get(fact), new["machine"].get(fact)
        if before != now:
            yield f"Do not trust this: {fact!r} was {before!r} and is {now!r}."
    earlier, count, unjudged = _sides(old), 0, 0
    for key, now in _sides(new).items():
        before = earlier.get(key)
        if before is None or min(before["runs"], now["runs"]) < LEAST_RUNS:
            unjudged += 1
            continue
        if now["quartiles ms"][0] > before["quartiles ms"][1]:
            count += 1
            yield (
                f"{': '.join(key)}: {_figures(before)} before, {_figures(now)} now, "
                f"{now['median ms'] / before['median ms']:.2f} times"
            )
    compared = len(_sides(new)) - unjudged
    yield f"{count} of {compared} got slower by more than the noise."
    if unjudged:
        yield (
            f"{unjudged} more are new, or ran fewer than {LEAST_RUNS} times, so that "
            "their noise is unknown."
        )


def _sides(results: Any) -> dict[tuple[str, str, str], Any]:
    return {
        (case["benchmark"], case["case"], side): figures
        for case in results["cases"]
        for side, figures in case["sides"].items()
    }


def _figures(side: Any) -> str:
    lower, upper = side["quartiles ms"]
    return f"{side['median ms']:.3g} ms ({lower:.3g} to {upper:.3g})"
