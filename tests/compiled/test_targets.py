"""Steps compiled for GPUs and TPUs are in place; nothing is run.

MONOLITH_OPTAX_COMPILERS=VENV/bin/python pytest -m compilers -n 0 THIS_FILE

VENV has the compilers that docs/compiled.md names. `.ci/run` makes one.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILERS = os.environ.get("MONOLITH_OPTAX_COMPILERS")
TARGETS = "h100", "h100x8", "v5e:2x2", "v5e:4x4"
TABLE = 1_000_000 * 16 * 4

pytestmark = [
    pytest.mark.compilers,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not COMPILERS, reason="needs MONOLITH_OPTAX_COMPILERS"),
]


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The figures of each step, by target, group and case."""
    output = tmp_path_factory.mktemp("compiled") / "figures.json"
    command = [COMPILERS, "-m", "benchmarks.compiled", *TARGETS]
    done = subprocess.run(
        [*command, "--quick", "--output", output],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {
        (target, step["group"], step["case"]): step
        for target, steps in json.loads(output.read_text())["targets"].items()
        for step in steps
    }


def test_every_target_is_compiled_for(steps):
    assert {target for target, *_ in steps} == set(TARGETS)


def test_no_step_on_a_gpu_copies_a_table_or_has_a_loop(steps):
    on_gpus = {
        name: step
        for name, step in steps.items()
        # Those of "cluster" that are not spread are there to compare.
        if "h100" in name[0] and (name[1] != "cluster" or "spread" in name[2])
    }
    assert len(on_gpus) > 20
    for name, step in on_gpus.items():
        assert (step["copies of tables"], step["not in place"]) == (0, []), name
        # The ring of spread tables is a loop: of no turns where the batch fits.
        assert step["loops"] == 0 or "spread" in name[2], name


def test_a_stack_on_a_gpu_starts_fewer_kernels_than_its_tables(steps):
    apart, stack = (
        steps["h100", "tables", f"{name}, 16 columns"]
        for name in ("26 tables", "a stack")
    )
    assert 8 * stack["kernels"] < apart["kernels"]


@pytest.mark.parametrize("columns", [128, 256])
def test_tables_of_128_columns_and_more_are_in_place_on_a_tpu(steps, columns):
    step = steps["v5e:2x2", "widths", f"{columns} columns"]
    assert step["not in place"] == []
    assert step["temporaries"] < TABLE / 10
    assert step["bytes accessed"] < columns / 16 * TABLE  # half of table and slot


@pytest.mark.parametrize("columns", [16, 64])
def test_narrower_ones_are_not_unless_they_are_row_major(steps, columns):
    by_default = steps["v5e:2x2", "widths", f"{columns} columns"]
    row_major = steps["v5e:2x2", "row-major", f"{columns} columns"]
    assert by_default["bytes accessed"] > 8 * row_major["bytes accessed"]
    assert row_major["not in place"] == []
    assert row_major["temporaries"] < TABLE / 10
    assert row_major["arguments"] > 0.95 * 128 / columns * by_default["arguments"]
    if columns == 64:
        assert by_default["copies of tables"] == 4


def test_a_step_on_a_spread_table_needs_what_the_share_of_a_device_needs(steps):
    spread = steps["h100x8", "cluster", "spread, 256 ids"]
    whole_batch = steps["h100x8", "cluster", "True, 256 ids"]
    assert spread["copies of tables"] == 0
    assert spread["temporaries"] < whole_batch["temporaries"] / 2
    sent = spread["collectives"]["all-to-all"]
    assert sent < sum(whole_batch["collectives"].values()) / 4


def test_no_mesh_sends_a_table(steps):
    meshes = {name: step for name, step in steps.items() if name[1] == "meshes"}
    assert len(meshes) >= 6
    for name, step in meshes.items():
        assert sum(step["collectives"].values()) < 3e6, name
