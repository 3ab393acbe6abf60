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
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from monolith_optax.net import check_nodes

TIMEOUT = 1.0
ACCEPT = """
import contextlib, socket, sys
with socket.socket(fileno=int(sys.argv[1])) as server:
    while True:
        with contextlib.suppress(OSError):
            server.accept()[0].close()
"""


def main(*, quick: bool) -> None:
    """Prints wall times, descriptors and the command line's start-up time."""
    scale = 100 if quick else 1
    repeats = 1 if quick else 5
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"net: seconds, median of {repeats} interleaved; open files <= {hard}")
    print(
        f"{'addresses':32}{'ours':>9}{'10 threads':>12}{'ratio':>8}{'most files':>12}"
    )
    with nodes() as (live, refused, silent):
        for label, addresses in {
            "live": live[: 10_000 // scale],
            "refused": refused[: 1000 // scale],
            "live, a tenth silent": [
                *live[: 900 // scale],
                *silent[: 100 // scale],
            ],
            "silent": silent[: 1000 // scale],
        }.items():
            random.Random(0).shuffle(addresses)
            # Ten threads take a hundred seconds for these.
            rounds = 1 if label == "silent" else repeats
            sides = {"ours": ours, "threads": ten_threads}
            times: dict[str, list[float]] = {side: [] for side in sides}
            missed = dict.fromkeys(sides, 0)
            with most_descriptors() as most:
                for _ in range(rounds):
                    for side, check in sides.items():
                        time.sleep(1)  # the server's queue is to be empty again
                        start = time.perf_counter()
                        alive = check(addresses)
                        times[side].append(time.perf_counter() - start)
                        missed[side] += len(set(addresses) & set(live)) - alive
            a, b = (statistics.median(times[side]) for side in sides)
            title = f"{len(addresses)} {label}"
            row = f"{title:32}{a:9.3f}{b:12.3f}{b / a:8.1f}{most[0]:12}"
            print(f"{row}{missed['ours']:9}/{missed['threads']}", flush=True)
    command = [sys.executable, "-m", "monolith_optax.net", "--help"]
    starts = [
        seconds(lambda: subprocess.run(command, check=True, capture_output=True))
        for _ in range(3 * repeats)
    ]
    print(f"command line's --help: {statistics.median(starts):.3f} s")


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


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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
