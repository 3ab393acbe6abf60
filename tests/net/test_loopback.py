"""The node checker against real sockets on loopback."""

import asyncio
import concurrent.futures
import contextlib
import errno
import gc
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
from choosing import sampled

from monolith_optax.net import (
    NodeAliveChecker,
    Reason,
    TcpConnector,
    _connect,
    _names,
    check_nodes,
    concat_ip_and_port,
    wait_for_nodes,
)
from monolith_optax.net._blocking import run_to_end

FILLERS = 4


def port_below_the_ephemeral_range(bind):
    """Binds to a port that no outgoing connection gets by chance."""
    for port in random.sample(range(10_000, 32_000), 200):
        with contextlib.suppress(OSError):
            bind(port)
            return port
    raise OSError("no free port")


@pytest.fixture
def listen():
    """Makes listening sockets, by IP address: returns the address of each."""
    with contextlib.ExitStack() as stack:

        def start(ip="127.0.0.1", backlog=128):
            family = socket.AF_INET6 if ":" in ip else socket.AF_INET
            server = stack.enter_context(socket.socket(family))
            port = port_below_the_ephemeral_range(lambda port: server.bind((ip, port)))
            server.listen(backlog)
            return concat_ip_and_port(ip, port)

        yield start


@pytest.fixture
def alive(listen):
    return listen()


@pytest.fixture
def silent(listen):
    """A node that answers no connection attempt: its queue is full."""
    address = listen(backlog=0)
    host, port = address.split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(FILLERS):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, int(port)))
        time.sleep(0.05)
        yield address


@pytest.fixture
def refused():
    """A node that refuses: the port is bound, and nobody listens."""
    with socket.socket() as bound:
        port = port_below_the_ephemeral_range(
            lambda port: bound.bind(("127.0.0.1", port))
        )
        yield f"127.0.0.1:{port}"


def descriptors():
    """How many sockets, pipes and event queues are open."""
    links = []
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory itself
            links.append(str(path.readlink()))
    return sum(link.startswith(("socket:", "pipe:", "anon_inode:")) for link in links)


@pytest.fixture(autouse=True)
def nothing_left_behind(capfd):
    """No descriptor, thread or process outlives a call, and nothing is printed."""
    files, threads = descriptors(), threading.active_count()
    yield
    if descriptors() > files:
        gc.collect()  # it takes long
    assert descriptors() <= files
    assert threading.active_count() == threads
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    worker = [pid for pid in children if b"_names_worker" in cmdline(pid)]
    assert worker == []
    assert capfd.readouterr() == ("", "")


