"""Reading hash tables: Monolith's own files, other encodings of them, and damage."""

import re
import shutil
import sys
import tracemalloc

import hash_table_files as plain
import numpy as np
import pytest
from hash_table_files import entry, floats, framed, message, write_multi, write_single
from hypothesis import given, settings
from hypothesis import strategies as st

from monolith_optax.checkpoint import hash_tables, read_hash_table

ADAGRAD = [("adagrad", 2)]
ASSETS = "model.ckpt-1200.assets"


def assets(job):
    return plain.DATA / job / ASSETS


def copied(job, tmp_path):
    """A copy of a sample's folders, to be damaged."""
    shutil.copytree(plain.DATA / job, tmp_path / job)
    return tmp_path / job / ASSETS


@pytest.mark.parametrize(("job", "name"), plain.SPECS)
def test_samples_to_the_bit(job, name):
    table = read_hash_table(assets(job), name, segments=plain.segments_of(job, name))
    if name == "unused":
        assert table.ids.shape == table.last_update.shape == (0,)
        assert table.weights.shape == table.segments[0].slots["norm"].shape == (0, 2)
        return
    plain.assert_same_bits(table, plain.truth_of(job, name))
    assert [(s.optimizer, s.dim) for s in table.segments] == plain.segments_of(
        job, name
    )


def test_the_prefix_will_do():
    prefix = plain.DATA / "single" / "model.ckpt-1200"
    table = read_hash_table(str(prefix), "item", segments=[("adagrad", 8)])
    plain.assert_same_bits(table, plain.truth_of("single", "item"))


def test_left_overs_of_interrupted_saves_are_ignored(tmp_path):
    folder = copied("single", tmp_path)
    for name in "item-00000-of-00002", "item-00002-of-00003", "item_1-00000-of-00001":
        (folder / f"MonolithHashTable_{name}-tmp-123").write_bytes(b"half")
    table = read_hash_table(folder, "item", segments=[("adagrad", 8)])
    plain.assert_same_bits(table, plain.truth_of("single", "item"))


def other_encodings(record_floats):
    """Encodings of one entry that every reader of protocol buffers takes."""
    raw, num, norm, time = record_floats
    slots = message(1, message(1, floats(1, norm)))
    packed = message(1, message(1, floats(1, norm, packed=True)))
    halves = floats(2, num[:3], packed=True) + floats(2, num[3:])
    identity = entry(raw, [], b"", None)[:9]
    stamp = b"\x20" + plain.varint(time)
    return [
        entry(raw, num, slots, time),
        entry(raw, num, packed, time, packed=True),
        stamp + message(3, packed) + halves + identity,
        identity + halves + message(3, slots) + b"\x20\x01" + stamp,
        # Fields of numbers that are not in use, of every wire type.
        b"\x98\x06\x05"
        + identity
        + b"\xa1\x06"
        + bytes(8)
        + floats(2, num)
        + message(3, slots)
        + message(100, b"text")
        + b"\xa5\x06"
        + bytes(4)
        + stamp,
        # A longer varint than necessary.
        entry(raw, num, slots, None)
        + b"\x20"
        + stamp[1:-1]
        + bytes([stamp[-1] | 0x80])
        + b"\x80\x00",
    ]


def test_other_encodings_of_the_same_entries(tmp_path):
    truth = plain.truth_of("single", "item")
    rows = zip(
        truth["ids"].tolist(),
        truth["num"],
        truth["segment0/adagrad/norm"],
        truth["last_update_ts_sec"].tolist(),
        strict=True,
    )
    rng = np.random.default_rng(0)
    records = [rng.choice(np.array(other_encodings(row), object)) for row in rows]
    rng.shuffle(records)
    write_single(tmp_path, "item", records[:200], [], records[200:])
    table = read_hash_table(tmp_path, "item", segments=[("adagrad", 8)])
    plain.assert_same_bits(table, truth)


