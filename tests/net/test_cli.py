"""The node checker's command line, as a program."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-m", "monolith_optax.net"]


def run(*arguments, stdin=None, **environment):
    return subprocess.run(
        [*COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        input=stdin,
        env=os.environ | environment,
        timeout=60,
    )


@pytest.fixture
def up():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def down():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


def test_all_up(up):
    result = run("check", up)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{up}  up" in result.stdout
    assert result.stdout.endswith("1 of 1 nodes are up\n")


def test_some_down(up, down):
    result = run("check", up, down, "no port")
    assert (result.returncode, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    assert f"{down}  DOWN" in lines[1]
    assert "refused: Connection refused" in lines[1]
    assert "invalid address: 'no port' has no port" in lines[2]
    assert lines[3] == "1 of 3 nodes are up"


def test_json_lines(up, down):
    result = run("check", "--json", up, down)
    assert result.returncode == 1
    first, second = map(json.loads, result.stdout.splitlines())
    assert 0 < first.pop("latency") < 1
    assert first == {"address": up, "alive": True, "reason": None, "message": ""}
    assert (second["address"], second["reason"]) == (down, "refused")


def test_addresses_from_everywhere(tmp_path, up, down):
    file = tmp_path / "nodes.txt"
    file.write_text(f"# nodes\n{up}\n")
    cluster = {"cluster": {"ps": ["localhost:none"], "worker": [down]}}
    environment = {"TF_CONFIG": json.dumps(cluster), "JAX_COORDINATOR_ADDRESS": up}
    sources = ["--file", file, "--tf-config", "--roles", "worker"]
    result = run("check", "--json", *sources, **environment)
    assert [json.loads(x)["address"] for x in result.stdout.splitlines()] == [up, down]
    result = run(
        "check", "--coordinator", "--file", "-", stdin=f"{up}\n", **environment
    )
    assert (result.returncode, result.stdout.count("\n")) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["check"], "no addresses"),
        (["check", "a:1", "--timeout", "0"], "timeout must be a positive"),
        (["check", "a:1", "--timeout", "x"], "invalid float value"),
        (["check", "a:1", "--wait", "-1"], "deadline must be a positive"),
        (["check", "--file", "/no/such/file"], "No such file"),
        (["check", "--tf-config"], "TF_CONFIG is not set"),
        (["check", "--coordinator"], "JAX_COORDINATOR_ADDRESS is not set"),
        (["check", "a:1", "--roles", "ps"], "--tf-config, which is not given"),
        (["watch", "a:1", "--failure-threshold", "0"], "failure_threshold"),
        (["watch", "a:1", "--interval", "0"], "interval must be a positive"),
        (["ping", "a:1"], "invalid choice"),
    ],
)
def test_bad_usage(arguments, message):
    result = run(*arguments, TF_CONFIG="", JAX_COORDINATOR_ADDRESS="")
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_output_that_nobody_reads(down):
    command = [*COMMAND, "check", down, "--json"]
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(command, check=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (result.returncode, result.stderr) == (3, b"")


def test_a_file_that_is_no_text(tmp_path, up):
    file = tmp_path / "nodes"
    file.write_bytes(b"\xff\xfe")
    result = run("check", "--file", file)
    assert result.returncode == 2
    assert f"{file} is no text in UTF-8" in result.stderr
    file.write_text("\ufeff" + up)
    assert run("check", "--file", file).returncode == 0


def test_waiting_until_up():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        command = [*COMMAND, "check", address, "--wait", "60"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr.readline() == "0 of 1 nodes are up\n"
            server.listen()
            output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.endswith("1 of 1 nodes are up\n")


def test_waiting_in_vain(down):
    start = time.monotonic()
    result = run("check", down, "--wait", "0.5", "--json")
    assert result.returncode == 1
    assert json.loads(result.stdout)["reason"] == "refused"
    assert "0 of 1 nodes are up" in result.stderr
    assert time.monotonic() - start < 10


def test_watching(up):
    host, port = up.split(":")
    command = [*COMMAND, "watch", up, "127.0.0.1:none", "--json", "--interval", "0.05"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (first["address"], first["alive"]) == (f"{host}:{port}", True)
    assert (second["address"], second["alive"]) == ("127.0.0.1:none", False)
    assert second["reason"] == "invalid address"
    assert (process.returncode, errors) == (130, "")


def test_the_command_line_imports_no_jax():
    code = (
        "import sys, monolith_optax.net.__main__; "
        "assert not {'jax', 'numpy', 'optax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
