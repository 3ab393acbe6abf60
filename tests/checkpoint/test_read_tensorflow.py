"""TensorFlow's checkpoint files without TensorFlow: whole, damaged and hostile."""

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
from checkpoints import FOLDER, OPTIMIZERS, assert_same, prefix, truth, zeros
from hash_table_files import masked_crc, varint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensor_files import STRING, block, extents, header, table, tensor, trailed, write

from monolith_optax.checkpoint import import_slots, read_tensorflow


@pytest.fixture
def copied(tmp_path):
    return copy_as(tmp_path / "model.ckpt-6")


def copy_as(target, name="adamom"):
    target.parent.mkdir(exist_ok=True)
    for file in FOLDER.joinpath(name).glob("model*"):
        renamed = file.name.replace("model.ckpt-6", target.name)
        target.with_name(renamed).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reads_what_monolith_wrote(name):
    checkpoint = read_tensorflow(prefix(name))
    assert_same(checkpoint, truth(name, 6))
    assert checkpoint.shapes["mlp/dense/kernel"] == (4, 3)
    assert checkpoint.dtypes["global_step"] == np.int64
    assert len(checkpoint) == len(truth(name, 6))
    assert "nothing" not in checkpoint
    assert list(checkpoint) == sorted(checkpoint)
    with pytest.raises(KeyError, match="nothing"):
        checkpoint["nothing"]


def test_arrays_are_the_callers_own():
    checkpoint = read_tensorflow(prefix("adamom"))
    checkpoint["item_embedding"][:] = 0
    assert checkpoint["item_embedding"].any()


@pytest.mark.parametrize("name", ["w[1]", "*", "w?", "[a-z]*", "{a,b}", "a b", "ü"])
@pytest.mark.parametrize("folder", ["plain", "run[1]"])
def test_characters_that_tensorflow_takes_for_patterns(tmp_path, folder, name):
    copy_as(tmp_path / folder / "w1", "rmsprop")  # matches some of them
    target = copy_as(tmp_path / folder / name)
    assert_same(read_tensorflow(target), truth("adamom", 6))


def test_data_of_another_save_beside_it(copied):
    for stale in ".data-00000-of-00002", ".data-00007-of-00009":
        copied.with_name(copied.name + stale).write_bytes(b"of another save")
    assert_same(read_tensorflow(copied), truth("adamom", 6))


def test_a_folder_of_the_same_name_beside_it(copied):
    copy_as(copied / "other", "rmsprop")
    (copied / "checkpoint").write_text('model_checkpoint_path: "other"')
    assert_same(read_tensorflow(copied), truth("adamom", 6))


def test_missing_files_are_named(copied):
    data = copied.with_name("model.ckpt-6.data-00000-of-00001")
    data.rename(copied.with_name("model.ckpt-6.data-00000-of-00002"))
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
    for damaged in whole[:-1], whole[:100], b"", bytes(flipped):
        data.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"data-00000-of-00001 is damaged"):
            import_slots(read_tensorflow(copied), zeros(), state)
    data.write_bytes(whole)
    index = copied.with_name("model.ckpt-6.index")
    whole = index.read_bytes()
    for damaged in whole[:-1], whole[:200], b"", b"nonsense" * 100:
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.ckpt-6\.index is damaged"):
            read_tensorflow(copied)
    for at in range(0, len(whole) - 100, 7):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        index.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"model\.ckpt-6\.index is damaged"):
            read_tensorflow(copied)


SIX = np.arange(6, dtype=np.float32).reshape(3, 2)