def test_a_time_that_is_left_out_is_zero(tmp_path):
    write_single(tmp_path, "item", [entry(1), entry(2, time=None), entry(3, time=0)])
    table = read_hash_table(tmp_path, "item", segments=ADAGRAD)
    assert table.last_update.tolist() == [7, 0, 0]


@pytest.mark.parametrize("block", [1, 7, 100, 262_144])
def test_snappy_blocks_end_anywhere(block, tmp_path):
    tables = {"a": [entry(1)], "item": [entry(i) for i in (9, -4, 6)], "z": [entry(1)]}
    write_multi(tmp_path, "", tables, block=block)
    table = read_hash_table(tmp_path, "item", segments=ADAGRAD)
    assert table.ids.tolist() == [-4, 6, 9]
    assert table.weights.tolist() == [[1, 2]] * 3


def test_a_larger_block_than_tensorflow_takes_is_refused(tmp_path):
    records = [entry(i) for i in range(7_000)]
    write_multi(tmp_path, "", {"item": records}, block=262_145)
    with pytest.raises(ValueError, match=r"262145 bytes.*at most 262144"):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_missing_shards_are_named(tmp_path):
    folder = copied("single", tmp_path)
    (folder / "MonolithHashTable_item-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="_item-00001-of-00002"):
        read_hash_table(folder, "item", segments=[("adagrad", 8)])
    folder = copied("native", tmp_path)
    (folder / "MonolithMultiHashTable_1.meta-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match=r"_1\.meta-00001-of-00002"):
        read_hash_table(folder, "item", segments=[("adagrad", 4)])


def test_files_of_two_saves_are_refused(tmp_path):
    write_single(tmp_path, "item", [entry(1)], [entry(2)])
    write_single(tmp_path, "item", [entry(1)])
    with pytest.raises(ValueError, match="several saves, with -of-00001 and 00002"):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\['item', 'mixed', 'user'\]"):
        read_hash_table(assets("single"), "itme", segments=ADAGRAD)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_hash_table(tmp_path / "none", "item", segments=ADAGRAD)
    write_single(tmp_path, "a-b-c", [entry(1)])
    assert len(read_hash_table(tmp_path, "a:b/c", segments=ADAGRAD).ids) == 1
    (tmp_path / "inside").mkdir()
    with pytest.raises(FileNotFoundError):
        read_hash_table(tmp_path / "inside", "../a-b-c", segments=ADAGRAD)


# Servers, and names that look like them


def ids_of_server(server, servers, count=50):
    return [server + servers * i for i in range(-count // 2, count // 2)]


def write_servers(folder, name, servers, there):
    for server in there:
        records = [entry(i) for i in ids_of_server(server, servers)]
        write_single(folder, f"{name}_{server}", records)


def test_a_missing_last_server_of_the_samples(tmp_path):
    folder = copied("native", tmp_path)
    for path in folder.glob("MonolithMultiHashTable_1*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"ckpt\.info counts 89"):
        read_hash_table(folder, "item", segments=[("adagrad", 4)])
    (folder.parent / "ckpt.info-1200").unlink()
    with pytest.raises(ValueError, match="files of 1, but its ids would also fit 2"):
        read_hash_table(folder, "item", segments=[("adagrad", 4)])
    with pytest.raises(FileNotFoundError, match="server 1"):
        read_hash_table(folder, "item", segments=[("adagrad", 4)], servers=2)
    table = read_hash_table(folder, "item", segments=[("adagrad", 4)], servers=1)
    assert set(table.ids % 2) == {0}


@pytest.mark.parametrize(("servers", "there"), [(3, 2), (4, 2), (2, 1)])
def test_missing_last_servers_of_a_single_table(servers, there, tmp_path):
    write_servers(tmp_path, "item", servers, range(there))
    with pytest.raises(ValueError, match=f"(come from|also fit) {servers} servers"):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_a_missing_first_server(tmp_path):
    write_servers(tmp_path, "item", 3, [1, 2])
    with pytest.raises(FileNotFoundError, match="server 0"):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_servers_are_joined(tmp_path):
    write_servers(tmp_path, "item", 3, range(3))
    write_single(tmp_path, "item_3_old", [entry(1)])
    ids = read_hash_table(tmp_path, "item", segments=ADAGRAD).ids
    assert ids.tolist() == sorted(i for k in range(3) for i in ids_of_server(k, 3))
    with pytest.raises(ValueError, match="may be a table, or server 1 of 'item'"):
        read_hash_table(tmp_path, "item_1", segments=ADAGRAD)
    table = read_hash_table(tmp_path, "item_1", segments=ADAGRAD, servers=0)
    assert table.ids.tolist() == ids_of_server(1, 3)


def test_tables_whose_names_end_like_servers(tmp_path):
    for name in "item_0", "item_1":
        write_single(tmp_path, name, [entry(i) for i in range(10)])
    for name in "item_0", "item_1":
        ids = read_hash_table(tmp_path, name, segments=ADAGRAD).ids
        assert ids.tolist() == list(range(10))
    message = r"_item_0-00000-of-00001: entry 1 has the id 1, .* server 0 of 2"
    with pytest.raises(ValueError, match=message):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)
    with pytest.raises(ValueError, match=message):
        read_hash_table(tmp_path, "item", segments=ADAGRAD, servers=2)
    assert [table.name for table in hash_tables(tmp_path)] == ["item_0", "item_1"]


def test_a_table_beside_one_that_looks_like_its_server(tmp_path):
    write_single(tmp_path, "item", [entry(i) for i in range(10)])
    write_single(tmp_path, "item_1", [entry(i) for i in range(20)])
    for name, count in ("item", 10), ("item_1", 20):
        assert len(read_hash_table(tmp_path, name, segments=ADAGRAD).ids) == count
    listed = {
        table.name: (table.servers, table.entries) for table in hash_tables(tmp_path)
    }
    assert listed == {"item": (0, 10), "item_1": (0, 20)}


def test_few_ids_leave_a_doubt(tmp_path):
    write_single(tmp_path, "item_0", [entry(-(2**63))])
    write_single(tmp_path, "item_1", [entry(2**62 + 1)])
    with pytest.raises(ValueError, match="If none is missing, give servers=2"):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)
    table = read_hash_table(tmp_path, "item", segments=ADAGRAD, servers=2)
    assert table.ids.tolist() == [-(2**63), 2**62 + 1]
    (tmp_path / "empty").mkdir()
    for server in range(2):
        write_single(tmp_path / "empty", f"item_{server}", [])
    assert not len(read_hash_table(tmp_path / "empty", "item", segments=ADAGRAD).ids)


@pytest.mark.parametrize("name", ["item_999999999", "item_99999999999999999999"])
def test_a_table_whose_name_ends_in_a_large_number(name, tmp_path):
    write_single(tmp_path, name, [entry(i) for i in range(10)])
    assert len(read_hash_table(tmp_path, name, segments=ADAGRAD).ids) == 10
    assert [info.name for info in hash_tables(tmp_path)] == [name]
    with pytest.raises(FileNotFoundError):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_extreme_ids_have_their_servers(tmp_path):
    extremes = [-(2**63), 2**63 - 1, 0, 1, -1, 2, -2, 5]
    for server in range(3):
        records = [entry(i) for i in extremes if i % 3 == server]
        write_single(tmp_path, f"item_{server}", records)
    ids = read_hash_table(tmp_path, "item", segments=ADAGRAD).ids
    assert ids.tolist() == sorted(extremes)


# Damage


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    write_single(tmp_path, "item", [entry(2**60), entry(5), entry(-6, time=2**31)])
    path = tmp_path / "MonolithHashTable_item-00000-of-00001"
    whole = path.read_bytes()
    ends = {0, *np.cumsum([len(r) for r in plain.records_in(whole)]).tolist()}
    damaged = [whole[:n] for n in range(len(whole)) if n not in ends]
    for at in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*record [012]"):
            read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_every_flipped_bit_and_every_cut_of_a_compressed_file_is_noticed(tmp_path):
    path = write_multi(tmp_path, "", {"item": [entry(1), entry(2)]}, block=50)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))]
    for at in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        damaged.append(bytes(flipped))
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_hash_table(tmp_path, "item", segments=ADAGRAD)


