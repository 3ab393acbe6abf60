"""The command line of checkpoints: called in this process, and as a program."""

import contextlib
import functools
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import tomllib
from pathlib import Path

import pytest
from checkpoints import prefix, truth
from choosing import sampled
from command_lines import caller, start
from tensor_files import tensor, write

import monolith_optax
from monolith_optax.checkpoint import __main__ as command_line
from monolith_optax.checkpoint import _show

COMMAND = [sys.executable, "-m", "monolith_optax.checkpoint"]
TABLES = "tests/data/hash_tables/single/model.ckpt-1200.assets"


program = functools.partial(start, COMMAND)


@pytest.fixture
def run(capsys):
    return caller(command_line.main, capsys)


def test_show(run):
    status, output, errors = run("show", prefix("adamom"))
    assert (status, errors) == (0, "")
    header, *lines = output.splitlines()
    assert header.split() == ["name", "kind", "shape", "dtype"]
    assert ["global_step", "variable", "[]", "int64"] in map(str.split, lines)
    assert "mlp/dense/bias/Adamom/c" in output
    rows = json.loads(run("show", "--json", prefix("adamom"))[1])
    assert {row["name"]: row["kind"] for row in rows} == {
        name: "slot" if "Adamom" in name else "variable" for name in truth("adamom", 6)
    }


def test_show_an_index_file(run):
    assert run("show", f"{prefix('adamom')}.index") == run("show", prefix("adamom"))


def test_show_a_folder(run, tmp_path):
    status, _, errors = run("show", tmp_path)
    assert status == 3
    assert f"{tmp_path} is a folder without a TensorFlow checkpoint" in errors
    for file in Path(TABLES).parents[1].glob("native/model.ckpt-1200*"):
        (tmp_path / file.name).symlink_to(file.absolute())
    status, output, errors = run("show", tmp_path)
    assert (status, errors) == (0, "")
    assert output == run("show", tmp_path / "model.ckpt-1200")[1]
    assert "hash table" in output
    newer = tmp_path / "model.ckpt-6.index"
    newer.write_bytes(b"")
    os.utime(newer, (2**32, 2**32))
    status, output, errors = run("show", tmp_path)
    assert (status, output) == (3, "")
    names = ", ".join(str(tmp_path / f"model.ckpt-{n}") for n in (1200, 6))
    assert "several checkpoints: give one of them" in errors
    assert f"from the oldest to the newest {names}." in errors


def test_converting_says_what_it_needs(run):
    words = " ".join(run("convert", "--help")[1].split())
    assert "Needs pip install orbax-checkpoint" in words
    assert "only converting back needs TensorFlow" in words


@pytest.mark.parametrize("missing", ["jax", "numpy"])
def test_without_a_package_it_says_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "from monolith_optax.checkpoint.__main__ import main; sys.exit(main())"
    )
    with start([sys.executable, "-c", code], "show", "x") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (3, "")
    assert errors == (
        f"monolith-checkpoint: {missing} is not installed: "
        "pip install 'monolith_optax[hash-tables]'.\n"
    )


@pytest.mark.parametrize("source", [prefix("adamom"), TABLES])
def test_quiet(run, source):
    assert run("show", "--quiet", source) == (0, "", "")


@pytest.mark.parametrize("options", [[], ["--quiet"]])
@pytest.mark.parametrize("command", ["show", "convert"])
def test_what_is_not_there(run, tmp_path, command, options):
    target = [tmp_path / "new"] * (command == "convert")
    status, output, errors = run(command, *options, "no", *target)
    assert (status, output) == (3, "")
    assert errors == (
        "monolith-checkpoint: There is no file no.index. The prefix of a checkpoint "
        "ends before '.index', as in 'model/model.ckpt-6'.\n"
    )


@pytest.mark.parametrize(
    "arguments", [[], ["show"], ["convert", "a"], ["show", "--no"], ["delete", "a"]]
)
def test_bad_usage(run, arguments):
    status, output, errors = run(*arguments)
    assert (status, output) == (2, "")
    assert "usage: monolith-checkpoint" in errors


def test_help_names_every_exit_status(run):
    for arguments in (["--help"], ["show", "--help"], ["convert", "--help"]):
        status, output, _ = run(*arguments)
        assert status == 0
        for number in (0, 2, 3, 130, 143):
            assert f" {number} " in " ".join(output.split())


def test_version(run):
    status, output, _ = run("--version")
    assert (status, output) == (0, f"monolith_optax {monolith_optax.__version__}\n")


def test_a_bug_is_not_the_fault_of_a_file(run, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(_show, "read_tensorflow", fail)
    status, output, errors = run("show", prefix("adamom"))
    assert (status, output) == (3, "")
    assert "ZeroDivisionError: a bug" in errors


def test_output_that_nobody_reads():
    read, out = os.pipe()
    os.close(read)
    with program("show", prefix("adamom"), stdout=out) as process:
        os.close(out)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (3, "")


def test_names_that_the_terminal_cannot_print(tmp_path):
    entries = {
        name: tensor(b"", shape=(0,))
        for name in (b"b\xc3\xbccher", b"a\x1b[2J", b"line\nbreak")
    }
    write(tmp_path / "x", entries, b"")
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    with program("show", tmp_path / "x", env=ascii_only) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    names = [line.split()[0] for line in output.splitlines()[1:]]
    expected = ["a\\x1b[2J", "b\\xfccher", "line\\nbreak"]
    assert names == expected


@pytest.mark.parametrize("terminal", sampled(["dumb", "xterm"], "xterm"))
def test_progress_only_on_a_terminal_that_can_clear_it(terminal):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    with program(
        "show", TABLES, stderr=theirs, env=os.environ | {"TERM": terminal}
    ) as process:
        os.close(theirs)
        assert "item" in process.communicate(timeout=60)[0]
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.returncode == 0
    assert bool(shown) == (terminal == "xterm")


def test_it_can_be_terminated(tmp_path):
    """It waits for a reader, as nobody reads more than the first line."""
    write(
        tmp_path / "x",
        {b"%05d" % k: tensor(b"", shape=(0,)) for k in range(9_000)},
        b"",
    )
    with program("show", tmp_path / "x") as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "")


def test_the_console_script_runs_the_program():
    project = tomllib.loads(
        Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    )
    script = project["project"]["scripts"]["monolith-checkpoint"]
    module, _, function = script.partition(":")
    code = f"import {module} as m; m.{function}()"
    command = [sys.executable, "-c", code, "--version"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"monolith_optax {monolith_optax.__version__}\n"