def test_data_in_several_files(tmp_path):
    data = SIX.tobytes()
    entries = {
        b"a": tensor(data, shape=(3, 2), shard=1),
        b"b": tensor(data[8:], shape=(2, 2), shard=0, offset=8),
    }
    write(tmp_path / "x", entries, data, data)
    assert_same(read_tensorflow(tmp_path / "x"), {"a": SIX, "b": SIX[1:]})
    (tmp_path / "x.data-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="data-00001-of-00002"):
        read_tensorflow(tmp_path / "x")


# The keys that TensorFlow 2.21 wrote for these slices.
LOW, HIGH = b"\0w\0\1\1\2\x80\x82\x80\x7f", b"\0w\0\1\1\2\x82\x81\x80\x7f"


def partitioned(**high):
    """The entries of a variable in two parts."""
    low, rest = SIX[:2].tobytes(), SIX[2:].tobytes()
    slices = extents((0, 2), None), extents((2, 1), None)
    return {
        b"w": tensor(b"", shape=(3, 2), slices=slices),
        LOW: tensor(low, shape=(2, 2)),
        HIGH: tensor(rest, **{"shape": (1, 2), "offset": 16} | high),
    }


def test_a_partitioned_variable(tmp_path):
    write(tmp_path / "x", partitioned(), SIX.tobytes())
    checkpoint = read_tensorflow(tmp_path / "x")
    assert_same(checkpoint, {"w": SIX})
    assert checkpoint.shapes == {"w": (3, 2)}


@pytest.mark.parametrize(
    "entries",
    [
        {key: entry for key, entry in partitioned().items() if key != HIGH},
        partitioned(shape=(2, 2)),
        partitioned() | {b"w": tensor(b"", shape=(9, 9), slices=[extents(None, None)])},
        partitioned()
        | {
            b"w": tensor(
                b"", shape=(4, 2), slices=[extents((0, 2), None), extents((2, 1), None)]
            )
        },
        partitioned()
        | {b"w": tensor(b"", shape=(3, 2), slices=[extents((2, 1), None)] * 3)},
        partitioned() | {b"w": tensor(b"", shape=(3, 2), slices=[extents((0, 2))])},
    ],
    ids=["missing", "shape", "no key", "gap", "overlap", "rank"],
)
def test_parts_that_do_not_make_the_whole(entries, tmp_path):
    write(tmp_path / "x", entries, SIX.tobytes())
    with pytest.raises(ValueError, match=r"x\.index is damaged: .*'w'"):
        read_tensorflow(tmp_path / "x")["w"]


def strings(*values):
    """Strings as TensorFlow stores them, and the checksum of what they stand for."""
    lengths = struct.pack(f"<{len(values)}I", *map(len, values))
    inner = struct.pack("<I", masked_crc(lengths))
    stored = b"".join(map(varint, map(len, values))) + inner + b"".join(values)
    return stored, lengths + inner + b"".join(values)


def test_strings(tmp_path):
    stored, summed = strings(b"ab", b"", b"c" * 300)
    entry = tensor(summed, shape=(3,), dtype=STRING, size=len(stored))
    write(tmp_path / "x", {b"s": entry}, stored)
    checkpoint = read_tensorflow(tmp_path / "x")
    assert checkpoint.dtypes["s"].hasobject
    assert checkpoint["s"].tolist() == [b"ab", b"", b"c" * 300]
    for at in range(len(stored)):
        damaged = bytearray(stored)
        damaged[at] ^= 1
        write(tmp_path / "x", {b"s": entry}, bytes(damaged))
        with pytest.raises(ValueError, match=r"data-00000-of-00001 is damaged: 's'"):
            read_tensorflow(tmp_path / "x")["s"]


def test_a_type_that_numpy_does_not_have(tmp_path):
    entries = {b"v": tensor(b"", shape=(), dtype=21), b"w": tensor(b"1234", shape=(1,))}
    write(tmp_path / "x", entries, b"1234")
    checkpoint = read_tensorflow(tmp_path / "x")
    assert checkpoint["w"].tobytes() == b"1234"
    with pytest.raises(ValueError, match="'v' has TensorFlow's type 21"):
        checkpoint["v"]


HUGE = 2**50
HOSTILE = {
    "shape": tensor(b"", shape=(HUGE,)),
    "shape and size": tensor(b"", shape=(HUGE,), size=4 * HUGE),
    "dims that overflow": tensor(b"", shape=(2**32, 2**32), size=0),
    "an empty shape": tensor(b"", shape=(2**62, 0)),
    "a negative dim": tensor(b"", shape=(2**64 - 1,)),
    "an offset": tensor(b"1234", shape=(1,), offset=HUGE),
    "a negative offset": tensor(b"1234", shape=(1,), offset=2**64 - 4),
    "a shard": tensor(b"1234", shape=(1,), shard=1),
    "strings": tensor(b"", shape=(HUGE,), dtype=STRING, size=8),
    "many dims": tensor(b"1234", shape=(1,) * 300),
    "no crc": tensor(b"1234", shape=(1,))[:-5],
    "a dtype that is a string": b"\x0a\x011" + tensor(b"1234", shape=(1,))[2:],
}


@pytest.mark.parametrize("claim", HOSTILE)
def test_what_an_index_claims_takes_no_memory(claim, tmp_path):
    write(tmp_path / "x", {b"w": HOSTILE[claim]}, b"1234" * 4)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"is damaged: .*'w'"):
            read_tensorflow(tmp_path / "x")["w"]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_the_same_bytes_for_many_tensors_are_refused(tmp_path):
    """A small file must not stand for much memory."""
    data = b"1234" * 1_000
    entries = {b"%d" % k: tensor(data, shape=(1_000,)) for k in range(3)}
    write(tmp_path / "x", entries, data)
    with pytest.raises(ValueError, match="claim 12000 bytes"):
        read_tensorflow(tmp_path / "x")


def test_data_files_without_end_are_not_looked_for(tmp_path):
    write(tmp_path / "x", {b"w": tensor(b"1234", shape=(1,))}, b"1234", shards=2**40)
    with pytest.raises(FileNotFoundError, match="data-00000-of-1099511627776"):
        read_tensorflow(tmp_path / "x")


def shared_keys(count, length):
    """A block in which a long key is there once, and then only its last byte."""
    content = b"\0" + varint(length) + b"\0" + b"a" * length
    for k in range(count):
        content += varint(length - 1 if k else length) + b"\1\0" + bytes([k])
    return trailed(content + struct.pack("<II", 0, 1))


@pytest.mark.parametrize(
    "file",
    [
        table(block((b"", header(endianness=1)))),
        table(block((b"", header()), (b"a", b""), compression=1)),
        table(block((b"a", tensor(b"", shape=(0,))))),
        table(block((b"", header()), (b"b", b""), (b"a", b""))),
        table(block((b"", header())), shared_keys(100, 100_000)),
        table(*[block((b"", header()))] * 2),
        table(block((b"", header()), (b"\xff", tensor(b"", shape=(0,))))),
    ],
    ids=[
        "endianness",
        "compressed",
        "no header",
        "order",
        "shared keys",
        "twice",
        "name",
    ],
)
def test_an_index_that_tensorflow_does_not_write(file, tmp_path):
    (tmp_path / "x.index").write_bytes(file)
    (tmp_path / "x.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x\.index is damaged"):
        read_tensorflow(tmp_path / "x")


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(st.binary(max_size=12), st.binary(max_size=40), max_size=3),
    st.binary(max_size=20),
)
def test_any_entries(tmp_path, entries, data):
    write(tmp_path / "x", entries, data)
    with contextlib.suppress(ValueError, FileNotFoundError):
        checkpoint = read_tensorflow(tmp_path / "x")
        for name, array in checkpoint.items():
            assert array.shape == checkpoint.shapes[name]