def cmdline(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.fixture(params=["at once", "later"])
def answers(request, monkeypatch):
    """Answers are there before `connect` returns, as on loopback, or come later."""
    if request.param == "later":
        seen, has_answered = weakref.WeakSet(), _connect._has_answered

        def has_answered_later(connection):
            first = connection not in seen
            seen.add(connection)
            return not first and has_answered(connection)

        monkeypatch.setattr(_connect, "_has_answered", has_answered_later)


def check(*addrs, timeout=60.0, **options):
    return asyncio.run(check_nodes(addrs, timeout=timeout, **options))


@pytest.mark.usefixtures("answers")
def test_alive_refused_and_silent(alive, refused, silent):
    report = check(alive, refused, silent, timeout=0.5)
    assert [status.reason for status in report.results] == [
        None,
        Reason.REFUSED,
        Reason.TIMEOUT,
    ]
    assert report[refused].message == "Connection refused"
    assert report[silent].message == "no answer within 0.5 s"
    assert report[alive].latency > 0
    assert report[silent].latency >= 0.5


def test_ipv6(listen):
    address = listen("::1")
    port = address.rpartition(":")[2]
    report = check(address, f"[0::1]:{port}")
    assert report.all_alive


MONOLITHS_ANSWERS = [
    "127.0.0.1", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:text", "tcp://x:1", None,
]  # fmt: skip


def test_monoliths_answers(alive):
    port = alive.rpartition(":")[2]
    ups = [alive, f"[127.0.0.1]:{port}", f"127.1:{port}", f"localhost:{port}"]
    addrs = [*ups, *MONOLITHS_ANSWERS, alive]
    checker = NodeAliveChecker(addrs, timeout=60.0)
    assert checker.get_addrs() is addrs
    assert checker.get_alive_nodes() == ups
    assert checker.get_dead_nodes() == MONOLITHS_ANSWERS
    assert not checker.all_nodes_alive()
    for address in MONOLITHS_ANSWERS:
        assert checker.report[address].reason is Reason.INVALID_ADDRESS
    empty = NodeAliveChecker([])
    assert empty.all_nodes_alive()
    assert empty.get_alive_nodes() == empty.get_dead_nodes() == []


def test_checker_probes_again_and_takes_iterators(refused):
    checker = NodeAliveChecker(iter([refused]), 1, 10)
    assert checker.get_addrs() == [refused]
    first = checker.report
    assert checker.check() == checker.report
    assert checker.report is not first
    assert checker.get_dead_nodes() == [refused]


def test_checker_works_inside_a_running_loop(alive, refused):
    async def notebook_cell():
        checker = NodeAliveChecker([alive, refused])
        assert checker.get_alive_nodes() == [alive]
        with pytest.raises(ValueError, match="timeout must be"):
            NodeAliveChecker([alive], timeout=0)
        return checker.all_nodes_alive()

    assert asyncio.run(notebook_cell()) is False


def test_names_are_looked_up(listen):
    port = listen().rpartition(":")[2]
    assert check(f"localhost:{port}").all_alive


def connect(addresses, port, timeout=60.0):
    """Checks a made-up name that stands for these IP addresses."""

    async def lookup(name):
        assert name == "name"
        return [
            (socket.AF_INET6, (ip, 0, 0, 0)) if ":" in ip else (socket.AF_INET, (ip, 0))
            for ip in addresses
        ]

    async def run():
        async with TcpConnector(lookup) as connector:
            report = await check_nodes(
                [f"name:{port}"], timeout=timeout, connector=connector
            )
        return report.results[0]

    return asyncio.run(run())


def test_a_silent_first_address_does_not_hide_a_second(monkeypatch, silent):
    monkeypatch.setattr(_connect, "ATTEMPT_DELAY", 0.01)
    host, port = silent.split(":")
    with socket.socket() as server:
        server.bind(("127.0.0.2", int(port)))
        server.listen()
        assert connect([host, "127.0.0.2"], port).alive


def test_a_refusing_first_address_does_not_hide_a_second(listen):
    port = listen("127.0.0.2").rpartition(":")[2]
    assert connect(["127.0.0.3", "::1", "127.0.0.2"], port).alive


def test_a_refusal_says_more_than_silence(silent):
    host, port = silent.split(":")
    status = connect(["127.0.0.2", "::1"], port)
    assert status.reason is Reason.REFUSED
    status = connect(["127.0.0.2", host], port, timeout=0.1)
    assert status.reason is Reason.TIMEOUT


def test_a_name_without_addresses():
    status = connect([], 80)
    assert status.reason is Reason.NAME_NOT_RESOLVED
    assert status.message


@pytest.mark.usefixtures("answers")
def test_a_connection_that_meets_itself_is_not_alive():
    # A free port of the ephemeral range: some attempt gets it as its own port too.
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert port >= low
    with socket.socket() as met:
        met.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        met.bind(("127.0.0.1", port))
        met.connect(("127.0.0.1", port))  # TCP's simultaneous open, for real
        assert met.getsockname() == met.getpeername()
        met.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    original = socket.socket

    class Bound(original):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if args and args[0] == socket.AF_INET:
                self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                self.bind(("127.0.0.1", port))

    async def run():
        socket.socket = Bound
        try:
            return await check_nodes([f"127.0.0.1:{port}"])
        finally:
            socket.socket = original

    status = asyncio.run(run()).results[0]
    assert (status.alive, status.reason) == (False, Reason.REFUSED)
    assert "itself" in status.message


@pytest.mark.usefixtures("answers")
def test_no_connection_is_left_in_time_wait(alive):
    port = int(alive.rpartition(":")[2])
    assert check(*[f"127.0.{i}.1:{port}" for i in range(3)], alive).alive == [alive]
    for _ in range(20):
        assert check(alive).all_alive
    table = Path("/proc/net/tcp").read_text()
    rows = [line.split() for line in table.splitlines()[1:]]
    waiting = [
        row for row in rows if row[3] == "06" and f":{port:04X}" in line_ends(row)
    ]
    assert waiting == []


def line_ends(row):
    return row[1][-5:], row[2][-5:]


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize(
    "answers",
    sampled(["at once", "later"], "at once"),
    indirect=True,
)
def test_ten_thousand_addresses():
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 11_000:
        pytest.skip(f"the limit of open files is {hard}, and this test needs 11,000")
    with socket.socket() as server:
        port = port_below_the_ephemeral_range(lambda port: server.bind(("", port)))
        server.listen(4096)
        addrs = [
            f"127.{i // 62_500}.{i // 250 % 250}.{i % 250 + 1}:{port}"
            for i in range(10_000)
        ]
        assert len(set(addrs)) == 10_000
        stop = threading.Event()

        def accept():
            server.settimeout(0.1)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    server.accept()[0].close()

        thread = threading.Thread(target=accept)
        thread.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 11_000), hard))
        try:
            report = check(*addrs)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            stop.set()
            thread.join()
    assert len(report.alive) == 10_000, str(report)[:1000]


