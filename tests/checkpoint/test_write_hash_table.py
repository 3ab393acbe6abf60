"""Writing hash tables, and listing them."""

import dataclasses
import json
import os

import hash_table_files as plain
import numpy as np
import pytest
from hash_table_files import entry, message, write_multi, write_single

from monolith_optax.checkpoint import (
    HashTable,
    Segment,
    hash_tables,
    read_hash_table,
    write_hash_table,
)
from monolith_optax.checkpoint.__main__ import main

SINGLE = [(job, name) for job, name in plain.SPECS if job == "single"]


def sample(job, name):
    folder = plain.DATA / job / "model.ckpt-1200.assets"
    return read_hash_table(folder, name, segments=plain.segments_of(job, name))


def small(ids=(5, -3)):
    norm = np.full((len(ids), 2), 0.5, np.float32)
    return HashTable(
        ids=np.array(ids, np.int64),
        weights=np.ones((len(ids), 2), np.float32),
        segments=(Segment("adagrad", 2, {"norm": norm}),),
        last_update=np.full(len(ids), 7),
    )


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("job", "name"), SINGLE)
def test_records_are_monoliths_own(job, name, shards, tmp_path):
    folder = tmp_path / "made" / "model.ckpt-7.assets"
    write_hash_table(folder, name, sample(job, name), shards=shards)
    assert len(names_in(folder)) == shards
    theirs = plain.DATA / job / "model.ckpt-1200.assets"
    ours, expected = (
        sorted(
            record
            for path in where.glob(f"MonolithHashTable_{name}-*")
            for record in plain.records_in(path.read_bytes())
        )
        for where in (folder, theirs)
    )
    assert ours == expected
    back = read_hash_table(folder, name, segments=plain.segments_of(job, name))
    plain.assert_same_bits(back, plain.truth_of(job, name))


@pytest.mark.parametrize("name", ["context", "item", "unused"])
def test_tables_of_several_in_a_file_become_single_ones(name, tmp_path):
    table = sample("native", name)
    write_hash_table(tmp_path, name, table)
    assert names_in(tmp_path) == [f"MonolithHashTable_{name}-00000-of-00001"]
    segments = plain.segments_of("native", name)
    back = read_hash_table(tmp_path, name, segments=segments)
    plain.assert_same_bits(back, plain.as_truth(table))


def test_any_integers_keep_their_bits(tmp_path):
    steps = [0, 127, 128, 2**35, 2**63 - 1, -1, -(2**63)]
    times = [0, 1, 127, 128, 2**14, 2**31, 2**32 - 1]
    table = HashTable(
        ids=np.array([2**63 - 1, 0, -1, 1, 2, -(2**63), 3]),
        weights=np.arange(7, dtype=np.float32)[:, None],
        segments=(Segment("batch_softmax", 1, {"global_step": np.array(steps)}),),
        last_update=np.array(times),
    )
    write_hash_table(tmp_path, "soft", table)
    [path] = tmp_path.iterdir()
    expected = [
        entry(
            raw,
            [weight],
            message(1, message(14, b"\x08" + plain.varint(step))),
            time,
        )
        for raw, weight, step, time in zip(
            table.ids.tolist(), range(7), steps, times, strict=True
        )
    ]
    ours = [record[12:-4] for record in plain.records_in(path.read_bytes())]
    assert sorted(ours) == sorted(expected)
    back = read_hash_table(tmp_path, "soft", segments=[("batch_softmax", 1)])
    order = np.argsort(table.ids)
    assert (
        back.segments[0].slots["global_step"].tolist()
        == np.array(steps)[order].tolist()
    )


def test_an_older_save_is_replaced(tmp_path):
    others = ["MonolithHashTable_item_1-00000-of-00001", "MonolithHashTable_item-x-y"]
    for other in others:
        (tmp_path / other).touch()
    (tmp_path / "MonolithHashTable_item-00000-of-00001-tmp-77").touch()
    write_hash_table(tmp_path, "item", small([1, 2, 3]), shards=4)
    assert len(names_in(tmp_path)) == 6
    write_hash_table(tmp_path, "item", small([4]))
    ours = "MonolithHashTable_item-00000-of-00001"
    assert names_in(tmp_path) == sorted([ours, *others])
    back = read_hash_table(tmp_path, "item", segments=[("adagrad", 2)])
    assert back.ids.tolist() == [4]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_older_save(failing, tmp_path, monkeypatch):
    write_hash_table(tmp_path, "item", small([1, 2, 3]))

    def fails(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, failing, fails)
    with pytest.raises(OSError, match="no space"):
        write_hash_table(tmp_path, "item", small([4]))
    monkeypatch.undo()
    assert names_in(tmp_path) == ["MonolithHashTable_item-00000-of-00001"]
    back = read_hash_table(tmp_path, "item", segments=[("adagrad", 2)])
    assert back.ids.tolist() == [1, 2, 3]


