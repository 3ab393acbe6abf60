"""The node checker's command line: called in this process, and as a program."""

import functools
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from command_lines import caller, start

import monolith_optax
from monolith_optax.net import __main__ as command_line
from monolith_optax.net import _command_line

COMMAND = [sys.executable, "-m", "monolith_optax.net"]


program = functools.partial(start, COMMAND)


@pytest.fixture
def run(capsys):
    return caller(command_line.main, capsys)


@pytest.fixture
def up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def down():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_all_up(run, up):
    status, output, errors = run("check", up)
    assert (status, errors) == (0, "")
    assert f"{up}  up" in output
    assert output.endswith("1 of 1 up\n")


def test_some_down(run, up, down):
    status, output, errors = run("check", up, down, "no port")
    assert (status, errors) == (1, "")
    lines = output.splitlines()
    assert len(lines) == 4
    assert f"{down}  DOWN" in lines[1]
    assert "refused: Connection refused" in lines[1]
    assert "invalid address: 'no port' has no port" in lines[2]
    assert lines[3] == "1 of 3 up"


def test_json_lines(run, up, down):
    status, output, _ = run("check", "--json", up, down)
    assert status == 1
    first, second = map(json.loads, output.splitlines())
    assert first.pop("latency") > 0
    assert first == {"address": up, "alive": True, "reason": None, "message": ""}
    assert (second["address"], second["reason"]) == (down, "refused")


def test_quiet(run, up, down):
    assert run("check", "--quiet", up) == (0, "", "")
    assert run("check", "--quiet", up, down) == (1, "", "")
    assert run("wait", "--quiet", up) == (0, "", "")
    assert run("wait", "--quiet", up, down, "--deadline", "0.1") == (1, "", "")


def test_addresses_from_everywhere(run, monkeypatch, tmp_path, up, down):
    file = tmp_path / "nodes.txt"
    file.write_text(f"# nodes\n{up}\n")
    cluster = {"cluster": {"ps": ["localhost:none"], "worker": [down]}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", up)
    sources = ["--file", file, "--tf-config", "--roles", "worker"]
    _, output, _ = run("check", "--json", *sources)
    assert [json.loads(x)["address"] for x in output.splitlines()] == [up, down]
    status, output, _ = run("check", "--coordinator")
    assert (status, output.count("\n")) == (0, 2)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_addresses_on_standard_input(up, kind):
    if kind == "socket":
        theirs, ours = socket.socketpair()
        ends = theirs.detach(), ours.detach()
    else:
        ends = os.pipe()
    os.write(ends[1], f"{up}\n".encode())
    os.close(ends[1])
    with program("check", "--file", "-", stdin=ends[0]) as process:
        os.close(ends[0])
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert output.endswith("1 of 1 up\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["check"], "no addresses"),
        (["check", "a:1", "--timeout", "0"], "'0' must be a positive time"),
        (["check", "a:1", "--timeout", "x"], "must be a positive time"),
        (["check", "a:1", "--timeout", "nan"], "must be a positive time"),
        (["check", "a:1", "--timeout", "inf"], "must be a positive time"),
        (["check", "a:1", "--http", "healthz"], "must begin with /"),
        (["check", "a:1", "--http", "/a b"], "must begin with /"),
        (["wait", "a:1", "--deadline", "5x"], "such as 30, 0.5s, 5m, 0 or inf"),
        (["wait", "a:1", "--deadline", "."], "such as 30, 0.5s, 5m, 0 or inf"),
        (["wait", "a:1", "--deadline=-1"], "such as 30, 0.5s, 5m, 0 or inf"),
        (["wait", "a:1", "--interval", "0"], "must be a positive time"),
        (["wait", "a:1", "-n", "0"], "whole number, at least 1"),
        (["wait", "a:1", "a:1", "-n", "2"], "-n asks for 2 nodes, but there are 1."),
        (["wait", "a:1", "-n", "1", "--any"], "not allowed with argument"),
        (["wait", "a:1", "--", "no-such-program"], "no program 'no-such-program'"),
        (["wait", "--", "true"], "no addresses"),
        (["wait", "a:1", "worker-9"], "'worker-9' has no port"),
        (["watch", "a:1", "::1:80"], "must be in brackets: write [::1]:80"),
        (["check", "--file", "/no/such/file"], "No such file"),
        (["check", "--tf-config"], "TF_CONFIG is not set"),
        (["check", "--coordinator"], "JAX_COORDINATOR_ADDRESS is not set"),
        (["check", "a:1", "--roles", "ps"], "--tf-config, which is not given"),
        (["watch", "a:1", "--failure-threshold", "0"], "whole number, at least 1"),
        (["watch", "a:1", "--success-threshold", "x"], "whole number, at least 1"),
        (["watch", "a:1", "--interval", "0"], "must be a positive time"),
        (["ping", "a:1"], "invalid choice"),
    ],
)
def test_bad_usage(run, monkeypatch, arguments, message):
    monkeypatch.setenv("TF_CONFIG", "")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "")
    status, output, errors = run(*arguments)
    assert (status, output) == (2, "")
    assert message in errors
    assert "Traceback" not in errors


