"""`monolith-net wait`: until nodes are up or down, and then a command."""

import asyncio
import contextlib
import functools
import http.server
import json
import socket
import sys
import threading

import pytest
from command_lines import caller, start
from net_doubles import REFUSED, Nodes, run_virtually

from monolith_optax.net import HttpConnector, NodeStatus, Reason, check_nodes
from monolith_optax.net import __main__ as command_line
from monolith_optax.net._arguments import targets_of
from monolith_optax.net._wait import Goal, wait

program = functools.partial(start, [sys.executable, "-m", "monolith_optax.net", "wait"])


@pytest.fixture
def run(capsys):
    return functools.partial(caller(command_line.main, capsys), "wait")


@contextlib.contextmanager
def bound():
    """A socket that does not listen yet, and its address."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server, f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def up():
    with bound() as (server, address):
        server.listen()
        yield address


@pytest.fixture
def down():
    with bound() as (_, address):
        yield address


def test_all_up(run, up):
    status, output, errors = run(up)
    assert (status, output) == (0, "")
    assert errors.startswith("1 of 1 up after ")


def test_it_names_who_is_missing_and_only_when_that_changes(up):
    with (
        bound() as (first, a),
        bound() as (second, b),
        program(up, a, b, "--interval", "20ms") as process,
    ):
        line = process.stderr.readline()
        assert line.startswith("1 of 3 up after ")
        assert line.endswith(f"; missing: {a} (refused), {b} (refused)\n")
        first.listen()
        line = process.stderr.readline()
        assert line.startswith("2 of 3 up after ")
        assert line.endswith(f"; missing: {b} (refused)\n")
        second.listen()
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (0, "")
    assert errors.startswith("3 of 3 up after ")
    assert errors.count("\n") == 1


def test_of_many_missing_nodes_it_names_a_few(run):
    nodes = [f"127.0.0.1:{port}" for port in range(1, 9)]
    status, _, errors = run(*nodes, "--deadline", "0")
    assert status == 1
    assert "127.0.0.1:5 (refused), and 3 more\n" in errors


def test_in_vain(run, up, down):
    status, output, errors = run(up, down, "--deadline", "100ms")
    assert (status, output) == (1, "")
    assert "1 of 2 up after 0.1 s; gave up\n" in errors
    assert errors.endswith(f"  {down}  refused: Connection refused\n")


@pytest.mark.parametrize("deadline", ["5m", "1.5h", "inf", "300", "300s"])
def test_deadlines_that_are_not_reached(run, up, deadline):
    assert run(up, "--deadline", deadline)[0] == 0


def test_a_deadline_of_0_is_one_round(run, up, down):
    status, output, _ = run(up, down, "--deadline", "0", "--json")
    assert status == 1
    *nodes, summary = map(json.loads, output.splitlines())
    assert [(node["address"], node["alive"]) for node in nodes] == [
        (up, True),
        (down, False),
    ]
    assert (summary["met"], summary["missing"]) == (False, [down])


def test_json_has_what_changed_and_a_summary():
    with (
        bound() as (server, address),
        program(address, "--json", "--interval", "20ms") as process,
    ):
        first = json.loads(process.stdout.readline())
        server.listen()
        output, errors = process.communicate(timeout=60)
    second, summary = map(json.loads, output.splitlines())
    assert (process.returncode, errors) == (0, "")
    assert (first["alive"], first["reason"]) == (False, "refused")
    assert (second["address"], second["alive"]) == (address, True)
    assert summary.pop("seconds") > 0
    assert summary.pop("time")
    assert summary == {"met": True, "up": 1, "nodes": 1, "missing": []}


def test_any_and_some(run, up, down):
    assert run(up, down, "--any")[0] == 0
    assert run(up, down, "-n", "1")[0] == 0
    assert run(up, down, "-n", "2", "--deadline", "0")[0] == 1


def test_until_a_port_closes():
    with bound() as (server, address):
        server.listen()
        with program(address, "--down", "--interval", "20ms") as process:
            line = process.stderr.readline()
            assert line.startswith("0 of 1 down after ")
            assert line.endswith(f"; missing: {address} (up)\n")
            server.close()
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.startswith("1 of 1 down after ")


def test_a_port_that_stays_open(run, up):
    status, _, errors = run(up, "--down", "--deadline", "0")
    assert status == 1
    assert errors.endswith(f"  {up}  still up\n")


@pytest.mark.parametrize(
    ("reason", "closed"),
    [(reason, reason.name in "REFUSED TIMEOUT UNREACHABLE NAME_NOT_RESOLVED")
     for reason in Reason],
)  # fmt: skip
def test_trouble_that_is_not_the_nodes_is_not_taken_for_a_closed_port(reason, closed):
    status = NodeStatus("a:1", False, 0.0, reason, "words")
    assert Goal(1, down=True).reached_by(status) == closed


def test_the_command_takes_the_place_of_the_program(up):
    code = "import sys; print(sys.argv[1:]); sys.exit(7)"
    with program(up, "--quiet", "--", sys.executable, "-c", code, "--", "x") as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (7, "['--', 'x']\n", "")


def test_the_command_does_not_run_after_the_deadline(down):
    options = "--quiet", "--deadline", "0", "--", sys.executable, "-c", "print('ran')"
    with program(down, *options) as process:
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (1, "", "")


def test_rounds_with_an_interval():
    nodes = Nodes(a=REFUSED, b=0.25)
    options = {"deadline": 10.0, "timeout": 1.0, "connector": nodes}
    report, seconds = run_virtually(
        wait(targets_of(["a:1", "b:1"]), Goal(2), interval=2.0, **options)
    )
    assert report.dead == ["a:1"]
    assert seconds == pytest.approx(10.0, abs=0.05)
    times = [time for host, time in nodes.probes if host == "a"]
    assert times[:5] == pytest.approx([0, 2, 4, 6, 8])


class Pages(http.server.BaseHTTPRequestHandler):
    requests = ()

    def do_GET(self):
        Pages.requests = [*Pages.requests, (self.path, self.headers["Host"])]
        status = int(self.path.strip("/"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"x" * 100_000)

    def log_message(self, *_):
        pass


@pytest.fixture
def pages():
    Pages.requests = ()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("number", [200, 204, 302, 404, 503])
def test_http(run, pages, number):
    status, output, _ = run(pages, "--http", f"/{number}", "--deadline", "0", "--json")
    node = json.loads(output.splitlines()[0])
    assert Pages.requests == [(f"/{number}", pages)]
    if number < 300:
        assert (status, node["alive"]) == (0, True)
    else:
        assert (status, node["reason"]) == (1, "unhealthy")
        assert node["message"].startswith(f"HTTP status {number} ")


def test_http_of_a_name(run, pages):
    name = pages.replace("127.0.0.1", "localhost")
    assert run(name, "--http", "/200", "--deadline", "0")[0] == 0
    assert Pages.requests == [("/200", name)]


def check(address, path="/x", timeout=1.0):
    async def checked():
        async with HttpConnector(path) as connector:
            return await check_nodes([address], timeout=timeout, connector=connector)

    return asyncio.run(checked()).results[0]


@pytest.mark.parametrize(
    ("answer", "reason", "message"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n", "unhealthy", "does not speak HTTP: b'SSH-2.0"),
        (b"HTTP/1.1 20", "unhealthy", "does not speak HTTP"),
        (b"\xff" * 9000, "unhealthy", "does not speak HTTP"),
        (b"", "unhealthy", "does not speak HTTP: b''"),
        (None, "timeout", "no answer within 0.5 s"),
        (b"HTTP/1.0 500\n", "unhealthy", "HTTP status 500"),
    ],
)
def test_answers_that_are_not_http(answer, reason, message):
    ended = threading.Event()

    def serve(server):
        for _ in range(2):  # the first connection sends nothing
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                if connection.recv(4096):
                    if answer is None:
                        ended.wait(60)
                    connection.sendall(answer or b"")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        status = check(address, timeout=0.5 if answer is None else 30.0)
        ended.set()
        thread.join()
    assert status.reason == reason
    assert message in status.message


def test_http_of_a_closed_port(down):
    assert check(down).reason is Reason.REFUSED


@pytest.mark.parametrize("path", ["", "x", "/a b", "/\r\nX: y", "/é"])
def test_paths_that_are_not(path):
    with pytest.raises(ValueError, match="must begin with / and have only"):
        HttpConnector(path)