@pytest.mark.parametrize("counts", [{"item": 3}, {"item": 1}, {"item": 2**63}])
def test_counts_that_differ_from_the_meta_file(counts, tmp_path):
    path = write_multi(tmp_path, "", {"item": [entry(1), entry(2)]}, counts)
    message = f"{re.escape(str(path))} has 2 entries, but its .meta file"
    with pytest.raises(ValueError, match=message):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        (framed(b"\x10\x01"), "record 0 is not a table and a count"),
        (framed(message(1, b"a") + b"\x10\x01", message(1, b"a")), "more than once"),
        (framed(b"\x0a\x7f"), "entry 0 ends within a field"),
    ],
)
def test_bad_meta_files(meta, message, tmp_path):
    write_multi(tmp_path, "", {"item": [entry(1)]})
    path = tmp_path / "MonolithMultiHashTable_.meta-00000-of-00001"
    path.write_bytes(meta)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


def test_a_bad_ckpt_info(tmp_path):
    folder = copied("native", tmp_path)
    (folder.parent / "ckpt.info-1200").write_text("feature_counts { key: 5 }")
    with pytest.raises(ValueError, match=r"ckpt\.info-1200 is not a list"):
        read_hash_table(folder, "item", segments=[("adagrad", 4)])


def test_names_in_ckpt_info_are_escaped(tmp_path):
    folder = tmp_path / "model.ckpt-5.assets"
    name = 'ä"\\\n'
    write_multi(folder, "", {name: [entry(1)]})
    key = r"\303\244\"\\\n"
    info = tmp_path / "ckpt.info-5"
    info.write_text(f'feature_counts {{\n key: "{key}"\n value: 1\n}}\n')
    assert len(read_hash_table(folder, name, segments=ADAGRAD).ids) == 1
    info.write_text(f'feature_counts {{\n key: "{key}"\n value: 2\n}}\n')
    with pytest.raises(ValueError, match="counts 2"):
        read_hash_table(folder, name, segments=ADAGRAD)