def test_help_names_every_exit_status(run):
    for arguments in (["--help"], ["check", "--help"], ["watch", "--help"]):
        status, output, _ = run(*arguments)
        assert status == 0
        words = " ".join(output.split())
        assert _command_line.EXIT_STATUS in words
        for number in (0, 1, 2, 3, 130, 143):
            assert f"{number} " in words


def test_version(run):
    status, output, _ = run("--version")
    assert (status, output) == (0, f"monolith_optax {monolith_optax.__version__}\n")


def test_a_file_that_is_not_text(run, tmp_path, up):
    file = tmp_path / "nodes"
    file.write_bytes(b"\xff\xfe")
    status, _, errors = run("check", "--file", file)
    assert status == 2
    assert f"{file} must be text in UTF-8" in errors
    file.write_text("\ufeff" + up)
    assert run("check", "--file", file)[0] == 0


def test_faults_of_the_checker_are_not_those_of_a_node(run, monkeypatch, up):
    async def fail(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(command_line, "check_nodes", fail)
    status, output, errors = run("check", up)
    assert (status, output) == (3, "")
    assert "ZeroDivisionError: a bug" in errors


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_cannot_be_written(up, options):
    with (
        Path("/dev/full").open("w") as full,
        program("check", up, *options, stdout=full) as process,
    ):
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert errors == "monolith-net: [Errno 28] No space left on device\n"


def test_output_that_nobody_reads(down):
    read, write = os.pipe()
    os.close(read)
    with program("check", down, stdout=write) as process:
        os.close(write)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (3, "")


def test_a_name_that_the_terminal_cannot_print():
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    with program("check", "bücher.invalid:x", "a\x1b[2J:1", env=ascii_only) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (1, "")
    assert "b\\xfccher.invalid:x  DOWN" in output
    assert "\na\\x1b[2J:1  " in output
    assert output.endswith("0 of 2 up\n")


def on_a_terminal(*arguments, **environment):
    """Starts the program on a terminal; returns it and the terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {"TERM": "xterm", "NO_COLOR": ""} | environment
    process = program(
        *arguments, stdout=theirs, stderr=theirs, env=os.environ | environment
    )
    os.close(theirs)
    return process, ours


def shown_on(terminal, until=None):
    """What the terminal shows until `until(shown)`, or until the program ends."""
    shown = ""
    while not (until and until(shown)) and select.select([terminal], [], [], 60)[0]:
        try:
            shown += os.read(terminal, 4096).decode()
        except OSError:  # the other end is closed
            break
    return shown


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_only_where_they_are_wanted(up, environment, coloured):
    process, terminal = on_a_terminal("check", up, "no port", **environment)
    with process:
        shown = shown_on(terminal)
    os.close(terminal)
    assert process.wait() == 1
    assert ("\x1b[32mup  \x1b[m" in shown) == coloured
    assert ("\x1b[31mDOWN\x1b[m" in shown) == coloured
    assert ("\x1b" in shown) == coloured


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_watching(up, down, number, status):
    sources = [up, down, "--json", "--interval", "0.05", "--failure-threshold", "1"]
    with program("watch", *sources) as process:
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert (first["address"], first["alive"]) == (up, True)
    assert (second["address"], second["alive"]) == (down, False)
    assert second["reason"] == "refused"
    assert (process.returncode, errors) == (status, "")


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4, 50])
def test_a_second_signal_leaves_no_traceback(down, first, second, milliseconds):
    # The name is looked up in a process, which is ended first.
    sources = ["localhost:1", down, "--interval", "0.02", "--json"]
    with program("watch", *sources, "--failure-threshold", "1") as process:
        assert process.stdout.readline()
        process.send_signal(first)
        time.sleep(milliseconds / 1000)
        process.send_signal(second)
        _, errors = process.communicate(timeout=60)
    assert errors == ""
    assert process.returncode in (130, 143)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a PID namespace needs root")
@pytest.mark.parametrize("command", ["watch --interval 0.05", "wait"])
def test_process_1_of_a_container_can_be_terminated(down, command):
    container = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*container, "true"], check=False).returncode:
        pytest.skip("PID namespaces cannot be made here")
    arguments = [*container, *COMMAND, *command.split(), down, "--json"]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline()
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        os.kill(int(Path(children).read_text()), signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors.count("Traceback")) == (143, 0)


def test_the_console_script_runs_the_program():
    project = tomllib.loads(
        Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    )
    module, _, function = project["project"]["scripts"]["monolith-net"].partition(":")
    code = f"import {module} as m; m.{function}()"
    command = [sys.executable, "-c", code, "check", "no port"]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.endswith("0 of 1 up\n")


def test_the_command_line_imports_no_jax():
    code = (
        "import sys, monolith_optax.net.__main__; "
        "assert not {'jax', 'numpy', 'optax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