def with_slots(**slots):
    return {"segments": (Segment("adagrad", 2, slots),)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.array([5, 5])}, "id 5 is there more than once"),
        ({"ids": np.array([5, 6], np.uint64)}, "ids has dtype uint64"),
        ({"ids": np.array([[5, 6]])}, r"ids has dtype int64 and shape \(1, 2\)"),
        ({"weights": np.ones((2, 3), np.float32)}, r"weights .* float32 and \(2, 2\)"),
        ({"weights": np.ones((2, 2))}, "weights has dtype float64"),
        ({"last_update": np.array([0, -1])}, "unsigned 32-bit integers, but one is -1"),
        ({"last_update": np.array([0, 2**32])}, "but one is 4294967296"),
        (with_slots(), r"Segment 0, adagrad, has the slots \[\], but .*\['norm'\]"),
        (with_slots(m=np.ones((2, 2), np.float32)), r"has the slots \['m'\]"),
        (with_slots(norm=np.ones((2, 2))), r"segments\[0\]\.slots\['norm'\] has dtype"),
        ({"segments": (Segment("adamom", 2, {}),)}, "no optimizer 'adamom'"),
    ],
)
def test_tables_that_are_wrong_are_refused(change, message, tmp_path):
    folder = tmp_path / "not made"
    with pytest.raises(ValueError, match=message):
        write_hash_table(folder, "item", dataclasses.replace(small(), **change))
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "a\0b", "..\\..\\a"])
def test_names_that_no_file_has_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="name becomes one of a file"):
        write_hash_table(tmp_path, name, small())
    with pytest.raises(ValueError, match="from 1 to 99999 shards"):
        write_hash_table(tmp_path, "item", small(), shards=0)


def test_no_name_leaves_the_folder(tmp_path):
    folder = tmp_path / "inside"
    write_hash_table(folder, "../../item", small())
    assert names_in(tmp_path) == ["inside"]
    assert names_in(folder) == ["MonolithHashTable_..-..-item-00000-of-00001"]
    read_hash_table(folder, "../../item", segments=[("adagrad", 2)])


# Listing


@pytest.mark.parametrize(("job", "servers"), [("single", 0), ("native", 2)])
def test_the_list_of_the_samples(job, servers):
    infos = {
        info.name: info for info in hash_tables(plain.DATA / job / "model.ckpt-1200")
    }
    specs = {
        name: spec
        for of, name in plain.SPECS
        if of == job
        for spec in [plain.SPECS[of, name]]
    }
    assert list(infos) == sorted(specs)
    for name, spec in specs.items():
        info = infos[name]
        assert info.entries == spec["entries"]
        assert info.servers == servers
        assert info.shards == ((1, 2) if job == "native" else (spec["shards"],))
        if not info.entries:
            assert (info.dim, info.segments, info.last_update) == (0, (), 0)
            continue
        truth = plain.truth_of(job, name)
        assert info.dim == truth["num"].shape[1]
        assert info.last_update == truth["last_update_ts_sec"].max()
        unseen = {"sgd": None, "group_adagrad": None}
        assert info.segments == tuple(
            (optimizer, unseen.get(optimizer, dim))
            for optimizer, dim in plain.segments_of(job, name)
            if optimizer != "moving_average"
        )


def test_servers_in_the_list(tmp_path):
    for server in range(2):
        records = [entry(2 * i + server) for i in range(20)]
        write_single(tmp_path, f"item_{server}", records, [])
    [info] = hash_tables(tmp_path)
    assert (info.name, info.servers, info.shards) == ("item", 2, (2, 2))
    assert (info.entries, info.last_update) == (40, 7)


def test_the_list_tells_how_far_it_is():
    folder = plain.DATA / "native" / "model.ckpt-1200.assets"
    read = []
    hash_tables(folder, on_bytes=read.append)
    files = folder.glob("MonolithMultiHashTable_[01]-*")
    assert sum(read) == sum(path.stat().st_size for path in files)


@pytest.fixture
def show(capsys):
    """Runs `monolith-checkpoint show`; returns its status, output and errors."""
    return lambda *arguments: (main(["show", *arguments]), *capsys.readouterr())


def test_show_in_words_and_in_json(show):
    folder = str(plain.DATA / "native" / "model.ckpt-1200.assets")
    status, out, err = show(folder)
    assert (status, err) == (0, "")
    assert [line.split() for line in out.splitlines()] == [
        [
            "name",
            "kind",
            "entries",
            "dim",
            "segments",
            "servers",
            "shards",
            "last_update",
        ],
        [
            "context",
            "hash",
            "table",
            "58",
            "5",
            "ftrl:1",
            "adam:4",
            "2",
            "[1,",
            "2]",
            "2023-11-17T07:30:35+00:00",
        ],
        [
            "item",
            "hash",
            "table",
            "89",
            "4",
            "adagrad:4",
            "2",
            "[1,",
            "2]",
            "2023-11-17T07:30:35+00:00",
        ],
        ["unused", "hash", "table", "0", "0", "2", "[1,", "2]", "0"],
    ]
    status, out, err = show(folder, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)[0] == {
        "name": "context",
        "kind": "hash table",
        "entries": 58,
        "dim": 5,
        "segments": [["ftrl", 1], ["adam", 4]],
        "servers": 2,
        "shards": [1, 2],
        "last_update": 1700206235,
    }


def test_show_says_what_is_wrong(show, tmp_path):
    path = write_multi(tmp_path, "", {"a\x1b[31m": [entry(1, time=2**62)]})
    status, out, _ = show(str(tmp_path))
    assert status == 0
    assert r"a\x1b[31m " in out
    assert str(2**62) in out
    path.write_bytes(b"damaged")
    status, out, err = show(str(tmp_path))
    assert (status, out) == (3, "")
    assert str(path) in err
