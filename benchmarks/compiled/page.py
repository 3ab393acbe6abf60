"""The tables of the page on compiled programs, and the page."""

import json
import re
from typing import Any

from benchmarks import ROOT
from benchmarks.results import markdown

DOCS = ROOT / "docs"
RESULTS, PAGE = DOCS / "compiled.json", DOCS / "compiled.md"
MARKED = re.compile(r"<!-- compiled: (\w+) -->.*?<!-- end -->", re.DOTALL)

COLUMNS = {
    "copies of tables": "copies of tables",
    "temporaries": "temporaries, MB",
    "arguments": "arguments, MB",
    "bytes accessed": "accessed, MB",
    "kernels": "instructions that start kernels",
    "loops": "loops",
    "collectives": "sent, MB",
}


def publish(results: dict[str, Any], versions: dict[str, str]) -> None:
    """Replaces what the documents say of these targets' groups."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"targets": {}}
    known = before["targets"]
    for name, cases in results.items():
        known[name] = _replaced(known.get(name, []), cases)
    targets = {name: known[name] for name in TITLES if name in known}
    versions = before.get("versions", {}) | versions
    published = {"versions": versions, "targets": targets}
    RESULTS.write_text(json.dumps(published, indent=1) + "\n")
    PAGE.write_text(page(published))
    for path in DOCS / "tpu.md", DOCS / "multihost.md":
        path.write_text(filled(path.read_text(), published))


def _replaced(before: list[Any], cases: list[Any]) -> list[Any]:
    groups = {case["group"] for case in cases}
    return [case for case in before if case["group"] not in groups] + cases


def table(cases: list[dict[str, Any]]) -> str:
    """The cases of a target."""
    return markdown(
        ["step", *COLUMNS.values()],
        [
            [f"{case['group']}: {case['case']}", *(_text(case, key) for key in COLUMNS)]
            for case in cases
        ],
    )


def _text(case: dict[str, Any], column: str) -> str:
    value = case[column]
    if column in {"temporaries", "arguments", "bytes accessed"}:
        return "" if value is None else f"{value / 1e6:,.1f}"
    if column == "collectives":
        return ", ".join(f"{k} {v / 1e6:,.2f}" for k, v in sorted(value.items()))
    return str(value)


def tpu(results: Any) -> str:
    """Steps on tables of each width on a TPU, with the layouts of docs/tpu.md."""
    steps = {(s["group"], s["case"]): s for s in results["targets"]["v5e:2x2"]}
    rows = []
    for group, layout in {"widths": "default", "row-major": "by rows"}.items():
        rows += [
            [f"{case}, {layout}", *(_text(step, c) for c in list(COLUMNS)[:4])]
            for (its_group, case), step in steps.items()
            if its_group == group
        ]
    return markdown(["table", *list(COLUMNS.values())[:4]], rows)


def cluster(results: Any) -> str:
    """What a device holds, needs and sends in steps on one large table."""
    rows = [
        [TITLES[name], step["case"], *_of_a_device(step)]
        for name in ("h100x8", "v5e:16x16")
        for step in results["targets"][name]
        if step["group"] == "cluster"
    ]
    return markdown(["devices", "step", "held, MB", "temporary, MB", "sent, MB"], rows)


def _of_a_device(step: dict[str, Any]) -> list[str]:
    """A summed array goes round twice; permutations are the ring, which rests."""
    weights = {"all-reduce": 2, "collective-permute": 0}
    sent = sum(n * weights.get(k, 1) for k, n in step["collectives"].items())
    return [
        f"{step['arguments'] / 1e6:,.0f}",
        f"{step['temporaries'] / 1e6:,.1f}",
        f"{sent / 1e6:,.1f}",
    ]


TABLES = {"tpu": tpu, "cluster": cluster}


def filled(text: str, results: Any) -> str:
    """A page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        table = TABLES[match[1]](results)
        return f"<!-- compiled: {match[1]} -->\n\n{table}\n\n<!-- end -->"

    return MARKED.sub(made, text)


def page(results: Any) -> str:
    """docs/compiled.md."""
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    parts = [INTRODUCTION.format(versions=versions)]
    for name, cases in results["targets"].items():
        parts += [f"## {TITLES[name]}", table(cases)]
    return "\n\n".join(parts) + "\n"


TITLES = {
    "cpu": "CPU",
    "h100": "One H100",
    "h100x8": "Eight H100 of one host",
    "v5e:2x2": "TPU v5e, 2 x 2",
    "v5e:4x4": "TPU v5e, 4 x 4",
    "v5e:16x16": "TPU v5e, 16 x 16",
    "v5p": "TPU v5p, 2 x 2 x 1",
}

INTRODUCTION = """\
# What compiled programs say

What a step copies, allocates, sends and starts on devices that nobody has at hand.

`python -m benchmarks.compiled` compiles training steps for CPUs, NVIDIA's H100 and
Google's TPUs, and reads from each program what it copies, allocates, sends and starts.
**Nothing here was run**: there are no times on this page, and no GPU or TPU was at
hand. The compilers suffice, in the version of the JAX that is installed:

```console
$ pip install "jax[tpu]" jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
$ python -m benchmarks.compiled
```

A target whose compiler is not installed is left out. [Tables on a TPU](tpu.md) draws
conclusions from the figures for TPUs.

Unless a line says otherwise, a step is that of `lazy_rows(embedding.adagrad)` on one
table of 1,000,000 rows of 16 float32 numbers with the gradients of 8,192 ids, donated,
on one device of the target. 26 tables have 100,000 rows and 2,048 ids each. Steps of
"meshes" look up their rows, and use all devices; "evaluation" only looks up. Those of
"cluster" are on [a table with 2,097,152 rows of 128 numbers on each
device](multihost.md#what-it-costs-on-256-devices), with the ids of each device, by
`adamom`.

- **Copies of tables**: instructions that copy an array as large as a table or a slot.
- **Temporaries** and **arguments** are those of one device, with what layouts add.
- **Accessed** is the compiler's own estimate. On CPU it charges a scatter in place for
  the whole table. The compiler for GPUs has none.
- **Instructions that start kernels**: a `sort` is one, and starts several kernels.
  Without a GPU the compiler cannot use the library that sorts there and writes a sort
  of its own.
- **Sent** is what the collectives of each kind yield on a device.

Compiled by {versions}."""
