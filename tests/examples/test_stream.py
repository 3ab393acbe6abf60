"""The stream of ratings: tables that grow, and runs that are killed and continue."""

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import monolith_optax

PATH = Path(__file__).parents[2] / "examples" / "train_stream.py"


def restored(folder):
    """The last checkpoint of a run."""
    with ocp.CheckpointManager(folder.absolute()) as saved:
        step = saved.latest_step()
        return step, saved.restore(step, args=ocp.args.StandardRestore())


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_stream", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def trained(example):
    """Trains ten batches of few ids in ways that must not differ."""
    rng = np.random.default_rng(0)
    distinct = {"user": 12, "movie": 50}
    ids = {n: rng.integers(0, k, 80).astype(np.uint64) for n, k in distinct.items()}
    stars = rng.integers(1, 11, 80).astype(np.float32) / 2
    day = np.sort(rng.integers(0, 20, 80)) * example.DAY
    data = example.Ratings(ids, stars, day)
    tx = monolith_optax.lazy_rows(monolith_optax.embedding.adagrad(0.4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "STEPS_BETWEEN_EXPIRIES", 4)
        patch.setattr(sys, "argv", ["train_stream", "--batch-size", "8", "--dim", "2"])
        args = example.parse_args()
        args.expire_after, args.checkpoint_every = 6, 4
        step = example.make_step(tx)

        def train(steps, *, checkpoint=None, first_rows=16, rows=1024, cached=False):
            patch.setattr(example, "FIRST_ROWS", first_rows)
            args.steps, args.checkpoint = steps, checkpoint
            way = example.Way("way", rows, admit_after=2, stored=cached)
            if not cached:
                return example.train(way, data, tx, step, args)
            with pytest.MonkeyPatch.context() as few:
                few.setattr(example, "MOVIES_PER_USER", 1)  # users come and go as well
                return example.train_cached(way, data, tx, step, args)

        yield data, train


@pytest.mark.slow
def test_a_run_that_continues_has_the_same_bits(trained, tmp_path):
    _, train = trained
    train(10, checkpoint=tmp_path / "whole")
    train(5, checkpoint=tmp_path / "parts")
    train(10, checkpoint=tmp_path / "parts")
    whole, parts = (restored(tmp_path / name / "way") for name in ("whole", "parts"))
    assert whole[0] == parts[0] == 10
    assert_same_bits(whole[1], parts[1])
    with pytest.raises(SystemExit, match="step 10 > 9"):
        train(9, checkpoint=tmp_path / "parts")


@pytest.mark.slow
def test_tables_that_grow_are_as_tables_that_were_large(trained):
    data, train = trained
    grown, large = train(10), train(10, first_rows=32)
    assert grown.sizes[0][2:] == [16, 16] < grown.sizes[-1][2:]
    assert large.sizes[0][2:] == large.sizes[-1][2:]
    in_use = np.array(grown.sizes)[:, :2]
    np.testing.assert_array_equal(in_use, np.array(large.sizes)[:, :2])
    assert (np.diff(in_use, axis=0) < 0).any()  # some ids have expired
    np.testing.assert_allclose(grown.errors, large.errors, rtol=1e-6)
    # A model that knows nothing yet predicts three stars for all.
    assert grown.errors[0] == np.mean((data.stars[:8] - 3) ** 2)
    slots = (grown.state.norm, large.state.norm)
    for name in large.params:
        size = () if name == "mean" else slice(len(grown.params[name]))
        for a, b in ((grown.params, large.params), slots):
            np.testing.assert_allclose(a[name], np.asarray(b[name])[size], rtol=1e-5)


def quick(folder, *options):
    """The command of a quick run."""
    command = [sys.executable, PATH, "--quick", "--plot", folder / "stream.png"]
    command += ["--checkpoint", folder / "saved", "--checkpoint-every", "20"]
    return [*command, *options]


def numbers(output):
    """The table that a run prints."""
    return re.findall(
        r"(?m)^ *([\w -]+?)  +([\d,]+)?  +(0\.\d{4})  +(0\.\d{4})$", output
    )


def test_a_cache_has_the_errors_of_tables_that_hold_everything(trained):
    _, train = trained
    growing, cached = train(10), train(10, rows=10, cached=True)
    assert np.array(growing.errors).tobytes() == np.array(cached.errors).tobytes()


# How far a way must be when the run is killed.
KILLED = {"growing": "growing/60", "cached": "cached/errors-60.npy"}


@pytest.mark.slow
@pytest.mark.parametrize("way", KILLED)
def test_a_killed_run_continues_to_the_same_bits(way, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    first = subprocess.run(quick(whole), check=True, capture_output=True, text=True)
    assert len(numbers(first.stdout)) == 6, first.stdout
    assert (whole / "stream.png").read_bytes().startswith(b"\x89PNG")
    assert "loss=" in first.stderr
    assert "moves=" in first.stderr
    assert "the same to the last bit" in first.stdout
    process = subprocess.Popen(
        quick(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 100
        while not (killed / "saved" / KILLED[way]).exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.kill()  # SIGKILL
        process.wait()
    assert not (killed / "saved" / KILLED[way].replace("60", "200")).exists()
    second = subprocess.run(quick(killed), check=True, capture_output=True, text=True)
    assert f"{way}: continuing after step" in second.stdout
    assert numbers(second.stdout) == numbers(first.stdout)
    for name in "growing", "admit-all", "share-row-0", "collide-4096":
        one, other = (restored(x / "saved" / name) for x in (whole, killed))
        assert one[0] == other[0] == 200
        assert_same_bits(one[1], other[1])
    others = subprocess.run(
        quick(killed, "--dim", "3"), check=False, capture_output=True, text=True
    )
    assert others.returncode == 1
    assert "has --dim 8, not 3: continue it with its own options" in others.stderr


def test_bad_options_are_refused(example, monkeypatch, capsys):
    for options in (["--batch-size", "0"], ["--collisions", "8"]):
        monkeypatch.setattr(sys, "argv", ["train_stream.py", *options])
        with pytest.raises(SystemExit):
            example.parse_args()
        errors = capsys.readouterr().err
        assert f"{options[0]}: must be a whole number of at least" in errors