def test_ids_that_are_there_twice(tmp_path):
    write_single(tmp_path, "item", [entry(1), entry(5)], [entry(2), entry(5)])
    message = r"id 5 occurs twice.*00000-of-00002: entry 1 .*00001-of-00002: entry 1"
    with pytest.raises(ValueError, match=message):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)


@pytest.mark.parametrize(
    ("job", "name", "offer"),
    [
        ("single", "user", '[("ftrl", 1), ("adam", 3)] would fit.'),
        (
            "single",
            "mixed",
            '("group_adagrad", ?), ("batch_softmax", 1)] would fit, where the ? are 4',
        ),
        ("native", "item", '[("adagrad", 4)] would fit.'),
    ],
)
def test_wrong_segments_are_told_which_would_fit(job, name, offer):
    with pytest.raises(ValueError, match=re.escape(offer)) as error:
        read_hash_table(assets(job), name, segments=[("momentum", 4)])
    named = r"/Monolith\w+-00000-of-0000\d: entry \d+ does not fit"
    assert re.search(named, str(error.value))


SGD = message(1, message(2, b""))
GROUP = message(1, message(15, floats(1, [0.1])))


@pytest.mark.parametrize(
    ("record", "segments", "offer"),
    [
        (entry(1, [1, 2, 3], SGD), [("sgd", 2)], '[("sgd", 3)] would fit.'),
        (
            entry(1, [1, 2, 3], SGD + GROUP),
            [("sgd", 3)],
            '[("sgd", ?), ("group_adagrad", ?)] would fit, where the ? are 3 together.',
        ),
        (
            entry(1, [1, 2, 3]),
            [("adagrad", 2)],
            '[("adagrad", 3)] would fit.',
        ),
        (
            entry(1, [1, 2, 3], message(1, message(1, floats(1, [1])))),
            [("adagrad", 3)],
            '[("adagrad", 1)] would fit with ("moving_average", 2)',
        ),
        (entry(1, [1], SGD * 2), [("sgd", 1)], '("sgd", ?), ("sgd", ?)] would fit'),
    ],
)
def test_what_is_offered(record, segments, offer, tmp_path):
    write_single(tmp_path, "item", [record])
    with pytest.raises(ValueError, match=re.escape(offer)):
        read_hash_table(tmp_path, "item", segments=segments)


