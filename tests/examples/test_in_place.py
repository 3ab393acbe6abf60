"""Every training step of the examples and the notebook writes into its old tables."""

import json
import runpy
import sys
from pathlib import Path

import jax
import multihost_worker
import pytest
from jax.sharding import AxisType
from steps_in_place import steps_are_checked

from monolith_optax import adamom

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "recommender", "stream", "word2vec"])
def test_examples(name, tmp_path, monkeypatch):
    example = str(EXAMPLES / f"train_{name}.py")
    options = ["--quick", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setattr(sys, "argv", [example, *options])
    # The tables of the stream are small at first.
    monkeypatch.setattr("monolith_optax._compiled.check_in_place._SMALLEST", 2**12)
    with (
        steps_are_checked() as checked,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        runpy.run_path(example, run_name="__main__")
    assert "step" in checked


@pytest.mark.slow
def test_the_example_of_many_devices():
    example = multihost_worker.example
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx = example.clipped(adamom(0.1))

    def init():
        return example.init_params(64, seed=0)

    like = example.carry_like(tx, init, mesh)
    data, _ = example.load_data()
    with steps_are_checked() as checked:
        step = example.make_step(tx, like, dense=False)
        _, carry = example.first_carry(tx, init, like, None)
        step(carry, next(example.batches(data, 16, mesh, seed=0, start=0)))
    assert checked == ["step"]


def test_the_notebook():
    notebook = json.loads((EXAMPLES / "recommender.ipynb").read_text())
    cells = [
        "".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"
    ]
    [last] = [i for i, cell in enumerate(cells) if "def make_step" in cell]
    names = {}
    with steps_are_checked() as checked:
        for cell in cells[1 : last + 2]:  # the first one installs packages
            exec(cell, names)
        step, tx = names["make_step"]("row-sparse")
        params = names["new_params"]()
        step(params, tx.init(params), names["first_batch"])
    assert checked == ["step"]
