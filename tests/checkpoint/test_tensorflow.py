"""TensorFlow's own checkpoint files: read, written, damaged, and the command line."""

import json
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


@pytest.fixture
def copied(tmp_path):
    for file in (FOLDER / "adamom").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path / "model.ckpt-6"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reads_what_monolith_wrote(name):
    checkpoint = read_tensorflow(prefix(name))
    assert_same(checkpoint, truth(name, 6))
    assert checkpoint.shapes["mlp/dense/kernel"] == (4, 3)
    assert checkpoint.dtypes["global_step"] == np.int64
    assert len(checkpoint) == len(truth(name, 6))
    assert "nothing" not in checkpoint
    with pytest.raises(KeyError, match="nothing"):
        checkpoint["nothing"]


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
    with pytest.raises(ValueError, match="without a name"):
        write_tensorflow(tmp_path / "x", {"": np.ones(3)})


def test_narrow_dtypes_go_through(tmp_path):
    tensors = {
        "half": np.arange(3, dtype=np.float16),
        "no": np.zeros((0, 2), np.float32),
    }
    write_tensorflow(tmp_path / "x", tensors)
    assert_same(read_tensorflow(tmp_path / "x"), tensors)
    with pytest.raises(ValueError, match="no tensors to write to"):
        write_tensorflow(tmp_path / "y", {})


def test_missing_files_are_named(copied):
    data = copied.with_name("model.ckpt-6.data-00000-of-00001")
    data.rename(copied.with_name("model.ckpt-6.data-00000-of-00002"))
    with pytest.raises(FileNotFoundError, match="data-00001-of-00002"):
        read_tensorflow(copied)
    copied.with_name("model.ckpt-6.data-00000-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="data-00000-of-00001"):
        read_tensorflow(copied)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.index"):
        read_tensorflow(copied.with_name("nowhere"))


def test_damaged_files_are_named(copied):
    state = OPTIMIZERS["adamom"]().init(zeros())
    data = copied.with_name("model.ckpt-6.data-00000-of-00001")
    whole = data.read_bytes()
    flipped = bytearray(whole)
    flipped[100] ^= 1
    for damaged in whole[:-50], whole[:100], b"", bytes(flipped):
        data.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data-00000-of-00001 is damaged"):
            import_slots(read_tensorflow(copied), zeros(), state)
    data.write_bytes(whole)
    index = copied.with_name("model.ckpt-6.index")
    whole = index.read_bytes()
    flipped = bytearray(whole)
    flipped[100] ^= 1
    for damaged in whole[:-1], whole[:200], b"", b"nonsense" * 100, bytes(flipped):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.ckpt-6\.index is damaged"):
            import_slots(read_tensorflow(copied), zeros(), state)


def test_show():
    shown = run("show", prefix("adamom"))
    assert shown.returncode == 0, shown.stderr
    header, *lines = shown.stdout.splitlines()
    assert header.split() == ["name", "kind", "shape", "dtype"]
    assert ["global_step", "variable", "[]", "int64"] in map(str.split, lines)
    assert "mlp/dense/bias/Adamom/c" in shown.stdout
    rows = json.loads(run("show", "--json", prefix("adamom")).stdout)
    assert {row["name"]: row["kind"] for row in rows} == {
        name: "slot" if "Adamom" in name else "variable" for name in truth("adamom", 6)
    }
    missing = run("show", "nowhere")
    assert missing.returncode == 3
    assert missing.stderr == (
        "error: There is no file nowhere.index. The prefix of a checkpoint ends before "
        "'.index', as in 'model/model.ckpt-6'.\n"
    )


def test_convert_there_and_back(tmp_path):
    there, back = tmp_path / "orbax", tmp_path / "model.ckpt-6"
    for source, target in [(prefix("adamom"), there), (there, back)]:
        converted = run("convert", source, target)
        assert converted.returncode == 0, converted.stderr
    assert_same(read_tensorflow(back), truth("adamom", 6))
    again = run("convert", prefix("adamom"), there)
    assert again.returncode == 3
    assert "already exists" in again.stderr
    folder = run("convert", FOLDER / "adamom", tmp_path / "other")
    assert "give a prefix, such as" in folder.stderr
