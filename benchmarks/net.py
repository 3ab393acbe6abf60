"""The node checker beside ten threads that connect one after the other.

Everything is on loopback: a server on all of 127.0.0.0/8, a port that refuses, and a
port whose queue is full, so that it is silent.
"""

import asyncio
import contextlib
import queue
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import Case, Side, interleave
from monolith_optax.net import check_nodes

TIMEOUT = 1.0
ACCEPT = """
import contextlib, socket, sys
with socket.socket(fileno=int(sys.argv[1])) as server:
    while True:
        with contextlib.suppress(OSError):
            server.accept()[0].close()
"""


def main(*, quick: bool) -> list[Case]:
    """Wall times and descriptors, and the command line's start-up time."""
    scale = 100 if quick else 1
    rounds = 1 if quick else 3
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with nodes() as (live, refused, silent):
        some = [*live[: 900 // scale], *silent[: 100 // scale]]
        cases = [
            compare("live", live[: 10_000 // scale], live, rounds),
            compare("refused", refused[: 1000 // scale], live, rounds),
            compare("a tenth of them silent", some, live, rounds),
            # Ten threads take a hundred seconds for these.
            compare("silent", silent[: 1000 // scale], live, 1),
        ]
    command = [sys.executable, "-m", "monolith_optax.net", "--help"]

    def start() -> object:
        return subprocess.run(command, check=True, capture_output=True)

    times = interleave({"--help": lambda: start}, 3 * rounds, warm_up=False)
    return [*cases, Case("net", "command line", times)]


def compare(label: str, addresses: list[str], live: list[str], rounds: int) -> Case:
    """Times both on the same addresses, and counts who is called dead but is not."""
    random.Random(0).shuffle(addresses)
    checks = {"check_nodes": ours, "ten threads": ten_threads}
    up = len(set(addresses) & set(live))
    missed = dict.fromkeys(checks, 0)

    def prepared(side: str) -> Side:
        def run() -> None:
            missed[side] += up - checks[side](addresses)

        def prepare() -> Callable[[], object]:
            time.sleep(1)  # lets the server empty its queue
            return run

        return prepare

    with most_descriptors() as most:
        turns = {side: prepared(side) for side in checks}
        times = interleave(turns, rounds, warm_up=False)
    more = {
        "live missed": missed,
        # They include those of the servers and the threads.
        "most open files": dict.fromkeys(checks, most[0]),
    }
    return Case("net", f"{len(addresses):,} addresses, {label}", times, more=more)


def ours(addresses: list[str]) -> int:
    """How many are alive, by the node checker."""
    return len(asyncio.run(check_nodes(addresses, timeout=TIMEOUT)).alive)


def ten_threads(addresses: list[str]) -> int:
    """How many are alive, by the method of Monolith's checker."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for address in addresses:
        todo.put(address)
    alive = []

    def work() -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                host, port = todo.get_nowait().split(":")
                with contextlib.suppress(OSError), socket.socket() as probe:
                    probe.settimeout(TIMEOUT)
                    probe.connect((host, int(port)))
                    alive.append(host)

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(alive)


@contextlib.contextmanager
def nodes() -> Iterator[tuple[list[str], list[str], list[str]]]:
    """Ten thousand addresses each that are live, refuse and are silent."""
    hosts = [f"127.{i // 62_500}.{i // 250 % 250}.{i % 250 + 1}" for i in range(10_000)]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("", 0))
        live, _, silent = sockets
        live.listen(4096)
        # Another process, so that taking connections does not wait for the probes.
        server = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", ACCEPT, str(live.fileno())],
                pass_fds=[live.fileno()],
            )
        )
        stack.callback(server.kill)
        silent.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", silent.getsockname()[1]))
        ports = [one.getsockname()[1] for one in sockets]
        a, b, c = ([f"{host}:{port}" for host in hosts] for port in ports)
        yield a, b, c


@contextlib.contextmanager
def most_descriptors() -> Iterator[list[int]]:
    """The largest number of open files that another thread sees."""
    most, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.01):
            most[0] = max(most[0], len(list(Path("/dev/fd").iterdir())))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()