SMALL_LIMIT = """
import asyncio, resource, socket, sys
from monolith_optax.net import _connect, check_nodes
if sys.argv[1] == "later":
    _connect._has_answered = lambda connection: False
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
with socket.socket() as server:
    server.bind(("", 0))
    server.listen(1024)
    port = server.getsockname()[1]
    addrs = [f"127.0.0.{i}:{port}" for i in range(1, 201)]
    assert asyncio.run(check_nodes(addrs, timeout=60)).all_alive
    hold = []
    def take_all_descriptors_but(spare):
        try:
            while True:
                hold.append(socket.socket())
        except OSError:
            for _ in range(spare):
                hold.pop().close()
    take_all_descriptors_but(4)  # three for the event loop and one for a probe
    assert asyncio.run(check_nodes(addrs, timeout=60)).all_alive
    async def starved():
        take_all_descriptors_but(0)
        return await check_nodes(addrs[:3], timeout=60)
    report = asyncio.run(starved())
    assert report.local_faults == report.dead == addrs[:3], report
    assert "Too many open files" in str(report)
    for held in hold:
        held.close()
"""


@pytest.mark.parametrize("answers", ["at once", "later"])
def test_few_descriptors(answers):
    command = [sys.executable, "-c", SMALL_LIMIT, answers]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "could not be checked" in result.stderr  # logging's last resort


@pytest.mark.usefixtures("answers")
def test_cancellation_at_random_moments_leaves_nothing(alive, refused, silent):
    rng = random.Random(0)

    async def cancelled_after(seconds):
        addrs = [alive, refused, silent, "localhost:1"]
        task = asyncio.create_task(check_nodes(addrs, timeout=0.5))
        await asyncio.sleep(seconds)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def run():
        before = descriptors()
        for _ in range(15):
            await cancelled_after(rng.choice([0.0, 0.001, 0.02, 0.05]) * rng.random())
            assert descriptors() <= before

    asyncio.run(run())


def test_a_lookup_process_that_dies_is_replaced(listen):
    port = int(listen().rpartition(":")[2])

    async def run():
        async with TcpConnector() as connector:
            await connector("localhost", port)
            connector._own_lookup._process.kill()
            await asyncio.sleep(0.1)
            await connector("localhost", port)

    asyncio.run(run())


@pytest.mark.parametrize("python", [None, "", "/no/such", "/bin/true", "/bin/cat"])
def test_a_lookup_process_that_does_not_start_is_a_local_fault(
    monkeypatch, alive, python
):
    if python == "/bin/cat":  # never says that it is up
        python = shutil.which("sleep")
        monkeypatch.setattr(_names, "START_TIMEOUT", 0.3)
        monkeypatch.setattr(_names, "_WORKER", "60")
        monkeypatch.setattr(subprocess, "Popen", without_options(subprocess.Popen))
    monkeypatch.setattr(sys, "executable", python)
    report = check(alive, "localhost:1")
    assert report.alive == [alive]
    assert report["localhost:1"].reason is Reason.LOCAL_FAULT


def without_options(popen):
    return lambda command, **files: popen([command[0], command[-1]], **files)


@pytest.mark.usefixtures("answers")
def test_an_answer_counts_although_the_loop_was_held_up(alive):
    async def run(moment):
        asyncio.get_running_loop().call_later(moment, time.sleep, 0.1)
        return await check_nodes([alive], timeout=0.02)

    for moment in (0, 1e-5, 1e-4, 5e-4):
        assert asyncio.run(run(moment)).all_alive


