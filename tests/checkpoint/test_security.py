"""Checkpoints of strangers: what reading them opens and runs, and how far names reach.

The interpreter itself tells, by its audit events.
"""

import os
import pickle
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import FOLDER, prefix
from hash_table_files import entry, write_multi
from tensor_files import tensor, write

from monolith_optax.checkpoint import (
    HashTable,
    Segment,
    hash_tables,
    read_hash_table,
    read_tensorflow,
    write_hash_table,
)
from monolith_optax.checkpoint import __main__ as command_line

TABLES = FOLDER.parent / "hash_tables" / "native" / "model.ckpt-1200.assets"
_events = []
_listens = False


def _hook(event, arguments):
    if _listens:
        _events.append((event, arguments))


sys.addaudithook(_hook)


@contextmanager
def audited():
    """The events of what happens inside."""
    global _listens
    _events.clear()
    _listens = True
    try:
        yield _events
    finally:
        _listens = False


def read_everything():
    for name in FOLDER.iterdir():
        dict(read_tensorflow(prefix(name.name)))
    hash_tables(TABLES)
    read_hash_table(TABLES, "item", segments=[("adagrad", 4)])
    assert command_line.main(["show", str(TABLES)]) == 0


def test_the_interpreter_tells():
    with audited() as events:
        pickle.loads(pickle.dumps(Path))
    assert "pickle.find_class" in {event for event, _ in events}


def test_reading_unpickles_nothing_runs_nothing_and_writes_nothing():
    read_everything()  # imports what it needs
    with audited() as events:
        read_everything()
    seen = {event for event, _ in events}
    assert "open" in seen
    assert not {event for event in seen if event.startswith(("pickle", "subprocess"))}
    assert not seen & {"exec", "compile", "os.system", "marshal.loads", "ctypes.dlopen"}
    for path, _, flags in (arguments for event, arguments in events if event == "open"):
        assert Path(path).is_relative_to(FOLDER.parent), path
        assert not flags & (os.O_WRONLY | os.O_RDWR), path


NAMES = [
    "../evil", "../../evil", "/evil", "a/../../evil", "..", ".", "a\\..\\evil",
    "~/evil", "$HOME/evil", "file:evil", "a" * 300, "a/b", "a", "a\0b",
]  # fmt: skip


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_no_name_of_a_variable_is_one_of_a_file(tmp_path):
    """Orbax, too, must keep to the folder that it is given."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    entries = {
        name.encode(): tensor(b"1234", shape=(1,), offset=4 * k)
        for k, name in enumerate(NAMES)
    }
    write(folder / "x", entries, b"1234" * len(NAMES))
    before = files_in(tmp_path)
    assert list(read_tensorflow(folder / "x")) == sorted(NAMES)
    target = folder / "converted"
    arguments = ["convert", "--quiet", str(folder / "x"), str(target)]
    assert command_line.main(arguments) == 0
    after = [name for name in files_in(tmp_path) if "a/b/c/converted" not in name]
    assert after == before
    assert not any("evil" in name for name in files_in(target))
    with ocp.StandardCheckpointer() as checkpointer:
        assert sorted(checkpointer.restore(target)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_table_leaves_the_folder(name, tmp_path):
    folder = tmp_path / "a" / "b" / "assets"
    folder.mkdir(parents=True)
    norm = np.ones((1, 2), np.float32)
    segment = Segment("adagrad", 2, {"norm": norm})
    table = HashTable(np.array([7]), norm, (segment,), np.array([0]))
    with suppress(ValueError, OSError):  # no file can have that name
        write_hash_table(folder, name, table)
        read = read_hash_table(folder, name, segments=[("adagrad", 2)], servers=0)
        assert read.ids == [7]
    files = [path for path in tmp_path.rglob("*") if not path.is_dir()]
    assert all(path.parent == folder for path in files)
    assert all(path.name.startswith("MonolithHashTable_") for path in files)


def test_what_is_not_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "MonolithHashTable_x-00000-of-00001")
    for read in (
        hash_tables,
        lambda folder: read_hash_table(folder, "x", segments=[("sgd", 1)]),
    ):
        with pytest.raises(ValueError, match="00001 is not a file"):
            read(tmp_path)
    os.mkfifo(tmp_path / "x.index")
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.index"):
        read_tensorflow(tmp_path / "x")
    (tmp_path / "x.index").unlink()
    write(tmp_path / "x", {b"w": tensor(b"", shape=(0,))})
    os.mkfifo(tmp_path / "x.data-00000-of-00001")
    with pytest.raises(FileNotFoundError, match=r"no file .*x\.data"):
        read_tensorflow(tmp_path / "x")


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "assets"
    folder.mkdir()
    link = folder / "MonolithHashTable_x-00000-of-00001"
    link.symlink_to(victim)
    (folder / "MonolithHashTable_x-00007-of-00009").symlink_to(victim)
    norm = np.ones((1, 2), np.float32)
    segment = Segment("adagrad", 2, {"norm": norm})
    table = HashTable(np.array([7]), norm, (segment,), np.array([0]))
    write_hash_table(folder, "x", table)
    assert victim.read_text() == "mine"
    assert not link.is_symlink()


def test_a_long_number_in_ckpt_info(tmp_path):
    """Python itself refuses to convert it, and would not say where it is."""
    folder = tmp_path / "model.ckpt-1.assets"
    write_multi(folder, "0", {"x": [entry(1)]})
    counts = 'feature_counts { key: "x" value: ' + "1" * 5_000 + " }"
    (tmp_path / "ckpt.info-1").write_text(counts)
    with pytest.raises(ValueError, match=r"ckpt\.info-1 is not a list"):
        read_hash_table(folder, "x", segments=[("adagrad", 2)])