def test_an_entry_that_differs_is_named(tmp_path):
    records = [entry(i) for i in range(3_000)]
    records[2_500] = entry(2_500, [1, 2, 3])
    write_single(tmp_path, "item", records)
    with pytest.raises(ValueError, match=r'entry 2500 .*\[\("adagrad", 3\)\] would'):
        read_hash_table(tmp_path, "item", segments=ADAGRAD)
    with pytest.raises(ValueError, match="entry 2500 has 3 weights"):
        hash_tables(tmp_path)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([("adamom", 2)], "no optimizer 'adamom'; there are .*'adagrad'"),
        ([("adagrad", 0)], "dim must be at least 1"),
        ([], "at least one segment"),
    ],
)
def test_segments_that_cannot_be(segments, message):
    with pytest.raises(ValueError, match=message):
        read_hash_table(assets("single"), "item", segments=segments)


# What an attacker might write

BYTES = st.binary(max_size=40)
TAGS = st.sampled_from([b"\x09", b"\x12", b"\x15", b"\x1a", b"\x20", b"\x0a", b"\xff"])
PIECES = st.lists(TAGS | BYTES | st.just(entry(3)), max_size=6).map(b"".join)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed")


def only_documented_errors(folder):
    for call in (
        lambda: read_hash_table(folder, "item", segments=ADAGRAD),
        lambda: hash_tables(folder),
    ):
        try:
            call()
        except ValueError as error:
            assert "MonolithHashTable_item" in str(error) or "Multi" in str(error)  # noqa: PT017 (either is right)


@given(records=st.lists(PIECES, max_size=4))
def test_any_entries(records, fuzzed):
    write_single(fuzzed / "entries", "item", records)
    only_documented_errors(fuzzed / "entries")


@given(data=PIECES)
@settings(max_examples=200)
def test_any_file(data, fuzzed):
    write_single(fuzzed / "file", "item", [])
    (fuzzed / "file" / "MonolithHashTable_item-00000-of-00001").write_bytes(data)
    only_documented_errors(fuzzed / "file")


@given(blocks=st.lists(BYTES, max_size=4), data=BYTES)
def test_any_compressed_file(blocks, data, fuzzed):
    path = write_multi(fuzzed / "multi", "", {"item": []}, {"item": 2})
    path.write_bytes(
        b"".join(len(block).to_bytes(4, "big") + block for block in blocks) + data
    )
    only_documented_errors(fuzzed / "multi")


def huge_length(snappy):
    length = (2**62).to_bytes(8, "little")
    data = length + plain.masked_crc(length).to_bytes(4, "little") + bytes(1_000)
    return plain.snappy(data) if snappy else data


@pytest.mark.parametrize(
    "data",
    [
        huge_length(snappy=True),
        b"\xff\xff\xff\xff" + bytes(1_000),  # a long block
        (9).to_bytes(4, "big") + b"\xff\xff\xff\xff\x0f" + bytes(4),  # a bomb
    ],
)
def test_what_a_file_claims_takes_no_memory(data, tmp_path):
    path = write_multi(tmp_path, "", {"item": []}, {"item": 2**62})
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_hash_table(tmp_path, "item", segments=ADAGRAD)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_short_entries_take_no_memory_for_long_segments(tmp_path):
    write_single(tmp_path, "item", [entry(i) for i in range(1_000)])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="entry 0 does not fit"):
            read_hash_table(tmp_path, "item", segments=[("sgd", 1_000_000)])
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(ImportError, match=r"monolith_optax\[hash-tables\]"):
        read_hash_table(assets("single"), "item", segments=[("adagrad", 8)])
