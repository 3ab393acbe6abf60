"""Watches nodes that come and go, for a while: `net_soak.py SECONDS NODES THERE`.

Runs on the host 'here' of net_cable. A tenth of the nodes are killed and restarted at
random, a tenth have names that a slow name server knows, and one is beyond a cable
that is cut and mended. The rest never go down. Prints what it saw as JSON.
"""

import asyncio
import collections
import contextlib
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time

from net_cable import set_cable

# Seconds. On a busy machine, too, a name server must not look dead.
INTERVAL, TIMEOUT, SLOWEST_ANSWER = 0.5, 5.0, 0.5
STEADY = 25.0  # a node stays up or down at least that long, and in the end everybody
NAME_SERVER = "127.0.0.53"
WATCH = """
import asyncio, json, os, resource, sys, time
from monolith_optax.net import watch_nodes
interval, timeout, *nodes = sys.argv[1:]

def say(value):
    print(json.dumps(value), flush=True)

async def watch():
    async for t in watch_nodes(nodes, interval=float(interval), timeout=float(timeout)):
        say([t.address, t.alive, t.status.message])

def held():
    with open("/proc/self/statm") as statm:
        kilobytes = int(statm.read().split()[1]) * resource.getpagesize() // 1024
    return [len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd")), kilobytes]

async def measure():
    while True:
        await asyncio.sleep(0.1)
        say(held())

async def main():
    say(held())
    tasks = [asyncio.create_task(watch()), asyncio.create_task(measure())]
    await asyncio.to_thread(sys.stdin.read)  # until it is told to end
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(result, asyncio.CancelledError):
            raise RuntimeError("the watch ended") from result
    say(held())

asyncio.run(main())
"""


class Node:
    """A listening socket that can be killed and restarted."""

    def __init__(self, ip, port, name=None):
        self.socket_address = ip, port
        self.address = f"{name or ip}:{port}"
        self.times = collections.Counter({True: 0, False: 0})  # it came up, went down
        self.changed = 0.0
        self.server = None
        self.toggle()

    def toggle(self):
        up = self.server is None
        self.times[up] += 1  # before anybody can see it
        if up:
            self.server = socket.create_server(self.socket_address)
            self.server.setblocking(False)
        else:
            self.server.close()
            self.server = None
        self.changed = time.monotonic()

    @property
    def up(self):
        return self.server is not None

    def accept(self):
        """Empties the queue of connections: a node whose queue is full is silent."""
        with contextlib.suppress(BlockingIOError):
            while self.up:
                self.server.accept()[0].close()


class Distant:
    """The node beyond the cable."""

    address = "10.99.0.2:2222"

    def __init__(self, there):
        self.there, self.up, self.changed = there, True, time.monotonic()
        self.times = collections.Counter({True: 1, False: 0})

    def toggle(self):
        self.up = not self.up
        self.times[self.up] += 1
        set_cable("up" if self.up else "down", self.there)
        self.changed = time.monotonic()


class NameServer(asyncio.DatagramProtocol):
    """Says that n7.soak is 127.3.0.7, late."""

    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, question, client):
        end = question.index(0, 12) + 5
        number = int(question[13 : 13 + question[12]].decode().removeprefix("n"))
        is_ipv4 = question[end - 4 : end - 2] == b"\0\1"
        header = question[:2] + struct.pack("!5H", 0x8180, 1, is_ipv4, 0, 0)
        record = struct.pack("!HHHIH", 0xC00C, 1, 1, 0, 4) + bytes(
            [127, 3, number // 250, number % 250 + 1]
        )
        reply = header + question[12:end] + record * is_ipv4
        delay = random.uniform(0, SLOWEST_ANSWER)
        asyncio.get_running_loop().call_later(
            delay, self.transport.sendto, reply, client
        )


async def answer_names():
    await asyncio.get_running_loop().create_datagram_endpoint(
        NameServer, (NAME_SERVER, 53)
    )
    await asyncio.Event().wait()


def main(seconds, count, there):
    named = [
        Node(f"127.3.{i // 250}.{i % 250 + 1}", 2222, f"n{i}.soak")
        for i in range(count // 10)
    ]
    numbered = [
        Node(f"127.2.{i // 250}.{i % 250 + 1}", 2222)
        for i in range(count - len(named) - 1)
    ]
    mortals = [*named[::2], *numbered[: count // 10], Distant(there)]
    nodes = {node.address: node for node in [*named, *numbered, mortals[-1]]}
    name_server = threading.Thread(target=asyncio.run, args=[answer_names()])
    name_server.daemon = True
    name_server.start()

    command = [sys.executable, "-c", WATCH, str(INTERVAL), str(TIMEOUT), *nodes]
    pipe = subprocess.PIPE
    watch = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(watch.stdout))
    reader.start()
    end = time.monotonic() + seconds
    rng = random.Random(seconds)
    accepted = 0.0
    while (now := time.monotonic()) < end:
        if now > accepted + 1.0:
            accepted = now
            for node in [*named, *numbered]:
                node.accept()
        if now < end - STEADY:
            ready = [n for n in mortals if now - n.changed > STEADY]
            changing = rng.sample(ready, min(1, len(ready)))
        else:  # all come up: then there are pauses between rounds, with no file open
            changing = [n for n in mortals if not n.up]
        for node in changing:
            node.toggle()
        time.sleep(rng.expovariate(len(mortals) / STEADY))
    watch.stdin.close()
    reader.join()
    watch.wait()
    print(json.dumps(findings(nodes, [json.loads(line) for line in lines])))


def findings(nodes, lines):
    """What was seen that did not happen, and what was not seen that did."""
    seen = {address: [] for address in nodes}
    false = []
    measured = [line for line in lines if len(line) == 3 and isinstance(line[0], int)]
    for address, alive, message in (x for x in lines if isinstance(x[0], str)):
        seen[address].append(alive)
        # Nodes change state rarely enough for each change to be noticed once.
        if seen[address].count(alive) > nodes[address].times[alive]:
            false.append([address, alive, message])
    wrong = [a for a, node in nodes.items() if seen[a][-1:] != [node.up]]
    third = len(measured) // 3
    early, late = measured[third : 2 * third], measured[-third:]
    kilobytes = min(x[2] for x in late) - min(x[2] for x in early)
    tasks, files, _ = (b - a for a, b in zip(measured[0], measured[-1], strict=True))
    return {
        "nodes": len(nodes),
        "changes": sum(sum(node.times.values()) for node in nodes.values()),
        "transitions": sum(map(len, seen.values())),
        "false transitions": false,
        "wrong at the end": wrong,
        "tasks gained": tasks,
        "files gained": files,
        "kilobytes gained": kilobytes,
    }


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(float(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
