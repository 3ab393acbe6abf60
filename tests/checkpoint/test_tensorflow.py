"""Checkpoint files beside TensorFlow's own reader and writer, and the command line."""

import subprocess
import sys

import numpy as np
import pytest
from checkpoints import FOLDER, OPTIMIZERS, assert_same, prefix, truth, zeros

from monolith_optax.checkpoint import (
    export_slots,
    import_slots,
    read_tensorflow,
    write_tensorflow,
)

tf = pytest.importorskip("tensorflow", reason="the extra 'tf' is not installed")
pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")


def run(*arguments):
    command = [sys.executable, "-m", "monolith_optax.checkpoint", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("compact_c", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_written_tensorflow_reads_bit_for_bit(tmp_path, name, compact_c):
    options = {"compact_c": True} if compact_c and name == "adamom" else {}
    state = OPTIMIZERS[name](**options).init(zeros())
    tensors = read_tensorflow(prefix(name))
    params, state = import_slots(tensors, zeros(), state)
    target = tmp_path / "new" / "model.ckpt-6"
    write_tensorflow(target, export_slots(params, state))
    reader = tf.train.load_checkpoint(str(target))
    written = {
        key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map()
    }
    written["global_step"] = np.asarray(written["global_step"])
    assert_same(written, truth(name, 6))


def test_a_saver_restores_what_is_written(tmp_path):
    target = tmp_path / "model.ckpt-6"
    write_tensorflow(target, truth("rmsprop", 6))
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("mlp/dense/bias", (3,))
        tf.compat.v1.train.Saver([variable]).restore(session, str(target))
        bias = session.run(variable)
    np.testing.assert_array_equal(bias, truth("rmsprop", 6)["mlp/dense/bias"])


def test_what_would_not_be_written_is_an_error(tmp_path):
    with tf.Graph().as_default(), pytest.raises(ValueError, match="graph mode here"):
        write_tensorflow(tmp_path / "x", {"x": np.ones(3)})
    with pytest.raises(ValueError, match="A tensor has no name: nothing was written"):
        write_tensorflow(tmp_path / "x", {"": np.ones(3)})


def test_narrow_dtypes_go_through(tmp_path):
    tensors = {
        "half": np.arange(3, dtype=np.float16),
        "no": np.zeros((0, 2), np.float32),
    }
    write_tensorflow(tmp_path / "x", tensors)
    assert_same(read_tensorflow(tmp_path / "x"), tensors)
    with pytest.raises(
        ValueError, match="There are no tensors: nothing was written to"
    ):
        write_tensorflow(tmp_path / "y", {})


def save(prefix, tensors, slices=""):
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[slices] * len(tensors),
        tensors=[tf.constant(value) for value in tensors.values()],
    )


def assert_as_tensorflow_reads(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    names = reader.get_variable_to_shape_map()
    assert_same(
        read_tensorflow(prefix), {k: np.asarray(reader.get_tensor(k)) for k in names}
    )


def test_every_type_that_numpy_has_is_read_as_tensorflow_reads_it(tmp_path):
    types = [
        tf.dtypes.as_dtype(number)
        for number in range(1, 31)
        if number not in {7, 11, 12, 13, 15, 16, 20, 21}  # opaque, or quantized
    ]
    tensors = {
        kind.name: (np.arange(200) % 8).reshape(2, 100).astype(kind.as_numpy_dtype)
        for kind in types
    }
    save(tmp_path / "x", tensors)
    assert_as_tensorflow_reads(tmp_path / "x")


@pytest.mark.parametrize("cut", [2, 100, 8_000, 299_000])
def test_partitioned_variables_of_several_servers(tmp_path, cut):
    """The keys of parts have numbers of one to three bytes."""
    table = np.arange(600_000, dtype=np.float32).reshape(300_000, 2)
    a, b, both = (str(tmp_path / name) for name in ("a", "b", "both"))
    save(a, {"ü/part": table[:cut]}, f"300000 2 0,{cut}:-")
    save(b, {"ü/part": table[cut:]}, f"300000 2 {cut},{300_000 - cut}:0,2")
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[a, b], destination_prefix=both, delete_old_dirs=False
    )
    assert_as_tensorflow_reads(both)
    assert_same(read_tensorflow(both), {"ü/part": table})


def test_strings_and_many_names(tmp_path):
    tensors = {f"layer_{k}/w": np.full(k % 7, k) for k in range(2_000)}
    tensors["graph"] = np.array([[b"", b"x" * 70_000], [b"a\0b", b"\xff"]], object)
    save(tmp_path / "x", tensors)
    assert_as_tensorflow_reads(tmp_path / "x")


@pytest.mark.parametrize("name", ["w[1]", "w*", "w?"])
def test_what_is_written_under_a_pattern_is_read(tmp_path, name):
    write_tensorflow(tmp_path / "w1", {"x": np.zeros(2)})
    write_tensorflow(tmp_path / name, {"x": np.ones(3)})
    assert_same(read_tensorflow(tmp_path / name), {"x": np.ones(3)})


@pytest.mark.parametrize("source", [prefix("adamom"), FOLDER / "adamom"])
def test_convert_there_and_back(tmp_path, source):
    there, back = tmp_path / "orbax", tmp_path / "model.ckpt-6"
    for old, new in [(source, there), (there, back)]:
        converted = run("convert", old, new)
        assert converted.returncode == 0, converted.stderr
    assert_same(read_tensorflow(back), truth("adamom", 6))
    again = run("convert", source, there)
    assert again.returncode == 3
    assert "already exists" in again.stderr