def test_a_shortage_here_is_not_blamed_on_the_node(monkeypatch):
    def fail(address):
        six = address[0] == socket.AF_INET6
        number = errno.ENETUNREACH if six else errno.EMFILE
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_connect, "_begin", fail)
    assert connect(["::1", "127.0.0.1"], 80).reason is Reason.LOCAL_FAULT


def test_checker_leaves_the_current_event_loop_alone():
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        NodeAliveChecker(["no port"])
        assert asyncio.get_event_loop() is loop
    finally:
        asyncio.set_event_loop(None)
        loop.close()


INTERRUPTED = """
import asyncio, os, signal, sys, threading, time
from monolith_optax.net import NodeAliveChecker
async def cell():
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        NodeAliveChecker(sys.argv[1:], timeout=600)
    except KeyboardInterrupt:
        print(threading.active_count())
loop = asyncio.new_event_loop()
loop.run_until_complete(cell())  # as notebooks run their cells
loop.close()
"""


def test_interrupting_a_notebook_ends_the_check(silent):
    command = [sys.executable, "-c", INTERRUPTED, silent]
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=100
    )
    assert result.stdout == "1\n", result.stderr


def test_checks_from_several_threads(alive, refused):
    reports = []

    def work():
        reports.append(check(alive, refused, f"localhost:{alive.rpartition(':')[2]}"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(report.alive) for report in reports] == [2] * 4


def test_interrupting_a_check_before_it_has_begun(monkeypatch):
    thread = concurrent.futures.ThreadPoolExecutor.submit

    def submit(executor, run):
        thread(executor, lambda: time.sleep(0.1) or run())
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit)

    async def cell():
        with pytest.raises(KeyboardInterrupt):
            run_to_end(asyncio.Event().wait)  # for ever

    asyncio.run(cell())


@pytest.fixture(scope="module")
def uvloop():
    uvloop = pytest.importorskip("uvloop")
    uvloop.run(asyncio.sleep(0))  # opens two files that stay open
    return uvloop


@pytest.mark.usefixtures("answers")
def test_another_event_loop(uvloop, alive, refused, silent):
    name = f"localhost:{alive.rpartition(':')[2]}"

    async def run():
        report = await check_nodes([alive, name], timeout=60.0)
        assert report.all_alive, report
        report = await wait_for_nodes([name], deadline=60.0, timeout=60.0)
        assert report.all_alive, report
        nodes = [alive, refused, silent, "no-such-name.invalid:1"]
        report = await check_nodes(nodes, timeout=0.5)
        return [status.reason for status in report.results]

    reasons = uvloop.run(run())
    assert reasons[:3] == [None, Reason.REFUSED, Reason.TIMEOUT]
    assert reasons[3] in (Reason.NAME_NOT_RESOLVED, Reason.NO_NAME_SERVER)


@pytest.mark.parametrize("answer", ["nonsense", '{"name": "nobody asked for it"}'])
def test_faults_of_name_lookup_are_not_those_of_a_node(monkeypatch, tmp_path, answer):
    worker = tmp_path / "worker.py"
    lines = '{"name": ""}\n' + answer + "\n"
    worker.write_text(
        f"import socket; channel = socket.socket(fileno=0)\n"
        f"channel.sendall({lines.encode()!r}); channel.recv(9); channel.recv(9)\n"
    )
    monkeypatch.setattr(_names, "_WORKER", worker)
    with pytest.raises(ExceptionGroup) as caught:
        check("localhost:1", timeout=5.0)
    assert isinstance(caught.value.exceptions[0], ValueError | KeyError)


@pytest.mark.usefixtures("answers")
@pytest.mark.parametrize("error", [ZeroDivisionError, OSError])
def test_faults_in_judging_an_answer_are_not_those_of_a_node(
    monkeypatch, alive, silent, error
):
    def fail(_):
        raise error("a bug")

    monkeypatch.setattr(_connect, "_error_of", fail)
    with pytest.raises(ExceptionGroup) as caught:
        check(silent, alive)
    assert isinstance(caught.value.exceptions[0], error)


@pytest.mark.usefixtures("answers")
def test_nothing_is_sent():
    received = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def serve():
            for _ in range(2):
                connection, _ = server.accept()
                with connection, contextlib.suppress(ConnectionResetError):
                    received.append(connection.recv(1))

        thread = threading.Thread(target=serve)
        thread.start()
        assert check(f"127.0.0.1:{port}", f"localhost:{port}").all_alive
        thread.join()
    assert set(received) <= {b""}
