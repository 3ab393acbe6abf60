"""What the benchmarks say about their figures, on made-up ones; nothing is timed."""

import copy
import functools
import json
import shutil
import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import ROOT, tables
from benchmarks.baseline import slower
from benchmarks.compiled import page as compiled
from benchmarks.compiled.read import figures
from benchmarks.measure import Case, commit
from benchmarks.results import ratios


def results(case):
    facts = {"processor": "X", "cores": "2", "device": "cpu"}
    return {"machine": facts, "cases": [case.as_json()]}


def case(**milliseconds):
    seconds = {side: [ms / 1e3 for ms in times] for side, times in milliseconds.items()}
    return Case("rows", "adagrad, 10 x 16", seconds, sizes={"tables": 1, "rows": 10})


PAGE = ROOT / "docs" / "speed.md"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.stem)
def test_pages_have_the_figures_of_their_published_runs(page):
    text, figures = page.read_text(), json.loads(tables.PAGES[page].read_text())
    assert tables.MARKED.search(text)
    assert text == tables.filled(text, figures), "run python -m benchmarks.tables"


def test_pages_on_compiled_programs_have_the_published_figures():
    published = json.loads(compiled.RESULTS.read_text())
    assert set(published["targets"]) <= set(compiled.TITLES)
    assert compiled.PAGE.read_text() == compiled.page(published)
    for page, line in {
        "tpu.md": "| 128 columns, default |",
        "multihost.md": "| TPU v5e, 16 x 16 | spread, 8,192 ids |",
    }.items():
        before = (compiled.DOCS / page).read_text()
        assert before.count(line) == 1
        assert before == compiled.filled(before, published)


@pytest.mark.as_users_compile
@pytest.mark.parametrize("donated", [False, True])
def test_figures_of_a_compiled_step(donated):
    def step(table, ids):
        return table.at[ids].add(1.0)

    jitted = jax.jit(step, donate_argnums=[0] if donated else [])
    found = figures(jitted.lower(jnp.ones((10_000, 8)), jnp.arange(4)).compile())
    assert found["copies of tables"] == (0 if donated else 1)
    assert len(found["not in place"]) == (0 if donated else 1)
    assert found["arguments"] == 10_000 * 8 * 4 + 16
    assert found["kernels"] >= 1
    assert (found["loops"], found["collectives"]) == (0, {})


def test_bytes_of_collectives():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("x"))

    @functools.partial(jax.jit, in_shardings=split, out_shardings=None)
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=split.spec, out_specs=PartitionSpec()
    )
    def total(part):
        return jax.lax.psum(part.sum(0), "x")

    found = figures(total.lower(jnp.ones((8, 5))).compile())
    assert found["collectives"] == {"all-reduce": 20}


def test_every_table_is_on_the_page_and_every_picture_exists():
    page = PAGE.read_text()
    assert {name for _, name, *_ in tables.MARKED.findall(page)} == set(tables.TABLES)
    assert page.count("benchmarks: ") == page.count("<!-- end")
    for name in "step_time", "ratios", "scaling":
        assert f"({name}.png)" in page
        assert (ROOT / "docs" / f"{name}.png").exists()


def test_a_changed_figure_or_an_edited_table_is_noticed():
    figures = json.loads(tables.RESULTS.read_text())
    page = tables.filled(PAGE.read_text(), figures)
    for one in figures["cases"]:
        for side in one["sides"].values():
            side["median ms"] *= 3
    changed = tables.filled(page, figures)
    assert changed != page
    edited = page.replace("| check_nodes |", "| check_nodes | 1")
    assert edited != page
    assert tables.filled(edited, figures) == changed


def test_figures_of_a_case():
    times = {"ours": [0.001, 0.002, 0.003, 0.004, 0.005], "peer": [0.006]}
    made = Case("rows", "name", times, bytes_moved={"peer": 3_000_000}, bandwidth=1e9)
    ours, peer = made.sides().values()
    assert ours["median ms"] == pytest.approx(3)
    assert ours["quartiles ms"] == pytest.approx([2, 4])
    assert ours["runs"] == 5
    assert peer["quartiles ms"] == pytest.approx([6, 6])
    assert peer["of copy bandwidth"] == pytest.approx(0.5)


def test_ratios_leave_dense_steps_out():
    made = case(ours=[1, 2, 3], FBGEMM=[4], **{"optax.adagrad, dense": [50]})
    [pair] = ratios(results(made))
    assert (pair.ours, pair.peer, pair.what) == ("ours", "FBGEMM", "10 x 16")
    assert pair.ratio == pytest.approx(0.5)


def test_slower_only_if_the_middle_halves_of_the_runs_do_not_overlap():
    old = results(case(a=[1, 2, 3, 4, 5], b=[1, 2, 3, 4, 5], once=[1]))
    new = results(
        case(a=[5, 6, 7, 8, 9], b=[3, 4, 5, 6, 7], once=[9], added=[1, 2, 3, 4])
    )
    line, count, unjudged = slower(old, new)
    assert line == (
        "rows: adagrad, 10 x 16: a: 3 ms (2 to 4) before, 7 ms (6 to 8) now, 2.33 times"
    )
    assert count == "1 of 2 got slower by more than the noise."
    assert unjudged.startswith("2 more are new, or ran fewer than 3 times")
    assert next(slower(new, old)).startswith("0 of 2")  # what got faster is not said


def test_another_machine_is_named():
    old = results(case(a=[1, 2, 3]))
    new = copy.deepcopy(old)
    new["machine"]["cores"] = "4"
    assert next(slower(old, new)) == "Do not trust this: 'cores' was '2' and is '4'."


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_says_whether_files_differ_from_it(tmp_path):
    def git(*arguments):
        identity = "-c", "user.name=x", "-c", "user.email=x"
        command = ["git", *identity, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "a")
    git("tag", "v1")
    assert commit(tmp_path) == git("rev-parse", "--short=10", "HEAD")
    (tmp_path / "file").write_text("b")
    assert commit(tmp_path) == git("rev-parse", "--short=10", "HEAD") + "-dirty"
